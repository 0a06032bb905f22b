"""The lines of the tables and the figure of an evaluation: for each task and each mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hooked_hybrid.evaluation.benchmarks import BENCHMARKS
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.evaluation.gaps import SHARES, Estimate, gap, mean, score_of
from hooked_hybrid.evaluation.running import Evaluation


@dataclass(frozen=True)
class Line:
    """One line of the tables: a task, or the mean of a group's tasks."""

    name: str
    metric: str
    n_documents: int
    chance: float | None
    scores: Mapping[str, Estimate]
    gaps: Mapping[str, Estimate]
    is_mean: bool = False

    @property
    def is_share(self) -> bool:
        """Whether all is in points of a hundred."""
        return all(metric in SHARES for metric in self.metric.split(", "))


def lines(evaluation: Evaluation) -> list[Line]:
    """Return a line for each task that ran, and for the mean of each group, which comes first.

    A mean takes the tasks that ran in every form that the group was run in, where all are in
    points; see `benchmarks.Benchmark.mean` for the weights. Groups that no paper ran weigh tasks
    equally. A task of several groups has one line.
    """
    found: list[Line] = []
    every = tuple(form.name for form in evaluation.forms)
    for name, leaves in evaluation.groups.items():
        own = [_task_line(evaluation, leaf) for leaf in leaves if _cells(evaluation, leaf)]
        forms = evaluation.forms_of.get(name, every)
        whole = [line for line in own if all(form in line.scores for form in forms)]
        if len(whole) > 1 and all(line.is_share for line in whole):
            found.append(_mean_line(name, len(leaves), whole, forms))
        shown = {line.name for line in found}
        found += [line for line in own if line.name not in shown]
    return found


def _cells(evaluation: Evaluation, task: str) -> dict[str, Cell]:
    found = {form.name: evaluation.cell(task, form.name) for form in evaluation.forms}
    return {name: cell for name, cell in found.items() if cell is not None}


def _task_line(evaluation: Evaluation, task: str) -> Line:
    cells = _cells(evaluation, task)
    some, base = next(iter(cells.values())), cells.get("base")
    gaps = {n: gap(base, c) for n, c in cells.items() if n != "base"} if base is not None else {}
    scores = {n: score_of(c) for n, c in cells.items()}
    metric = some.main.split(",")[0]
    chance = None if some.chance is None else 100 * some.chance
    return Line(task, metric, some.n_documents, chance, scores, gaps)


def _mean_line(name: str, n_leaves: int, parts: Sequence[Line], forms: Sequence[str]) -> Line:
    """Return the mean over tasks of which each ran in every one of some forms."""
    sizes = [part.n_documents for part in parts]
    by: Literal["documents", "tasks"] = BENCHMARKS[name].mean if name in BENCHMARKS else "tasks"
    scores = {n: mean([part.scores[n] for part in parts], sizes, by) for n in forms}
    compared = [n for n in forms if all(n in part.gaps for part in parts)]
    gaps = {n: mean([part.gaps[n] for part in parts], sizes, by) for n in compared}
    lots = [Estimate(part.chance, None) for part in parts if part.chance is not None]
    lot = mean(lots, sizes, by).value if len(lots) == len(parts) else None
    count = f"{len(parts)} tasks" + ("" if len(parts) == n_leaves else f" of {n_leaves}")
    metrics = ", ".join(dict.fromkeys(part.metric for part in parts))
    title = f"{name}, mean of {count}, each {by.removesuffix('s')} alike"
    return Line(title, metrics, sum(sizes), lot, scores, gaps, is_mean=True)
