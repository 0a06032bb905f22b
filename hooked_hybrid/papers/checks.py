"""From tables to findings: one function for each form of claim.

Each returns a check for a claim; the thresholds are arguments, written with the claims.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hooked_hybrid.papers.claims import Check, Finding, run_check
from hooked_hybrid.papers.evidence import (
    MANY,
    Evidence,
    NeedleMean,
    Untested,
    bounds,
    difference,
    estimate,
    tipping,
)
from hooked_hybrid.runs.verdicts import HOLDS, OPEN, Claimed, Word, judge

if TYPE_CHECKING:
    import pandas as pd

NOTHING = 0.05
"""Accuracy up to which retrieval counts as none: a twentieth of the score."""
ABOUT = 0.10
"""The largest difference that counts as "about as good"."""
LEAST = 0.20
"""Accuracy of the whole model below which there is no retrieval to lose."""
POINT = 0.01
"""Least difference in accuracy that counts as above or below."""

UNDECIDED = "undecided: the interval holds the border"


def needs_retrieval(*runs: str) -> Callable[[Check], Check]:
    """Return a decorator: a check first requires that the whole model retrieves in each run.

    Otherwise a claim about losses cannot be tested.
    """

    def guarded(check: Check) -> Check:
        def asked(evidence: Evidence) -> Finding:
            many = [MANY[run] for run in runs if MANY.get(run) in evidence.tables]
            for run in dict.fromkeys([*runs, *many]):
                whole = evidence.whole(run)
                if not whole.mean >= LEAST:
                    where = f"run {run}, nothing left out"
                    return Finding(None, f"{where}: {whole}: nothing that could be lost")
            return check(evidence)

        return asked

    return guarded


def by_rule(ours: str, claimed: Claimed, low: float, high: float, *borders: float) -> Finding:
    """Return a finding by `runs.verdicts.judge`, marked if it is undecided."""
    return by_word(ours, judge(claimed, low, high, *borders))


def by_word(ours: str, word: Word, *notes: str) -> Finding:
    """Return the finding for a word of the rule; an undecided claim is not shown, and marked."""
    said = filter(None, (*notes, UNDECIDED if word == OPEN else ""))
    return Finding(word == HOLDS, ours, "; ".join(said))


def _points(gap: NeedleMean) -> str:
    seeds = ", ".join(f"{100 * value:+.1f}" for value in gap.by_seed)
    interval = f"95% {100 * gap.low:+.1f} to {100 * gap.high:+.1f}"
    return f"{100 * gap.mean:+.1f} points ({interval}; by seed {seeds})"


def at_most(run: str, settings: Callable[[Evidence], Sequence[str]], most: float) -> Check:
    """Return a check that the accuracy of every one of some settings is at most a bound.

    The one-sided 95% bound is used, as the claim is one-sided.
    """

    @needs_retrieval(run)
    def check(evidence: Evidence) -> Finding:
        found = {}
        for name in settings(evidence):
            few, many = evidence.accuracy(run, name), evidence.of_many(run, name)
            wide = None if many is None else estimate(many)
            low, top = bounds(few, wide)
            ours = f"{few}{_at_one_place(many, wide)}; at most {100 * top:.1f}%"
            found[name] = (low, top, ours)
        worst = max(found, key=lambda name: found[name][1])
        highest = "" if len(found) == 1 else f"highest of {len(found)}, {worst}: "
        low, top, ours = found[worst]
        return by_rule(f"{highest}{ours}", "at most", low, top, most)

    return check


def _at_one_place(
    cells: pd.DataFrame | None, mean: NeedleMean | None, unit: Literal["%", "points"] = "%"
) -> str:
    """Return the result of a run over every needle in words; empty if there is none."""
    if cells is None or mean is None:
        return ""
    place = f"{mean.n_needles} needles at {int(cells['length'].iloc[0])} tokens"
    middle, low, high = (100 * value for value in mean[:3])
    if unit == "%":
        return f"; of {place} {middle:.1f}% (95% {low:.1f} to {high:.1f})"
    return f"; of {place} {middle:+.1f} points (95% {low:+.1f} to {high:+.1f})"


def without_heads(run: str = "top-k") -> Check:
    """Return a check that nothing is retrieved at k = 0, with heads silenced in generation only."""
    return at_most(run, lambda evidence: [evidence.k_setting(0)], NOTHING)


def tips_at(k: int, of: int) -> Check:
    """Return a check that retrieval tips at the same share of the heads, in generation only.

    The tipping point is the smallest k with at least half of the best accuracy.
    """

    @needs_retrieval("top-k")
    def check(evidence: Evidence) -> Finding:
        table = evidence.tables["top-k"]
        cells = table[(table["stage"] == "generation") & table["k"].notna()]
        found, wanted = tipping(cells), evidence.scaled(k, of)
        ours = f"{found.k} of {evidence.n_heads} (95% {found.low} to {found.high})"
        same = "" if evidence.n_heads == of else f"the same share of {evidence.n_heads}: {wanted}"
        beyond = evidence.n_heads + 1  # where nothing is retrieved at any k
        ends = [float(beyond if end is None else end) for end in (found.low, found.high)]
        word = judge("within", *ends, float(wanted), float(wanted))
        if (
            word == HOLDS and found.k != wanted
        ):  # the tipping point of the mean is outside its interval
            word = OPEN
        return by_word(ours, word, same)

    return check


def as_good(k: int, of: int, stage: str = "generation", lacking: float = ABOUT) -> Check:
    """Return a check that accuracy with k heads is at most `lacking` below that with all."""

    @needs_retrieval("top-k")
    def check(evidence: Evidence) -> Finding:
        mine = evidence.scaled(k, of)
        whole = evidence.cells("top-k", evidence.k_setting(evidence.n_heads, stage))
        few = evidence.cells("top-k", evidence.k_setting(mine, stage))
        gap = difference(few, whole)
        ours = f"k = {mine} of {evidence.n_heads}: {estimate(few)}; {_points(gap)} against all"
        return _lacks_at_most(gap, lacking, ours)

    return check


def _lacks_at_most(gap: NeedleMean, lacking: float, ours: str) -> Finding:
    ours = f"{ours}; at least {100 * gap.at_least:+.1f}"
    return by_rule(ours, "at least", gap.at_least, gap.at_most, -lacking)


def every_k_from(k: int, of: int) -> Check:
    """Return a check that no k from here up loses much of the accuracy with all heads."""

    @needs_retrieval("top-k")
    def check(evidence: Evidence) -> Finding:
        whole = evidence.cells("top-k", evidence.k_setting(evidence.n_heads))
        gaps = {
            mine: difference(evidence.cells("top-k", evidence.k_setting(mine)), whole)
            for mine in range(evidence.scaled(k, of), evidence.n_heads)
        }
        if not gaps:
            raise Untested(f"no k of {evidence.n_heads} heads is below all of them")
        worst = min(gaps, key=lambda mine: gaps[mine].at_least)
        ours = f"most may be lacking at k = {worst}: {_points(gaps[worst])}"
        return _lacks_at_most(gaps[worst], ABOUT, ours)

    return check


@dataclass(frozen=True)
class Side:
    """One side of a comparison: some settings of a run, averaged at each prompt."""

    run: str
    settings: Callable[[Evidence], Sequence[str]]

    def cells(self, evidence: Evidence) -> pd.DataFrame:
        """Return the cells, one a prompt."""
        return _by_prompt([evidence.cells(self.run, name) for name in self.settings(evidence)])

    def of_many(self, evidence: Evidence) -> pd.DataFrame | None:
        """Return the cells over every needle, or None if a setting was not run over these."""
        found = [evidence.of_many(self.run, name) for name in self.settings(evidence)]
        run = [cells for cells in found if cells is not None]
        return _by_prompt(run) if run and len(run) == len(found) else None


def _by_prompt(parts: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    by = ["prompt_id", "needle_id", "seed", "length", "depth"]
    return pd.concat(parts).groupby(by, as_index=False)["accuracy"].mean()


def above(more: Side, less: Side, by: float = POINT, what: str = "") -> Check:
    """Return a check that one side's accuracy exceeds the other's by more than `by`, in pairs."""

    @needs_retrieval(more.run, less.run)
    def check(evidence: Evidence) -> Finding:
        names = [{(side.run, name) for name in side.settings(evidence)} for side in (more, less)]
        if shared := names[0] & names[1]:
            same = ", ".join(name for _, name in sorted(shared))
            raise Untested(f"too few heads for the comparison: both sides hold {same}")
        first, second = more.cells(evidence), less.cells(evidence)
        gap = difference(first, second)
        means = f"{100 * estimate(first).mean:.1f}% against {100 * estimate(second).mean:.1f}%"
        many = [side.of_many(evidence) for side in (more, less)]
        wide = None if many[0] is None or many[1] is None else difference(many[0], many[1])
        low, high = bounds(gap, wide)
        ours = f"{what}{means}: {_points(gap)}{_at_one_place(many[0], wide, 'points')}"
        ours = f"{ours}; at least {100 * low:+.1f}"
        return by_rule(ours, "above", low, high, by)

    return check


def below(ks: Sequence[int], of: int, stage: str, most: float) -> Check:
    """Return a check that accuracy is below a bound at every one of some shares of the heads."""

    def settings(evidence: Evidence) -> list[str]:
        return [evidence.k_setting(evidence.scaled(k, of), stage) for k in ks]

    return at_most("top-k", settings, most)


def both_hold(*checks: Check) -> Check:
    """Return a check of a claim with several parts.

    It holds if all do, and does not if one does not; otherwise it is untested, as a part is.
    """

    def check(evidence: Evidence) -> Finding:
        found = [run_check(part, evidence) for part in checks]
        parts = [part.holds for part in found]
        holds = False if False in parts else None if None in parts else True
        texts = "; ".join(dict.fromkeys(part.ours for part in found))
        notes = [part.note for part in found if part.note]
        notes += ["a part is untested"] if None in parts else []
        return Finding(holds, texts, "; ".join(dict.fromkeys(notes)))

    return check


def cells_of(setting: str, run: str = "weights") -> Side:
    """Return the side of a comparison that is one setting."""
    return Side(run, lambda _: [setting])


def cells_at(ks: int | range, of: int, stage: str = "generation", run: str = "top-k") -> Side:
    """Return the side with the same share of the heads, or with every k in a range of shares."""

    def settings(evidence: Evidence) -> list[str]:
        if isinstance(ks, int):
            mine = [evidence.scaled(ks, of)]
        else:
            mine = evidence.scaled_range(ks[0], ks[-1], of)
        return [evidence.k_setting(k, stage) for k in mine]

    return Side(run, settings)
