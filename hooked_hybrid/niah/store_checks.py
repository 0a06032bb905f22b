"""Checks of a file of cells before it is used.

SQLite executes a schema (views, triggers, generated columns) and a journal, which may name files
elsewhere. So both are compared with those of this library before SQLite opens them.
"""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterable, Iterator, Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from hooked_hybrid.outputs.foreign import printable, refuse_link, require_plain_file

FORMAT = 4
"""The newest version: of a sweep that was extended."""
WHOLE = 3
"""The version of one that was not."""

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
    "real_depth": "REAL",
    "placed_between": "TEXT",
}
_SINCE_3 = ("real_depth", "placed_between")


def _made(names: Iterable[str]) -> str:
    columns = ", ".join(f"{name} {COLUMNS[name]}" for name in names)
    return f"CREATE TABLE cells ({columns}, PRIMARY KEY (prompt_id, setting))"


SCHEMA = ("CREATE TABLE meta (key PRIMARY KEY, value)", _made(COLUMNS))
SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
"""The first bytes of a journal; and the last bytes of one for several files.

Source: SQLite, "Database File Format", section 3, and `pager.c`, `readSuperJournal`.
"""
_TYPES: dict[str, type] = {"TEXT": str, "INTEGER": int, "REAL": float}
_BEFORE_3 = (n for n in COLUMNS if n not in _SINCE_3)
_OWN: dict[tuple[str, str], tuple[tuple[str, str | None], ...]] = {
    ("table", "meta"): (("meta", SCHEMA[0]),),
    ("table", "cells"): (("cells", SCHEMA[1]), ("cells", _made(_BEFORE_3))),
    **{("index", f"sqlite_autoindex_{n}_1"): ((n, None),) for n in ("meta", "cells")},
}
"""The schema of our files, by kind and name: the table, and the statement."""


def refuse_foreign_files(path: Path) -> None:
    """Refuse a file of cells, or a journal next to it, that would lead SQLite elsewhere.

    Raises:
        OSError: one is a link.
        ValueError: one is not a plain file; the journal names another file, which SQLite would
            delete, or more pages than the file has; a write-ahead log exists, which this library
            never writes.
    """
    journal, log, shared = (path.with_name(path.name + end) for end in ("-journal", "-wal", "-shm"))
    refuse_link(path, journal, log, shared)
    for one in (path, journal):
        if one.exists():
            require_plain_file(one)
    if log.exists() or shared.exists() or (path.exists() and _is_logged(path)):
        raise refused(
            path,
            "has a write-ahead log, which this library does not write",
            "let sqlite3 run PRAGMA journal_mode = DELETE on it if you made it one, or give "
            "another folder",
        )
    if journal.exists():
        _refuse_journal(path, journal)


def _is_logged(path: Path) -> bool:
    """Return whether a file uses a write-ahead log."""
    with path.open("rb") as file:
        head = file.read(20)
    return head.startswith(b"SQLite format 3\0") and 2 in head[18:]


def _refuse_journal(path: Path, journal: Path) -> None:
    with journal.open("rb") as file:
        head = file.read(28)
        file.seek(-min(8, os.fstat(file.fileno()).st_size), os.SEEK_END)
        if file.read() == SUPER_JOURNAL:
            raise _bad_journal(path, "names another file, which would be removed")
    if head.startswith(SUPER_JOURNAL):
        n_pages, page = int.from_bytes(head[16:20]), int.from_bytes(head[24:28])
        if n_pages * page > (path.stat().st_size if path.exists() else 0):
            raise _bad_journal(path, "would make it larger than it is")


def _bad_journal(path: Path, why: str) -> ValueError:
    return refused(
        path,
        f"has a journal that {why}: no run of this library leaves such a one",
        "do not open it with other programs, give another folder",
    )


def restrain(connection: sqlite3.Connection) -> None:
    """Prevent the schema of a file from running functions or reading other files."""
    connection.execute("PRAGMA trusted_schema = OFF")
    connection.execute("PRAGMA cell_size_check = ON")
    connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)


def check_schema(connection: sqlite3.Connection, path: Path) -> None:
    """Compare the schema of a file with that of this library, without executing it.

    Raises:
        ValueError: it has other tables, columns, views, triggers or indices, or a newer version.
    """
    ((n_pages,),) = connection.execute("PRAGMA page_count")
    if n_pages == 0:
        raise damaged(path, "it is empty")
    rows = connection.execute("SELECT type, name, tbl_name, sql FROM sqlite_master").fetchall()
    found = {(kind, name): (table, sql) for kind, name, table, sql in rows}
    if not any(name == "meta" for _, name in found):
        raise refused(path, "holds no sweep", "give another folder")
    if found.get(("table", "meta")) == ("meta", SCHEMA[0]):
        _refuse_newer(connection, path)
    for kind, name in found.keys() ^ _OWN.keys():
        raise damaged(path, f"its schema has other tables: the {kind} {name!a}")
    for kind, name, table, sql in rows:
        if (table, sql) not in _OWN[kind, name]:
            raise damaged(path, f"it has other columns, in the schema of {name}")


def _refuse_newer(connection: sqlite3.Connection, path: Path) -> None:
    row = connection.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
    if row is not None and isinstance(row[0], int) and row[0] > FORMAT:
        raise refused(
            path,
            f"was written by a newer version of this library (format {row[0]}, this one reads "
            f"{FORMAT})",
            "update the library, or give another folder",
        )


def check(connection: sqlite3.Connection, path: Path) -> tuple[int, tuple[str, ...]]:
    """Return the digest of the cells and their columns; raise an error if it is damaged."""
    (n_bytes,) = connection.execute(  # reading rolls back an unfinished write of a killed run
        "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"
    ).fetchone()
    check_schema(connection, path)  # again, as the rollback may have changed the schema
    kept = dict(connection.execute("SELECT key, value FROM meta"))
    if not isinstance(kept.get("experiment"), str) or not isinstance(kept.get("format"), int):
        raise damaged(path, "it does not say of which experiment it is")
    found = {name: kind for _, name, kind, *_ in connection.execute("PRAGMA table_info(cells)")}
    late = () if kept["format"] > 2 else _SINCE_3
    wanted = {name: kind.split()[0] for name, kind in COLUMNS.items() if name not in late}
    if found != wanted:
        raise damaged(path, "it has other columns")
    if n_bytes != path.stat().st_size:
        raise damaged(path, f"of {n_bytes} bytes it has {path.stat().st_size}")
    ((said,),) = connection.execute("PRAGMA integrity_check(1)")
    if said != "ok":
        raise damaged(path, said)
    cells = connection.execute(f"SELECT {', '.join(wanted)} FROM cells")
    digest = digest_of(_of_their_types(cells, wanted, path))
    if kept["format"] > 1 and kept.get("digest") != f"{digest:x}":
        raise damaged(path, "its cells are not those that were written")
    connection.execute("BEGIN IMMEDIATE")  # can it be written?
    connection.rollback()
    return digest, tuple(wanted)


def _of_their_types(
    rows: Iterable[tuple[Any, ...]], kinds: Mapping[str, str], path: Path
) -> Iterator[tuple[Any, ...]]:
    """Yield rows as they are; raise an error at a value that is not of its column's type."""
    seen: set[tuple[type, ...]] = set()
    for row in rows:
        types = tuple(map(type, row))
        if types not in seen:
            for (name, kind), of in zip(kinds.items(), types, strict=True):
                if of not in (_TYPES[kind], type(None)):
                    raise damaged(path, f"a value of {name} is not of type {kind}")
            seen.add(types)
        yield row


def digest_of(rows: Iterable[tuple[Any, ...]], before: int = 0) -> int:
    """Return the digest of cells, whatever their order, put to that of others."""
    hashes = (sha256(repr(row).encode("utf-8", "surrogatepass")).digest()[:16] for row in rows)
    return (before + sum(int.from_bytes(found) for found in hashes)) % 2**128


def refused(path: Path, why: str, remedy: str) -> ValueError:
    """Return an error with the reason why a file cannot be continued, and the remedy."""
    return ValueError(printable(f"{path} {why}: {remedy}; nothing in it was changed"))


def damaged(path: Path, why: str) -> ValueError:
    """Return an error that says what is wrong with a file."""
    return refused(
        path, f"is damaged ({why})", "bring it back from a copy, or run anew in another folder"
    )
