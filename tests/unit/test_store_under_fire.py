"""Results under fire: stores cut short, locks, full disks, read-only folders, names of nowhere."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hooked_hybrid.cli import build_app
from hooked_hybrid.evaluation.cells import Cell, Cells, calls_of, cells_of
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.report import write_report
from hooked_hybrid.niah.store import COLUMNS, FILE, FORMAT, Store
from hooked_hybrid.niah.sweep import Setting, niah
from hooked_hybrid.results_folder import (
    LOCK,
    FolderInUseError,
    claimed,
    holds_results,
    remove_unfinished,
    replacing,
)
from tests.unit.test_niah_statistics import sweep_table
from tests.unit.test_niah_sweep import QUIET, model_of, prompts_of, same_but_for_times

ROOT = Path(__file__).parent.parent.parent
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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    return stored(tmp_path_factory.mktemp("whole") / "r").read_bytes()


def refused(folder: Path, message: str, error: type[Exception] = ValueError) -> None:
    """Assert that a store is refused, and that nothing in its folder has changed."""
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(error, match=message):
        Store(folder, EXPERIMENT, resume=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


# --- stores that are not whole, not ours or not of this version -----------------------------------


def test_a_store_cut_short_anywhere_is_refused_and_left_as_it_is(whole: bytes, tmp_path: Path):
    rng = random.Random(0)
    lengths = {0, 1, 99, 100, 4095, 4096, 4097, len(whole) - 4096, len(whole) - 1}
    for n in sorted(lengths | {rng.randrange(len(whole)) for _ in range(40)}):
        (tmp_path / FILE).write_bytes(whole[:n])
        refused(tmp_path, "damaged")


def test_flipped_bits_are_refused_or_do_not_matter(whole: bytes, tmp_path: Path):
    (tmp_path / FILE).write_bytes(whole)
    expected, rng, n_refused = _table(tmp_path), random.Random(1), 0
    for _ in range(100):
        bits = bytearray(whole)
        bits[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        (tmp_path / FILE).write_bytes(bits)
        try:
            assert _table(tmp_path).equals(expected)
        except ValueError as error:
            assert f"{FILE} " in str(error) and "nothing in it was changed" in str(error)
            n_refused += 1
        assert (tmp_path / FILE).read_bytes() == bits
    assert n_refused > 25


def _table(folder: Path) -> Any:
    store = Store(folder, EXPERIMENT, resume=True)
    try:
        return store.table()
    finally:
        store.close()


@pytest.mark.parametrize(
    ("statements", "message"),
    [
        (["UPDATE meta SET value = 9 WHERE key = 'format'"], "newer version .* update the library"),
        (
            ["UPDATE meta SET value = 9 WHERE key = 'format'", "ALTER TABLE cells RENAME TO parts"],
            "newer version",
        ),
        (["UPDATE meta SET value = 'x' WHERE key = 'format'"], "damaged"),
        (["DELETE FROM meta WHERE key = 'format'"], "damaged"),
        (["DELETE FROM meta WHERE key = 'experiment'"], "damaged"),
        (["UPDATE meta SET value = '{' WHERE key = 'experiment'"], "damaged"),
        (["UPDATE meta SET value = '3' WHERE key = 'experiment'"], "damaged"),
        (["ALTER TABLE cells DROP COLUMN output"], "other columns"),
        (["UPDATE cells SET output = 'better' WHERE prompt_id = 'p0'"], "not those that were wr"),
        (["DELETE FROM cells WHERE prompt_id = 'p0'"], "not those that were written"),
        (["DROP TABLE meta"], "holds no sweep"),
    ],
)
def test_a_store_that_was_changed_is_refused(
    statements: list[str], message: str, tmp_path: Path
) -> None:
    connection = sqlite3.connect(stored(tmp_path / "r", 2))
    for statement in statements:
        connection.execute(statement)
    connection.commit()
    connection.close()
    refused(tmp_path / "r", message)


def test_other_files_are_not_taken_for_a_sweeps(tmp_path: Path):
    for name in ("text", "other", "notes"):
        (tmp_path / name).mkdir()
    (tmp_path / "text" / FILE).write_text("a file of mine " * 400)
    refused(tmp_path / "text", "not a database")
    connection = sqlite3.connect(tmp_path / "other" / FILE)
    connection.execute("CREATE TABLE mine (x)")
    connection.close()
    refused(tmp_path / "other", "holds no sweep")
    (tmp_path / "notes" / "table.csv").write_text("mine")
    refused(tmp_path / "notes", f"no {FILE}", FileExistsError)


def test_cells_of_the_first_format_are_read_and_gone_on_with(tmp_path: Path):
    connection = sqlite3.connect(stored(tmp_path / "r", 2))
    connection.execute("DELETE FROM meta WHERE key = 'digest'")
    connection.execute("UPDATE meta SET value = 1 WHERE key = 'format'")
    connection.commit()
    connection.close()
    store = Store(tmp_path / "r", EXPERIMENT, resume=True)
    assert store.done() == {"p0", "p1"}
    store.add(cells_for(2))
    store.close()
    store = Store(tmp_path / "r", EXPERIMENT, resume=True)
    assert len(store.table()) == 3 * N_SETTINGS
    with pytest.raises(ValueError, match="some of these cells already"):
        store.add([*cells_for(3), *cells_for(1)])
    assert store.done() == {"p0", "p1", "p2"}
    assert dict(store.connection.execute("SELECT * FROM meta"))["format"] == FORMAT
    store.close()


HALF_WRITTEN = """
import os, signal, sqlite3, sys
connection = sqlite3.connect(sys.argv[1])
connection.execute("PRAGMA cache_size = 1")  # so that pages go to the file before the commit
connection.execute("UPDATE cells SET output = 'half'")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_transaction_that_was_killed_is_undone(whole: bytes, tmp_path: Path):
    (tmp_path / FILE).write_bytes(whole)
    expected = _table(tmp_path)
    subprocess.run([sys.executable, "-c", HALF_WRITTEN, tmp_path / FILE], check=False)
    assert (tmp_path / f"{FILE}-journal").stat().st_size
    assert (tmp_path / FILE).read_bytes() != whole
    assert _table(tmp_path).equals(expected)
    assert not (tmp_path / f"{FILE}-journal").exists()


# --- one run at a time ----------------------------------------------------------------------------


HOLD = """
import sys, time
from pathlib import Path
sys.argv[0] = "/some/bin/hooked-hybrid"
from hooked_hybrid.results_folder import claimed
with claimed(Path(sys.argv[1]), False):
    (Path(sys.argv[1]) / "begun.csv").write_text("")
    time.sleep(600)
"""


def test_a_second_run_is_told_of_the_first_and_a_dead_ones_lock_blocks_nobody(tmp_path: Path):
    folder = tmp_path / "my results"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), "--k", "0"], cwd=ROOT)
    while not (folder / "begun.csv").exists():
        assert first.poll() is None
        time.sleep(0.01)
    try:
        said = rf"in use by hooked-hybrid .*my results.* --k 0 \(process {first.pid} on .*wait"
        for resume in (False, True):
            with pytest.raises(FolderInUseError, match=said), claimed(folder, resume):
                pass
        with pytest.raises(FolderInUseError):
            Store(folder, EXPERIMENT, resume=True)
        words = ["niah", "--out", str(folder), "--resume"]
        result = CliRunner().invoke(build_app(), words)
        assert result.exit_code == 1 and f"process {first.pid}" in result.stderr
        assert {path.name for path in folder.iterdir()} == {LOCK, "begun.csv"}
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
    assert (folder / LOCK).exists()
    begun = time.monotonic()
    with claimed(folder, True):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 2
    assert not (folder / LOCK).exists()


def test_a_thread_holds_a_folder_for_itself_and_may_claim_it_again(tmp_path: Path):
    found: list[BaseException | None] = []

    def other() -> None:
        try:
            with claimed(tmp_path, True):
                found.append(None)
        except FolderInUseError as error:
            found.append(error)

    def in_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with claimed(tmp_path, False):
        with claimed(tmp_path / ".." / tmp_path.name, False):
            in_thread()
        in_thread()
    in_thread()
    assert [type(error) for error in found] == [FolderInUseError, FolderInUseError, type(None)]


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="bad input"), claimed(tmp_path / "a" / "b", False):
        raise ValueError("bad input")
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "a" / "b", False):
        (tmp_path / "a" / "b" / "kept.txt").write_text("")
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "b", "kept.txt"]


def test_what_killed_runs_began_is_removed_and_nothing_else(tmp_path: Path):
    store = f".{FILE}.{os.getpid()}.tmp"  # as left by a process that had our number
    mine = (store, f"{store}-journal", ".table.csv.123.tmp", "maps/.a.png.7.tmp")
    others = ("table.csv", ".hidden", ".a.tmp", "b.12.tmp", "run/.c.csv.8.tmp", "run/" + LOCK)
    for name in (*mine, *others):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("half")
    remove_unfinished(tmp_path)
    left = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert left == {*others}
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / store).write_text("half")
    (tmp_path / "new" / LOCK).write_text("")
    assert not holds_results(tmp_path / "new")
    assert stored(tmp_path / "new", 1).exists()
    assert [path.name for path in (tmp_path / "new").iterdir()] == [FILE]


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_without_locks_is_told_of(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with pytest.warns(UserWarning, match="file system without locks"), claimed(tmp_path, False):
        (tmp_path / "a.csv").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


# --- disks that are full or closed ----------------------------------------------------------------


class Disk:
    """A small disk of its own."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def fill(self, leave: int = 0) -> None:
        """Take all room but so many bytes."""
        room = shutil.disk_usage(self.place).free - leave
        (self.place / "filler").write_bytes(bytes(max(room, 0)))

    def free(self) -> None:
        """Give it back."""
        (self.place / "filler").unlink()

    def close(self) -> None:
        """Let nobody write any more."""
        subprocess.run(["mount", "-o", "remount,ro", self.place], check=True)


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Disk]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2M", "none", place]
    if not shutil.which("mount") or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("disks can be mounted by root only")
    try:
        yield Disk(place)
    finally:
        subprocess.run(["umount", "-l", place], check=True)


FULL = "free some space on the disk of .* then go on"


@pytest.mark.parametrize("leave", [0, 4096, 16384, 65536])
def test_a_sweep_on_a_full_disk_keeps_its_cells_and_goes_on(leave: int, disk: Disk):
    (disk.place / "r").mkdir()
    disk.fill(leave)
    with pytest.raises(OSError, match=FULL):
        stored(disk.place / "r", 100)
    n = len(_table(disk.place / "r")) if (disk.place / "r" / FILE).exists() else 0
    assert n % N_SETTINGS == 0 and (n > 0 or leave < 65536)
    disk.free()
    store = Store(disk.place / "r", EXPERIMENT, resume=True)
    for i in range(n // N_SETTINGS, 100):
        store.add(cells_for(i))
    assert len(store.done()) == 100
    store.close()
    assert [path.name for path in (disk.place / "r").iterdir()] == [FILE]


def test_a_real_sweep_on_a_full_disk_ends_as_an_undisturbed_one(disk: Disk):
    about = model_of("griffin"), prompts_of("griffin"), [Setting("a"), Setting("b")]
    undisturbed = niah(*about, **QUIET)
    disk.fill(leave=28 * 1024)
    with pytest.raises(OSError, match=FULL):
        niah(*about, out=disk.place / "r", **QUIET)
        disk.fill()
        niah(*about, out=disk.place / "other", **QUIET)
    disk.free()
    for name in ("r", "other"):
        found = niah(*about, out=disk.place / name, resume=True, **QUIET)
        assert same_but_for_times(found, undisturbed)


def test_a_report_on_a_full_disk_leaves_whole_files_and_is_made_anew(disk: Disk):
    table = sweep_table(ks=(2,), stages=("both",), window=None)

    def files(folder: Path) -> dict[str, bytes]:
        return {str(p): p.read_bytes() for p in folder.rglob("*") if p.is_file()}

    written = write_report(table, [], {}, disk.place / "whole")
    wanted = {
        name.replace("whole", "r"): kept for name, kept in files(disk.place / "whole").items()
    }
    disk.fill(leave=written.pictures[0].stat().st_size + 8192)
    with pytest.raises(OSError, match=FULL):
        write_report(table, [], {}, disk.place / "r")
    found = files(disk.place / "r")
    assert found and found.items() < wanted.items()
    disk.free()
    write_report(table, [], {}, disk.place / "r")
    assert files(disk.place / "r") == wanted


def test_the_lock_holds_on_a_full_disk(disk: Disk):
    disk.fill()
    with claimed(disk.place / "r", False):
        assert _in_another_thread(lambda: claimed(disk.place / "r", True).__enter__()) is not None
    assert not (disk.place / "r").exists()


def _in_another_thread(act: Callable[[], Any]) -> BaseException | None:
    found: list[BaseException] = []

    def run() -> None:
        try:
            act()
        except OSError as error:
            found.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return found[0] if found else None


def test_a_folder_that_cannot_be_written_is_said_before_any_work(
    disk: Disk, monkeypatch: pytest.MonkeyPatch
):
    path = stored(disk.place / "r", 2)
    before = path.read_bytes()
    disk.close()
    monkeypatch.setattr(HookedHybrid, "from_pretrained", _not_loaded)
    said = "Read-only file system.*make .* writable, or give another folder"
    for folder in (disk.place / "r", disk.place / "new"):
        result = CliRunner().invoke(build_app(), ["niah", "--out", str(folder), "--resume"])
        assert result.exit_code == 1 and len(result.stderr.splitlines()) == 1
        with pytest.raises(OSError, match=said), claimed(folder, True):
            pass
    with pytest.raises(OSError, match=said), replacing(disk.place / "r" / "table.csv") as temporary:
        temporary.write_text("new")
    assert [p.name for p in disk.place.iterdir()] == ["r"] and path.read_bytes() == before


def _not_loaded(*_: Any, **__: Any) -> None:
    raise AssertionError("a model is loaded before the folder is looked at")


def test_a_file_over_the_limit_of_a_user_is_said_and_what_is_kept_is_whole(tmp_path: Path):
    kept = resource.getrlimit(resource.RLIMIT_FSIZE)
    (tmp_path / "table.csv").write_text("old")
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**15, kept[1]))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            stored(tmp_path / "r", 200)
        with pytest.raises(OSError, match="ulimit"), replacing(tmp_path / "table.csv") as temporary:
            temporary.write_bytes(bytes(2**16))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, kept)
    assert len(_table(tmp_path / "r")) % N_SETTINGS == 0
    assert (tmp_path / "table.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"r", "table.csv"}


def test_a_file_is_on_the_disk_before_it_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    done: list[str] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("disk"), sync(fd)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("name"), rename(a, b)))
    with replacing(tmp_path / "table.csv") as temporary:
        temporary.write_text("new")
    assert done == ["disk", "name", "disk"]  # at last the folder, which holds the name


# --- names of nowhere, for every command ----------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["niah", "heads", "static", "cached-state", "eval --tasks x", "reproduce --paper thesis2025"],
)
def test_a_name_of_nowhere_is_said_before_any_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HookedHybrid, "from_pretrained", _not_loaded)
    (tmp_path / "file").write_text("mine")
    for out, message in (
        (str(tmp_path / "file"), "cannot be written (File exists): give another folder"),
        (str(tmp_path / "file" / "below"), "(Not a directory): give another folder"),
        (str(tmp_path / ("n" * 300)), "(File name too long): give another folder"),
        ("/proc/nowhere", "cannot be written"),
        ("/", "/ is not empty"),
        (" ", "is blank"),
    ):
        result = CliRunner().invoke(build_app(), [*command.split(), "--out", out])
        assert result.exit_code in (1, 2), result.output
        assert message in " ".join(result.stderr.split()), result.output
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# --- results of an evaluation ---------------------------------------------------------------------


CELL = Cell("t", "base", None, "acc,none", 0.5, None, True, 4, 0, {}, None, {}, 1.0)


def evaluated(folder: Path) -> Cells:
    cells = Cells(folder, EXPERIMENT)
    cells.add(CELL)
    cells.note({"groups": {"t": ["t"]}, "forms": [], "missing": {}})
    return cells


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", '{"model": "m', "damaged .*give another folder"),
        ("evaluation.json", "[]", "damaged"),
        ("evaluation.json", '{"format": 9, "model": "m"}', "newer version"),
        ("calls.json", "[1]", "damaged"),
        ("calls.json", "{}", "damaged .*remove it"),
        ("cells/t--base.json", "", "damaged .*remove it"),
        ("cells/t--base.json", '{"task": "t"}', "no cell of this version"),
        ("cells/t--base.json", '{"better": 1}', "no cell of this version"),
    ],
)
def test_an_evaluation_that_is_damaged_is_refused_and_left(
    name: str, content: str, message: str, tmp_path: Path
) -> None:
    evaluated(tmp_path)
    (tmp_path / name).write_text(content)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match=message):
        Cells(tmp_path, EXPERIMENT, resume=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_an_evaluation_on_a_full_disk_keeps_its_cells(disk: Disk):
    cells = evaluated(disk.place / "r")
    disk.fill()
    with pytest.raises(OSError, match=FULL):
        cells.add(Cell(**{**CELL.__dict__, "form": "ablated"}))
    with pytest.raises(OSError, match=FULL):
        cells.note({"groups": {}, "forms": [], "missing": {}})
    assert cells_of(disk.place / "r") == [CELL] and len(calls_of(disk.place / "r")) == 1
    assert sum(path.is_file() for path in (disk.place / "r").rglob("*")) == 3


# --- kills ----------------------------------------------------------------------------------------


def test_a_command_that_is_killed_again_and_again_ends_as_an_undisturbed_one():
    n = os.environ.get("HOOKED_HYBRID_KILLS", "4")
    command = [sys.executable, "-m", "experiments.under_fire.kills", "--kills", n]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
    said = json.loads(found.stdout)
    assert said["kills"] == int(n) and said["landed"]["in the sweep"]
