"""Mixers: each has one file, with everything the library knows of its kind, and a line here."""

from hooked_hybrid.network.mixers.attention import Attention
from hooked_hybrid.network.mixers.base import MIXERS, Mixer, mixer_of, register_mixer, windows_of
from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.mixers.mamba2 import Mamba2
from hooked_hybrid.network.mixers.rglru import RGLRU

register_mixer(Attention, RGLRU, Mamba, Mamba2)

__all__ = [
    "MIXERS",
    "RGLRU",
    "Attention",
    "Mamba",
    "Mamba2",
    "Mixer",
    "mixer_of",
    "register_mixer",
    "windows_of",
]
