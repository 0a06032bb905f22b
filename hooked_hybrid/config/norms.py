"""The config of a norm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_hybrid.config.fields import require_one_of

NormStyle = Literal["one_plus_weight", "weight"]
"""The factor of a norm: its weight, or 1 plus its weight."""


@dataclass(frozen=True)
class NormConfig:
    """RMSNorm: `x / sqrt(mean(x^2) + eps)` times `weight`, or times `1 + weight` in fp32.

    Examples:
        >>> from hooked_hybrid.config import NormConfig
        >>> NormConfig(style="one_plus_weight").eps
        1e-06
    """

    eps: float = 1e-6
    style: NormStyle = "weight"


@dataclass(frozen=True)
class QKNormConfig:
    """Norms on queries and on keys, before they are rotated.

    `over` says what is divided by one scale: the channels of each head, with one weight [d_head]
    for all heads ("head"), or those of all heads together ("all").

    Examples:
        >>> from hooked_hybrid.config import AttentionConfig, QKNormConfig
        >>> AttentionConfig(4, 1, 32, qk_norm=QKNormConfig("head")).qk_norm.over
        'head'
    """

    over: Literal["head", "all"] = "head"
    norm: NormConfig = NormConfig()

    def __post_init__(self) -> None:
        require_one_of(self, "over", "head", "all")
