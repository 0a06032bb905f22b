"""Results of an evaluation, one file for each task and form; existing ones are not run again."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hooked_hybrid.evaluation.forms import Form, HeadChoice, Stage
from hooked_hybrid.outputs.folders import holds_results, remove_unfinished, replacing
from hooked_hybrid.outputs.foreign import (
    LARGEST_RESULTS,
    one_line,
    printable,
    read_json,
    refuse_link,
)
from hooked_hybrid.runs.identity.comparing import changes, refusal

EXPERIMENT, CALLS = "evaluation.json", "calls.json"
FORMAT = 1
_CALL = {"groups", "forms", "missing"}
_MOST = 2**63
"""Bound of whole numbers: a larger one is no count, and no number that a table can hold."""


@dataclass(frozen=True)
class Cell:
    """One task under one form.

    `metrics` are lm-eval's, named as it names them ("acc,none", "acc_stderr,none"). `main` is the
    task's first metric, `value` and `stderr` its figures, `documents` its value on each document
    where it is a mean over documents, by the document's index. `chance` is the expected score of a
    random choice among the answers, None without a choice. `by` is how the form's heads are chosen,
    `stage` the stage in which the others are silenced; `asked` is the hash of the task
    (`tasks.Loaded.hash`).
    """

    task: str
    form: str
    k: int | None
    main: str
    value: float
    stderr: float | None
    higher_is_better: bool
    n_documents: int
    n_fewshot: int
    documents: dict[str, float]
    chance: float | None
    metrics: dict[str, float]
    seconds: float
    by: HeadChoice = "entropy"
    stage: Stage = "both"
    asked: str = ""


class EvaluationCells:
    """The cells of one experiment in a folder, which the caller must have locked (`folders.claim`).

    Args:
        folder: new, empty, or that of the same experiment; one without a cell may change it.
        experiment: everything that the cells depend on, as JSON-able values.
        resume: continue the results in the folder.

    Raises:
        FileExistsError: the folder is not empty and `resume` is false, or it is not an evaluation
            folder.
        ValueError: it contains another experiment, or files that are damaged or of a newer version.
        OSError: it cannot be written.
    """

    def __init__(self, folder: Path, experiment: Mapping[str, Any], resume: bool = False) -> None:
        self.folder, path = folder, folder / EXPERIMENT
        refuse_link(folder / "cells", path, folder / CALLS)
        is_used = holds_results(folder)
        if is_used and not resume:
            raise FileExistsError(
                f"{folder} is not empty: continue with --resume (resume=True), or give another "
                "folder"
            )
        if is_used and not path.exists():
            raise FileExistsError(
                f"{folder} is not empty and holds no evaluation: give another folder, nothing is "
                "overwritten"
            )
        now = json.loads(json.dumps(dict(experiment)))
        before = _experiment_in(path) if is_used else None
        has_cells = any(
            [_cell_in(file) for file in _files(folder)]
        )  # and check that each can be read
        calls_of(folder)
        if before is not None and has_cells and (changed := changes(before, now)):
            raise ValueError(refusal(folder, "evaluation", changed))
        if folder.is_dir():
            remove_unfinished(folder)
        if before != now:
            (folder / CALLS).unlink(missing_ok=True)
            _write(path, {"format": FORMAT, **now})

    def get(self, task: str, form: str) -> Cell | None:
        """Return a cell, or None if it has not been run."""
        path = self._path(task, form)
        return _cell_in(path) if path.exists() else None

    def add(self, cell: Cell) -> None:
        """Write a cell atomically."""
        _write(self._path(cell.task, cell.form), asdict(cell))

    def note(self, call: Mapping[str, Any]) -> None:
        """Record the arguments of a call, in addition to earlier ones."""
        now = json.loads(json.dumps(call))
        before = [other for other in calls_of(self.folder) if other != now]
        _write(self.folder / CALLS, [*before, now])

    def _path(self, task: str, form: str) -> Path:
        return self.folder / "cells" / f"{file_name(task, form)}.json"


def file_name(task: str, form: str) -> str:
    """Return the name of a cell's file, without its ending."""
    return re.sub(r"[^\w.-]+", "_", f"{task}--{form}")


def cells_of(folder: Path) -> list[Cell]:
    """Return every cell in the folder of an evaluation, the oldest first."""
    ordered = sorted(_files(folder), key=lambda path: (path.stat().st_mtime_ns, path.name))
    return [_cell_in(path) for path in ordered]


def calls_of(folder: Path) -> list[dict[str, Any]]:
    """Return the arguments of the calls that ran to their end, see `EvaluationCells.note`."""
    path = folder / CALLS
    if not path.exists():
        return []
    found = _read(path)
    if not isinstance(found, list) or not all(map(_is_call, found)):
        raise _damaged(path, "no list of calls")
    return found


def _is_call(call: Any) -> bool:
    if not isinstance(call, dict) or not call.keys() >= _CALL:
        return False
    groups, forms, missing = call["groups"], call["forms"], call["missing"]
    try:
        return (
            all(isinstance(t, str) for leaves in groups.values() for t in leaves)
            and all(isinstance(form["name"], str) and Form(**form) for form in forms)
            and all(isinstance(reason, str) for reason in missing.values())
        )
    except (AttributeError, LookupError, TypeError, ValueError):
        return False


def _files(folder: Path) -> Iterator[Path]:
    return (folder / "cells").glob("[!.]*.json")


def _experiment_in(path: Path) -> dict[str, Any]:
    """Return what the folder's cells depend on; raise an error if it cannot be read."""
    found = _read(path)
    if not isinstance(found, dict):
        raise _damaged(path, "no experiment")
    version = found.pop("format", FORMAT)
    if not isinstance(version, int) or version > FORMAT:
        raise ValueError(
            f"{path} was written by a newer version of this library (format "
            f"{one_line(version, 60)}, this one "
            f"reads {FORMAT}): update the library, or give another folder; nothing was changed"
        )
    return found


def _cell_in(path: Path) -> Cell:
    found = _read(path)
    try:
        cell = Cell(**found)
        _require_types(cell)
    except TypeError as error:
        raise _damaged(path, f"no cell of this version: {one_line(error)}") from error
    return cell


def _require_types(cell: Cell) -> None:
    """Raise TypeError if a field has another type than was written."""
    kinds: dict[type | tuple[type, ...], str] = {
        str: "task form main by stage asked",
        int: "n_documents n_fewshot",
        (int, float): "value seconds",
        (int, float, type(None)): "stderr chance",
        (int, type(None)): "k",
        dict: "documents metrics",
        bool: "higher_is_better",
    }
    for kind, names in kinds.items():
        for name in names.split():
            value = getattr(cell, name)
            if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
                raise TypeError(f"{name} is {one_line(value, 60)!a}")
    for name, value in vars(cell).items():
        least = 0 if name in ("n_documents", "n_fewshot", "k") else -_MOST
        if isinstance(value, int) and not least <= value < _MOST:
            raise TypeError(f"{name} is {one_line(value, 60)}")
    for name, value in (*cell.documents.items(), *cell.metrics.items()):
        is_known = isinstance(value, int | float | str | None) and not isinstance(value, bool)
        if not is_known or (isinstance(value, int) and abs(value) >= _MOST):
            raise TypeError(f"{one_line(name, 60)!a} is {one_line(value, 60)!a}")


def _read(path: Path) -> Any:
    try:
        return read_json(path, LARGEST_RESULTS)
    except ValueError as error:
        raise _damaged(path, str(error)) from error


def _damaged(path: Path, why: str) -> ValueError:
    other = "give another folder" if path.name == EXPERIMENT else "remove it, to have it made anew"
    message = f"{path} is damaged ({why}): bring it back from a copy, or {other}"
    return ValueError(printable(f"{message}; nothing was changed"))


def _write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
