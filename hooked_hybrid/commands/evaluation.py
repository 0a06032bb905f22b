"""`hooked-hybrid eval`: language benchmarks with all heads, with few, and without any."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from enum import StrEnum
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hooked_hybrid.commands.niah import model_card
from hooked_hybrid.commands.option_groups import make_command
from hooked_hybrid.commands.program import command_line
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.evaluation.benchmarks import BENCHMARKS
from hooked_hybrid.evaluation.conversation import has_template
from hooked_hybrid.evaluation.forms import FORMS, Form, form_of
from hooked_hybrid.evaluation.lines import lines
from hooked_hybrid.evaluation.report import Written, write
from hooked_hybrid.evaluation.running import Evaluation, Options, evaluate


class FormName(StrEnum):
    """A form in `forms.FORMS`."""

    base = "base"
    sparse = "sparse"
    ablated = "ablated"
    random = "random"


Tasks = Annotated[
    list[str],
    typer.Option(
        help="Tasks, groups or tags of lm-eval: --tasks glue,mmlu. needle_choice comes "
        "with this program and needs no network."
    ),
]
FormNames = Annotated[
    list[FormName] | None,
    typer.Option(
        "--form",
        help="base: all heads; sparse: the 5 most peaked; ablated: none; random: 5 at random, a "
        "control.",
        show_default="base, sparse, ablated",
    ),
]
Ks = Annotated[
    list[int] | None,
    typer.Option(
        "--k", help="A form that keeps this many heads, in addition to --form: --k 2.", min=0
    ),
]
StageOption = Annotated[
    Literal["both", "generation"],
    typer.Option(help="Stages with zeroed heads; log-likelihoods are scored in prefill."),
]
Shots = Annotated[
    int | None,
    typer.Option(
        help="Examples before each question, unless a task sets 0 itself.",
        show_default="the thesis's for glue and mmlu, else each task's own",
        min=0,
    ),
]
Limit = Annotated[
    float | None,
    typer.Option(help="First documents of each task, a share if below 1.", show_default="all"),
]
Chat = Annotated[
    bool | None,
    typer.Option(
        "--chat/--no-chat",
        help="Put prompts in the model's chat template, each example a turn.",
        show_default="if the checkpoint has a template",
        rich_help_panel="More options",
    ),
]
BatchSize = Annotated[
    str,
    typer.Option(
        help="Rows of a forward, or auto: --batch-size 8.", rich_help_panel="More options"
    ),
]
MaxLength = Annotated[
    int | None,
    typer.Option(
        help="Most tokens to read.",
        min=2,
        show_default="from the checkpoint",
        rich_help_panel="More options",
    ),
]
IncludePath = Annotated[
    Path | None,
    typer.Option(
        help="Folder of further tasks, in lm-eval's own format; their code is run.",
        rich_help_panel="More options",
    ),
]


@make_command(out=Path("results/eval"))
def eval(
    tasks: Tasks,
    run: RunOptions,
    form: FormNames = None,
    k: Ks = None,
    stage: StageOption = "both",
    num_fewshot: Shots = None,
    limit: Limit = None,
    chat: Chat = None,
    batch_size: BatchSize = "auto",
    max_length: MaxLength = None,
    include_path: IncludePath = None,
) -> None:
    """Language benchmarks (lm-eval) of a model with all attention heads, with few, and without any.

    Writes scores with standard errors, the gaps with intervals next to the thesis's, a figure and
    a report. Data sets that cannot be fetched are left out and listed. It may be stopped at any
    time and continued by the same command with --resume.

    Example: hooked-hybrid eval --model tiny-jamba --tasks needle_choice --out results/eval
    """
    with run.started() as workers:
        if find_spec("lm_eval") is None:
            raise ValueError("this needs lm-eval: pip install 'hooked-hybrid[eval]'")
        forms = forms_of(form or (() if k else ("base", "sparse", "ablated")), k or ())
        options = Options(
            num_fewshot=shots_of(tasks, num_fewshot),
            limit=int(limit) if limit is not None and limit.is_integer() else limit,
            multiturn=True,
            stage=stage,
            batch_size=batch_size,
            max_length=max_length,
        )
        model = run.load()
        has_chat = has_template(model.text.tokenizer)
        options = replace(options, chat=has_chat if chat is None else chat)
        console = Console(stderr=True)
        evaluation = evaluate(
            model,
            run.model,
            tasks,
            forms,
            options,
            run.out,
            run.resume,
            include_path,
            console.print,
            workers,
        )
        card = model_card(model, run.model)
        written = write(evaluation, card, options, run.out, command_line())
        if not evaluation.cells:
            raise ValueError(f"no task could be run: {written.report} gives the reasons")
        show(evaluation, written)


def forms_of(names: Sequence[str], ks: Sequence[int]) -> list[Form]:
    """Return the forms to run, each once; with a `k`, the base form is added."""
    found = [FORMS[name] for name in names] + [form_of(k) for k in ks]
    return list(dict.fromkeys([FORMS["base"], *found] if ks else found))


def shots_of(tasks: Sequence[str], given: int | None) -> int | None:
    """Return the number of examples: the given one, or the thesis's for its benchmarks.

    Raises:
        ValueError: benchmarks with different numbers, without a given number.
    """
    if given is not None:
        return given
    wanted = {BENCHMARKS[t].num_fewshot if t in BENCHMARKS else None for t in tasks}
    if len(wanted) > 1:
        raise ValueError(
            f"--tasks {', '.join(tasks)}: the thesis gave them different numbers of examples; run "
            "them one by one, or give --num-fewshot"
        )
    return wanted.pop()


def show(evaluation: Evaluation, written: Written) -> None:
    """Print the scores and the paths of the files."""
    console = Console()
    shown = Table(title="score ± standard error", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("task", "metric", *(form.name for form in evaluation.forms)):
        is_text = heading in ("task", "metric")
        shown.add_column(heading, justify="left" if is_text else "right", no_wrap=not is_text)
    for row in lines(evaluation):
        scores = (row.scores.get(form.name) for form in evaluation.forms)
        cells = (
            ""
            if e is None
            else f"{e.value:.1f}" + ("" if e.stderr is None else f" ± {e.stderr:.1f}")
            for e in scores
        )
        shown.add_row(row.name, row.metric, *cells)
    console.print(shown)
    for what, path in (("report", written.report), ("table", written.table)):
        console.print(f"{what:>8}  {path}", markup=False, highlight=False, soft_wrap=True)
