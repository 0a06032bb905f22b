"""Second derivatives through kernels whose backward passes autograd does not see.

The packages' parts are stand-ins whose gradients are right and have no graph, as the compiled
ones: to differentiate them again gives zero for what they hide, and nothing says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network.kernels import causal_conv1d, mamba_ssm
from hooked_hybrid.network.layers import CausalConv1d
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.scans.loops import selective_scan_loop
from tests.models import relative
from tests.network.test_kernels import install, normal, ssm_inputs
from tests.pretended_gpu import packages
from tests.tolerances import FAST_SCAN

Run = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch) -> Iterator[None]:
    install(monkeypatch, mamba_ssm.MODULE, selective_scan_fn=packages.selective_scan_fn)
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=packages.causal_conv1d_fn)
    packages.calls.clear()
    yield


def derivatives(run: Run, leaves: list[Tensor], uses: slice = slice(None)) -> list[Tensor]:
    """Return outputs, first derivatives of a loss, and derivatives of a loss of these."""
    outputs = run(*leaves)
    loss = sum(t.sin().sum() * (i + 1) for i, t in enumerate(outputs[uses]))
    options = {"allow_unused": True, "materialize_grads": True}
    first = torch.autograd.grad(loss, leaves, create_graph=True, **options)
    of_these = sum((g * g.detach().cos()).sum() + g.square().sum() for g in first)
    return [*outputs, *first, *torch.autograd.grad(of_these, leaves, **options)]


def assert_all_close(found: list[Tensor], expected: list[Tensor]) -> None:
    for i, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert relative(a, b) < 10 * FAST_SCAN, i


@pytest.mark.parametrize("uses", [slice(None), slice(0, 1), slice(1, 2)], ids=["both", "y", "last"])
@pytest.mark.parametrize("has_bias", [False, True])
def test_the_convolution_has_the_second_derivatives_of_its_definition(uses, has_bias):
    layer = CausalConv1d(4, 8, bias=has_bias)
    leaves = [normal(2, 6, 8), normal(2, 3, 8, seed=1), normal(4, 8, seed=2), normal(8, seed=3)]
    leaves = [t.requires_grad_() for t in leaves[: 3 + has_bias]]

    def defined(u: Tensor, state: Tensor, weight: Tensor, bias: Any = None) -> Any:
        values = {"weight": weight, **({} if bias is None else {"bias": bias})}
        layout = lay_out(u, None, None, None)
        return torch.func.functional_call(layer, values, (u, state, layout))

    def packaged(u: Tensor, state: Tensor, weight: Tensor, bias: Any = None) -> Any:
        return causal_conv1d.convolve(u, state, weight, bias)

    found = derivatives(packaged, leaves, uses)
    assert packages.calls["causal-conv1d forward"] == 1
    assert_all_close(found, derivatives(defined, leaves, uses))


@pytest.mark.parametrize("uses", [slice(None), slice(0, 1), slice(1, 2)], ids=["both", "y", "last"])
def test_the_scan_has_the_second_derivatives_of_its_definition(uses):
    *inputs, h0 = ssm_inputs(2, 7, 5, 3)
    leaves = [t.requires_grad_() for t in inputs]
    found = derivatives(mamba_ssm.selective_scan, leaves, uses)
    assert packages.calls["mamba-ssm forward"] == 1
    expected = derivatives(lambda *t: selective_scan_loop(*t, torch.zeros_like(h0)), leaves, uses)
    assert_all_close(found, expected)


def test_inputs_that_depend_on_each_other_are_differentiated_once_along_each_path():
    """As in Mamba, where step sizes and maps are made from what the scan reads."""
    *_, h0 = ssm_inputs(2, 7, 5, 3)
    x, A = normal(2, 7, 5).requires_grad_(), (-normal(5, 3, seed=4).abs()).requires_grad_()

    def run(scan: Run) -> Run:
        return lambda x, A: scan(
            x, torch.nn.functional.softplus(x), A, x[..., :3].sin(), x[..., 2:]
        )

    found = derivatives(run(mamba_ssm.selective_scan), [x, A])
    expected = derivatives(run(lambda *t: selective_scan_loop(*t, torch.zeros_like(h0))), [x, A])
    assert_all_close(found, expected)


def test_first_derivatives_are_the_packages_own():
    *inputs, _ = ssm_inputs(2, 7, 5, 3)
    leaves = [t.requires_grad_() for t in inputs]
    y, last = mamba_ssm.selective_scan(*leaves)
    (y.sum() + last.sum()).backward()
    u, state, weight = (
        t.requires_grad_() for t in (normal(1, 5, 8), normal(1, 3, 8), normal(4, 8))
    )
    y, after = causal_conv1d.convolve(u, state, weight, None)
    (y.sum() + after.sum()).backward()
    assert packages.calls == dict.fromkeys(
        (
            "mamba-ssm forward",
            "mamba-ssm backward",
            "causal-conv1d forward",
            "causal-conv1d backward",
        ),
        1,
    )


def test_outputs_may_be_edited_in_place_and_need_no_gradient():
    u, state, weight = normal(1, 5, 8), normal(1, 3, 8), normal(4, 8)
    y, after = causal_conv1d.convolve(u, state, weight, None)
    assert not y.requires_grad and not after.requires_grad
    y, after = causal_conv1d.convolve(u, state, weight.requires_grad_(), None)
    assert y.requires_grad and not after.is_leaf
    y *= 2
    after.zero_()
    y.sum().backward()
    wanted = torch.stack([torch.cat([state, u], 1)[:, i : i + 5].sum((0, 1)) for i in range(4)])
    assert weight.grad is not None and relative(weight.grad, 2 * wanted) < FAST_SCAN
