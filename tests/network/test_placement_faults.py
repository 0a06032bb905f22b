"""The offload folder under fire: several processes, full disks, copies that look alike."""

from __future__ import annotations

import os
import re
import shutil
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.network.placement import offload as files
from hooked_hybrid.network.placement import place
from hooked_hybrid.network.placement.offload import OffloadFolder, identity_of, layout_of
from hooked_hybrid.outputs.folders import claim
from tests.models import random_tokens, tiny_model

ON_DISK: dict[str, Any] = {"device_map": {"": "disk"}}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "jamba"
    tiny_model("jamba").save_pretrained(path)
    return path


def load(checkpoint: Path, folder: Path) -> HookedHybrid:
    return HookedHybrid.from_pretrained(checkpoint, offload_folder=folder, **ON_DISK)


@pytest.mark.filterwarnings("ignore:.*waiting until it is filled")
def test_of_several_that_load_at_once_one_fills_the_folder(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    written: list[str] = []
    write = OffloadFolder.write

    def slow(self: OffloadFolder, name: str, *rest: Any) -> None:
        written.append(name)
        write(self, name, *rest)

    monkeypatch.setattr(OffloadFolder, "write", slow)
    monkeypatch.setattr(files, "WAIT", 0.01)
    found: list[HookedHybrid] = []
    threads = [
        threading.Thread(target=lambda: found.append(load(checkpoint, tmp_path))) for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    tokens = random_tokens(n_pos=5)
    wanted = tiny_model("jamba")(tokens)
    assert len(found) == 3 and all(torch.equal(model(tokens), wanted) for model in found)
    assert len(written) == len(set(written)) == len(list(found[0].parameters()))


def test_waiting_for_a_folder_prints_the_process_waited_for(tmp_path: Path, monkeypatch: Any):
    model = tiny_model("griffin")
    folder, parameters = OffloadFolder(tmp_path, "one"), dict(model.named_parameters())
    is_held, is_over = threading.Event(), threading.Event()

    def hold() -> None:
        with claim(folder.path, resume=True):
            is_held.set()
            is_over.wait(10)

    monkeypatch.setattr(sys, "argv", ["run", "--device", "cuda: 0"])
    monkeypatch.setattr(files, "time", SimpleNamespace(sleep=lambda _: is_over.set()))
    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(10)
    with (
        pytest.warns(
            UserWarning,
            match=f"in use by run .*cuda: 0.*process {os.getpid()} .*:[^:]*[)]: waiting until",
        ),
        folder.filling(parameters),
    ):
        assert is_over.is_set()
    holder.join()


def test_a_whole_folder_is_read_without_writing_there(
    checkpoint: Path, tmp_path: Path, monkeypatch: Any
):
    load(checkpoint, tmp_path)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    for name in ("claim", "replacing", "remove_unfinished"):
        monkeypatch.setattr(files, name, refuse)
    tokens = random_tokens(n_pos=5)
    assert torch.equal(load(checkpoint, tmp_path)(tokens), tiny_model("jamba")(tokens))


def test_checkpoints_of_one_size_and_date_are_distinguished(checkpoint: Path, tmp_path: Path):
    copy = shutil.copytree(checkpoint, tmp_path / "copy")
    paths = sorted(copy.glob("*.safetensors"))
    assert identity_of(paths, torch.float32) != identity_of(paths, torch.bfloat16)
    assert re.fullmatch("[0-9a-f]{16}-float32", identity_of(paths, torch.float32))
    large = tmp_path / "large.safetensors"
    large.write_bytes(bytes(2**20))
    os.utime(large, ns=(0, 0))
    before = identity_of([large], torch.float32)
    content = bytearray(large.read_bytes())
    content[2**19 : 2**19 + 2**16] = b"1" * 2**16  # a matrix in the middle
    large.write_bytes(content)
    os.utime(large, ns=(0, 0))
    assert identity_of([large], torch.float32) != before


def test_another_layout_in_memory_gets_files_of_its_own():
    weight = torch.zeros(3, 4)
    assert re.fullmatch("[0-9a-f]{8}", layout_of({"w": weight}))
    lying = {"w": weight, "x": torch.zeros(4, 3).T}
    assert layout_of({"w": weight, "x": weight}) != layout_of(lying)
    assert layout_of(lying) == layout_of({"x": torch.ones(4, 3).T, "w": weight + 1})


def test_a_disk_that_fills_while_a_model_is_placed_leaves_it_as_it_was(
    tmp_path: Path, monkeypatch: Any
):
    model, n_written = tiny_model("jamba"), 0
    before, tokens = dict(model.named_parameters()), random_tokens(n_pos=5)
    make_room = files._make_room

    def full(*args: Any) -> None:
        nonlocal n_written
        n_written += 1
        if n_written > 5:
            raise OSError(28, "No space left on device")
        make_room(*args)

    monkeypatch.setattr(files, "_make_room", full)
    with pytest.raises(OSError, match="No space left"):
        place(model, {"": "meta", "blocks": "disk"}, tmp_path)
    assert all(p is before[n] for n, p in model.named_parameters()) and not list(tmp_path.iterdir())
    assert torch.equal(model(tokens), tiny_model("jamba")(tokens))


def test_files_of_a_process_leave_as_soon_as_they_are_mapped(tmp_path: Path, monkeypatch: Any):
    monkeypatch.setattr(OffloadFolder, "close", lambda self: None)  # as if it were killed here
    model = place(tiny_model("griffin"), {"": "disk"}, tmp_path)
    (own,) = tmp_path.iterdir()
    assert own.name.startswith("of-a-process-") and not list(own.iterdir())
    assert torch.equal(model(random_tokens()), tiny_model("griffin")(random_tokens()))


def test_a_folder_in_which_one_of_two_tensors_is_missing_is_filled(
    tmp_path: Path, monkeypatch: Any
):
    folder, there, missing = OffloadFolder(tmp_path, "x"), torch.zeros(4), torch.ones(5)
    folder.write("there", there, there)
    full = SimpleNamespace(free=19)
    monkeypatch.setattr(
        "hooked_hybrid.network.placement.offload.shutil.disk_usage", lambda path: full
    )
    with folder.filling({"there": there}):
        assert folder.has("there", there) and not folder.has("there", missing)
    both = {"there": there, "missing": missing}
    with pytest.raises(OSError, match="would take"), folder.filling(both):  # of 20 bytes
        pass
    full.free = 20
    with folder.filling(both):
        folder.write("missing", missing, missing)
    assert torch.equal(folder.read("missing", missing), missing)


def test_a_blank_folder_and_a_model_without_weights_are_refused(checkpoint: Path):
    with pytest.raises(ValueError, match="offload_folder is blank"):
        HookedHybrid.from_pretrained(checkpoint, offload_folder=" ", **ON_DISK)
    with pytest.raises(ValueError, match="has no weights"):
        place(HookedHybrid.meta(tiny_model("griffin").cfg), {"": "cpu"})
    partly = tiny_model("griffin")
    partly.blocks[1].to("meta")
    with pytest.raises(ValueError, match="has no weights"):
        place(partly, {"": "cpu"})
