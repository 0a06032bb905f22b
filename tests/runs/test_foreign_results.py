"""Results folders of others are data: nothing in them runs, is followed, or takes a file away."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from hashlib import sha256
from pathlib import Path

import pytest

from hooked_hybrid.evaluation.cells import EvaluationCells
from hooked_hybrid.harvest import harvest
from hooked_hybrid.niah.report.report import write_report
from hooked_hybrid.niah.store import COLUMNS, FILE, Store, read_cells
from hooked_hybrid.outputs.folders import LOCK, FolderInUseError, claim, replacing
from hooked_hybrid.papers.recipe import QUICK, recipe_for
from hooked_hybrid.runs.identity.comparing import changes, refusal
from tests.harvests import RESID, documents_of, model_named, packaged
from tests.niah.test_summary import sweep_table
from tests.stores import EXPERIMENT, cells_for, evaluated, stored, table_of

SUPER_JOURNAL = bytes.fromhex("d9d505f920a163d7")
ESCAPE = "\x1b]0;owned\x07\x1b[31m"


@contextmanager
def within(seconds: int) -> Iterator[None]:
    """Fail where something hangs."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def everything(folder: Path) -> dict[str, object]:
    """Return what each name under a folder is: bytes, the target of a link, or its kind."""
    found: dict[str, object] = {}
    for path in folder.rglob("*"):
        if path.is_symlink():
            found[str(path)] = os.readlink(path)
        else:
            found[str(path)] = path.read_bytes() if path.is_file() else path.stat().st_mode
    return found


def refused(folder: Path, message: str) -> str:
    """Assert that both readers of a store refuse a folder and leave all of it; return what is said.

    Whatever is next to the folder must be as it was, too.
    """
    before = everything(folder.parent)
    for read in (
        lambda: Store(folder, EXPERIMENT, resume=True).close(),
        lambda: read_cells(folder),
    ):
        with within(20), pytest.raises((ValueError, OSError), match=message) as error:
            read()
    assert everything(folder.parent) == before
    return str(error.value)


def changed(folder: Path, *statements: str) -> Path:
    """Write a store, run statements on it, and let its digest fit again; return the folder."""
    path = stored(folder, 2)
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return folder


def with_fitting_digest(folder: Path) -> Path:
    """Write the digest of what a reader sees, as whoever changed a store would."""
    digest = 0
    with closing(sqlite3.connect(folder / FILE)) as connection:
        for row in connection.execute(f"SELECT {', '.join(COLUMNS)} FROM cells"):
            digest += int.from_bytes(sha256(repr(row).encode()).digest()[:16])
        said = f"{digest % 2**128:x}"
        connection.execute("UPDATE meta SET value = ? WHERE key = 'digest'", (said,))
        connection.commit()
    return folder


# --- journals -------------------------------------------------------------------------------------


def journal_naming(victim: Path) -> bytes:
    """Return a journal that says it is one of several, whose list is in another file."""
    name = os.fsencode(victim)
    ends = (len(name).to_bytes(4), (sum(name) % 2**32).to_bytes(4), SUPER_JOURNAL)
    return b"\1" * 512 + b"".join((b"\0\0\0\1", name, *ends))


def test_a_journal_that_names_another_file_is_refused_before_that_file_is_deleted(tmp_path: Path):
    victim = tmp_path / "thesis.tex"
    victim.write_text("years of work")
    stored(tmp_path / "r", 2)
    (tmp_path / "r" / f"{FILE}-journal").write_bytes(journal_naming(victim))
    refused(tmp_path / "r", "journal .* names another file")
    assert victim.read_text() == "years of work"


def test_a_journal_of_a_file_that_is_yet_to_be_made_is_refused(tmp_path: Path):
    victim = tmp_path / "thesis.tex"
    victim.write_text("years of work")
    (tmp_path / "r").mkdir()
    (tmp_path / "r" / f"{FILE}-journal").write_bytes(journal_naming(victim))
    with pytest.raises((ValueError, FileExistsError)):
        Store(tmp_path / "r", EXPERIMENT, resume=True)
    assert victim.read_text() == "years of work"


def test_a_journal_that_would_blow_the_file_up_is_refused(tmp_path: Path):
    stored(tmp_path / "r", 2)
    n_pages = 2**31 - 1
    numbers = (0, 0, n_pages, 512, 4096)
    head = SUPER_JOURNAL + b"".join(n.to_bytes(4) for n in numbers)
    (tmp_path / "r" / f"{FILE}-journal").write_bytes(head.ljust(512, b"\0"))
    refused(tmp_path / "r", "journal .* larger")


def test_a_store_with_a_write_ahead_log_is_refused(tmp_path: Path):
    folder = changed(tmp_path / "r", "PRAGMA journal_mode = WAL")
    refused(folder, "write-ahead log")
    stored(tmp_path / "s", 1)
    (tmp_path / "s" / f"{FILE}-wal").write_bytes(bytes(32))
    refused(tmp_path / "s", "write-ahead log")


# --- schemas --------------------------------------------------------------------------------------

WITHOUT_END = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT x"
ALL = ", ".join(COLUMNS)
CHANGED = ", ".join("1.0 AS accuracy" if name == "accuracy" else name for name in COLUMNS)


def as_view(select: str) -> tuple[str, ...]:
    """Return statements that put a view in place of the table of cells."""
    return ("ALTER TABLE cells RENAME TO real_cells", f"CREATE VIEW cells AS {select}")


@pytest.mark.parametrize(
    "statements",
    [
        as_view(f"SELECT {CHANGED} FROM real_cells"),
        as_view(
            f"{WITHOUT_END} AS prompt_id, {ALL.removeprefix('prompt_id, ')} FROM n, real_cells"
        ),
        (
            "CREATE TRIGGER better AFTER INSERT ON cells BEGIN "
            "UPDATE cells SET accuracy = 1.0 WHERE rowid = new.rowid; END",
        ),
        ("CREATE TABLE more (x)",),
        ("CREATE INDEX i ON cells (abs(accuracy))",),
        (
            "ALTER TABLE meta RENAME TO real_meta",
            f"CREATE VIEW meta AS {WITHOUT_END} AS key, 2 AS value FROM n",
        ),
        (
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'accuracy REAL', "
            "'accuracy REAL AS (1.0)') WHERE name = 'cells'",
        ),
        (
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = replace(sql, 'accuracy REAL', "
            "'accuracy REAL DEFAULT (zeroblob(1000000000))') WHERE name = 'cells'",
        ),
    ],
)
def test_a_schema_of_others_is_refused_before_anything_of_it_runs(
    statements: tuple[str, ...], tmp_path: Path
):
    refused(changed(tmp_path / "r", *statements), "schema|other tables|other columns")


def test_a_journal_that_brings_another_schema_is_refused_too(tmp_path: Path):
    """Undoing a half-written change gives the file its schema: it is looked at afterwards too."""
    folder = changed(tmp_path / "r", *as_view(f"SELECT {CHANGED} FROM real_cells"))
    script = (
        "import os, signal, sqlite3, sys\n"
        "c = sqlite3.connect(sys.argv[1], isolation_level=None)\n"
        "c.executescript('PRAGMA cache_size = 1; BEGIN; DROP VIEW cells; "
        "ALTER TABLE real_cells RENAME TO cells; UPDATE cells SET output = hex(zeroblob(30000))')\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", script, folder / FILE], check=False)
    journal = folder / f"{FILE}-journal"
    assert journal.stat().st_size
    with within(20), pytest.raises(ValueError, match="schema|other tables|other columns|damaged"):
        Store(folder, EXPERIMENT, resume=True)


@pytest.mark.parametrize(
    ("statement", "message"),
    [
        ("UPDATE cells SET accuracy = 'high'", "accuracy"),
        ("UPDATE cells SET k = x'00ff'", "k"),
        ("UPDATE cells SET output = 12.5", None),  # its column makes a text of it
        ("UPDATE cells SET output = x'ff'", "output"),
        ("UPDATE cells SET in_window = 'yes'", "in_window"),
        ("UPDATE cells SET k = 0.5", "k"),
        ("UPDATE cells SET output = CAST(x'ff1b' AS TEXT)", "damaged"),
        ("UPDATE meta SET value = x'00' WHERE key = 'experiment'", "damaged"),
        ("UPDATE meta SET value = 3 WHERE key = 'digest'", "damaged"),
    ],
)
def test_values_of_other_types_are_refused(statement: str, message: str | None, tmp_path: Path):
    folder = changed(tmp_path / "r", statement)
    if message is None:
        assert set(table_of(with_fitting_digest(folder))["output"]) == {"12.5"}
        return
    if message != "damaged":
        folder = with_fitting_digest(folder)
    refused(folder, message)


def test_an_experiment_too_deep_to_read_is_refused(tmp_path: Path):
    deep = "replace(hex(zeroblob(50000)), '00', '[')"
    changed(tmp_path / "r", f"UPDATE meta SET value = {deep} WHERE key = 'experiment'")
    with pytest.raises(ValueError, match="damaged .*does not say of which experiment"):
        Store(tmp_path / "r", EXPERIMENT, resume=True)


JUNK = (None, 3, True, "s", [1], [[1]], {"a": 1}, {"a": [1]}, [{"a": 1}], {"spec": 3}, ESCAPE)


def test_whatever_an_experiment_says_of_itself_is_another_or_the_same():
    """Each value of what was written in turn becomes one of another kind."""
    hook = {"point": "p", "direction": "fwd", "hash": "h"}
    now = {
        "identity": {"weights": "w", "config": {"layers": [1]}, "hooks": [hook], "changes": {}},
        "settings": {"a": {"spec": {"k": 1}, "hooks": [hook]}},
        "prompts": ["p0"],
    }
    places = [(key,) for key in now] + [("identity", key) for key in now["identity"]]
    places += [("settings", "a"), ("settings", "a", "spec"), ("settings", "a", "hooks")]
    assert changes(now, now) == []
    for place in places:
        for value in JUNK:
            before = json.loads(json.dumps(now))
            inner = before
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = value
            found = changes(before, now)
            assert found, (place, value)
            assert refusal("here", "experiment", found).isprintable()


# --- links and pipes ------------------------------------------------------------------------------


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    """Return a folder next to the results, in which nothing may change."""
    folder = tmp_path / "elsewhere"
    folder.mkdir()
    (folder / "mine.txt").write_text("mine")
    return folder


def test_a_linked_store_is_refused_and_not_written_through(elsewhere: Path, tmp_path: Path):
    real = stored(elsewhere / "r", 2)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(real)
    refused(tmp_path / "out", "is a link")


def test_a_dangling_link_named_as_a_store_makes_no_file_elsewhere(elsewhere: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / FILE).symlink_to(elsewhere / "new.sqlite")
    with pytest.raises((ValueError, OSError), match="is a link"):
        Store(tmp_path / "out", EXPERIMENT, resume=True)
    assert everything(elsewhere) == {str(elsewhere / "mine.txt"): b"mine"}


def test_a_pipe_named_as_a_store_is_refused_at_once(tmp_path: Path):
    (tmp_path / "out").mkdir()
    os.mkfifo(tmp_path / "out" / FILE)
    with within(10), pytest.raises((ValueError, OSError), match="not a plain file"):
        Store(tmp_path / "out", EXPERIMENT, resume=True)


@pytest.mark.parametrize("end", ["-journal", "-wal"])
def test_a_linked_journal_is_refused(end: str, elsewhere: Path, tmp_path: Path):
    stored(tmp_path / "out", 1)
    (tmp_path / "out" / f"{FILE}{end}").symlink_to(elsewhere / "mine.txt")
    refused(tmp_path / "out", "is a link")


def test_a_link_under_the_name_of_a_temporary_file_is_not_followed(elsewhere: Path, tmp_path: Path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("table.csv", "report.html"):
        (out / f".{name}.{os.getpid()}.tmp").symlink_to(elsewhere / "new.txt")
    with replacing(out / "table.csv") as temporary:
        assert not temporary.is_symlink() and temporary.stat().st_size == 0
        temporary.write_text("new")
    assert (out / "table.csv").read_text() == "new"
    assert everything(elsewhere) == {str(elsewhere / "mine.txt"): b"mine"}


def test_temporary_names_cannot_be_predicted(tmp_path: Path):
    names = set()
    for _ in range(3):
        with replacing(tmp_path / "a.txt") as temporary:
            names.add(temporary.name)
            temporary.write_text("x")
    assert len(names) == 3 and all(str(os.getpid()) in name for name in names)


def test_a_file_has_the_rights_that_a_plain_one_would_have(tmp_path: Path):
    (tmp_path / "plain").write_text("x")
    with replacing(tmp_path / "whole") as temporary:
        temporary.write_text("x")
    assert (tmp_path / "whole").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_a_linked_folder_among_a_reports_own_is_refused(elsewhere: Path, tmp_path: Path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "maps").symlink_to(elsewhere)
    table = sweep_table(ks=(2,), stages=("both",), window=None)
    with pytest.raises(OSError, match="maps is a link"):
        write_report(table, [], {}, tmp_path / "out")
    assert everything(elsewhere) == {str(elsewhere / "mine.txt"): b"mine"}


def test_a_results_folder_that_is_itself_a_link_is_the_users_own(elsewhere: Path, tmp_path: Path):
    (tmp_path / "out").symlink_to(elsewhere / "real")
    (elsewhere / "real").mkdir()
    stored(tmp_path / "out", 1)
    assert len(table_of(elsewhere / "real")) == 4


def test_linked_cells_of_an_evaluation_are_refused(elsewhere: Path, tmp_path: Path):
    evaluated(tmp_path / "out")
    shutil.move(tmp_path / "out" / "cells", elsewhere / "cells")
    (tmp_path / "out" / "cells").symlink_to(elsewhere / "cells")
    with pytest.raises((ValueError, OSError), match="cells is a link"):
        EvaluationCells(tmp_path / "out", EXPERIMENT, resume=True)


@pytest.mark.parametrize("kind", ["link", "dangling", "hard", "pipe", "folder"])
def test_a_lock_that_is_no_plain_file_is_refused_and_left(
    kind: str, elsewhere: Path, tmp_path: Path
):
    out = tmp_path / "out"
    out.mkdir()
    mine = elsewhere / "mine.txt"
    match kind:
        case "link":
            (out / LOCK).symlink_to(mine)
        case "dangling":
            (out / LOCK).symlink_to(elsewhere / "new.txt")
        case "hard":
            os.link(mine, out / LOCK)
        case "pipe":
            os.mkfifo(out / LOCK)
        case _:
            (out / LOCK).mkdir()
    before = everything(tmp_path)
    with within(10), pytest.raises(OSError, match=f"{LOCK}.* remove it"), claim(out, True):
        pass
    assert everything(tmp_path) == before


# --- what a lock says -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "said",
    [
        {"command": f"niah {ESCAPE}", "pid": ESCAPE, "host": "h", "since": "s"},
        {"command": {"a": ESCAPE}, "pid": [1], "host": 2, "since": None},
        {"command": "x" * 10**6, "pid": 1, "host": "h", "since": "s"},
        [],
        "[" * 100_000,
    ],
)
def test_control_characters_of_a_lock_file_do_not_reach_the_terminal(said: object, tmp_path: Path):
    import fcntl

    text = said if isinstance(said, str) else json.dumps(said)
    (tmp_path / LOCK).write_text(text)
    with (tmp_path / LOCK).open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(FolderInUseError) as error, claim(tmp_path, True):
            pass
    assert str(error.value).isprintable() and len(str(error.value)) < 1000
    assert "is in use by" in str(error.value)


# --- looked at first ------------------------------------------------------------------------------


def foreign_files(folder: Path) -> None:
    """Put files into a folder that look like those which killed runs leave."""
    folder.mkdir()
    for name in (".tmpAbCd12", ".notes.txt.123.tmp", "notes.txt"):
        (folder / name).write_text("mine")


@pytest.mark.parametrize("kind", ["sweep", "evaluation", "reproduction", "harvest"])
def test_a_folder_of_something_else_is_left_as_it_is(kind: str, tmp_path: Path):
    foreign_files(out := tmp_path / "out")
    before = everything(tmp_path)
    with pytest.raises((ValueError, FileExistsError), match="another"), claim(out, True):
        match kind:
            case "sweep":
                Store(out, EXPERIMENT, resume=True)
            case "evaluation":
                EvaluationCells(out, EXPERIMENT, resume=True)
            case "reproduction":
                recipe_for(packaged(), QUICK).save(out, "thesis2025", resume=True)
            case _:
                settings = {"resume": True, "verbose": False}
                harvest(model_named(), documents_of(), RESID, out, context_length=8, **settings)
    assert everything(tmp_path) == before


# --- as before ------------------------------------------------------------------------------------

OLD_SCHEMA = (
    "CREATE TABLE IF NOT EXISTS meta (key PRIMARY KEY, value)",
    "CREATE TABLE IF NOT EXISTS cells (prompt_id TEXT NOT NULL, setting TEXT NOT NULL, stage TEXT, "
    "k INTEGER, needle_id TEXT, city TEXT, template TEXT, read_twice INTEGER, "
    "n_distractors INTEGER, length INTEGER, depth REAL, needle_start INTEGER, "
    "needle_stop INTEGER, in_window INTEGER, output TEXT, graded REAL, accuracy REAL, "
    "binary INTEGER, released REAL, n_new_tokens INTEGER, min_margin REAL, seconds REAL, "
    "PRIMARY KEY (prompt_id, setting))",
)
"""As the first version of the library wrote it."""


def test_a_folder_of_the_first_version_opens_and_is_gone_on_with(tmp_path: Path):
    with closing(sqlite3.connect(tmp_path / FILE)) as connection:
        for statement in OLD_SCHEMA:
            connection.execute(statement)
        said = [("format", 1), ("experiment", json.dumps(EXPERIMENT))]
        connection.executemany("INSERT INTO meta VALUES (?, ?)", said)
        for cell in cells_for(0):
            row = {name: cell[name] for name in list(COLUMNS)[:22]}
            marks = ", ".join("?" * len(row))
            connection.execute(f"INSERT INTO cells VALUES ({marks})", [*row.values()])
        connection.commit()
    assert list(read_cells(tmp_path)["prompt_id"]) == ["p0"] * 4
    store = Store(tmp_path, EXPERIMENT, resume=True)
    store.add(cells_for(1))
    store.close()
    assert set(table_of(tmp_path)["prompt_id"]) == {"p0", "p1"}
