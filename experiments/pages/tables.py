"""Tables of stored results, for the blocks of the pages."""

from __future__ import annotations

import re
from collections.abc import Callable

import pandas as pd

from experiments import quantized_kept
from experiments.pages.figures import RANKS, Figure, cells_of, ranks, sets_of
from experiments.pages.results import kept
from experiments.twins import pages as twins


def percent(figure: Figure | None) -> str:
    """Return an accuracy with its interval, in per cent; a dash if there is none."""
    if figure is None:
        return "-"
    interval = (
        "" if figure.low != figure.low else f" [{100 * figure.low:.1f}, {100 * figure.high:.1f}]"
    )
    return f"{100 * figure.value:.1f}{interval}"


def experiment(name: str) -> str:
    """Return a table of one experiment: every setting, inside and beyond the window.

    Complete collections of sets of heads are in the table of `chosen` instead.
    """
    results = kept(name)
    table = results.table
    has_text = "loss" in table
    lines = ["| setting | inside | beyond | text loss | more |", "|---|---|---|---|---|"]
    for setting in (s for s in results.settings if not s.startswith("every ")):
        row = table[table["setting"] == setting].iloc[0]
        sides = [percent(cells_of(table, setting, inside)) for inside in (True, False)]
        text = _text(row) if has_text else "- | -"
        lines.append(f"| {setting} | {' | '.join(sides)} | {text} |")
    first = table[table["setting"] == results.settings[0]]
    n = [int(first.loc[first["inside"] == side, "n"].sum()) for side in (1, 0)]
    counts = f"{n[0]} prompts inside, {n[1]} beyond; {table['needle'].nunique()} needles."
    return "\n".join([counts, "", *lines])


def _text(row: pd.Series) -> str:
    alike = row["more_low"] == row["more_high"]
    ends = "(in every text)" if alike else f"[{row['more_low']:+.3f}, {row['more_high']:+.3f}]"
    return f"{row['loss']:.3f} | {row['more']:+.3f} {ends}"


def matrix(name: str) -> str:
    """Return accuracies of settings "prefill-generation" or "case k=K": rows by columns."""
    results = kept(name)
    split = [re.match(r"(.+) k=(\d+)$|(\w+)-(.+)$", s) for s in results.settings]
    rows: dict[str, dict[str, str]] = {}
    for setting, found in zip(results.settings, split, strict=True):
        row = (found[1] or found[3]) if found else setting
        column = "" if not found else f"k = {found[2]}" if found[2] else found[4]
        rows.setdefault(row, {})[column] = percent(cells_of(results.table, setting))
    columns = list(dict.fromkeys(c for cells in rows.values() for c in cells if c))
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for row, cells in rows.items():
        shown = (cells.get(c, cells.get("", "-")) for c in columns)
        lines.append(f"| {row} | {' | '.join(shown)} |")
    return "\n".join(lines)


def chosen(name: str) -> str:
    """Return the rank of each choice of heads among all sets of its size, or those drawn."""
    results = kept(name)
    lines = [
        "| choice, heads | accuracy | sets | below it, equal, above | the sets: mean (range) |",
        "|---|---|---|---|---|",
    ]
    for choice in results.settings:
        sets = sets_of(results, choice) if "#" not in choice else []
        if not sets or choice in ("whole", "no heads") or ", overall " in choice:
            continue
        of = ranks(results, choice)
        kind = "all" if sets[0].startswith("every") else "drawn"
        n, below, equal, above = (int(of[c]) for c in RANKS[:4])
        mean, lowest, highest = (100 * of[c] for c in RANKS[4:])
        lines.append(
            f"| {choice} | {percent(cells_of(results.table, choice))} | {kind} {n} | "
            f"{below}, {equal}, {above} | {mean:.1f} ({lowest:.1f} to {highest:.1f}) |"
        )
    return "\n".join(lines)


KINDS: dict[str, Callable[[str], str]] = {
    "experiment": experiment,
    "matrix": matrix,
    "chosen": chosen,
    "ways": twins.ways,
    "probed": twins.probed,
    "horizons": twins.horizons,
    "times": quantized_kept.times,
}
"""The functions that make a block from stored results, by the first word of its mark."""
