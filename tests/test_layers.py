"""Layers that are not one mixer and one MLP behind norms: see `tests.layer_configs`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from hooked_hybrid import HookedHybrid, HookPoint, HybridState, fold_ln, unfold_ln
from hooked_hybrid.accounting import count_parameters, prefill_flops, state_bytes
from hooked_hybrid.accounting.plan.machine import Machine
from hooked_hybrid.accounting.plan.planning import plan
from hooked_hybrid.analysis import (
    all_composition_scores,
    attribution_patching,
    effective_attention,
    how_far,
    ov_circuit,
    patch_mixer_out,
    qk_circuit,
)
from hooked_hybrid.analysis.path_patching import path_patch
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    LayerConfig,
    MambaConfig,
    MoEConfig,
    QKNormConfig,
    RGLRUConfig,
)
from hooked_hybrid.interventions import (
    ablate_layers,
    ablate_mixers,
    edit_state,
    freeze_state,
    keep_top_heads,
    knock_out_crossings,
    layers_of,
    per_position,
)
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.network.placement import place
from hooked_hybrid.network.weights.quantized import quantizable, quantize_weights
from hooked_hybrid.niah.settings.papers import control_settings, layer_settings
from hooked_hybrid.runs.identity.model import config_identity
from tests.layer_configs import ATTENTION, CONFIGS, EMA, ROTARY, SQUARED, config
from tests.models import random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY, INT8
from tests.toy_mixer import Ema, EmaConfig
from tests.toy_mlp import SquaredConfig, SquaredMLP
from weights_conversion.errors import CheckpointError

every = pytest.mark.parametrize("name", CONFIGS)


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


def close(a: Tensor, b: Tensor) -> bool:
    return relative(a, b) < FP32_PARITY


def logit(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].sum()


# --- the forward ----------------------------------------------------------------------------------


def rms(x: Tensor, norm: Any) -> Tensor:
    """Return a norm by its definition."""
    return x if norm is None else x / (x.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.w


@every
def test_a_block_is_its_equation(name: str):
    model = model_of(name)
    logits, cache = model.run_with_cache(random_tokens())
    scale = model.cfg.embedding_scale
    assert close(cache["embed"], model.W_E[random_tokens()] * scale)
    for i, block in enumerate(model.blocks):
        x = cache["resid_pre", i]
        if block.mixers:
            outs = [
                mixer(rms(x, block.ln1), None, layout_of(model, x))[0] for mixer in block.mixers
            ]
            written = rms(sum(outs), block.ln1_post)
            assert close(cache["mixer_out", i], written)
            x = x + written
        if block.mlp is not None:
            written = rms(block.mlp(rms(x, block.ln2), layout_of(model, x)), block.ln2_post)
            assert close(cache["mlp_out", i], written)
            x = x + written
        assert close(cache["resid_post", i], x)
    normalized = rms(cache["resid_post", -1], model.ln_final)
    assert close(logits, normalized @ model.W_E.T * model.cfg.logits_scale)
    assert close(logits, normalized @ model.W_U)


def layout_of(model: HookedHybrid, x: Tensor) -> Any:
    from hooked_hybrid.network.layout import lay_out

    return lay_out(x, None, None, None)


def test_queries_and_keys_are_normalised_before_they_turn():
    model = model_of("norms")
    _, cache = model.run_with_cache(random_tokens())
    for layer, over in ((1, "all"), (2, "head")):
        attn = model.blocks[layer].attn
        for which, norm in (("q", attn.q_norm), ("k", attn.k_norm)):
            before = cache[which, layer]
            flat = before.flatten(-2) if over == "all" else before
            wanted = rms(flat, norm).view(before.shape)
            found = cache[f"blocks.{layer}.attn.{which}_norm.hook_normalized"] * norm.weight
            assert close(found.view(before.shape), wanted)
            if layer == 2:  # no rotation: the scores are of these
                continue
            turned = cache[f"rot_{which}", layer]
            assert close(turned.norm(dim=-1), wanted.norm(dim=-1))
    q, k = (rms(cache[which, 2], getattr(model.blocks[2].attn, f"{which}_norm")) for which in "qk")
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, 2)) / 6**0.5
    seen = cache["attn_scores", 2] > -1e30
    assert close(cache["attn_scores", 2][seen], scores[seen])
    with pytest.raises(NotSupported, match="norms on queries and keys"):
        qk_circuit(model, 1)
    with pytest.raises(NotSupported, match="passes a norm"):
        ov_circuit(model, 1)


@every
def test_padding_packing_pieces_and_any_cut_equal_the_whole(name: str):
    model, tokens, n = model_of(name), random_tokens(n_pos=16), 11
    alone = [model(tokens[:1]), model(tokens[1:, :n])]
    for side in ("left", "right"):
        padded, mask = tokens.clone(), torch.ones_like(tokens)
        where = slice(0, 16 - n) if side == "left" else slice(n, 16)
        real = slice(16 - n, 16) if side == "left" else slice(0, n)
        padded[1, where], mask[1, where] = 0, 0
        padded[1, real] = tokens[1, :n]
        logits, state = model(padded, attention_mask=mask, return_state=True)
        assert close(logits[:1], alone[0]) and close(logits[1:, real], alone[1]), side
        next_tokens = torch.cat([tokens[:1, -1:], tokens[1:, n : n + 1]])
        after = model(next_tokens, state=state)
        assert close(after[1:], model(tokens[1:, : n + 1])[:, -1:]), side
    packed = torch.cat([tokens[:1], tokens[1:, :n]], dim=1)
    segments = torch.tensor([[1] * 16 + [2] * n])
    assert close(model(packed, segment_ids=segments), torch.cat(alone, dim=1))
    whole = model(tokens)
    for cut in (1, 5, 15):
        first, state = model(tokens[:, :cut], return_state=True)
        assert close(torch.cat([first, model(tokens[:, cut:], state=state)], dim=1), whole), cut
    long = random_tokens(1, 600)
    with torch.no_grad():
        hooked = model.run_with_hooks(long, fwd_hooks=[("hook_embed", lambda v, hook: v)])
        assert close(model(long), hooked)
    part = model(model.run_with_cache(tokens, stop_at_layer=2)[0], start_at_layer=2)
    assert close(part, whole)


@every
def test_generation_and_states(name: str, tmp_path: Path):
    model, prompt = model_of(name), random_tokens(n_pos=9)
    out = model.generate(prompt, 5, stop_at_eos=False, return_type="tokens", verbose=False)
    tokens = prompt
    for _ in range(5):
        tokens = torch.cat([tokens, model(tokens)[:, -1:].argmax(-1)], dim=1)
    assert torch.equal(out, tokens)
    _, state = model(prompt, return_state=True)
    state.save(tmp_path / "state.safetensors")
    loaded = HybridState.load(tmp_path / "state.safetensors")
    assert loaded == state and list(map(type, loaded.blocks)) == list(map(type, state.blocks))
    rebuilt = HybridState.from_tensors(state.tensors(), state.n_seen, len(state.blocks))
    assert rebuilt == state and len(rebuilt.blocks) == model.cfg.n_layers
    assert torch.equal(model(tokens[:, 9:], state=loaded), model(tokens[:, 9:], state=state))
    assert state.n_bytes == state_bytes(model.cfg, 9, torch.float32, batch=2).total
    # One row more, of another number of keys; then each row alone again.
    _, short = model(prompt[:1, :4], return_state=True)
    both = HybridState.cat([state, short])
    after = model(torch.cat([tokens[:, 9:10], prompt[:1, 4:5]]), state=both)
    assert close(after[:2], model(tokens[:, :10])[:, -1:])
    assert close(after[2:], model(prompt[:1, :5])[:, -1:])
    swapped = state.replace(state[[1, 0]])
    assert close(model(tokens[[1, 0], 9:10], state=swapped), model(tokens[[1, 0], :10])[:, -1:])
    only_ssm = state.replace(state[[1, 0]], kinds="ssm")
    for mine, theirs, new in zip(state.blocks, state[[1, 0]].blocks, only_ssm.blocks, strict=True):
        for key, t in new.tensors().items():
            source = theirs if key.endswith("ssm") else mine
            assert torch.equal(t, source.tensors()[key]), key


def test_a_joint_state_is_a_value_whose_tensors_have_their_names():
    _, state = model_of("side by side")(random_tokens(), return_state=True)
    block: Any = state.blocks[0]
    assert list(block.tensors()) == ["attn.k", "attn.v", "attn.pos", "mixer.ssm"]
    assert block.k is block.attn.k and block.ssm is block.mixer.ssm and block.n_keys == 6
    with pytest.raises(AttributeError, match="0 parts of this state have 'conv'"):
        _ = block.conv
    with pytest.raises(AttributeError, match="cannot assign"):
        block.k = block.v
    wrong = replace(state, blocks=(state.blocks[1], *state.blocks[1:]))
    with pytest.raises(ValueError, match="it is another model's"):
        model_of("side by side")(random_tokens(), state=wrong)
    with pytest.raises(ValueError, match="a tensor of block 70000, of 65536"):
        HybridState.from_tensors({**state.tensors(), "blocks.70000.ssm": block.ssm})


# --- hooks ----------------------------------------------------------------------------------------


@every
def test_every_hook_is_live(name: str):
    model, prompt = model_of(name), random_tokens(n_pos=6)
    plain, cached = model(prompt), model.run_with_cache(prompt, names_filter=lambda name: True)[1]
    assert set(cached) == set(model.hook_dict)
    for point in model.hook_dict:
        stages: list[str] = []

        @per_position
        def change(value: Tensor, hook: HookPoint, stages: list[str] = stages) -> Tensor:
            stages.append(hook.run.stage)
            if hook.is_integer:
                return (value + 1) % 4
            if str(hook.name).endswith("hook_log_decay"):
                return 2 * value - 0.05
            if str(hook.name).endswith(("hook_rec_gate", "hook_ssm_dt", "hook_scale")):
                return 0.5 * value
            noise = torch.linspace(0.5, 1.5, value.shape[-1]).to(value)
            return value * noise - (0.0 if "hook_attn_scores" in str(hook.name) else 0.1)

        changed = model.run_with_hooks(prompt, fwd_hooks=[(point, change)])
        assert relative(changed, plain) > 1e-5, point
        assert len(set(stages)) == 1, point
        stages.clear()
        model.generate(prompt, 3, fwd_hooks=[(point, change)], stop_at_eos=False, verbose=False)
        assert stages.count("generation") >= 2 and "prefill" in stages, point


@every
def test_a_gradient_at_every_hook_is_that_of_finite_differences(name: str):
    model = random_model(CONFIGS[name], dtype=torch.float64)
    prompt = random_tokens(1, 5)
    points = [n for n, p in model.hook_dict.items() if not p.is_integer and "scores" not in n]
    grads: dict[str, Tensor] = {}

    def keep(grad: Tensor, hook: HookPoint) -> None:
        name, grad = str(hook.name), grad.detach()
        if name in grads:  # the state is seen step by step, the last position first
            grad = torch.cat([grad, grads[name]], dim=1)
        grads[name] = grad

    with model.hooks(bwd_hooks=[(n, keep) for n in points]):
        embedded = model.run_with_cache(prompt, names_filter="hook_embed")[1]["hook_embed"]
        stream = embedded.clone().requires_grad_(True)
        logit(model(stream, start_at_layer=0)).backward()
    for point in points:
        if point not in grads:  # before the first block
            continue
        generator = torch.Generator().manual_seed(0)
        way = torch.randn(grads[point].shape, generator=generator, dtype=torch.float64)
        eps = 1e-5 * (1 + float(grads[point].abs().max())) ** -1

        def nudge(value: Tensor, hook: HookPoint, way: Tensor = way, by: float = eps) -> Tensor:
            first = hook.run.first if str(hook.name).endswith("ssm_state") else 0
            return value + by * way[:, first : first + value.shape[1]]

        there = []
        for hook in (nudge, partial(nudge, by=-eps)):
            with model.hooks([(point, hook)]):
                there.append(float(logit(model(stream.detach(), start_at_layer=0))))
        slope = (there[0] - there[1]) / (2 * eps)
        wanted = float((grads[point] * way).sum())
        assert abs(slope - wanted) < 1e-4 * max(1.0, abs(wanted)), (point, slope, wanted)


# --- what layers write ----------------------------------------------------------------------------


@every
def test_the_stream_is_the_sum_of_its_parts(name: str):
    model = model_of(name)
    _, cache = model.run_with_cache(random_tokens())
    n = model.cfg.n_layers
    for layer in range(n + 1):
        entering = cache["resid_post", layer - 1] if layer else cache["embed"]
        for stack in (cache.decompose_resid, cache.get_full_resid_decomposition):
            assert close(stack(layer).sum(0), entering), layer
    for finest in (False, True):
        parts = cache.get_full_resid_decomposition(expand_neurons=finest, apply_ln=True)
        assert close(parts.sum(0), cache["ln_final.hook_normalized"] * model.ln_final.w)
    attrs = cache.logit_attrs(cache.decompose_resid(), 5)
    assert close(attrs.sum(0), model(random_tokens())[..., 5])
    heads, labels = cache.stack_head_results(return_labels=True, incl_remainder=True)
    assert close(heads.sum(0), cache["resid_post", -1]) and labels[-1] == "remainder"
    cache.compute_head_results()
    for layer in model.cfg.attention_layers:
        attn = model.blocks[layer].attn
        found = cache["result", layer].sum(-2) + (0 if attn.b_O is None else attn.b_O)
        assert close(found, attn.o(cache["z", layer].flatten(-2)))
    lens = cache.accumulated_resid(incl_mid=True, return_labels=True)[1]
    assert [x for x in lens if "mid" in x] == [
        f"{i}_mid" for i, x in enumerate(model.cfg.layers) if x.mixers and x.mlp
    ]


def test_parts_that_are_not_there_and_norms_that_are_not_there_are_errors():
    _, cache = model_of("halves").run_with_cache(random_tokens())
    with pytest.raises(ValueError, match="layer 0 has no MLP"):
        cache.get_neuron_results(0)
    with pytest.raises(ValueError, match="layer 0 has no MLP"):
        cache.decompose_resid(0, mlp_input=True)
    assert cache.decompose_resid(1, return_labels=True, apply_ln=True)[1] == ["embed", "0_ema_out"]
    _, cache = model_of("norms").run_with_cache(random_tokens())
    with pytest.raises(ValueError, match="layer 1 reads the stream without a norm"):
        cache.decompose_resid(1, apply_ln=True)
    model = model_of("side by side")
    with model.hooks([("blocks.0.hook_mixer_out", lambda value, hook: value * 2)]):
        _, cache = model.run_with_cache(random_tokens())
    with pytest.raises(ValueError, match=r"blocks.0.hook_mixer_out.*edit one of these writes"):
        cache.decompose_resid()


@every
def test_folding_keeps_the_logits_and_unfolds_bit_for_bit(name: str):
    model, tokens = model_of(name), random_tokens()
    folded, record = fold_ln(model)
    assert close(folded(tokens), model(tokens))
    norms = [m for b in folded.blocks for m in (b.ln1, b.ln2) if m is not None]
    assert all(torch.equal(m.weight, torch.ones(24)) for m in norms)
    back = unfold_ln(folded, record)
    assert all(torch.equal(p, model.get_parameter(n)) for n, p in back.named_parameters())


def test_every_kind_scales_its_write_and_what_it_is_made_of():
    tokens = random_tokens()
    mixers: dict[Any, Any] = {
        AttentionConfig: ROTARY,
        RGLRUConfig: RGLRUConfig(32, 4),
        MambaConfig: MambaConfig(48, 5, 3, proj_bias=True),
        EmaConfig: EMA,
    }
    mlps: dict[Any, Any] = {
        GatedMLPConfig: GatedMLPConfig(20),
        MoEConfig: MoEConfig(4, 2, 20),
        SquaredConfig: SQUARED,
    }
    kinds = {c: k for c, k in {**MIXERS, **MLPS}.items() if c.__module__ != "tests.test_facts"}
    for kind in kinds.values():
        assert kind.scales_write, kind
    pairs = [(m, SQUARED) for m in mixers.values()] + [(EMA, m) for m in mlps.values()]
    for mixer, mlp in pairs:
        plain = random_model(config(LayerConfig(mixer, mlp)))
        scaled = LayerConfig(replace(mixer, write_scale=0.5), replace(mlp, write_scale=3.0))
        other = random_model(config(scaled))
        assert other.load_state_dict(plain.state_dict())
        _, a = plain.run_with_cache(tokens, names_filter=lambda name: True)
        same: Any = [("blocks.0.hook_resid_mid", lambda value, hook, a=a: a["resid_mid", 0])]
        with other.hooks(same):
            _, b = other.run_with_cache(tokens, names_filter=lambda name: True)
        assert close(b["mixer_out", 0], a["mixer_out", 0] * 0.5), mixer
        assert close(b["mlp_out", 0], a["mlp_out", 0] * 3), mlp
        step = other(tokens[:, :1], return_type="logits")
        assert torch.isfinite(step).all()
        parts = b.get_full_resid_decomposition()
        assert close(parts.sum(0), b["embed"] + b["mixer_out", 0] + b["mlp_out", 0])


def test_a_scale_that_a_kind_does_not_apply_is_an_error(monkeypatch: pytest.MonkeyPatch):
    for kind, layer in (
        (Ema, LayerConfig(replace(EMA, write_scale=2.0), None)),
        (SquaredMLP, LayerConfig(None, replace(SQUARED, write_scale=2.0))),
    ):
        monkeypatch.setattr(kind, "scales_write", False)
        with pytest.raises(NotSupported, match="does not state that it multiplies its write"):
            HookedHybrid.meta(config(layer))


# --- interventions --------------------------------------------------------------------------------


def test_one_path_of_a_layer_is_ablated_and_the_other_is_left():
    model, tokens = model_of("side by side"), random_tokens()
    cfg = model.cfg
    assert layers_of(cfg, "attention") == (0, 1) and layers_of(cfg, "ema") == (0,)
    assert cfg.attention_layers == (0, 1) and cfg.recurrent_layers == (0, 1, 2)
    for kind, silent, loud, layers in (
        ("attention", "attn_out", "ssm_out", (0, 1)),
        ("recurrence", "ssm_out", "attn_out", (0, 1)),
        ("ema", "ssm_out", "attn_out", (0,)),
    ):
        with model.hooks(ablate_mixers(cfg, kind)):
            _, cache = model.run_with_cache(tokens)
        for layer in layers:
            assert not cache[silent, layer].any() and cache[loud, layer].any()
            assert torch.equal(cache["mixer_out", layer], cache[loud, layer])
        assert bool(cache["mixer_out", 2].any()) == (kind != "recurrence")
    both = [*ablate_mixers(cfg, "attention"), *ablate_mixers(cfg, "recurrence")]
    whole = model.run_with_hooks(tokens, fwd_hooks=ablate_layers(range(3)))
    assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=both), whole)
    _, cache = model.run_with_cache(tokens)
    with model.hooks(ablate_mixers(cfg, "attention", 1, "mean", {1: cache["attn_out", 1]})):
        _, mean = model.run_with_cache(tokens)
    wanted = cache["attn_out", 1].mean((0, 1))
    assert close(mean["attn_out", 1], wanted.expand_as(mean["attn_out", 1]))
    with pytest.raises(ValueError, match=r"layers \[2\] have none; \(0, 1\) have"):
        ablate_mixers(cfg, "attention", [1, 2])
    with pytest.raises(ValueError, match="kind='gru'"):
        ablate_mixers(cfg, "gru")
    halves = model_of("halves").cfg
    assert halves.mlp_layers == (1, 3) and halves.recurrent_layers == (0,)
    assert halves.d_mlp == 20


@every
def test_heads_states_and_crossings(name: str):
    model, tokens = model_of(name), random_tokens()
    begins = model.run_with_hooks(tokens, fwd_hooks=knock_out_crossings(model.cfg, 6))
    assert close(begins[:, 6:], model(tokens[:, 6:]))
    sparse = model.run_with_hooks(tokens, fwd_hooks=keep_top_heads(1))
    assert relative(sparse, model(tokens)) > 1e-4
    with model.hooks(freeze_state(3, 8)):
        _, cache = model.run_with_cache(tokens)
    for layer in layers_of(model.cfg, "ema"):
        y = cache["ssm_y", layer]
        assert torch.equal(y[:, 3:8], y[:, 2:3].expand(-1, 5, -1))
    edited = edit_state(lambda h, hook: h * 0, positions=[4], layers=[0])
    assert relative(model.run_with_hooks(tokens, fwd_hooks=edited), model(tokens)) > 1e-6


def test_a_sweep_silences_each_path_and_what_is_there():
    names = {name: [s.name for s in layer_settings(cfg)] for name, cfg in CONFIGS.items()}
    assert names["side by side"] == [
        "whole", "no attention", "no RG-LRU", "no Mamba", "no EMA", "no MLP",
        "no attention 0", "no attention 1", "no RG-LRU 1", "no Mamba 2", "no EMA 0",
    ]  # fmt: skip
    assert "no MLP" in names["halves"] and "no attention 2" in names["halves"]
    model, tokens = model_of("side by side"), random_tokens()
    settings = {s.name: s for s in layer_settings(model.cfg)}
    with model.hooks([*settings["no attention 0"].prefill]):
        _, cache = model.run_with_cache(tokens)
    assert not cache["attn_out", 0].any() and cache["ssm_out", 0].any()
    controls = [s.name for s in control_settings(CONFIGS["halves"], (1,), 1)]
    assert "no recurrence 0" in controls and not any("1" in n.split()[-1] for n in controls[-1:])


# --- analysis -------------------------------------------------------------------------------------


def test_analyses_follow_each_path():
    model, tokens = model_of("side by side"), random_tokens()
    _, cache = model.run_with_cache(tokens)
    matrix = effective_attention(cache, 0, through="scan")
    product = (matrix @ cache["in_proj", 0].mT[..., None])[..., 0].mT
    assert close(product, cache["ssm_y", 0])
    assert [(r.layer, r.kind) for r in how_far(cache)] == [
        (0, "attention"), (0, "ema"), (1, "attention"), (1, "rglru"), (2, "mamba"),
    ]  # fmt: skip
    with pytest.raises(NotSupported, match="layer 0 has several mixers"):
        all_composition_scores(model, "V")
    write = ov_circuit(model, 0, with_norm=True)
    attn = model.blocks[0].attn
    normalized = cache["resid_pre", 0] / cache["scale", 0, "ln1"]
    read = normalized * model.blocks[0].ln1.w
    by_head = torch.einsum("bpd,hde->bphe", read, attn.OV.AB)
    assert close(torch.einsum("bpd,hde->bphe", normalized, write.AB), by_head)


@every
def test_patching_and_attribution_run(name: str):
    model, tokens, other = model_of(name), random_tokens(1), random_tokens(1, seed=1)
    found = attribution_patching(model, tokens, other, logit, verbose=False)
    assert {n for n in found.values if n.endswith("hook_mixer_out")}
    _, clean = model.run_with_cache(tokens)
    grid = patch_mixer_out(model, other, clean, logit, verbose=False)
    assert grid.labels[0] == tuple(i for i, layer in enumerate(model.cfg.layers) if layer.mixers)
    for at, layer in enumerate(grid.labels[0]):
        hooks: Any = [(f"blocks.{layer}.hook_mixer_out", partial(_last, clean["mixer_out", layer]))]
        change = logit(model.run_with_hooks(other, fwd_hooks=hooks)) - logit(model(other))
        assert abs(float(grid.values[at, -1]) - float(change)) < 1e-4


def _last(donor: Tensor, value: Tensor, hook: HookPoint) -> Tensor:
    """Put in the last position of another run."""
    value = value.clone()
    value[:, -1] = donor[:, -1]
    return value


def test_path_patching_from_one_of_several_mixers():
    model, tokens, other = model_of("side by side"), random_tokens(1), random_tokens(1, seed=1)
    _, corrupted = model.run_with_cache(other)

    def effect(sender: Any) -> Tensor:
        return path_patch(
            model, tokens, corrupted, sender, ("mlp_in", 0), logit, freeze_norm=True, through=()
        )

    _, clean = model.run_with_cache(tokens)
    for leaf in ("attn_out", "ssm_out", "mixer_out"):
        delta = corrupted[leaf, 0] - clean[leaf, 0]

        def put(value: Tensor, hook: HookPoint, delta: Tensor = delta) -> Tensor:
            return value + delta

        hooks: Any = [
            ("blocks.0.hook_mlp_in", put),
            ("blocks.0.ln2.hook_scale", lambda v, hook: clean["scale", 0, "ln2"]),
        ]
        wanted = logit(model.run_with_hooks(tokens, fwd_hooks=hooks))
        assert close(effect((leaf, 0)).sum(), wanted), leaf
    with pytest.raises(NotSupported, match="passes a norm"):
        norms = model_of("norms")
        _, kept = norms.run_with_cache(other)
        path_patch(norms, tokens, kept, ("z", 1, 0), ("final",), logit)


# --- what it takes --------------------------------------------------------------------------------


@every
def test_counts_plans_places_and_quantised_weights(name: str, tmp_path: Path):
    model, cfg, tokens = model_of(name), CONFIGS[name], random_tokens()
    assert count_parameters(cfg).total == sum(p.numel() for p in model.parameters())
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        hooks: Any = [
            (
                # By the equations that are counted: not by a kernel, nor chunk by chunk.
                lambda n: n.endswith(("hook_pattern", "hook_expert_out", "hook_ssm_write")),
                lambda v, hook: v,
            )
        ]
        model.run_with_hooks(tokens, fwd_hooks=hooks)
    counted = prefill_flops(cfg, 20, batch=2, n_logits=None, pairs="dense")
    products = sum(flops.products for flops in counted.values())
    gqa = counter.get_total_flops()
    assert abs(products - gqa) <= 0.02 * gqa, (products, gqa)
    assert plan(cfg, Machine(cpu=10**9), (700,)).fits
    wanted = model(tokens)
    placed = place(random_model(cfg), {"": "cpu", "blocks": "disk"}, tmp_path)
    with torch.no_grad():
        assert close(placed(tokens), wanted)
    pytest.importorskip("torchao")
    small = random_model(cfg)
    done = quantize_weights(small, "int8")
    assert [w.name for w in done.weights] == quantizable(cfg)
    assert 0 < relative(small(tokens), wanted) < INT8


# --- configs that cannot be -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LayerConfig(None, None), "neither a mixer nor an MLP"),
        (lambda: LayerConfig((), None), "neither a mixer nor an MLP"),
        (lambda: LayerConfig((ATTENTION, ROTARY), None), "one at most of attention"),
        (lambda: LayerConfig((EMA, RGLRUConfig(32, 4)), None), "one at most of recurrences"),
        (lambda: LayerConfig(EMA, None, norm="sandwich"), "norm='sandwich': give one of 'pre'"),  # type: ignore[arg-type]
        (lambda: replace(EMA, write_scale=0.0), "write_scale=0.0: give a positive number"),
        (lambda: replace(EMA, write_scale=float("nan")), "write_scale=nan: give a positive"),
        (lambda: replace(EMA, write_scale=True), "write_scale=True: give a positive number"),
        (lambda: config(LayerConfig(EMA, None), logits_scale=-1.0), "logits_scale=-1.0"),
        (
            lambda: config(LayerConfig(EMA, None), scale_embedding=True, embedding_scale=2.0),
            "give one of the two",
        ),
        (lambda: QKNormConfig("row"), "over='row': give one of 'head', 'all'"),  # type: ignore[arg-type]
    ],
)
def test_an_impossible_config_is_an_error_with_the_reason(make: Callable[[], Any], message: str):
    with pytest.raises(ValueError, match=message):
        make()


def test_one_mixer_in_a_tuple_is_that_mixer_and_lists_name_the_kinds():
    assert LayerConfig((EMA,), None) == LayerConfig(EMA, None)
    layer = LayerConfig((ATTENTION, EMA), SQUARED)
    assert layer.attention is ATTENTION and layer.recurrence is EMA
    assert layer.mixers == (ATTENTION, EMA) and LayerConfig(None, SQUARED).mixers == ()
    narrow = config(layer).with_overrides(n_keys=3)
    assert narrow.layers[0].mixers == (replace(ATTENTION, n_keys=3), EMA)


def test_options_at_their_default_are_in_no_identity():
    identity = config_identity(config(LayerConfig(ATTENTION, GatedMLPConfig(20))))
    assert "logits_scale" not in identity
    assert identity["layers"] == [
        {
            "kind": "LayerConfig",
            "mixer": {
                "kind": "AttentionConfig", "n_heads": 4, "n_kv_heads": 2, "d_head": 6, "n_keys": 7,
                "rotary": None, "qkv_bias": False, "out_bias": False,
            },
            "mlp": {"kind": "GatedMLPConfig", "d_mlp": 20, "act": "gelu_tanh", "bias": True},
        }
    ]  # fmt: skip
    scaled = config_identity(CONFIGS["side by side"])
    assert scaled["logits_scale"] == 0.25
    assert scaled["layers"][0]["mixer"][0]["write_scale"] == 0.5


@pytest.mark.parametrize("name", CONFIGS)
def test_families_refuse_what_their_config_has_no_setting_for(name: str, tmp_path: Path):
    with pytest.raises(CheckpointError):
        model_of(name).save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@every
def test_norms_are_counted_as_they_are_there(name: str):
    blocks = model_of(name).blocks
    norms = [(b.ln1, b.ln1_post, b.ln2, b.ln2_post) for b in blocks]
    counts = [sum(norm is not None for norm in of_block) for of_block in norms]
    assert [layer.n_norms for layer in CONFIGS[name].layers] == counts
