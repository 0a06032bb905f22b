"""The rule for judging a claim about a figure: by its interval, never by its mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

Word = Literal["holds", "does not hold", "open"]
Claimed = Literal["at most", "at least", "above", "below", "within"]
HOLDS: Word = "holds"
FAILS: Word = "does not hold"
OPEN: Word = "open"


def judge(claimed: Claimed, low: float, high: float, *borders: float) -> Word:
    """Return whether a figure is in the claimed range, by the ends of its interval.

    "holds" if the whole interval is in the range, "does not hold" if none of it is, else "open",
    which includes an end that is NaN.

    Args:
        claimed: "at most" and "at least" hold at the border itself, "above" and "below" do not;
            "within" holds from the first border to the second, both included.
        low: lower end of the interval, or the one-sided bound.
        high: upper end.
        borders: one, or two for "within".

    Raises:
        ValueError: ends or borders in the wrong order, or another number of borders.
    """
    if len(borders) != (2 if claimed == "within" else 1) or list(borders) != sorted(borders):
        raise ValueError(f"{claimed} {borders}: give one border, or two in order for 'within'")
    if low > high:
        raise ValueError(f"an interval from {low} to {high}: give the lower end first")
    first, last = borders[0], borders[-1]
    if claimed == "at most":
        return _word(high <= first, low > first)
    if claimed == "at least":
        return _word(low >= first, high < first)
    if claimed == "above":
        return _word(low > first, high <= first)
    if claimed == "below":
        return _word(high < first, low >= first)
    return _word(first <= low and high <= last, high < first or low > last)


def all_of(words: Iterable[Word]) -> Word:
    """Return the verdict of a claim with several parts: it holds if each part does."""
    found = set(words)
    return FAILS if FAILS in found else OPEN if OPEN in found else HOLDS


def apart(upper: tuple[float, float], lower: tuple[float, float]) -> Word:
    """Return whether one figure is above another, by two unpaired intervals.

    It holds if the intervals do not overlap, and does not hold if they are in reverse order.
    """
    return _word(upper[0] > lower[1], upper[1] <= lower[0])


def _word(holds: bool, fails: bool) -> Word:
    return HOLDS if holds else FAILS if fails else OPEN
