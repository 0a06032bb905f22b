"""The figure of an evaluation: scores by task and form, with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hooked_hybrid.evaluation.forms import Form, title
from hooked_hybrid.evaluation.lines import Line
from hooked_hybrid.outputs.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLOURS = {"base": "#222222", "sparse": "#1f77b4", "ablated": "#d62728", "random": "#999999"}
OTHER_COLOURS = ("#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#bcbd22", "#17becf")


def score_picture(rows: Sequence[Line], forms: Sequence[Form]) -> Figure:
    """Return a dot with its 95% interval for each line and form; a tick marks a random choice."""
    figure = new_figure(7.5, 1.2 + len(rows) * (0.16 + 0.06 * len(forms)))
    axes = figure.subplots()
    others = iter(OTHER_COLOURS * 10)
    for j, form in enumerate(forms):
        colour = COLOURS.get(form.name) or next(others)
        offset = 0.6 * ((j + 0.5) / len(forms) - 0.5)
        points = [
            (i + offset, row.scores[form.name])
            for i, row in enumerate(rows)
            if form.name in row.scores
        ]
        ends = [e.interval or (e.value, e.value) for _, e in points]
        below = [max(e.value - low, 0.0) for (_, e), (low, _) in zip(points, ends, strict=True)]
        above = [max(high - e.value, 0.0) for (_, e), (_, high) in zip(points, ends, strict=True)]
        axes.errorbar(
            *([e.value for _, e in points], [y for y, _ in points]),
            xerr=[below, above],
            fmt="o",
            markersize=4,
            elinewidth=1,
            color=colour,
            label=title(form),
        )
    marks = [(row.chance, i) for i, row in enumerate(rows) if row.chance is not None]
    axes.vlines(
        *([x for x, _ in marks], [i - 0.42 for _, i in marks], [i + 0.42 for _, i in marks]),
        color="#777777",
        linestyles="dotted",
        label="choosing at random" if marks else "_none",
    )
    names = [f"{r.name.split(',')[0]}, mean" if r.is_mean else r.name for r in rows]
    names = [f"{name} ({row.metric})" for name, row in zip(names, rows, strict=True)]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlabel("score (accuracies in points of 100), 95% interval")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    return figure
