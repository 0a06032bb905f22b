"""Configs of hybrid models: frozen dataclasses, one for each kind of mixer and MLP."""

from hooked_hybrid.config.layer import LayerConfig, NormPlace
from hooked_hybrid.config.mixers import (
    AttentionConfig,
    Mamba2Config,
    MambaConfig,
    MixerConfig,
    PartConfig,
    RGLRUConfig,
    RotaryConfig,
)
from hooked_hybrid.config.mlps import Activation, GatedMLPConfig, MLPConfig, MoEConfig
from hooked_hybrid.config.model import HybridConfig
from hooked_hybrid.config.norms import NormConfig, NormStyle, QKNormConfig

__all__ = [
    "Activation",
    "AttentionConfig",
    "GatedMLPConfig",
    "HybridConfig",
    "LayerConfig",
    "MLPConfig",
    "Mamba2Config",
    "MambaConfig",
    "MixerConfig",
    "MoEConfig",
    "NormConfig",
    "NormPlace",
    "NormStyle",
    "PartConfig",
    "QKNormConfig",
    "RGLRUConfig",
    "RotaryConfig",
]
