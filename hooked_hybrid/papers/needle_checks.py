"""From tables to findings: claims about maps, and about weights on the needle."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from hooked_hybrid.papers.checks import NOTHING, POINT, by_word, needs_retrieval
from hooked_hybrid.papers.claims import Check, Finding
from hooked_hybrid.papers.evidence import Evidence, Untested, estimate
from hooked_hybrid.runs.verdicts import all_of, judge

if TYPE_CHECKING:
    import pandas as pd

SPOT = 0.20
"""Accuracy of a length and depth, over needles and seeds, up to which it counts as empty."""
RETRIEVED = 0.5
"""Accuracy from which a cell counts as retrieved: half of the answer."""


def empty_maps(
    run: str,
    settings: Callable[[Evidence], Sequence[str]],
    most: float = SPOT,
    what: str = "",
) -> Check:
    """Return a check that no length and depth of these settings' maps retrieves.

    The mean of each is used, without an interval: a cell of a map has too few prompts for one.
    """

    @needs_retrieval(run)
    def check(evidence: Evidence) -> Finding:
        spots = {}
        for name in settings(evidence):
            cells = evidence.cells(run, name)
            means = cells.groupby(["length", "depth"])["accuracy"].mean()
            length, depth = means.idxmax()
            here = cells[(cells["length"] == length) & (cells["depth"] == depth)]
            real = float(here["real_depth"].mean()) if "real_depth" in here else depth
            spots[name] = (float(means.max()), (length, depth, real))
        name = max(spots, key=lambda name: spots[name][0])
        highest, (length, *both) = spots[name]
        asked, real = (1 - depth if evidence.thesis_depth else depth for depth in both)
        stands = "" if abs(asked - real) < 0.01 else f", where it stands at {100 * real:.0f}%"
        ours = (
            f"{what}highest cell {100 * highest:.1f}% ({name}, {length} tokens, depth "
            f"{100 * asked:.0f}%{stands})"
        )
        return Finding(highest <= most, ours)

    return check


def left_beyond_window(setting: str) -> Check:
    """Return a check that a setting retrieves only needles beyond the window."""

    @needs_retrieval("weights")
    def check(evidence: Evidence) -> Finding:
        inside = evidence.accuracy("weights", setting, True)
        beyond = evidence.accuracy("weights", setting, False)
        if not beyond.n:
            return Finding(None, "no needle lies beyond an attention window of this model")
        ours = f"inside the window {inside}; beyond it {beyond}"
        word = all_of(
            [
                judge("at most", inside.at_least, inside.at_most, NOTHING),
                judge("above", beyond.at_least, beyond.at_most, NOTHING),
            ]
        )
        return by_word(ours, word)

    return check


def complement(first: str, second: str, whole: str) -> Check:
    """Return a check that exactly one of two settings retrieves each cell that the whole does.

    Cells in which the whole model gives less than half of the answer are left out.
    """

    @needs_retrieval("weights")
    def check(evidence: Evidence) -> Finding:
        sides = [evidence.cells("weights", name).set_index("prompt_id") for name in (first, second)]
        cells = evidence.cells("weights", whole).set_index("prompt_id")
        cells = cells[cells["accuracy"] >= RETRIEVED]
        if cells.empty:
            raise Untested(f"{whole} retrieves in no cell")
        a, b = (side["accuracy"].reindex(cells.index) for side in sides)
        missing = (cells["accuracy"] - a.where(a > b, b)).clip(lower=0)
        twice = a.where(a < b, b)
        table = cells.assign(missing=missing, twice=twice).reset_index()
        lost, shared = estimate(table, "missing"), estimate(table, "twice")
        ours = f"of {len(table):,} cells retrieved by neither {lost}; by both {shared}"
        if min(a.mean(), b.mean()) < POINT:
            least = first if a.mean() < b.mean() else second
            return Finding(False, ours, f"no complement: {least} retrieves nothing of them")
        words = [judge("at most", e.at_least, e.at_most, NOTHING) for e in (lost, shared)]
        return by_word(ours, all_of(words))

    return check


def setting_values(
    table: pd.DataFrame, published: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of settings with their published values and ours."""
    rows = []
    for name, value in published.items():
        own = table[table["setting"] == name]
        inside = own["in_window"].astype(bool)
        rows.append([name, value, str(estimate(own)), _share(own[inside]), _share(own[~inside])])
    return ["setting", "published", "ours", "inside the window", "beyond it"], rows


def _share(cells: pd.DataFrame) -> str:
    return "" if cells.empty else f"{100 * cells['accuracy'].mean():.1f}%"
