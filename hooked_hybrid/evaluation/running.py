"""An evaluation: tasks by forms, each run once, for all data sets that are available."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.evaluation.cells import Cell, EvaluationCells, cells_of, file_name
from hooked_hybrid.evaluation.conversation import has_template
from hooked_hybrid.evaluation.forms import FORMS, Form
from hooked_hybrid.evaluation.tasks import TaskSource
from hooked_hybrid.evaluation.work import FEWSHOT_SEED, EvaluationJob, Options, as_lm
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.options import refuse_ignored, require
from hooked_hybrid.outputs.folders import claim
from hooked_hybrid.runs.identity.model import hash_once, model_identity
from hooked_hybrid.runs.work import results

if TYPE_CHECKING:
    from hooked_hybrid.runs.ray_workers import RayWorkers


@dataclass(frozen=True)
class Evaluation:
    """The results: cells in the order of tasks and forms, and the reasons for missing tasks.

    `forms_of` lists the forms in which a group was run, if not all.
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
    workers: RayWorkers | None = None,
) -> Evaluation:
    """Run tasks of lm-eval on a model in several forms.

    A task whose data set is not available is left out, with the reason; the others run. A stopped
    run leaves complete cells, and `resume` continues after them.

    Args:
        model: with a tokenizer.
        name: of the model.
        tasks: lm-eval's names of tasks, groups or tags.
        forms: the heads kept, of each form.
        options: of the tasks.
        out: folder of the results, new or empty unless resumed.
        resume: continue with the cells in `out`: tasks and forms may be added, the rest is
            unchanged.
        include_path: folder of further tasks, in lm-eval's format.
        say: called with a message for each cell before it runs, or when a worker has finished it.
        workers: that run the cells instead of this process; they load the tasks themselves.

    Raises:
        ValueError: an unknown task, a form with more heads than the model has, options that the
            model does not support, another evaluation in the folder, or a task or form that has
            changed since its cells were run; raised before anything runs.
        FileExistsError: the folder is not empty, and `resume` is false; or it is not an evaluation
            folder.
        OSError: the results cannot be written, or another run writes to the folder.
        ModuleNotFoundError: lm-eval is not installed; the message names the extra to install.
    """
    require("lm_eval")
    with claim(out, resume), hash_once():
        return _evaluate(
            model, name, tasks, forms, options or Options(), out, resume, include_path, say, workers
        )


def _evaluate(
    model: HookedHybrid,
    name: str,
    tasks: Sequence[str],
    forms: Sequence[Form],
    options: Options,
    out: Path,
    resume: bool,
    include_path: Path | None,
    say: Callable[[str], Any],
    workers: RayWorkers | None,
) -> Evaluation:
    """Run an evaluation in a folder that is locked for it."""
    _check(model, name, forms, options)
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # it warns about defaults, task by task
    source = TaskSource(tasks, include_path)
    if all(source.sets_no_examples(task) for task in source.leaves):
        why = f"{', '.join(tasks)} set 0 examples in their own config"
        refuse_ignored(why, num_fewshot=options.num_fewshot or None)
    cells = EvaluationCells(out, experiment_of(model, name, options), resume)
    _check_kept(out, source, forms, options, say)
    job = EvaluationJob(source, tasks, include_path, name, forms, options)
    missing: dict[str, str] = {}
    asked: dict[str, str] = {}

    def units() -> Iterator[list[tuple[str, str]]]:
        for i, task in enumerate(source.leaves):
            todo = [form.name for form in forms if cells.get(task, form.name) is None]
            read = job.read(task) if todo else "done"
            if todo and isinstance(read, str):
                missing[task] = read
                say(f"{task} is left out: {read}")
            elif not isinstance(read, str):
                asked[task] = read[1]
                if options.num_fewshot and not read[0].n_fewshot:
                    say(f"{task} sets 0 examples in its own config")
                for form in todo:
                    if workers is None:
                        say(f"task {i + 1} of {len(source.leaves)}: {task}, {form}")
                    yield [(task, form)]

    with closing(results(model, job, units(), workers)) as run:
        for (task, form), cell in run:
            if cell.asked != asked[task]:
                raise ValueError(
                    f"the files of {task} differ between a worker and this process: "
                    f"give it the same"
                )
            if workers is not None:
                say(f"{task}, {form}: done")
            cells.add(cell)
    found = [c for t in source.leaves for f in forms if (c := cells.get(t, f.name)) is not None]
    said = {"groups": source.groups, "forms": [asdict(form) for form in forms]}
    cells.note({**said, "missing": missing})
    return Evaluation(source.groups, tuple(forms), found, missing)


def experiment_of(model: HookedHybrid, name: str, options: Options) -> dict[str, Any]:
    """Return what the cells of an evaluation depend on other than their tasks and forms."""
    return {"model": name, "identity": model_identity(model), **asdict(options)}


def _check(model: HookedHybrid, name: str, forms: Sequence[Form], options: Options) -> None:
    """Raise an error if forms or options do not fit the model, or two forms conflict."""
    files = [file_name("", form.name) for form in forms]
    if len(set(files)) < len(files):
        raise ValueError(f"forms {[f.name for f in forms]}: give each its own name")
    if all(form.k is None for form in forms):
        whole = "every form keeps all heads"
        refuse_ignored(whole, stage=None if options.stage == "both" else options.stage)
    for form in forms:
        as_lm(model, name, form, options)
    if options.chat and not has_template(model.text.tokenizer):
        raise ValueError(f"{name} has no chat template: leave it out with --no-chat (chat=False)")


def _check_kept(
    folder: Path,
    source: TaskSource,
    forms: Sequence[Form],
    options: Options,
    say: Callable[[str], Any],
) -> None:
    """Raise an error if a task or form differs from that of the folder's cells."""
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
