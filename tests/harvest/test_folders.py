"""Harvests that are killed, and folders that hold something already."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import threading
import time
from collections import namedtuple
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_hybrid import interventions
from hooked_hybrid.harvest import HarvestedActivations, harvest, making
from hooked_hybrid.harvest.documents import FILE, Documents
from hooked_hybrid.harvest.recipe import HarvestRecipe
from hooked_hybrid.harvest.running import Runner, ShardMaker
from hooked_hybrid.harvest.shards import INDEX, RECIPE, read_header, short_hash
from hooked_hybrid.outputs.folders import FolderInUseError, claim
from tests.harvests import (
    RESID,
    contents,
    documents_of,
    many_shards,
    model_named,
    rows_of,
)
from tests.models import D_VOCAB, tiny_model

KILLS = int(os.environ.get("HARVEST_KILLS", "6"))
"""Kills that a harvest is resumed from; 300 for the figure in docs/harvest.md."""


def test_a_killed_harvest_continues_and_gives_the_same_bytes(tmp_path):
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
    with pytest.raises(ValueError, match="bytes, and .* in index.json: continue with --resume"):
        HarvestedActivations(harvested.folder)
    with pytest.warns(UserWarning, match="is not a whole shard of a harvest .* it is made again"):
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
        ({"context_length": 9}, "context_length 8 -> 9"),
        ({"batch_size": 3}, "batch_size 2 -> 3"),
        ({"shard_bytes": 7000}, "shard_tokens 45 -> 17"),
        ({"seed": 1}, "seed 0 -> 1"),
        ({"dtype": "bfloat16"}, 'dtype "float32" -> "bfloat16"; shard_tokens 45 -> 88'),
        ({"drop_special": False}, r"left_out \[0, 1, 2\] -> \[\]"),
        ({"fwd_hooks": interventions.keep_top_heads(1)}, "fwd_hooks"),
    ],
)
def test_another_recipe_in_the_folder_is_refused(made, changes, differ):
    before = contents(made)
    with pytest.raises(ValueError, match=f"holds another harvest: {differ}; give another"):
        many_shards(made, **changes)
    assert contents(made) == before


def test_another_model_other_documents_and_other_folders_are_refused(tmp_path):
    settings = {"verbose": False, "resume": True}
    before = contents(harvest(model_named(), documents_of(), RESID, tmp_path, **settings).folder)
    with pytest.raises(ValueError, match="holds another harvest: the weights; give"):
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
    with pytest.raises(ValueError, match="is not finished .0 shards are there.: continue with"):
        HarvestedActivations(tmp_path / "out")
    begun = tmp_path / "out" / ".tmpAbCd12"  # as safetensors leaves it when it is killed
    begun.touch()
    assert len(many_shards(tmp_path / "out", batch_size=1)) == 240
    assert not begun.exists()


def interrupted(self, batch, into) -> None:
    raise KeyboardInterrupt


def test_a_second_run_on_the_folder_is_an_error(tmp_path):
    context = multiprocessing.get_context("fork")
    queue = context.Queue()

    def second() -> None:
        try:
            many_shards(tmp_path / "out")
        except FolderInUseError as error:
            queue.put(str(error))

    with claim(tmp_path / "out", resume=True):
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

    A shard is 3 MB; twenty of them are 60. Their tokens, which are mapped, are 2.
    """
    model = model_named()
    tokens = torch.randint(3, D_VOCAB, (20, 28_000))

    def peak(n_shards: int, name: str) -> float:
        documents = tokens[:n_shards]
        start = memory("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # forget earlier peaks
        harvested = harvest(
            model, documents, "hook_embed", tmp_path / name, context_length=1000,
            shard_bytes=28_000 * 108, verbose=False,
        )  # fmt: skip
        assert len(harvested.paths) == n_shards
        return memory("VmHWM") - start

    peak(20, "warm")
    few, many = peak(2, "few"), peak(20, "many")
    assert many - few < 2 * 3.0


def memory(which: str) -> float:
    """Return a line of /proc/self/status, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{which}:")[1].split()[0]) / 1024


class Elsewhere:
    """Workers as `RayWorkers`, without Ray: what they are sent is pickled, and the order theirs.

    `change` is done to a job when it has come to them, `written` to each shard's path.
    """

    def __init__(self, change=lambda job: job, written=lambda path: None) -> None:
        self.change, self.written = change, written

    def check(self, model, parts) -> None:
        pickle.dumps(parts)

    def results(self, model, job, units):
        job = self.change(pickle.loads(pickle.dumps(job)))
        for shard in reversed(units[0]):
            header = next(job(model, [shard]))
            self.written(next(job.folder.glob(f"shard-{shard:05}*")))
            yield shard, header


def test_shards_that_workers_make_have_the_same_bytes(tmp_path, made):
    assert contents(many_shards(tmp_path / "out", workers=Elsewhere()).folder) == contents(made)
    next((tmp_path / "out").glob("shard-00001*")).unlink()
    assert contents(many_shards(tmp_path / "out", workers=Elsewhere()).folder) == contents(made)


def test_workers_that_write_to_another_disk_are_noticed(tmp_path, made, monkeypatch):
    monkeypatch.setattr(making, "SEEN_WITHIN", 0)
    with pytest.raises(OSError, match="a worker wrote shard-.*: give a folder that all machines"):
        many_shards(tmp_path / "out", workers=Elsewhere(written=Path.unlink))


@pytest.mark.parametrize(
    ("folder", "match"),
    [("none", "does not see the harvest in .*/none: give a"), ("other", "sees another harvest in")],
)
def test_a_folder_that_differs_for_workers_is_an_error(tmp_path, folder, match):
    harvest(model_named(), documents_of(), RESID, tmp_path / "other", verbose=False)
    there = Elsewhere(change=lambda job: replace(job, folder=tmp_path / folder))
    with pytest.raises((OSError, ValueError), match=f"a worker on .* {match}"):
        many_shards(tmp_path / "out", workers=there)


def test_a_shard_that_a_disk_shows_late_is_waited_for(tmp_path, made):
    timers = []

    def hide(path):
        path.rename(path.with_suffix(".late"))
        timers.append(threading.Timer(0.2, path.with_suffix(".late").rename, [path]))
        timers[-1].start()

    harvested = many_shards(tmp_path / "out", workers=Elsewhere(written=hide))
    assert len(timers) == len(harvested.paths)
    assert contents(harvested.folder) == contents(made)


def test_hooks_that_cannot_be_sent_are_refused_before_the_documents_are_read(tmp_path):
    lock = threading.Lock()
    hooks = [("hook_embed", lambda value, hook, lock=lock: None)]
    with pytest.raises((TypeError, AttributeError, pickle.PicklingError)):
        many_shards(tmp_path / "out", workers=Elsewhere(), fwd_hooks=hooks)
    assert not (tmp_path / "out").exists()


def test_tokens_that_were_damaged_are_not_gone_on_with(tmp_path):
    folder = many_shards(tmp_path / "out").folder
    flipped = bytearray((folder / FILE).read_bytes())
    flipped[-20 * 12] ^= 1
    (folder / FILE).write_bytes(flipped)
    with pytest.raises(ValueError, match="tokens.safetensors is damaged: harvest into another"):
        many_shards(folder)


def test_a_change_of_one_row_of_a_weight_is_another_model(tmp_path):
    model, settings = tiny_model(seed=5), {"verbose": False, "resume": True}
    harvest(model, documents_of(), RESID, tmp_path, **settings)
    with torch.no_grad():
        model.embed.W_E[7] = 0
    with pytest.raises(ValueError, match="holds another harvest: the weights; give"):
        harvest(model, documents_of(), RESID, tmp_path, **settings)


@pytest.mark.parametrize("said", ["[]", "null", '"x"', "3", "{"])
def test_a_damaged_recipe_is_refused(tmp_path, said):
    harvest(model_named(), documents_of(), RESID, tmp_path, verbose=False)
    (tmp_path / RECIPE).write_text(said)
    with pytest.raises(ValueError, match="recipe.json is damaged"):
        harvest(model_named(), documents_of(), RESID, tmp_path, verbose=False, resume=True)


def test_whatever_byte_of_a_shards_header_is_flipped_it_is_found(tmp_path):
    harvested = many_shards(tmp_path / "out")
    path, draw = harvested.paths[1], random.Random(0)
    whole = path.read_bytes()
    sums, found = read_header(path).sums, 0
    for _ in range(400):
        flipped = bytearray(whole)
        flipped[draw.randrange(int.from_bytes(whole[:8], "little") + 8)] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            harvested.verify()
        except ValueError:
            found += 1
        else:  # a late digit of a sum, or a letter that stands for the same
            assert all(
                read_header(path).sums[name].norm == pytest.approx(was.norm, rel=1e-5)
                for name, was in sums.items()
            )
    assert found > 350


def test_an_index_that_does_not_fit_its_shards_is_found(tmp_path):
    harvested = many_shards(tmp_path / "out")
    path, index = harvested.folder / INDEX, harvested.index
    for key in index:
        path.write_text(json.dumps({k: v for k, v in index.items() if k != key}))
        with pytest.raises(ValueError, match=r"index.json is damaged: continue with --resume"):
            HarvestedActivations(harvested.folder)
    path.write_text(json.dumps({**index, "tokens": 5}))
    with pytest.raises(ValueError, match=r"index.json is damaged"):
        HarvestedActivations(harvested.folder)
    path.write_text(json.dumps({**index, "recipe": {**index["recipe"], "seed": 1}}))
    with pytest.raises(
        ValueError, match="index.json does not belong to the shards in its folder: continue with"
    ):
        HarvestedActivations(harvested.folder)
    changed = json.loads(json.dumps(index))
    changed["hooks"][harvested.names[0]]["mean_norm"] += 0.1
    path.write_text(json.dumps(changed))
    with pytest.raises(ValueError, match="index.json does not fit the shards: continue with"):
        HarvestedActivations(harvested.folder).verify()
    many_shards(harvested.folder).verify()


def as_older_versions_wrote_it(folder: Path, fwd_hooks: Any = ()) -> None:
    """Put a finished harvest of `many_shards` back to one shard, recorded as it was once."""
    recipe = json.loads((folder / RECIPE).read_text())
    plain = replace(model_named().cfg, model_name="", extra={}, default_prepend_bos=True)
    said = recipe["model"]
    model = {"weights": said["weights"], "config": short_hash(repr(plain)), "hooks": []}
    nothing = sha256(b"list()").hexdigest()[:16]
    recipe |= {"model": {**model, "dtype": said["dtype"]}, "interventions": nothing}
    for path in (*folder.glob("shard*"), folder / "index.json"):
        path.unlink()
    (folder / RECIPE).write_text(json.dumps(recipe, indent=1) + "\n")
    older, documents = HarvestRecipe(**recipe), Documents.open(folder)
    runner = Runner(model_named(), older.names, torch.float32, fwd_hooks)
    ShardMaker(runner, older.plan(documents), folder, older.hash).make(0)


def test_an_older_harvest_is_gone_on_with_where_what_it_recorded_proves_it_the_same(tmp_path, made):
    folder = shutil.copytree(made, tmp_path / "older")
    as_older_versions_wrote_it(folder)
    before = contents(folder)
    with pytest.raises(ValueError, match="holds another harvest: fwd_hooks|all of fwd_hooks: that"):
        many_shards(folder, fwd_hooks=interventions.keep_top_heads(1))
    with pytest.raises(ValueError, match="holds another harvest: the weights; give"):
        many_shards(folder, model=tiny_model(seed=1))
    assert contents(folder) == before
    many_shards(folder).verify()
    assert contents(folder)[RECIPE] == before[RECIPE]
    ours, theirs = rows_of(many_shards(folder)), rows_of(HarvestedActivations(made))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
