"""The interval of a mean over few clusters: how often it holds the mean, and how wide it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import pytest
from scipy import stats

from hooked_hybrid.runs.intervals import (
    GAP,
    SHARE,
    _chance_below_zero,
    _root,
    combine,
    mean_interval,
    t_quantile,
)

FEW = (2, 3, 5, 7, 10, 25, 61)
FIFTHS = np.arange(6) / 5
"""Accuracies of a needle: its graded score over 5, or the mean of its cells."""
OUTCOMES: dict[str, Sequence[float]] = {
    "never": (1, 0, 0, 0, 0, 0),
    "always": (0, 0, 0, 0, 0, 1),
    "one in a hundred": (0.99, 0, 0, 0, 0, 0.01),
    "one in twenty": (0.95, 0, 0, 0, 0, 0.05),
    "one in five": (0.8, 0, 0, 0, 0, 0.2),
    "one in two": (0.5, 0, 0, 0, 0, 0.5),
    "nine in ten": (0.1, 0, 0, 0, 0, 0.9),
    "a partial answer at times": (0.97, 0.03, 0, 0, 0, 0),
    "scores near 0": (0.8, 0.1, 0.04, 0.02, 0.02, 0.02),
    "scores near 1": (0.02, 0.02, 0.02, 0.04, 0.1, 0.8),
    "scores about the middle": (0.05, 0.2, 0.3, 0.25, 0.15, 0.05),
    "needles that share what becomes of their cells": (0.4, 0.05, 0.05, 0.05, 0.05, 0.4),
}


@cache
def interval_of(values: tuple[float, ...], bounds: tuple[float, float]) -> tuple[float, float]:
    return mean_interval(values, range(len(values)), bounds)


def coverage(
    draw: Callable[[np.random.Generator, int], np.ndarray],
    mean: float,
    n: int,
    samples: int,
    bounds: tuple[float, float] = SHARE,
) -> float:
    """Return the share of samples of n clusters whose interval holds the mean."""
    rng, held = np.random.default_rng(n), []
    for _ in range(samples):
        values = tuple(sorted(draw(rng, n).round(6).tolist()))
        low, high = interval_of(values, bounds)
        held.append(low - 1e-6 <= mean <= high + 1e-6)
    return float(np.mean(held))


@pytest.mark.parametrize("outcome", OUTCOMES)
def test_intervals_hold_the_mean_in_95_of_100_samples_of_few_needles(outcome: str):
    chances = np.array(OUTCOMES[outcome])
    is_score = np.count_nonzero(chances) > 2  # many different samples: fewer of them
    for n in FEW:
        samples = 60 if is_score and n >= 10 else 400

        def draw(rng: np.random.Generator, n: int) -> np.ndarray:
            return rng.choice(FIFTHS, n, p=chances)

        found = coverage(draw, float(chances @ FIFTHS), n, samples)
        assert found >= 0.95 - 2 * (0.05 * 0.95 / samples) ** 0.5, n  # two standard errors


@pytest.mark.parametrize("n", [2, 3, 5, 7, 10])
def test_intervals_of_paired_differences_hold_the_mean_as_often(n: int):
    chances = (0.02, 0.08, 0.7, 0.2)
    ends = np.array([-1.0, -0.4, 0.0, 0.6])
    found = coverage(
        lambda rng, n: rng.choice(ends, n, p=chances), float(ends @ chances), n, 300, GAP
    )
    assert found >= 0.925


@pytest.mark.parametrize("n", [2, 3, 5, 10])
def test_intervals_of_needles_with_few_and_many_cells_hold_the_mean_of_all_cells(n: int):
    rng, held = np.random.default_rng(n), []
    for _ in range(300):
        sizes = rng.integers(1, 4, size=n)
        right = rng.random(n) < 0.3  # of all cells of a needle
        clusters = np.repeat(np.arange(n), sizes)
        low, high = mean_interval(right[clusters], clusters, SHARE)
        held.append(low <= 0.3 <= high)
    assert np.mean(held) >= 0.925


@pytest.mark.parametrize("n", [2, 3, 5, 12, 30])
def test_intervals_without_bounds_hold_the_mean_of_losses(n: int):
    rng = np.random.default_rng(n)
    drawn = rng.normal(2.0, 0.3, size=(1000, n))
    ends = [mean_interval(values, range(n), None) for values in drawn]
    assert 0.93 <= np.mean([low <= 2.0 <= high for low, high in ends]) <= 0.97


@pytest.mark.parametrize(("n", "k"), [(2, 0), (2, 1), (5, 5), (6, 1), (10, 3), (61, 0), (61, 60)])
def test_of_zeros_and_ones_the_interval_is_that_of_clopper_and_pearson(n: int, k: int):
    exact = stats.binomtest(k, n).proportion_ci(method="exact")
    ours = mean_interval([1] * k + [0] * (n - k), range(n), SHARE)
    assert ours == pytest.approx((exact.low, exact.high), abs=1e-6)


def test_ends_are_quantiles_under_random_weights_of_the_clusters_and_one_at_the_bound():
    rng = np.random.default_rng(0)
    values, clusters = rng.random(9), np.array([0, 0, 0, 1, 2, 2, 3, 3, 3])
    sums, counts = np.bincount(clusters, values), np.bincount(clusters)
    weights = rng.standard_exponential((400_000, 5))
    wanted = []
    for bound, share in ((0.0, 0.025), (1.0, 0.975)):
        total = weights @ np.append(sums, bound * counts.mean())
        wanted.append(np.quantile(total / (weights @ np.append(counts, counts.mean())), share))
    assert mean_interval(values, clusters, SHARE) == pytest.approx(wanted, abs=2e-3)


def test_a_partial_answer_never_shrinks_what_needles_alike_leave_open():
    none, one = [0.0] * 61, [0.2] + [0.0] * 60
    assert mean_interval(none, range(61), SHARE) == pytest.approx((0, 0.0587), abs=1e-4)
    low, high = mean_interval(one, range(61), SHARE)
    assert 0 < low < 0.2 / 61 and high > 0.0587


def test_intervals_are_not_absurdly_wide():
    rng = np.random.default_rng(0)
    values = rng.beta(4, 2, size=10)
    low, high = mean_interval(values, range(10), SHARE)
    student = stats.t.interval(0.95, 9, values.mean(), stats.sem(values))
    assert high - low < 1.7 * (student[1] - student[0])
    many = rng.beta(4, 2, size=300)
    low, high = mean_interval(many, range(300), SHARE)
    student = stats.t.interval(0.95, 299, many.mean(), stats.sem(many))
    assert high - low < 1.1 * (student[1] - student[0])


def test_cells_that_vary_together_give_the_interval_of_their_needles():
    each = [0.0, 0.2, 1.0, 0.6]
    of_cells = mean_interval(np.repeat(each, 12), np.repeat(list("abcd"), 12), SHARE)
    assert of_cells == pytest.approx(mean_interval(each, range(4), SHARE), abs=1e-6)


def test_one_cluster_has_no_interval_and_equal_losses_have_no_width():
    assert np.isnan(mean_interval([0, 1], ["a", "a"], SHARE)).all()
    assert np.isnan(mean_interval([0, 1], ["a", "a"], None)).all()
    assert mean_interval([0.5, 0.5, 0.5], range(3), None) == (0.5, 0.5)


def test_without_bounds_clusters_weigh_as_many_values_as_they_have():
    """By hand: sums 3 and 4 of 2 and 1 values lie 5/3 below and above their shares of 7."""
    low, high = mean_interval([1.0, 2.0, 4.0], "aab", None)
    half = stats.t.ppf(0.975, 1) * (2 * 2 * (5 / 3) ** 2) ** 0.5 / 3
    assert (low, high) == pytest.approx((7 / 3 - half, 7 / 3 + half), rel=1e-9)


def test_a_higher_level_gives_a_wider_interval_around_the_mean():
    values = [0.0, 0.4, 0.6, 1.0, 1.0]
    ends = [mean_interval(values, range(5), SHARE, level) for level in (0.99, 0.95, 0.9, 0.5)]
    assert ends == sorted(ends) and ends[-1][0] < 0.6 < ends[-1][1]
    assert [high for _, high in ends] == sorted([high for _, high in ends], reverse=True)
    one_sided = mean_interval([0.0] * 59, range(59), SHARE, 0.9)[1]
    assert one_sided == pytest.approx(1 - 0.05 ** (1 / 59), abs=1e-6)


def test_order_and_names_of_clusters_do_not_matter():
    values, clusters = np.array([0.0, 0.2, 1.0, 0.6, 0.4]), np.array([3, 3, 1, 2, 2])
    order = np.random.default_rng(0).permutation(5)
    ours = mean_interval(values, clusters, SHARE)
    assert mean_interval(values[order], clusters[order], SHARE) == pytest.approx(ours, abs=1e-6)
    named = [f"needle {c}" for c in clusters]
    assert mean_interval(values, named, SHARE) == pytest.approx(ours, abs=1e-6)


@pytest.mark.parametrize("df", [1, 2, 3, 4, 7, 10, 29, 255])
@pytest.mark.parametrize("share", [0.95, 0.975])
def test_quantiles_of_student_are_those_of_scipy(df: int, share: float):
    assert t_quantile(df, share) == pytest.approx(stats.t.ppf(share, df), rel=1e-9)


def test_independent_figures_add_up_as_their_errors_do():
    parts = [(1.0, (0.7, 1.4)), (0.5, (0.1, 0.8))]
    low, high = combine(parts, (1.0, -1.0))
    below, above = (0.3**2 + 0.3**2) ** 0.5, (0.4**2 + 0.4**2) ** 0.5  # of the second, swapped
    assert (low, high) == pytest.approx((0.5 - below, 0.5 + above))


@pytest.mark.parametrize(
    ("factors", "repeats", "chance"),
    [
        ([1, -3], [1, 1], 3 / 4),  # P(X < 3 Y)
        ([-3, 1], [1, 1], 3 / 4),
        ([1, -1], [2, 1], 1 / 4),  # both of two come first, each by a half
        ([2, -1], [1, 2], 1 - (2 / 3) ** 2),
        ([1, 0, -1], [1, 5, 1], 1 / 2),
        ([1e-3, -1], [1, 1], 1 / 1.001),
        ([1, 2], [1, 3], 0),  # a sum of what is above 0
        ([-1, -2], [1, 3], 1),
        ([0, 1], [1, 1], 0),
    ],
)
def test_chances_of_sums_of_exponential_variables_are_those_by_hand(
    factors: list[float], repeats: list[int], chance: float
):
    found = _chance_below_zero(np.array(factors, dtype=float), np.array(repeats))
    assert found == chance if chance in (0, 1) else found == pytest.approx(chance, abs=1e-7)


@pytest.mark.parametrize(
    ("ends", "root"), [((0.0, 1.0), 0.3), ((1.0, 0.0), 0.3), ((2.0, 8.0), 5.5)]
)
def test_a_root_is_found_from_either_side(ends: tuple[float, float], root: float):
    start, end = ends
    falls, calls = 1 if end > start else -1, []

    def steep(x: float) -> float:
        calls.append(x)
        return falls * (root - x) * (1 + 50 * (x - root) ** 2)

    assert _root(steep, start, end, 1e-9) == pytest.approx(root, abs=1e-7)
    assert len(calls) < 25  # halving the side that stays; thousands without it
    assert _root(lambda x: -1.0, start, end, 1e-9) == start  # it has fallen below before
    assert _root(lambda x: 1.0, start, end, 1e-9) == end


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([], [], {}, "at least one value"),
        ([1.0, float("nan")], "ab", {}, "none that is missing"),
        ([1.0, 0.5], "abc", {}, "2 values, 3 cluster labels"),
        ([1.0, 0.5], "ab", {"level": 1.0}, "level=1.0"),
        ([1.0, 2.0], "ab", {}, "bounds that hold every possible value"),
        ([1.0 + 2e-9, 0.5], "ab", {}, "bounds that hold every possible value"),
        ([1.0, -0.5], "ab", {}, "bounds that hold every possible value"),
        ([1.0, 0.5], "ab", {"bounds": (1.0, 0.0)}, "bounds that hold every possible value"),
    ],
)
def test_bad_input_is_refused(values: Any, clusters: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        mean_interval(values, clusters, **{"bounds": SHARE, **options})


def test_values_may_pass_bounds_by_a_rounding():
    low, high = mean_interval([1.0 + 1e-9, -1e-9], "ab", SHARE)
    assert low < 0.5 < high


@pytest.mark.parametrize(("df", "share"), [(0, 0.975), (3, 0.5), (3, 1.0)])
def test_quantiles_that_there_are_not_are_refused(df: int, share: float):
    with pytest.raises(ValueError, match="give 1 or more"):
        t_quantile(df, share)
