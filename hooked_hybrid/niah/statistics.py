"""Means with intervals: a bootstrap over clusters, and one row of figures a setting."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.extras import require

if TYPE_CHECKING:
    import pandas as pd

_CHUNK = 4_000_000
"""Draws held at once, which bounds the memory of a bootstrap over many clusters."""


def clustered_interval(
    values: Iterable[Any],
    clusters: Iterable[Any],
    n_resamples: int = 2000,
    level: float = 0.95,
    seed: int = 0,
) -> tuple[float, float]:
    """Return the bootstrap interval of a mean whose values come in clusters.

    Whole clusters are drawn with replacement, as many as there are, so that values which vary
    together are not taken for independent ones. The interval is that of percentiles: where all
    values are equal its width is 0, however few they are.

    Args:
        values: numbers.
        clusters: the cluster of each, by any label; a missing label is a cluster too.
        n_resamples: bootstrap samples.
        level: share of them inside the interval.
        seed: of the draws.

    Returns:
        Lower and upper end; both NaN for fewer than two clusters, which tell nothing of spread.

    Raises:
        ValueError: nothing to average, a missing value, lengths that differ, or a level outside
            0 to 1.
    """
    numbers = np.asarray(list(values), dtype=float)
    labels, codes = np.unique([str(label) for label in clusters], return_inverse=True)
    if len(numbers) != len(codes):
        raise ValueError(f"{len(numbers)} values, {len(codes)} cluster labels: give one for each")
    if not len(numbers) or np.isnan(numbers).any():
        raise ValueError("give at least one value, and none that is missing")
    if not 0 < level < 1 or n_resamples < 1:
        raise ValueError(f"level={level}, n_resamples={n_resamples}: give 0 < level < 1, 1 or more")
    if len(labels) < 2:
        return float("nan"), float("nan")
    sums, counts = np.bincount(codes, numbers), np.bincount(codes)
    means = _resampled_means(sums, counts, n_resamples, np.random.default_rng(seed))
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def scored(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cells that have an accuracy: those whose prompt holds a needle.

    Raises:
        ValueError: there is none.
    """
    cells = table[table["accuracy"].notna()]
    if cells.empty:
        raise ValueError("the table has no cell with a score: no prompt held a needle")
    return cells


def cluster_column(table: pd.DataFrame) -> str:
    """Return the column to resample by: needles where there are two or more, else prompts."""
    return "needle_id" if table["needle_id"].nunique(dropna=False) > 1 else "prompt_id"


def interval_of(rows: pd.DataFrame, by: str) -> tuple[float, float]:
    """Return the 95% interval of the accuracy of some cells, clustered by a column."""
    return clustered_interval(rows["accuracy"], rows[by])


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row a setting, in the order in which the table has them.

    Cells without a score are left out. Columns: `setting`, `stage`, `k`; `n` cells of `n_needles`
    needles; `accuracy` (mean graded score / 5) with `low` and `high`, its 95% interval clustered by
    needle (by prompt where there is one needle); `binary`, the share of whole answers;
    `inside` and `outside`, the accuracy with the needle within the attention window of the last
    prompt token and beyond it (NaN where there is no such cell), of `n_inside` and `n_outside`
    cells.

    Raises:
        ValueError: no cell has a score.
    """
    require("pandas")
    import pandas as pd

    cells = scored(table)
    by = cluster_column(cells)
    groups = cells.groupby("setting", sort=False)
    return pd.DataFrame([{"setting": name, **_figures(rows, by)} for name, rows in groups])


def _figures(rows: pd.DataFrame, by: str) -> dict[str, Any]:
    inside = rows["in_window"].astype(bool)
    low, high = interval_of(rows, by)
    return {
        "stage": rows["stage"].iloc[0],
        "k": rows["k"].iloc[0],
        "n": len(rows),
        "n_needles": rows["needle_id"].nunique(dropna=False),
        "accuracy": rows["accuracy"].mean(),
        "low": low,
        "high": high,
        "binary": rows["binary"].mean(),
        "inside": rows.loc[inside, "accuracy"].mean(),
        "outside": rows.loc[~inside, "accuracy"].mean(),
        "n_inside": int(inside.sum()),
        "n_outside": int((~inside).sum()),
    }


def _resampled_means(
    sums: np.ndarray, counts: np.ndarray, n_resamples: int, rng: np.random.Generator
) -> np.ndarray:
    """Return the mean of each bootstrap sample of clusters."""
    n = len(sums)
    step = max(1, _CHUNK // n)
    means = []
    for start in range(0, n_resamples, step):
        drawn = rng.integers(n, size=(min(step, n_resamples - start), n))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    return np.concatenate(means)


__all__ = ["cluster_column", "clustered_interval", "interval_of", "scored", "summary"]
