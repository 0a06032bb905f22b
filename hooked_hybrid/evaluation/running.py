"""An evaluation: tasks by forms, each run once, whatever data sets can be had."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from hooked_hybrid.evaluation.cells import Cell, Cells
from hooked_hybrid.evaluation.forms import FORMS, Form, Stage
from hooked_hybrid.evaluation.tasks import Loaded, TaskSource
from hooked_hybrid.model import HookedHybrid

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
    """

    num_fewshot: int | None = None
    limit: int | float | None = None
    chat: bool = False
    multiturn: bool = False
    stage: Stage = "both"
    batch_size: int | str = "auto"
    max_length: int | None = None
    max_gen_toks: int = 256


@dataclass(frozen=True)
class Evaluation:
    """What came out: cells in the order of tasks and forms, and why tasks are missing."""

    groups: Mapping[str, tuple[str, ...]]
    forms: tuple[Form, ...]
    cells: Sequence[Cell]
    missing: Mapping[str, str] = field(default_factory=dict)

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
        name: of the model, which tells evaluations apart.
        tasks: lm-eval's names of tasks, groups or tags.
        forms: what is silenced.
        options: how tasks are run.
        out: folder of the results, new or empty unless resumed.
        resume: go on with what it holds.
        include_path: folder of further tasks, in lm-eval's format.
        say: is told of each cell before it runs.

    Raises:
        ValueError: an unknown task, a form that the model has no heads for, another evaluation in
            the folder; then nothing has run.
        FileExistsError: the folder is not empty, and `resume` is false.
    """
    options = options or Options()
    for form in forms:
        form.hooks(model.cfg)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns of defaults, task by task
    source = TaskSource(tasks, include_path)
    # Tasks and forms may be added when resuming; the rest must be the same.
    cells = Cells(out, {"model": name, **_weights(model), **asdict(options)}, resume)
    found: list[Cell] = []
    missing: dict[str, str] = {}
    for i, task in enumerate(source.leaves):
        todo = [form for form in forms if cells.get(task, form.name) is None]
        loaded = source.load(task) if todo else None
        if isinstance(loaded, str):
            missing[task] = loaded
            say(f"{task} is left out: {loaded}")
        elif loaded is not None:
            for form in todo:
                say(f"task {i + 1} of {len(source.leaves)}: {task}, {form.name}")
                cells.add(_run(model, name, loaded, form, options))
        found += [c for form in forms if (c := cells.get(task, form.name)) is not None]
    return Evaluation(source.groups, tuple(forms), found, missing)


def _weights(model: HookedHybrid) -> dict[str, Any]:
    """Return what tells models of one name apart, cheaply."""
    some = model.W_E.detach().flatten()[:: max(1, model.W_E.numel() // 1000)].double()
    n_parameters = sum(p.numel() for p in model.parameters())
    return {"n_parameters": n_parameters, "dtype": str(model.dtype), "sum": float(some.sum())}


def _run(model: HookedHybrid, name: str, loaded: Loaded, form: Form, options: Options) -> Cell:
    """Run one task under one form."""
    import numpy as np
    from lm_eval import evaluate as run_lm_eval

    from hooked_hybrid.evaluation.lm import HookedHybridLM

    task = loaded.prepared(options.num_fewshot, FEWSHOT_SEED)
    random.seed(SEED)
    np.random.seed(SEED)
    torch.manual_seed(SEED)
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
