"""Mixers, by the class of their config: adding one is a file and a line here."""

from torch import nn

from hooked_hybrid.config import AttentionConfig, RGLRUConfig
from hooked_hybrid.mixers.attention import Attention
from hooked_hybrid.mixers.rglru import RGLRU

MIXERS: dict[type, type[nn.Module]] = {AttentionConfig: Attention, RGLRUConfig: RGLRU}

__all__ = ["MIXERS", "RGLRU", "Attention"]
