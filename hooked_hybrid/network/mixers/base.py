"""What a block asks of its mixer."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Generic, TypeVar

from hooked_hybrid.network.component import Component
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.state import BlockState
from hooked_hybrid.shapes import Resid

S = TypeVar("S", bound=BlockState)


class Mixer(Component, Generic[S]):
    """A map over positions that carries a state: `(x, state) -> (y, state)`.

    `path` is where it lies in its block, and so in its hook names.
    """

    path: ClassVar[str] = "mixer"

    def __init__(self, cfg: Any, d_model: int) -> None:
        super().__init__()
        self.cfg = cfg
        self.d_model = d_model

    @abstractmethod
    def forward(self, x: Resid, state: S | None, layout: Layout) -> tuple[Resid, S]:
        """Return what the mixer writes, and its state after the last token of each row.

        No state means that every row begins here. The state passed in is not changed.
        """

    @abstractmethod
    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors, without the batch and the key axis."""
