"""Tokens a second by length of the prompt, for every implementation."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from experiments.benchmarks.bars import GEMM, GOOGLE, HF
from experiments.benchmarks.figures import OURS, Figures
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.outputs.whole_files import replacing

FILE = "tokens_per_second.png"
PANELS = {
    "rg-prefill": "RecurrentGemma, 23 M parameters",
    "jamba-prefill": "Jamba, 76 M parameters",
}
STYLES: dict[str, dict[str, Any]] = {
    OURS: {"color": "#0072b2", "marker": "o", "linewidth": 2.2, "zorder": 3},
    HF: {"color": "#d55e00", "marker": "s"},
    GOOGLE: {"color": "#009e73", "marker": "^"},
    GEMM: {"color": "#777777", "linestyle": "--", "label": "its matrix products alone"},
}
Point = tuple[int, float, float, float]


def speeds(figures: Figures, case: str, name: str) -> list[Point]:
    """Return length, and median, lowest and highest tokens a second, by length."""

    def points() -> Iterator[Point]:
        for m in figures.of(case):
            if m.length is None or name not in m.values:
                continue
            n = 1 if m.what.endswith(", each") else m.length
            each = [n / s for s in m.values[name]]
            yield m.length, statistics.median(each), min(each), max(each)

    return sorted(points())


def plot(figures: Figures) -> Any:
    """Return the figure: a panel for each family, a line for each implementation."""
    figure = new_figure(10.0, 4.2)
    axes = figure.subplots(1, len(PANELS), squeeze=False)[0]
    for axis, (case, title) in zip(axes, PANELS.items(), strict=True):
        lengths: set[int] = set()
        for name, style in STYLES.items():
            found = speeds(figures, case, name)
            if not found:
                continue
            x, median, low, high = zip(*found, strict=True)
            lengths |= set(x)
            axis.plot(x, median, **{"label": name, "linewidth": 1.5, "markersize": 5, **style})
            axis.fill_between(x, low, high, color=style["color"], alpha=0.15, linewidth=0)
        _finish(axis, title, sorted(lengths))
    machine = figures.machine
    about = f"{machine.get('cpu', '')}, {machine.get('threads', '?')} thread(s), fp32"
    figure.suptitle(f"Prefill, {about}", fontsize=10)
    return figure


def _finish(axis: Any, title: str, lengths: list[int]) -> None:
    axis.set_title(title, fontsize=11)
    axis.set_xscale("log", base=2)
    axis.set_xticks(lengths, [str(n) for n in lengths])
    axis.minorticks_off()
    axis.set_ylim(bottom=0)
    axis.set_xlabel("tokens of the prompt")
    axis.set_ylabel("tokens a second")
    axis.grid(alpha=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    if lengths:
        axis.legend(frameon=False, fontsize=9)


def write_plot(folder: Path, figures: Figures) -> Path:
    """Write the figure to a folder and return its path."""
    path = folder / FILE
    with replacing(path) as temporary:
        plot(figures).savefig(temporary, dpi=150, format="png")
    return path
