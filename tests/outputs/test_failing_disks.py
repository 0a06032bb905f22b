"""Results on disks that are full or closed, and under names of nowhere."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hooked_hybrid.commands.convert import main as convert
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.evaluation.cells import Cell, calls_of, cells_of
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.report.report import write_report
from hooked_hybrid.niah.store import FILE, Store
from hooked_hybrid.niah.sweep import Setting, niah
from hooked_hybrid.outputs.folders import claim, replacing
from tests.niah.test_summary import sweep_table
from tests.niah.test_sweep import QUIET, model_of, prompts_of, same_but_for_times
from tests.stores import CELL, EXPERIMENT, N_SETTINGS, cells_for, evaluated, stored, table_of

FULL = "free some space on the disk of .* then go on"


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
        """Refuse all further writes."""
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


@pytest.mark.parametrize("leave", [0, 4096, 16384, 65536])
def test_a_sweep_on_a_full_disk_keeps_its_cells_and_continues(leave: int, disk: Disk):
    (disk.place / "r").mkdir()
    disk.fill(leave)
    with pytest.raises(OSError, match=FULL):
        stored(disk.place / "r", 100)
    n = len(table_of(disk.place / "r")) if (disk.place / "r" / FILE).exists() else 0
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


def test_a_conversion_that_cannot_be_written_is_an_error_and_leaves_no_file(
    disk: Disk, capsys: pytest.CaptureFixture[str]
):
    for target in (disk.place / "model", Path("/proc/nowhere/model")):
        assert convert(["tiny-griffin", str(target)]) == 1
        assert capsys.readouterr().err.startswith(f"error: {target}")
    assert not list(disk.place.iterdir())


def test_the_lock_holds_on_a_full_disk(disk: Disk):
    disk.fill()
    with claim(disk.place / "r", False):
        assert _in_another_thread(lambda: claim(disk.place / "r", True).__enter__()) is not None
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


def test_a_folder_that_cannot_be_written_is_an_error_before_any_work(
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
        with pytest.raises(OSError, match=said), claim(folder, True):
            pass
    with pytest.raises(OSError, match=said), replacing(disk.place / "r" / "table.csv") as temporary:
        temporary.write_text("new")
    assert [p.name for p in disk.place.iterdir()] == ["r"] and path.read_bytes() == before


def _not_loaded(*_: Any, **__: Any) -> None:
    raise AssertionError("a model is loaded before the folder is looked at")


def test_a_file_over_a_users_limit_is_an_error_and_kept_files_are_complete(tmp_path: Path):
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
    assert len(table_of(tmp_path / "r")) % N_SETTINGS == 0
    assert (tmp_path / "table.csv").read_text() == "old"
    assert {path.name for path in tmp_path.iterdir()} == {"r", "table.csv"}


@pytest.mark.parametrize("folder", [False, True])
def test_a_folder_in_the_way_is_an_error_and_the_target_of_a_link_stays(
    folder: bool, tmp_path: Path
):
    """A folder of that name is refused; a link is replaced, and what it points to is left."""
    target = tmp_path / "mine"
    target.mkdir() if folder else target.write_text("mine")
    (tmp_path / "table.csv").symlink_to(target)
    with replacing(tmp_path / "table.csv") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "table.csv").read_text() == "new"
    assert target.is_dir() if folder else target.read_text() == "mine"
    (tmp_path / "picture.png").mkdir()
    with (
        pytest.raises(OSError, match=r"picture.png cannot be written \(Is a directory\)"),
        replacing(tmp_path / "picture.png") as temporary,
    ):
        temporary.write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == {"mine", "table.csv", "picture.png"}


def test_an_unreadable_file_is_not_reported_as_the_one_to_be_written(tmp_path: Path):
    with (
        pytest.raises(FileNotFoundError, match="No such file .*texts.jsonl"),
        replacing(tmp_path / "out" / "table.csv") as temporary,
    ):
        temporary.write_text((tmp_path / "texts.jsonl").read_text())
    assert not list((tmp_path / "out").iterdir())


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


def test_an_evaluation_on_a_full_disk_keeps_its_cells(disk: Disk):
    cells = evaluated(disk.place / "r")
    disk.fill()
    with pytest.raises(OSError, match=FULL):
        cells.add(Cell(**{**CELL.__dict__, "form": "ablated"}))
    with pytest.raises(OSError, match=FULL):
        cells.note({"groups": {}, "forms": [], "missing": {}})
    assert cells_of(disk.place / "r") == [CELL] and len(calls_of(disk.place / "r")) == 1
    assert sum(path.is_file() for path in (disk.place / "r").rglob("*")) == 3


# --- names of nowhere, for every command ----------------------------------------------------------


@pytest.mark.parametrize(
    "command",
    ["niah", "heads", "static", "cached-state", "eval --tasks x", "reproduce --paper thesis2025"],
)
def test_an_unknown_name_is_an_error_before_any_work(
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
