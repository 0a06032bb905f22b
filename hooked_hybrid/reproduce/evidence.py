"""What was run, and figures of it: means, differences and tipping points, with intervals."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.niah.experiments import heads_of
from hooked_hybrid.niah.statistics import cluster_column, clustered_interval
from hooked_hybrid.reproduce.recipe import Recipe

if TYPE_CHECKING:
    import pandas as pd

_RESAMPLES = 1000
_PLACE = ["needle_id", "seed", "length", "depth"]
"""What two cells must share to be compared one to one."""


class Estimate(NamedTuple):
    """A mean of fractions (or of differences of these) with its 95% interval.

    The interval is a bootstrap clustered by needle, NaN at both ends for a single one; `by_seed` is
    the mean of each seed's cells.
    """

    mean: float
    low: float
    high: float
    n: int
    n_needles: int
    by_seed: tuple[float, ...]

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
    recipe: Recipe
    tables: dict[str, pd.DataFrame]
    losses: dict[str, pd.DataFrame]
    thesis_depth: bool = False
    language: dict[str, Any] = field(default_factory=dict)

    @property
    def n_heads(self) -> int:
        """Heads of an attention layer, the fewest of any."""
        return min(heads_of(self.cfg).values())

    def whole(self) -> Estimate:
        """Return the accuracy with all heads and weights as they are, of the first run with it."""
        for run, setting in (("top-k", self.k_setting(self.n_heads)), ("weights", "keep-keep")):
            if run in self.tables:
                return self.accuracy(run, setting)
        raise LookupError("neither heads nor weights were run")

    def cells(self, run: str, setting: str, in_window: bool | None = None) -> pd.DataFrame:
        """Return the cells of a setting, of needles inside the window or beyond it alone.

        Raises:
            LookupError: the run has no such setting.
        """
        table = self.tables[run]
        chosen = table[table["setting"] == setting]
        if chosen.empty:
            raise LookupError(f"run {run} has no setting {setting!r}")
        if in_window is None:
            return chosen
        return chosen[chosen["in_window"].astype(bool) == in_window]

    def accuracy(self, run: str, setting: str, in_window: bool | None = None) -> Estimate:
        """Return the accuracy of a setting: mean graded score / 5."""
        return estimate(self.cells(run, setting, in_window))

    def k_setting(self, k: int, stage: str = "generation") -> str:
        """Return the name of a setting of the top-k sweeps."""
        return f"{stage} k={k}"

    def scaled(self, k: int, of: int) -> int:
        """Return as large a share of this model's heads as `k` is of `of`: 1 or more, unless 0."""
        return 0 if k == 0 else max(1, round(k * self.n_heads / of))


def estimate(cells: pd.DataFrame, values: str = "accuracy") -> Estimate:
    """Return the mean of a column of cells; NaN throughout where there is no cell."""
    if cells.empty:
        nan = float("nan")
        return Estimate(nan, nan, nan, 0, 0, ())
    low, high = clustered_interval(cells[values], cells[cluster_column(cells)], _RESAMPLES)
    by_seed = cells.groupby("seed")[values].mean()
    n_needles = cells["needle_id"].nunique()
    mean = float(cells[values].mean())
    return Estimate(mean, low, high, len(cells), n_needles, tuple(map(float, by_seed)))


def difference(more: pd.DataFrame, less: pd.DataFrame) -> Estimate:
    """Return by how much the accuracy of some cells is above that of others, pair by pair.

    Pairs share needle, seed, length and depth; cells without a partner are left out.
    """
    paired = more.merge(less, on=_PLACE, suffixes=("", "_less"))
    return estimate(paired.assign(gap=paired["accuracy"] - paired["accuracy_less"]), "gap")


class Tipping(NamedTuple):
    """The smallest k with at least half of the best accuracy, None where nothing is retrieved."""

    k: int | None
    low: int | None
    high: int | None


def tipping(cells: pd.DataFrame, floor: float = 0.05) -> Tipping:
    """Return where accuracy tips, with the 95% interval of a bootstrap over needles.

    Below `floor` at every k there is no tipping point: in a resample it then counts as one beyond
    the most heads.

    Args:
        cells: of one stage of a top-k sweep.
        floor: the least accuracy to speak of retrieval.
    """
    sums = cells.pivot_table(index="needle_id", columns="k", values="accuracy", aggfunc="mean")
    ks, rates = [int(k) for k in sums.columns], sums.to_numpy(dtype=float)
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(rates), size=(_RESAMPLES, len(rates)))
    found = [_tips(rates[rows].mean(axis=0), ks, floor) for rows in drawn]
    beyond = max(ks) + 1
    ends = np.quantile(
        [beyond if k is None else k for k in found], [0.025, 0.975], method="nearest"
    )
    low, high = (None if end == beyond else int(end) for end in ends)
    return Tipping(_tips(rates.mean(axis=0), ks, floor), low, high)


def _tips(rates: np.ndarray, ks: list[int], floor: float) -> int | None:
    best = float(rates.max())
    return None if best < floor else min(k for k, r in zip(ks, rates, strict=True) if r >= best / 2)


def _range(low: float, high: float) -> str:
    return f"95% {100 * low:.1f} to {100 * high:.1f}"


__all__ = ["Estimate", "Evidence", "Tipping", "difference", "estimate", "tipping"]
