"""What an edit does downstream, against a computation that does not use that hook."""

from __future__ import annotations

import dataclasses
from functools import cache

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.network.block_state import RecurrentState
from hooked_hybrid.network.state import HybridState
from tests.models import CONFIGS, griffin_config, random_model, random_tokens, relative, tiny_model
from tests.tolerances import FLOAT64_LONG, FP32_PARITY

models = pytest.mark.parametrize("name", list(CONFIGS))


model_of = cache(tiny_model)


@models
def test_the_residual_identity_holds_bit_for_bit_in_every_block(name: str):
    model = model_of(name)
    for dtype in (torch.float32, torch.bfloat16):
        _, kept = tiny_model(name, dtype=dtype).run_with_cache(random_tokens())
        for i in range(model.cfg.n_layers):
            mid = kept["resid_pre", i] + kept["mixer_out", i]
            assert torch.equal(kept["resid_mid", i], mid)
            assert torch.equal(kept["resid_post", i], mid + kept["mlp_out", i])


@models
def test_the_residual_identity_holds_under_edits_too(name: str):
    """Reading and writing the copies that norms read leaves the stream itself alone."""

    def in_place(x: Tensor, hook: HookPoint) -> None:
        x.mul_(0.5)

    model = model_of(name)
    where = lambda n: n.endswith(("hook_mixer_in", "hook_mlp_in", "hook_mixer_out", "hook_mlp_out"))  # noqa: E731
    with model.hooks([(where, in_place)]):
        _, kept = model.run_with_cache(random_tokens())
    for i in range(model.cfg.n_layers):
        assert torch.equal(kept["mixer_in", i], 0.5 * kept["resid_pre", i])
        mid = kept["resid_pre", i] + kept["mixer_out", i]
        assert torch.equal(kept["resid_post", i], mid + kept["mlp_out", i])


@models
def test_zeroing_mixer_out_equals_removing_the_mixer(name: str):
    model, tokens = model_of(name), random_tokens()
    for i in range(model.cfg.n_layers):
        removed = tiny_model(name)
        for leaf, parameter in removed.blocks[i].mixers[0].named_parameters():
            if leaf.startswith(("o.", "linear_out.", "out_proj.")):
                parameter.zero_()
        zero = [(f"blocks.{i}.hook_mixer_out", lambda x, hook: torch.zeros_like(x))]
        assert relative(model.run_with_hooks(tokens, fwd_hooks=zero), removed(tokens)) < FP32_PARITY


@models
def test_an_edit_of_scores_equals_the_pattern_that_softmax_makes_of_it(name: str):
    model, tokens = model_of(name), random_tokens()
    layer = model.cfg.attention_layers[0]
    scores_at, pattern_at = (f"blocks.{layer}.attn.hook_{n}" for n in ("attn_scores", "pattern"))
    _, plain = model.run_with_cache(tokens, names_filter=[scores_at, pattern_at])
    noise = torch.randn(plain[scores_at].shape, generator=torch.Generator().manual_seed(0))
    visible = plain[pattern_at] > 0
    edited = (plain[scores_at] + noise).masked_fill(~visible, -torch.inf).softmax(-1)

    by_scores = [(scores_at, lambda s, hook: s + noise)]
    by_pattern = [(pattern_at, lambda p, hook: edited)]
    a, b = (model.run_with_hooks(tokens, fwd_hooks=h) for h in (by_scores, by_pattern))
    assert relative(a, b) < FP32_PARITY
    assert relative(a, model(tokens)) > 1e-3


@models
def test_no_edit_of_scores_or_pattern_lets_a_token_see_what_it_may_not(name: str):
    model, tokens = model_of(name), random_tokens()
    layer = model.cfg.attention_layers[0]
    _, plain = model.run_with_cache(tokens)
    hidden = plain["pattern", layer] == 0
    for leaf in ("attn_scores", "pattern"):
        point = f"blocks.{layer}.attn.hook_{leaf}"
        with model.hooks([(point, lambda x, hook: torch.full_like(x, 3.0))]):
            _, kept = model.run_with_cache(tokens)
        assert bool((kept["pattern", layer][hidden] == 0).all())
        later = tokens.clone()
        later[:, -1] = 5
        with model.hooks([(point, lambda x, hook: torch.full_like(x, 3.0))]):
            assert torch.equal(model(later)[:, :-1], model(tokens)[:, :-1])


@models
@pytest.mark.parametrize("lowest", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_row_whose_scores_are_all_knocked_out_attends_to_nothing(name: str, lowest: float):
    model, tokens = model_of(name), random_tokens()
    layer = model.cfg.attention_layers[0]

    def knock_out(scores: Tensor, hook: HookPoint) -> Tensor:
        scores = scores.clone()
        scores[:, 1, 4] = lowest
        return scores

    with model.hooks([(f"blocks.{layer}.attn.hook_attn_scores", knock_out)]):
        out, kept = model.run_with_cache(tokens)
    assert bool((kept["pattern", layer][:, 1, 4] == 0).all())
    assert bool((kept["z", layer][:, 4, 1] == 0).all())
    assert bool(torch.isfinite(out).all())


def recurrent_layer(model: HookedHybrid) -> int:
    return model.cfg.recurrent_layers[0]


def ssm_of(state: HybridState, layer: int) -> Tensor:
    block = state.blocks[layer]
    assert isinstance(block, RecurrentState)
    return block.ssm


@models
@pytest.mark.parametrize("t", [0, 7, 19])
def test_a_state_edit_equals_rerunning_from_the_edited_state(name: str, t: int):
    model, tokens = model_of(name), random_tokens()
    layer = recurrent_layer(model)
    point = f"blocks.{layer}.mixer.hook_ssm_state"
    new = torch.randn(ssm_of(model(tokens, return_state=True)[1], layer).shape)

    def overwrite(h: Tensor, hook: HookPoint) -> Tensor:
        return new[:, None]

    edited, end = model.run_with_hooks(
        tokens, fwd_hooks=[(point, interventions.hook_at(overwrite, t))], return_state=True
    )
    # Only later positions can be compared: at t itself the edit acts within the forward.
    _, before = model(tokens[:, : t + 1], return_state=True)
    blocks = list(before.blocks)
    blocks[layer] = dataclasses.replace(before.blocks[layer], ssm=new)
    edited_at_t, state_at_t = model.run_with_hooks(
        tokens[:, : t + 1],
        fwd_hooks=[(point, interventions.hook_at(overwrite, t))],
        return_state=True,
    )
    assert torch.equal(ssm_of(state_at_t, layer), new)
    assert relative(edited[:, : t + 1], edited_at_t) < FP32_PARITY
    if t + 1 < tokens.shape[1]:
        after, end_of_rerun = model(tokens[:, t + 1 :], state=state_at_t, return_state=True)
        assert relative(edited[:, t + 1 :], after) < FP32_PARITY
        assert relative(ssm_of(end, layer), ssm_of(end_of_rerun, layer)) < FP32_PARITY
    assert relative(edited, model(tokens)) > 1e-3


def test_a_state_edit_in_the_only_layer_equals_rerunning_from_a_replaced_state():
    """With one recurrent layer, the state alone carries the edit to later positions."""
    model, tokens = random_model(griffin_config("R")), random_tokens()
    t, point = 7, "blocks.0.mixer.hook_ssm_state"
    _, before = model(tokens[:, : t + 1], return_state=True)
    new = torch.randn(ssm_of(before, 0).shape)
    replaced = dataclasses.replace(before, blocks=(dataclasses.replace(before.blocks[0], ssm=new),))
    rerun = model(tokens[:, t + 1 :], state=replaced)
    hook = interventions.hook_at(lambda h, hook: new[:, None], t)
    edited = model.run_with_hooks(tokens, fwd_hooks=[(point, hook)])
    assert relative(edited[:, t + 1 :], rerun) < FP32_PARITY


@models
def test_a_state_hook_at_a_position_equals_one_that_fires_everywhere_and_acts_there(name: str):
    model, tokens = model_of(name), random_tokens()
    point = f"blocks.{recurrent_layer(model)}.mixer.hook_ssm_state"

    def act(h: Tensor, hook: HookPoint) -> Tensor:
        return h * 2 - 1

    def act_at_5(h: Tensor, hook: HookPoint) -> Tensor | None:
        return act(h, hook) if int(hook.run.query_pos[0, 0]) == 5 else None

    everywhere = model.run_with_hooks(tokens, fwd_hooks=[(point, act_at_5)])
    split = model.run_with_hooks(tokens, fwd_hooks=[(point, interventions.hook_at(act, 5))])
    assert relative(split, everywhere) < FP32_PARITY
    assert relative(split, model(tokens)) > 1e-4


@models
def test_hook_at_meets_padded_rows_at_their_own_positions(name: str):
    model = model_of(name)
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    for leaf in ("hook_resid_post", "mixer.hook_ssm_state"):
        point = f"blocks.{recurrent_layer(model)}.{leaf}"
        hooks = [(point, interventions.hook_at(lambda x, hook: x + 1, [2, 4]))]
        out = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
        alone = model.run_with_hooks(tokens[1:, 5:], fwd_hooks=hooks)
        assert relative(out[1, 5:], alone[0]) < FP32_PARITY


@models
def test_a_state_edit_at_padding_is_undone(name: str):
    model = model_of(name)
    tokens = random_tokens(2, 12)
    mask = torch.ones_like(tokens)
    mask[1, 9:] = 0
    point = f"blocks.{recurrent_layer(model)}.mixer.hook_ssm_state"

    def only_at_padding(h: Tensor, hook: HookPoint) -> Tensor:
        is_padding = (hook.run.query_pos < 0).view(2, 1, *(1,) * (h.ndim - 2))
        return torch.where(is_padding, h + 7, h)

    out, state = model.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=[(point, only_at_padding)], return_state=True
    )
    plain, end = model(tokens, attention_mask=mask, return_state=True)
    assert relative(out[mask.bool()], plain[mask.bool()]) < FP32_PARITY
    layer = recurrent_layer(model)
    assert relative(ssm_of(state, layer), ssm_of(end, layer)) < FP32_PARITY


def test_log_decay_moves_decay_and_write_alike():
    model, tokens = model_of("griffin"), random_tokens()
    point = "blocks.0.mixer.hook_log_decay"
    freeze = interventions.hook_at(lambda x, hook: torch.zeros_like(x), range(5, 20))
    with model.hooks([(point, freeze)]):
        _, kept = model.run_with_cache(tokens)
    h = kept["ssm_state", 0]
    assert torch.equal(h[:, 5:], h[:, 4:5].expand_as(h[:, 5:]))
    assert bool((kept["ssm_write", 0][:, 5:] == 0).all())

    clear = interventions.hook_at(lambda x, hook: torch.full_like(x, -torch.inf), [8])
    with model.hooks([(point, clear)]):
        _, kept = model.run_with_cache(tokens)
    assert torch.equal(kept["ssm_state", 0][:, 8], kept["ssm_write", 0][:, 8])
    with pytest.raises(ValueError, match="0 \\(keep everything\\) or less"):
        model.run_with_hooks(tokens, fwd_hooks=[(point, lambda x, hook: -x)])


def test_log_decay_is_before_the_reset_of_a_document():
    model, tokens = model_of("griffin"), random_tokens()
    keep_all = interventions.hook_at(lambda x, hook: torch.zeros_like(x), [0])
    ids = torch.tensor([[1] * 8 + [2] * 12] * 2)
    with model.hooks([("blocks.0.mixer.hook_log_decay", keep_all)]):
        _, edited = model.run_with_cache(tokens, segment_ids=ids)
    _, plain = model.run_with_cache(tokens, segment_ids=ids)
    assert torch.equal(edited["ssm_state", 0][:, 8], plain["ssm_state", 0][:, 8])


@models
def test_head_results_sum_to_what_the_mixer_writes(name: str):
    model, tokens = model_of(name), random_tokens()
    layer = model.cfg.attention_layers[0]
    at = f"blocks.{layer}.attn.hook_result"
    _, kept = model.run_with_cache(tokens, names_filter=[at, f"blocks.{layer}.hook_mixer_out"])
    b_O = model.blocks[layer].attn.b_O
    written = kept[at].sum(2) if b_O is None else kept[at].sum(2) + b_O
    assert relative(written, kept["mixer_out", layer]) < FP32_PARITY


@models
def test_an_edit_of_one_heads_query_input_reaches_that_head_alone(name: str):
    model, tokens = model_of(name), random_tokens()
    layer = model.cfg.attention_layers[0]
    kinds = {"q": "q", "k": "k", "v": "v"}
    for leaf in kinds:
        at = f"blocks.{layer}.attn.hook_{leaf}_input"

        def edit(x: Tensor, hook: HookPoint) -> Tensor:
            x = x.clone()
            x[:, :, 0] += 1
            return x

        _, plain = model.run_with_cache(tokens)
        with model.hooks([(at, edit)]):
            _, kept = model.run_with_cache(tokens)
        assert relative(kept[leaf, layer][:, :, 0], plain[leaf, layer][:, :, 0]) > 1e-2
        if kept[leaf, layer].shape[2] > 1:
            rest = kept[leaf, layer][:, :, 1:], plain[leaf, layer][:, :, 1:]
            assert relative(*rest) < FP32_PARITY


def test_edited_keys_values_and_convolution_inputs_are_what_the_state_keeps():
    model, tokens = model_of("griffin"), random_tokens(2, 5)
    points = ["blocks.2.attn.hook_rot_k", "blocks.2.attn.hook_v", "blocks.0.mixer.hook_in_proj"]
    with model.hooks([(points, lambda x, hook: torch.full_like(x, 4.0))]):
        _, state = model(tokens, return_state=True)
    attention, recurrent = state.blocks[2], state.blocks[0]
    assert bool(
        (attention.k == 4).all() and (attention.v == 4).all() and (recurrent.conv == 4).all()
    )


def test_the_gradient_of_a_state_hook_is_total():
    """Through the loop and through the fast scan alike, with an edit elsewhere or without."""
    model, tokens = tiny_model("griffin", dtype=torch.float64), random_tokens(2, 70)
    point = "blocks.0.mixer.hook_ssm_state"
    _, fast = model.run_with_cache(tokens, names_filter=point, incl_bwd=True)
    with model.hooks([(point, lambda h, hook: h)]):
        _, loop = model.run_with_cache(tokens, names_filter=point, incl_bwd=True)
    grad, slow = fast[point + "_grad"], loop[point + "_grad"]
    assert relative(grad, slow) < FLOAT64_LONG
    with model.hooks([(point, interventions.hook_at(lambda h, hook: 3 * h, 30))]):
        _, edited = model.run_with_cache(tokens, names_filter=point, incl_bwd=True)
    assert relative(edited[point][:, 30], 3 * fast[point][:, 30]) < FLOAT64_LONG
    assert relative(edited[point + "_grad"], slow) > 1e-3


EXPERTS = "blocks.1.mlp"


def test_expert_outputs_sum_to_what_the_mixture_writes():
    model, tokens = model_of("jamba"), random_tokens()
    at = f"{EXPERTS}.hook_expert_out"
    _, kept = model.run_with_cache(tokens, names_filter=[at, "blocks.1.hook_mlp_out"])
    assert relative(kept[at].sum(2), kept["mlp_out", 1]) < FP32_PARITY


def test_expert_weights_are_shares_of_a_softmax_over_all_experts_not_renormalised():
    model, tokens = model_of("jamba"), random_tokens()
    _, kept = model.run_with_cache(tokens)
    shares = kept["router_logits", 1].softmax(-1)
    chosen = shares.gather(-1, kept["expert_indices", 1])
    assert relative(kept["expert_weights", 1], chosen) < FP32_PARITY
    assert bool((chosen.sum(-1) < 1).all()) and torch.equal(chosen, shares.topk(2).values)


def test_editing_the_chosen_experts_runs_the_others():
    model, tokens = model_of("jamba"), random_tokens()
    at = f"{EXPERTS}.hook_expert_indices"
    with model.hooks([(at, lambda i, hook: (i + 1) % 4)]):
        _, kept = model.run_with_cache(tokens)
    mlp, x = model.blocks[1].mlp, kept["mlp_in", 1]
    x = x / kept["scale", 1, "ln2"] * model.blocks[1].ln2.w
    wanted = torch.zeros_like(x)
    for expert in range(4):
        post = torch.nn.functional.silu(x @ mlp.W_gate[expert]) * (x @ mlp.W_in[expert])
        weight = kept["expert_weights", 1] * (kept["expert_indices", 1] == expert)
        wanted += weight.sum(-1, keepdim=True) * (post @ mlp.W_out[expert])
    assert relative(kept["mlp_out", 1], wanted) < FP32_PARITY
    for outside in (-1, 4, 9):
        said = f"chose experts {outside} to {outside}; there are 4, from 0"
        with pytest.raises(ValueError, match=said):
            model.run_with_hooks(tokens, fwd_hooks=[(at, lambda i, hook: i * 0 + outside)])  # noqa: B023
