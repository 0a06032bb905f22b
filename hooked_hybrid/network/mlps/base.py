"""The interface of an MLP, for its block and for the rest of the library."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

from torch import Tensor

from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.part import Part, look_up, register
from hooked_hybrid.shapes import Resid

MLPS: dict[type, type[MLP]] = {}
"""The class of each kind of MLP, by the class of its config."""


class MLP(Part):
    """A map that acts on each position separately.

    Examples:
        >>> from hooked_hybrid.network.mlps import MLP
        >>> isinstance(jamba.blocks[1].mlp, MLP), jamba.blocks[1].mlp.kind
        (True, 'moe')
    """

    def __init__(self, cfg: Any, d_model: int) -> None:  # noqa: ARG002  (made with both)
        super().__init__()
        self.cfg = cfg

    @abstractmethod
    def forward(self, x: Resid, layout: Layout) -> Resid:
        """Return the MLP's output."""

    def asks_for_counts(self, x: Tensor) -> bool:  # noqa: ARG002
        """Return whether a decoding step waits for the host to read results: by default no.

        Args:
            x: a tensor with the device and dtype of a step.
        """
        return False


def register_mlp(*mlps: type[MLP]) -> None:
    """Register MLP classes, by their config classes.

    Raises:
        NotSupported: a class does not state its config or its kind.
        ValueError: another class has its config or its kind.

    Examples:
        >>> from hooked_hybrid.network.mlps import MLPS, MoE, register_mlp
        >>> register_mlp(MoE)  # as the library does for its own
        >>> MLPS[MoE.config].kind
        'moe'
    """
    for mlp in mlps:
        register(MLPS, mlp, ("config", "kind"))


def mlp_of(cfg: object) -> type[MLP]:
    """Return the class of the MLP that a config is for.

    Raises:
        NotSupported: none is registered for it.

    Examples:
        >>> from hooked_hybrid.network.mlps import mlp_of
        >>> mlp_of(jamba.cfg.layers[1].mlp).__name__
        'MoE'
    """
    return look_up(MLPS, cfg, "mlp")
