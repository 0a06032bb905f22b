"""A figure of a model's compute and memory by length: Figure 2 of Zani et al. (2025), and more.

matplotlib is imported when the figure is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS
from hooked_hybrid.outputs.figures import new_figure

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LINES: dict[str, tuple[str, Any]] = {
    "MLP": ("#555555", "-"),
    "experts": ("#009E73", "-"),
    "recurrent block": ("#D55E00", "-"),
    "Mamba block": ("#D55E00", "-"),
    "attention": ("#0072B2", "-"),
    "norms": ("#CC79A7", "--"),
    "read-out": ("#E69F00", "--"),
}
"""Color and style of each kind of layer; other kinds are too cheap to draw."""


OTHER = "#56B4E9", "-"
"""Of mixers and MLPs that have no line of their own."""
PAIRS: dict[str, tuple[str, Any]] = {
    "products": ("attention, pairs inside the mask", "-"),
    "executed_products": ("attention, pairs computed here, in blocks of 64", "--"),
    "dense_products": ("attention, all pairs", ":"),
}
"""Columns of the table, with their labels and line styles."""
STYLES = ("-", "--", ":")


def compute_figure(
    flops: pd.DataFrame, memory: pd.DataFrame, windows: Sequence[int] = (), title: str = ""
) -> Figure:
    """Return four panels over the length of the prompt.

    Operations of its prefill by kind of layer; matrix products of attention by which pairs of
    tokens are computed, next to those of the recurrent blocks; operations of one token after the
    prompt; bytes of the state after it. The read-out is that of the table's number of logits.

    Args:
        flops: of `flops_table`.
        memory: of `memory_table`; each dtype has its own line style.
        windows: lengths to mark, those of attention's windows.
        title: of the figure.

    Raises:
        ValueError: a table without lines.

    Source: Zani et al. 2025, Figure 2, is the first panel; the others are ours.
    """
    if flops.empty or memory.empty:
        raise ValueError("the table is empty: give one length or more")
    figure = new_figure(11.0, 8.0)
    figure.suptitle(title)
    (prefill, pairs), (step, state) = figure.subplots(2, 2)
    of_prompt, of_token = (flops[flops["stage"] == name] for name in ("prefill", "step"))
    _draw_kinds(prefill, of_prompt, "prefill of the prompt")
    _draw_pairs(pairs, of_prompt)
    _draw_kinds(step, of_token, "one token generated after the prompt, lines as above")
    _draw_state(state, memory)
    for axes in (prefill, pairs, step, state):
        for window in sorted(set(windows)):
            name = f"window of {window:,} keys" if axes is pairs else None
            axes.axvline(window, label=name, color="black", linewidth=1, linestyle=(0, (1, 3)))
        axes.set_xlabel("length of the prompt (tokens)")
        axes.grid(alpha=0.3)
        if axes is not step:
            axes.legend(fontsize=8, framealpha=0.9, edgecolor="none", loc="upper left")
    return figure


def _draw_kinds(axes: Axes, table: pd.DataFrame, title: str) -> None:
    for kind, part in table.groupby("kind", sort=False):
        if kind in LINES or kind in {part.row for part in (*MIXERS.values(), *MLPS.values())}:
            colour, style = LINES.get(str(kind), OTHER)
            n = part["layers"].iloc[0]
            name = str(kind) if kind == "read-out" else f"{kind} \u00d7 {n}"
            axes.plot(part["length"], part["total"], color=colour, linestyle=style, label=name)
    _in_operations(axes, title)


def _draw_pairs(axes: Axes, table: pd.DataFrame) -> None:
    attention = table[table["kind"] == "attention"]
    for column, (name, style) in PAIRS.items() if len(attention) else ():
        axes.plot(
            attention["length"],
            attention[column],
            color=LINES["attention"][0],
            linestyle=style,
            label=name,
        )
    recurrent = [mixer.row for mixer in MIXERS.values() if not mixer.grows]
    for kind, part in table[table["kind"].isin(recurrent)].groupby("kind"):
        colour, _ = LINES.get(str(kind), OTHER)
        axes.plot(part["length"], part["products"], color=colour, label=f"{kind}s")
    _in_operations(axes, "matrix products of attention and recurrence in prefill")


def _in_operations(axes: Axes, title: str) -> None:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    axes.set_title(title, fontsize=10)
    axes.set_ylabel("floating-point operations")
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.set_ylim(bottom=0)
    axes.set_xlim(left=0)


def _draw_state(axes: Axes, memory: pd.DataFrame) -> None:
    from matplotlib.ticker import EngFormatter, StrMethodFormatter

    parts = {
        "of_attention": ("keys and values", LINES["attention"][0]),
        "of_recurrence": ("recurrences and convolutions", LINES["recurrent block"][0]),
    }
    for style, (dtype, table) in zip(STYLES, memory.groupby("dtype", sort=False), strict=False):
        for column, (name, colour) in parts.items():
            if table[column].any():
                label = f"{name}, {dtype}"
                axes.plot(table["length"], table[column], style, color=colour, label=label)
    axes.set_title("state after the prompt", fontsize=10)
    axes.set_ylabel("bytes")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(EngFormatter(unit="B"))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
