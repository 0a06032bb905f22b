"""Products in 16 bits: in fp32 where the CPU has none, and the same but for ties."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from hooked_hybrid import HookedHybrid
from hooked_hybrid.network.weights import products
from hooked_hybrid.network.weights.products import MANY, linear
from tests.models import CONFIGS, random_tokens, relative, tiny_model

NARROW = {torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Half the distance between neighbouring numbers, relative."""


@pytest.fixture(params=list(NARROW), ids=str)
def slow(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.dtype]:
    """Take a CPU that has no product in a dtype, whatever this one has."""
    monkeypatch.setattr(products, "_slow_dtypes", lambda: frozenset({request.param}))
    yield request.param


def operands(dtype: torch.dtype, rows: int = MANY) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, rows // 2, 64), (48, 64), (48,))
    x, weight, bias = (torch.randn(shape, generator=generator).to(dtype) for shape in shapes)
    return x, weight, bias


@pytest.mark.parametrize("has_bias", [False, True])
def test_many_rows_are_rounded_once(slow: torch.dtype, has_bias: bool):
    x, weight, bias = operands(slow)
    added = bias if has_bias else None
    exact = functional.linear(x.double(), weight.double(), None if added is None else bias.double())
    with torch.no_grad():
        ours = linear(x, weight, added)
    theirs = functional.linear(x, weight, added)
    assert ours.dtype == slow and ours.shape == theirs.shape
    error = (ours.double() - exact).abs()
    assert bool((error <= NARROW[slow] * exact.abs() + 1e-5).all())
    differing = float((ours != theirs).double().mean())
    assert differing < 0.02  # sums between two numbers, and a bias that theirs adds after rounding


def test_few_rows_gradients_and_fp32_are_torchs_own(slow: torch.dtype, monkeypatch):
    x, weight, _ = operands(slow)
    calls: list[torch.dtype] = []

    def watched(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        calls.append(weight.dtype)
        return x @ weight.mT

    monkeypatch.setattr(functional, "linear", watched)
    with torch.no_grad():
        linear(x, weight)
        linear(x[:, : MANY // 2 - 1], weight)
        linear(x.float(), weight.float())
    linear(x, weight)
    assert calls == [torch.float32, slow, torch.float32, slow]


def test_gradients_are_those_of_torch(slow: torch.dtype):
    x, weight, bias = (t.requires_grad_() for t in operands(slow))
    for ours, theirs in zip(
        torch.autograd.grad(linear(x, weight, bias).sum(), (x, weight, bias)),
        torch.autograd.grad(functional.linear(x, weight, bias).sum(), (x, weight, bias)),
        strict=True,
    ):
        assert torch.equal(ours, theirs)


@cache
def narrow_model(name: str) -> HookedHybrid:
    return tiny_model(name).bfloat16()


@torch.no_grad()
@pytest.mark.parametrize("name", list(CONFIGS))
def test_a_model_computes_the_same_and_keeps_the_same_state(name: str, monkeypatch):
    model, tokens = narrow_model(name), random_tokens(2, MANY)
    monkeypatch.setattr(products, "_slow_dtypes", frozenset)
    logits, state = model(tokens, return_state=True)
    monkeypatch.setattr(products, "_slow_dtypes", lambda: frozenset(NARROW))
    ours, own_state = model(tokens, return_state=True)
    bound = 0.05  # bf16 has 8 bits, and a tie that falls otherwise goes through all layers
    assert relative(ours.float(), logits.float()) < bound
    wanted, found = state.tensors(), own_state.tensors()
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        if value.is_floating_point():
            assert relative(found[key].float(), value.float()) < bound, key
