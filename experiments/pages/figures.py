"""The figure of a key in a page: a mean and its interval, or a rank among sets."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import NamedTuple

import pandas as pd

from experiments.pages.results import Kept, kept
from hooked_hybrid.runs.intervals import SHARE, mean_interval

_SIDES = {"inside": True, "beyond": False, "all": None}
_SETS = {"every set": "every set {} #*", "by lot": "by lot {} #*"}
RANKS = ("n_sets", "n_below", "n_equal", "n_above", "mean", "lowest", "highest")
"""Columns on the rank of a choice of heads among the sets of its size."""


class Figure(NamedTuple):
    """A figure and the ends of its interval, NaN if it has none."""

    value: float
    low: float = float("nan")
    high: float = float("nan")
    is_share: bool = True


def cells_of(table: pd.DataFrame, setting: str, inside: bool | None = True) -> Figure | None:
    """Return the accuracy of a setting with its interval over needles, or None without cells.

    `inside`: of needles inside the window, beyond it, or (None) of both.
    """
    values, needles = _cells(table, setting, inside)
    if not values:
        return None
    return Figure(sum(values) / len(values), *mean_interval(values, needles, SHARE))


def _cells(
    table: pd.DataFrame, setting: str, inside: bool | None = True
) -> tuple[list[float], list[str]]:
    """Return the accuracy of each cell of a setting, and its needle."""
    is_meant = table["setting"] == setting
    rows = table[is_meant if inside is None else is_meant & (table["inside"] == int(inside))]
    n, needles = rows["n"].tolist(), rows["needle"].tolist()
    values = [total / of for total, of in zip(rows["total"].tolist(), n, strict=True)]
    return [v for v, of in zip(values, n, strict=True) for _ in range(of)], [
        needle for needle, of in zip(needles, n, strict=True) for _ in range(of)
    ]


def figure_of(key: str) -> Figure:
    """Return the figure of a key in a page.

    Raises:
        ValueError: no such results, setting or column.
    """
    name, _, rest = key.partition("@")
    setting, *more = rest.split("@")
    results = kept(name)
    if "*" in setting:
        names = [s for s in results.settings if fnmatchcase(s, setting)]
        found = [_figure(results, s, [m for m in more if m not in _MANY]) for s in names]
        how = [_MANY[m] for m in more if m in _MANY]
        if not found or len(how) != 1:
            raise ValueError(f"{key}: many settings need one of {', '.join(_MANY)}, and to exist")
        return found[0]._replace(
            value=how[0]([f.value for f in found]), low=float("nan"), high=float("nan")
        )
    return _figure(results, setting, more)


_MANY: dict[str, Callable[[list[float]], float]] = {
    "max": max,
    "min": min,
    "mean": lambda values: sum(values) / len(values),
}


def _figure(results: Kept, setting: str, more: list[str]) -> Figure:
    table, where = results.table, f"{results.name}@{setting}"
    if setting not in results.settings:
        raise ValueError(f"{where}: not among {', '.join(results.settings[:12])}, ...")
    column = next((m for m in more if m not in _SIDES), "accuracy")
    if column in RANKS:
        return rank(results, setting, column)
    if column == "accuracy" and "needle" in table:
        found = cells_of(table, setting, next((_SIDES[m] for m in more if m in _SIDES), True))
        if found is None:
            raise ValueError(f"{where}: no cell on that side of the window")
        return found
    if column not in table:
        raise ValueError(f"{where}: no column {column!r}")
    row = table[table["setting"] == setting].iloc[0]
    ends = ("low", "high") if column == "accuracy" else (f"{column}_low", f"{column}_high")
    low, high = (float(row.get(end, float("nan"))) for end in ends)
    is_share = column in ("accuracy", "induction", "other_output", "share")
    return Figure(float(row[column]), low, high, is_share)


def sets_of(results: Kept, choice: str) -> list[str]:
    """Return the names of the sets of heads to compare a choice with: all, or those drawn."""
    if " k=" in choice:
        k = choice.partition(" k=")[2]
        patterns = [f"{word} k={k} #*" for word in ("every", "drawn")]
    else:
        n = choice.rpartition(" ")[2]
        patterns = [pattern.format(n) for pattern in _SETS.values()]
    return [s for s in results.settings if any(fnmatchcase(s, p) for p in patterns)]


def rank(results: Kept, choice: str, column: str) -> Figure:
    """Return the rank of a choice of heads among the sets of its size: a column of `RANKS`."""
    return Figure(ranks(results, choice)[column], is_share=not column.startswith("n_"))


def ranks(results: Kept, choice: str) -> dict[str, float]:
    """Return the rank of a choice of heads among the sets of its size: all columns of `RANKS`."""
    of = [_cells(results.table, s)[0] for s in [choice, *sets_of(results, choice)]]
    own, *others = (sum(values) / len(values) for values in of if values)
    if not others:
        raise ValueError(f"{results.name}@{choice}: no set of heads of its size")
    found = {
        "n_sets": len(others),
        "n_below": sum(v < own - 1e-9 for v in others),
        "n_equal": sum(abs(v - own) <= 1e-9 for v in others),
        "n_above": sum(v > own + 1e-9 for v in others),
        "mean": sum(others) / len(others),
        "lowest": min(others),
        "highest": max(others),
    }
    return {column: float(value) for column, value in found.items()}
