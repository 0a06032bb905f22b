"""The configs of MLPs: a frozen dataclass for each kind."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_hybrid.config.fields import require_positive
from hooked_hybrid.config.mixers import PartConfig

Activation = Literal["gelu_tanh", "silu"]
"""The activation of a gated MLP."""


@dataclass(frozen=True)
class MLPConfig(PartConfig):
    """The config of an MLP; each kind has its own class, see `network.mlps.register_mlp`.

    Examples:
        >>> from hooked_hybrid.config import GatedMLPConfig, MLPConfig
        >>> issubclass(GatedMLPConfig, MLPConfig)
        True
    """


@dataclass(frozen=True)
class GatedMLPConfig(MLPConfig):
    """`down(act(gate(x)) * up(x))`; `d_mlp` is the width of gate and of up, each.

    Examples:
        >>> from hooked_hybrid.config import GatedMLPConfig
        >>> GatedMLPConfig(d_mlp=384, act="silu", bias=False).d_mlp
        384
    """

    d_mlp: int
    act: Activation = "gelu_tanh"
    bias: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "d_mlp")


@dataclass(frozen=True)
class MoEConfig(MLPConfig):
    """A mixture of `n_experts` gated MLPs, of which a router chooses `n_chosen` for each token.

    The weights of the chosen ones are their shares of a softmax over all experts, not renormalised.

    Examples:
        >>> from hooked_hybrid.config import MoEConfig
        >>> moe = MoEConfig(n_experts=16, n_chosen=2, d_mlp=448)
        >>> moe.n_experts, moe.act
        (16, 'silu')
    """

    n_experts: int
    n_chosen: int
    d_mlp: int
    act: Activation = "silu"

    def __post_init__(self) -> None:
        super().__post_init__()
        require_positive(self, "n_experts", "n_chosen", "d_mlp")
        if self.n_chosen > self.n_experts:
            raise ValueError(f"n_chosen={self.n_chosen} of n_experts={self.n_experts}")
