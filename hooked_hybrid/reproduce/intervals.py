"""Intervals of means over few needles: the bootstrap, widened to what so few can say."""

from __future__ import annotations

from collections.abc import Iterable
from math import sqrt
from typing import Any

import numpy as np

from hooked_hybrid.niah.statistics import clustered_interval

RESAMPLES = 1000
_Z = 1.959964
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
"""97.5% quantiles of Student's t, from 1 degree of freedom up."""


def t_quantile(df: int) -> float:
    """Return the 97.5% quantile of Student's t: a table up to 10 degrees of freedom.

    Beyond, the expansion in 1 / df about the normal quantile, right to three digits.

    Raises:
        ValueError: no degree of freedom.
    """
    if df < 1:
        raise ValueError(f"df={df}: give 1 or more")
    if df <= len(_T):
        return _T[df - 1]
    z, terms = _Z, 0.0
    for power, factor in (
        (1, (z**3 + z) / 4),
        (2, (5 * z**5 + 16 * z**3 + 3 * z) / 96),
        (3, (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384),
    ):
        terms += factor / df**power
    return z + terms


def others_at_most(n: int) -> float:
    """Return the share of needles that may be unlike n that were all alike (95%, one-sided)."""
    return float(1 - 0.05 ** (1 / n))


def widened_interval(
    values: Iterable[Any], clusters: Iterable[Any], least: float, most: float
) -> tuple[float, float]:
    """Return the 95% interval of a mean whose values come in few clusters.

    The bootstrap of `niah.statistics.clustered_interval` takes the spread of n clusters for that of
    all and is too narrow by about t(n - 1) / 1.96 x sqrt(n / (n - 1)): it is stretched by as much
    about the mean, and clipped to what is possible. Where it has no width, `others_at_most` of the
    clusters may be anything possible.

    Args:
        values: numbers from `least` to `most`.
        clusters: the cluster of each.
        least: lowest possible value.
        most: highest possible value.

    Returns:
        Lower and upper end; both NaN for fewer than two clusters.

    Raises:
        ValueError: see `niah.statistics.clustered_interval`.
    """
    numbers, labels = np.asarray(list(values), dtype=float), [str(label) for label in clusters]
    low, high = clustered_interval(numbers, labels, RESAMPLES)
    n, mean = len(set(labels)), float(numbers.mean())
    if n < 2:
        return low, high
    if high - low < 1e-9:
        others = others_at_most(n)
        return mean + others * (least - mean), mean + others * (most - mean)
    factor = t_quantile(n - 1) / _Z * sqrt(n / (n - 1))
    return max(least, mean - factor * (mean - low)), min(most, mean + factor * (high - mean))


__all__ = ["RESAMPLES", "others_at_most", "t_quantile", "widened_interval"]
