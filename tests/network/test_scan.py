from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network.scans.loops import scan_loop
from hooked_hybrid.network.scans.scan import scan, scan_chunked
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FAST_SCAN, FINITE_DIFFERENCE, FLOAT64_LONG, SLOW_SCAN_NEAR_ONE

LENGTHS = [1, 2, 31, 64, 65, 96, 333, 2000]
DECAYS = ["mixed", "near one", "resets", "strong"]


def recurrence(kind: str, n_pos: int, channels: tuple[int, ...] = (5,)) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(n_pos)
    shape = (2, n_pos, *channels)
    a = torch.rand(shape, generator=g)
    if kind == "near one":
        a = 1 - 1e-5 * a
    if kind == "resets":
        a = a * (torch.rand(shape, generator=g) > 0.1)
        a[:, n_pos // 2] = 0
    if kind == "strong":
        a = torch.exp(-20 * a)
    x = torch.randn(shape, generator=g)
    return a, x, torch.randn(2, *channels, generator=g)


def exact(a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
    return scan_loop(a.double(), x.double(), h0.double())


def with_gradients(scan_fn, a: Tensor, x: Tensor, h0: Tensor) -> list[Tensor]:
    leaves = [t.detach().clone().requires_grad_() for t in (a, x, h0)]
    h = scan_fn(*leaves)
    weights = torch.randn(h.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    return [h, *torch.autograd.grad((h * weights).sum() + h[:, -1].square().sum(), leaves)]


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("n_pos", LENGTHS)
def test_fast_scan_equals_float64_loop(kind: str, n_pos: int):
    a, x, h0 = recurrence(kind, n_pos)
    fast, truth = scan(a, x, h0), exact(a, x, h0)
    assert relative(fast.double(), truth) < FAST_SCAN
    assert relative(fast[:, -1].double(), truth[:, -1]) < FAST_SCAN


@pytest.mark.parametrize("kind", DECAYS)
@pytest.mark.parametrize("n_pos", [1, 65, 333])
def test_gradients_of_fast_scan_equal_those_of_the_float64_loop(kind: str, n_pos: int):
    a, x, h0 = recurrence(kind, n_pos)
    fast = with_gradients(scan, a, x, h0)
    truth = with_gradients(scan_loop, a.double(), x.double(), h0.double())
    for name, got, wanted in zip(("h", "a", "x", "h0"), fast, truth, strict=True):
        assert relative(got.double(), wanted) < 2 * FAST_SCAN, name


@pytest.mark.parametrize("n_pos", [64, 2000])
def test_fp32_loop_stays_near_float64_where_decay_is_near_one(n_pos: int):
    a, x, h0 = recurrence("near one", n_pos)
    assert relative(scan_loop(a, x, h0).double(), exact(a, x, h0)) < SLOW_SCAN_NEAR_ONE


def test_scan_takes_any_number_of_channel_axes():
    a, x, h0 = recurrence("mixed", 100, (3, 4))
    assert relative(scan(a, x, h0).double(), exact(a, x, h0)) < FAST_SCAN


@pytest.mark.parametrize("chunk", [2, 7, 32, 50])
def test_result_does_not_depend_on_the_chunk(chunk: int):
    a, x, h0 = recurrence("mixed", 100)
    assert relative(scan_chunked(a, x, h0, chunk).double(), exact(a, x, h0)) < FAST_SCAN


def test_scan_does_not_change_its_inputs():
    inputs = recurrence("mixed", 100)
    before = [t.clone() for t in inputs]
    scan(*inputs)
    assert all(torch.equal(t, b) for t, b in zip(inputs, before, strict=True))


def test_scan_passes_gradcheck():
    a, x, h0 = (t.double().requires_grad_() for t in recurrence("mixed", 65, (2,)))
    assert torch.autograd.gradcheck(scan, (a, x, h0))


@pytest.mark.parametrize("n_pos", [2000, 16_000])
def test_products_of_decays_do_not_drift_over_long_sequences(n_pos: int):
    g = torch.Generator().manual_seed(n_pos)
    a = 1 - torch.exp(torch.rand(1, n_pos, 16, generator=g) * -3.4 - 8.1)  # 0.9997 to 0.99999
    x, h0 = torch.randn(1, n_pos, 16, generator=g), torch.randn(1, 16, generator=g)
    assert relative(scan(a, x, h0).double(), exact(a, x, h0)) < FAST_SCAN


def test_second_derivatives_are_the_loops():
    """Also if there is another way to what they are by, which an error there would not stop."""
    found = []
    for fn in (scan, scan_loop):
        generator = torch.Generator().manual_seed(0)
        a, x, h0 = (
            torch.randn(shape, generator=generator, dtype=torch.float64)
            for shape in ((2, 150, 3), (2, 150, 3), (2, 3))
        )
        w = torch.tensor(0.9, dtype=torch.float64, requires_grad=True)
        total = fn(a.sigmoid() * w, x * w, h0 * w).pow(2).sum() + w**3
        [grad] = torch.autograd.grad(total, w, create_graph=True)
        found.append((grad.detach(), torch.autograd.grad(grad, w)[0]))
    (first, second), (exact_first, exact_second) = found
    assert relative(first, exact_first) < FLOAT64_LONG
    assert relative(second, exact_second) < FLOAT64_LONG


@pytest.mark.parametrize("family", ["griffin", "jamba"])
def test_a_product_with_the_hessian_is_what_differences_of_gradients_give(family: str):
    """Through whole layers: the norm of a decay, inputs of a scan that depend on each other."""
    cfg = griffin_config("RR") if family == "griffin" else jamba_config("MM")
    model, tokens = random_model(cfg, dtype=torch.float64), random_tokens(1, 70)
    embedded = model.embed(tokens)
    v = torch.randn(embedded.shape, generator=torch.Generator().manual_seed(1)).to(embedded)

    def gradient(x: Tensor, create_graph: bool = False) -> Tensor:
        put = [("hook_embed", lambda _, hook: x)]
        loss = model.run_with_hooks(tokens, fwd_hooks=put, return_type="loss")
        return torch.autograd.grad(loss, x, create_graph=create_graph)[0]

    x = embedded.clone().requires_grad_()
    [product] = torch.autograd.grad((gradient(x, create_graph=True) * v).sum(), x)
    step = 1e-6
    ahead, behind = (gradient((embedded + sign * step * v).requires_grad_()) for sign in (1, -1))
    assert relative(product, (ahead - behind) / (2 * step)) < FINITE_DIFFERENCE
