"""Batches by length, with a given number of rows or as many as fit in memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Literal, TypeVar

import torch

from hooked_hybrid.hooks.point import HookPoint

MOST_ROWS = 64
"""Initial rows of `batch_size="auto"`; a memory error halves them."""

BatchSize = int | Literal["auto"]
T = TypeVar("T")
R = TypeVar("R")


class Batching:
    """The number of rows of a forward.

    Args:
        batch_size: rows; "auto" begins with `most`, and halves it at each memory error.
        may_pad: whether a batch may have rows of several lengths.
        most: initial rows of "auto".

    Raises:
        ValueError: a size below 1.
    """

    def __init__(self, batch_size: BatchSize, may_pad: bool, most: int = MOST_ROWS) -> None:
        if batch_size != "auto" and batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: give 1 or more, or 'auto'")
        self.may_halve, self.may_pad = batch_size == "auto", may_pad
        self.n_rows = most if batch_size == "auto" else batch_size

    def run(
        self,
        items: Sequence[T],
        length: Callable[[T], int],
        forward: Callable[[Sequence[T]], R],
    ) -> Iterator[tuple[Sequence[T], R]]:
        """Yield each batch with the result of `forward`, the longest items first.

        Raises:
            MemoryError, torch.OutOfMemoryError: of `forward`, if batches may not be halved.
        """
        left = sorted(items, key=lambda item: -length(item))
        while left:
            size = self.n_rows
            if not self.may_pad:
                size = min(size, sum(length(item) == length(left[0]) for item in left))
            batch = left[:size]
            try:
                result = forward(batch)
            except (MemoryError, torch.OutOfMemoryError):
                if not self.may_halve or len(batch) == 1:
                    raise
                self.n_rows = len(batch) // 2
                continue
            yield batch, result
            left = left[len(batch) :]


def read_batch_size(value: Any) -> BatchSize:
    """Return a batch size given as text or number: 8, "8", "auto" or lm-eval's "auto:4".

    Raises:
        ValueError: something else, or a number below 1.
    """
    if str(value).split(":")[0] == "auto":
        return "auto"
    try:
        size = int(str(value))
    except ValueError:
        size = 0
    if size < 1:
        raise ValueError(f"batch_size={value!r}: give a whole number from 1, or 'auto'")
    return size


def may_cut(points: Iterable[HookPoint]) -> bool:
    """Whether all attached hooks act at each position separately.

    Then a sequence may be cut in pieces, and rows may be padded.
    """
    return all(point.takes_pieces for point in points)
