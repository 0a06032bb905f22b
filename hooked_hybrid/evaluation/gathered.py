"""An evaluation with the cells of earlier calls in its folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from hooked_hybrid.evaluation.cells import calls_of, cells_of
from hooked_hybrid.evaluation.forms import Form
from hooked_hybrid.evaluation.running import Evaluation


def gather(evaluation: Evaluation, folder: Path) -> Evaluation:
    """Return an evaluation with all cells of its folder, those of earlier calls first.

    If several calls include a missing task, the reason is the last call's. Cells of a stopped call
    are included, but the means over tasks (`Evaluation.forms_of`) use only the forms of calls that
    ran to their end.
    """
    groups: dict[str, tuple[str, ...]] = {}
    forms: dict[str, Form] = {}
    missing: dict[str, str] = {}
    asked: dict[str, dict[str, None]] = {}
    calls = [
        (
            {name: tuple(leaves) for name, leaves in call["groups"].items()},
            [Form(**form) for form in call["forms"]],
            call["missing"],
        )
        for call in calls_of(folder)
    ]
    for own, theirs, why in [*calls, (evaluation.groups, evaluation.forms, evaluation.missing)]:
        groups |= own
        forms |= {form.name: form for form in theirs}
        ran = {leaf for leaves in own.values() for leaf in leaves}
        missing = {task: reason for task, reason in missing.items() if task not in ran} | {**why}
        for name in own:
            asked.setdefault(name, {}).update((form.name, None) for form in theirs)
    cells = {(cell.task, cell.form): cell for cell in (*cells_of(folder), *evaluation.cells)}
    forms |= {c.form: Form(c.form, c.k, c.by) for c in cells.values() if c.form not in forms}
    known = {leaf for leaves in groups.values() for leaf in leaves}
    groups |= {cell.task: (cell.task,) for cell in cells.values() if cell.task not in known}
    tasks = dict.fromkeys(leaf for leaves in groups.values() for leaf in leaves)
    return replace(
        evaluation,
        groups=groups,
        forms=tuple(forms.values()),
        cells=[cells[task, form] for task in tasks for form in forms if (task, form) in cells],
        missing=missing,
        forms_of={name: tuple(names) for name, names in asked.items()},
    )
