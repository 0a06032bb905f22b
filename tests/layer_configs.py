"""Models whose layers are not one mixer and one MLP behind norms, of toy parts and of known ones.

"halves" has a mixer or an MLP in each layer, "side by side" attention beside a recurrence with a
scale on every write, on the embedding and on the logits, "norms" norms on writes, on queries and on
keys. "mamba2" has Mamba-2 alone, before an MLP and beside attention, in each form of its norm.
"mamba" has Mamba without the norms of dt, B and C, and without their weights.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from hooked_hybrid import HybridConfig
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    LayerConfig,
    Mamba2Config,
    MambaConfig,
    MoEConfig,
    QKNormConfig,
    RGLRUConfig,
    RotaryConfig,
)
from tests.models import D_VOCAB
from tests.toy_mixer import EmaConfig
from tests.toy_mlp import SquaredConfig

EMA, SQUARED = EmaConfig(4, 8), SquaredConfig(20)
ATTENTION = AttentionConfig(4, 2, 6, n_keys=7)
MAMBA2 = Mamba2Config(n_heads=6, d_head=4, d_state=5, n_groups=2)
ROTARY = replace(ATTENTION, rotary=RotaryConfig(4), out_bias=True)


def config(*layers: LayerConfig, **changes: Any) -> HybridConfig:
    return HybridConfig(d_model=24, d_vocab=D_VOCAB, layers=layers, **changes)


CONFIGS = {
    "halves": config(
        LayerConfig(EMA, None),
        LayerConfig(None, SQUARED),
        LayerConfig(ATTENTION, None),
        LayerConfig(None, GatedMLPConfig(20)),
    ),
    "side by side": config(
        LayerConfig(
            (replace(ROTARY, write_scale=0.5), replace(EMA, write_scale=1.7)),
            replace(SQUARED, write_scale=0.8),
        ),
        LayerConfig((ATTENTION, RGLRUConfig(32, 4)), MoEConfig(4, 2, 20, write_scale=1.3)),
        LayerConfig(MambaConfig(48, 5, 3, write_scale=0.7), GatedMLPConfig(20, write_scale=2.0)),
        embedding_scale=3.0,
        logits_scale=0.25,
    ),
    "norms": config(
        LayerConfig(EMA, SQUARED),
        LayerConfig(replace(ROTARY, qk_norm=QKNormConfig("all")), SQUARED, norm="post"),
        LayerConfig((replace(ATTENTION, qk_norm=QKNormConfig("head")), EMA), SQUARED, norm="both"),
        LayerConfig(None, MoEConfig(4, 2, 20), norm="post"),
    ),
    "mamba2": config(
        LayerConfig(MAMBA2, None),
        LayerConfig(replace(MAMBA2, norm="norm_first", dt_min=0.005, dt_max=0.5), SQUARED),
        LayerConfig(
            (
                ATTENTION,
                replace(
                    MAMBA2,
                    norm=None,
                    n_groups=1,
                    in_bias=True,
                    out_bias=True,
                    conv_bias=False,
                    in_scale=1.3,
                    section_scales=(0.5, 1.5, 0.8, 1.2, 0.9),
                    write_scale=0.6,
                ),
            ),
            SQUARED,
        ),
    ),
    "mamba": config(
        LayerConfig(MambaConfig(48, 5, 3, inner_norm=None), None),
        LayerConfig(MambaConfig(48, 5, 3, inner_norm="plain"), SQUARED),
        LayerConfig(ATTENTION, None),
    ),
}
