"""Commands like `niah`: the papers' other experiments, and the controls.

Each command has its own settings and figures; prompts, sweep, loss of text, report and their
options are common to all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer
from rich.console import Console

from hooked_hybrid.commands.niah import heads_to_keep, model_card, show
from hooked_hybrid.commands.option_groups import make_command
from hooked_hybrid.commands.program import command_line
from hooked_hybrid.commands.prompt_options import FirstToken, PromptOptions, ThesisDepth
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.head_sets import standings
from hooked_hybrid.niah.language import text_loss, texts_of
from hooked_hybrid.niah.report.published import READ_TWICE, WEIGHTS, Published
from hooked_hybrid.niah.report.report import write_report
from hooked_hybrid.niah.report.setting_plots import (
    accuracy_by_heads_kept,
    accuracy_by_setting,
    weight_matrix_picture,
)
from hooked_hybrid.niah.settings import papers as experiments
from hooked_hybrid.niah.settings import static as static_choices
from hooked_hybrid.niah.settings.papers import (
    FOLLOW_MODES,
    GENERATION_MODES,
    control_settings,
    head_settings,
    layer_settings,
    weight_matrix,
)
from hooked_hybrid.niah.settings.setting import Setting, top_k_settings
from hooked_hybrid.niah.settings.static import check_sizes, rankings_of, sizes_of, static_settings
from hooked_hybrid.niah.sweep import niah as run_sweep
from hooked_hybrid.outputs.tables import write_csv

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

    from hooked_hybrid.runs.ray_workers import RayWorkers

Texts = Annotated[
    int,
    typer.Option(
        help="Haystack texts on which the loss is measured, 0 for none: --texts 20.", min=0
    ),
]
FewKs = Annotated[
    list[int] | None,
    typer.Option("--k", help="Heads kept: --k 0,2.", show_default="0, 1 and 2"),
]
HalfKs = Annotated[
    list[int] | None,
    typer.Option("--k", help="Heads kept: --k 2,4.", show_default="half the heads"),
]
EveryK = Annotated[
    list[int] | None,
    typer.Option("--k", help="Heads kept in each layer: --k 2,4.", show_default="each"),
]
Follow = Annotated[
    bool,
    typer.Option("--follow", help="Also weights that follow the generated token: --follow."),
]
FewDraws = Annotated[
    int | None,
    typer.Option(
        help="Random sets of each size, or all sets if there are no more: --draws 20.",
        min=0,
        show_default="all of up to 100, else 5 at random",
    ),
]
ScoredOn = Annotated[
    int, typer.Option(help="Needles for the choice of heads: --scored-on 16.", min=1)
]
Draws = Annotated[
    int | None,
    typer.Option(
        help="Random sets of heads, and of layers, or all sets if there are no more: --draws 50.",
        min=1,
        show_default="all of up to 100 sets of heads, else 20 at random",
    ),
]


@dataclass(frozen=True)
class ExperimentPlan:
    """The steps of an experiment that others do not share."""

    settings: list[Setting]
    published: Sequence[Published] = ()
    read_twice: tuple[bool, ...] = (False,)
    picture: Callable[[pd.DataFrame], Figure] | None = None
    title: str = ""
    families: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Names of the sets of heads to compare with, by the name of a choice of heads."""


@dataclass(frozen=True)
class Common:
    """Options common to these commands."""

    texts: Texts = 12
    first_token: FirstToken = "prefill"
    thesis_depth: ThesisDepth = False


def experiment(plan: Callable[..., ExperimentPlan]) -> Callable[..., None]:
    """Return a command with the options of a plan and the common options.

    The plan's first argument is the model; its name is the default folder of results.
    """
    hints = get_type_hints(plan, include_extras=True)
    own = [p.replace(annotation=hints[p.name]) for p in signature(plan).parameters.values()][1:]
    groups = {"run": RunOptions, "prompts": PromptOptions, "common": Common}

    def command(run: RunOptions, prompts: PromptOptions, common: Common, **given: Any) -> None:
        with run.started() as workers:
            _run(plan, run, prompts, common, given, workers)

    made: Any = command
    of_groups = [
        Parameter(name, Parameter.POSITIONAL_OR_KEYWORD, annotation=group)
        for name, group in groups.items()
    ]
    made.__signature__ = Signature([*of_groups, *own], return_annotation=None)
    made.__annotations__ = {p.name: p.annotation for p in (*of_groups, *own)}
    made.__name__, made.__doc__ = plan.__name__, plan.__doc__
    return make_command(out=Path("results") / plan.__name__.replace("_", "-"))(command)


@experiment
def read_twice(model: HookedHybrid, k: FewKs = None) -> ExperimentPlan:
    """Top-k sparsification with the context given once and twice (Just Read Twice).

    It runs all heads, and the numbers of --k (by default 0, 1 and 2).

    Example: hooked-hybrid read-twice --model tiny-jamba --k 0,2 --out results/twice
    """
    # All heads first, with which the loss of the others is compared.
    ks = heads_to_keep([*_all_heads(model), *(k or [0, 1, 2])], model.cfg)
    return ExperimentPlan(top_k_settings(ks), READ_TWICE, (False, True))


@experiment
def weights(model: HookedHybrid, follow: Follow = False) -> ExperimentPlan:  # noqa: ARG001
    """Change the attention weights on the needle, in prefill and in generation: the 5 x 4 matrix.

    Each setting is named PREFILL-GENERATION, of these; weights are not renormalised:

        keep    nothing changes
        omit    weights on the needle are 0
        only    weights on everything but the needle are 0
        binary  as only, and those on the needle are all their mean
        null    every weight is 0 (in prefill alone)

    With --follow, generation also has weights on one token at a time, that being generated.

    Example: hooked-hybrid weights --model tiny-griffin --out results/weights
    """
    settings = weight_matrix(generation=(*GENERATION_MODES, *(FOLLOW_MODES if follow else ())))
    return ExperimentPlan(
        settings, WEIGHTS, picture=weight_matrix_picture, title="Weights by stage"
    )


@experiment
def layers(model: HookedHybrid) -> ExperimentPlan:
    """Zero each kind of layer, and each single attention or recurrent layer.

    Example: hooked-hybrid layers --model tiny-jamba --out results/layers
    """
    return ExperimentPlan(layer_settings(model.cfg))


@experiment
def heads(model: HookedHybrid) -> ExperimentPlan:
    """Zero each single attention head, to find the retrieval heads.

    Example: hooked-hybrid heads --model tiny-griffin --out results/heads
    """
    return ExperimentPlan(head_settings(model.cfg))


@experiment
def controls(model: HookedHybrid, k: HalfKs = None, draws: Draws = None) -> ExperimentPlan:
    """Compare the most peaked heads with other sets, and attention with recurrent layers.

    All other sets are run if there are few; sets.csv gives the rank of each choice among them.

    Example: hooked-hybrid controls --model tiny-griffin --k 4 --draws 20 --out results/controls
    """
    most = _all_heads(model)[0]
    settings = control_settings(model.cfg, list(dict.fromkeys(k or [(most + 1) // 2])), draws)
    return ExperimentPlan(settings, families=experiments.sets_beside(settings))


@experiment
def static(
    model: HookedHybrid, k: EveryK = None, draws: FewDraws = None, scored_on: ScoredOn = 8
) -> ExperimentPlan:
    """Keep heads chosen once, by retrieval score or weights, and compare with the run-time choice.

    All other sets of equally many heads are run if these are few; sets.csv gives the rank of each
    choice among them.

    Retrieval scores are computed on other prompts: needles, cities and haystack of no sweep.

    Example: hooked-hybrid static --model tiny-griffin --k 2,4 --out results/static
    """
    ks = list(k or range(1, _all_heads(model)[0]))
    check_sizes(model.cfg, ks, draws)  # before the scores are computed
    settings = static_settings(model.cfg, rankings_of(model, scored_on), ks, draws)
    return ExperimentPlan(
        settings,
        picture=partial(accuracy_by_heads_kept, sizes=sizes_of(settings)),
        families=static_choices.sets_beside(settings),
        title="Accuracy by heads kept",
    )


def _all_heads(model: HookedHybrid) -> list[int]:
    return [max(heads_to_keep(None, model.cfg))]


def _run(
    plan: Callable[..., ExperimentPlan],
    run: RunOptions,
    asked: PromptOptions,
    common: Common,
    own: Mapping[str, Any],
    workers: RayWorkers | None,
) -> None:
    model = run.load()
    planned, documents = plan(model, **own), asked.documents
    prompts = asked.prompts(model, planned.read_twice)
    if not any(prompt.needle for prompt in prompts):
        raise ValueError("--needle none: this experiment scores answers, give a needle too")
    longest = max(prompt.length for prompt in prompts)
    if common.texts:  # raise errors before the sweep, not after it
        _check_texts(model, longest, common.texts, documents)
    table = run_sweep(
        model,
        prompts,
        planned.settings,
        out=run.out,
        resume=run.resume,
        max_new_tokens=asked.max_new_tokens,
        first_token_stage=common.first_token,
        workers=workers,
    )
    losses = None
    if common.texts:
        losses = text_loss(
            model, planned.settings, longest, common.texts, documents, workers=workers
        )
    _report(table, losses, planned, model_card(model, run.model), run.out, common.thesis_depth)


def _check_texts(model: HookedHybrid, length: int, n: int, documents: Sequence[str]) -> None:
    try:
        texts_of(model, length, n, documents)
    except ValueError as error:
        raise ValueError(f"the loss of text cannot be measured ({error}); or --texts 0") from error


def _report(
    table: pd.DataFrame,
    losses: pd.DataFrame | None,
    plan: ExperimentPlan,
    card: Mapping[str, str],
    out: Path,
    thesis_depth: bool,
) -> None:
    """Write table, figures and report, and print their paths."""
    with Console(stderr=True).status("drawing"):
        shown = table
        if len(plan.read_twice) > 1:
            words = table["read_twice"].map({False: "once", True: "twice"})
            shown = table.assign(setting=table["setting"] + ", " + words)
            if losses is not None:  # of the text, which is read once
                both = [losses.assign(setting=losses["setting"] + f", {w}") for w in set(words)]
                losses = _join(both)
        figures = {"Accuracy by setting": accuracy_by_setting(shown, losses)}
        if plan.picture is not None:
            figures = {plan.title: plan.picture(shown), **figures}
        if losses is not None:
            write_csv(losses, out / "text_loss.csv")
        among = standings(table, plan.families)
        if not among.empty:
            write_csv(among, out / "sets.csv")
        written = write_report(
            shown,
            plan.settings,
            card,
            out,
            plan.published,
            command=command_line(),
            thesis_depth=thesis_depth,
            losses=losses,
            figures=figures,
            among=among,
            unmapped={name for name in _sets(plan) if name.startswith("every")},
        )
    show(shown, written, losses)


def _sets(plan: ExperimentPlan) -> set[str]:
    return {name for names in plan.families.values() for name in names}


def _join(tables: Sequence[pd.DataFrame]) -> pd.DataFrame:
    import pandas as pd

    return pd.concat(tables, ignore_index=True)
