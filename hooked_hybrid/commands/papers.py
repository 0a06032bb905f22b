"""`hooked-hybrid reproduce`: a paper's tables and figures on a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from hooked_hybrid.commands.niah import model_card
from hooked_hybrid.commands.option_groups import given_options, make_command, refuse_given
from hooked_hybrid.commands.program import command_line, report_errors
from hooked_hybrid.commands.prompt_options import HaystackPath, Template
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.prompts import Haystack
from hooked_hybrid.outputs.checkout import commit
from hooked_hybrid.outputs.foreign import one_line, printable
from hooked_hybrid.papers.catalogue import items_of, runs_of
from hooked_hybrid.papers.claims import TITLES, Item, Paper, subject_of
from hooked_hybrid.papers.evidence import Evidence
from hooked_hybrid.papers.language import measure
from hooked_hybrid.papers.recipe import (
    PACKAGED,
    PAPERS,
    QUICK,
    PaperRecipe,
    Size,
    recipe_for,
    recorded_include_path,
)
from hooked_hybrid.papers.report import (
    Judged,
    count_claims,
    items_in,
    not_run,
    verdict_of,
    write_item,
    write_report,
)
from hooked_hybrid.papers.runs import check, perform
from hooked_hybrid.presets.packaged import packaged_models
from hooked_hybrid.runs.identity.model import hash_once

if TYPE_CHECKING:
    from hooked_hybrid.runs.ray_workers import RayWorkers


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, **settings)


def _more(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel="More options", **settings)


PaperName = Annotated[Paper, _option("The paper: --paper thesis2025.")]
Only = Annotated[
    list[str] | None,
    _option("Some tables or figures: --only 'Table 6.1'.", show_default="all of the paper"),
]
ListItems = Annotated[
    bool, _option("List the paper's tables and figures, run nothing: --list.", "--list")
]
Quick = Annotated[
    bool, _option("Very few prompts, only to test that everything runs: --quick.", "--quick")
]
HeldOut = Annotated[
    int | None,
    _more(
        "Needles of each seed in addition to the paper's: --held-out 5.",
        min=1,
        show_default="3 for a packaged model, else 2",
    ),
]
Seeds = Annotated[
    int | None, _more("Haystacks and sets of needles: --seeds 3.", min=2, show_default="2")
]
FirstTokenStage = Annotated[
    Literal["prefill", "generation"] | None,
    _more(
        "Stage that chooses the first new token: --first-token prefill.",
        "--first-token",
        show_default="that of the papers' programs for this kind of model",
    ),
]
Lengths = Annotated[
    list[int] | None,
    _more(
        "Tokens of a prompt: --lengths 256,512.",
        show_default="up to twice the window: 10, or 6 for a packaged model",
    ),
]
Depths = Annotated[
    list[float] | None,
    _more(
        "Share of the haystack before the needle: --depths 0,0.5.",
        show_default="from 0 to 1: 10, or 5 for a packaged model",
    ),
]
ThesisDepth = Annotated[
    bool | None,
    _more(
        "Whether maps count depth from the end.",
        "--thesis-depth/--no-thesis-depth",
        show_default="as the paper does",
    ),
]
IncludePath = Annotated[
    Path | None,
    _more(
        "Folder of tasks in lm-eval's format, whose code is run; a group glue or mmlu there is "
        "read in place of lm-eval's. Give it again with --resume: --include-path tasks/."
    ),
]


@make_command(out=Path("results/reproduce"))
def reproduce(
    paper: PaperName,
    run: RunOptions,
    only: Only = None,
    list_items: ListItems = False,
    quick: Quick = False,
    lengths: Lengths = None,
    depths: Depths = None,
    held_out: HeldOut = None,
    seeds: Seeds = None,
    haystack: HaystackPath = None,
    template: Template = "base",
    first_token: FirstTokenStage = None,
    include_path: IncludePath = None,
    thesis_depth: ThesisDepth = None,
) -> None:
    """Run a paper's tables and figures on a model, and report for each whether the model shows it.

    Writes report.md, with the published value, ours and one of three verdicts for every claim, a
    figure and a table for each item, and claims.csv. It may be stopped at any time and continued by
    the same command with --resume. An item that cannot be run is reported as such, and the others
    are run; items that are already in a report are kept.

    Example: hooked-hybrid reproduce --paper thesis2025 --model tiny-jamba --out results/thesis
    """
    if list_items:
        with report_errors(kept=None):
            asked = [
                name for name in given_options() if name not in ("paper", "only", "list_items")
            ]
            refuse_given("--list runs nothing", *asked)
            _list(paper, items_of(paper, only or []))
        return
    commit()  # of the code that the run begins with: the report names it
    with run.started() as workers, hash_once():
        items = items_of(paper, only or [])
        if run.resume:
            items = _with_those_before(paper, items, run.out)
        _refuse_idle(items)  # what the folder was begun with is given again for items without runs
        recorded = recorded_include_path(run.out) if run.resume else None
        _refuse_untyped(items, run.out, include_path, recorded)
        _check_folder(include_path)
        model = run.load()
        documents = () if haystack is None else Haystack.read(haystack).documents
        recipe = recipe_for(
            model,
            _size(run.model, quick),
            lengths=lengths,
            depths=depths,
            n_held_out=held_out,
            n_seeds=seeds,
            template=template,
            first_token=first_token,
            documents=documents,
            include_path=include_path or recorded,  # the latter to be compared, never to be read
        )
        check([name for item in items for name in runs_of(item)], model, recipe, documents)
        recipe.save(run.out, paper, run.resume)
        evidence = Evidence(
            name=run.model,
            subject=subject_of(run.model, model.cfg),
            cfg=model.cfg,
            recipe=recipe,
            tables={},
            losses={},
            thesis_depth=paper == "thesis2025" if thesis_depth is None else thesis_depth,
        )
        done = walk(
            items, model, recipe, evidence, run.out, documents, include_path, workers=workers
        )
        card = model_card(model, run.model)
        page = write_report(paper, done, evidence, card, run.out, command_line())
        _show(done, evidence, page)
        _complain(done)


def walk(
    items: Sequence[Item],
    model: HookedHybrid,
    recipe: PaperRecipe,
    evidence: Evidence,
    folder: Path,
    documents: Sequence[str] = (),
    include_path: Path | None = None,
    *,
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> list[Judged]:
    """Run the sweeps that the items need, each once, write the items and return the findings.

    Args:
        items: tables and figures, in order.
        model: with a tokenizer.
        recipe: what the runs depend on.
        evidence: gets the cells of every run.
        folder: gets a folder "runs", and each item's files.
        documents: what the haystack is made of.
        include_path: see `language.measured`.
        workers: run sweeps, texts and benchmarks there, not in this process.
        verbose: show progress bars.

    An error other than of disk and memory is reported for its item, and the others are run.

    Raises:
        OSError: the results cannot be written.
    """
    runs = folder / "runs"
    done = []
    with tqdm(items, unit="item", disable=not verbose, position=0) as bar:
        for item in bar:
            bar.set_description(item.name)
            try:
                for run in runs_of(item):
                    if run not in evidence.tables:
                        bar.set_postfix_str(run)
                        about = (run, model, recipe, runs, documents)
                        table, text = perform(*about, workers=workers, verbose=verbose)
                        evidence.tables[run] = table
                        if text is not None:
                            evidence.losses[run] = text
                for suite in item.suites:
                    if suite not in evidence.language:
                        bar.set_postfix_str(suite)
                        of = (suite, model, evidence.name, runs, recipe.n_documents)
                        scores = measure(*of, include_path, bar.write, workers)
                        evidence.language[suite] = scores
                done.append(write_item(item, evidence, folder))
            except (LookupError, ValueError, ArithmeticError, ImportError) as error:
                done.append(not_run(item, error))
    return done


def _with_those_before(paper: Paper, items: Sequence[Item], folder: Path) -> list[Item]:
    """Return the items and those already in the folder's report, in the paper's order.

    The report is written again. The latter are judged again, from their existing runs.
    """
    wanted = {*items_in(folder), *(item.name for item in items)}
    return [item for item in items_of(paper) if item.name in wanted]


def _refuse_idle(items: Sequence[Item]) -> None:
    """Refuse options that none of these items uses."""
    if not any(runs_of(item) for item in items):
        of_prompts = ("lengths", "depths", "held_out", "seeds", "haystack", "template")
        refuse_given("these items read no prompt", *of_prompts, "first_token")
    if not any(item.suites for item in items):
        refuse_given("these items run no benchmark", "include_path")


def _size(name: str, quick: bool) -> Size:
    return QUICK if quick else PACKAGED if name in packaged_models() else PAPERS


def _list(paper: Paper, items: Sequence[Item]) -> None:
    shown = Table(title=TITLES[paper], box=SIMPLE_HEAD)
    for heading in ("item", "what it shows", "claims", "runs"):
        shown.add_column(heading, no_wrap=heading == "item")
    for item in items:
        runs = ", ".join(runs_of(item)) or "none"
        shown.add_row(item.name, item.shows, str(len(item.claims)), runs)
    Console().print(shown)


def _show(done: Sequence[Judged], evidence: Evidence, page: Path) -> None:
    console = Console()
    shown = Table(box=SIMPLE_HEAD)
    for heading in ("item", "verdict", "claims"):
        shown.add_column(heading)
    for entry in done:
        shown.add_row(entry.item.name, verdict_of(entry, evidence), count_claims(entry))
    console.print(shown)
    console.print(f"report  {page}", markup=False, highlight=False, soft_wrap=True)


def _check_folder(include_path: Path | None) -> None:
    if include_path is not None and not include_path.is_dir():
        raise ValueError(f"--include-path {include_path}: there is no such folder")


def _refuse_untyped(
    items: Sequence[Item], out: Path, include_path: Path | None, recorded: Path | None
) -> None:
    """Refuse a folder of code that is named only in a file, which may be someone else's."""
    if recorded is not None and include_path is None and any(item.suites for item in items):
        raise ValueError(
            f"{printable(out)} was begun with --include-path {one_line(recorded)}, and the code of "
            "tasks there is run: give --include-path again, if you trust that folder"
        )


def _complain(done: Sequence[Judged]) -> None:
    """Raise ValueError, which ends the command with exit code 1, if an item was not run."""
    if stopped := [entry for entry in done if entry.why_not]:
        names = "; ".join(f"{entry.item.name} {entry.why_not}" for entry in stopped)
        raise ValueError(f"{names} (the others are in the report)")
