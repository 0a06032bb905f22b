"""Stores of made-up cells, and results of a made-up evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hooked_hybrid.evaluation.cells import Cell, EvaluationCells
from hooked_hybrid.niah.store import COLUMNS, FILE, Store

EXPERIMENT = {"model": "m"}
N_SETTINGS = 4


def cells_for(i: int) -> list[dict[str, Any]]:
    """Return the cells of a made-up prompt."""
    empty = dict.fromkeys(COLUMNS)
    named = [f"s{j}" for j in range(N_SETTINGS)]
    return [
        {**empty, "prompt_id": f"p{i}", "setting": name, "output": f"{i} {name}, " * 9, "k": j}
        for j, name in enumerate(named)
    ]


def stored(folder: Path, n: int = 30) -> Path:
    """Write a store of so many prompts; return its path."""
    store = Store(folder, EXPERIMENT)
    for i in range(n):
        store.add(cells_for(i))
    store.close()
    return folder / FILE


def table_of(folder: Path) -> Any:
    """Return the cells of a folder that is gone on with."""
    store = Store(folder, EXPERIMENT, resume=True)
    try:
        return store.table()
    finally:
        store.close()


CELL = Cell("t", "base", None, "acc,none", 0.5, None, True, 4, 0, {}, None, {}, 1.0)


def evaluated(folder: Path) -> EvaluationCells:
    """Write the results of an evaluation of one cell."""
    cells = EvaluationCells(folder, EXPERIMENT)
    cells.add(CELL)
    cells.note({"groups": {"t": ["t"]}, "forms": [], "missing": {}})
    return cells
