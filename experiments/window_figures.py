"""The figures of `experiments.outside_window`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from experiments.window_relay import BINS, GROUPS
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.runs.intervals import SHARE, mean_interval
from hooked_hybrid.runs.statistics import interval_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
PLACES = (
    "needle",
    "3 after it",
    "up to the window",
    "in the window",
    "question",
    "answer so far",
    "last token",
)


def settings(windows: pd.DataFrame, boundaries: pd.DataFrame) -> Figure:
    """Return accuracy by window, and by restarted layers, with 95% intervals over needles."""
    figure = new_figure(11.0, 4.6)
    left, right = figure.subplots(1, 2)
    for beyond, colour, label in ((False, BLUE, "inside"), (True, ORANGE, "beyond it")):
        own = windows[windows["beyond"] == beyond]
        label = f"needle {label}" + ("" if beyond else " the window")
        _points(left, own, own["setting"], colour, label, 0.13 if beyond else -0.13)
    left.set_title("A window of 256 keys, on or off")
    parts = boundaries["setting"].str.rsplit(", ", n=1, expand=True)
    labels = {"before": (GREY, "boundary before the needle (control)", -0.13)}
    labels |= {"between": (GREEN, "boundary between needle and question", 0.13)}
    for where, style in labels.items():
        own = boundaries[(parts[1] == where) | parts[1].isna()]
        _points(right, own, parts.loc[own.index, 0], *style)
    right.set_title("No window; layers that begin anew")
    return figure


def _points(
    axes: Axes, cells: pd.DataFrame, names: pd.Series[str], colour: str, label: str, shift: float
) -> None:
    """Draw a column of accuracies with their intervals, the first name at the top."""
    groups = list(cells.groupby(names, sort=False))
    for i, (_, own) in enumerate(groups):
        mean = own["accuracy"].mean()
        low, high = interval_of(own)
        axes.plot([low, high], [i + shift] * 2, color=colour, linewidth=2)
        axes.plot(mean, i + shift, "o", color=colour, label=None if i else label)
    axes.set_yticks(range(len(groups)), [str(name) for name, _ in groups])
    axes.set_ylim(len(groups) - 0.5, -0.5)
    axes.set_xlim(-0.04, 1.04)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.set_xlabel("accuracy (mean score / 5)")
    axes.grid(alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.14), frameon=False, fontsize=9)


def trace(patched: pd.DataFrame, differences: pd.DataFrame) -> Figure:
    """Return the effects of patching with the window on and off, and the streams' differences."""
    figure = new_figure(13.0, 4.4)
    axes = figure.subplots(1, 3, width_ratios=(1, 1, 1.3))
    top = patched["logits"].abs().groupby([patched["window"], patched["place"]]).mean().max()
    limit = max(float(patched.loc[patched["window"] == "off", "total"].mean()), float(top))
    for window, each in zip(("off", "on"), axes, strict=False):
        own = patched[patched["window"] == window]
        grid = own.pivot_table(index="place", columns="depth", values="logits").loc[list(PLACES)]
        total = own.groupby("pair")["total"].first().mean()
        _heat(each, grid.to_numpy(), limit, "{:.1f}")
        _label_depths(each, grid.shape[1])
        each.set_yticks(range(len(PLACES)), PLACES)
        each.set_title(f"window {window}: {abs(total):.1f} logits in all", fontsize=10)
    last = axes[2]
    own = differences[differences["window"] == "on"]
    labels = _depths(own["depth"].nunique())
    for depth, label in enumerate(labels):
        if depth:  # before layer 0 only the needle's own tokens differ
            part = own[own["depth"] == depth]
            smooth = part["difference"].rolling(15, center=True, min_periods=1).mean()
            last.plot(part["pos"], smooth, color=_shade(depth / (len(labels) - 1)), label=label)
    last.set_yscale("log")
    last.set_xlabel("position (tokens); the needle stands at 4 to 25")
    last.set_ylabel("distance of the streams / length")
    last.set_title("window on: the needle's trace, a mean of 15 tokens", fontsize=10)
    last.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    last.grid(alpha=0.3)
    return figure


def relay(scores: pd.DataFrame) -> Figure:
    """Return the accuracy by layers cut and distance of the fact: seeds as points, mean as a line.

    Each seed's point has its 95% interval over sequences.
    """
    cuts = {"control": (GREY, "boundary before the fact (control)", -0.25)}
    cuts |= {"boundary": (GREEN, "boundary between fact and question", 0.0)}
    cuts |= {"edges": (BLUE, "edges from the fact's own tokens alone", 0.25)}
    names = list(scores.loc[scores["cut"] == "boundary", "layers"].unique())
    figure = new_figure(12.5, 0.5 * len(names) + 2)
    panels = figure.subplots(1, len(BINS), sharey=True)
    for axes, far in zip(panels, BINS, strict=True):
        here = scores[scores["bin"] == far]
        whole = here.loc[here["cut"] == "nothing", "right"].mean()
        axes.axvline(whole, color="black", linestyle=":", label="nothing cut")
        for cut, (colour, label, shift) in cuts.items():
            for i, name in enumerate(names):
                own = here[(here["cut"] == cut) & (here["layers"] == name)]
                _seeds(axes, own, i + shift, colour, label if i == 0 else None)
        axes.axvline(1 / 16, color="black", linewidth=0.8, alpha=0.4)
        axes.set_title(f"fact {'inside the window' if far == 'inside' else far + ' back'}")
        axes.set_yticks(range(len(names)), names)
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.set_xlim(-0.03, 1.03)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
        axes.set_xlabel("right answers (thin line: at random)")
        axes.grid(alpha=0.3)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    return figure


def _seeds(axes: Axes, own: pd.DataFrame, y: float, colour: str, label: str | None) -> None:
    for i, (_, part) in enumerate(own.groupby("seed")):
        mean = part["right"].mean()
        low, high = mean_interval(part["right"], range(len(part)), SHARE)
        axes.plot([low, high], [y, y], color=colour, alpha=0.35, linewidth=2)
        marker = "os^Dv"[i % 5]
        axes.plot(mean, y, marker, markersize=4, color=colour, label=None if i else label)


def relay_trace(traces: pd.DataFrame) -> Figure:
    """Return the share of the answer that patching restores by group and depth, a row a seed."""
    seeds = sorted(traces["seed"].unique())
    figure = new_figure(12.5, 2.4 * len(seeds) + 1.2)
    panels = figure.subplots(len(seeds), len(BINS), sharey=True, sharex=True, squeeze=False)
    for i, seed in enumerate(seeds):
        for axes, far in zip(panels[i], BINS, strict=True):
            own = traces[(traces["bin"] == far) & (traces["seed"] == seed)]
            gain = own.pivot_table(index="group", columns="depth", values="gain")
            grid = (gain / own["total"].mean()).reindex(list(GROUPS))
            _heat(axes, grid.to_numpy(), 1.0, "{:.2f}")
            axes.set_yticks(range(len(GROUPS)), GROUPS)
            if i + 1 == len(seeds):
                _label_depths(axes, grid.shape[1])
            place = "inside the window" if far == "inside" else f"{far} back"
            axes.set_title(f"seed {seed}: fact {place}", fontsize=10)
    return figure


def _heat(axes: Axes, values: np.ndarray[Any, Any], limit: float, form: str) -> None:
    """Draw values [row column] with their numbers, on a scale from 0 to a limit."""
    axes.imshow(values, cmap="Greens", vmin=0, vmax=limit, aspect="auto")
    for (i, j), value in np.ndenumerate(values):
        if not np.isnan(value):
            shown = form.format(value).replace("-0.00", "0.00").replace("-0.0", "0.0")
            colour = "white" if value > 0.6 * limit else "black"
            axes.text(j, i, shown, ha="center", va="center", fontsize=7, color=colour)


def _depths(n: int) -> list[str]:
    """Return the names of depths of the residual stream, the end among them."""
    return [*(f"before layer {i}" for i in range(n - 1)), "end"]


def _label_depths(axes: Axes, n: int) -> None:
    axes.set_xticks(range(n), _depths(n), rotation=45, ha="right")


def _shade(share: float) -> Any:
    from matplotlib import colormaps

    return colormaps["viridis"](0.9 * share)
