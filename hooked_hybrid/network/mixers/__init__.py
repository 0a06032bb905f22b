"""Mixers, by the class of their config: adding one is a file and a line here."""

from typing import Any

from hooked_hybrid.config import AttentionConfig, MambaConfig, RGLRUConfig
from hooked_hybrid.network.mixers.attention import Attention
from hooked_hybrid.network.mixers.base import Mixer
from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.mixers.rglru import RGLRU

MIXERS: dict[type, type[Mixer[Any]]] = {
    AttentionConfig: Attention,
    RGLRUConfig: RGLRU,
    MambaConfig: Mamba,
}

__all__ = ["MIXERS", "RGLRU", "Attention", "Mamba", "Mixer"]
