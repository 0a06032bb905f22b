"""A record of how the weights of a model are quantised, with a line for each weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import pandas as pd

Only = Collection[str] | Callable[[str], bool]
"""Which weights are quantised: names, or a predicate on them."""


class QuantizedWeight(NamedTuple):
    """The size and error of one quantised weight."""

    name: str
    shape: tuple[int, ...]
    plain_bytes: int
    bytes: int
    error: float
    """|Q - W| / |W| (Frobenius) of the dequantised values; NaN without values."""


@dataclasses.dataclass(frozen=True)
class Quantization:
    """How the weights of a model are quantised."""

    scheme: str
    weights: tuple[QuantizedWeight, ...]

    @property
    def bytes(self) -> int:
        """Bytes of the quantised weights; see `stored_bytes` for the whole model."""
        return sum(w.bytes for w in self.weights)

    @property
    def plain_bytes(self) -> int:
        """Their bytes before."""
        return sum(w.plain_bytes for w in self.weights)

    def table(self) -> pd.DataFrame:
        """Return a line for each weight."""
        import pandas as pd

        return pd.DataFrame(self.weights, columns=list(QuantizedWeight._fields))


def require_plain_weights(quantization: Quantization | None, task: str, remedy: str) -> None:
    """Refuse a task that rewrites or writes weights, on a model whose weights are quantised.

    Raises:
        ValueError: names the task and the remedy.
    """
    if quantization is not None:
        raise ValueError(
            f"{task}: the weights of this model are quantised ({quantization.scheme}); {remedy}"
        )
