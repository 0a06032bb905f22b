"""Cells of a sweep in one SQLite file, to which the cells of whole prompts are added atomically.

The file contains a digest of its cells, so that a truncated or changed file is recognised. Version
1 of the format had none, and version 2 had no real depths of needles; files of both can be read and
continued. A file becomes one of version 4 when its sweep is extended (`extending`).
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

from hooked_hybrid.niah.extending import (
    Block,
    as_json,
    extended,
    first_block,
    from_json,
    same_cells,
)
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.store_checks import (
    COLUMNS,
    FORMAT,
    SCHEMA,
    WHOLE,
    check,
    check_schema,
    damaged,
    digest_of,
    refuse_foreign_files,
    restrain,
)
from hooked_hybrid.outputs.folders import (
    claim,
    holds_results,
    remove_unfinished,
    replacing,
    write_error,
)
from hooked_hybrid.outputs.foreign import parse_json
from hooked_hybrid.runs.identity.comparing import changes, refusal

if TYPE_CHECKING:
    import pandas

FILE = "cells.sqlite"
PATIENCE = 30.0
"""Seconds to wait for another program that uses the file."""

_SYSTEM_ERRORS = {
    sqlite3.SQLITE_FULL: errno.ENOSPC,
    sqlite3.SQLITE_READONLY: errno.EROFS,
    sqlite3.SQLITE_PERM: errno.EACCES,
    sqlite3.SQLITE_CANTOPEN: errno.EACCES,
    sqlite3.SQLITE_IOERR: errno.EIO,
    sqlite3.SQLITE_BUSY: errno.EBUSY,
    sqlite3.SQLITE_LOCKED: errno.EBUSY,
}
"""Errors of the disk rather than of the file, with the system's name for each."""
_UNSAID = {"score": "graded"}
"""Options that an experiment records only where they differ from these."""
_READING = "; `hooked_hybrid.niah.store.read_cells` reads the cells that are there"
_MISUSE = (sqlite3.IntegrityError, sqlite3.InterfaceError, sqlite3.ProgrammingError)
"""Errors of the caller rather than of the file."""


class Store:
    """The results of one experiment, whose folder is locked until it is closed.

    Args:
        folder: of the file; None keeps the cells in memory.
        experiment: everything the cells depend on, as JSON-able values; a folder has one
            experiment.
        resume: continue the results in the folder; otherwise it must be empty or new.
        prompts: of the experiment. If it has all settings and prompts of the stored one and others,
            the stored one is extended, when the first cells are added.

    Attributes:
        blocks: the cells of the experiment, in the blocks in which they are computed.

    Raises:
        FileExistsError: the folder is not empty, and `resume` is false or it has no store.
        ValueError: the folder has another experiment, which this one does not extend, a file of a
            newer version, or a damaged file; nothing in it is changed.
        OSError: the file cannot be written, or another run is writing there.
    """

    def __init__(
        self,
        folder: Path | None,
        experiment: Mapping[str, Any],
        resume: bool = False,
        prompts: Sequence[Prompt] = (),
    ) -> None:
        self.path = None if folder is None else folder / FILE
        self.blocks = [first_block(experiment, prompts)]
        self._extension: list[tuple[str, Any]] = []
        with ExitStack() as stack:
            if folder is not None:
                stack.enter_context(claim(folder, resume))
            with _explain_errors(self.path):
                self.connection = stack.enter_context(
                    closing(_open(self.path, experiment, self.blocks))
                )
                self.connection.execute("PRAGMA synchronous = EXTRA")
                self._digest = 0
                self.columns = tuple(COLUMNS)
                if self.path is not None:
                    self._digest, self.columns = check(self.connection, self.path)
                    self._compare(self.path, experiment, prompts)
            if folder is not None:
                remove_unfinished(folder)
            self._held = stack.pop_all()

    def done(self, setting: str | None = None) -> set[str]:
        """Return the ids of the prompts that have cells, in a setting or in any."""
        where, named = ("", ()) if setting is None else (" WHERE setting = ?", (setting,))
        with _explain_errors(self.path):
            query = f"SELECT DISTINCT prompt_id FROM cells{where}"
            return {prompt_id for (prompt_id,) in self.connection.execute(query, named)}

    def done_of(self, block: Block) -> set[str]:
        """Return the ids of the prompts of a block whose cells are all there."""
        return self.done(block.settings[0]) & {*block.prompts} if block.settings else set()

    def add(self, cells: Sequence[Mapping[str, Any]]) -> None:
        """Write all cells of one or several prompts in one transaction.

        Raises:
            ValueError: one of them already exists; none is written then.
            OSError: the disk is full or the file cannot be written; none is written then.
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
                is_new, is_whole = len(self.columns) == len(COLUMNS), len(self.blocks) == 1
                version = 2 if not is_new else WHOLE if is_whole else FORMAT
                kept = [("format", version), ("digest", f"{digest:x}"), *self._extension]
                connection.executemany("REPLACE INTO meta VALUES (?, ?)", kept)
            self._extension = []
        except sqlite3.IntegrityError as error:
            raise ValueError(
                f"{self.path} holds some of these cells already ({error}): give another folder, "
                "nothing is overwritten"
            ) from error

    def table(self) -> pandas.DataFrame:
        """Return all cells, in the order in which they were added.

        For a file without real depths, `real_depth` is the requested depth.
        """
        with _explain_errors(self.path):
            return _table(self.connection)

    def close(self) -> None:
        """Close the file and release its folder."""
        self._held.close()

    def _compare(
        self, path: Path, experiment: Mapping[str, Any], prompts: Sequence[Prompt]
    ) -> None:
        """Read the blocks of the file; raise an error if it is of another experiment."""
        kept = dict(self.connection.execute("SELECT key, value FROM meta"))
        try:
            before = dict(parse_json(kept["experiment"], path))
            before = {**{k: v for k, v in _UNSAID.items() if k in experiment}, **before}
            found = kept.get("blocks")
            blocks = [] if found is None else from_json(parse_json(found, path))
        except (TypeError, ValueError):
            raise damaged(path, "it does not say of which experiment it is") from None
        if not changes(before, experiment):
            if blocks and not same_cells(blocks, self.blocks):
                raise damaged(path, "it does not say which cells it is to hold")
            self.blocks = blocks or self.blocks
            return
        if not blocks:  # of an earlier version, which is extended once it is finished
            done = self.done()
            ids = tuple(prompt.id for prompt in prompts if prompt.id in done)
            blocks = [Block(ids, tuple(before.get("settings") or ()))]
        self.blocks, changed = extended(before, experiment, blocks, prompts)
        if changed:
            raise ValueError(refusal(path, "experiment", changed, _READING))
        said = json.dumps(dict(experiment), sort_keys=True)
        self._extension = [("experiment", said), ("blocks", as_json(self.blocks))]

    def _digest_before(self) -> int:
        """Return the digest in the file, which differs if another run wrote despite the lock."""
        query = "SELECT value FROM meta WHERE key = 'digest'"
        found = self.connection.execute(query).fetchone()
        return self._digest if found is None else int(found[0], 16)


def read_cells(folder: str | PathLike[str]) -> pandas.DataFrame:
    """Return the cells in a folder, of any experiment, in the order in which they were added.

    Raises:
        FileNotFoundError: it has no store.
        ValueError: the file is of a newer version, or damaged.
        OSError: another run is writing there.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> from hooked_hybrid.niah.store import read_cells
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> table = sweep.niah(model, cells, {"whole": []}, out="cells", verbose=False)
        >>> read_cells("cells")["accuracy"].tolist()
        [1.0]
    """
    path = Path(folder) / FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} holds no {FILE}: give the folder of a sweep")
    with (
        claim(path.parent, resume=True),
        _explain_errors(path),
        closing(_open(path, {}, ())) as file,
    ):
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


def _open(
    path: Path | None, experiment: Mapping[str, Any], blocks: Sequence[Block]
) -> sqlite3.Connection:
    """Return a connection to the file, which is created if missing; None is in memory."""
    if path is None:
        connection = sqlite3.connect(":memory:")
        _make(connection, experiment, blocks)
        return connection
    refuse_foreign_files(path)
    if not path.exists():
        _create(path, experiment, blocks)
    uri = path.resolve().as_uri()
    # Without applying its journal, which would change the file.
    with closing(sqlite3.connect(f"{uri}?mode=ro&immutable=1", uri=True)) as before:
        restrain(before)
        check_schema(before, path)
    connection = sqlite3.connect(f"{uri}?mode=rw", timeout=PATIENCE, uri=True)
    restrain(connection)
    return connection


def _make(
    connection: sqlite3.Connection, experiment: Mapping[str, Any], blocks: Sequence[Block]
) -> None:
    """Create the tables, with a record of the experiment."""
    said = [
        ("format", WHOLE),
        ("experiment", json.dumps(dict(experiment), sort_keys=True)),
        ("digest", "0"),
        ("blocks", as_json(blocks)),
    ]
    with connection:
        for statement in SCHEMA:
            connection.execute(statement)
        connection.executemany("INSERT INTO meta VALUES (?, ?)", said)


def _create(path: Path, experiment: Mapping[str, Any], blocks: Sequence[Block]) -> None:
    """Write a file without cells, atomically."""
    if holds_results(path.parent):
        raise FileExistsError(
            f"{path.parent} holds other files and no {FILE}: give another folder, nothing is "
            "overwritten"
        )
    with replacing(path) as temporary, closing(sqlite3.connect(temporary)) as connection:
        _make(connection, experiment, blocks)


@contextmanager
def _explain_errors(path: Path | None) -> Iterator[None]:
    """Raise SQLite's error as one of the disk or of the file, with the remedy."""
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
            raise write_error(place, said, "the cells that it holds are whole") from error
        raise damaged(place, str(error)) from error
