"""Every name in `hook_dict`: fires with its shape, can be edited and differentiated."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, HookedHybrid, HookPoint, HybridState
from tests.loops import looped
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FINITE_DIFFERENCE, FP32_PARITY

PROMPT = 12
NEW = 3

STATELESS_LEAVES = set(
    """
    hook_gate hook_ssm_y hook_gated hook_q hook_rot_q hook_q_input hook_attn_scores hook_pattern
    hook_z hook_result hook_mixer_out hook_attn_out hook_resid_mid hook_mlp_in hook_mlp_out
    hook_ssm_C hook_router_logits hook_expert_weights hook_expert_post hook_expert_out
    hook_resid_post hook_pre hook_act hook_pre_linear hook_post
    """.split()
)
"""What, in the last layer, lies after everything that the state keeps."""


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    return tiny_model(name, dtype=dtype)


@cache
def logits_of(name: str) -> Tensor:
    """Return what the model answers without a hook."""
    return model_of(name)(random_tokens())


def every_hook(name: str) -> list[str]:
    return list(model_of(name).hook_dict)


def floating(name: str) -> list[str]:
    return [hook for hook, point in model_of(name).hook_dict.items() if not point.is_integer]


def documented_shape(model: HookedHybrid, hook: HookPoint, n_pos: int, n_keys: int) -> tuple:
    """Return the shape that the point's axes promise."""
    sizes: dict[str, int] = {"batch": 2, "pos": n_pos, "query": n_pos, "key": n_keys, "1": 1}
    sizes |= {"d_model": model.cfg.d_model, "d_vocab": model.cfg.d_vocab}
    if str(hook.name).startswith("blocks."):
        layer = model.cfg.layers[hook.layer()]
        for part in (layer.mixer, layer.mlp):
            sizes |= {k: v for k, v in vars(part).items() if isinstance(v, int)}
        sizes["head"], sizes["kv_head"] = sizes.get("n_heads", 0), sizes.get("n_kv_heads", 0)
    return tuple(sizes[axis] for axis in hook.axes)


def nudged(value: Tensor, hook: HookPoint) -> Tensor:
    """Return a legal, clearly different value of the same kind."""
    if str(hook.name).endswith("hook_log_decay"):
        return 2 * value - 0.05
    halved = ("hook_pattern", "hook_scale", "hook_rec_gate", "hook_ssm_dt", "hook_ssm_decay")
    if str(hook.name).endswith(halved):
        return 0.5 * value
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn(value.shape[1:], generator=generator, dtype=value.dtype)
    return value + 0.5 * noise


def changes_later_tokens(model: HookedHybrid, hook: HookPoint) -> bool:
    """Whether an edit here reaches the state of some layer."""
    name = str(hook.name)
    if not name.startswith("blocks."):
        return name == "hook_embed"
    is_last = hook.layer() == model.cfg.n_layers - 1
    return not is_last or not (name.split(".")[-1] in STATELESS_LEAVES or ".ln2." in name)


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", every_hook)
def test_hook_fires_with_its_documented_shape_in_every_stage(name: str, hook_name: str):
    model = model_of(name)
    seen: list[tuple[str, int, tuple[int, ...]]] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append((hook.run.stage, hook.run.step, tuple(value.shape)))
        assert hook.run.query_pos.shape[1] == value.shape[hook.pos_dim]
        if "key" in hook.axes:
            assert hook.run.key_pos is not None and hook.run.key_pos.shape[1] == value.shape[-1]

    tokens, hooks = random_tokens(n_pos=PROMPT), [(hook_name, look)]
    point = model.hook_dict[hook_name]
    is_state, is_logits = hook_name.endswith("ssm_state"), hook_name == "unembed.hook_logits"

    model.run_with_hooks(tokens, fwd_hooks=hooks)
    once = [(1, PROMPT)] * PROMPT if is_state else [(PROMPT, PROMPT)]
    assert seen == [
        ("forward", 0, documented_shape(model, point, n_pos, n_keys)) for n_pos, n_keys in once
    ]
    seen.clear()
    model.generate(tokens, NEW, fwd_hooks=hooks, stop_at_eos=False, verbose=False)
    window = getattr(model.cfg.layers[model.cfg.attention_layers[0]].mixer, "n_keys", None)
    expected = [("prefill", 0, n_pos, n_keys) for n_pos, n_keys in once]
    for step in range(1, NEW):
        expected.append(("generation", step, 1, min(PROMPT + step, window or PROMPT + step)))
    if is_logits:
        expected[0] = ("prefill", 0, PROMPT, PROMPT)
    assert seen == [
        (stage, step, documented_shape(model, point, n_pos, n_keys))
        for stage, step, n_pos, n_keys in expected
    ]


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", every_hook)
def test_returning_the_input_changes_no_bit_and_watching_moves_no_more_than_rounding(
    name: str, hook_name: str
):
    model, tokens = model_of(name), random_tokens()
    watched = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda value, hook: None)])
    returned = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, lambda value, hook: value)])
    assert torch.equal(watched, returned)
    assert relative(watched, logits_of(name)) < FP32_PARITY


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", every_hook)
def test_caching_alone_moves_no_more_than_rounding(name: str, hook_name: str):
    model, tokens = model_of(name), random_tokens()
    out, cached = model.run_with_cache(tokens, names_filter=hook_name)
    assert relative(out, logits_of(name)) < FP32_PARITY
    n_pos = tokens.shape[1]
    point = model.hook_dict[hook_name]
    assert tuple(cached[hook_name].shape) == documented_shape(model, point, n_pos, n_pos)


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", floating)
def test_an_edit_changes_the_logits_of_its_forward(name: str, hook_name: str):
    model, tokens = model_of(name), random_tokens()
    edited = model.run_with_hooks(tokens, fwd_hooks=[(hook_name, nudged)])
    assert torch.isfinite(edited).all()
    assert relative(edited, logits_of(name)) > 1e-3


@cache
def prefilled(name: str) -> HybridState:
    """Return the state after the prompt."""
    tokens = random_tokens(n_pos=PROMPT + NEW)[:, :PROMPT]
    return model_of(name)(tokens, return_state=True, stage="prefill")[1]


def decode(name: str, first_hooks: list[tuple[str, Any]]) -> list[Tensor]:
    """Return the logits of each step after the prompt, the first one with these hooks."""
    tokens, logits, state = random_tokens(n_pos=PROMPT + NEW), [], prefilled(name)
    for step in range(1, NEW + 1):
        out, state = model_of(name).run_with_hooks(
            tokens[:, PROMPT + step - 1 : PROMPT + step],
            fwd_hooks=first_hooks if step == 1 else [],
            state=state,
            return_state=True,
            stage="generation",
            step=step,
        )
        logits.append(out)
    return logits


@cache
def plain_steps(name: str) -> list[Tensor]:
    return decode(name, [])


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", floating)
def test_an_edit_in_one_generation_step_changes_later_tokens_where_it_should(
    name: str, hook_name: str
):
    model = model_of(name)
    plain, edited = plain_steps(name), decode(name, [(hook_name, nudged)])
    assert relative(edited[0], plain[0]) > 1e-4
    later = max(relative(e, p) for e, p in zip(edited[1:], plain[1:], strict=True))
    if changes_later_tokens(model, model.hook_dict[hook_name]):
        assert later > 1e-5
    else:
        assert later == 0


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", floating)
def test_gradient_agrees_with_a_finite_difference(name: str, hook_name: str):
    model, tokens = model_of(name, torch.float64), random_tokens(n_pos=9)
    generator = torch.Generator().manual_seed(3)
    weights = torch.randn(2, 9, model.cfg.d_vocab, generator=generator, dtype=torch.float64)

    def metric(logits: Tensor) -> Tensor:
        return (logits * weights).sum()

    _, cached = model.run_with_cache(tokens, names_filter=hook_name, incl_bwd=True, metric=metric)
    value, gradient = cached[hook_name], cached[hook_name + "_grad"]
    direction = torch.randn(value.shape, generator=generator, dtype=torch.float64)
    direction = direction * value.abs().clamp_max(1)  # a log decay stays below zero
    if hook_name.endswith("hook_attn_scores"):
        direction = direction.masked_fill(value < -1e30, 0)

    eps = 1e-6
    both = torch.cat([eps * direction, -eps * direction])  # two rows each way, in one forward

    def move(x: Tensor, hook: HookPoint) -> Tensor:
        if not hook_name.endswith("ssm_state"):
            return x + both
        t = int(hook.run.query_pos[0, 0])
        return x + both[:, t : t + 1]

    moved = model.run_with_hooks(tokens.repeat(2, 1), fwd_hooks=[(hook_name, move)])
    difference = float(metric(moved[:2]) - metric(moved[2:])) / (2 * eps)
    predicted = float((gradient * direction).sum())
    scale = max(abs(difference), float((gradient * direction).abs().sum()) * 1e-2)
    assert abs(predicted) > 0
    assert abs(predicted - difference) < FINITE_DIFFERENCE * scale


@cache
def gradients_of(name: str) -> ActivationCache:
    """Return the gradients of every point, cached in one run; the test above caches each alone."""
    tokens = random_tokens(n_pos=9)
    return model_of(name).run_with_cache(tokens, names_filter=lambda _: True, incl_bwd=True)[1]


@pytest.mark.parametrize("name", CONFIGS)
@looped("hook_name", floating)
def test_a_backward_hook_is_given_the_gradient_that_is_cached(name: str, hook_name: str):
    model, tokens = model_of(name), random_tokens(n_pos=9)
    pieces: list[Tensor] = []
    with model.hooks(bwd_hooks=[(hook_name, lambda grad, hook: pieces.append(grad.clone()))]):
        model(tokens, return_type="loss").backward()
    whole = torch.cat(pieces[::-1], dim=1) if hook_name.endswith("ssm_state") else pieces[0]
    assert relative(whole, gradients_of(name)[hook_name + "_grad"]) < FP32_PARITY


def test_cache_keeps_every_point_but_the_large_ones():
    for name in CONFIGS:
        model: Any = model_of(name)
        _, cached = model.run_with_cache(random_tokens())
        small = {n for n, point in model.hook_dict.items() if not point.is_large}
        assert set(cached) == small
