"""Under torch.autocast a model runs everywhere, its recurrences in fp32, and states go on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.scans.loops import selective_scan_loop
from tests.models import random_tokens, relative, tiny_model
from tests.tolerances import BF16, FP32_PARITY

NARROW = {torch.bfloat16: BF16, torch.float16: BF16 / 4}
"""fp16 has 10 bits of mantissa where bf16 has 7. Measured: 0.013 and 0.001."""
DENSE = ["griffin", "jamba-dense-ends-in-attention"]
MIXTURE = "jamba"
"""A router's choice in 16 bits may be another expert's, so its logits have no bound; where the
choice is held they have, twice that of one MLP. Measured: 0.040 in bf16, 0.005 in fp16."""

dtypes = pytest.mark.parametrize("dtype", list(NARROW), ids=str)
grads = pytest.mark.parametrize("grad", [False, True])


def bound(name: str, dtype: torch.dtype) -> float:
    """Return how far logits may be from those of fp32, relative to the largest."""
    return NARROW[dtype] * (2 if name == MIXTURE else 1)


def held_choice(model: Any, tokens: Tensor) -> list[tuple[str, Callable[..., Any]]]:
    """Return hooks that route tokens as the model in fp32 does."""
    _, cache = model.run_with_cache(
        tokens, names_filter=lambda n: n.endswith(("expert_indices", "expert_weights"))
    )
    kept = {name: value.clone() for name, value in cache.items()}
    return [(list(kept), lambda value, hook: kept[hook.name].to(value.dtype))]


@dtypes
@grads
@pytest.mark.parametrize("name", [*DENSE, MIXTURE])
def test_forward_hooks_and_caches_are_near_those_of_fp32(name: str, dtype: Any, grad: bool):
    model, tokens = tiny_model(name), random_tokens(2, 12)
    hooks = held_choice(model, tokens) if name == MIXTURE else []
    wanted, caches = model(tokens), []
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype), model.hooks(hooks):
        plain = model(tokens)
        watched, cache = model.run_with_cache(tokens, names_filter=lambda n: True)
        edited = model.run_with_hooks(
            tokens, fwd_hooks=[(lambda n: not n.endswith("indices"), lambda x, hook: x.clone())]
        )
        caches.append(cache)
    for logits in (plain, watched, edited):
        assert logits.dtype == dtype
        assert relative(logits.float(), wanted) < bound(name, dtype)
    states = {n: v.dtype for n, v in cache.items() if n.endswith("ssm_state")}
    assert set(states.values()) == {torch.float32}


@dtypes
@grads
@pytest.mark.parametrize("name", [*DENSE, MIXTURE])
def test_a_state_continues_under_autocast_wherever_it_was_made(name: str, dtype: Any, grad: bool):
    model, tokens = tiny_model(name), random_tokens(2, 12)
    hooks = held_choice(model, tokens) if name == MIXTURE else []
    if hooks:  # of all positions: a part is routed by its own
        kept = hooks[0][1]
        hooks = [(hooks[0][0], lambda v, hook: kept(v, hook)[:, hook.run.query_pos[0]])]
    wanted = model(tokens)[:, 7:]
    _, outside = model(tokens[:, :7], return_state=True)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype), model.hooks(hooks):
        _, inside = model(tokens[:, :7], return_state=True)
        for state in (inside, outside):
            parts = [model(tokens[:, 7:10], state=state, return_state=True)]
            for i in (10, 11):
                parts.append(model(tokens[:, i : i + 1], state=parts[-1][1], return_state=True))
            got = torch.cat([logits for logits, _ in parts], dim=1)
            assert relative(got.float(), wanted) < bound(name, dtype)
            assert parts[-1][1].tensors()["blocks.0.ssm"].dtype == torch.float32
    assert inside.tensors()["blocks.0.conv"].dtype in (torch.float32, dtype)
    if any(t.dtype == dtype for t in inside.tensors().values()):
        with pytest.raises(ValueError, match=r"state.to\(dtype=...\), or go on under the autocast"):
            model(tokens[:, 7:], state=inside)
    assert relative(model(tokens[:, 7:], state=inside.to(dtype=model.dtype)), wanted) < (
        NARROW[dtype] if name != MIXTURE else torch.inf
    )


@dtypes
@pytest.mark.parametrize("name", ["griffin", MIXTURE])
def test_generation_under_autocast_chooses_what_its_forward_would(name: str, dtype: Any):
    """Step by step and in one forward differ by a rounding: where the margin is wider than it."""
    model, tokens = tiny_model(name), random_tokens(1, 70)
    with torch.autocast("cpu", dtype):
        out = model.generate(tokens, 3, return_type="output", stop_at_eos=False, verbose=False)
        logits = model(out.tokens[:, :-1], logits_to_keep=3)
    sure = out.margins > 2 * NARROW[dtype] * logits.abs().max()
    assert torch.equal(logits.argmax(-1)[sure], out.new_tokens[sure])
    gap = (logits.float().log_softmax(-1).gather(-1, out.new_tokens[..., None])[..., 0]) - (
        out.logprobs.float()
    )
    assert name == MIXTURE or float(gap.abs().max()) < 4 * NARROW[dtype]


@dtypes
@grads
@pytest.mark.parametrize("hooked", [False, True])
def test_mambas_scan_is_in_fp32_under_autocast(dtype: Any, grad: bool, hooked: bool):
    """From what its hooks saw, the definition in float64 gives y."""
    model, tokens = tiny_model("jamba-dense-ends-in-attention"), random_tokens(1, 40)
    mixer = model.blocks[0].mixer
    assert isinstance(mixer, Mamba)
    names = ["ssm_input", "ssm_dt", "ssm_B", "ssm_C", "ssm_y", *(["ssm_state"] if hooked else [])]
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype):
        _, cache = model.run_with_cache(
            tokens, names_filter=[f"blocks.0.mixer.hook_{leaf}" for leaf in names]
        )
    u, dt, B, C, y = (cache[leaf, 0].double() for leaf in names[:5])
    h0 = u.new_zeros(1, *mixer.A.shape)
    wanted, _ = selective_scan_loop(u, dt, mixer.A.double(), B, C, h0)
    assert relative(y, wanted + u * mixer.D.double()) < FP32_PARITY


@dtypes
@pytest.mark.parametrize("name", ["griffin", "jamba-dense-ends-in-attention"])
def test_gradients_under_autocast_are_near_those_of_fp32(name: str, dtype: Any):
    model, tokens = tiny_model(name).requires_grad_(True), random_tokens(2, 12)
    model(tokens, return_type="loss").backward()
    wanted = {n: p.grad for n, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype):
        loss = model(tokens, return_type="loss")
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in model.parameters()])
    other = torch.cat([g.flatten() for g in wanted.values()])
    assert all(p.grad.dtype == torch.float32 for p in model.parameters())
    assert float((flat - other).norm() / other.norm()) < NARROW[dtype]
