"""An evaluation: tasks by forms, each run once, whatever data sets can be had."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.evaluation.batching import read_batch_size
from hooked_hybrid.evaluation.cells import Cell, Cells, cells_of, file_name
from hooked_hybrid.evaluation.conversation import has_template
from hooked_hybrid.evaluation.forms import FORMS, Form, Stage
from hooked_hybrid.evaluation.identity import identity
from hooked_hybrid.evaluation.tasks import Loaded, TaskSource
from hooked_hybrid.model import HookedHybrid

if TYPE_CHECKING:
    from hooked_hybrid.evaluation.lm import HookedHybridLM

BOOTSTRAPS = 1000
"""Draws of lm-eval's bootstrap, for the metrics that have no standard error in closed form."""
SEED, FEWSHOT_SEED = 0, 1234
"""Of everything drawn while a cell runs, and of its few-shot examples: lm-eval's own."""


@dataclass(frozen=True)
class Options:
    """How the tasks are run.

    Args:
        num_fewshot: examples before each question; None is each task's own number.
        limit: documents of a task, a share if below 1; None is all.
        chat: put prompts in the model's chat template.
        multiturn: make each example a turn of its own.
        stage: where heads are silenced.
        batch_size, max_length, max_gen_toks: of `HookedHybridLM`.

    Raises:
        ValueError: a limit or batch size that is none, or fewer than 0 examples.
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    chat: bool = False
    multiturn: bool = False
    stage: Stage = "both"
    batch_size: int | str = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256

    def __post_init__(self) -> None:
        read_batch_size(self.batch_size)
        limit = self.limit
        if limit is not None and not (0 < limit < 1 or (limit >= 1 and float(limit).is_integer())):
            raise ValueError(
                f"limit={limit}: give a number of documents from 1, or a share between 0 and 1"
            )
        if self.num_fewshot is not None and self.num_fewshot < 0:
            raise ValueError(f"num_fewshot={self.num_fewshot}: give 0 or more")


@dataclass(frozen=True)
class Evaluation:
    """What came out: cells in the order of tasks and forms, and why tasks are missing.

    `forms_of` names the forms that a group was run in, where these are not all.
    """

    groups: Mapping[str, tuple[str, ...]]
    forms: tuple[Form, ...]
    cells: Sequence[Cell]
    missing: Mapping[str, str] = field(default_factory=dict)
    forms_of: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def cell(self, task: str, form: str) -> Cell | None:
        """Return one cell, or None where it could not be run."""
        found = (c for c in self.cells if (c.task, c.form) == (task, form))
        return next(found, None)


def evaluate(
    model: HookedHybrid,
    name: str,
    tasks: Sequence[str],
    forms: Sequence[Form] = (FORMS["base"], FORMS["sparse"], FORMS["ablated"]),
    options: Options | None = None,
    out: Path = Path("results/eval"),
    resume: bool = False,
    include_path: Path | None = None,
    say: Callable[[str], Any] = print,
) -> Evaluation:
    """Run tasks of lm-eval on a model in several forms.

    A task whose data set cannot be had is left out, with the reason; the others go on. What stops
    a run half-way leaves whole cells behind, and `resume` goes on after them.

    Args:
        model: with a tokenizer.
        name: of the model.
        tasks: lm-eval's names of tasks, groups or tags.
        forms: what is silenced.
        options: how tasks are run.
        out: folder of the results, new or empty unless resumed.
        resume: go on with what it holds: other tasks and forms may be added, the rest is the same.
        include_path: folder of further tasks, in lm-eval's format.
        say: is told of each cell before it runs.

    Raises:
        ValueError: an unknown task, a form that the model has no heads for, options that the model
            cannot be run with, another evaluation in the folder, or a task or form that has changed
            since its cells were run; then nothing has run.
        FileExistsError: the folder is not empty, and `resume` is false; or it is no evaluation's.
    """
    options = options or Options()
    _check(model, name, forms, options)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults, task by task
    source = TaskSource(tasks, include_path)
    cells = Cells(out, {"model": name, **identity(model), **asdict(options)}, resume)
    _check_kept(out, source, forms, options, say)
    found: list[Cell] = []
    missing: dict[str, str] = {}
    for i, task in enumerate(source.leaves):
        todo = [form for form in forms if cells.get(task, form.name) is None]
        loaded = source.load(task) if todo else None
        if isinstance(loaded, str):
            missing[task] = loaded
            say(f"{task} is left out: {loaded}")
        elif loaded is not None:
            asked = loaded.hash(options.num_fewshot, FEWSHOT_SEED, options.limit)
            for form in todo:
                say(f"task {i + 1} of {len(source.leaves)}: {task}, {form.name}")
                cell = _run(model, name, loaded, form, options)
                cells.add(replace(cell, by=form.by, stage=options.stage, asked=asked))
        found += [c for form in forms if (c := cells.get(task, form.name)) is not None]
    said = {"groups": source.groups, "forms": [asdict(form) for form in forms]}
    cells.note({**said, "missing": missing})
    return Evaluation(source.groups, tuple(forms), found, missing)


def _check(model: HookedHybrid, name: str, forms: Sequence[Form], options: Options) -> None:
    """Raise an error where forms or options do not fit the model, or forms one another."""
    files = [file_name("", form.name) for form in forms]
    if len(set(files)) < len(files):
        raise ValueError(f"forms {[f.name for f in forms]}: give each a name of its own, once")
    for form in forms:
        _as_lm(model, name, form, options)
    if options.chat and not has_template(model.text.tokenizer):
        raise ValueError(f"{name} has no chat template: leave it out with --no-chat (chat=False)")


def _check_kept(
    folder: Path,
    source: TaskSource,
    forms: Sequence[Form],
    options: Options,
    say: Callable[[str], Any],
) -> None:
    """Raise an error where a task or form is not what the folder's cells were run with."""
    named = {file_name("", form.name): form for form in forms}
    kept: dict[str, list[Cell]] = {}
    for cell in cells_of(folder):
        kept.setdefault(cell.task, []).append(cell)
        theirs, form = Form(cell.form, cell.k, cell.by), named.get(file_name("", cell.form))
        if form is not None and (form, options.stage) != (theirs, cell.stage):
            raise ValueError(
                f"{folder} holds {cell.task} in the form {cell.form!r} with k={cell.k}, {cell.by}, "
                f"{cell.stage}, and not {form.name!r} with k={form.k}, {form.by}, {options.stage}: "
                "give another folder, or the form another name; nothing is overwritten"
            )
    for task in filter(kept.__contains__, source.leaves):
        loaded = source.load(task)
        if isinstance(loaded, str):
            say(f"{task} cannot be compared with its results in {folder}, kept: {loaded}")
            continue
        now = loaded.hash(options.num_fewshot, FEWSHOT_SEED, options.limit)
        if changed := [cell.form for cell in kept[task] if cell.asked != now]:
            raise ValueError(
                f"{task} has changed since {folder} was written (its config, prompt or documents; "
                f"forms {', '.join(changed)}): give another folder, nothing is overwritten"
            )


def _as_lm(model: HookedHybrid, name: str, form: Form, options: Options) -> HookedHybridLM:
    """Return the model in a form."""
    from hooked_hybrid.evaluation.lm import HookedHybridLM

    lm = HookedHybridLM(
        model,
        form.k,
        options.stage,
        form.by,
        batch_size=options.batch_size,
        max_length=options.max_length,
        max_gen_toks=options.max_gen_toks,
    )
    lm.name = name
    return lm


def _run(model: HookedHybrid, name: str, loaded: Loaded, form: Form, options: Options) -> Cell:
    """Run one task under one form."""
    import numpy as np
    from lm_eval import evaluate as run_lm_eval

    task = loaded.prepared(options.num_fewshot, FEWSHOT_SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
    lm = _as_lm(model, name, form, options)
    began = time.monotonic()
    results = run_lm_eval(
        lm,
        {"tasks": {loaded.name: task}, "groups": {}, "group_map": {}},
        limit=options.limit,
        bootstrap_iters=BOOTSTRAPS,
        apply_chat_template=options.chat,
        fewshot_as_multiturn=options.chat and options.multiturn,
    )
    return _cell(loaded.name, form, results, time.monotonic() - began)


def _cell(task: str, form: Form, results: Mapping[str, Any], seconds: float) -> Cell:
    """Return what lm-eval's results say of a task."""
    numbers = {
        key: float(value)
        for key, value in results["results"][task].items()
        if "," in key and isinstance(value, Real)
    }
    main = next(key for key in numbers if "_stderr," not in key)
    metric, kept = main.split(",")
    samples = [s for s in results["samples"][task] if s["filter"] == kept]
    values = {str(s["doc_id"]): s[metric] for s in samples if metric in s}
    is_mean = all(isinstance(v, Real) for v in values.values())
    documents = {i: float(v) for i, v in values.items()} if is_mean else {}
    if not documents or abs(fmean(documents.values()) - numbers[main]) > 1e-9:
        documents = {}  # the metric is no mean over documents
    choices = [len(s["arguments"]) for s in samples]
    is_choice = results["configs"][task].get("output_type") == "multiple_choice"
    return Cell(
        task=task,
        form=form.name,
        k=form.k,
        main=main,
        value=numbers[main],
        stderr=numbers.get(f"{metric}_stderr,{kept}"),
        higher_is_better=results["higher_is_better"][task].get(metric) is not False,
        n_documents=len(samples),
        n_fewshot=int(results["n-shot"][task]),
        documents=documents,
        chance=fmean(1 / n for n in choices) if is_choice and metric == "acc" else None,
        metrics=numbers,
        seconds=seconds,
    )


__all__ = ["Evaluation", "Options", "evaluate"]
