"""The common frame of the experiments: prompts, measures and findings."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.language import text_loss
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import Haystack, Prompt, grid
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.niah.sweep import niah
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.runs.statistics import summary
from hooked_hybrid.runs.verdicts import FAILS, HOLDS, OPEN, Claimed, Word, judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["shows it", "does not show it", "cannot say"]
LENGTH, DEPTHS = 160, (0.0, 0.5)
"""Length of the prompts: the needle stays in every packaged model's window to the answer's end."""
HARMLESS, HARMFUL = 0.9, 0.5
"""Shares of the whole model's accuracy: a cut that keeps 90% is harmless, one below half is
harmful.

Each with its interval, see `spares` and `harms`.
"""


@dataclass(frozen=True)
class Finding:
    """The result of an experiment on one model.

    Attributes:
        verdict: whether the packaged model shows what was claimed of another one; it is not about
            that one.
        ours: our figures in words, for comparison with the published ones.
        table: one row for each setting, with its figures; see `Bench.measure`.
    """

    verdict: Verdict
    ours: str
    table: pd.DataFrame


@dataclass(frozen=True)
class Bench:
    """A model with its prompts, and a folder for unfinished sweeps.

    Args:
        model: packaged, or any with a tokenizer that answers the prompts.
        folder: of the experiment.
        n_needles: the paper's needle and `n_needles - 1` held-out ones; at least 2, as intervals
            are over needles.
        n_texts: texts on which the loss is measured.
    """

    model: HookedHybrid
    folder: Path
    n_needles: int = 6
    n_texts: int = 6

    def prompts(self) -> list[Prompt]:
        """Return the prompts that every setting answers."""
        needles = [PAPER, *held_out_needles()][: self.n_needles]
        return grid(self.model, needles, [LENGTH], list(DEPTHS), Haystack(0))

    def measure(self, settings: Sequence[Setting]) -> pd.DataFrame:
        """Return accuracy and loss of text under each setting, the first being the whole model.

        Columns: `setting`; `accuracy` (mean graded score / 5) with its 95% interval `low`, `high`
        over needles; `more`, the loss of text above the first setting's, in nats a token, with
        `more_low`, `more_high` over texts. A stopped sweep is continued.
        """
        cells = niah(self.model, self.prompts(), settings, out=self.folder / "cells", resume=True)
        texts = text_loss(self.model, settings, LENGTH, self.n_texts)
        return summary(cells)[["setting", "accuracy", "low", "high"]].merge(
            texts[["setting", "more", "more_low", "more_high"]], on="setting", sort=False
        )


@dataclass(frozen=True)
class Experiment:
    """A published claim, and its experiment here.

    `run` measures on a bench; `column` is shown in the figure, with its interval in the columns
    `low` and `high`, or in those named after it, for settings without `undrawn` in their name.
    """

    claim: str
    source: str
    run: Callable[[Bench], Finding]
    column: str = "accuracy"
    unit: str = "accuracy (mean score / 5)"
    undrawn: str = ""


def both(name: str, hooks: Iterable[HookSpec], **spec: Any) -> Setting:
    """Return a setting whose hooks act in prefill and in generation."""
    made = tuple(hooks)
    return Setting(name, made, made, {"stage": "both", **spec})


def accuracies(table: pd.DataFrame, prefix: str) -> pd.Series:
    """Return the accuracies of settings with a prefix, relative to the first setting's."""
    chosen = table["setting"].str.startswith(prefix)
    return table.loc[chosen].set_index("setting")["accuracy"] / table["accuracy"].iloc[0]


def harms(rows: pd.DataFrame, base: float) -> pd.Series:
    """Whether each setting leaves less than half of an accuracy, its whole interval with it."""
    return _words(rows, "below", base) == HOLDS


def spares(rows: pd.DataFrame, base: float) -> pd.Series:
    """Whether each setting leaves 90% of an accuracy, and its whole interval at least half."""
    return (rows["accuracy"] >= HARMLESS * base) & leaves_half(rows, base)


def leaves_half(rows: pd.DataFrame, base: float) -> pd.Series:
    """Whether each setting leaves half of an accuracy or more, its whole interval with it."""
    return _words(rows, "at least", base) == HOLDS


def _words(rows: pd.DataFrame, claimed: Claimed, base: float) -> pd.Series:
    ends = zip(rows["low"], rows["high"], strict=True)
    return pd.Series([judge(claimed, *end, HARMFUL * base) for end in ends], rows.index, object)


def verdict(word: Word) -> Verdict:
    """Return the verdict for a word of `hooked_hybrid.runs.verdicts`."""
    said: dict[Word, Verdict] = {HOLDS: "shows it", FAILS: "does not show it", OPEN: "cannot say"}
    return said[word]


def named(table: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """Return the rows of settings with a prefix."""
    return table[table["setting"].str.startswith(prefix)]


def interval(row: pd.Series) -> str:
    """Return an accuracy with its interval, in percent."""
    return f"{100 * row['accuracy']:.1f}% [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def picture(finding: Finding, experiment: Experiment, title: str) -> Figure:
    """Return a figure with one line for each setting: the measure with its 95% interval.

    Ratios far apart are on a logarithmic axis, shares (none above 1) never are.
    """
    column, table = experiment.column, finding.table
    if experiment.undrawn:
        table = table[~table["setting"].str.contains(experiment.undrawn, regex=False)]
    ends = ("low", "high") if column == "accuracy" else (f"{column}_low", f"{column}_high")
    figure = new_figure(7.0, 1.4 + 0.19 * len(table))
    axes = figure.subplots()
    places = range(len(table))
    if set(ends) <= set(table):
        widths = [
            (table[column] - table[ends[0]]).clip(lower=0),
            (table[ends[1]] - table[column]).clip(lower=0),
        ]
        axes.errorbar(table[column], places, xerr=widths, fmt="o", ms=4, color="#0072B2")
    else:
        axes.plot(table[column], places, "o", ms=4, color="#0072B2")
    axes.set_yticks(places, table["setting"], fontsize=7)
    axes.invert_yaxis()
    axes.set_xlabel(experiment.unit)
    axes.set_title(title, fontsize=9)
    axes.grid(alpha=0.3)
    if column == "accuracy":
        axes.set_xlim(-0.03, 1.03)
    elif table[column].min() > 0 and table[column].max() > max(1, 30 * table[column].min()):
        axes.set_xscale("log")
    return figure


def save(
    finding: Finding,
    experiment: Experiment,
    model: str,
    folder: Path,
    about: Mapping[str, Any] | None = None,
) -> None:
    """Write `table.csv`, the figure and finally `finding.json`.

    `about`, everything that the finding depends on, is stored in it.
    """
    with replacing(folder / "table.csv") as temporary:
        finding.table.to_csv(temporary, index=False)
    with replacing(folder / "picture.png") as temporary:
        drawn = picture(finding, experiment, f"{model}, beside {experiment.source}")
        drawn.savefig(temporary, format="png", dpi=130)
    said = {k: v for k, v in asdict(finding).items() if k != "table"}
    with replacing(folder / "finding.json") as temporary:
        said = {"model": model, "claim": experiment.claim, "source": experiment.source, **said}
        said |= about or {}
        temporary.write_text(json.dumps(said, indent=2), encoding="utf-8")
