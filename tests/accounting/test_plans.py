"""Plans of where a model goes: they count every byte, can be kept, and say no with the reason."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.accounting import config_of
from hooked_hybrid.accounting.plan import Machine, gpus_of, size_of
from hooked_hybrid.accounting.plan.machine import ANY_DISK, this_machine
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.commands.program import build_app

GB = 10**9


@cache
def mini() -> Any:
    return config_of("ai21labs/AI21-Jamba-Mini-1.6")


def test_the_plan_of_jamba_mini_gives_every_block_a_place_and_counts_every_weight():
    found = plan(mini(), Machine(gpus_of("8x40GB")), (2048, 8192))
    device_map = found.require()
    model = HookedHybrid.meta(mini(), torch.bfloat16)
    placed = sum(used.weights for used in found.usages(2048))
    assert placed == sum(p.nbytes for p in model.parameters())
    blocks = [device_map[f"blocks.{i}"] for i in range(32)]
    assert blocks == sorted(blocks)  # the stream crosses each border once
    assert all(used.total <= 40 * GB for used in found.usages(8192))
    assert len(set(device_map.values())) == 4  # three of 40 GB are too few
    assert not Planner(found.sizes, Machine(gpus_of("3x40GB")), 8192).fits()


def test_a_plan_keeps_on_devices_what_it_can_and_no_less_than_accelerate():
    from accelerate import infer_auto_device_map

    machine = Machine(gpus_of("2x30GB"), 200 * GB)
    found = plan(mini(), machine)
    assert found.split is not None and found.split.on_cpu
    last = found.usages(2048)[found.split.last]
    assert last.brought == max(
        found.sizes.weights[f"blocks.{i}"] for i in found.split.kept_elsewhere
    )
    assert all(used.total <= 30 * GB for used in found.usages(2048))
    theirs = infer_auto_device_map(
        HookedHybrid.meta(mini(), torch.bfloat16),
        {0: 29 * GB, 1: 29 * GB, "cpu": 200 * GB},
        no_split_module_classes=["Block"],
        dtype=torch.bfloat16,
    )
    held = {
        name.split(".")[1]
        for name, at in theirs.items()
        if name.startswith("blocks.") and at != "cpu"
    }
    assert sum(found.split.held) >= len(held) - 1  # ours leaves room for the state and for working


@pytest.mark.parametrize(
    ("machine", "lengths", "batch"),
    [
        (Machine(gpus_of("1x80GB")), (8192,), 1),
        (Machine(gpus_of("2x60GB")), (65536,), 2),
    ],
)
def test_a_plan_that_cannot_be_names_the_smallest_changes_that_do(
    machine: Machine, lengths: tuple[int, ...], batch: int
):
    found = plan(mini(), machine, lengths, batch)
    assert not found.fits
    with pytest.raises(MemoryError, match="do not fit: .* It would fit with"):
        found.require()
    said = [change.option.split(" ") for change in found.changes]
    assert said
    for option in said:
        if option[0] == "--gpus":
            n, size = option[1].split("x")
            assert _fits(found, Machine(gpus_of(option[1]), machine.cpu, machine.disk))
            if int(n) == len(machine.gpus):
                smaller = Machine((size_of(size) - GB,) * int(n))
            else:
                smaller = machine.with_gpus(int(n) - 1, machine.gpus[0])
            assert not _fits(found, smaller)
        if option[0] == "--cpu":
            assert _fits(found, Machine(machine.gpus, size_of(option[1])))
            assert not _fits(found, Machine(machine.gpus, size_of(option[1]) - GB))
        if option[0] == "--lengths":
            assert plan(mini(), machine, (int(option[1]),), batch).fits
            assert not plan(mini(), machine, (int(option[1]) + 1,), batch).fits


def _fits(found: Any, machine: Machine) -> bool:
    return Planner(found.sizes, machine, max(found.lengths)).fits()


def test_a_gpu_that_is_busy_is_passed_over():
    few, free = GB // 3, 80 * GB
    between = plan(mini(), Machine((free, few, free, free))).split
    assert between is not None and between.held == (16, 0, 16, 0)
    for least in (few, 3 * GB // 2):  # no room for CUDA, or none for the ends
        found = plan(mini(), Machine((least, free, free, free)))
        assert found.split is not None and found.split.held == (0, 16, 16, 0)
        assert found.device_map["embed"] == found.device_map["blocks.0"] == "cuda:1"
        assert [used.total > 0 for used in found.usages(2048)] == [False, True, True, False]


def test_a_machine_without_gpu_memory_computes_on_its_cpu_and_keeps_nothing_beside_it():
    assert Machine((0, 0), 60 * GB) == Machine((), 60 * GB)
    assert not plan(mini(), Machine((0,), 60 * GB)).fits  # 103 GB: twice what there is
    with pytest.raises(ValueError, match="memory of -5 bytes"):
        Machine((), -5)


def test_every_device_counts_the_streams_of_all_pieces_where_weights_are_brought():
    machine = Machine(gpus_of("2x30GB"), 200 * GB)
    found = plan(mini(), machine, (65536,))
    assert found.split is not None and found.split.kept_elsewhere
    first, last = found.usages(65536)
    streams = found.sizes.streams(65536)
    assert streams == 65536 * 4096 * 2  # a long prompt waits on each device for its turn
    alone = Planner(found.sizes, machine, 65536).usage(found.split.blocks(0), range(0), True)
    assert first.working == alone.working + streams and last.total <= 30 * GB


def test_the_reason_why_it_does_not_fit_is_a_sentence():
    nowhere = plan(mini(), Machine(gpus_of("1x1GB"), 0, ANY_DISK))
    assert "the GPU offers 1 GB, with 0 B of CPU memory and room on the disk" in nowhere.why_not
    loaded = plan(mini(), Machine((), 104 * GB))
    assert not loaded.fits and "or 1.88 GB to load it in, do not fit: the CPU" in loaded.why_not


@pytest.mark.parametrize(
    ("free", "machine"),
    [
        ({"mps": 10 * GB}, Machine((), 10 * GB)),  # a Mac has one memory for both
        ({0: 10 * GB}, Machine((10 * GB,), 0)),
        ({1: 10 * GB, "cpu": 5 * GB}, Machine((0, 10 * GB), 5 * GB)),
    ],
)
def test_a_machine_is_what_accelerate_says_is_free(monkeypatch: Any, free: Any, machine: Machine):
    monkeypatch.setattr("accelerate.utils.get_max_memory", lambda: free)
    assert this_machine(None, has_folder=False) == machine


# --- the command ------------------------------------------------------------------------------


def test_the_command_prints_a_plan_or_says_no_with_the_reason():
    runner, app = CliRunner(), build_app()
    model = ["plan", "--model", "ai21labs/AI21-Jamba-Mini-1.6", "--lengths", "8192"]
    fits = runner.invoke(app, [*model, "--gpus", "8x40GB"])
    assert fits.exit_code == 0 and "cuda:3" in fits.output and "8,192" in fits.output
    no = runner.invoke(app, [*model, "--gpus", "1x80GB"])
    assert no.exit_code == 1
    assert "weights of 103 GB" in no.stderr and "--gpus 2x80GB" in no.stderr
    data = runner.invoke(app, [*model, "--gpus", "1x24GB", "--cpu", "40GB", "--disk", "--json"])
    said = json.loads(data.output)
    assert data.exit_code == 0 and {"cuda:0", "cpu", "disk"} == set(said["device_map"].values())
    for wrong in (["--gpus", "8y40"], ["--gpus", "2x40GB", "--lengths", "many"]):
        refused = runner.invoke(app, [*model[:3], *wrong])
        assert refused.exit_code == (2 if "--lengths" in wrong else 1)
        assert wrong[-1] in refused.stderr
