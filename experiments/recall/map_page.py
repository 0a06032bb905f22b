"""The map as a figure and a page."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.benchmarks.machine import commit_and_day
from experiments.pages.writing import filled
from experiments.recall.map import D_INNER, D_STATES, FACTS, HEAD_STARTS, LEARNED, LENGTHS, Found
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.outputs.whole_files import replacing

BLOCK, COMMAND = "map", "python -m experiments.recall.map"
"""Name of the block of the page (`experiments.pages`), and its command."""


def picture(found: list[Found]) -> Figure:
    """Return the map: a panel for each length and head start, facts against state size.

    The color is where retrieval is. Each cell shows the accuracy without attention and without
    memory, means over the seeds that learned the task; a grey one was not learned by any, and shows
    its accuracy.
    """
    figure = new_figure(3.6 * len(HEAD_STARTS) + 1.2, 3.0 * len(LENGTHS) + 0.4)
    axes = figure.subplots(len(LENGTHS), len(HEAD_STARTS), squeeze=False, sharex=True, sharey=True)
    for row, length in zip(axes, LENGTHS, strict=True):
        for ax, start in zip(row, HEAD_STARTS, strict=True):
            here = [f for f in found if (f.cell.length, f.cell.head_start) == (length, start)]
            _panel(ax, here)
            ax.set_title(f"{length} tokens, {_start(start)}", fontsize=10)
        row[0].set_ylabel("facts in a sequence")
    for ax in axes[-1]:
        ax.set_xlabel("numbers in a Mamba layer's state")
    bar = figure.colorbar(axes[0][0].images[0], ax=axes, ticks=[-1, 0, 1], shrink=0.7)
    bar.ax.set_yticklabels(["all in the\nrecurrences", "both, or\neither", "all in\nattention"])
    return figure


def _start(steps: int) -> str:
    return f"attention {steps} steps late" if steps else "attention from the start"


def _panel(ax: Axes, found: list[Found]) -> None:
    lean = [[float("nan")] * len(D_STATES) for _ in FACTS]
    for row, n_facts in enumerate(FACTS):
        for column, d_state in enumerate(D_STATES):
            here = [f for f in found if (f.cell.d_state, f.cell.n_facts) == (d_state, n_facts)]
            if good := [f for f in here if f.learned]:
                lean[row][column] = mean(f.lean for f in good)
            if here:
                ax.text(column, row, _words(here), ha="center", va="center", fontsize=7.5)
    ax.imshow(lean, cmap="PuOr_r", vmin=-1.5, vmax=1.5, origin="lower", aspect="auto")
    ax.set_facecolor("0.85")
    ax.set_xticks(range(len(D_STATES)), [str(d * D_INNER) for d in D_STATES])
    ax.set_yticks(range(len(FACTS)), [str(n) for n in FACTS])


def _words(here: list[Found]) -> str:
    learned = [f for f in here if f.learned]

    def of(name: str) -> str:
        return f"{mean(f.scores[name].accuracy for f in learned or here):.0%}"

    if not learned:
        return f"not learned\n({of('whole')})"
    seeds = f"\n{len(learned)} of {len(here)} seeds" if len(here) > 1 else ""
    return f"no attention {of('no attention')}\nno memory {of('no memory')}{seeds}"


def table(found: list[Found]) -> str:
    """Return every cell as a line of a table."""
    lines = [
        "| tokens | head start | facts | state | seed | whole | no attention | no memory | lean |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for f in sorted(found, key=_order):
        three = (f.scores[n] for n in ("whole", "no attention", "no memory"))
        cells = " | ".join(f"{s.accuracy:.1%} ± {s.half_width:.1%}" for s in three)
        lean = f"{f.lean:+.2f}" if f.learned else "not learned"
        at = (*_order(f)[:3], f.cell.d_state * D_INNER, f.cell.seed)
        lines.append(f"| {' | '.join(map(str, at))} | {cells} | {lean} |")
    minutes = sum(f.seconds for f in found) / 60
    note = f"{len(found)} cells, {minutes:.0f} minutes of one core; learned: {LEARNED:.0%} or more."
    return "\n".join([*lines, "", note])


def _order(f: Found) -> tuple[int, ...]:
    return f.cell.length, f.cell.head_start, f.cell.n_facts, f.cell.d_state, f.cell.seed


def write(found: list[Found], page: Path) -> None:
    """Write the figure next to a page, and the table into the page's block.

    Raises:
        ValueError: the page lacks the block.
    """
    text = page.read_text(encoding="utf-8")
    new = filled(text, BLOCK, table(found), COMMAND, commit_and_day())
    with replacing(page.parent / "images" / "recall_map.png") as temporary:
        picture(found).savefig(temporary, dpi=150, format="png")
    with replacing(page) as temporary:
        temporary.write_text(new, encoding="utf-8")
