"""A verdict follows from an interval by one rule, and every command that gives one asks it."""

from __future__ import annotations

import math

import pandas as pd
import pytest

from experiments.beside.frame import harms, spares
from hooked_hybrid.runs.verdicts import FAILS, HOLDS, OPEN, all_of, apart, judge

NAN = math.nan


@pytest.mark.parametrize(
    ("claimed", "low", "high", "word"),
    [
        ("at most", 0.1, 0.5, HOLDS),  # the upper end is the border
        ("at most", 0.1, 0.51, OPEN),
        ("at most", 0.5, 0.6, OPEN),  # the lower end is the border: it may be just that
        ("at most", 0.51, 0.6, FAILS),
        ("at least", 0.5, 0.6, HOLDS),
        ("at least", 0.49, 0.6, OPEN),
        ("at least", 0.4, 0.5, OPEN),
        ("at least", 0.4, 0.49, FAILS),
        ("above", 0.51, 0.6, HOLDS),
        ("above", 0.5, 0.6, OPEN),  # the border itself is not above
        ("above", 0.4, 0.5, FAILS),
        ("above", 0.4, 0.51, OPEN),
        ("below", 0.4, 0.49, HOLDS),
        ("below", 0.4, 0.5, OPEN),
        ("below", 0.5, 0.6, FAILS),
        ("below", 0.49, 0.6, OPEN),
        ("at most", NAN, NAN, OPEN),
        ("below", 0.1, NAN, OPEN),
    ],
)
def test_a_claim_holds_where_the_whole_interval_does(
    claimed: str, low: float, high: float, word: str
):
    assert judge(claimed, low, high, 0.5) == word


@pytest.mark.parametrize(
    ("low", "high", "word"),
    [
        (0.2, 0.5, HOLDS), (0.19, 0.5, OPEN), (0.2, 0.51, OPEN), (0.1, 0.2, OPEN),
        (0.1, 0.19, FAILS), (0.51, 0.6, FAILS), (0.1, 0.9, OPEN),
    ],
)  # fmt: skip
def test_within_holds_from_border_to_border(low: float, high: float, word: str):
    assert judge("within", low, high, 0.2, 0.5) == word


@pytest.mark.parametrize(
    ("words", "word"),
    [([HOLDS, HOLDS], HOLDS), ([HOLDS, OPEN], OPEN), ([OPEN, FAILS], FAILS), ([], HOLDS)],
)
def test_a_claim_of_parts_holds_where_each_does(words: list[str], word: str):
    assert all_of(words) == word


@pytest.mark.parametrize(
    ("upper", "lower", "word"),
    [
        ((0.5, 0.6), (0.2, 0.49), HOLDS), ((0.5, 0.6), (0.2, 0.5), OPEN),
        ((0.1, 0.2), (0.2, 0.4), FAILS), ((0.1, 0.21), (0.2, 0.4), OPEN),
        ((NAN, NAN), (0.2, 0.4), OPEN),
    ],
)  # fmt: skip
def test_one_figure_is_above_another_where_their_intervals_do_not_meet(
    upper: tuple[float, float], lower: tuple[float, float], word: str
):
    assert apart(upper, lower) == word


@pytest.mark.parametrize("borders", [(), (0.1, 0.2), (0.2, 0.1)])
def test_borders_are_one_or_two_in_order(borders: tuple[float, ...]):
    with pytest.raises(ValueError, match="give one border, or two in order"):
        judge("within" if borders == (0.2, 0.1) else "above", 0.1, 0.2, *borders)
    with pytest.raises(ValueError, match="give the lower end first"):
        judge("above", 0.3, 0.2, 0.1)


def test_a_cut_harms_or_spares_by_its_interval():
    """Of a whole accuracy of 0.5: harm below 0.25, none from 0.45 with the interval at 0.25."""
    rows = pd.DataFrame(
        [
            (0.2, 0.1, 0.24),
            (0.2, 0.1, 0.25),
            (0.45, 0.25, 0.9),
            (0.45, 0.24, 0.9),
            (0.44, 0.3, 0.8),
        ],
        columns=["accuracy", "low", "high"],
    )
    assert harms(rows, 0.5).tolist() == [True, False, False, False, False]
    assert spares(rows, 0.5).tolist() == [False, False, True, False, False]
