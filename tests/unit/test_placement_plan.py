"""Plans of where a model goes: they count every byte, can be kept, and say no with the reason."""

from __future__ import annotations

import json
from functools import cache
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid, presets
from hooked_hybrid.accounting import config_of
from hooked_hybrid.cli import build_app
from hooked_hybrid.placement import Machine, gpus_of, size_of
from hooked_hybrid.placement.planning import Planner, plan
from hooked_hybrid.placement.sizes import Sizes
from tests.models import CONFIGS, random_tokens, tiny_model

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
    said = [change.split(" ") for change in found.changes]
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


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_the_planned_state_is_the_state(name: str):
    sizes = Sizes(CONFIGS[name], torch.float32, batch=2, on_cpu=True)
    _, state = tiny_model(name)(random_tokens(n_pos=11), return_state=True)
    for i, block in enumerate(state.blocks):
        assert sizes.state(i, 11) == sum(t.nbytes for t in vars(block).values())


PEAKS = [("griffin", 1, 1100), ("jamba", 2, 700), ("jamba", 1, 40)]


@pytest.mark.parametrize(("family", "batch", "length"), PEAKS)
def test_the_planned_activations_hold_and_are_at_most_twice_too_large(
    family: str, batch: int, length: int
):
    if family == "griffin":
        cfg = presets.griffin("RRA", d_model=128, d_vocab=300, n_heads=4, n_keys=400)
    else:
        cfg = presets.jamba("MAM", d_model=128, d_vocab=300, n_heads=4, n_kv_heads=2, n_experts=4)
    model = HookedHybrid(cfg).requires_grad_(False)
    tokens = torch.randint(3, 299, (batch, length))
    sizes, layers = Sizes(cfg, torch.float32, batch, on_cpu=True), range(cfg.n_layers)
    planned = sum(sizes.state(i, length) + sizes.beside_state(i, length) for i in layers)
    planned += max(*(sizes.working(i, length) for i in layers), sizes.ends(length))
    measured = _peak_bytes(lambda: model.generate(tokens, 3, verbose=False, stop_at_eos=False))
    assert measured <= planned <= 2 * measured


def _peak_bytes(run: Any) -> int:
    """Return the most bytes that torch's CPU allocator held at once for a run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most


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
        assert refused.exit_code == 1 and wrong[-1] in refused.stderr
