"""Mamba-2's scan: each fast way gives the values, last state and gradients of its definition."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network.scans import ssd_scan as module
from hooked_hybrid.network.scans.loops import ssd_scan_loop
from hooked_hybrid.network.scans.ssd_scan import Decays, ssd_scan
from tests.models import relative
from tests.tolerances import FAST_SCAN, FLOAT64

HEADS, GROUPS, D_HEAD, D_STATE = 6, 2, 5, 7


def inputs(
    n_pos: int, dtype: torch.dtype = torch.float64, strength: float = 1.0, seed: int = 0
) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=g, dtype=torch.float64).to(dtype)

    return {
        "x": draw(n_pos, HEADS, D_HEAD),
        "log": -strength * draw(n_pos, HEADS).abs(),
        "B": draw(n_pos, GROUPS, D_STATE),
        "C": draw(n_pos, GROUPS, D_STATE),
        "h0": draw(HEADS, D_HEAD, D_STATE),
    }


def by_definition(of: dict[str, Tensor], decay: Tensor) -> tuple[Tensor, Tensor]:
    return ssd_scan_loop(of["x"], decay, of["B"], of["C"], of["h0"])


def fast(of: dict[str, Tensor], decays: Decays) -> tuple[Tensor, Tensor]:
    return ssd_scan(of["x"], decays, of["B"], of["C"], of["h0"])


@pytest.mark.parametrize("n_pos", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_chunks_equal_the_loop(n_pos: int, strength: float):
    of = inputs(n_pos, strength=strength)
    decay = of["log"].exp()
    expected = by_definition(of, decay)
    for decays in (Decays(log=of["log"]), Decays(value=decay)):
        for a, b in zip(fast(of, decays), expected, strict=True):
            assert relative(a, b) < FLOAT64


@pytest.mark.parametrize("strength", [1e-3, 1.0, 30.0])
def test_in_fp32_chunks_are_as_near_the_truth_as_the_loop(strength: float):
    exact = inputs(600, strength=strength)
    truth = by_definition(exact, exact["log"].exp())
    narrow = {name: t.float() for name, t in exact.items()}
    narrow["log"] = exact["log"].float()
    rounded = {name: t.double() for name, t in narrow.items()}
    truth = by_definition(rounded, rounded["log"].exp())
    for a, b in zip(fast(narrow, Decays(log=narrow["log"])), truth, strict=True):
        assert relative(a.double(), b) < FAST_SCAN


def gradients(of: dict[str, Tensor], outputs: tuple[Tensor, Tensor]) -> list[Tensor]:
    loss = sum((o * torch.linspace(-1, 1, o.numel()).view(o.shape)).sum() for o in outputs)
    return list(torch.autograd.grad(loss, list(of.values())))


def test_gradients_equal_those_of_the_loop():
    of = {name: t.requires_grad_() for name, t in inputs(130).items()}
    expected = gradients(of, by_definition(of, of["log"].exp()))
    for decays in (Decays(log=of["log"]), Decays(value=of["log"].exp())):
        for a, b in zip(gradients(of, fast(of, decays)), expected, strict=True):
            assert relative(a, b) < FLOAT64


def test_decays_of_any_value_are_multiplied_and_have_their_gradient():
    """A hook may set a decay to 0, below 0 or above 1; its gradient there is not lost."""
    of = inputs(90)
    decay = of.pop("log").exp()
    decay[:, 3], decay[:, 70] = 0, 0
    decay[:, 5], decay[:, 20] = -0.5, 1.5
    of["decay"] = decay
    of = {name: t.requires_grad_() for name, t in of.items()}
    expected = by_definition(of, of["decay"])
    got = fast(of, Decays(value=of["decay"]))
    for a, b in zip(got, expected, strict=True):
        assert relative(a, b) < FLOAT64
    found = gradients(of, got)
    for a, b in zip(found, gradients(of, expected), strict=True):
        assert relative(a, b) < FLOAT64
    assert found[-1][:, 3].abs().max() > 0.1


@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf])
def test_nothing_passes_a_reset_not_even_nan(bad: float | None):
    of = inputs(150)
    resets = torch.zeros(2, 150, dtype=torch.bool)
    resets[0, [10, 64, 140]] = True
    resets[1, 100] = True
    if bad is not None:
        of["x"][0, 5] = bad
        of["h0"][1] = bad
    decay = of["log"].exp().masked_fill(resets[..., None], 0)
    y, h = fast(of, Decays(log=of["log"], resets=resets))
    if bad is None:
        for a, b in zip((y, h), by_definition(of, decay), strict=True):
            assert relative(a, b) < FLOAT64
        return
    assert y[0, 10:].isfinite().all() and y[1, 100:].isfinite().all() and h.isfinite().all()
    assert not y[0, 5:10].isfinite().any() and not y[1, :100].isfinite().any()


def test_a_transform_runs_the_definition(monkeypatch: pytest.MonkeyPatch):
    calls: list[Any] = []

    def loop(*args: Any) -> Any:
        calls.append(args)
        return ssd_scan_loop(*args)

    monkeypatch.setattr(module, "ssd_scan_loop", loop)
    of = inputs(70)
    gradient = torch.func.grad(lambda x: fast({**of, "x": x}, Decays(log=of["log"]))[0].sum())
    found = gradient(of["x"])
    assert len(calls) == 1
    x = of["x"].clone().requires_grad_()
    y, _ = fast({**of, "x": x}, Decays(log=of["log"]))
    assert relative(found, torch.autograd.grad(y.sum(), x)[0]) < FLOAT64
