"""The 95% interval of a mean of clustered values, valid for as few as two clusters."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from math import cos, log, pi, sin, sqrt
from typing import Any

import numpy as np

SHARE = (0.0, 1.0)
"""Bounds of an accuracy."""
GAP = (-1.0, 1.0)
"""Bounds of a difference of two accuracies."""
LEVEL = 0.95

_STEP = 0.08
"""Step of the quadrature, in the logarithm of its variable."""
_PRECISION = 1e-6
"""Tolerance of an end, as a share of the distance between the bounds."""


def mean_interval(
    values: Iterable[Any],
    clusters: Iterable[Any],
    bounds: tuple[float, float] | None,
    level: float = LEVEL,
) -> tuple[float, float]:
    """Return the interval of a mean of clustered values.

    Values of one cluster (a needle's cells) may depend on one another in any way; different
    clusters are independent. The interval is meant to contain the true mean in 95% of samples or
    more, for any distribution and any number of clusters.

    **With bounds**, each end is Gaffke's: the quantile of the mean under random weights of the
    clusters (uniform on the simplex) and of one more cluster at the bound. No distribution within
    the bounds is known for which it covers less than `level`. For values that are all 0 or 1 it is
    Clopper and Pearson's; if all n are 0, its upper end is
    1 - 0.025^(1/n) (84, 60, 46, 31, 5.9% at n = 2, 4, 6, 10, 61). Clusters of different size are
    weighted by size; the one at the bound has their mean size.

    **Without bounds** (a loss in nats) it is Student's, from the spread of the clusters' means, and
    valid if these are about normal, as means over many tokens are. If all values are equal, both
    ends are that value: values of a continuous measure are equal only by construction.

    Args:
        values: numbers.
        clusters: the cluster label of each value; a missing label counts as a cluster.
        bounds: lowest and highest possible value (`SHARE`, `GAP`), None if there are none.
        level: share of samples whose interval contains the mean, 0.5 to 0.99. The ends at 0.9 are
            the one-sided bounds at 0.95.

    Returns:
        Lower and upper end; both NaN for a single cluster.

    Raises:
        ValueError: no values, a missing value or one outside the bounds, lengths that
            differ, or another level.

    Source: Gaffke 2005, Three test statistics for a nonparametric one-sided hypothesis on the mean
    of a nonnegative variable (Math. Methods Statist. 14); as an interval Learned-Miller and Thomas
    2020 (arXiv 1905.06208), who conjecture that it always covers. Clopper and Pearson 1934.

    Examples:
        >>> from hooked_hybrid.runs.intervals import mean_interval
        >>> low, high = mean_interval([0] * 6, ["a", "b", "c", "d", "e", "f"], bounds=(0, 1))
        >>> low, round(high, 2)  # six needles that were not found
        (0, 0.46)
    """
    numbers = np.asarray(list(values), dtype=float)
    labels, codes = np.unique([str(label) for label in clusters], return_inverse=True)
    _check(numbers, codes, bounds, level)
    n = len(labels)
    if n < 2:
        return float("nan"), float("nan")
    sums, counts = np.bincount(codes, numbers), np.bincount(codes).astype(float)
    tail = (1 - level) / 2
    if bounds is None:
        mean = float(sums.sum() / counts.sum())
        spread = sqrt(n / (n - 1) * float(((sums - mean * counts) ** 2).sum())) / counts.sum()
        half = t_quantile(n - 1, 1 - tail) * float(spread)
        return mean - half, mean + half
    least, most = bounds
    return _gaffke(sums, counts, least, most, tail), _gaffke(sums, counts, most, least, tail)


def combine(
    parts: Iterable[tuple[float, tuple[float, float]]], weights: Iterable[float]
) -> tuple[float, float]:
    """Return the interval of a weighted sum of independent figures, each with an interval.

    The distances of the ends from the figures are added like standard errors, those below and
    those above separately; a negative weight swaps them.

    Args:
        parts: figure, and its interval.
        weights: the factor of each.

    Source: Zou and Donner 2008, Construction of confidence limits about effect measures (Statist.
    Med. 27), their method of variance estimates recovery.

    Examples:
        >>> from hooked_hybrid.runs.intervals import combine
        >>> low, high = combine([(0.9, (0.8, 1.0)), (0.4, (0.3, 0.5))], weights=(1, -1))
        >>> round(low, 2), round(high, 2)  # of the difference
        (0.36, 0.64)
    """
    value = below = above = 0.0
    for (figure, (low, high)), weight in zip(parts, weights, strict=True):
        first, last = sorted((weight * low, weight * high))
        value += weight * figure
        below += (weight * figure - first) ** 2
        above += (last - weight * figure) ** 2
    return value - sqrt(below), value + sqrt(above)


@lru_cache
def t_quantile(df: int, share: float) -> float:
    """Return the quantile of Student's t at a share above a half.

    Raises:
        ValueError: no degree of freedom, or a share outside 0.5 to 1.

    Source: Abramowitz and Stegun 1964, 26.7.3 and 26.7.4.
    """
    if df < 1 or not 0.5 < share < 1:
        raise ValueError(f"df={df}, share={share}: give 1 or more, and 0.5 < share < 1")
    low, high = 0.0, pi / 2  # of the angle whose tangent is t / sqrt(df)
    for _ in range(60):
        middle = (low + high) / 2
        if _within(middle, df) < 2 * share - 1:
            low = middle
        else:
            high = middle
    return sqrt(df) * sin(low) / cos(low)


def _within(angle: float, df: int) -> float:
    """Return the share of Student's t between -t and t, by the angle of t."""
    is_odd = df % 2
    powers = np.arange(1 + is_odd, df - 1, 2)  # of the cosine; they differ by two
    ratios = (powers / (powers + 1)) * cos(angle) ** 2
    terms = np.cumprod(np.concatenate([[1.0], ratios])).sum()
    if not is_odd:
        return float(sin(angle) * terms)
    series = sin(angle) * cos(angle) * terms if df > 1 else 0.0
    return float(2 / pi * (angle + series))


def _check(
    numbers: np.ndarray, codes: np.ndarray, bounds: tuple[float, float] | None, level: float
) -> None:
    if len(numbers) != len(codes):
        raise ValueError(f"{len(numbers)} values, {len(codes)} cluster labels: give one for each")
    if not len(numbers) or not np.isfinite(numbers).all():
        raise ValueError("give at least one value, and none that is missing or infinite")
    if not 0.5 <= level <= 0.99:
        raise ValueError(f"level={level}: give 0.5 to 0.99")
    if bounds is None:
        return
    least, most = bounds
    if not least < most or numbers.min() < least - 1e-9 or numbers.max() > most + 1e-9:
        raise ValueError(
            f"values from {numbers.min():g} to {numbers.max():g}, bounds {bounds}: give bounds "
            "that hold every possible value, or None"
        )


def _gaffke(
    sums: np.ndarray, counts: np.ndarray, toward: float, other: float, tail: float
) -> float:
    """Return the end of an interval on the side of the bound `toward`."""
    mean = float(sums.sum() / counts.sum())
    if abs(toward - mean) < 1e-12 * abs(toward - other):
        return toward
    pairs, repeats = np.unique(
        np.stack([np.append(sums, toward * counts.mean()), np.append(counts, counts.mean())]),
        axis=1,
        return_counts=True,
    )

    def beyond(end: float) -> float:
        """Return the probability that the weighted mean is beyond an end, minus the tail."""
        below = _chance_below_zero(pairs[0] - end * pairs[1], repeats)
        return (1 - below if toward > other else below) - tail

    return _root(beyond, mean, toward, _PRECISION * abs(toward - other))


def _chance_below_zero(factors: np.ndarray, repeats: np.ndarray) -> float:
    """Return the probability that a weighted sum of independent exponential variables is below 0.

    By the inversion of the characteristic function (Gil-Pelaez 1951; Imhof 1961), by the trapezoid
    rule in the logarithm of its variable. If Cantelli's inequality bounds the probability by 0.5%
    it is set to 0, or 1.
    """
    drift, variance = float(factors @ repeats), float((factors**2) @ repeats)
    if drift**2 >= 200 * variance or not (factors.min() < 0 < factors.max()):
        return float(drift < 0)
    scaled = factors / sqrt(variance)
    # Below the first the sine is as small as its argument; after the last all has decayed.
    first, last = -18.0, 6.0 - log(np.abs(scaled[scaled != 0]).min())
    coarse = np.exp(np.arange(first, last, 1.0))[:, None]
    decayed = np.log1p((coarse * scaled) ** 2) @ repeats > 60
    last = first + float(decayed.argmax()) if decayed.any() else last
    u = np.exp(np.arange(first, last, _STEP))[:, None]
    turns = np.arctan(u * scaled) @ repeats
    decay = np.log1p((u * scaled) ** 2) @ repeats / 2
    return 0.5 - _STEP / pi * float((np.sin(turns) * np.exp(-decay)).sum())


def _root(function: Callable[[float], float], start: float, end: float, precision: float) -> float:
    """Return the zero of a function that falls from `start` to `end`, by the Illinois rule."""
    a, b, at_a, at_b = start, end, function(start), function(end)
    if at_a <= 0 or at_b >= 0:
        return a if at_a <= 0 else b
    last = 0.0
    while abs(b - a) > precision:
        middle = b - at_b * (b - a) / (at_b - at_a)
        at = function(middle)
        if at > 0:
            a, at_a, at_b = middle, at, at_b / 2 if last > 0 else at_b
        else:
            b, at_b, at_a = middle, at, at_a / 2 if last < 0 else at_a
        if abs(at) < 1e-7:
            return middle
        last = at
    return (a + b) / 2
