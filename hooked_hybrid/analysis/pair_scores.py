"""One number for each pair of a component that writes and a later one that reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.network.finite import require_numbers


@dataclass(frozen=True)
class Part:
    """A component that writes or reads: a head, a gate block, or a whole Mamba block."""

    layer: int
    index: int
    kind: Literal["head", "block", "layer"]

    @property
    def label(self) -> str:
        """Such as "L5H0" for a head, "L0B3" for a gate block, "L0" for a whole layer."""
        letter = {"head": "H", "block": "B"}.get(self.kind)
        return f"L{self.layer}{letter}{self.index}" if letter else f"L{self.layer}"

    @property
    def at(self) -> tuple[int, int]:
        """(layer, index)."""
        return self.layer, self.index


@dataclass(frozen=True)
class PairScores:
    """A score of every pair of a writer and a later reader.

    Attributes:
        name: what was measured.
        writers, readers: the components of the two axes.
        values: the scores; 0 if the writer is not in an earlier layer.
        baseline: the expected score of unrelated matrices.
        z: the standard deviations of each score above that, if known.

    Examples:
        >>> scores = analysis.all_composition_scores(model, "V")
        >>> len(scores.writers), len(scores.readers), scores.values.shape
        (48, 16, torch.Size([48, 16]))
    """

    name: str
    writers: tuple[Part, ...]
    readers: tuple[Part, ...]
    values: Float[Tensor, "writer reader"]
    baseline: float
    z: Float[Tensor, "writer reader"] | None = None

    @property
    def writer_labels(self) -> list[str]:
        """Labels of the rows."""
        return [part.label for part in self.writers]

    @property
    def reader_labels(self) -> list[str]:
        """Labels of the columns."""
        return [part.label for part in self.readers]

    @property
    def is_defined(self) -> Bool[Tensor, "writer reader"]:
        """True if the writer is in an earlier layer than the reader."""
        w, r = (torch.tensor([p.layer for p in parts]) for parts in (self.writers, self.readers))
        return (w[:, None] < r).to(self.values.device)

    def __getitem__(self, pair: tuple[str, str]) -> float:
        """Return the score of (writer label, reader label).

        Raises:
            KeyError: an unknown label; the message lists the known ones.
        """
        index = []
        for label, labels in zip(pair, (self.writer_labels, self.reader_labels), strict=True):
            if label not in labels:
                raise KeyError(f"{label!r} is none of {', '.join(labels)}")
            index.append(labels.index(label))
        return float(self.values[index[0], index[1]])

    def above_baseline(self) -> Float[Tensor, "writer reader"]:
        """Return the scores minus the baseline; 0 if there is none.

        Examples:
            >>> analysis.all_composition_scores(model, "V").above_baseline().shape
            torch.Size([48, 16])
        """
        return (self.values - self.baseline).where(self.is_defined, 0)

    def top(self, n: int, by_z: bool = False) -> list[tuple[str, str, float]]:
        """Return the `n` pairs with the largest scores: (writer, reader, score), largest first.

        Args:
            n: at most this many.
            by_z: rank by `z`, and return it instead of the score.

        Raises:
            ValueError: `by_z` of scores without `z`; a score that is NaN.

        Examples:
            >>> writer, reader, score = analysis.all_composition_scores(model, "V").top(1)[0]
            >>> 0 < score < 1
            True
        """
        if by_z and self.z is None:
            raise ValueError(f"{self.name} has no z")
        values = self.z if by_z and self.z is not None else self.values
        values = values.where(self.is_defined, -torch.inf)
        require_numbers(values, f"{self.name} [writer reader]")
        flat = values.flatten()
        order = flat.argsort(descending=True, stable=True)[: min(n, int(self.is_defined.sum()))]
        pairs = [divmod(i, len(self.readers)) for i in order.tolist()]
        writers, readers = self.writer_labels, self.reader_labels
        return [(writers[w], readers[r], float(values[w, r])) for w, r in pairs]
