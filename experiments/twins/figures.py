"""Figures of the twins: recall, its paths, the content of their recurrences, horizons."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from experiments.twins.models import DRILLS, LONG, TASK
from hooked_hybrid.outputs.figures import new_figure, save_figure
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = {
    "hybrid": "#1F5FA8",
    LONG: "#3FA58A",
    "attention-free": "#D9730D",
    "attention-only": "#6B6B6B",
}
CONTROL = "#9A9A9A"
WAYS = {"whole": "#222222", "attention": "#1F5FA8", "recurrences": "#D9730D"}
LAYERS = ("0", "1", "2", "all")
RECURRENT = ("hybrid", LONG, "attention-free")


def last(found: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of the last step."""
    return found[found["step"] == found["step"].max()]


def summary(found: pd.DataFrame) -> pd.DataFrame:
    """Return a row for each figure of the last step: every seed, their mean, the mean control.

    Of the horizons of a layer's channels: their median, and the share longer than a sequence.
    """
    rows = last(found)
    channels = rows[rows["measure"] == "horizon"].groupby(["at", "twin", "seed"])["value"]
    medians = channels.median().reset_index().assign(measure="median horizon")
    beyond = channels.agg(lambda x: (x > TASK.length).mean()).reset_index()
    beyond = beyond.assign(measure="share beyond a sequence")
    rows = pd.concat([rows[rows["measure"] != "horizon"], medians, beyond])
    keys = ["measure", "at", "twin"]
    wide = rows.pivot_table(index=keys, columns="seed", values="value", sort=False)
    seeds = list(wide.columns)
    wide.columns = pd.Index([f"seed {seed}" for seed in seeds])
    wide["mean"] = wide.mean(axis=1)
    if "control" in rows:
        wide["control"] = rows.groupby(keys)["control"].mean()
    return wide.reset_index()


def draw_all(found: pd.DataFrame, out: Path, images: Path | None = None) -> list[Path]:
    """Write every figure as PNG and PDF to `out`, the PNGs to `images` too; return the PNGs."""
    drawn = {"recall": recall, "ways": ways, "kept": kept, "horizons": horizons}
    paths = [save_figure(draw(found), out / f"twins_{name}")[0] for name, draw in drawn.items()]
    if images is not None:
        for path in paths:
            with replacing(images / path.name) as temporary:
                temporary.write_bytes(path.read_bytes())
    return paths


def recall(found: pd.DataFrame) -> Figure:
    """Return accuracy over training, by distance, and by number of facts, a line for each seed."""
    figure = new_figure(11.0, 3.5)
    axes = figure.subplots(1, 3, sharey=True)
    whole = found[(found["measure"] == "accuracy") & (found["at"] == "whole")]
    ends = last(found)
    panels = [
        (whole, "step", "training step"),
        (_numbered(ends, "distance"), "where", "tokens from value to question"),
        (_numbered(ends, "facts"), "where", "facts in the sequence"),
    ]
    for ax, (rows, x, label) in zip(axes, panels, strict=True):
        for twin, color in COLORS.items():
            _lines(ax, rows[rows["twin"] == twin], x, color, twin)
        ax.set(xlabel=label, ylim=(-0.03, 1.03))
        ax.grid(alpha=0.25)
    _mark_drills(axes[0])
    axes[0].set_ylabel("questions answered right")
    axes[1].legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def ways(found: pd.DataFrame) -> Figure:
    """Return the hybrid's accuracy over training with each path cut, and all twins' at the end."""
    figure = new_figure(14.0, 3.8)
    axes = figure.subplots(1, 4, sharey=True, gridspec_kw={"width_ratios": [1.1, 1, 1, 0.8]})
    mine = found[found["twin"] == "hybrid"]
    for name, color in WAYS.items():
        measure = "accuracy" if name == "whole" else "crossing"
        rows = mine[(mine["measure"] == measure) & (mine["at"] == name)]
        label = name if name == "whole" else f"{name} begin{'s' * (name == 'attention')} anew"
        _lines(axes[0], rows, "step", color, label)
    axes[0].set(xlabel="training step", ylabel="questions answered right", title="hybrid")
    axes[0].legend(frameon=False, fontsize=8)
    _mark_drills(axes[0])
    for ax, twin in zip(axes[1:], RECURRENT, strict=True):
        rows = last(found[(found["twin"] == twin) & (found["measure"] == "crossing")])
        _dots(ax, rows, f"{twin}, last step")
    for ax in axes:
        ax.set_ylim(-0.03, 1.03)
        ax.grid(alpha=0.25)
    axes[1].legend(frameon=False, fontsize=8, loc="center")
    return figure


def kept(found: pd.DataFrame) -> Figure:
    """Return the accuracy of probes on states: over training, by layer; at the end, by distance."""
    figure = new_figure(13.0, 6.4)
    axes = figure.subplots(2, 4, sharey="row")
    for row, (measure, label) in enumerate(
        {"value": "value of a given key", "presence": "a value that was there"}.items()
    ):
        rows = found[found["measure"] == measure]
        for ax, layer in zip(axes[row], LAYERS, strict=True):
            own = rows[rows["at"] == layer]
            for twin in RECURRENT:
                _lines(ax, own[own["twin"] == twin], "step", COLORS[twin], twin)
            chance = own.groupby("step")["control"].mean()
            ax.plot(chance.index, chance, color=CONTROL, ls=":", label="control: shuffled")
            name = "all recurrences" if layer == "all" else f"recurrence in layer {layer}"
            ax.set(title=name, xlabel="training step" if row else "")
            ax.grid(alpha=0.25)
            _mark_drills(ax)
        axes[row, 0].set_ylabel(f"read by a probe: {label}")
        axes[row, 0].set_ylim(0, 1.03)
    axes[0, 1].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


def horizons(found: pd.DataFrame) -> Figure:
    """Return the share of channels by their horizon in tokens, by layer, first and last step."""
    figure = new_figure(11.0, 3.6)
    axes = figure.subplots(1, 3, sharey=True, sharex=True)
    rows = found[found["measure"] == "horizon"]
    steps = {rows["step"].min(): ":", rows["step"].max(): "-"}
    for ax, layer in zip(axes, LAYERS, strict=False):
        for (twin, step, _), own in rows[rows["at"] == layer].groupby(["twin", "step", "seed"]):
            if step in steps:
                tokens = own["value"].clip(1, 1e4).sort_values()
                share = [1 - i / len(tokens) for i in range(len(tokens))]
                ax.step(tokens, share, color=COLORS[twin], ls=steps[step], lw=1.2, alpha=0.8)
        ax.axvline(TASK.length, color=CONTROL, lw=0.8)
        ax.set(xscale="log", xlabel="tokens until 1% is left", title=f"recurrence in layer {layer}")
        ax.grid(alpha=0.25)
    axes[0].set_ylabel("share of channels")
    for twin in RECURRENT:
        for step, style in steps.items():
            axes[1].plot([], [], color=COLORS[twin], ls=style, label=f"{twin}, step {step}")
    axes[1].legend(frameon=False, fontsize=8, loc="upper right")
    return figure


# --- inside ---------------------------------------------------------------------------------------


def _numbered(rows: pd.DataFrame, measure: str) -> pd.DataFrame:
    own = rows[rows["measure"] == measure]
    return own.assign(where=own["at"].astype(float))


def _lines(ax: Axes, rows: pd.DataFrame, x: str, color: str, label: str) -> None:
    """Draw a thin line for each seed, and their mean."""
    for _, own in rows.sort_values(x).groupby("seed"):
        ax.plot(own[x], own["value"], color=color, lw=0.8, alpha=0.5)
    mean = rows.groupby(x)["value"].mean()
    ax.plot(mean.index, mean, color=color, lw=2, label=label)


def _dots(ax: Axes, rows: pd.DataFrame, title: str) -> None:
    """Draw a dot for each seed with a set of layers restarted, and its control next to it."""
    names = list(dict.fromkeys(rows["at"]))
    for i, name in enumerate(names):
        own = rows[rows["at"] == name]
        shown: list[tuple[str, float, dict[str, Any]]] = [
            ("value", 0.12, {"color": "#222222", "label": "between facts and questions"}),
            (
                "control",
                -0.12,
                {"facecolors": "none", "edgecolors": CONTROL, "label": "before facts"},
            ),
        ]
        for column, shift, style in shown:
            style |= {} if i == 0 else {"label": None}
            ax.scatter([i + shift] * len(own), own[column], s=28, zorder=3, **style)
    ax.set_xticks(range(len(names)), [_named(name) for name in names], fontsize=7)
    ax.set(title=title, xlabel="layers that begin anew", xlim=(-0.5, len(names) - 0.5))


def _named(at: str) -> str:
    return f"layer {at}" if at.isdigit() else f"all\n{at}"


def _mark_drills(ax: Axes) -> None:
    ax.axvline(DRILLS, color=CONTROL, lw=0.8, ls="--")
