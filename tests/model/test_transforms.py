"""Transforms of torch.func and second derivatives: equal to plain autograd and to differences."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.functional import scaled_dot_product_attention

from hooked_hybrid import HookedHybrid
from hooked_hybrid.interventions import edit_state, keep_top_heads, knock_out_edges, limit_window
from hooked_hybrid.network.attention.fused_gradient import twice_differentiable
from hooked_hybrid.network.elementwise import constant
from hooked_hybrid.network.mixers.rglru import sqrt_bounded
from hooked_hybrid.network.scans.scan import CHUNK
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FINITE_DIFFERENCE

FP64 = 1e-11
"""The same derivative by other operations, in float64. Measured: 5e-15 at most."""
LONG = 2 * CHUNK + 3
"""Positions from which on the fast scans have gradients of their own."""

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script. is:DeprecationWarning")
"""torch itself uses it where forward-mode derivatives are first asked for."""

models = pytest.mark.parametrize("name", list(CONFIGS))
families = pytest.mark.parametrize("name", ["griffin", "jamba"])


@cache
def model_of(name: str) -> HookedHybrid:
    return tiny_model(name).double()


@cache
def resid_of(name: str, n_pos: int) -> Tensor:
    return model_of(name)(random_tokens(2, n_pos), stop_at_layer=1).detach()


def weights_of(model: HookedHybrid) -> dict[str, Tensor]:
    return {name: weight.detach() for name, weight in model.named_parameters()}


def gradients(fn: Callable[[Any], Tensor], at: Any) -> Any:
    """Return the gradient of a scalar by a tensor, or by each of a dict, by plain autograd."""
    if isinstance(at, Tensor):
        at = at.clone().requires_grad_()
        return torch.autograd.grad(fn(at), at)[0]
    at = {name: t.clone().requires_grad_() for name, t in at.items()}
    found = torch.autograd.grad(fn(at), list(at.values()), materialize_grads=True)
    return dict(zip(at, found, strict=True))


def loss_with(model: HookedHybrid, **options: Any) -> Callable[..., Tensor]:
    def loss(weights: dict[str, Tensor], tokens: Tensor, **more: Tensor) -> Tensor:
        kwargs = {"return_type": "loss", **options, **more}
        return functional_call(model, weights, (tokens,), kwargs)

    return loss


def assert_same(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Compare weight by weight; what is 1e-4 of the largest gradient or less is held to that."""
    assert got.keys() == wanted.keys()
    largest = max(float(t.abs().max()) for t in wanted.values())
    for name, t in got.items():
        limit = FP64 * max(float(wanted[name].abs().max()), 1e-4 * largest)
        assert float((t - wanted[name]).abs().max()) <= limit, name


# --- by parameters --------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("n_pos", [2, LONG])
def test_grad_and_per_sample_gradients_by_weights_are_those_of_autograd(name: str, n_pos: int):
    model = model_of(name)
    loss, weights, tokens = loss_with(model), weights_of(model), random_tokens(2, n_pos)
    assert_same(grad(loss)(weights, tokens), gradients(lambda w: loss(w, tokens), weights))
    each = vmap(grad(loss), (None, 0))(weights, tokens[:, None])
    for i, row in enumerate(tokens):
        mine = {name: t[i] for name, t in each.items()}
        assert_same(mine, gradients(lambda w, row=row: loss(w, row[None]), weights))


@families
def test_per_sample_gradients_know_padding_and_documents(name: str):
    model = model_of(name)
    loss, weights, tokens = loss_with(model), weights_of(model), random_tokens(3, 9)
    mask = torch.ones(3, 9, dtype=torch.long)
    mask[0, :3], mask[1, 7:] = 0, 0
    ids = torch.tensor([[1] * 4 + [2] * 5, [1] * 9, [0, 0] + [3] * 3 + [4] * 4])
    for key, value in (("attention_mask", mask), ("segment_ids", ids)):
        one = lambda w, t, m, key=key: loss(w, t[None], **{key: m[None]})  # noqa: E731
        each = vmap(grad(one), (None, 0, 0))(weights, tokens, value)
        for i in range(3):
            wanted = gradients(lambda w, i=i: one(w, tokens[i], value[i]), weights)  # noqa: B023
            assert_same({n: t[i] for n, t in each.items()}, wanted)


@families
def test_an_ensemble_of_weights_runs_as_one(name: str):
    several = [tiny_model(name, seed).double() for seed in range(2)]
    weights = [weights_of(model) for model in several]
    stacked = {key: torch.stack([w[key] for w in weights]) for key in weights[0]}
    tokens = random_tokens(2, 6)
    logits = vmap(lambda w: functional_call(several[0], w, (tokens,)))(stacked)
    for got, model in zip(logits, several, strict=True):
        assert relative(got, model(tokens)) < FP64


# --- by residual streams --------------------------------------------------------------------------


@models
@pytest.mark.parametrize("n_pos", [5, LONG])
def test_first_derivatives_by_a_residual_stream_are_those_of_autograd(name: str, n_pos: int):
    model, x = model_of(name), resid_of(name, n_pos)
    direction = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(0))

    def fn(x: Tensor) -> Tensor:
        return model(x, start_at_layer=1).square().mean()

    wanted = gradients(fn, x)
    assert relative(grad(fn)(x), wanted) < FP64
    assert relative(vjp(fn, x)[1](torch.ones((), dtype=x.dtype))[0], wanted) < FP64
    assert relative(jvp(fn, (x,), (direction,))[1], (wanted * direction).sum()) < FP64
    each = vmap(grad(lambda row: fn(row[None])))(x)
    assert relative(each, torch.stack([gradients(fn, row[None])[0] for row in x])) < FP64
    with torch.no_grad(), forward_ad.dual_level():
        dual = fn(forward_ad.make_dual(x, direction))
        assert relative(forward_ad.unpack_dual(dual).tangent, (wanted * direction).sum()) < FP64


@models
def test_jacobians_and_hessians_are_those_of_autograd(name: str):
    model, x = model_of(name), resid_of(name, 4)[:1, :, :]

    def fn(tail: Tensor) -> Tensor:  # two channels of every position: a small Hessian
        whole = torch.cat([tail, x[..., 2:]], dim=-1)
        return model(whole, start_at_layer=1)[0, -1, :3]

    at = x[..., :2]
    wanted = torch.stack([gradients(lambda t, i=i: fn(t)[i], at) for i in range(3)])
    assert relative(jacrev(fn)(at), wanted) < FP64
    assert relative(jacfwd(fn)(at), wanted) < FP64
    plain = torch.autograd.functional.hessian(lambda t: fn(t)[0], at)
    assert relative(hessian(lambda t: fn(t)[0])(at), plain) < FP64
    for outer, inner in ((jacrev, jacrev), (jacfwd, jacfwd), (jacrev, jacfwd)):
        assert relative(outer(inner(lambda t: fn(t)[0]))(at), plain) < FP64


# --- with hooks -----------------------------------------------------------------------------------


@families
def test_edits_at_every_point_are_followed(name: str):
    """All points after the first block at once, each scaled by a factor of its own."""
    model, x = model_of(name), resid_of(name, 7)
    points = [n for n, p in model.hook_dict.items() if not p.is_integer]
    points = [n for n in points if not n.startswith(("blocks.0.", "hook_embed"))]
    factors = {n: 1 - 0.002 * i for i, n in enumerate(points)}
    hooks = [(points, lambda value, hook: value * factors[hook.name])]

    def fn(row: Tensor) -> Tensor:
        return model.run_with_hooks(row[None], fwd_hooks=hooks, start_at_layer=1).square().mean()

    wanted = torch.stack([gradients(fn, row) for row in x])
    assert relative(vmap(grad(fn))(x), wanted) < FP64


@families
@pytest.mark.parametrize(
    "make",
    [
        lambda: keep_top_heads(1),
        lambda: knock_out_edges([5], [1, 2]),
        lambda: limit_window(3),
        lambda: edit_state(lambda h, hook: h * 0.5, positions=[2, 4]),
    ],
    ids=["top heads", "edges", "window", "state"],
)
def test_interventions_are_followed(name: str, make: Callable[[], Any]):
    model, x = model_of(name), resid_of(name, 7)

    def fn(row: Tensor) -> Tensor:
        return model.run_with_hooks(row[None], fwd_hooks=make(), start_at_layer=1).square().mean()

    assert relative(vmap(grad(fn))(x), torch.stack([gradients(fn, row) for row in x])) < FP64


@families
def test_activations_may_be_cached_inside_a_transform(name: str):
    model, x = model_of(name), resid_of(name, 7)

    def fn(row: Tensor) -> dict[str, Tensor]:
        _, cache = model.run_with_cache(row[None], names_filter=lambda n: True, start_at_layer=1)
        return {key: value[0] for key, value in cache.items()}

    _, wanted = model.run_with_cache(x, names_filter=lambda n: True, start_at_layer=1)
    got = vmap(fn)(x)
    assert got.keys() == wanted.keys()
    for key, value in got.items():
        assert relative(value.double(), wanted[key].double()) < FP64, key


def test_a_state_is_differentiated_through():
    model, tokens = model_of("jamba"), random_tokens(1, 9)
    _, state = model(tokens[:, :5], return_state=True)
    named = state.tensors()

    def fn(ssm: Tensor) -> Tensor:
        mine = type(state).from_tensors({**named, "blocks.1.ssm": ssm}, state.n_seen)
        return model(tokens[:, 5:], state=mine).square().mean()

    at = named["blocks.1.ssm"]
    assert relative(grad(fn)(at), gradients(fn, at)) < FP64


def test_what_cannot_be_transformed_is_a_clear_error():
    model, x = model_of("griffin"), resid_of("griffin", 4)
    with pytest.raises(RuntimeError, match="generate cannot run inside a transform of torch.func"):
        vmap(lambda t: model.generate(t[None], 2, verbose=False))(random_tokens(2, 4))
    watched = {"bwd_hooks": [("blocks.1.hook_resid_mid", lambda g, hook: None)]}
    with pytest.raises(RuntimeError, match="hooks on gradients.* inside a transform"):
        grad(lambda x: model.run_with_hooks(x, start_at_layer=1, **watched).sum())(x)
    with pytest.raises(RuntimeError, match="incl_bwd .* inside a transform"):
        vmap(lambda r: model.run_with_cache(r[None], start_at_layer=1, incl_bwd=True))(x)


def test_tokens_outside_the_vocabulary_are_an_error_under_vmap_too():
    model = model_of("griffin")
    tokens = random_tokens(3, 4)
    tokens[2, 1] = model.cfg.d_vocab
    with pytest.raises(ValueError, match="token ids"):
        vmap(lambda t: model(t[None]))(tokens)
    with pytest.raises(ValueError, match="zeros between tokens in rows \\[1\\]"):
        masks = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 1]])
        vmap(lambda t, m: model(t[None], attention_mask=m[None]))(random_tokens(2, 4), masks)


def test_a_constant_made_inside_a_transform_stays_there():
    value = 0.123
    grad(lambda x: (x * constant(value, x.dtype, x.device)).sum())(torch.ones(2))
    assert not torch._C._functorch.is_functorch_wrapped_tensor(
        constant(value, torch.float32, torch.device("cpu"))
    )


# --- the pieces -----------------------------------------------------------------------------------


def test_the_bounded_square_root_is_differentiated_in_every_way():
    """By hand: sqrt(x), 1 / (2 sqrt(x)) and -1 / (4 x^1.5); bounded as Griffin is, 1000 and 0."""
    x = torch.tensor([0.0, 1e-9, 1e-6, 0.25, 4.0], dtype=torch.float64)
    first = torch.tensor([1000.0, 1000.0, 500.0, 1.0, 0.25], dtype=torch.float64)
    second = torch.tensor([0.0, 0.0, -2.5e8, -2.0, -1 / 32], dtype=torch.float64)
    plain = x.clone().requires_grad_()
    sqrt_bounded(plain).sum().backward()
    assert plain.grad is not None and torch.allclose(plain.grad, first, rtol=1e-12)
    one = torch.ones_like(x)
    assert torch.allclose(jvp(sqrt_bounded, (x,), (one,))[1], first, rtol=1e-12)
    assert torch.allclose(vmap(grad(sqrt_bounded))(x), first, rtol=1e-12)
    assert torch.allclose(vmap(grad(grad(sqrt_bounded)))(x), second, rtol=1e-12)
    assert torch.allclose(vmap(jacfwd(jacfwd(sqrt_bounded)))(x), second, rtol=1e-12)
    assert torch.allclose(vmap(jacfwd(grad(sqrt_bounded)))(x), second, rtol=1e-12)


def drawn(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()


@pytest.mark.parametrize("n_kv", [1, 2])
@pytest.mark.parametrize("masked", [False, True])
def test_the_fused_kernel_has_the_second_derivatives_of_its_definition(n_kv: int, masked: bool):
    q, k, v = drawn(2, 3, 4, 2), drawn(2, 3, n_kv, 2, seed=1), drawn(2, 3, n_kv, 2, seed=2)
    mask = torch.ones(1, 3, 3, dtype=torch.bool).tril() if masked else None
    if mask is not None:
        mask = mask.repeat(2, 1, 1)
        mask[1, 0] = False  # padding: a query that sees nothing

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        z = scaled_dot_product_attention(
            *(t.transpose(1, 2) for t in (q, k, v)),
            attn_mask=None if mask is None else mask[:, None],
            enable_gqa=True,
        )
        return twice_differentiable(z.transpose(1, 2), q, k, v, mask)

    assert gradcheck(attend, (q, k, v))
    assert gradgradcheck(attend, (q, k, v))


@models
@pytest.mark.parametrize("n_pos", [12, LONG])
def test_products_with_the_hessian_are_differences_of_gradients(name: str, n_pos: int):
    """With padding, through fast scans and windows; `v` is an arbitrary direction."""
    model, tokens = model_of(name), random_tokens(2, n_pos)
    mask = torch.ones_like(tokens)
    mask[0, :5], mask[1, -4:] = 0, 0
    x = model(tokens, stop_at_layer=1, attention_mask=mask).detach()
    v = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(3))

    def fn(x: Tensor) -> Tensor:
        logits = model(x, start_at_layer=1, attention_mask=mask)
        return (logits * mask[..., None]).square().mean()

    at = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(fn(at), at, create_graph=True)
    assert relative(first, gradients(fn, x)) < FP64
    (product,) = torch.autograd.grad((first * v).sum(), at)
    step = 1e-6
    difference = (gradients(fn, x + step * v) - gradients(fn, x - step * v)) / (2 * step)
    assert relative(product, difference) < FINITE_DIFFERENCE


@families
def test_second_derivatives_go_through_an_initial_state(name: str):
    model, tokens = model_of(name), random_tokens(1, 5 + LONG)
    _, state = model(tokens[:, :5], return_state=True)
    named = state.tensors()
    key = "blocks.0.ssm"

    def fn(ssm: Tensor) -> Tensor:
        mine = type(state).from_tensors({**named, key: ssm}, state.n_seen)
        return model(tokens[:, 5:], state=mine).square().mean()

    at = named[key].clone().requires_grad_()
    v = torch.randn(at.shape, dtype=at.dtype, generator=torch.Generator().manual_seed(3))
    (first,) = torch.autograd.grad(fn(at), at, create_graph=True)
    (product,) = torch.autograd.grad((first * v).sum(), at)
    step = 1e-6
    plain = named[key]
    difference = (gradients(fn, plain + step * v) - gradients(fn, plain - step * v)) / (2 * step)
    assert relative(product, difference) < FINITE_DIFFERENCE
