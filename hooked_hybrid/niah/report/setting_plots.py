"""Figures of settings other than numbers of heads: a line for each, and the weight matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.niah.report.plots import COLORS, intervals_said
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.runs.statistics import interval_of, select_scored

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSIDE, BEYOND, LOSS = "#0072B2", "#D55E00", "#444444"
WAYS = ("#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#999999")
MARKERS = "osD^vx"


def accuracy_by_setting(table: pd.DataFrame, losses: pd.DataFrame | None = None) -> Figure:
    """Return a line for each setting: its accuracy, and its effect on the loss of text.

    On the left the mean accuracy with its 95% interval over needles (none for a single needle),
    separately for needles within the attention window of the last prompt token and beyond it. On
    the right, with `losses`, the difference of the text's loss from that of the first setting, in
    nats a token, with its interval.

    Args:
        table: of `niah`.
        losses: of `hooked_hybrid.niah.language.text_loss`.

    Raises:
        ValueError: no cell has a score.
    """
    cells = select_scored(table)
    names = list(cells["setting"].unique())
    n_panels = 1 if losses is None else 2
    figure = new_figure(4.5 + 3.5 * n_panels, 1.6 + 0.2 * len(names))
    panels = figure.subplots(1, n_panels, sharey=True, squeeze=False)[0]
    _draw_accuracies(panels[0], cells, names)
    if losses is not None:
        of = losses.set_index("setting").loc[names]
        ends = np.abs(np.stack([of["more"] - of["more_low"], of["more_high"] - of["more"]]))
        panels[1].errorbar(of["more"], range(len(names)), xerr=ends, fmt="d", color=LOSS, ms=4)
        panels[1].axvline(0, color="black", linewidth=0.8)
        panels[1].set_xlabel(
            f"text loss above {names[0]!r}\n(nats a token; bars: 95% intervals over texts)"
        )
        panels[1].grid(alpha=0.3)
        if of["more"].max() > 1:
            panels[1].set_xscale("symlog", linthresh=0.1)
    panels[0].set_yticks(range(len(names)), names, fontsize=8)
    panels[0].invert_yaxis()
    return figure


def _draw_accuracies(axes: Axes, cells: pd.DataFrame, names: list[str]) -> None:
    is_inside = cells["in_window"].astype(bool)
    halves: list[tuple[str, Any, str, str]] = [("inside the window", is_inside, "o", INSIDE)]
    if not is_inside.all():
        halves.append(("beyond it", ~is_inside, "s", BEYOND))
    for shift, (label, mask, marker, color) in zip((-0.12, 0.12), halves, strict=False):
        for i, name in enumerate(names):
            rows = cells[mask & (cells["setting"] == name)]
            if rows.empty:
                continue
            mean, (low, high) = rows["accuracy"].mean(), interval_of(rows)
            ends = None if low != low else [[max(mean - low, 0)], [max(high - mean, 0)]]
            axes.errorbar(
                [mean],
                [i + shift],
                xerr=ends,
                fmt=marker,
                color=color,
                ms=4,
                label=label if i == 0 else None,
            )
    bars = intervals_said(cells, "bars: 95% intervals")
    axes.set(xlabel=f"accuracy (mean score / 5)\n({bars})", xlim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    if len(halves) > 1:
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1))


def weight_matrix_picture(table: pd.DataFrame) -> Figure:
    """Return accuracies by manipulation in prefill (down) and in generation (across).

    One panel for needles inside the attention window of the last prompt token, one beyond it.

    Args:
        table: of a sweep of `experiments.weight_matrix`.

    Raises:
        ValueError: no cell has a score.
    """
    from matplotlib.colors import LinearSegmentedColormap

    cells = select_scored(table)
    is_inside = cells["in_window"].astype(bool)
    panels = [("needle inside the window", is_inside)]
    if not is_inside.all():
        panels.append(("beyond it", ~is_inside))
    modes = [name.split("-") for name in cells["setting"].unique()]
    down, across = (list(dict.fromkeys(pair)) for pair in zip(*modes, strict=True))
    colors = LinearSegmentedColormap.from_list("accuracy", COLORS)
    is_wide = len(across) > 5
    figure = new_figure(1.5 + max(3.6, 0.62 * len(across)) * len(panels), 5.0 if is_wide else 4.2)
    image = None
    for axes, (title, mask) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        means = cells[mask].groupby("setting")["accuracy"].mean()
        values = np.array([[means.get(f"{p}-{g}", np.nan) for g in across] for p in down])
        image = axes.imshow(values, vmin=0, vmax=1, cmap=colors)
        for (i, j), value in np.ndenumerate(values):
            axes.text(j, i, f"{100 * value:.1f}", ha="center", va="center", fontsize=9)
        turned: Any = {"rotation": 45, "ha": "right"} if is_wide else {}
        axes.set_xticks(range(len(across)), across, **turned)
        axes.set_yticks(range(len(down)), down)
        axes.set(title=title, xlabel="in generation", ylabel="in prefill")
    assert image is not None  # there is a panel
    shrink = 0.6 if is_wide else 1.0
    figure.colorbar(image, ax=figure.axes, label="accuracy (mean score / 5)", shrink=shrink)
    return figure


def accuracy_by_heads_kept(table: pd.DataFrame, sizes: Mapping[str, tuple[str, int]]) -> Figure:
    """Return accuracy by the total number of heads kept, with a line for each way to choose them.

    Several settings of one way and number (random sets) are shown by their mean, with the range of
    their accuracies as a band. Settings without a number are horizontal dotted lines. There is a
    panel for needles inside the attention window of the last prompt token, and one for others.

    Args:
        table: of `niah`.
        sizes: the way to choose and the number of heads, by the name of the setting.

    Raises:
        ValueError: no cell has a score.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    cells = select_scored(table)
    is_inside = cells["in_window"].astype(bool)
    halves = (("needle inside the window", is_inside), ("needle beyond the window", ~is_inside))
    panels = [(title, mask) for title, mask in halves if mask.any()]
    figure = new_figure(1.5 + 4.2 * len(panels), 4.6)
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axes, (title, mask) in zip(grid, panels, strict=True):
        means = cells[mask].groupby("setting")["accuracy"].mean()
        _draw_ways(axes, means.to_dict(), sizes)
        axes.set(title=title, xlabel="heads kept, in all attention layers", ylim=(-0.02, 1.02))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.grid(alpha=0.3)
    grid[0].set_ylabel("accuracy (mean score / 5)")
    labels = grid[0].get_legend_handles_labels()
    legend: dict[str, Any] = {"ncols": 3, "frameon": False, "fontsize": 8}
    if any(axes.collections for axes in grid):
        legend["title"] = "band: range of several sets; no intervals"
    figure.legend(*labels, loc="outside lower center", **legend)
    return figure


def _draw_ways(
    axes: Axes, means: Mapping[str, float], sizes: Mapping[str, tuple[str, int]]
) -> None:
    ways: dict[str, dict[int, list[float]]] = {}
    for name, (way, n) in sizes.items():
        if name in means:
            ways.setdefault(way, {}).setdefault(n, []).append(means[name])
    for i, (way, by_n) in enumerate(ways.items()):
        ns = sorted(by_n)
        y = [np.mean(by_n[n]) for n in ns]
        style: Any = {"color": WAYS[i % len(WAYS)], "marker": MARKERS[i % len(MARKERS)], "ms": 4}
        axes.plot(ns, y, linestyle="--" if i % 2 else "-", label=way, **style)
        if any(len(values) > 1 for values in by_n.values()):
            low, high = [min(by_n[n]) for n in ns], [max(by_n[n]) for n in ns]
            axes.fill_between(ns, low, high, color=style["color"], alpha=0.15, linewidth=0)
            axes.vlines(ns, low, high, color=style["color"], linewidth=1)  # one n: no width
    for i, (name, mean) in enumerate((n, m) for n, m in means.items() if n not in sizes):
        axes.axhline(mean, color=LOSS, linestyle=":" if i else "-.", linewidth=1, label=name)
