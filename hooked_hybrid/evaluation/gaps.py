"""How far a form lies below the whole model: by task, and over the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import stdev
from typing import Literal

from hooked_hybrid.evaluation.cells import Cell

SHARES = {"acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "mcc"}
"""Metrics from 0 to 1 (mcc from -1), shown in points of a hundred."""
NORMAL_95 = 1.96


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error, None where there is none.

    `is_paired`: whether it is of a difference taken document by document.
    """

    value: float
    stderr: float | None
    is_paired: bool = False

    @property
    def interval(self) -> tuple[float, float] | None:
        """95% interval, on the normal approximation."""
        if self.stderr is None:
            return None
        return self.value - NORMAL_95 * self.stderr, self.value + NORMAL_95 * self.stderr


def scale(cell: Cell) -> float:
    """Return by what a metric is multiplied to be shown: 100 for shares, else 1."""
    return 100.0 if cell.main.split(",")[0] in SHARES else 1.0


def score_of(cell: Cell) -> Estimate:
    """Return a cell's figure as it is shown."""
    stderr = None if cell.stderr is None else cell.stderr * scale(cell)
    return Estimate(cell.value * scale(cell), stderr)


def gap(base: Cell, other: Cell) -> Estimate:
    """Return base minus form, as shown.

    Where the metric is a mean over documents the standard error is that of the mean difference:
    both forms saw the same documents. Else it is that of two independent figures, which is wider
    than need be, and None where lm-eval gives none.
    """
    shown, value = scale(base), base.value - other.value
    common = [i for i in base.documents if i in other.documents]
    if len(common) == base.n_documents == other.n_documents and len(common) > 1:
        differences = [base.documents[i] - other.documents[i] for i in common]
        stderr = stdev(differences) / sqrt(len(common))
        return Estimate(shown * value, shown * stderr, is_paired=True)
    if base.stderr is None or other.stderr is None:
        return Estimate(shown * value, None)
    return Estimate(shown * value, shown * sqrt(base.stderr**2 + other.stderr**2))


def mean(
    parts: Sequence[Estimate], sizes: Sequence[int], by: Literal["documents", "tasks"]
) -> Estimate:
    """Return the mean over tasks, which are independent of one another.

    Args:
        parts: one figure a task.
        sizes: documents of each.
        by: what counts the same: each document, or each task.
    """
    weights = [float(n) if by == "documents" else 1.0 for n in sizes]
    weights = [weight / sum(weights) for weight in weights]
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True))
    errors = [part.stderr for part in parts]
    known = [e for e in errors if e is not None]
    if len(known) < len(errors):
        return Estimate(value, None)
    stderr = sqrt(sum((w * e) ** 2 for w, e in zip(weights, known, strict=True)))
    return Estimate(value, stderr, all(part.is_paired for part in parts))


__all__ = ["Estimate", "gap", "mean", "scale", "score_of"]
