"""A mixer and an MLP of a test file have every feature of the library, by what they state."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, HybridConfig, HybridState, fold_ln, unfold_ln
from hooked_hybrid.accounting import count_parameters, prefill_flops, state_bytes, step_flops
from hooked_hybrid.accounting.plan.machine import Machine
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.analysis import (
    attribution_patching,
    decay_range,
    effective_attention,
    effective_offset,
    half_life,
    how_far,
    memory_horizon,
    patch_mixer_out,
    patch_states,
    recurrent_circuit,
)
from hooked_hybrid.config import AttentionConfig, GatedMLPConfig, LayerConfig
from hooked_hybrid.harvest import harvest
from hooked_hybrid.interventions import (
    ablate_layers,
    edit_state,
    freeze_state,
    knock_out_crossings,
    knock_out_state_edges,
    layers_of,
    patch,
    per_position,
)
from hooked_hybrid.network.placement import place
from hooked_hybrid.network.weights.quantized import quantizable, quantize_weights
from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer
from hooked_hybrid.niah.haystacks.words import vocabulary
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import grid
from hooked_hybrid.niah.settings.papers import layer_settings
from hooked_hybrid.niah.sweep import niah
from tests.harvests import rows_of
from tests.models import D_VOCAB, random_model, random_tokens, relative
from tests.tolerances import INT8
from tests.toy_mixer import Ema, EmaConfig
from tests.toy_mlp import SquaredConfig

TOLERANCE = 1e-5
EMA_LAYERS = (0, 1, 3)


def toy_config(d_vocab: int = D_VOCAB, n_keys: int = 7) -> HybridConfig:
    average, squared = EmaConfig(4, 8), SquaredConfig(20)
    attention = AttentionConfig(4, 2, 6, n_keys=n_keys)
    return HybridConfig(
        d_model=24,
        d_vocab=d_vocab,
        layers=(
            LayerConfig(average, squared),
            LayerConfig(average, GatedMLPConfig(20)),
            LayerConfig(attention, squared),
            LayerConfig(average, squared),
        ),
    )


@cache
def toy() -> HookedHybrid:
    return random_model(toy_config())


def logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum()


def close(a: Tensor, b: Tensor) -> bool:
    return relative(a, b) < TOLERANCE


# --- forward --------------------------------------------------------------------------------------


def test_a_forward_is_the_moving_average():
    model, tokens = toy(), random_tokens()
    _, cache = model.run_with_cache(tokens)
    mixer: Any = model.blocks[0].mixer
    u, a = cache["in_proj", 0], mixer.decay.sigmoid().repeat_interleave(8)
    h, found = torch.zeros_like(u[:, 0]), []
    for t in range(u.shape[1]):
        h = a * h + (1 - a) * u[:, t]
        found.append(h)
    assert close(cache["ssm_y", 0], torch.stack(found, dim=1))
    assert close(cache["mixer_out", 0], mixer.out_proj(cache["ssm_y", 0]))


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_and_packing_equal_single_runs(side: str):
    model, tokens, n = toy(), random_tokens(n_pos=16), 11
    alone = [model(tokens[:1]), model(tokens[1:, :n])]
    padded, mask = tokens.clone(), torch.ones_like(tokens)
    where = slice(0, 16 - n) if side == "left" else slice(n, 16)
    real = slice(16 - n, 16) if side == "left" else slice(0, n)
    padded[1, where], mask[1, where] = 0, 0
    padded[1, real] = tokens[1, :n]
    logits = model(padded, attention_mask=mask)
    assert close(logits[:1], alone[0]) and close(logits[1:, real], alone[1])
    packed = torch.cat([tokens[:1], tokens[1:, :n]], dim=1)
    segments = torch.tensor([[1] * 16 + [2] * n])
    assert close(model(packed, segment_ids=segments), torch.cat(alone, dim=1))


@torch.no_grad()
def test_pieces_and_any_cut_equal_the_whole():
    model, tokens = toy(), random_tokens(1, 600)
    names = ["blocks.0.mixer.hook_ssm_y"]

    def keep(value: Tensor, hook: HookPoint) -> Tensor:
        return value

    whole = model.run_with_hooks(tokens, fwd_hooks=[(names, keep)])  # unmarked: not in pieces
    assert close(model(tokens), whole)
    assert close(model.run_with_hooks(tokens, fwd_hooks=[(names, per_position(keep))]), whole)
    first, state = model(tokens[:, :250], return_state=True)
    assert close(torch.cat([first, model(tokens[:, 250:], state=state)], dim=1), whole)


def test_cached_generation_equals_forwards_and_states_survive_a_file(tmp_path: Path):
    model, prompt = toy(), random_tokens(n_pos=9)
    out = model.generate(prompt, 5, stop_at_eos=False, return_type="tokens", verbose=False)
    tokens = prompt
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, tokens)
    _, state = model(prompt, return_state=True)
    state.save(tmp_path / "state.safetensors")
    loaded = HybridState.load(tmp_path / "state.safetensors")
    assert loaded == state and type(loaded.blocks[0]) is type(state.blocks[0])
    assert torch.equal(model(tokens[:, 9:], state=loaded), model(tokens[:, 9:], state=state))
    grafted = state.replace(state[[1, 0]], kinds="ssm", layers=[0])
    assert torch.equal(grafted.blocks[0].ssm, state.blocks[0].ssm[[1, 0]])
    assert state.n_bytes == state_bytes(model.cfg, 9, torch.float32, batch=2).total
    blocks = (state.blocks[2], *state.blocks[1:])
    with pytest.raises(ValueError, match="it is another model's"):
        model(tokens[:, 9:], state=replace(state, blocks=blocks))


def test_every_hook_is_live_and_edits_what_is_computed():
    model, prompt = toy(), random_tokens(n_pos=6)
    plain = model(prompt)
    for name in model.hook_dict:
        stages: list[str] = []

        @per_position
        def double(value: Tensor, hook: HookPoint, stages: list[str] = stages) -> Tensor:
            stages.append(hook.run.stage)
            return value * 2 - 0.1

        changed = model.run_with_hooks(prompt, fwd_hooks=[(name, double)])
        assert relative(changed, plain) > 1e-4, name
        stages.clear()
        model.generate(prompt, 3, fwd_hooks=[(name, double)], stop_at_eos=False, verbose=False)
        assert stages.count("generation") >= 2 and "prefill" in stages, name


def test_names_that_no_other_kind_has_are_short_too():
    model = toy()
    _, cache = model.run_with_cache(random_tokens())
    assert torch.equal(cache["relu", 0], cache["blocks.0.mlp.hook_relu"])
    assert torch.equal(cache["post", 0], cache["relu", 0].square())
    stack, labels = cache.stack_activation("relu", return_labels=True)
    assert labels == [f"blocks.{i}.mlp.hook_relu" for i in (0, 2, 3)] and len(stack) == 3


# --- what layers write ----------------------------------------------------------------------------


def test_the_stream_is_the_sum_of_its_finest_parts():
    model = toy()
    _, cache = model.run_with_cache(random_tokens())
    parts, labels = cache.get_full_resid_decomposition(return_labels=True)
    assert close(parts.sum(0), cache["resid_post", -1])
    assert labels[:5] == ["L0B0", "L0B1", "L0B2", "L0B3", "L1B0"]
    assert {"L0N19", "L1N3", "L2H3", "embed", "bias"} <= set(labels)
    whole, labels = cache.decompose_resid(return_labels=True)
    assert close(whole.sum(0), cache["resid_post", -1])
    assert labels[:4] == ["embed", "0_ema_out", "0_squared_out", "1_ema_out"]
    neurons = cache.get_neuron_results(0, neuron_slice=slice(0, 3))
    assert close(neurons, cache["post", 0][..., :3, None] * model.blocks[0].mlp.down.W[:3])


def test_folding_keeps_the_logits_and_unfolds_bit_for_bit():
    model, tokens = toy(), random_tokens()
    folded, record = fold_ln(model)
    assert close(folded(tokens), model(tokens))
    assert torch.equal(folded.blocks[0].ln1.weight, torch.ones(24))
    back = unfold_ln(folded, record)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in back.named_parameters())


# --- interventions --------------------------------------------------------------------------------


def test_ablation_patching_and_edits_of_the_state():
    model, tokens = toy(), random_tokens()
    assert layers_of(model.cfg, "ema") == EMA_LAYERS
    with model.hooks(ablate_layers(layers_of(model.cfg, "ema"))):
        _, cache = model.run_with_cache(tokens)
    assert not cache["mixer_out", 0].any() and cache["mixer_out", 2].any()
    _, clean = model.run_with_cache(tokens[[1, 0]])
    everywhere = model.run_with_hooks(tokens, fwd_hooks=patch(clean, "hook_embed"))
    assert close(everywhere, model(tokens[[1, 0]]))
    hooks = edit_state(lambda h, hook: h * 0, positions=[4], layers=[0])
    with model.hooks(hooks):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name: "mixer" in name)
    a = model.blocks[0].mixer.decay.sigmoid().repeat_interleave(8)
    assert not cache["ssm_y", 0][:, 4].any()
    assert close(cache["ssm_y", 0][:, 5], (1 - a) * cache["in_proj", 0][:, 5])


def test_a_state_is_held_dropped_and_cut():
    model, tokens = toy(), random_tokens()
    with model.hooks(freeze_state(3, 8)):
        _, cache = model.run_with_cache(tokens)
    for layer in EMA_LAYERS:
        y = cache["ssm_y", layer]
        assert torch.equal(y[:, 3:8], y[:, 2:3].expand(-1, 5, -1)) and not close(y[:, 8], y[:, 7])
    begins = model.run_with_hooks(tokens, fwd_hooks=knock_out_crossings(model.cfg, 6))
    assert close(begins[:, 6:], model(tokens[:, 6:]))
    _, plain = model.run_with_cache(tokens)
    matrix = effective_attention(plain, 0)
    with model.hooks(knock_out_state_edges([7], [2, 3], layers=[0])):
        _, cut = model.run_with_cache(tokens)
    lost = (matrix[:, :, 7, 2:4] * plain["in_proj", 0].mT[..., 2:4]).sum(-1)
    assert close(cut["ssm_y", 0][:, 7], plain["ssm_y", 0][:, 7] - lost)


# --- analysis -------------------------------------------------------------------------------------


def test_effective_attention_times_inputs_is_the_output():
    _, cache = toy().run_with_cache(random_tokens())
    for through, reads, gives in (
        ("scan", "in_proj", "ssm_y"),
        ("block", "in_proj", "ssm_y"),
    ):
        matrix = effective_attention(cache, 0, through=through)
        product = (matrix @ cache[reads, 0].mT[..., None])[..., 0].mT
        assert close(product + effective_offset(cache, 0, through=through), cache[gives, 0])
    groups = effective_attention(cache, 0, summary="gate_block")
    assert groups.shape == (2, 4, 20, 20)


def test_horizons_and_ranges_are_those_of_a_constant_decay():
    model = toy()
    _, cache = model.run_with_cache(random_tokens())
    decay = model.blocks[1].mixer.decay.double().sigmoid().repeat_interleave(8)
    assert close(half_life(cache, 1), -(torch.tensor(2.0).log() / decay.log()))
    steps = (torch.tensor(0.01).log() / decay.log()).floor() + 1
    assert torch.equal(memory_horizon(cache, 1), steps)
    assert close(decay_range(model, 1).typical, decay)
    assert [reach.kind for reach in how_far(cache)] == ["ema", "ema", "attention", "ema"]


def test_attribution_and_patching_see_every_layer():
    model, tokens = toy(), random_tokens(1)
    other = random_tokens(1, seed=1)
    found = attribution_patching(model, tokens, other, logit, verbose=False)
    assert "blocks.0.mixer.hook_ssm_write" in found.values
    _, clean = model.run_with_cache(tokens)
    grid_of = patch_mixer_out(model, other, clean, logit, verbose=False)
    assert grid_of.values.shape[0] == model.cfg.n_layers
    states = patch_states(model, other, clean, logit, verbose=False)
    assert states.values.shape[0] == len(EMA_LAYERS)
    circuit = recurrent_circuit(model, 0)
    assert circuit.AB.shape == (4, 24, 24)


# --- what it takes --------------------------------------------------------------------------------


def test_parameters_and_operations_are_counted_by_kind():
    model, cfg = toy(), toy_config()
    counted = count_parameters(cfg)
    assert counted.total == sum(p.numel() for p in model.parameters())
    assert counted.of("EMA block") == 3 * (24 * 32 + 32 * 24 + 24 + 4)
    assert counted.of("squared MLP") == 3 * (2 * 24 * 20 + 24)
    flops, step = prefill_flops(cfg, 10), step_flops(cfg, 10)
    assert flops["EMA block"].products == 10 * step["EMA block"].products == 30 * 4 * 24 * 32
    assert list(flops)[:4] == ["MLP", "squared MLP", "EMA block", "attention"]


def test_a_plan_knows_what_they_take(tmp_path: Path):
    machine = Machine(cpu=10**9)
    assert plan(toy_config(), machine, (700,)).fits


def test_weights_on_disk_and_quantised_give_the_same(tmp_path: Path):
    model, tokens = toy(), random_tokens()
    wanted = model(tokens)
    placed = place(random_model(toy_config()), {"": "cpu", "blocks": "disk"}, tmp_path)
    with torch.no_grad():
        assert close(placed(tokens), wanted)
    pytest.importorskip("torchao")
    small = random_model(toy_config())
    done = quantize_weights(small, "int8")
    assert [w.name for w in done.weights] == quantizable(small.cfg)
    assert {"blocks.0.mixer.in_proj.weight", "blocks.0.mlp.down.weight"} <= {
        w.name for w in done.weights
    }
    assert 0 < relative(small(tokens), wanted) < INT8


# --- studies --------------------------------------------------------------------------------------


def test_a_harvest_keeps_what_a_run_gives(tmp_path: Path):
    model, name = toy(), "blocks.0.mixer.hook_ssm_y"
    document = random_tokens(1, 8)[0]
    kept = harvest(model, [document], name, tmp_path / "out", context_length=8, verbose=False)
    _, cache = model.run_with_cache(document[None])
    assert close(rows_of(kept)[name], cache[name][0])


def test_a_sweep_has_a_setting_for_each_kind_and_layer():
    model = random_model(toy_config(len(vocabulary()), n_keys=58))
    model.tokenizer = word_tokenizer()
    settings = layer_settings(model.cfg)
    names = [setting.name for setting in settings]
    assert names[:3] == ["whole", "no attention", "no EMA"] and "no EMA 3" in names
    prompts = grid(model, [PAPER], (70,), (0.5,))
    table = niah(model, prompts, settings, max_new_tokens=3, verbose=False)
    assert len(table) == len(settings) and Ema.title in " ".join(table["setting"])
