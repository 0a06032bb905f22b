"""Mixers: each has one file, with everything the library knows of its kind, and a line here."""

from hooked_hybrid.network.mixers.attention import Attention
from hooked_hybrid.network.mixers.base import MIXERS, Mixer, mixer_of, register_mixer, windows_of
from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.mixers.rglru import RGLRU

register_mixer(Attention, RGLRU, Mamba)

__all__ = [
    "MIXERS",
    "RGLRU",
    "Attention",
    "Mamba",
    "Mixer",
    "mixer_of",
    "register_mixer",
    "windows_of",
]
