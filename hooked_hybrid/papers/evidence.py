"""The evidence of runs: means, differences and tipping points, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.niah.settings.papers import heads_of
from hooked_hybrid.papers import shares
from hooked_hybrid.papers.recipe import PaperRecipe
from hooked_hybrid.runs.intervals import mean_interval

if TYPE_CHECKING:
    import pandas as pd

DRAWS = 4000
"""Draws of weights behind the interval of a tipping point."""
_PLACE = ["needle_id", "seed", "length", "depth"]
"""The columns that two cells must share to be compared one to one."""
MANY = {name: f"{name}-many" for name in ("top-k", "top-k-twice", "weights")}
"""The run over every needle, at one place, of runs over few needles at many places."""
_WHOLE = {
    "weights": "keep-keep",
    "weights-many": "keep-keep",
    "layers": "whole",
    "controls": "whole",
    "elsewhere": "whole",
}
"""The unchanged setting, of runs in which it is not that with all heads kept."""


class Untested(LookupError):
    """The runs do not contain the subject of a claim; the message gives the reason."""


class NeedleMean(NamedTuple):
    """A mean of fractions (or of differences of these) with its 95% interval.

    The interval is `hooked_hybrid.runs.intervals.mean_interval` over needles, NaN at both ends for
    a single one; `by_seed` is the mean of each seed's cells; `alike` is whether the means of all
    needles are equal, so that the interval depends on the number of needles alone. `at_least` and
    `at_most` are the one-sided 95% bounds, by which claims are judged.
    """

    mean: float
    low: float
    high: float
    n: int
    n_needles: int
    by_seed: tuple[float, ...]
    alike: bool = False
    at_least: float = float("nan")
    at_most: float = float("nan")

    def __str__(self) -> str:
        interval = "" if np.isnan(self.low) else f" ({_range(self.low, self.high)})"
        seeds = ", ".join(f"{100 * value:.1f}" for value in self.by_seed)
        return f"{100 * self.mean:.1f}%{interval}; by seed {seeds}"


@dataclass(frozen=True)
class Evidence:
    """Everything that claims are checked against.

    Args:
        name: the model, as it was given.
        subject: what verdicts call it.
        cfg: its config.
        recipe: what was run.
        tables: cells of each run, by its name.
        losses: loss of text of each run that has it.
        thesis_depth: whether maps count depth from the end.
        language: accuracies of language benchmarks by task and form, where they could be run.
    """

    name: str
    subject: str
    cfg: HybridConfig
    recipe: PaperRecipe
    tables: dict[str, pd.DataFrame]
    losses: dict[str, pd.DataFrame]
    thesis_depth: bool = False
    language: dict[str, Any] = field(default_factory=dict)

    @property
    def n_heads(self) -> int:
        """Heads of the attention layer with the fewest."""
        return min(heads_of(self.cfg).values())

    def whole(self, run: str) -> NeedleMean:
        """Return the accuracy of a run with all heads and unchanged weights."""
        return self.accuracy(run, _WHOLE.get(run, self.k_setting(self.n_heads)))

    def cells(self, run: str, setting: str, in_window: bool | None = None) -> pd.DataFrame:
        """Return the cells of a setting, or only those with needles inside or beyond the window.

        Raises:
            Untested: the run was not made, or has no such setting.
        """
        if run not in self.tables:
            raise Untested(f"run {run} was not made")
        table = self.tables[run]
        chosen = table[table["setting"] == setting]
        if chosen.empty:
            raise Untested(f"run {run} has no setting {setting!r}")
        if in_window is None:
            return chosen
        return chosen[chosen["in_window"].astype(bool) == in_window]

    def accuracy(self, run: str, setting: str, in_window: bool | None = None) -> NeedleMean:
        """Return the accuracy of a setting: mean graded score / 5."""
        return estimate(self.cells(run, setting, in_window))

    def of_many(self, run: str, setting: str) -> pd.DataFrame | None:
        """Return the cells of a setting over every needle, or None if it was not run."""
        table = self.tables.get(MANY.get(run, ""))
        chosen = None if table is None else table[table["setting"] == setting]
        return None if chosen is None or chosen.empty else chosen

    def k_setting(self, k: int, stage: str = "generation") -> str:
        """Return the name of a setting of the top-k sweeps."""
        return f"{stage} k={k}"

    def scaled(self, k: int, of: int) -> int:
        """Return the number of this model's heads that is the share `k / of`.

        Raises:
            Untested: the share is more than `shares.TOLERANCE` from a whole number of heads, or
                none.
        """
        found = shares.share(k, of, self.n_heads)
        if found is None:
            raise Untested(f"this model has no k for {k} of {of}: its heads are {self.n_heads}")
        return found

    def scaled_range(self, first: int, last: int, of: int) -> list[int]:
        """Return the k of this model that are a share from `first` to `last` of `of`.

        Raises:
            Untested: there is none.
        """
        found = shares.head_counts(first, last, of, self.n_heads)
        if not found:
            raise Untested(f"no k of {self.n_heads} heads is from {first} to {last} of {of}")
        return found


def estimate(cells: pd.DataFrame, values: str = "accuracy", least: float = 0.0) -> NeedleMean:
    """Return the mean of a column of cells; NaN throughout if there is no cell.

    Args:
        cells: of a run.
        values: column of numbers from `least` to 1.
        least: lowest possible value.
    """
    if cells.empty:
        nan = float("nan")
        return NeedleMean(nan, nan, nan, 0, 0, ())
    clustered = cells[values], cells["needle_id"], (least, 1.0)
    low, high = mean_interval(*clustered)
    one_sided = mean_interval(*clustered, level=0.9)
    by_seed = cells.groupby("seed")[values].mean()
    by_needle = cells.groupby("needle_id")[values].mean()
    mean, alike = float(cells[values].mean()), float(by_needle.max() - by_needle.min()) < 1e-9
    seeds = tuple(map(float, by_seed))
    return NeedleMean(mean, low, high, len(cells), len(by_needle), seeds, alike, *one_sided)


def difference(more: pd.DataFrame, less: pd.DataFrame) -> NeedleMean:
    """Return the difference in accuracy between some cells and others, pair by pair.

    Pairs share needle, seed, length and depth; cells without a partner are left out.
    """
    paired = more.merge(less, on=_PLACE, suffixes=("", "_less"))
    return estimate(paired.assign(gap=paired["accuracy"] - paired["accuracy_less"]), "gap", -1.0)


def bounds(few: NeedleMean, many: NeedleMean | None) -> tuple[float, float]:
    """Return the one-sided 95% bounds of a mean over few needles and one over many.

    Each is the farther of the two. If the few needles are alike, their bounds depend only on their
    number: then it is the farther of their mean and the bounds of the many.
    """
    if many is None:
        return few.at_least, few.at_most
    low, high = (few.mean, few.mean) if few.alike else (few.at_least, few.at_most)
    return min(low, many.at_least), max(high, many.at_most)


class Tipping(NamedTuple):
    """The smallest k with at least half of the best accuracy, None if nothing is retrieved."""

    k: int | None
    low: int | None
    high: int | None


def tipping(cells: pd.DataFrame, floor: float = 0.05) -> Tipping:
    """Return where accuracy tips, with a 95% interval over needles.

    Below `floor` at every k there is no tipping point, which then counts as one more than the most
    heads. Every cell has the same weight, as in `estimate`. As there, the interval uses random
    weights of the needles and of one more, the most extreme that could be missing: for the lower
    end a needle that is retrieved at every k, for the upper end one retrieved only with the most
    heads.

    Args:
        cells: of one stage of a top-k sweep.
        floor: the least accuracy that counts as retrieval.
    """
    by = {"index": "needle_id", "columns": "k", "values": "accuracy", "fill_value": 0}
    sums, counts = (cells.pivot_table(**by, aggfunc=how) for how in ("sum", "count"))
    ks, total, n = [int(k) for k in sums.columns], sums.to_numpy(float), counts.to_numpy(float)
    beyond = max(ks) + 1
    weights = np.random.default_rng(0).standard_exponential((DRAWS, len(total) + 1))
    ends: list[int | None] = []
    for at, share in (("every k", 0.025), ("the most", 0.975)):
        missed = n.mean(axis=0) * (np.ones(len(ks)) if at == "every k" else np.array(ks) == max(ks))
        drawn = weights @ np.vstack([total, missed]) / (weights @ np.vstack([n, n.mean(axis=0)]))
        tips = [_tips(rates, ks, floor) for rates in drawn]
        places = [beyond if tip is None else tip for tip in tips]
        end = int(np.quantile(places, share, method="lower" if share < 0.5 else "higher"))
        ends.append(None if end == beyond else end)
    return Tipping(_tips(total.sum(axis=0) / n.sum(axis=0), ks, floor), *ends)


def _tips(rates: np.ndarray, ks: list[int], floor: float) -> int | None:
    best = float(rates.max())
    return None if best < floor else min(k for k, r in zip(ks, rates, strict=True) if r >= best / 2)


def _range(low: float, high: float) -> str:
    return f"95% {100 * low:.1f} to {100 * high:.1f}"
