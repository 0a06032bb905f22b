"""The map as a picture and a page."""

from __future__ import annotations

from pathlib import Path
from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.recall.map import D_INNER, D_STATE, FACTS, LEARNED, LENGTHS, Found
from hooked_hybrid.niah.plots import new_figure, replacing

BEGIN, END = "<!-- measured: written by experiments.recall.map -->", "<!-- end -->"


def picture(found: list[Found]) -> Figure:
    """Return the map: a panel a length, facts against state size, coloured by where retrieval is.

    Each cell says, in percent, accuracy without attention and without memory, means over seeds; a
    grey one did not learn the task, and says its accuracy.
    """
    figure = new_figure(4.2 * len(LENGTHS) + 1, 3.6)
    axes = figure.subplots(1, len(LENGTHS), squeeze=False, sharey=True)[0]
    for ax, length in zip(axes, LENGTHS, strict=True):
        _panel(ax, [f for f in found if f.cell.length == length])
        ax.set(title=f"{length} tokens", xlabel="numbers in the state of a Mamba layer")
    axes[0].set_ylabel("facts in a sequence")
    bar = figure.colorbar(axes[0].images[0], ax=axes, ticks=[-1, 0, 1])
    bar.ax.set_yticklabels(["all in the\nrecurrences", "both", "all in\nattention"])
    return figure


def _panel(ax: Axes, found: list[Found]) -> None:
    lean = [[float("nan")] * len(D_INNER) for _ in FACTS]
    for row, n_facts in enumerate(FACTS):
        for column, d_inner in enumerate(D_INNER):
            here = [f for f in found if (f.cell.d_inner, f.cell.n_facts) == (d_inner, n_facts)]
            if good := [f for f in here if f.learned]:
                lean[row][column] = mean(f.lean for f in good)
            if here:
                ax.text(column, row, _words(here), ha="center", va="center", fontsize=8)
    ax.imshow(lean, cmap="PuOr", vmin=-1.3, vmax=1.3, origin="lower", aspect="auto")
    ax.set_facecolor("0.85")
    ax.set_xticks(range(len(D_INNER)), [str(d * D_STATE) for d in D_INNER])
    ax.set_yticks(range(len(FACTS)), [str(n) for n in FACTS])


def _words(here: list[Found]) -> str:
    def of(name: str) -> str:
        return f"{mean(f.scores[name].accuracy for f in here):.0%}"

    if not any(f.learned for f in here):
        return f"not learned\n({of('whole')})"
    seeds = f"\n{len(here)} seeds" if len(here) > 1 else ""
    return f"no attention {of('no attention')}\nno memory {of('no memory')}{seeds}"


def table(found: list[Found]) -> str:
    """Return every cell as a line of a table."""
    lines = [
        "| state | facts | tokens | seed | whole | no attention | no memory | lean |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for f in sorted(found, key=lambda f: (f.cell.length, f.cell.n_facts, f.cell.d_inner)):
        three = (f.scores[n] for n in ("whole", "no attention", "no memory"))
        cells = " | ".join(f"{s.accuracy:.1%} ± {s.half_width:.1%}" for s in three)
        lean = f"{f.lean:+.2f}" if f.learned else "not learned"
        cell = f.cell
        size = cell.d_inner * D_STATE
        lines.append(
            f"| {size} | {cell.n_facts} | {cell.length} | {cell.seed} | {cells} | {lean} |"
        )
    minutes = sum(f.seconds for f in found) / 60
    note = f"{len(found)} cells, {minutes:.0f} minutes of one core; learned: {LEARNED:.0%} or more."
    return "\n".join([*lines, "", note])


def write(found: list[Found], page: Path) -> None:
    """Write the picture beside a page, and the table into it, between its two marks.

    Raises:
        ValueError: the page lacks the marks.
    """
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{page} lacks the lines {BEGIN!r} and {END!r}: give a page with them")
    with replacing(page.parent / "images" / "recall_map.png") as temporary:
        picture(found).savefig(temporary, dpi=150, format="png")
    with replacing(page) as temporary:
        temporary.write_text(f"{before}{BEGIN}\n{table(found)}\n{END}{after}", encoding="utf-8")
