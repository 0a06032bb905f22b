"""Tables, figure and report of an evaluation, with the thesis's results."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.evaluation.benchmarks import BENCHMARKS
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.evaluation.forms import Form, title
from hooked_hybrid.evaluation.gaps import Estimate
from hooked_hybrid.evaluation.gathered import gather
from hooked_hybrid.evaluation.lines import Line, lines
from hooked_hybrid.evaluation.picture import score_picture
from hooked_hybrid.evaluation.running import Evaluation, Options
from hooked_hybrid.outputs.tables import markdown_cell, write_csv
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    import pandas as pd


@dataclass(frozen=True)
class Written:
    """The paths of the files."""

    report: Path
    table: Path
    results: Path
    picture: Path | None = None


def write(
    evaluation: Evaluation, card: Mapping[str, str], options: Options, out: Path, command: str = ""
) -> Written:
    """Write results.json, results.csv, report.md and scores.png, each whole or not at all.

    Cells of earlier calls in the folder are included; see `gathered.gather`.

    Args:
        evaluation: the results.
        card: facts about the model.
        options: how the tasks were run.
        out: folder for the files.
        command: the command line that runs it again.
    """
    written = Written(out / "report.md", out / "results.csv", out / "results.json")
    n_new, evaluation = len(evaluation.cells), gather(evaluation, out)
    rows = lines(evaluation)
    write_csv(results_table(evaluation), written.table)
    said = {
        "model": dict(card),
        "options": asdict(options),
        "forms": [asdict(form) for form in evaluation.forms],
        "cells": [asdict(cell) for cell in evaluation.cells],
        "missing": dict(evaluation.missing),
    }
    with replacing(written.results) as temporary:
        temporary.write_text(json.dumps(said, indent=1) + "\n", encoding="utf-8")
    picture = None
    if drawn := [row for row in rows if row.is_share]:
        picture = out / "scores.png"
        with replacing(picture) as temporary:
            image = BytesIO()  # on a full disk matplotlib raises another error of its own
            score_picture(drawn, evaluation.forms).savefig(image, format="png", dpi=150)
            temporary.write_bytes(image.getvalue())
    parts = [f"```\n{command}\n```"] if command else []
    parts += [_EARLIER] if n_new < len(evaluation.cells) else []
    text = _report(evaluation, rows, card, options, parts, picture)
    with replacing(written.report) as temporary:
        temporary.write_text(text, encoding="utf-8")
    return replace(written, picture=picture)


def results_table(evaluation: Evaluation) -> pd.DataFrame:
    """Return every metric of every cell: one row each, in lm-eval's own units."""
    import pandas as pd

    columns = "task form k metric value stderr main documents fewshot chance seconds".split()
    rows = []
    for cell in evaluation.cells:
        for name, value in cell.metrics.items():
            metric, kept = name.split(",")
            if metric.endswith("_stderr"):
                continue
            stderr = cell.metrics.get(f"{metric}_stderr,{kept}")
            about = (cell.n_documents, cell.n_fewshot, cell.chance, round(cell.seconds, 2))
            rows.append(
                (cell.task, cell.form, cell.k, name, value, stderr, name == cell.main, *about)
            )
    table = pd.DataFrame(rows, columns=columns)
    return table.astype({"k": "Int64"})


def _report(
    evaluation: Evaluation,
    rows: Sequence[Line],
    card: Mapping[str, str],
    options: Options,
    commands: Sequence[str],
    picture: Path | None,
) -> str:
    forms = evaluation.forms
    others = [form for form in forms if form.name != "base"]
    parts = [f"# Language benchmarks: {markdown_cell(card.get('model', 'a model'))}"]
    parts.append(_table(["", ""], [[name, value] for name, value in card.items()]))
    parts += [*commands, _how(options, forms, evaluation.cells)]
    if rows:
        head = ["task", "metric", "documents", *map(title, forms), "at random"]
        body = [
            [
                *(row.name, row.metric, f"{row.n_documents:,}"),
                *(_with_error(row.scores.get(form.name)) for form in forms),
                "" if row.chance is None else f"{row.chance:.1f}",
            ]
            for row in rows
        ]
        parts += ["## Scores", "Score and standard error.", _table(head, body)]
    if picture is not None:
        parts.append(f"![Scores by task and form]({picture.name})")
    if others and any(row.gaps for row in rows):
        body = [[row.name, *(_with_interval(row.gaps.get(f.name)) for f in others)] for row in rows]
        parts += ["## Base minus form", _GAPS, _table(["task", *map(title, others)], body)]
    parts += _tabulate_published(evaluation, rows, others, card)
    if evaluation.missing:
        body = [[task, reason] for task, reason in evaluation.missing.items()]
        parts += ["## Not run", "These data sets could not be had.", _table(["task", "why"], body)]
    return "\n\n".join(parts) + "\n"


_EARLIER = (
    "Tasks and forms that earlier commands left in this folder are shown, too; the model and how "
    "the tasks were run are the same."
)
_GAPS = (
    "In points (of perplexities and the like, as they are), with a 95% interval. Where the score "
    "is a mean over documents the difference is taken document by document, as both forms saw the "
    "same ones, and the interval is right for few of these too; else it is the normal one of "
    "lm-eval's standard errors. Tasks are taken as independent."
)


def _how(options: Options, forms: Sequence[Form], cells: Sequence[Cell]) -> str:
    shots = "each task's own" if options.num_fewshot is None else str(options.num_fewshot)
    own = {cell.task: cell.n_fewshot for cell in cells if cell.n_fewshot != options.num_fewshot}
    if own and options.num_fewshot is not None:
        shots += f", but {', '.join(f'{n} in {task}' for task, n in own.items())}"
    elif own:
        shots += f" ({', '.join(map(str, sorted(set(own.values()))))})"
    chat = "in the chat template" if options.chat else "as plain text"
    turns = ", each example a turn of its own" if options.chat and options.multiturn else ""
    where = "in prefill and generation" if options.stage == "both" else "in generation only"
    limit = "all" if options.limit is None else f"the first {options.limit}"
    if options.limit is not None and options.limit < 1:
        limit = f"the first {options.limit:.0%}"
    text = (
        f"Examples before a question: {shots}. Prompts {chat}{turns}. Documents of a task: {limit}."
        f" Heads are silenced {where}; log-likelihoods are scored in prefill."
    )
    if options.stage == "generation" and any(form.k is not None for form in forms):
        text += " So nothing is silenced in tasks that score log-likelihoods: forms must be equal."
    return text


def _tabulate_published(
    evaluation: Evaluation, rows: Sequence[Line], others: Sequence[Form], card: Mapping[str, str]
) -> list[str]:
    """Return the thesis's figures for the benchmarks of this evaluation."""
    asked = [BENCHMARKS[name] for name in evaluation.groups if name in BENCHMARKS]
    if not asked:
        return []
    body = []
    for benchmark in asked:
        means = [r for r in rows if r.is_mean and r.name.startswith(f"{benchmark.tasks[0]}, ")]
        for form in others:
            if form.name in benchmark.gaps:
                ours = _with_interval(means[0].gaps.get(form.name)) if means else ""
                ours = f"{ours}, {means[0].name.split(', ')[1]}" if ours else "not run"
                about = f"{benchmark.name}, base minus {form.name}"
                body.append([about, str(benchmark.gaps[form.name]), ours])
    source = f"{asked[0].source}, Figure 5.1: {asked[0].model}"
    head = ["points", source, card.get("model", "this model")]
    return ["## Beside the thesis", _table(head, body), _CAUTION]


_CAUTION = (
    "The thesis's figures are of Jamba-Mini-1.6 with its chat template (GLUE without examples, "
    "MMLU with 5); those of another model neither confirm nor refute them."
)


def _with_error(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    value = f"{estimate.value:.1f}" if abs(estimate.value) < 1000 else f"{estimate.value:.4g}"
    return value if estimate.stderr is None else f"{value} ± {estimate.stderr:.1f}"


def _with_interval(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.interval is None:
        return f"{estimate.value:.1f} (no interval)"
    low, high = estimate.interval
    alike = ", the same in every document" if estimate.stderr == 0 else ""
    return f"{estimate.value:.1f} ({low:.1f} to {high:.1f}{alike})"


def _table(head: Sequence[str], body: Sequence[Sequence[Any]]) -> str:
    def line(cells: Sequence[Any]) -> str:
        return "| " + " | ".join(map(markdown_cell, cells)) + " |"

    return "\n".join([line(head), "|" + " --- |" * len(head), *map(line, body)])
