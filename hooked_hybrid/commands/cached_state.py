"""`hooked-hybrid cached-state`: the effect of zeroed heads through the cached state."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from hooked_hybrid.commands.niah import heads_to_keep, model_card, show
from hooked_hybrid.commands.option_groups import make_command
from hooked_hybrid.commands.program import command_line
from hooked_hybrid.commands.prompt_options import PromptOptions, ThesisDepth
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.niah.cached_state.sweep import CASES, settings_of
from hooked_hybrid.niah.cached_state.sweep import cached_state as run_cases
from hooked_hybrid.niah.report.plots import intervals_said
from hooked_hybrid.niah.report.report import write_report
from hooked_hybrid.niah.report.setting_plots import MARKERS, WAYS
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.runs.statistics import interval_of, select_scored

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

Ks = Annotated[
    list[int] | None,
    typer.Option("--k", help="Heads kept where others are zeroed: --k 2,4.", show_default="4"),
]

PAIRS = {
    "cases that must agree": '"no cache: everywhere" and "prompt and steps: all"; "no cache: last '
    'position" and "steps: carry nothing"'
}
"""A check of the cases, for the report."""


@make_command(out=Path("results/cached-state"))
def cached_state(
    run: RunOptions, prompts: PromptOptions, k: Ks = None, thesis_depth: ThesisDepth = False
) -> None:
    """Test whether the cached state carries the effect of heads zeroed in prefill or in steps.

    Some parts of the prompt's state, and of its update in each step, come from a run with zeroed
    heads, the others from an unmodified one. In other cases everything is run again for each token.
    Writes a table, retrieval maps, accuracy by case with intervals, and a report. It may be stopped
    at any time and continued by the same command with --resume.

    Example: hooked-hybrid cached-state --model tiny-griffin --k 3,4 --out results/cached
    """
    with run.started() as workers:
        model = run.load()
        ks = heads_to_keep(k or [4], model.cfg)
        if None in prompts.needles:
            raise ValueError("--needle none: this experiment scores answers, give a needle")
        table = run_cases(
            model,
            prompts.prompts(model),
            ks,
            CASES,
            out=run.out,
            resume=run.resume,
            max_new_tokens=prompts.max_new_tokens,
            workers=workers,
        )
        with Console(stderr=True).status("drawing"):
            written = write_report(
                table,
                [setting for _, _, setting in settings_of(CASES, ks).values()],
                {**model_card(model, run.model), **PAIRS},
                run.out,
                (),
                command=command_line(),
                thesis_depth=thesis_depth,
                figures={"Accuracy by case": accuracy_by_case(table)},
            )
        show(table, written)


def accuracy_by_case(table: pd.DataFrame) -> Figure:
    """Return accuracy by k, with a line for each case and a panel for each kind of case.

    Bands are 95% intervals over needles, and absent for a single needle; the case without a k is a
    dotted line.

    Args:
        table: of `hooked_hybrid.niah.cached_state.cached_state`.

    Raises:
        ValueError: no cell has a score.
    """
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    cells = select_scored(table)
    names = list(cells["stage"].unique())
    kinds = {name.split(":")[0]: "" for name in names if ":" in name}
    figure = new_figure(1.0 + 3.6 * len(kinds), 4.6)
    for axes, kind in zip(
        figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0], kinds, strict=True
    ):
        for i, name in enumerate(n for n in names if n.startswith(f"{kind}:")):
            own = cells[cells["stage"] == name]
            groups = own.groupby(own["setting"].str.extract(r"k=(\d+)$")[0].astype(int))
            ks, means = list(groups.groups), groups["accuracy"].mean()
            low, high = zip(*(interval_of(rows) for _, rows in groups), strict=True)
            style = {"color": WAYS[i], "marker": MARKERS[i], "linestyle": "--" if i % 2 else "-"}
            axes.plot(ks, means, label=name.split(": ")[1], ms=4, **style)
            axes.fill_between(ks, low, high, color=WAYS[i], alpha=0.15, linewidth=0)
            axes.vlines(ks, low, high, color=WAYS[i], linewidth=1)  # for one k a band has no width
        for name in (n for n in names if ":" not in n):
            mean = cells.loc[cells["stage"] == name, "accuracy"].mean()
            axes.axhline(mean, color="#444444", linestyle=":", linewidth=1, label=name)
        axes.set(title=kind, xlabel="k, heads kept in each layer", ylim=(-0.02, 1.02))
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axes.yaxis.set_major_formatter(PercentFormatter(1))
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="best")
    figure.axes[0].set_ylabel("accuracy (mean score / 5)")
    figure.supxlabel(intervals_said(cells, "bands: 95% intervals"), fontsize=9)
    return figure
