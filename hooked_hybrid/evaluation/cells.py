"""Results of an evaluation, one file for each task and form: what is there is not run again."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hooked_hybrid.niah.plots import replacing

EXPERIMENT = "evaluation.json"


@dataclass(frozen=True)
class Cell:
    """One task under one form.

    `metrics` are lm-eval's, named as it names them ("acc,none", "acc_stderr,none"). `main` is the
    task's first metric, `value` and `stderr` its figures, `documents` its value on each document
    where it is a mean over documents, by the document's index. `chance` is what choosing by lot
    among the answers would give, None where there are none to choose among.
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


class Cells:
    """The cells of one experiment in a folder.

    Args:
        folder: new, empty, or that of the same experiment.
        experiment: what the cells depend on, as JSON-able values.
        resume: go on with what the folder holds.

    Raises:
        FileExistsError: the folder is not empty and `resume` is false.
        ValueError: it holds another experiment.
    """

    def __init__(self, folder: Path, experiment: Mapping[str, Any], resume: bool = False) -> None:
        self.folder, path = folder, folder / EXPERIMENT
        if folder.is_dir() and any(folder.iterdir()) and not resume:
            raise FileExistsError(
                f"{folder} is not empty: go on with --resume (resume=True), or give another folder"
            )
        now = json.loads(json.dumps(experiment))
        if not path.exists():
            _write(path, now)
            return
        before = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key in {*before, *now} if before.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"{folder} holds another evaluation: {', '.join(sorted(changed))} differ; give "
                "another folder, nothing is overwritten"
            )

    def get(self, task: str, form: str) -> Cell | None:
        """Return a cell, or None where it has not been run."""
        path = self._path(task, form)
        return Cell(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else None

    def add(self, cell: Cell) -> None:
        """Write a cell, whole or not at all."""
        _write(self._path(cell.task, cell.form), asdict(cell))

    def _path(self, task: str, form: str) -> Path:
        name = re.sub(r"[^\w.-]+", "_", f"{task}--{form}")
        return self.folder / "cells" / f"{name}.json"


def _write(path: Path, value: Any) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


__all__ = ["Cell", "Cells"]
