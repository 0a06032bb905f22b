"""Batches of harvested activations."""

import json
from functools import cache
from itertools import islice
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from torch.utils.data._utils.worker import WorkerInfo

from hooked_hybrid.harvest import HarvestedActivations, harvest
from hooked_hybrid.hooks.names import HookNameError
from tests.harvests import (
    documents_of,
    model_named,
    rows_of,
)


@cache
def big(folder: Path) -> HarvestedActivations:
    settings = {"context_length": 64, "shard_bytes": 300 * 108, "verbose": False}
    return harvest(model_named(), documents_of((700,) * 8), "hook_embed", folder, **settings)


@pytest.fixture(scope="module")
def read(tmp_path_factory: pytest.TempPathFactory) -> HarvestedActivations:
    return big(tmp_path_factory.mktemp("harvest") / "out")


def seen(batches) -> list[tuple[int, int]]:
    """Return the document and position of every row, in order."""
    return [
        pair
        for batch in batches
        for pair in zip(batch["document"].tolist(), batch["position"].tolist(), strict=True)
    ]


COLUMNS = ["document", "position"]
EVERY_TOKEN = [(d, p) for d in range(8) for p in range(700)]


def test_every_token_is_read_once_an_epoch_in_an_order_of_the_seed(read):
    assert len(read) == len(EVERY_TOKEN)
    assert len(read.paths) > 18
    settings = {"pool_tokens": 1024}
    first = seen(read.batches(COLUMNS, 100, seed=0, **settings))
    assert sorted(first) == EVERY_TOKEN
    assert first != EVERY_TOKEN
    assert seen(read.batches(COLUMNS, 100, seed=0, **settings)) == first
    assert seen(read.batches(COLUMNS, 100, seed=1, **settings)) != first
    assert seen(read.batches(COLUMNS, 100, seed=None, **settings)) == EVERY_TOKEN
    two = seen(read.batches(COLUMNS, 100, seed=0, epochs=2, **settings))
    assert two[: len(first)] == first
    assert sorted(two[len(first) :]) == EVERY_TOKEN
    assert two[len(first) :] != first
    one_batch = {document for document, _ in first[:100]}
    assert len(one_batch) > 2  # a shard has less than half of one document


def test_a_name_given_twice_is_read_once(read):
    assert sorted(seen(read.batches([*COLUMNS, "document"], 100))) == EVERY_TOKEN


def test_batches_are_the_values_of_their_tokens(read):
    batch = next(iter(read.batches(["hook_embed", *COLUMNS], 128)))
    wanted = rows_of(read)["hook_embed"].view(8, 700, -1)
    assert torch.equal(
        batch["hook_embed"], wanted[batch["document"].long(), batch["position"].long()]
    )
    single = next(iter(read.batches("hook_embed", 128, dtype=torch.bfloat16)))
    assert torch.equal(single, batch["hook_embed"].bfloat16())
    assert torch.equal(read.load(3, "hook_embed"), load_file(read.paths[3])["hook_embed"])


def test_sizes_of_batches(read):
    sizes = [len(batch) for batch in read.batches("hook_embed", 600, pool_tokens=600)]
    assert sizes == [600] * 9 + [200]
    assert len(list(read.batches("hook_embed", 600, drop_last=True))) == 9
    endless = read.batches("hook_embed", 600, epochs=None)
    assert len(list(islice(endless, 40))) == 40
    for wrong, match in (
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": 10, "epochs": 0}, "epochs=0"),
        ({"batch_size": 10, "pool_tokens": 9}, "pool_tokens=9: give 10"),
    ):
        with pytest.raises(ValueError, match=match):
            read.batches("hook_embed", **wrong)
    with pytest.raises(ValueError, match="empty list"):
        read.batches([], 10)
    with pytest.raises(HookNameError, match="the nearest are hook_embed"):
        read.batches("hook_embd", 10)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hook_embed", {"batch_size": 2.5}, "batch_size=2.5: give a whole number"),
        ("hook_embed", {"batch_size": 2, "epochs": 1.5}, "epochs=1.5: give a whole number"),
        ("hook_embed", {"batch_size": 2, "pool_tokens": 8.5}, "pool_tokens=8.5"),
        ("hook_embed", {"batch_size": 2, "dtype": torch.int32}, "dtype=torch.int32: give"),
        ("hook_embed", {"batch_size": 2, "dtype": "bfloat16"}, "dtype=bfloat16: give"),
        (["token"], {"batch_size": 2, "dtype": torch.float16}, "dtype=.* has no effect"),
    ],
)
def test_options_of_batches_that_would_be_misread_are_refused(
    read, unchecked, name, options, message
):
    with pytest.raises(ValueError, match=message):
        read.batches(name, **options)


def test_a_missing_shard_is_an_error(read):
    with pytest.raises(ValueError, match=f"shard={len(read.paths)}: give 0 to"):
        read.load(len(read.paths), "hook_embed")


def test_what_follows_the_token_axis_is_flattened_for_one_name(tmp_path):
    name = "blocks.2.attn.hook_z"
    harvested = harvest(model_named(), documents_of(), name, tmp_path, verbose=False, resume=True)
    heads, width = harvested.shape(("z", 2))
    assert next(iter(harvested.batches(name, 5))).shape == (5, heads * width)
    assert next(iter(harvested.batches([name], 5)))[name].shape == (5, heads, width)


def test_workers_of_a_loader_read_shards_of_their_own(read):
    loader = DataLoader(
        read.batches(COLUMNS, 100), batch_size=None, num_workers=2, multiprocessing_context="fork"
    )
    assert sorted(seen(loader)) == EVERY_TOKEN


def test_a_worker_without_a_shard_comes_to_an_end(tmp_path):
    """Also where the others read without end: else the loader would wait for it."""
    harvested = harvest(
        model_named(), documents_of(), "hook_embed", tmp_path / "out", verbose=False
    )
    batches = harvested.batches("hook_embed", 20, epochs=None)
    worker = WorkerInfo(id=1, num_workers=2, seed=0, dataset=batches)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hooked_hybrid.harvest.reading.get_worker_info", lambda: worker)
        assert list(batches) == []
    assert len(list(islice(batches, 50))) == 50


def test_what_cannot_be_read_is_a_clear_error(tmp_path, read):
    with pytest.raises(ValueError, match="holds no harvest"):
        HarvestedActivations(tmp_path)
    index = dict(read.index, format=99)
    (tmp_path / "index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="newer version"):
        HarvestedActivations(tmp_path)
    (tmp_path / "index.json").write_text("{")
    with pytest.raises(ValueError, match="index.json is damaged"):
        HarvestedActivations(tmp_path)
