"""Differences between the whole model and a form: by task, and over the tasks of a benchmark."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from statistics import stdev
from typing import Literal

from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.runs.intervals import GAP, SHARE, combine, mean_interval

SHARES = {"acc", "acc_norm", "acc_mutual_info", "exact_match", "em", "f1", "mcc"}
"""Metrics from 0 to 1 (mcc from -1), shown times 100."""
_NORMAL = 1.959964


@dataclass(frozen=True)
class Estimate:
    """A figure with its standard error and 95% interval, each None if unknown.

    `is_paired`: whether it is a difference taken document by document. If the figure is a mean over
    documents, the interval is that of `hooked_hybrid.runs.intervals.mean_interval`, else the normal
    one of lm-eval's standard error (of a correlation, for example).
    """

    value: float
    stderr: float | None
    is_paired: bool = False
    interval: tuple[float, float] | None = None


def scale(cell: Cell) -> float:
    """Return the factor of a metric in tables: 100 for shares, else 1."""
    return 100.0 if cell.main.split(",")[0] in SHARES else 1.0


def score_of(cell: Cell) -> Estimate:
    """Return a cell's figure for tables."""
    shown = scale(cell)
    stderr = None if cell.stderr is None else cell.stderr * shown
    ends = _normal(cell.value * shown, stderr)
    if len(cell.documents) == cell.n_documents > 1:
        bounds = SHARE if cell.main.split(",")[0] in SHARES else None
        ends = _over_documents(list(cell.documents.values()), bounds, shown)
    return Estimate(cell.value * shown, stderr, interval=ends)


def gap(base: Cell, other: Cell) -> Estimate:
    """Return base minus form, for tables.

    Where the metric is a mean over documents, standard error and interval are those of the mean
    difference, as both forms saw the same documents. Otherwise they are those of two independent
    figures, which are too wide, and None where lm-eval gives no standard error.
    """
    shown, value = scale(base), base.value - other.value
    common = [i for i in base.documents if i in other.documents]
    if len(common) == base.n_documents == other.n_documents and len(common) > 1:
        differences = [base.documents[i] - other.documents[i] for i in common]
        stderr = stdev(differences) / sqrt(len(common))
        bounds = GAP if base.main.split(",")[0] in SHARES else None
        paired = _over_documents(differences, bounds, shown)
        return Estimate(shown * value, shown * stderr, is_paired=True, interval=paired)
    if base.stderr is None or other.stderr is None:
        return Estimate(shown * value, None)
    parts = [score_of(base), score_of(other)]
    known = [(part.value, part.interval) for part in parts if part.interval is not None]
    ends = combine(known, (1.0, -1.0)) if len(known) == 2 else None
    stderr = shown * sqrt(base.stderr**2 + other.stderr**2)
    return Estimate(shown * value, stderr, interval=ends)


def mean(
    parts: Sequence[Estimate], sizes: Sequence[int], by: Literal["documents", "tasks"]
) -> Estimate:
    """Return the mean over tasks, which are taken as independent.

    It has a standard error where every task has one, and an interval where every task has one.

    Args:
        parts: one figure a task.
        sizes: documents of each.
        by: what has equal weight: each document, or each task.
    """
    weights = [float(n) if by == "documents" else 1.0 for n in sizes]
    weights = [weight / sum(weights) for weight in weights]
    value = sum(w * part.value for w, part in zip(weights, parts, strict=True))
    errors = [part.stderr for part in parts if part.stderr is not None]
    ends = [(part.value, part.interval) for part in parts if part.interval is not None]
    stderr = interval = None
    if len(errors) == len(parts):
        stderr = sqrt(sum((w * e) ** 2 for w, e in zip(weights, errors, strict=True)))
    if len(ends) == len(parts):
        interval = combine(ends, weights)
    return Estimate(value, stderr, all(part.is_paired for part in parts), interval)


def _over_documents(
    values: Sequence[float], bounds: tuple[float, float] | None, shown: float
) -> tuple[float, float]:
    low, high = mean_interval(values, range(len(values)), bounds)
    return low * shown, high * shown


def _normal(value: float, stderr: float | None) -> tuple[float, float] | None:
    return None if stderr is None else (value - _NORMAL * stderr, value + _NORMAL * stderr)
