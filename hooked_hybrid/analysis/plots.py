"""Figures of analyses: each function returns a matplotlib figure.

The figures have no window and are not known to `pyplot`: a notebook shows them after `%matplotlib
inline`, `figure.savefig` writes them. Signed maps have a diverging scale with white at 0;
colour-blind readers can distinguish the colours. Values may be tensors on any device, arrays or
lists; or the result of an analysis, whole, wherever it has the axes that a figure shows: scores of
heads or channels, patching (`PatchGrid`), `Attribution`, a `Lens`. Its labels are used then, and
rows of a batch are averaged over.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.analysis.attribution import Attribution
from hooked_hybrid.analysis.drawing import (
    DOWN,
    LINES,
    MARKERS,
    TOTAL,
    UP,
    as_array,
    draw_map,
    frame,
    is_integer,
    name_positions,
    scale_of,
    side_of,
)
from hooked_hybrid.analysis.shown import (
    ATTRIBUTED,
    HEADS,
    PLACES,
    RESULTS,
    Result,
    name_of,
    parts_of,
    patterns_of,
    shown,
)
from hooked_hybrid.outputs.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ATTENTION = "attention (fraction)"


def head_grid(
    scores: Result,
    title: str | None = None,
    marked: Sequence[tuple[int | str, int]] = (),
) -> Figure:
    """Return a map of a score of every head, with heads across and attention layers down.

    Args:
        scores: of heads, or of channel groups; or patching or attribution by head. Their `name`
            labels the colours; any below 0 make the scale diverging.
        title: above the map.
        marked: heads, as (layer, head), to draw a frame around; of patching or attribution at named
            points, as (label of the row, head).

    Raises:
        ValueError: a result that is not by head, or a head to mark that is not there.

    Examples:
        >>> figure = analysis.plots.head_grid(analysis.induction_scores(model, 20, batch=2))
        >>> figure.axes[0].get_xlabel()
        'head'
    """
    found = shown(scores)
    found.require("head_grid", HEADS)
    values, rows = as_array(found.values), found.labels[0]
    n_layers, n_heads = values.shape
    for layer, head in marked:
        if layer not in rows or not 0 <= head < n_heads:
            raise ValueError(
                f"no head {(layer, head)} to mark: {found.row_axis}s {rows} have {n_heads} each"
            )
    figure = new_figure(2.6 + max(2.0, 0.55 * n_heads), 1.2 + max(1.8, 0.42 * n_layers))
    axes = figure.subplots()
    is_small = not (abs(values) >= 0.1).any()  # effects of patching have no scale of their own
    written = "{:.1g}" if is_small else "{:.2f}"
    image = draw_map(axes, values, scale_of([values]), written=written)
    axes.set_xticks(range(n_heads))
    axes.set_yticks(range(n_layers), found.rows)
    across, is_layer = found.axes[1].replace("kv_head", "key-value head"), found.axes[0] == "layer"
    kind = {"head": "attention layer", "group": "recurrent layer"}.get(found.axes[1], "layer")
    axes.set(xlabel=across, ylabel=kind if is_layer else found.row_axis, title=title or "")
    for layer, head in marked:
        frame(axes, rows.index(layer), head)
    figure.colorbar(image, ax=axes, label=found.name, pad=0.02)
    return figure


def pattern_map(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    titles: Sequence[str] = (),
    *,
    query_tokens: Sequence[str] | None = None,
    signed: bool | None = None,
    label: str = ATTENTION,
    n_columns: int = 4,
) -> Figure:
    """Return maps of attention, with queries down and keys across, on one colour scale.

    Args:
        pattern: [query key], or [map query key] for several heads, layers or channels; or an
            attribution to scores or patterns with `reduce=None`, one map a head.
        tokens: text of each key, and of each query if there are as many.
        titles: of the maps, such as "L2H0".
        query_tokens: text of each query, if they differ from the keys.
        signed: whether the scale is diverging; None: if there are negative values.
        label: of the colours, with the unit.
        n_columns: maps side by side.

    Raises:
        ValueError: the number of tokens or titles does not match.

    Examples:
        >>> len(analysis.plots.pattern_map(cache["pattern", 2][0, :2]).axes)  # two maps, a scale
        3
    """
    if isinstance(pattern, RESULTS):
        if not isinstance(pattern, Attribution):
            raise ValueError(
                f"a {type(pattern).__name__} has no queries and keys: give an Attribution"
            )
        pattern, names = patterns_of(pattern)
        titles = titles or names
        label = ATTRIBUTED if label == ATTENTION else label
    maps = as_array(pattern)
    if maps.ndim not in (2, 3):
        raise ValueError(f"a pattern is [query key] or [map query key], not {list(maps.shape)}")
    maps = maps[None] if maps.ndim == 2 else maps
    n, n_queries, n_keys = maps.shape
    if query_tokens is None and n_queries == n_keys:
        query_tokens = tokens
    for name, given, wanted in (
        ("titles", titles or None, n),
        ("tokens", tokens, n_keys),
        ("query_tokens", query_tokens, n_queries),
    ):
        if given is not None and len(given) != wanted:
            raise ValueError(f"{len(given)} {name} for {wanted}: give one each")
    width = min(n, n_columns)
    side = side_of(max(n_queries, n_keys), alone=n == 1)
    height = side * max(0.35, n_queries / max(n_queries, n_keys))
    figure = new_figure(1.6 + side * width, 0.9 + height * ceil(n / width))
    grid = figure.subplots(ceil(n / width), width, squeeze=False)
    scale = scale_of([maps], signed)
    for i, axes in enumerate(grid.flat):
        if i >= n:
            axes.set_visible(False)
            continue
        image = draw_map(axes, maps[i], scale, aspect="auto")
        axes.set_title(titles[i] if titles else "", fontsize=9)
        name_positions(axes, "x", n_keys, tokens if i + width >= n else (), side)
        name_positions(axes, "y", n_queries, query_tokens if i % width == 0 else (), height)
    figure.supxlabel("key", fontsize=10)
    figure.supylabel("query", fontsize=10)
    figure.colorbar(image, ax=list(grid.flat), label=label, pad=0.02, aspect=30)
    return figure


def effective_attention_map(
    matrix: Any,
    tokens: Sequence[str] | None = None,
    titles: Sequence[str] = (),
    *,
    query_tokens: Sequence[str] | None = None,
    label: str = "effective attention (signed weight)",
    n_columns: int = 4,
) -> Figure:
    """Return maps of a recurrence's effective attention, possibly negative; see `pattern_map`.

    Args:
        matrix: [query key], or [map query key] for several channels, gate blocks or layers.
        tokens, titles, query_tokens, label, n_columns: as in `pattern_map`.

    Examples:
        >>> matrix = analysis.effective_attention(cache, 0, which=[0])[0]
        >>> figure = analysis.plots.effective_attention_map(matrix)
        >>> len(figure.axes)  # the map and the scale
        2
    """
    more: dict[str, Any] = {"query_tokens": query_tokens, "label": label, "n_columns": n_columns}
    return pattern_map(matrix, tokens, titles, signed=True, **more)


def attribution_bars(
    values: Any,
    labels: Sequence[str] | None = None,
    *,
    most: int = 30,
    by_size: bool = False,
    xlabel: str | None = None,
    title: str | None = None,
) -> Figure:
    """Return a bar for each part, labelled with its value, and a line at the sum of all.

    Effects of patching and scores do not add up: they have no such line, and the smallest of many
    are left out.

    Args:
        values: [part], such as `logit_attrs` at one position; or a result, with all its values.
        labels: of the parts; a result has its own.
        most: the most bars; the smallest parts share the last one.
        by_size: sort the largest first; otherwise keep the order.
        xlabel: of the values, with the unit; None is that of a result, else "attribution (logits)".
        title: above the bars.

    Raises:
        ValueError: the number of labels does not match, or labels are missing.

    Examples:
        >>> parts, labels = cache.decompose_resid(pos_slice=-1, return_labels=True)
        >>> figure = analysis.plots.attribution_bars(parts[:, 0].norm(dim=-1), labels)
        >>> len(figure.axes[0].patches)
        13
    """
    adds_up = True
    if isinstance(values, RESULTS):
        xlabel, adds_up = xlabel or name_of(values), isinstance(values, Attribution)
        values, own = parts_of(values)
        labels = labels or own
    labels, xlabel = _given(labels, "attribution_bars"), xlabel or "attribution (logits)"
    array = as_array(values)
    if array.shape != (len(labels),):
        raise ValueError(f"{len(labels)} labels for values of shape {list(array.shape)}")
    if most < 1:
        raise ValueError(f"most={most}: give 1 or more")
    order = abs(array).argsort()[::-1]
    kept = order[:most] if len(order) <= most or not adds_up else order[: most - 1]
    rest = order[len(kept) :]
    bars = [(labels[i], float(array[i])) for i in (kept if by_size else sorted(kept))]
    if len(rest) and adds_up:
        bars.append((f"{len(rest)} others", float(array[rest].sum())))
    names, sizes = zip(*bars, strict=True)
    figure = new_figure(6.4, 1.3 + 0.24 * len(bars))
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), sizes, color=[UP if x >= 0 else DOWN for x in sizes])
    axes.bar_label(drawn, [f"{x:+.3g}" for x in sizes], padding=3, fontsize=7)
    if adds_up:
        total = float(array.sum())
        axes.axvline(total, color=TOTAL, linestyle="--", linewidth=1, label=f"sum {total:+.3g}")
    elif len(rest):
        axes.plot([], [], " ", label=f"without the {len(rest)} smallest")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.set(xlabel=xlabel, title=title or "")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower right", frameon=False, fontsize=8)
    return figure


def residual_curves(
    values: Any,
    labels: Sequence[str] | None = None,
    names: Sequence[str] = (),
    *,
    ylabel: str | None = None,
    title: str | None = None,
) -> Figure:
    """Return curves over depth, one for each entry of the other axes.

    Args:
        values: [depth], or [depth ...]; or a result by layer, depth or hook point. Without names,
            more than seven curves are drawn thin, with their mean on top.
        labels: of the depths; a result has its own.
        names: of the curves, in the order of the other axes flattened.
        ylabel: of the values, with the unit; None is that of a result, else "value".
        title: above the curves.

    Raises:
        ValueError: the number of labels or names does not match, or labels are missing.

    Examples:
        >>> len(analysis.plots.residual_curves(analysis.lens_ranks(model, cache, answer)).axes)
        1
    """
    xlabel = "depth"
    if isinstance(values, RESULTS):
        found = shown(values)
        values, labels, xlabel = found.values, labels or found.rows, found.row_axis
        ylabel = ylabel or found.name
        if not names and 1 < values[0].numel() <= len(LINES):
            names = found.curves()
    labels, ylabel = _given(labels, "residual_curves"), ylabel or "value"
    array = as_array(values)
    if is_integer(values):  # ranks: -1 where a row of a generation had ended
        array = np.where(array < 0, np.nan, array)
    lines = array.reshape(len(array), -1).T
    if len(labels) != len(array) or len(names) not in (0, len(lines)):
        raise ValueError(
            f"{len(labels)} labels and {len(names)} names for {len(array)} depths and "
            f"{len(lines)} curves"
        )
    figure = new_figure(max(5.5, 2.0 + 0.28 * len(labels)), 3.8)
    axes = figure.subplots()
    x = range(len(labels))
    if not names and len(lines) > len(LINES):
        axes.plot(x, lines.T, color=LINES[0], alpha=0.25, linewidth=0.8)
        axes.plot(
            x, np.nanmean(lines, axis=0), color=LINES[1], linewidth=2, label=f"mean of {len(lines)}"
        )
    else:
        for i, line in enumerate(lines):
            style = ("-", "--", ":")[i // len(LINES) % 3]
            marker, color = MARKERS[i % len(MARKERS)], LINES[i % len(LINES)]
            name = names[i] if names else None
            axes.plot(x, line, style, color=color, marker=marker, markersize=4, label=name)
    axes.set_xticks(x, labels, rotation=90 if len(labels) > 6 else 0, fontsize=8)
    axes.set(xlabel=xlabel, ylabel=ylabel, title=title or "")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def lens_map(
    values: Any,
    labels: Sequence[str] | None = None,
    tokens: Sequence[str] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    *,
    label: str | None = None,
    title: str | None = None,
) -> Figure:
    """Return a map of a lens, with positions across and depth upwards to the model's output.

    Args:
        values: [depth pos] of one row; or a result by position. Integers are ranks: the scale is
            logarithmic, of rank + 1.
        labels: of the depths; a result has its own.
        tokens: text of each position.
        texts: written into the cells `[depth][pos]`, such as the most likely tokens.
        label: of the colours, with the unit.
        title: above the map.

    Raises:
        ValueError: the number of names does not match, labels are missing, or a result has other
            axes.

    Examples:
        >>> len(analysis.plots.lens_map(analysis.lens_ranks(model, cache, answer)).axes)
        2
    """
    ylabel = "depth"
    if isinstance(values, RESULTS):
        found = shown(values)
        found.require("lens_map", PLACES)
        values, labels, ylabel = found.values, labels or found.rows, found.row_axis
        label = label or found.name or None
    labels = _given(labels, "lens_map")
    array, is_rank = as_array(values), is_integer(values)
    if array.ndim != 2 or len(labels) != len(array):
        raise ValueError(f"{len(labels)} labels for a lens of shape {list(array.shape)}")
    for name, given in (("tokens", tokens), *(("texts of a depth", row) for row in texts or ())):
        if given is not None and len(given) != array.shape[1]:
            raise ValueError(f"{len(given)} {name} for {array.shape[1]} positions: give one each")
    if texts is not None and len(texts) != len(array):
        raise ValueError(f"texts of {len(texts)} depths for {len(array)}: give one each")
    n_pos, cell = array.shape[1], 0.62 if texts is not None else 0.3
    width, height = min(14.0, max(3.0, cell * n_pos)), min(10.0, max(2.6, 0.28 * len(array)))
    figure = new_figure(width + 2.2, height + 1.4)
    axes = figure.subplots()
    scale = scale_of([array + is_rank], log=is_rank)
    image = draw_map(axes, array + is_rank, scale, aspect="auto", texts=texts)
    axes.invert_yaxis()
    name_positions(axes, "x", n_pos, tokens, width)
    axes.set_yticks(range(len(labels)), labels, fontsize=8)
    axes.set(xlabel="position", ylabel=ylabel, title=title or "")
    label = label or ("rank + 1 (1 is the most likely)" if is_rank else "")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    return figure


def _given(labels: Sequence[str] | None, plot: str) -> Sequence[str]:
    """Return labels, which plain values do not bring.

    Raises:
        ValueError: there are none.
    """
    if labels is None:
        raise ValueError(f"{plot} of plain values needs their labels: give them, or a whole result")
    return labels
