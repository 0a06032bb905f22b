"""The work of an evaluation: one task under one form, in this process or on a worker."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.evaluation.batching import read_batch_size
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.evaluation.forms import Form, Stage
from hooked_hybrid.evaluation.tasks import Loaded, TaskSource
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.work import Job

if TYPE_CHECKING:
    from hooked_hybrid.evaluation.lm import HookedHybridLM

BOOTSTRAPS = 1000
"""Draws of lm-eval's bootstrap, for the metrics that have no standard error in closed form."""
SEED, FEWSHOT_SEED = 0, 1234
"""Seed of everything drawn while a cell runs, and of its few-shot examples: lm-eval's own."""


@dataclass(frozen=True)
class Options:
    """How the tasks are run.

    Args:
        num_fewshot: examples before each question; None is each task's own number.
        limit: documents of a task, a share if below 1; None is all.
        chat: put prompts in the model's chat template.
        multiturn: make each example a separate turn.
        stage: where heads are silenced.
        batch_size, max_length, max_gen_toks: of `HookedHybridLM`.

    Raises:
        ValueError: an invalid limit or batch size, or fewer than 0 examples.
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


class EvaluationJob(Job[tuple[str, str], Cell]):
    """The run of one task in one form: an item is the names of the two, its result their cell.

    A worker loads the tasks itself, from the same paths as this process.

    Args:
        source: of the tasks.
        names, include_path: arguments of `source`.
        name: of the model.
        forms: by name.
        options: of the tasks.
    """

    def __init__(
        self,
        source: TaskSource,
        names: Sequence[str],
        include_path: Path | None,
        name: str,
        forms: Sequence[Form],
        options: Options,
    ) -> None:
        self.names = list(names)
        self.include_path = None if include_path is None else include_path.resolve()
        self.name, self.options = name, options
        self.forms = {form.name: form for form in forms}
        self._source: TaskSource | None = source
        self._last: tuple[Loaded, str] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return the job for a worker, without data sets."""
        return {**vars(self), "_source": None, "_last": None}

    def read(self, task: str) -> tuple[Loaded, str] | str:
        """Return a task with its data and hash, or why it is not available; cache the last one."""
        if self._last is None or self._last[0].name != task:
            self._last = None
            if self._source is None:
                logging.getLogger("lm_eval").setLevel(logging.ERROR)
                self._source = TaskSource(self.names, self.include_path)
            loaded = self._source.load(task)
            if isinstance(loaded, str):
                return loaded
            options = self.options
            self._last = loaded, loaded.hash(options.num_fewshot, FEWSHOT_SEED, options.limit)
        return self._last

    def __call__(self, model: HookedHybrid, items: Sequence[tuple[str, str]]) -> Iterator[Cell]:
        """Yield the cell of each task and form.

        Raises:
            OSError: a worker cannot read a task.
            ValueError: a task has no numeric metric.
        """
        for task, name in items:
            found, form = self.read(task), self.forms[name]
            if isinstance(found, str):
                raise OSError(f"a worker cannot read {task}: {found}")
            cell = _run(model, self.name, found[0], form, self.options)
            yield replace(cell, by=form.by, stage=self.options.stage, asked=found[1])

    def describe(self, items: Sequence[tuple[str, str]]) -> str:
        """Return the tasks and forms as text."""
        return ", ".join(f"{task} ({form})" for task, form in items)


def as_lm(model: HookedHybrid, name: str, form: Form, options: Options) -> HookedHybridLM:
    """Return the model with a form's hooks, for lm-eval."""
    from hooked_hybrid.evaluation.lm import HookedHybridLM

    lm = HookedHybridLM(
        model,
        form.k,
        "both" if form.k is None else options.stage,
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
    lm = as_lm(model, name, form, options)
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
    """Return the cell of a task from lm-eval's results."""
    numbers = {
        key: float(value)
        for key, value in results["results"][task].items()
        if "," in key and isinstance(value, Real)
    }
    main = next((key for key in numbers if "_stderr," not in key), None)
    if main is None:
        raise ValueError(f"{task} has no numeric metric: leave it out")
    metric, kept = main.split(",")
    samples = [s for s in results["samples"][task] if s["filter"] == kept]
    values = {str(s["doc_id"]): s[metric] for s in samples if metric in s}
    is_mean = all(isinstance(v, Real) for v in values.values())
    documents = {i: float(v) for i, v in values.items()} if is_mean else {}
    if not documents or abs(fmean(documents.values()) - numbers[main]) > 1e-9:
        documents = {}  # the metric is not a mean over documents
    is_twice = any(key.startswith("acc_mutual_info,") for key in numbers)  # without context too
    choices = [len(s["arguments"]) // (1 + is_twice) for s in samples]
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
