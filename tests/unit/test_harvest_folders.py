"""Harvests that are killed, and folders that hold something already."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import signal
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from hooked_hybrid import interventions
from hooked_hybrid.harvest import HarvestedActivations, harvest
from hooked_hybrid.harvest.running import Runner
from hooked_hybrid.results_folder import FolderInUseError, claimed
from tests.harvests import (
    RESID,
    contents,
    documents_of,
    many_shards,
    model_named,
)
from tests.models import D_VOCAB, tiny_model

KILLS = int(os.environ.get("HARVEST_KILLS", "6"))
"""Kills that a harvest is resumed from; 300 for the figure in docs/harvest.md."""


def test_a_killed_harvest_goes_on_and_gives_the_same_bytes(tmp_path):
    wanted = contents(many_shards(tmp_path / "first").folder)
    start = time.perf_counter()
    assert contents(many_shards(tmp_path / "again").folder) == wanted
    longest = 0.5 * (time.perf_counter() - start)  # the first run is slower: it warms up
    assert sum(name.startswith("shard") for name in wanted) > 3
    context, draw = multiprocessing.get_context("fork"), random.Random(0)
    kills, rounds, partly = 0, 0, 0
    while kills < KILLS:
        folder = tmp_path / f"killed{rounds}"
        child = context.Process(target=many_shards, args=(folder,))
        child.start()
        child.join(draw.uniform(0, longest))
        if child.is_alive():
            os.kill(child.pid, signal.SIGKILL)
            child.join()
            kills += 1
            partly += bool(list(folder.glob("shard-*")))
            assert all(wanted[path.name] == path.read_bytes() for path in folder.glob("shard-*"))
        else:
            assert (child.exitcode, contents(folder)) == (0, wanted)
            rounds += 1
    many_shards(folder)
    assert contents(folder) == wanted
    said = {"kills": kills, "with a shard there": partly, "harvests": rounds + 1}
    (tmp_path / "kills.json").write_text(json.dumps(said))


def test_a_damaged_shard_is_made_again_and_a_changed_one_is_found(tmp_path):
    harvested = many_shards(tmp_path / "out")
    wanted = contents(harvested.folder)
    path = harvested.paths[2]
    path.write_bytes(wanted[path.name][:-100])
    with pytest.raises(ValueError, match="bytes, and index.json says .* go on with --resume"):
        HarvestedActivations(harvested.folder)
    with pytest.warns(UserWarning, match="is no whole shard of a harvest .* it is made again"):
        many_shards(harvested.folder)
    assert contents(harvested.folder) == wanted
    flipped = bytearray(wanted[path.name])
    flipped[-1] ^= 1
    path.write_bytes(flipped)
    with pytest.raises(ValueError, match="shard-00002.* is damaged at .* it is made again"):
        HarvestedActivations(harvested.folder).verify()
    path.unlink()
    many_shards(harvested.folder).verify()
    assert contents(harvested.folder) == wanted


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a harvest, which nothing may change."""
    return many_shards(tmp_path_factory.mktemp("made") / "out").folder


@pytest.mark.parametrize(
    ("changes", "differ"),
    [
        ({"context_length": 9}, "context_length"),
        ({"batch_size": 3}, "batch_size"),
        ({"shard_bytes": 7000}, "shard_tokens"),
        ({"seed": 1}, "seed"),
        ({"dtype": "bfloat16"}, "dtype, shard_tokens"),
        ({"drop_special": False}, "left_out"),
        ({"fwd_hooks": interventions.keep_top_heads(1)}, "interventions"),
    ],
)
def test_another_recipe_in_the_folder_is_refused(made, changes, differ):
    before = contents(made)
    with pytest.raises(ValueError, match=f"holds another harvest: {differ} differ; give another"):
        many_shards(made, **changes)
    assert contents(made) == before


def test_another_model_other_documents_and_other_folders_are_refused(tmp_path):
    settings = {"verbose": False, "resume": True}
    before = contents(harvest(model_named(), documents_of(), RESID, tmp_path, **settings).folder)
    with pytest.raises(ValueError, match="holds another harvest: model"):
        harvest(tiny_model(seed=1), documents_of(), RESID, tmp_path, **settings)
    with pytest.raises(ValueError, match="holds a harvest of other documents"):
        harvest(model_named(), documents_of(seed=1), RESID, tmp_path, **settings)
    with pytest.raises(FileExistsError, match="not empty"):
        harvest(model_named(), documents_of(), RESID, tmp_path, verbose=False)
    assert contents(tmp_path) == before
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds no harvest: give another folder"):
        harvest(model_named(), documents_of(), RESID, tmp_path / "other", **settings)


def test_a_folder_without_a_shard_takes_another_recipe(tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", interrupted)
        with pytest.raises(KeyboardInterrupt):
            many_shards(tmp_path / "out")
    with pytest.raises(ValueError, match="is not finished .0 shards are there.: go on with"):
        HarvestedActivations(tmp_path / "out")
    begun = tmp_path / "out" / ".tmpAbCd12"  # as safetensors leaves it when it is killed
    begun.touch()
    assert len(many_shards(tmp_path / "out", batch_size=1)) == 240
    assert not begun.exists()


def interrupted(self, batch, into) -> None:
    raise KeyboardInterrupt


def test_a_second_run_on_the_folder_is_told_so(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def second() -> None:
        try:
            many_shards(tmp_path / "out")
        except FolderInUseError as error:
            queue.put(str(error))

    with claimed(tmp_path / "out", resume=True):
        child = context.Process(target=second)
        child.start()
        assert "is in use by" in queue.get(timeout=20)
        child.join()


def test_no_room_on_the_disk_is_seen_before_the_first_shard(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 50_000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"240 tokens take .* GB, and .* are free in .*: harvest few"):
        many_shards(tmp_path / "out")
    assert not list((tmp_path / "out").glob("shard-*"))


def test_a_file_that_cannot_grow_is_an_error_and_leaves_whole_shards(tmp_path, made):
    """A limit on the size of files stands for a full disk: both refuse a write halfway."""
    wanted = contents(made)
    sizes = [len(data) for name, data in wanted.items() if name.startswith("shard")]
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (max(sizes) - 1, limits[1]))
    try:
        with pytest.raises(OSError, match=r"shard-.* cannot be written .*: .* then go on"):
            many_shards(tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    there = contents(tmp_path / "out")
    assert all(data == wanted[name] for name, data in there.items())
    assert contents(many_shards(tmp_path / "out").folder) == wanted


def test_memory_does_not_grow_with_the_number_of_shards(tmp_path):
    """Peak of the process's memory, above what it had: one shard's buffer, however many there are.

    A shard is 3 MB; twenty of them are 60.
    """
    model = model_named()
    tokens = torch.randint(3, D_VOCAB, (1, 20 * 28_000))

    def peak(n_shards: int, name: str) -> float:
        documents = tokens[:, : n_shards * 28_000]
        start = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks
        harvested = harvest(
            model, documents, "hook_embed", tmp_path / name, context_length=1000,
            shard_bytes=28_000 * 108, verbose=False,
        )  # fmt: skip
        assert len(harvested.paths) == n_shards
        return memory("VmHWM") - start

    peak(2, "warm")
    few, many = peak(2, "few"), peak(20, "many")
    assert many - few < 2 * 3.0


def memory(which: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) / 1024


class Elsewhere:
    """Workers as `RayWorkers`, without Ray: what they are sent is pickled, and the order theirs."""

    def __init__(self, moved: bool = False) -> None:
        self.moved = moved

    def results(self, model, job, units):
        job = pickle.loads(pickle.dumps(job))
        for shard in reversed(units[0]):
            header = next(job(model, [shard]))
            if self.moved:
                next(job.folder.glob("shard-*")).unlink()
            yield shard, header


def test_shards_that_workers_make_have_the_same_bytes(tmp_path, made):
    assert contents(many_shards(tmp_path / "out", workers=Elsewhere()).folder) == contents(made)
    next((tmp_path / "out").glob("shard-00001*")).unlink()
    assert contents(many_shards(tmp_path / "out", workers=Elsewhere()).folder) == contents(made)


def test_workers_that_write_to_another_disk_are_noticed(tmp_path):
    with pytest.raises(OSError, match="a worker wrote shard-.*: give a folder that all machines"):
        many_shards(tmp_path / "out", workers=Elsewhere(moved=True))
