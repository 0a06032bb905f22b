"""`save_pretrained(overwrite=True)` leaves the old checkpoint or the new one, and never less."""

from __future__ import annotations

import importlib
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.outputs import whole_folders
from tests.models import griffin_config, random_model

SAVE = importlib.import_module("weights_conversion.save")  # by name, it is the function
SMALL_SHARD = 2000


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """Return a folder with a sharded checkpoint, a tokenizer's file and a file of the user's."""
    folder = tmp_path / "saved"
    random_model(griffin_config("RA"), seed=1).save_pretrained(folder, max_shard_size=SMALL_SHARD)
    (folder / "README.md").write_text("mine")
    (folder / "tokenizer.model").write_text("of the old one")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def is_of(folder: Path, seed: int) -> bool:
    model = random_model(griffin_config("RA"), seed=seed)
    loaded = HookedHybrid.from_pretrained(folder)
    pairs = zip(loaded.parameters(), model.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("at_once", [True, False])
def test_a_checkpoint_is_replaced_whole(
    at_once: bool, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not at_once:
        monkeypatch.setattr(whole_folders, "_exchange_in_one_step", lambda new, old: False)
    assert any("-of-" in name for name in contents(saved))
    random_model(griffin_config("RA"), seed=2).save_pretrained(saved, overwrite=True)
    left = {"config.json", "model.safetensors", "README.md"}
    assert set(contents(saved)) == left
    assert contents(saved)["README.md"] == b"mine"
    assert is_of(saved, seed=2)
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_a_model_may_replace_the_checkpoint_it_was_read_from(saved: Path) -> None:
    (saved / "tokenizer.model").unlink()
    HookedHybrid.from_pretrained(saved).save_pretrained(saved, overwrite=True)
    assert is_of(saved, seed=1)


def test_a_new_or_empty_folder_is_written_and_a_link_is_followed(
    saved: Path, tmp_path: Path
) -> None:
    model = random_model(griffin_config("RA"), seed=3)
    model.save_pretrained(tmp_path / "new", overwrite=True)
    (tmp_path / "empty").mkdir()
    model.save_pretrained(tmp_path / "empty", overwrite=True)
    (tmp_path / "link").symlink_to(saved, target_is_directory=True)
    model.save_pretrained(tmp_path / "link", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert is_of(saved, seed=3) and is_of(tmp_path / "new", 3) and is_of(tmp_path / "empty", 3)


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda folder: (folder / "config.json").unlink(), "holds no checkpoint"),
        (
            lambda f: (f / "config.json").write_text('{"editor": "vim"}'),
            "no config.json of a model",
        ),
        (lambda f: (f / "config.json").write_text("[]"), "no config.json of a model"),
        (lambda folder: (folder / "runs").mkdir(), "holds 'runs' too"),
        (lambda folder: (folder / "link").symlink_to(folder / "README.md"), "holds 'link' too"),
    ],
)
def test_what_is_no_checkpoint_is_not_replaced(make: Any, match: str, saved: Path) -> None:
    make(saved)
    before = sorted(path.name for path in saved.iterdir())
    with pytest.raises(FileExistsError, match=match):
        random_model(griffin_config("RA")).save_pretrained(saved, overwrite=True)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        random_model(griffin_config("RA")).save_pretrained(saved)
    assert sorted(path.name for path in saved.iterdir()) == before


@pytest.mark.parametrize("step", ["save_file", "to_disk", "exchange"])
def test_after_an_error_the_old_checkpoint_is_as_it_was(
    step: str, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **options: Any) -> None:
        raise OSError("No space left on device")

    before = contents(saved)
    monkeypatch.setattr(SAVE, step, fail)
    with pytest.raises(OSError, match="No space left"):
        random_model(griffin_config("RA"), seed=2).save_pretrained(saved, overwrite=True)
    assert contents(saved) == before
    assert [path.name for path in saved.parent.iterdir()] == ["saved"]


def test_where_the_second_name_cannot_be_changed_the_first_is_changed_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(whole_folders, "_exchange_in_one_step", lambda new, old: False)
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "a").write_text("a")
    with pytest.raises(FileNotFoundError):
        whole_folders.exchange(tmp_path / "not there", tmp_path / "old")
    assert (tmp_path / "old" / "a").read_text() == "a"
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="os.fork is not there")
@pytest.mark.parametrize("step", ["_write_json", "save_file", "to_disk", "exchange", "rmtree"])
def test_a_killed_process_leaves_a_whole_checkpoint(step: str, saved: Path) -> None:
    child = os.fork()
    if child == 0:
        where = SAVE.shutil if step == "rmtree" else SAVE
        setattr(where, step, lambda *args, **options: os.kill(os.getpid(), signal.SIGKILL))
        try:
            random_model(griffin_config("RA"), seed=2).save_pretrained(saved, overwrite=True)
        finally:
            os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WTERMSIG(status) == signal.SIGKILL
    (saved / "tokenizer.model").unlink(missing_ok=True)
    assert is_of(saved, seed=2 if step == "rmtree" else 1)
