"""Quantised weights on several devices: each block stays where it runs, and plans count them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.accounting import config_of
from hooked_hybrid.accounting.plan import Machine, gpus_of
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.accounting.plan.stored import stored_weights
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.hooks.marks import watcher
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.placement import place
from hooked_hybrid.network.weights.plain import is_quantized, stored_bytes
from hooked_hybrid.network.weights.quantized import (
    dequantize_weights,
    quantizable,
    quantize_weights,
)
from tests.models import griffin_config, jamba_config, random_model, random_tokens

pytest.importorskip("torchao.quantization")

CFG = jamba_config("MA", d_model=64, d_inner=128, d_mlp=64)
DENSE = griffin_config("RA", d_model=64, d_rnn=64, d_head=16, d_mlp=128)
SCHEMES = ("int8", "nf4")
GB = 10**9


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("checkpoint") / "jamba"
    random_model(CFG).save_pretrained(path)
    return path


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "auto"])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_map_of_one_device_gives_what_no_map_does(checkpoint: Path, scheme: str, device_map: Any):
    tokens = random_tokens(n_pos=6)
    one = HookedHybrid.from_pretrained(checkpoint, quantize=scheme)
    mapped = HookedHybrid.from_pretrained(checkpoint, quantize=scheme, device_map=device_map)
    assert torch.equal(mapped(tokens), one(tokens)) and mapped.placement is None
    assert mapped.quantization == one.quantization


@pytest.mark.parametrize("scheme", SCHEMES)
def test_blocks_are_quantised_on_the_devices_they_run_on(checkpoint: Path, scheme: str):
    model = HookedHybrid.from_pretrained(
        checkpoint, quantize=scheme, device_map={"": "cpu", "blocks": "meta"}
    )
    assert model.quantization is not None and model.placement is not None
    assert [w.name for w in model.quantization.weights] == quantizable(CFG)
    assert model.quantization.bytes == quantize_weights(random_model(CFG), scheme).bytes
    blocks = [p for block in model.blocks for p in block.parameters()]
    assert {p.device.type for p in blocks} == {"meta"} and any(is_quantized(p) for p in blocks)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_hooks_see_values_on_the_devices_of_quantised_blocks(scheme: str):
    model = place(random_model(DENSE), {"": "cpu", "blocks": "meta"})
    quantize_weights(model, scheme)
    seen: set[str] = set()

    @watcher
    def look(value: Tensor, hook: HookPoint) -> None:
        assert value.device.type == ("cpu" if hook.name == "hook_embed" else "meta")
        seen.add(str(hook.name))

    tokens = random_tokens(n_pos=4)
    with torch.no_grad(), model.hooks([(lambda _: True, look)]):
        _, state = model.run_layout(tokens, lay_out(tokens, None, None, None), None, None)
    assert seen == {n for n in model.hook_dict if not n.startswith(("ln_final", "unembed"))}
    assert {t.device.type for b in state.blocks for t in vars(b).values()} == {"meta"}


def test_a_placed_model_is_quantised_and_back_where_its_blocks_stay(tmp_path: Path):
    model = place(random_model(CFG), {"": "cpu", "blocks": "meta"})
    found = quantize_weights(model, "nf4")
    assert found.bytes == quantize_weights(random_model(CFG), "nf4").bytes
    dequantize_weights(model)
    assert {p.device.type for p in model.blocks[1].parameters()} == {"meta"}
    mapped = place(random_model(CFG), {"": "cpu", "blocks.1": "disk"}, tmp_path)
    with pytest.raises(ValueError, match="blocks of this model are kept elsewhere"):
        quantize_weights(mapped, "int8")


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ({"": "cpu", "blocks.1": "disk"}, "keeps blocks.1 on disk and runs it on cpu"),
        ({"": "meta", "blocks.1": "cpu"}, "keeps blocks.1 on cpu and runs it on meta"),
    ],
)
def test_quantised_blocks_kept_elsewhere_are_refused(
    checkpoint: Path, tmp_path: Path, device_map: Any, message: str
):
    with pytest.raises(ValueError, match=f"{message}: quantised weights stay where they run"):
        HookedHybrid.from_pretrained(
            checkpoint, quantize="int8", device_map=device_map, offload_folder=tmp_path
        )
    assert not list(tmp_path.iterdir())


def test_auto_counts_quantised_weights_and_uses_no_disk(checkpoint: Path, tmp_path: Path):
    options: dict[str, Any] = {"device_map": "auto"}
    with pytest.raises(ValueError, match="offload_folder=.* has no effect: quantised weights stay"):
        HookedHybrid.from_pretrained(
            checkpoint, quantize="int8", offload_folder=tmp_path, **options
        )
    with pytest.raises(MemoryError, match="quantised blocks stay where they run.*GB of CPU memory"):
        HookedHybrid.from_pretrained(
            checkpoint, quantize="int8", max_memory={"cpu": "1MB"}, **options
        )
    few = HookedHybrid.from_pretrained(
        checkpoint, quantize="int8", quantize_only=lambda name: ".mlp." in name, **options
    )
    assert few.quantization is not None
    assert {w.name.split(".")[2] for w in few.quantization.weights} == {"mlp"}


# --- plans ------------------------------------------------------------------------------------


@pytest.mark.parametrize("only", [None, ["blocks.1.attn.q.weight", "blocks.1.mlp.gate"]])
@pytest.mark.parametrize("scheme", SCHEMES)
def test_planned_bytes_are_those_of_the_quantised_model(scheme: str, only: Any):
    model = random_model(CFG).bfloat16()
    quantize_weights(model, scheme, only)
    stored = stored_weights(CFG, torch.bfloat16, scheme, only)
    for i, block in enumerate(model.blocks):
        assert stored[f"blocks.{i}"].bytes == stored_bytes(block.parameters())
    assert sum(s.bytes for s in stored.values()) == stored_bytes(model.parameters())


@pytest.mark.parametrize(
    ("scheme", "gpus", "weights"), [("int8", "2x40GB", 52.29), ("nf4", "1x40GB", 27.59)]
)
def test_jamba_mini_fits_in_8_bits_on_two_gpus_and_in_4_on_one(
    scheme: str, gpus: str, weights: float
):
    machine = Machine(gpus_of(gpus), cpu=500 * GB, disk=2**62)
    found = plan(config_of("jamba-mini"), machine, (8192,), quantize=scheme)
    used = found.usages(8192)
    assert found.fits and set(found.device_map.values()) == {n for n, _ in machine.devices}
    assert sum(u.weights for u in used) / GB == pytest.approx(weights, abs=0.01)
    assert all(u.total <= 40 * GB and u.loading > u.running for u in used)


def test_what_would_do_names_schemes_and_nothing_that_quantised_weights_cannot():
    one = Machine(gpus_of("1x40GB"), cpu=500 * GB)
    eight_bits = plan(config_of("jamba-mini"), one, (8192,), quantize="int8")
    assert not eight_bits.fits and "quantised blocks stay where they run" in eight_bits.why_not
    options = [change.option for change in eight_bits.changes]
    assert "--quantize nf4" in options
    assert not any(option.startswith(("--cpu", "--disk")) for option in options)
    plain = plan(config_of("jamba-mini"), Machine(gpus_of("1x60GB")), (8192,))
    assert ("--quantize int8", "quantize='int8'") in [tuple(change) for change in plain.changes]
    with pytest.raises(ValueError, match="int8 weights cannot be used with torch.float16"):
        plan(CFG, one, dtype=torch.float16, quantize="int8")


def test_the_command_plans_quantised_weights(checkpoint: Path):
    runner, app = CliRunner(), build_app()
    command = ["plan", "--model", str(checkpoint), "--gpus", "1x2GB", "--lengths", "64"]
    fits = runner.invoke(app, [*command, "--quantize", "nf4"])
    shown = " ".join(fits.output.split())  # as the path is long, its title is wrapped
    assert fits.exit_code == 0 and "bfloat16 and nf4" in shown and "loading" in shown
    said = json.loads(runner.invoke(app, [*command, "--quantize", "nf4", "--json"]).output)
    used = said["usage"]["64"]["cuda:0"]
    assert said["quantize"] == "nf4" and used["loading"] > 0
    running = used["state"] + used["working"]
    assert used["total"] == used["weights"] + 10**9 + max(used["loading"], running)
