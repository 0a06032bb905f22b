"""The residual stream as a sum: parts against their definitions, and what sums to what."""

from __future__ import annotations

import re

import jaxtyping
import pytest
import torch

from hooked_hybrid import ActivationCache
from hooked_hybrid.config import MoEConfig, RGLRUConfig
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.model.residual import reading as residual_reading
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.mlps import MLPS
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import BF16, FP32_PARITY

N_POS = 11
MODELS = {name: tiny_model(name) for name in CONFIGS}
TOKENS = random_tokens(batch=2, n_pos=N_POS)
RUNS = {name: model.run_with_cache(TOKENS) for name, model in MODELS.items()}
EVERYTHING = {
    name: model.run_with_cache(TOKENS, names_filter=lambda _: True)[1]
    for name, model in MODELS.items()
}
every_config = pytest.mark.parametrize("config", CONFIGS)


def cache_of(config: str) -> ActivationCache:
    return RUNS[config][1]


def places(config: str) -> list[tuple[int, bool]]:
    n = CONFIGS[config].n_layers
    return [(i, mid) for i in range(n) for mid in (False, True)] + [(n, False)]


def stream(cache: ActivationCache, layer: int, mid: bool) -> torch.Tensor:
    if mid:
        return cache["resid_mid", layer]
    is_last = layer == cache.model.cfg.n_layers
    return cache["resid_post", layer - 1] if is_last else cache["resid_pre", layer]


def read_by(cache: ActivationCache, layer: int, mid: bool) -> torch.Tensor:
    """What the norm at a place gives, from its own hook point."""
    if layer == cache.model.cfg.n_layers:
        return cache["normalized"] * cache.model.ln_final.w
    name = "ln2" if mid else "ln1"
    return cache["normalized", layer, name] * getattr(cache.model.blocks[layer], name).w


# --- parts sum to the whole -----------------------------------------------------------------------


@every_config
@pytest.mark.parametrize("apply_ln", [False, True])
def test_parts_sum_to_the_stream_everywhere(config, apply_ln):
    cache = cache_of(config)
    for layer, mid in places(config):
        whole = (read_by if apply_ln else stream)(cache, layer, mid)
        asked = {"layer": layer, "mlp_input": mid, "apply_ln": apply_ln}
        stacks = [
            cache.decompose_resid(**asked),
            cache.get_full_resid_decomposition(**asked),
            cache.get_full_resid_decomposition(
                **asked, recurrent="layer", expand_neurons=False, expand_experts=False
            ),
            cache.stack_head_results(**asked, incl_remainder=True),
            cache.stack_head_results(**asked, incl_remainder=True, recurrent="block"),
            cache.stack_neuron_results(**asked, incl_remainder=True),
            cache.stack_expert_results(**asked, incl_remainder=True),
        ]
        for stack in stacks:
            assert relative(stack.sum(0), whole) < FP32_PARITY


@every_config
def test_accumulated_resid_is_the_stream_so_far(config):
    cache, n = cache_of(config), CONFIGS[config].n_layers
    stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
    assert labels == [f"{i}_{at}" for i in range(n) for at in ("pre", "mid")] + ["final_post"]
    for part, (layer, mid) in zip(stack, places(config), strict=True):
        assert torch.equal(part, stream(cache, layer, mid))
    parts = cache.decompose_resid()
    assert relative(parts.cumsum(0), stack) < FP32_PARITY
    upto = cache.accumulated_resid(1, mlp_input=True, return_labels=True)[1]
    assert upto == ["0_pre", "1_pre", "1_mid"]


@every_config
def test_accumulated_resid_after_the_norm(config):
    """At the end each has a scale of its own; before a layer all have that layer's."""
    cache, norm = cache_of(config), MODELS[config].ln_final
    stack = cache.accumulated_resid(apply_ln=True)
    for part, at in zip(stack, cache.accumulated_resid(), strict=True):
        assert relative(part, norm(at)) < FP32_PARITY
    before = cache.accumulated_resid(1, apply_ln=True)
    assert relative(before[1], read_by(cache, 1, False)) < FP32_PARITY
    scale = cache["scale", 1, "ln1"]
    wanted = cache["resid_pre", 0] / scale * MODELS[config].blocks[1].ln1.w
    assert relative(before[0], wanted) < FP32_PARITY


def test_labels_say_what_each_layer_is():
    assert cache_of("griffin").decompose_resid(return_labels=True)[1][:3] == [
        "embed",
        "0_rglru_out",
        "0_mlp_out",
    ]
    _, labels = cache_of("jamba").decompose_resid(return_labels=True)
    assert (
        labels
        == (
            "embed 0_mamba_out 0_mlp_out 1_mamba_out 1_moe_out 2_attn_out 2_mlp_out 3_mamba_out "
            "3_moe_out"
        ).split()
    )


@every_config
def test_modes_choose_the_kind_of_layer(config):
    cache, cfg = cache_of(config), CONFIGS[config]

    def labels(mode, **more):
        return cache.decompose_resid(mode=mode, return_labels=True, **more)[1]

    everything = labels("all")
    assert labels("mixer") == [x for x in everything if not x.endswith(("mlp_out", "moe_out"))]
    assert labels("mlp", incl_embeds=False) == [
        x for x in everything if x.endswith(("mlp_out", "moe_out"))
    ]
    assert labels("attn") == ["embed", *(f"{i}_attn_out" for i in cfg.attention_layers)]


@pytest.mark.parametrize("config", ["griffin", "jamba"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding(config, side):
    """Sums hold at padding too; at tokens, attributions are those of the row alone."""
    model, n_pad = MODELS[config], 3
    mask = torch.ones_like(TOKENS)
    mask[1, slice(None, n_pad) if side == "left" else slice(-n_pad, None)] = 0
    _, cache = model.run_with_cache(TOKENS, attention_mask=mask)
    stack = cache.get_full_resid_decomposition()
    assert relative(stack.sum(0), cache["resid_post", -1]) < FP32_PARITY
    attrs = cache.logit_attrs(stack, 7)
    assert relative(attrs.sum(0), cache["logits"][..., 7]) < FP32_PARITY
    is_real = mask[1].bool()
    _, alone = model.run_with_cache(TOKENS[1:][:, is_real])
    own = alone.logit_attrs(alone.get_full_resid_decomposition(), 7)
    assert relative(attrs[:, 1, is_real], own[:, 0]) < FP32_PARITY


@pytest.mark.parametrize("config", ["griffin", "jamba"])
def test_bf16(config):
    model = tiny_model(config, dtype=torch.bfloat16)
    _, cache = model.run_with_cache(TOKENS)
    stack = cache.get_full_resid_decomposition()
    assert stack.dtype == torch.bfloat16
    assert relative(stack.float().sum(0), cache["resid_post", -1].float()) < BF16
    attrs = cache.logit_attrs(stack, TOKENS)
    logits = cache["logits"].gather(-1, TOKENS[..., None])[..., 0]
    assert attrs.dtype == torch.float32 and relative(attrs.sum(0), logits.float()) < BF16


# --- parts against their definitions --------------------------------------------------------------


@every_config
def test_heads_are_their_results(config):
    model, cfg = MODELS[config], CONFIGS[config]
    stack, labels = cache_of(config).stack_head_results(return_labels=True)
    full = EVERYTHING[config]
    wanted = torch.cat([full["result", i].movedim(2, 0) for i in cfg.attention_layers])
    assert relative(stack, wanted) < FP32_PARITY
    assert labels == [f"L{i}H{h}" for i in cfg.attention_layers for h in range(cfg.n_heads)]
    assert torch.equal(full.stack_head_results(), wanted)
    _, kept = model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith("hook_z"))
    kept.compute_head_results()
    layer = cfg.attention_layers[0]
    assert relative(kept["result", layer], EVERYTHING[config]["result", layer]) < FP32_PARITY
    last = kept.stack_head_results(pos_slice="last")
    assert torch.equal(last, kept.stack_head_results()[:, :, -1])
    assert torch.equal(kept.positions(("result", layer)), kept.positions(("z", layer)))


@every_config
def test_gate_blocks_are_the_mixer_with_the_others_cut(config):
    """Cutting all channels but one block's leaves its write and the bias."""
    model, cfg = MODELS[config], CONFIGS[config]
    stack, labels = cache_of(config).stack_head_results(recurrent="block", return_labels=True)
    mixer = cfg.layers[0].mixer
    if not isinstance(mixer, RGLRUConfig):
        assert labels[0] == "0_mamba_out" and torch.equal(
            stack[0], cache_of(config)["mixer_out", 0]
        )
        return
    width = mixer.d_rnn // mixer.n_gate_blocks
    for block in range(mixer.n_gate_blocks):

        def only_block(x, hook, at=slice(block * width, (block + 1) * width)):
            kept = torch.zeros_like(x)
            kept[..., at] = x[..., at]
            return kept

        with model.hooks([("blocks.0.mixer.hook_gated", only_block)]):
            _, run = model.run_with_cache(TOKENS)
        written = run["mixer_out", 0] - model.blocks[0].mixer.linear_out.bias
        assert labels[block] == f"L0B{block}" and relative(stack[block], written) < FP32_PARITY


@every_config
def test_a_recurrent_layer_as_one_part_is_its_write(config):
    cache, cfg = cache_of(config), CONFIGS[config]
    stack, labels = cache.stack_head_results(recurrent="layer", return_labels=True)
    for i in cfg.recurrent_layers:
        at = [n for n, label in enumerate(labels) if label.startswith(f"{i}_")]
        assert torch.equal(stack[at[0]], cache["mixer_out", i]) and len(at) == 1


def test_experts_agree_however_they_are_found():
    """From each expert's write, from its values, or run again; zero where not chosen."""
    full, model = EVERYTHING["jamba"], MODELS["jamba"]
    from_out, labels = full.stack_expert_results(return_labels=True)
    layers = [i for i, x in enumerate(model.cfg.layers) if isinstance(x.mlp, MoEConfig)]
    n_experts = model.blocks[layers[0]].mlp.cfg.n_experts
    assert labels == [f"L{i}E{e}" for i in layers for e in range(n_experts)]
    for left_out in (["hook_expert_out"], ["hook_expert_out", "hook_expert_post"]):
        kept = {n: t for n, t in full.items() if not n.endswith(tuple(left_out))}
        assert relative(ActivationCache(kept, model).stack_expert_results(), from_out) < FP32_PARITY
    chosen = full["expert_indices", layers[0]]
    for expert in range(n_experts):
        is_chosen = (chosen == expert).any(-1)
        assert bool((from_out[expert][~is_chosen] == 0).all())
        assert bool((from_out[expert][is_chosen] != 0).any(-1).all())
    assert relative(from_out[:n_experts].sum(0), full["mlp_out", layers[0]]) < FP32_PARITY


def test_an_expert_chosen_twice_writes_twice():
    model = MODELS["jamba"]
    twice = ("blocks.1.mlp.hook_expert_indices", lambda x, hook: torch.zeros_like(x))
    with model.hooks([twice]):
        _, cache = model.run_with_cache(TOKENS)
        _, large = model.run_with_cache(TOKENS, names_filter=lambda n: ".mlp." in n)
    for kept in (cache, large):
        stack = kept.stack_expert_results(2)
        assert relative(stack[0], cache["mlp_out", 1]) < FP32_PARITY and not stack[1:].any()


@every_config
def test_neurons_are_value_times_weight(config):
    cache, model = cache_of(config), MODELS[config]
    one = cache.get_neuron_results(0, neuron_slice=[3, 5])
    W_out = model.blocks[0].mlp.W_out
    wanted = cache["post", 0][..., [3, 5], None] * W_out[[3, 5]]
    assert relative(one, wanted) < FP32_PARITY
    stack, labels = cache.stack_neuron_results(1, neuron_slice=(3, 6), return_labels=True)
    assert labels == ["L0N3", "L0N4", "L0N5"]
    assert torch.equal(stack[[0, 2]], one.movedim(-2, 0))
    assert cache.get_neuron_results(0, 3).shape == (*TOKENS.shape, 1, 24)


@pytest.mark.parametrize("config", ["griffin", "jamba"])
@pytest.mark.parametrize("apply_ln", [False, True])
@pytest.mark.parametrize("shape", [(24,), (24, 3)])
def test_projected_parts_are_parts_projected(config, apply_ln, shape):
    cache = cache_of(config)
    onto = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    stack, labels = cache.get_full_resid_decomposition(apply_ln=apply_ln, return_labels=True)
    got = cache.get_full_resid_decomposition(
        apply_ln=apply_ln, project_output_onto=onto, return_labels=True
    )
    assert got[1] == labels and relative(got[0], stack @ onto) < FP32_PARITY
    neurons = cache.stack_neuron_results(None, incl_remainder=True, apply_ln=apply_ln)
    along = cache.stack_neuron_results(
        None, incl_remainder=True, apply_ln=apply_ln, project_output_onto=onto
    )
    assert relative(along, neurons @ onto) < FP32_PARITY
    one = cache.get_neuron_results(0, project_output_onto=onto)
    assert relative(one, cache.get_neuron_results(0) @ onto) < FP32_PARITY


def test_edits_of_parts_are_in_the_parts_and_edits_of_the_stream_in_the_remainder():
    model = MODELS["griffin"]
    edits = [
        ("blocks.2.hook_attn_out", lambda x, hook: 2 * x),
        ("blocks.2.attn.hook_result", lambda x, hook: x.flip(2) * torch.arange(4.0)[:, None]),
        ("blocks.0.hook_mlp_out", lambda x, hook: x - 1),
    ]
    with model.hooks(edits):
        _, cache = model.run_with_cache(TOKENS)
        _, results = model.run_with_cache(TOKENS, names_filter=lambda n: n.endswith("hook_result"))
    assert relative(cache.decompose_resid().sum(0), cache["resid_post", -1]) < FP32_PARITY
    assert torch.equal(results.stack_head_results()[0], results["result", 2][:, :, 0])
    push = torch.randn(24, generator=torch.Generator().manual_seed(1))
    with model.hooks([("blocks.1.hook_resid_mid", lambda x, hook: x + push)]):
        _, cache = model.run_with_cache(TOKENS)
    off = cache["resid_post", -1] - cache.decompose_resid().sum(0)
    assert relative(off, push.expand_as(off)) < FP32_PARITY
    stack = cache.stack_head_results(incl_remainder=True)
    assert relative(stack.sum(0), cache["resid_post", -1]) < FP32_PARITY


# --- norms and logits -----------------------------------------------------------------------------


@every_config
def test_a_part_after_the_norm_with_its_own_scale_is_that_norm_of_it(config):
    cache, model = cache_of(config), MODELS[config]
    stack = cache.decompose_resid()
    for layer, mid in places(config)[1:]:
        last = layer == model.cfg.n_layers
        norm = model.ln_final if last else getattr(model.blocks[layer], "ln2" if mid else "ln1")
        got = cache.apply_ln_to_stack(stack, layer, mlp_input=mid, recompute_ln=True)
        assert relative(got, torch.stack([norm(part) for part in stack])) < FP32_PARITY


@every_config
def test_attributions_sum_to_the_logit_before_the_soft_cap(config):
    cache = cache_of(config)
    right = cache["logits"].gather(-1, TOKENS[..., None])[..., 0]
    wrong = cache["logits"][..., 9]
    for stack in (cache.decompose_resid(), cache.get_full_resid_decomposition()):
        assert relative(cache.logit_attrs(stack, TOKENS).sum(0), right) < FP32_PARITY
        assert relative(cache.logit_attrs(stack, TOKENS, 9).sum(0), right - wrong) < FP32_PARITY
    if CONFIGS[config].logits_soft_cap is None:
        assert relative(right, RUNS[config][0].gather(-1, TOKENS[..., None])[..., 0]) < FP32_PARITY


@every_config
def test_each_way_through_the_soft_cap_is_exact_in_its_sense(config):
    """Shares sum to the model's own logit; slopes are its derivative along each part."""
    model, cache = MODELS[config], cache_of(config)
    stack = cache.decompose_resid()
    own = RUNS[config][0]
    shares = cache.logit_attrs(stack, 5, 9, through_soft_cap="share")
    assert relative(shares.sum(0), own[..., 5] - own[..., 9]) < FP32_PARITY
    amount = torch.ones(len(stack), requires_grad=True)
    normalized = cache.apply_ln_to_stack((stack.movedim(0, -1) * amount).movedim(-1, 0)).sum(0)
    logits = normalized @ model.W_U
    cap = model.cfg.logits_soft_cap
    capped = logits if cap is None else cap * torch.tanh(logits / cap)
    (slope,) = torch.autograd.grad((capped[..., 5] - capped[..., 9]).sum(), amount)
    got = cache.logit_attrs(stack, 5, 9, through_soft_cap="slope").sum((1, 2))
    assert relative(got, slope) < FP32_PARITY


def test_a_low_cap_makes_the_ways_differ():
    model = tiny_model("griffin")
    model.unembed.soft_cap = 0.5
    object.__setattr__(model, "cfg", model.cfg.with_overrides(logits_soft_cap=0.5))
    own, cache = model.run_with_cache(TOKENS)
    stack = cache.decompose_resid()
    ways = [
        cache.logit_attrs(stack, 5, through_soft_cap=w).sum(0) for w in (None, "share", "slope")
    ]
    assert relative(ways[1], own[..., 5]) < FP32_PARITY
    assert relative(ways[0], ways[1]) > 0.1 and relative(ways[2], ways[1]) > 0.1


def test_tokens_can_be_given_for_everything_a_row_or_a_position():
    cache = cache_of("griffin")
    stack = cache.decompose_resid()
    every = cache.logit_attrs(stack, torch.full_like(TOKENS, 5))
    assert torch.equal(cache.logit_attrs(stack, 5), every)
    assert torch.equal(cache.logit_attrs(stack, torch.tensor(5)), every)
    by_row = cache.logit_attrs(stack, [5, 6])
    assert torch.equal(by_row[:, 0], every[:, 0])
    assert relative(by_row[:, 1].sum(0), cache["logits"][1, :, 6]) < FP32_PARITY


def test_slices_of_positions_and_rows():
    cache = cache_of("griffin")
    whole = cache.logit_attrs(cache.decompose_resid(), TOKENS)
    for pos in (-1, (2, 5), [4, 0], slice(None, None, 3)):
        stack = cache.decompose_resid(pos_slice=pos)
        wanted = whole[:, :, slice(*pos) if isinstance(pos, tuple) else pos]
        tokens = TOKENS[:, slice(*pos) if isinstance(pos, tuple) else pos]
        assert relative(cache.logit_attrs(stack, tokens, pos_slice=pos), wanted) < FP32_PARITY
        full = cache.get_full_resid_decomposition(pos_slice=pos, apply_ln=True)
        assert (
            relative(full.sum(0), cache.apply_ln_to_stack(stack, pos_slice=pos).sum(0))
            < FP32_PARITY
        )
    stack = cache.decompose_resid()
    assert relative(cache.logit_attrs(stack, TOKENS[1], batch_slice=1), whole[:, 1]) < FP32_PARITY
    rows = cache.logit_attrs(stack, TOKENS[1:], batch_slice=[1])
    assert relative(rows, whole[:, 1:]) < FP32_PARITY
    alone = cache.logit_attrs(stack[:, 1], TOKENS[1], batch_slice=1, has_batch_dim=False)
    assert relative(alone, whole[:, 1]) < FP32_PARITY


@pytest.mark.parametrize("config", ["griffin", "jamba"])
def test_without_the_batch_axis(config):
    whole = cache_of(config)
    stack = whole.get_full_resid_decomposition()[:, 1]
    wanted = whole.logit_attrs(whole.get_full_resid_decomposition(), TOKENS)[:, 1]
    row = whole.apply_slice_to_batch_dim(1)
    _, removed = MODELS[config].run_with_cache(TOKENS[1:], remove_batch_dim=True)
    for cache in (row, removed):
        own = cache.get_full_resid_decomposition()
        assert relative(own, stack) < FP32_PARITY
        assert relative(cache.logit_attrs(own, TOKENS[1]), wanted) < FP32_PARITY
        at = cache.get_full_resid_decomposition(pos_slice=-1, apply_ln=True)
        assert relative(at.sum(0), read_by(cache, 4, False)[-1]) < FP32_PARITY
    one_row = MODELS[config].run_with_cache(TOKENS[1:])[1]
    assert (
        relative(one_row.logit_attrs(stack, TOKENS[1], has_batch_dim=False), wanted) < FP32_PARITY
    )


@pytest.mark.parametrize("config", ["griffin", "jamba"])
def test_a_cache_of_some_positions(config):
    _, cache = MODELS[config].run_with_cache(TOKENS, pos_slice=-1)
    stack = cache.get_full_resid_decomposition()
    whole = cache_of(config).get_full_resid_decomposition(pos_slice=-1)
    assert stack.shape[1:] == (2, 1, 24) and relative(stack[:, :, 0], whole) < FP32_PARITY
    attrs = cache.logit_attrs(stack, [5, 6])
    assert relative(attrs[:, 1].sum(0), cache["logits"][1, :, 6]) < FP32_PARITY
    assert relative(cache.get_full_resid_decomposition(pos_slice=0), whole) < FP32_PARITY
    _, two = MODELS[config].run_with_cache(TOKENS, pos_slice=[3, -1])
    assert relative(two.get_full_resid_decomposition(pos_slice=-1), whole) < FP32_PARITY


@pytest.mark.parametrize("config", ["griffin", "jamba"])
def test_a_cache_of_a_generation(config):
    """Prompt and steps together; a row that ended reads nothing more, and has attributions of 0."""
    model = MODELS[config]
    first = model.generate(TOKENS, 6, stop_at_eos=False, return_type="output", verbose=False)
    ends = int(first.new_tokens[0, 1])
    out = model.generate(
        TOKENS, 6, eos_token_id=ends, names_filter=True, return_type="output", verbose=False
    )
    n_read = N_POS + int((out.new_tokens[0] == ends).int().argmax())
    cache, stack = out.cache, out.cache.get_full_resid_decomposition()
    read = out.tokens[:, :-1]
    assert not bool(out.finished[1]) and n_read < read.shape[1]
    assert relative(stack.sum(0)[1], cache["resid_post", -1][1]) < FP32_PARITY
    attrs = cache.logit_attrs(stack, 7, through_soft_cap="share")
    assert bool(attrs.isfinite().all()) and not attrs[:, 0, n_read:].any()
    _, whole = model.run_with_cache(read)
    wanted = whole.logit_attrs(whole.get_full_resid_decomposition(), 7, through_soft_cap="share")
    assert relative(attrs[:, 1], wanted[:, 1]) < FP32_PARITY
    assert relative(attrs[:, 0, :n_read], wanted[:, 0, :n_read]) < FP32_PARITY
    names = ["hook_embed", "hook_mixer_out", "hook_mlp_out", "hook_scale"]
    few = model.generate(
        TOKENS,
        3,
        names_filter=lambda n: n.endswith(tuple(names)),
        return_type="output",
        verbose=False,
    )
    parts = few.cache.decompose_resid(apply_ln=True)
    assert relative(parts.sum(0)[:, :N_POS], read_by(cache, 4, False)[:, :N_POS]) < FP32_PARITY


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_cache_of_a_padded_generation(side):
    model = MODELS["griffin"]
    mask = torch.ones_like(TOKENS)
    mask[0, slice(None, 2) if side == "left" else slice(-2, None)] = 0
    out = model.generate(
        TOKENS,
        4,
        attention_mask=mask,
        stop_at_eos=False,
        names_filter=True,
        return_type="output",
        verbose=False,
    )
    cache = out.cache
    attrs = cache.logit_attrs(cache.get_full_resid_decomposition(), 7)
    assert relative(attrs.sum(0), cache["logits"][..., 7]) < FP32_PARITY


# --- other stacks ---------------------------------------------------------------------------------


def test_stack_activation_takes_the_layers_that_have_it():
    cache = cache_of("jamba")
    stack, names = cache.stack_activation("ssm_y", return_labels=True)
    assert names == [f"blocks.{i}.mixer.hook_ssm_y" for i in (0, 1, 3)]
    assert torch.equal(stack[2], cache["ssm_y", 3])
    assert torch.equal(cache.stack_activation("scale", 2, "ln2")[1], cache["scale", 1, "ln2"])
    with pytest.raises(ValueError, match="no layer before 2 has 'pattern'"):
        cache.stack_activation("pattern", 2)


# --- too little in the cache, and other errors ----------------------------------------------------

METHODS = {
    "accumulated_resid": {"incl_mid": True},
    "decompose_resid": {"apply_ln": True},
    "compute_head_results": {},
    "stack_head_results": {"recurrent": "block", "incl_remainder": True},
    "stack_expert_results": {"incl_remainder": True},
    "get_neuron_results": {"layer": 0},
    "stack_neuron_results": {"layer": None, "incl_remainder": True, "apply_ln": True},
    "stack_activation": {"activation_name": "resid_post"},
    "get_full_resid_decomposition": {"apply_ln": True},
}


@every_config
@pytest.mark.parametrize("method", METHODS)
def test_the_error_of_a_cache_with_too_few_values_names_a_sufficient_filter(config, method):
    model = MODELS[config]
    _, little = model.run_with_cache(TOKENS, names_filter="unembed.hook_logits")
    with pytest.raises(
        HookNameError, match=f"{method} needs 'blocks|{method} needs 'hook"
    ) as error:
        getattr(little, method)(**METHODS[method])
    advised = re.search(r"names_filter=(lambda name: .*\)$)", str(error.value))
    assert advised is not None
    _, enough = model.run_with_cache(TOKENS, names_filter=eval(advised[1]))
    got = getattr(enough, method)(**METHODS[method])
    if method == "compute_head_results":
        got = enough["result", model.cfg.attention_layers[0]]
    assert len(enough) < len(cache_of(config)) and bool(got.isfinite().all())


def test_attributions_say_which_scale_they_need():
    cache = ActivationCache({"hook_embed": torch.zeros(1, 2, 24)}, MODELS["griffin"])
    stack = torch.zeros(3, 1, 2, 24)
    with pytest.raises(HookNameError, match=r"'ln_final.hook_scale', which .*'hook_scale'"):
        cache.logit_attrs(stack, 5)
    with pytest.raises(HookNameError, match=r"'blocks.1.ln2.hook_scale'"):
        cache.apply_ln_to_stack(stack, 1, mlp_input=True)


def test_errors_name_the_value_and_the_remedy():
    cache = cache_of("griffin")
    stack = cache.decompose_resid()
    for message, call in {
        "layer=9: give 0 to 4": lambda: cache.decompose_resid(9),
        "layer=-2: give 0 to 4": lambda: cache.stack_head_results(-2),
        "layer=0 to 3": lambda: cache.decompose_resid(mlp_input=True),
        "there are 4 layers": lambda: cache.get_neuron_results(4),
        "no such part before layer 2": lambda: cache.stack_head_results(2),
        "has a mixture": lambda: cache_of("jamba").get_neuron_results(1),
        r"shape \(3,\); give one of shape \(\) or \(2,\) or \(2, 11\)": lambda: cache.logit_attrs(
            stack, [1, 2, 3]
        ),
        "ids from 61 to 61: the vocabulary has 61": lambda: cache.logit_attrs(stack, 61),
        "give the pos_slice": lambda: cache.logit_attrs(stack[:, :, :2], 5),
        "no batch axis any more": lambda: cache.apply_slice_to_batch_dim(0).logit_attrs(
            stack[:, 0], 5, batch_slice=0
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_bad_choices(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    cache = cache_of("griffin")
    for message, call in {
        "mode='heads': give": lambda: cache.decompose_resid(mode="heads"),
        "dtype torch.float32": lambda: cache.logit_attrs(cache.decompose_resid(), torch.ones(2)),
        "recurrent='all': give": lambda: cache.stack_head_results(recurrent="all"),
        "recurrent='none': give": lambda: cache.get_full_resid_decomposition(recurrent="none"),
        "through_soft_cap=True: give": lambda: cache.logit_attrs(
            cache.decompose_resid(), 5, through_soft_cap=True
        ),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()


def test_a_stack_that_would_not_fit_is_refused(monkeypatch):
    monkeypatch.setattr(residual_reading, "WORTH_CHECKING", 1)
    monkeypatch.setattr(residual_reading, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match=r"a stack of 80 parts of shape .* give pos_slice"):
        cache_of("griffin").stack_neuron_results(None)


def test_every_kind_of_layer_has_a_label_and_parts():
    assert [mixer.label for mixer in MIXERS.values()][:3] == ["attn", "rglru", "mamba"]
    assert [mlp.label for mlp in MLPS.values()][:2] == ["mlp", "moe"]
    known = [*MIXERS.values(), *MLPS.values()]
    letters = {part.kind: part.part_letter for part in known}
    wanted = {"attention": "H", "rglru": "B", "mamba": None, "mlp": "N", "moe": "E"}
    assert {kind: letters[kind] for kind in wanted} == wanted


# --- edits of what layers wrote -------------------------------------------------------------------


@every_config
def test_the_finest_parts_sum_to_the_stream_of_a_run_whose_writes_were_edited(config):
    model = MODELS[config]
    halve = lambda x, hook: 0.5 * x + 0.1  # noqa: E731
    points = ("hook_mixer_out", "hook_attn_out", "hook_mlp_out", "hook_result", "hook_expert_out")
    with model.hooks(fwd_hooks=[(lambda name: name.endswith(points), halve)]):
        _, cache = model.run_with_cache(TOKENS)
    for options in ({}, {"apply_ln": True}, {"recurrent": "layer"}, {"pos_slice": -1}):
        stack = cache.get_full_resid_decomposition(**options)
        whole = (read_by if "apply_ln" in options else stream)(cache, model.cfg.n_layers, False)
        whole = whole[:, -1] if "pos_slice" in options else whole
        assert relative(stack.sum(0), whole) < FP32_PARITY, options
    attributions = cache.logit_attrs(cache.get_full_resid_decomposition(), TOKENS)
    before_cap = cache["unembed.hook_logits"].gather(-1, TOKENS[..., None])[..., 0]
    assert relative(attributions.sum(0), before_cap) < FP32_PARITY
