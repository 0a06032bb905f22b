"""The papers' figures, drawn from their shared runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.niah.report.plots import STAGES, accuracy_by_k, retrieval_maps
from hooked_hybrid.niah.report.setting_plots import weight_matrix_picture
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.papers.evidence import Evidence, estimate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Draw = Callable[[Evidence], "Figure"]
VALUES = ("setting", "accuracy", "inside the window", "beyond it")
"""Headings of `value_rows`."""
_ONCE, _TWICE = "#0072B2", "#D55E00"


def curves(evidence: Evidence) -> Figure:
    """Return accuracy by k, a line for each stage; needles in and beyond the window apart."""
    table = evidence.tables["top-k"]
    return accuracy_by_k(table, by_window=not table["in_window"].astype(bool).all())


def maps_by_k(ks: Callable[[Evidence], Sequence[int]], stages: Sequence[str]) -> Draw:
    """Return a function that draws the maps of some k, one row for each stage."""

    def draw(evidence: Evidence) -> Figure:
        names = {
            evidence.k_setting(k, stage): (stage, f"k = {k}, {STAGES[stage]}")
            for stage in stages
            for k in sorted(set(ks(evidence)))
        }
        return _maps(evidence, [("top-k", names)])

    return draw


def maps_once_and_twice(ks: Sequence[int]) -> Draw:
    """Return a function that draws the maps of some k, context given once above and twice below."""

    def draw(evidence: Evidence) -> Figure:
        few = [k for k in ks if k <= evidence.n_heads]
        rows = [
            (run, {evidence.k_setting(k): (way, f"k = {k}, context {way}") for k in few})
            for run, way in (("top-k", "once"), ("top-k-twice", "twice"))
        ]
        return _maps(evidence, rows)

    return draw


def maps_of_weights(settings: Sequence[str] | None = None) -> Draw:
    """Return a function that draws maps of some or all weight manipulations, one row a prefill."""

    def draw(evidence: Evidence) -> Figure:
        names = settings or list(evidence.tables["weights"]["setting"].unique())
        in_row = {name: ("" if settings else name.split("-")[0], name) for name in names}
        return _maps(evidence, [("weights", in_row)])

    return draw


def matrix(evidence: Evidence) -> Figure:
    """Return the accuracies of weight manipulations, prefill by row and generation by column."""
    return weight_matrix_picture(evidence.tables["weights"])


def _maps(evidence: Evidence, rows: Sequence[tuple[str, Mapping[str, tuple[str, str]]]]) -> Figure:
    """Draw the maps of settings by run, from the title of each row and each map."""
    import pandas as pd

    parts = []
    for run, names in rows:
        for setting, (row, title) in names.items():
            parts.append(evidence.cells(run, setting).assign(setting=title, stage=row))
    return retrieval_maps(pd.concat(parts, ignore_index=True), evidence.thesis_depth)


def once_and_twice(evidence: Evidence) -> Figure:
    """Return accuracy at few heads with the context given once and twice, by stage."""
    from matplotlib.ticker import PercentFormatter

    ks = sorted({int(k) for k in evidence.tables["top-k-twice"]["k"].dropna()})
    figure = new_figure(9.6, 4.2)
    panels = figure.subplots(1, 2, sharey=True)
    for axes, stage in zip(panels, STAGES, strict=True):
        for run, way, colour, shift in (
            ("top-k", "context once", _ONCE, -0.18),
            ("top-k-twice", "context twice", _TWICE, 0.18),
        ):
            found = [evidence.accuracy(run, evidence.k_setting(k, stage)) for k in ks]
            means = np.array([e.mean for e in found])
            ends = np.array([[e.mean - e.low, e.high - e.mean] for e in found]).T.clip(min=0)
            places, style = np.arange(len(ks)) + shift, {"color": colour, "width": 0.34}
            bars: dict[str, Any] = {"error_kw": {"elinewidth": 1, "capsize": 3}, **style}
            axes.bar(places, means, yerr=ends, label=way, **bars)
            for x, e in zip(places, found, strict=True):
                axes.text(x, e.high + 0.02, f"{100 * e.mean:.1f}", ha="center", fontsize=8)
        axes.set_xticks(range(len(ks)), [f"k = {k}" for k in ks])
        axes.set(title=f"heads silenced in {STAGES[stage]}", ylim=(0, 1.1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(axis="y", alpha=0.3)
    panels[0].set_ylabel("accuracy (mean score / 5)")
    legend: dict[str, Any] = {"loc": "outside lower center", "ncols": 2, "frameon": False}
    title = "whiskers: 95% intervals over needles"
    figure.legend(*panels[0].get_legend_handles_labels(), title=title, **legend)
    return figure


def value_rows(evidence: Evidence, run: str, settings: Sequence[str]) -> list[list[str]]:
    """Return a row of figures for each setting of a run: all, inside the window, beyond it."""
    rows = []
    for name in settings:
        inside, beyond = (estimate(evidence.cells(run, name, half)) for half in (True, False))
        shares = [f"{100 * e.mean:.1f}%" if e.n else "" for e in (inside, beyond)]
        rows.append([name, str(evidence.accuracy(run, name)), *shares])
    return rows


def rows_of_k(
    ks: Callable[[Evidence], Sequence[int]],
    runs: Sequence[str],
    stages: Sequence[str] = tuple(STAGES),
) -> Callable[[Evidence], tuple[list[str], list[list[str]]]]:
    """Return a function that makes the table of some k: one row for each run, stage and k."""

    def rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
        few = sorted({k for k in ks(evidence) if k <= evidence.n_heads})
        names = [evidence.k_setting(k, stage) for stage in stages for k in few]
        lines = [[run, *line] for run in runs for line in value_rows(evidence, run, names)]
        return ["run", *VALUES], lines

    return rows
