"""One run at a time in a folder of results, however the others ended."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hooked_hybrid.commands.program import build_app
from hooked_hybrid.niah.store import FILE, Store
from hooked_hybrid.outputs.folders import (
    LOCK,
    FolderInUseError,
    claim,
    holds_results,
    remove_unfinished,
)
from tests.stores import EXPERIMENT, cells_for, stored, table_of

ROOT = Path(__file__).parent.parent.parent


HOLD = """
import sys, time
from pathlib import Path
sys.argv[0] = "/some/bin/hooked-hybrid"
from hooked_hybrid.outputs.folders import claim
with claim(Path(sys.argv[1]), False):
    (Path(sys.argv[1]) / "begun.csv").write_text("")
    time.sleep(600)
"""


def test_the_error_of_a_second_run_names_the_first_and_a_dead_runs_lock_does_not_block(
    tmp_path: Path,
):
    folder = tmp_path / "my results"
    first = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), "--k", "0"], cwd=ROOT)
    while not (folder / "begun.csv").exists():
        assert first.poll() is None
        time.sleep(0.01)
    try:
        said = rf"in use by hooked-hybrid .*my results.* --k 0 \(process {first.pid} on .*wait"
        for resume in (False, True):
            with pytest.raises(FolderInUseError, match=said), claim(folder, resume):
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
    with claim(folder, True):
        assert json.loads((folder / LOCK).read_text())["pid"] == os.getpid()
    assert time.monotonic() - begun < 2
    assert not (folder / LOCK).exists()


def test_a_thread_holds_a_folder_for_itself_and_may_claim_it_again(tmp_path: Path):
    found: list[BaseException | None] = []

    def other() -> None:
        try:
            with claim(tmp_path, True):
                found.append(None)
        except FolderInUseError as error:
            found.append(error)

    def in_thread() -> None:
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with claim(tmp_path, False):
        with claim(tmp_path / ".." / tmp_path.name, False):
            in_thread()
        in_thread()
    in_thread()
    assert [type(error) for error in found] == [FolderInUseError, FolderInUseError, type(None)]


def test_a_fork_that_ends_does_not_release_its_parents_lock(tmp_path: Path):
    done = subprocess.run([sys.executable, "-c", FORK, tmp_path], cwd=ROOT, capture_output=True)
    assert done.stdout.decode().split() == ["True", "FolderInUseError"], done.stderr.decode()


FORK = """
import os, sys, threading
from pathlib import Path
from hooked_hybrid.outputs.folders import LOCK, claim

def another_run():
    try:
        with claim(Path(sys.argv[1]), True):
            print("got in")
    except OSError as error:
        print(type(error).__name__)

with claim(Path(sys.argv[1]), False):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        print((Path(sys.argv[1]) / LOCK).exists())
        thread = threading.Thread(target=another_run)
        thread.start()
        thread.join()
"""


def test_two_runs_that_met_in_spite_of_the_lock_lose_no_cell(tmp_path: Path):
    first = Store(tmp_path, EXPERIMENT)
    first.add(cells_for(0))
    (tmp_path / LOCK).unlink()  # by hand; or there never was one, as on some file systems

    def second() -> None:
        store = Store(tmp_path, EXPERIMENT, resume=True)
        store.add(cells_for(1))
        store.close()

    thread = threading.Thread(target=second)
    thread.start()
    thread.join()
    first.add(cells_for(2))
    first.close()
    assert list(table_of(tmp_path)["prompt_id"].unique()) == ["p0", "p1", "p2"]


def test_another_program_that_reads_the_store_is_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = stored(tmp_path / "r", 1)
    reader = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    reader.executescript("BEGIN; SELECT * FROM cells")
    store = Store(tmp_path / "r", EXPERIMENT, resume=True)
    done = threading.Timer(1.5, lambda: reader.execute("COMMIT"))
    done.start()
    store.add(cells_for(1))
    store.close()
    monkeypatch.setattr("hooked_hybrid.niah.store.PATIENCE", 0.1)
    store = Store(tmp_path / "r", EXPERIMENT, resume=True)
    reader.executescript("BEGIN; SELECT * FROM cells")
    with pytest.raises(OSError, match="database is locked.* close what else has it open"):
        store.add(cells_for(2))
    reader.close()
    store.add(cells_for(2))
    assert store.done() == {"p0", "p1", "p2"}
    store.close()


def test_a_claim_that_comes_to_nothing_leaves_nothing(tmp_path: Path):
    with pytest.raises(ValueError, match="bad input"), claim(tmp_path / "a" / "b", False):
        raise ValueError("bad input")
    assert not list(tmp_path.iterdir())
    with claim(tmp_path / "a" / "b", False):
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
def test_a_file_system_without_locks_causes_a_warning(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", none)
    with (
        pytest.warns(UserWarning, match="file system without locks"),
        claim(tmp_path, False),
    ):
        (tmp_path / "a.csv").write_text("")
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]
