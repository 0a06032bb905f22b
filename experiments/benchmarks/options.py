"""Options of every benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

QUICK_ROUNDS = 1


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        scratch: folder for checkpoints that are written to be loaded.
        rounds: kept, of every case; None is each case's own number.
        quick: one round of small sizes, to test that it runs.
        models: of the sweep, "mid" or packaged ones.
    """

    scratch: Path
    rounds: int | None = None
    quick: bool = False
    models: tuple[str, ...] = ("mid",)

    def n_rounds(self, usual: int) -> int:
        """Return the number of rounds to keep."""
        if self.rounds is not None:
            return self.rounds
        return QUICK_ROUNDS if self.quick else usual

    def sizes(self, usual: Sequence[int], quick: Sequence[int]) -> Sequence[int]:
        """Return the lengths to measure."""
        return quick if self.quick else usual

    def size(self, usual: int, quick: int) -> int:
        """Return a length to measure."""
        return quick if self.quick else usual
