"""Figures of analyses: each function returns a matplotlib figure.

The figures have no window and are not known to `pyplot`: a notebook shows them after `%matplotlib
inline`, `figure.savefig` writes them. Signed maps have a diverging scale with white at 0;
colour-blind readers can distinguish the colours. Values may be tensors on any device, arrays or
lists.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import TYPE_CHECKING, Any

import numpy as np

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
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.outputs.figures import new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def head_grid(
    scores: HeadScores, title: str | None = None, marked: Sequence[tuple[int, int]] = ()
) -> Figure:
    """Return a map of a score of every head, with heads across and attention layers down.

    Args:
        scores: their `name` labels the colours; any below 0 make the scale diverging.
        title: above the map.
        marked: heads, as (layer, head), to draw a frame around.
    """
    values = as_array(scores.values)
    n_layers, n_heads = values.shape
    for layer, head in marked:
        if layer not in scores.layers or not 0 <= head < n_heads:
            raise ValueError(
                f"no head {(layer, head)} to mark: layers {scores.layers} have {n_heads} each"
            )
    figure = new_figure(2.6 + max(2.0, 0.55 * n_heads), 1.2 + max(1.8, 0.42 * n_layers))
    axes = figure.subplots()
    image = draw_map(axes, values, scale_of([values]), written="{:.2f}")
    axes.set_xticks(range(n_heads))
    axes.set_yticks(range(n_layers), list(map(str, scores.layers)))
    axes.set(xlabel="head", ylabel="attention layer", title=title or "")
    for layer, head in marked:
        frame(axes, scores.layers.index(layer), head)
    figure.colorbar(image, ax=axes, label=scores.name, pad=0.02)
    return figure


def pattern_map(
    pattern: Any,
    tokens: Sequence[str] | None = None,
    titles: Sequence[str] = (),
    *,
    query_tokens: Sequence[str] | None = None,
    signed: bool | None = None,
    label: str = "attention (fraction)",
    n_columns: int = 4,
) -> Figure:
    """Return maps of attention, with queries down and keys across, on one colour scale.

    Args:
        pattern: [query key], or [map query key] for several heads, layers or channels.
        tokens: text of each key, and of each query if there are as many.
        titles: of the maps, such as "L2H0".
        query_tokens: text of each query, if they differ from the keys.
        signed: whether the scale is diverging; None: if there are negative values.
        label: of the colours, with the unit.
        n_columns: maps side by side.

    Raises:
        ValueError: the number of tokens or titles does not match.
    """
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
    """
    more: dict[str, Any] = {"query_tokens": query_tokens, "label": label, "n_columns": n_columns}
    return pattern_map(matrix, tokens, titles, signed=True, **more)


def attribution_bars(
    values: Any,
    labels: Sequence[str],
    *,
    most: int = 30,
    by_size: bool = False,
    xlabel: str = "attribution (logits)",
    title: str | None = None,
) -> Figure:
    """Return a bar for each part, labelled with its value, and a line at the sum of all.

    Args:
        values: [part], such as `logit_attrs` at one position.
        labels: of the parts.
        most: the most bars; the smallest parts share the last one.
        by_size: sort the largest first; otherwise keep the order.
        xlabel: of the values, with the unit.
        title: above the bars.
    """
    array = as_array(values)
    if array.shape != (len(labels),):
        raise ValueError(f"{len(labels)} labels for values of shape {list(array.shape)}")
    if most < 1:
        raise ValueError(f"most={most}: give 1 or more")
    order = abs(array).argsort()[::-1]
    kept = order[:most] if len(order) <= most else order[: most - 1]
    rest = order[len(kept) :]
    bars = [(labels[i], float(array[i])) for i in (kept if by_size else sorted(kept))]
    if len(rest):
        bars.append((f"{len(rest)} others", float(array[rest].sum())))
    names, sizes = zip(*bars, strict=True)
    figure = new_figure(6.4, 1.3 + 0.24 * len(bars))
    axes = figure.subplots()
    drawn = axes.barh(range(len(bars)), sizes, color=[UP if x >= 0 else DOWN for x in sizes])
    axes.bar_label(drawn, [f"{x:+.3g}" for x in sizes], padding=3, fontsize=7)
    total = float(array.sum())
    axes.axvline(total, color=TOTAL, linestyle="--", linewidth=1, label=f"sum {total:+.3g}")
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(bars)), names, fontsize=8, parse_math=False)
    axes.set_ylim(len(bars) - 0.4, -0.6)
    axes.margins(x=0.14)
    axes.set(xlabel=xlabel, title=title or "")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    figure.legend(loc="outside lower right", frameon=False, fontsize=8)
    return figure


def residual_curves(
    values: Any,
    labels: Sequence[str],
    names: Sequence[str] = (),
    *,
    ylabel: str = "value",
    title: str | None = None,
) -> Figure:
    """Return curves over depth, one for each entry of the other axes.

    Args:
        values: [depth], or [depth ...]; without names, more than seven curves are drawn thin, with
            their mean on top.
        labels: of the depths.
        names: of the curves, in the order of the other axes flattened.
        ylabel: of the values, with the unit.
        title: above the curves.
    """
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
    axes.set(xlabel="depth", ylabel=ylabel, title=title or "")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        legend = figure.legend(loc="outside right upper", frameon=False, fontsize=8)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def lens_map(
    values: Any,
    labels: Sequence[str],
    tokens: Sequence[str] | None = None,
    texts: Sequence[Sequence[str]] | None = None,
    *,
    label: str | None = None,
    title: str | None = None,
) -> Figure:
    """Return a map of a lens, with positions across and depth upwards to the model's output.

    Args:
        values: [depth pos] of one row. Integers are ranks: the scale is logarithmic, of rank + 1.
        labels: of the depths.
        tokens: text of each position.
        texts: written into the cells `[depth][pos]`, such as the most likely tokens.
        label: of the colours, with the unit.
        title: above the map.

    Raises:
        ValueError: the number of names does not match.
    """
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
    axes.set(xlabel="position", ylabel="depth", title=title or "")
    label = label or ("rank + 1 (1 is the most likely)" if is_rank else "")
    figure.colorbar(image, ax=axes, label=label, pad=0.02)
    return figure
