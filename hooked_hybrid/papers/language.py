"""Language benchmarks with heads silenced: base, sparse and ablated, if the data is available."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hooked_hybrid.evaluation import gaps
from hooked_hybrid.evaluation.benchmarks import BENCHMARKS
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.evaluation.forms import FORMS
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.papers.checks import by_word
from hooked_hybrid.papers.claims import Check, Finding
from hooked_hybrid.papers.evidence import Evidence
from hooked_hybrid.runs.verdicts import judge

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hooked_hybrid.runs.ray_workers import RayWorkers

NO_DATA = "data set not available"
_COLOURS = ("#0072B2", "#E69F00", "#D55E00")


@dataclass(frozen=True)
class Scores:
    """The cells of a benchmark by form and task, and the reasons for missing ones.

    `reasons` are the loader's messages. `chat` is whether prompts were conversations, as the
    thesis's were.
    """

    cells: Mapping[str, Mapping[str, Cell]] = field(default_factory=dict)
    why_not: str = ""
    reasons: str = ""
    chat: bool = True


def measure(
    suite: str,
    model: HookedHybrid,
    name: str,
    folder: Path,
    n_documents: int | None,
    include_path: Path | None = None,
    say: Callable[[str], Any] = print,
    workers: RayWorkers | None = None,
) -> Scores:
    """Run a benchmark of `evaluation.benchmarks` in its forms; existing cells are not run again.

    Args:
        suite: a name in `BENCHMARKS`.
        model: with a tokenizer.
        name: of the model.
        folder: in which a folder of the benchmark's name is made.
        n_documents: first documents of each task; None is all.
        include_path: folder of tasks in lm-eval's format; a group of the benchmark's name there
            replaces lm-eval's.
        say: called with a message for each task.
        workers: that run the tasks instead of this process.

    Returns:
        The cells that could be run; if there are none, the reason.

    Raises:
        ValueError: the folder holds another evaluation.
    """
    if find_spec("lm_eval") is None:
        return Scores(why_not="lm-eval is not installed: pip install 'hooked-hybrid[eval]'")
    from hooked_hybrid.evaluation.conversation import has_template
    from hooked_hybrid.evaluation.running import Options, evaluate

    benchmark = BENCHMARKS[suite]
    forms = [FORMS[form] for form in benchmark.forms]
    chat = benchmark.chat and has_template(model.text.tokenizer)
    options = Options(
        num_fewshot=benchmark.num_fewshot,
        limit=n_documents,
        chat=chat,
        multiturn=benchmark.multiturn,
        stage=benchmark.stage,
    )
    try:
        for form in forms:
            form.hooks(model.cfg)
    except ValueError as error:  # too few heads for the sparse form
        return Scores(why_not=str(error))
    where = (folder / suite, True, include_path, say, workers)
    found = evaluate(model, name, benchmark.tasks, forms, options, *where)
    cells: dict[str, dict[str, Cell]] = {}
    for cell in found.cells:
        cells.setdefault(cell.form, {})[cell.task] = cell
    reasons = "; ".join(dict.fromkeys(found.missing.values()))
    return Scores(cells, NO_DATA if reasons else "", reasons, chat)


def gap(suite: str, form: str, least: float, most: float, under: str = "base") -> Check:
    """Return a check that a form is `least` to `most` points below another, on average.

    The average is over tasks that ran in both forms; the 95% interval is over documents, paired
    where both forms saw the same ones. If the difference is equal for all documents, the form may
    have changed nothing, and the claim is untested. It is also untested if the base form is at
    chance, which has nothing to lose.
    """

    def check(evidence: Evidence) -> Finding:
        scores = evidence.language.get(suite, Scores(why_not=NO_DATA))
        above, below = (scores.cells.get(name, {}) for name in (under, form))
        tasks = [task for task in above if task in below]
        if not tasks:
            return Finding(None, scores.why_not or f"not run: {form}")
        if at_chance := _at_chance(suite, scores, tasks):
            return Finding(None, at_chance, _how(scores, tasks))
        parts = [gaps.gap(above[task], below[task]) for task in tasks]
        found = gaps.mean(parts, [above[t].n_documents for t in tasks], BENCHMARKS[suite].mean)
        means = [_mean(suite, cells, tasks).value for cells in (above, below)]
        said = f"{means[0]:.1f} and {means[1]:.1f}: {found.value:+.1f} points below"
        if found.interval is None:
            return Finding(None, f"{said}, without an interval", _how(scores, tasks))
        low, high = found.interval
        ours = f"{said} (95% {low:+.1f} to {high:+.1f})"
        if found.stderr == 0:
            return Finding(None, f"{ours}: all documents alike", _how(scores, tasks))
        word = judge("within", low, high, least, most)
        return by_word(ours, word, _how(scores, tasks))

    return check


def near_chance(suite: str, form: str, within: float) -> Check:
    """Return a check that a form's mean is within a number of points of a random choice.

    It is untested if the base form is at chance too, as that shows nothing about the heads.
    """

    def check(evidence: Evidence) -> Finding:
        scores = evidence.language.get(suite, Scores(why_not=NO_DATA))
        cells = scores.cells.get(form, {})
        if not cells or any(cell.chance is None for cell in cells.values()):
            return Finding(None, scores.why_not or f"not run, or without choices: {form}")
        if at_chance := _at_chance(suite, scores, list(cells)):
            return Finding(None, at_chance, _how(scores, list(cells)))
        mean, by_lot = _mean(suite, cells, list(cells)), _by_lot(suite, cells, list(cells)).value
        if mean.interval is None:
            return Finding(None, f"{mean.value:.1f}, without an interval")
        low, high = mean.interval
        ours = f"{mean.value:.1f} (95% {low:.1f} to {high:.1f}), at random {by_lot:.1f}"
        word = judge("within", low, high, by_lot - within, by_lot + within)
        return by_word(ours, word, _how(scores, list(cells)))

    return check


def _mean(suite: str, cells: Mapping[str, Cell], tasks: Sequence[str]) -> gaps.Estimate:
    parts = [gaps.score_of(cells[task]) for task in tasks]
    return gaps.mean(parts, [cells[task].n_documents for task in tasks], BENCHMARKS[suite].mean)


def _by_lot(suite: str, cells: Mapping[str, Cell], tasks: Sequence[str]) -> gaps.Estimate:
    """Return the score of a random choice, averaged like the scores; 0 for a correlation."""
    parts = [gaps.Estimate((cells[t].chance or 0) * gaps.scale(cells[t]), 0.0) for t in tasks]
    return gaps.mean(parts, [cells[task].n_documents for task in tasks], BENCHMARKS[suite].mean)


def _at_chance(suite: str, scores: Scores, tasks: Sequence[str]) -> str:
    """Return why the base form is not known to be above chance, or an empty text if it is."""
    base = scores.cells.get("base", {})
    tasks = [task for task in tasks if task in base]
    if not tasks:
        return "not run: base"
    mean, by_lot = _mean(suite, base, tasks), _by_lot(suite, base, tasks).value
    said = f"base {mean.value:.1f}, at random {by_lot:.1f}"
    if mean.interval is None:
        return f"{said}, without an interval"
    low, high = mean.interval
    above = f"base is at chance: {said} (95% {low:.1f} to {high:.1f})"
    return "" if low > by_lot else above


def _how(scores: Scores, tasks: Sequence[str]) -> str:
    parts = [f"{len(tasks)} tasks"]
    parts += [] if scores.chat else ["no chat template"]
    parts += [f"not all: {scores.why_not}"] if scores.why_not else []
    return ", ".join(parts)


def rows_of(*suites: str) -> Callable[[Evidence], tuple[list[str], list[list[str]]]]:
    """Return a function that makes the table of benchmarks: a row a task, a column a form."""

    def rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
        found: list[list[str]] = []
        forms = list(dict.fromkeys(f for suite in suites for f in BENCHMARKS[suite].forms))
        for suite in suites:
            scores = evidence.language.get(suite, Scores(why_not=NO_DATA))
            tasks = dict.fromkeys(task for cells in scores.cells.values() for task in cells)
            name = BENCHMARKS[suite].name
            for task in tasks:
                cells = [scores.cells.get(form, {}).get(task) for form in forms]
                found.append([name, task, *("" if c is None else _said(c) for c in cells)])
            if scores.why_not or not tasks:
                why = ": ".join(filter(None, ("untested", scores.why_not, scores.reasons)))
                found.append([name, why, *("" for _ in forms)])
        return ["benchmark", "task", *forms], found

    return rows


def _said(cell: Cell) -> str:
    score = gaps.score_of(cell)
    error = "" if score.stderr is None else f" (s.e. {score.stderr:.1f})"
    return f"{score.value:.1f}{error}"


def bars_of(*suites: str) -> Callable[[Evidence], Figure | None]:
    """Return a function that draws scores by task and form, or None if nothing could be run."""

    def draw(evidence: Evidence) -> Figure | None:
        bars = [
            (f"{BENCHMARKS[suite].name}: {task}", form, gaps.score_of(cell))
            for suite in suites
            for form, cells in evidence.language.get(suite, Scores()).cells.items()
            for task, cell in cells.items()
        ]
        if not bars:
            return None
        names = list(dict.fromkeys(name for name, _, _ in bars))
        forms = list(dict.fromkeys(form for _, form, _ in bars))
        figure = new_figure(max(5.0, 2 + 0.6 * len(names)), 4.6)
        axes = figure.subplots()
        for i, (form, colour) in enumerate(zip(forms, _COLOURS, strict=False)):
            own = [(names.index(name), e) for name, of, e in bars if of == form]
            places = [place + 0.27 * (i - (len(forms) - 1) / 2) for place, _ in own]
            ends = np.array([e.interval or (e.value, e.value) for _, e in own])
            values = np.array([e.value for _, e in own])
            errors = np.stack([values - ends[:, 0], ends[:, 1] - values]).clip(min=0).tolist()
            axes.bar(places, list(values), 0.25, yerr=errors, label=form, color=colour)
        axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize=8)
        axes.set(ylabel="score (points of a hundred)")
        figure.legend(loc="outside upper center", ncols=len(forms), frameon=False)
        return figure

    return draw
