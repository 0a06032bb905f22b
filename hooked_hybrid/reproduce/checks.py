"""From tables to findings: one function for each form of claim.

Each returns a check for a claim; the thresholds are arguments, written beside the claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import pandas as pd

from hooked_hybrid.reproduce.claims import Check, Finding
from hooked_hybrid.reproduce.evidence import Estimate, Evidence, difference, estimate, tipping

if TYPE_CHECKING:
    from collections.abc import Mapping

NOTHING = 0.05
"""Accuracy up to which nothing is retrieved: a twentieth of the score."""
ABOUT = 0.10
"""What "about as good" may lack."""
LEAST = 0.20
"""Accuracy of the whole model below which there is no retrieval that could be lost."""
POINT = 0.01
"""By how much accuracy must differ, at least, to be called above or below."""
SPOT = 0.20
"""Accuracy of a length and depth, over its needles and seeds, up to which it counts as empty."""

UNDECIDED = "undecided: the interval holds the border"


def needs_retrieval(check: Check) -> Check:
    """Return the check, for models that retrieve; of others a claim about losses says nothing."""

    def guarded(evidence: Evidence) -> Finding:
        whole = evidence.whole()
        if whole.mean < LEAST:
            return Finding(None, f"with all heads {whole}: nothing that could be lost")
        return check(evidence)

    return guarded


def _points(gap: Estimate) -> str:
    seeds = ", ".join(f"{100 * value:+.1f}" for value in gap.by_seed)
    interval = f"95% {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    return f"{100 * gap.mean:+.1f} points ({interval}; by seed {seeds})"


def at_most(run: str, settings: Callable[[Evidence], Sequence[str]], most: float) -> Check:
    """Return a check that every one of these settings stays at or below an accuracy."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        found = {name: evidence.accuracy(run, name) for name in settings(evidence)}
        worst = max(found, key=lambda name: found[name].high)
        highest = "" if len(found) == 1 else f"highest of {len(found)}, {worst}: "
        own = found[worst]
        note = UNDECIDED if own.low <= most < own.high else ""
        return Finding(own.high <= most, f"{highest}{own}", note)

    return check


def without_heads(run: str = "top-k") -> Check:
    """Return a check that nothing is retrieved at k = 0, heads silenced in generation alone."""
    return at_most(run, lambda evidence: [evidence.k_setting(0)], NOTHING)


def tips_at(k: int, of: int) -> Check:
    """Return a check that retrieval tips at as large a share of the heads, generation only.

    The tipping point is the smallest k with at least half of the best accuracy.
    """

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        table = evidence.tables["top-k"]
        cells = table[(table["stage"] == "generation") & table["k"].notna()]
        found, wanted = tipping(cells), evidence.scaled(k, of)
        ours = f"{found.k} of {evidence.n_heads} (95% {found.low} to {found.high})"
        holds = found.k == wanted and found.low == wanted == found.high
        same = "" if evidence.n_heads == of else f"the same share of {evidence.n_heads}: {wanted}"
        return Finding(holds, ours, same)

    return check


def as_good(k: int, of: int, stage: str = "generation", lacking: float = ABOUT) -> Check:
    """Return a check that with k heads accuracy lacks no more than so much of that with all."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        mine = evidence.scaled(k, of)
        whole = evidence.cells("top-k", evidence.k_setting(evidence.n_heads, stage))
        few = evidence.cells("top-k", evidence.k_setting(mine, stage))
        gap = difference(few, whole)
        ours = f"k = {mine} of {evidence.n_heads}: {estimate(few)}; {_points(gap)} against all"
        return Finding(gap.low >= -lacking, ours)

    return check


def every_k_from(k: int, of: int) -> Check:
    """Return a check that no k from here up lacks much of the accuracy with all heads."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        whole = evidence.cells("top-k", evidence.k_setting(evidence.n_heads))
        gaps = {
            mine: difference(evidence.cells("top-k", evidence.k_setting(mine)), whole)
            for mine in range(evidence.scaled(k, of), evidence.n_heads)
        }
        worst = min(gaps, key=lambda mine: gaps[mine].mean)
        holds = all(gap.low >= -ABOUT for gap in gaps.values())
        return Finding(holds, f"most is lacking at k = {worst}: {_points(gaps[worst])}")

    return check


Side = Callable[[Evidence], pd.DataFrame]
"""The cells of one side of a comparison."""


def above(more: Side, less: Side, by: float = POINT, what: str = "") -> Check:
    """Return a check that some cells' accuracy is above others' by more than so much, in pairs."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        first, second = more(evidence), less(evidence)
        if first.empty or second.empty:
            return Finding(None, "this model has too few heads for the comparison")
        gap = difference(first, second)
        means = f"{100 * estimate(first).mean:.1f}% against {100 * estimate(second).mean:.1f}%"
        note = UNDECIDED if gap.low <= by < gap.high else ""
        return Finding(gap.low > by, f"{what}{means}: {_points(gap)}", note)

    return check


def below(ks: Sequence[int], of: int, stage: str, most: float) -> Check:
    """Return a check that accuracy is below a bound at every one of these shares of the heads."""

    def settings(evidence: Evidence) -> list[str]:
        return [evidence.k_setting(evidence.scaled(k, of), stage) for k in ks]

    return at_most("top-k", settings, most)


def both_hold(*checks: Check) -> Check:
    """Return a check of a claim with several parts; it holds where all that were tested do."""

    def check(evidence: Evidence) -> Finding:
        found = [part(evidence) for part in checks]
        tested = [part.holds for part in found if part.holds is not None]
        texts = "; ".join(dict.fromkeys(part.ours for part in found))
        notes = "; ".join(dict.fromkeys(part.note for part in found if part.note))
        return Finding(all(tested) if tested else None, texts, notes)

    return check


def cells_of(setting: str, run: str = "weights", in_window: bool | None = None) -> Side:
    """Return the side of a comparison that is one setting."""
    return lambda evidence: evidence.cells(run, setting, in_window)


def cells_at(ks: Sequence[int], of: int, stage: str = "generation", run: str = "top-k") -> Side:
    """Return the side that is these shares of the heads, a mean over them at each prompt."""

    def side(evidence: Evidence) -> pd.DataFrame:
        mine = list(dict.fromkeys(evidence.scaled(k, of) for k in ks))
        parts = [evidence.cells(run, evidence.k_setting(k, stage)) for k in mine]
        joined = pd.concat(parts)
        by = [*joined.columns.intersection(["prompt_id", "needle_id", "seed", "length", "depth"])]
        return joined.groupby(by, as_index=False)["accuracy"].mean()

    return side


def empty_maps(
    run: str,
    settings: Callable[[Evidence], Sequence[str]],
    most: float = SPOT,
    what: str = "",
) -> Check:
    """Return a check that no length and depth of these settings' maps retrieves."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        spots = {}
        for name in settings(evidence):
            means = evidence.cells(run, name).groupby(["length", "depth"])["accuracy"].mean()
            spots[name] = (float(means.max()), means.idxmax())
        name = max(spots, key=lambda name: spots[name][0])
        highest, (length, depth) = spots[name]
        shown = 1 - depth if evidence.thesis_depth else depth
        ours = (
            f"{what}highest cell {100 * highest:.1f}% ({name}, {length} tokens, depth "
            f"{100 * shown:.0f}%)"
        )
        return Finding(highest <= most, ours)

    return check


def left_beyond_window(setting: str) -> Check:
    """Return a check that what a setting still retrieves has its needle beyond the window."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        inside = evidence.accuracy("weights", setting, True)
        beyond = evidence.accuracy("weights", setting, False)
        if not beyond.n:
            return Finding(None, "no needle lies beyond an attention window of this model")
        ours = f"inside the window {inside}; beyond it {beyond}"
        return Finding(inside.high <= NOTHING < beyond.low, ours)

    return check


def complement(first: str, second: str, whole: str) -> Check:
    """Return a check that just one of two settings retrieves each cell that the whole does."""

    @needs_retrieval
    def check(evidence: Evidence) -> Finding:
        sides = [evidence.cells("weights", name).set_index("prompt_id") for name in (first, second)]
        cells = evidence.cells("weights", whole).set_index("prompt_id")
        a, b = (side["accuracy"].reindex(cells.index) for side in sides)
        missing = (cells["accuracy"] - a.where(a > b, b)).clip(lower=0)
        twice = a.where(a < b, b)
        table = cells.assign(missing=missing, twice=twice).reset_index()
        lost, shared = estimate(table, "missing"), estimate(table, "twice")
        ours = f"retrieved by neither {lost}; by both {shared}"
        if min(a.mean(), b.mean()) < POINT:
            least = first if a.mean() < b.mean() else second
            return Finding(False, ours, f"no complement: {least} retrieves nothing")
        return Finding(lost.high <= NOTHING and shared.high <= NOTHING, ours)

    return check


def setting_values(
    table: pd.DataFrame, published: Mapping[str, str]
) -> tuple[list[str], list[list[str]]]:
    """Return heading and rows of settings with their published values beside ours."""
    rows = []
    for name, value in published.items():
        own = table[table["setting"] == name]
        inside = own["in_window"].astype(bool)
        rows.append([name, value, str(estimate(own)), _share(own[inside]), _share(own[~inside])])
    return ["setting", "published", "ours", "inside the window", "beyond it"], rows


def _share(cells: pd.DataFrame) -> str:
    return "" if cells.empty else f"{100 * cells['accuracy'].mean():.1f}%"


__all__ = [
    "ABOUT",
    "LEAST",
    "NOTHING",
    "POINT",
    "SPOT",
    "above",
    "as_good",
    "at_most",
    "below",
    "both_hold",
    "cells_at",
    "cells_of",
    "complement",
    "empty_maps",
    "every_k_from",
    "left_beyond_window",
    "needs_retrieval",
    "setting_values",
    "tips_at",
    "without_heads",
]
