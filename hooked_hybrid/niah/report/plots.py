"""Figures of a sweep: retrieval maps, and accuracy by the number of heads.

The figures have no window and are not known to `pyplot`; `save_figure` writes them, a notebook
shows them. matplotlib is imported when the first one is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.runs.statistics import interval_of, select_scored

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#F0496E", "#EBB839", "#0CD79F")
"""The papers' colours, from an accuracy of 0 to 1."""
STAGES = {"generation": "generation only", "both": "prefill and generation"}
_LINE: dict[str, Any] = {"color": "black", "linewidth": 1.2}
_LINES: dict[Any, tuple[str, str, Any]] = {
    "generation": ("#0072B2", "o", "-"),
    "both": ("#D55E00", "s", "--"),
}
_MOST_COLUMNS = 6
_MOST_TICKS = 10


def retrieval_maps(table: pd.DataFrame, thesis_depth: bool = False) -> Figure:
    """Return one figure with a heat map for each setting, all on one colour scale.

    The horizontal axis is the prompt's length in tokens, the vertical one the depth of the needle,
    from the beginning of the haystack at the top to its end: the requested depth, with the real
    depths in brackets. A cell is the mean over needles, and grey if it was not run. Above the solid
    line the needle is beyond the attention window of the last prompt token; the dotted line is
    before the first length with such needles.

    Args:
        table: of `niah`.
        thesis_depth: count depth as in the thesis, from 0% at the end of the haystack; this changes
            the labels, not the maps.

    Raises:
        ValueError: no cell has a score.
    """
    cells = select_scored(table)
    rows = _rows_of_panels(cells)
    n_columns = max(map(len, rows))
    figure = new_figure(max(5.5, 2.2 + 1.9 * n_columns), max(3.6, 1.5 + 1.9 * len(rows)))
    grid = figure.subplots(len(rows), n_columns, squeeze=False)
    image, ragged = None, []
    for i, names in enumerate(rows):
        for j, axes in enumerate(grid[i]):
            if j >= len(names):
                axes.set_visible(False)
                continue
            image = _draw_map(axes, cells, names[j], thesis_depth)
            axes.set_title(names[j], fontsize=9)
            axes.tick_params(labelbottom=i + 1 == len(rows), labelleft=j == 0)
            if i + 1 < len(rows) and all(len(below) <= j for below in rows[i + 1 :]):
                ragged.append(axes)
    figure.supxlabel("prompt length (tokens)", fontsize=10)
    figure.supylabel(_depth_label(thesis_depth), fontsize=10)
    _add_colour_bar(figure, image, list(grid.flat), aspect=max(30, 12 * len(rows)))
    _add_window_legend(figure, cells, n_columns=1 if n_columns < 4 else 2)
    if ragged:  # their labels are in the empty space below
        figure.draw_without_rendering()
        figure.set_layout_engine("none")
        for axes in ragged:
            axes.tick_params(labelbottom=True)
    return figure


def retrieval_map(table: pd.DataFrame, setting: str, thesis_depth: bool = False) -> Figure:
    """Return the heat map of one setting, with its accuracies written in; see `retrieval_maps`.

    Raises:
        ValueError: the setting has no cell with a score.
    """
    cells = select_scored(table)
    if setting not in set(cells["setting"]):
        raise ValueError(
            f"no setting {setting!r}: there are {', '.join(cells['setting'].unique())}"
        )
    figure = new_figure(6.6, 4.8)
    axes = figure.subplots()
    image = _draw_map(axes, cells, setting, thesis_depth, is_single=True)
    axes.set_title(setting)
    axes.set_xlabel("prompt length (tokens)")
    axes.set_ylabel(_depth_label(thesis_depth))
    _add_colour_bar(figure, image, [axes])
    _add_window_legend(figure, cells, n_columns=1)
    return figure


def accuracy_by_k(table: pd.DataFrame, by_window: bool = False) -> Figure:
    """Return accuracy by k, with a line for each stage and bands of 95% intervals.

    The intervals are over needles (`hooked_hybrid.runs.intervals`); with one needle there are none,
    as the legend states. Settings without a k are horizontal dotted lines.

    Args:
        table: of `niah`.
        by_window: separate panels for needles inside the attention window and beyond it.

    Raises:
        ValueError: no cell has a score, or no setting has a k.
    """
    cells = select_scored(table)
    if cells["k"].isna().all():
        raise ValueError("no setting has a k: there is no curve to draw")
    parts = [("", cells)]
    if by_window:
        inside = cells["in_window"].astype(bool)
        named = (("needle inside the window", cells[inside]), ("beyond it", cells[~inside]))
        parts = [(name, part) for name, part in named if not part.empty]
    figure = new_figure(4.6 * len(parts) + 0.6, 4.6)
    grid = figure.subplots(1, len(parts), squeeze=False, sharey=True)[0]
    bands = intervals_said(cells, "bands: 95% intervals")
    for axes, (name, part) in zip(grid, parts, strict=True):
        _draw_curves(axes, part)
        axes.set_title(name)
    grid[0].set_ylabel("accuracy (mean score / 5)")
    handles, labels = grid[0].get_legend_handles_labels()
    legend: dict[str, Any] = {"title": bands, "frameon": False}
    figure.legend(handles, labels, loc="outside lower center", ncols=len(parts), **legend)
    return figure


def _rows_of_panels(cells: pd.DataFrame) -> list[list[str]]:
    """Return the settings in rows of a grid, with a new row for each stage."""
    rows: list[list[str]] = []
    for _, part in cells.groupby("stage", sort=False, dropna=False):
        names = list(part["setting"].unique())
        width = ceil(len(names) / ceil(len(names) / _MOST_COLUMNS))
        rows += [names[i : i + width] for i in range(0, len(names), width)]
    return rows


def _draw_map(
    axes: Axes, cells: pd.DataFrame, setting: str, thesis_depth: bool, is_single: bool = False
) -> Any:
    """Draw one heat map for the lengths and depths of the table; return its image."""
    from matplotlib.colors import LinearSegmentedColormap

    scale = LinearSegmentedColormap.from_list("retrieval", COLORS)
    lengths, depths = (np.sort(cells[name].unique().astype(float)) for name in ("length", "depth"))
    own = cells[cells["setting"] == setting]
    means = _on_grid(own, "accuracy", lengths, depths)
    axes.set_facecolor("#D9D9D9")
    image = axes.imshow(means, cmap=scale, vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    size = 9 if is_single else 7
    x, y = _tick_places(len(lengths)), _tick_places(len(depths))
    shown = [_depth_said(cells[cells["depth"] == depths[i]], thesis_depth) for i in y]
    turned: dict[str, Any] = {"rotation": 90} if not is_single else {}
    axes.set_xticks(x, [f"{lengths[i]:,.0f}" for i in x], fontsize=size, **turned)
    axes.set_yticks(y, shown, fontsize=size)
    # From its own cells, as a context given twice has its last needle elsewhere.
    seen = own if cells["read_twice"].nunique() > 1 else cells
    _draw_window(axes, _on_grid(seen, "in_window", lengths, depths))
    if is_single and means.size <= 400:
        for (i, j), value in np.ndenumerate(means):
            if not np.isnan(value):
                axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7)
    return image


def _on_grid(
    cells: pd.DataFrame, column: str, lengths: np.ndarray, depths: np.ndarray
) -> np.ndarray:
    """Return the mean of a column [depth length], NaN if there is no cell."""
    means = cells.astype({column: float}).pivot_table(
        index="depth", columns="length", values=column
    )
    return means.reindex(index=depths, columns=lengths).to_numpy(dtype=float)


def _draw_window(axes: Axes, in_window: np.ndarray) -> None:
    """Outline the cells with needles beyond the window, and mark the first such length."""
    beyond = in_window < 0.5
    if not beyond.any():
        return
    across = np.argwhere(beyond[:, 1:] != beyond[:, :-1])
    down = np.argwhere(beyond[1:] != beyond[:-1])
    axes.vlines(across[:, 1] + 0.5, across[:, 0] - 0.5, across[:, 0] + 0.5, **_LINE)
    axes.hlines(down[:, 0] + 0.5, down[:, 1] - 0.5, down[:, 1] + 0.5, **_LINE)
    first = int(beyond.any(axis=0).argmax())
    if first > 0:
        axes.axvline(first - 0.5, linestyle=":", **_LINE)


def _add_window_legend(figure: Figure, cells: pd.DataFrame, n_columns: int) -> None:
    from matplotlib.lines import Line2D

    if cells["in_window"].astype(bool).all():
        return
    lines: dict[Any, str] = {
        "-": "above: the needle is beyond the attention window",
        ":": "first length with needles beyond the window",
    }
    figure.legend(
        [Line2D([], [], linestyle=style, **_LINE) for style in lines],
        list(lines.values()),
        loc="outside upper center",
        ncols=n_columns,
        frameon=False,
        fontsize=9,
    )


def intervals_said(cells: pd.DataFrame, what: str) -> str:
    """Return the label of a figure's intervals; for a single needle, that there are none."""
    n = cells["needle_id"].nunique(dropna=False)
    return f"{what} over {n} needles" if n > 1 else "one needle: no intervals"


def _add_colour_bar(figure: Figure, image: Any, axes: Sequence[Axes], aspect: int = 30) -> None:
    bar = figure.colorbar(image, ax=axes, aspect=aspect, pad=0.02)
    bar.set_label("accuracy (mean score / 5)")


def _depth_label(thesis_depth: bool) -> str:
    zero = "end" if thesis_depth else "beginning"
    return f"depth of the needle (%):\nasked, and where it stands\n0% = {zero} of the haystack"


def _depth_said(cells: pd.DataFrame, thesis_depth: bool) -> str:
    """Return the requested depth of a row of a map, and the range of real depths if they differ.

    In percent. A table of an older sweep has no real depths.
    """
    asked, real = cells["depth"].iloc[0], cells.get("real_depth", cells["depth"])
    ends = [float(end) for end in (real.min(), real.max())]
    if thesis_depth:
        asked, ends = 1 - asked, [1 - end for end in reversed(ends)]
    first, last = (f"{100 * end:.0f}" for end in ends)
    if first == last:
        return first if first == f"{100 * asked:.0f}" else f"{100 * asked:.0f} ({first})"
    return f"{100 * asked:.0f} ({first} to {last})"


def _tick_places(n: int) -> list[int]:
    """Return up to ten evenly spaced indices of `n`, including the first and the last."""
    return sorted({round(i) for i in np.linspace(0, n - 1, min(n, _MOST_TICKS))})


def _draw_curves(axes: Axes, cells: pd.DataFrame) -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    for stage, part in cells[cells["k"].notna()].groupby("stage", sort=False):
        groups = [(int(k), rows) for k, rows in part.groupby("k")]
        ks = [k for k, _ in groups]
        low, high = zip(*(interval_of(rows) for _, rows in groups), strict=True)
        colour, marker, line = _LINES.get(stage, ("#555555", "^", "-."))
        means = [rows["accuracy"].mean() for _, rows in groups]
        name = f"heads silenced in {STAGES.get(stage, stage)}"
        axes.plot(ks, means, color=colour, marker=marker, linestyle=line, label=name)
        axes.fill_between(ks, low, high, color=colour, alpha=0.2, linewidth=0)
        axes.vlines(ks, low, high, color=colour, linewidth=1)
    for name, rows in cells[cells["k"].isna()].groupby("setting", sort=False):
        axes.axhline(rows["accuracy"].mean(), color="#555555", linestyle=":", label=str(name))
    axes.set_ylim(-0.02, 1.02)
    axes.yaxis.set_major_formatter(PercentFormatter(1))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_xlabel("k, heads kept in each attention layer")
    axes.grid(alpha=0.3)
