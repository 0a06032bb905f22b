"""Cells of a sweep in one SQLite file: written whole prompts at a time, or not at all.

The file holds a digest of its cells, so that one that was cut short or changed is not taken for
whole. Version 1 of the format had none, and version 2 did not say where in its haystack a needle
really stands; the cells of both are read, and more of the same are added.
"""

from __future__ import annotations

import errno
import json
import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.niah.store_checks import (
    COLUMNS,
    FORMAT,
    SCHEMA,
    check,
    check_schema,
    damaged,
    digest_of,
    refuse_foreign_files,
    restrain,
)
from hooked_hybrid.options import require
from hooked_hybrid.outputs.folders import (
    claimed,
    holds_results,
    remove_unfinished,
    replacing,
    unwritten,
)
from hooked_hybrid.outputs.foreign import parse_json
from hooked_hybrid.runs.identity.comparing import changes, refusal

if TYPE_CHECKING:
    import pandas

FILE = "cells.sqlite"
PATIENCE = 30.0
"""Seconds to wait for another program that reads or writes the file."""

_SYSTEM_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
}
"""Errors of the disk, not of the file, and the system's nearest name for them."""
_READING = "; `hooked_hybrid.niah.store.read_cells` reads the cells that are there"
_MISUSE = (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
"""Errors of what was asked, not of the file."""


class Store:
    """The results of one experiment; it holds its folder until it is closed.

    Args:
        folder: where the file lies; None keeps the cells in memory.
        experiment: what the cells depend on, as JSON-able values; a folder holds one experiment.
        resume: go on with what the folder holds; else it must be empty or new.

    Raises:
        FileExistsError: the folder is not empty, and `resume` is false or it holds no store.
        ValueError: the folder holds another experiment, a file of a newer version, or one that is
            damaged; nothing in it is changed.
        OSError: the file cannot be written, or another run writes there.
    """

    def __init__(
        self, folder: Path | None, experiment: Mapping[str, Any], resume: bool = False
    ) -> None:
        self.path = None if folder is None else folder / FILE
        with ExitStack() as stack:
            if folder is not None:
                stack.enter_context(claimed(folder, resume))
            with _explain_errors(self.path):
                self.connection = stack.enter_context(closing(_open(self.path, experiment)))
                self.connection.execute("PRAGMA synchronous = EXTRA")
                self._digest = 0
                self.columns = tuple(COLUMNS)
                if self.path is not None:
                    self._digest, self.columns = check(self.connection, self.path)
                    _compare(self.connection, self.path, experiment)
            if folder is not None:
                remove_unfinished(folder)
            self._held = stack.pop_all()

    def done(self) -> set[str]:
        """Return the ids of the prompts whose cells are all there."""
        with _explain_errors(self.path):
            rows = self.connection.execute("SELECT DISTINCT prompt_id FROM cells")
            return {prompt_id for (prompt_id,) in rows}

    def add(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Write all cells of one prompt, or of some, in one transaction.

        Raises:
            ValueError: one of them is there already; then none is written.
            OSError: the disk is full or the file cannot be written; then none is.
        """
        connection = self.connection
        try:
            with _explain_errors(self.path), connection:
                connection.execute("BEGIN IMMEDIATE")
                (last,) = connection.execute("SELECT coalesce(max(rowid), 0) FROM cells").fetchone()
                names = ", ".join(self.columns)
                marks = ", ".join(f":{name}" for name in self.columns)
                connection.executemany(f"INSERT INTO cells ({names}) VALUES ({marks})", cells)
                added = f"SELECT {names} FROM cells WHERE rowid > {last}"
                digest = digest_of(connection.execute(added), self._digest_before())
                is_new = len(self.columns) == len(COLUMNS)
                kept = [("format", FORMAT if is_new else 2), ("digest", f"{digest:x}")]
                connection.executemany("REPLACE INTO meta VALUES (?, ?)", kept)
        except sqlite3.IntegrityError as error:
            raise ValueError(
                f"{self.path} holds some of these cells already ({error}): give another folder, "
                "nothing is overwritten"
            ) from error

    def table(self) -> pandas.DataFrame:
        """Return every cell, in the order in which they were added.

        Of a file that does not say where a needle really stands, `real_depth` is the asked depth.
        """
        require("pandas")
        with _explain_errors(self.path):
            return _table(self.connection)

    def close(self) -> None:
        """Close the file and release its folder."""
        self._held.close()

    def _digest_before(self) -> int:
        """Return the digest that the file holds: where locks fail, another run may have added."""
        query = "SELECT value FROM meta WHERE key = 'digest'"
        found = self.connection.execute(query).fetchone()
        return self._digest if found is None else int(found[0], 16)


def read_cells(folder: str | PathLike[str]) -> pandas.DataFrame:
    """Return the cells in a folder, whatever they are of, in the order in which they were added.

    Raises:
        FileNotFoundError: it holds no store.
        ValueError: the file is of a newer version, or damaged.
        OSError: another run writes there.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {FILE}: give the folder of a sweep")
    with claimed(path.parent, resume=True), _explain_errors(path), closing(_open(path, {})) as file:
        check(file, path)
        return _table(file)


def _table(connection: sqlite3.Connection) -> pandas.DataFrame:
    import pandas

    table = pandas.read_sql("SELECT * FROM cells ORDER BY rowid", connection)
    for name in (name for name in COLUMNS if name not in table):
        table[name] = table["depth"] if name == "real_depth" else None
    table["k"] = table["k"].astype("Int64")
    for name in ("read_twice", "in_window"):
        table[name] = table[name].astype("boolean")
    return table


def _open(path: Path | None, experiment: Mapping[str, Any]) -> sqlite3.Connection:
    """Return a connection to the file, which is made if there is none; None is in memory."""
    if path is None:
        connection = sqlite3.connect(":memory:")
        _make(connection, experiment)
        return connection
    refuse_foreign_files(path)
    if not path.exists():
        _create(path, experiment)
    uri = path.resolve().as_uri()
    # As it lies there, without undoing what its journal says: that changes the file.
    with closing(sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)) as before:
        restrain(before)
        check_schema(before, path)
    connection = sqlite3.connect(f"{uri}?mode=rw", timeout=PATIENCE, uri=True)
    restrain(connection)
    return connection


def _make(connection: sqlite3.Connection, experiment: Mapping[str, Any]) -> None:
    """Make the tables, and say what the cells will be of."""
    said = [
        ("format", FORMAT),
        ("experiment", json.dumps(dict(experiment), sort_keys=True)),
        ("digest", "0"),
    ]
    with connection:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", said)


def _create(path: Path, experiment: Mapping[str, Any]) -> None:
    """Write a file without cells, whole or not at all."""
    if holds_results(path.parent):
        raise FileExistsError(
            f"{path.parent} holds other files and no {FILE}: give another folder, nothing is "
            "overwritten"
        )
    with replacing(path) as temporary, closing(sqlite3.connect(temporary)) as connection:
        _make(connection, experiment)


def _compare(connection: sqlite3.Connection, path: Path, experiment: Mapping[str, Any]) -> None:
    """Raise an error where the file is of another experiment."""
    (kept,) = connection.execute("SELECT value FROM meta WHERE key = 'experiment'").fetchone()
    try:
        before = dict(parse_json(kept, path))
    except (TypeError, ValueError):
        raise damaged(path, "it does not say of which experiment it is") from None
    if changed := changes(before, experiment):
        raise ValueError(refusal(path, "experiment", changed, _READING))


@contextmanager
def _explain_errors(path: Path | None) -> Iterator[None]:
    """Say of an error of SQLite whether the disk is at fault or the file, and what to do."""
    try:
        yield
    except _MISUSE:
        raise
    except sqlite3.Error as error:
        place, code = path or Path("memory"), getattr(error, "sqlite_errorcode", 0)
        if code == sqlite3.SQLITE_READONLY_DBMOVED:
            raise OSError(
                f"{place} was moved or removed while it was written: bring it back, then go on "
                "(--resume), or give another folder"
            ) from error
        if code & 0xFF in _SYSTEM_ERRORS:
            said = OSError(_SYSTEM_ERRORS[code & 0xFF], str(error))
            raise unwritten(place, said, "the cells that it holds are whole") from error
        raise damaged(place, str(error)) from error
