"""Cells of a sweep in one SQLite file: written whole prompts at a time, or not at all."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas

FILE = "cells.sqlite"
FORMAT = 1

COLUMNS: dict[str, str] = {
    "prompt_id": "TEXT NOT NULL",
    "setting": "TEXT NOT NULL",
    "stage": "TEXT",
    "k": "INTEGER",
    "needle_id": "TEXT",
    "city": "TEXT",
    "template": "TEXT",
    "read_twice": "INTEGER",
    "n_distractors": "INTEGER",
    "length": "INTEGER",
    "depth": "REAL",
    "needle_start": "INTEGER",
    "needle_stop": "INTEGER",
    "in_window": "INTEGER",
    "output": "TEXT",
    "graded": "REAL",
    "accuracy": "REAL",
    "binary": "INTEGER",
    "released": "REAL",
    "n_new_tokens": "INTEGER",
    "min_margin": "REAL",
    "seconds": "REAL",
}


class Store:
    """The results of one experiment.

    Args:
        folder: where the file lies; None keeps the cells in memory.
        experiment: what the cells depend on, as JSON-able values; a folder holds one experiment.
        resume: go on with what the folder holds; else it must be empty or new.

    Raises:
        FileExistsError: the folder is not empty and `resume` is false.
        ValueError: the folder holds another experiment, or a file of a newer version.
        OSError: the file cannot be written.
    """

    def __init__(
        self, folder: Path | None, experiment: Mapping[str, Any], resume: bool = False
    ) -> None:
        if folder is None:
            self.path = None
        else:
            if folder.is_dir() and any(folder.iterdir()) and not resume:
                raise FileExistsError(
                    f"{folder} is not empty: go on with --resume (resume=True), or give another "
                    "folder"
                )
            folder.mkdir(parents=True, exist_ok=True)
            self.path = folder / FILE
        try:
            self.connection = sqlite3.connect(self.path or ":memory:")
            self.connection.execute("PRAGMA synchronous = FULL")
            self._prepare(dict(experiment))
        except sqlite3.Error as error:
            raise OSError(f"{self.path} cannot be used ({error})") from error

    def done(self) -> set[str]:
        """Return the ids of the prompts whose cells are all there."""
        rows = self.connection.execute("SELECT DISTINCT prompt_id FROM cells")
        return {prompt_id for (prompt_id,) in rows}

    def add(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Write all cells of one prompt in one transaction.

        Raises:
            OSError: the disk is full or the file cannot be written; then none is.
        """
        names = ", ".join(COLUMNS)
        marks = ", ".join(f":{name}" for name in COLUMNS)
        try:
            with self.connection:
                self.connection.executemany(f"INSERT INTO cells ({names}) VALUES ({marks})", cells)
        except sqlite3.OperationalError as error:
            raise OSError(
                f"{self.path} cannot take more cells ({error}); those written are whole, and "
                "the run can be resumed"
            ) from error

    def table(self) -> pandas.DataFrame:
        """Return every cell, in the order of prompts and settings."""
        import pandas

        table = pandas.read_sql("SELECT * FROM cells ORDER BY rowid", self.connection)
        table["k"] = table["k"].astype("Int64")
        for name in ("read_twice", "in_window"):
            table[name] = table[name].astype("boolean")
        return table

    def close(self) -> None:
        """Close the file."""
        self.connection.close()

    def _prepare(self, experiment: dict[str, Any]) -> None:
        """Make the tables, or check that those there are of this experiment."""
        columns = ", ".join(f"{name} {kind}" for name, kind in COLUMNS.items())
        with self.connection:
            self.connection.execute("CREATE TABLE IF NOT EXISTS meta (key PRIMARY KEY, value)")
            self.connection.execute(
                f"CREATE TABLE IF NOT EXISTS cells ({columns}, PRIMARY KEY (prompt_id, setting))"
            )
            kept = dict(self.connection.execute("SELECT key, value FROM meta"))
            if not kept:
                rows = [("format", FORMAT), ("experiment", json.dumps(experiment, sort_keys=True))]
                self.connection.executemany("INSERT INTO meta VALUES (?, ?)", rows)
                return
        if int(kept["format"]) > FORMAT:
            raise ValueError(f"{self.path} was written by a newer version of this library")
        before = json.loads(kept["experiment"])
        now = json.loads(json.dumps(experiment))
        changed = [key for key in {*before, *now} if before.get(key) != now.get(key)]
        if changed:
            raise ValueError(
                f"{self.path} holds another experiment: {', '.join(sorted(changed))} differ; give "
                "another folder, nothing is overwritten"
            )
