"""A package that cannot be imported, or a kernel that cannot run or is wrong, is left out."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network import kernels
from hooked_hybrid.network.kernels import (
    causal_conv1d,
    grouped_experts,
    linear_scan,
    mamba_ssm,
    selective_scan,
    trials,
)
from hooked_hybrid.network.scans.loops import scan_loop, selective_scan_loop
from tests.network.test_kernels import install
from tests.pretended_gpu import packages

CPU = torch.device("cpu")
IMPORTS = {
    "ImportError": "raise ImportError('undefined symbol')",
    "AttributeError": "import sys; sys.no_such_thing",
    "TypeError": "len(3)",
    "ValueError": "int('numpy 2')",
    "AssertionError": "assert False, 'CUDA 12'",
    "KeyError": "{}['PATH_TO_CUDA']",
    "SyntaxError": "print 'hello'",
    "FileNotFoundError": "open('/no/such/library.so')",
    "NameError": "no_such_name",
}


@pytest.mark.parametrize("kind", IMPORTS)
def test_a_package_that_raises_any_error_is_not_used_and_warns_once(monkeypatch, tmp_path, kind):
    name = f"broken_by_{kind}"
    (tmp_path / f"{name}.py").write_text(IMPORTS[kind])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=f"{name} is installed but cannot.*plain torch.*{kind}"):
        assert not kernels.importable(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not kernels.importable(name)


def test_what_ends_a_process_is_not_swallowed(monkeypatch, tmp_path):
    (tmp_path / "interrupted.py").write_text("raise KeyboardInterrupt")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        kernels.importable("interrupted")


# --- a trial before the first use -----------------------------------------------------------------


@pytest.fixture
def on_gpu(monkeypatch) -> Callable[..., bool]:
    """Return `works` as on a GPU: trials run on the CPU, and nothing is remembered."""
    monkeypatch.setattr(trials, "_found", {})
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def works(trial: Any, dtype: torch.dtype = torch.float32, device: str = "cuda:0") -> bool:
        def here(_: torch.device, dtype: torch.dtype) -> Any:
            return trial(CPU, dtype)

        return trials.works("the kernel", here, torch.device(device), dtype)

    return works


def triton_as_loops(monkeypatch, wrong: float = 0.0) -> None:
    """Stand for Triton's kernels by the loops that define them."""

    def launch(a: Tensor, x: Tensor, h0: Tensor, states: Tensor, reverse: bool) -> None:
        way = (lambda t: t.flip(1)) if reverse else (lambda t: t)
        states.copy_(way(scan_loop(way(a), way(x), h0)) * (1 + wrong))

    class Kernel:
        def __getitem__(self, grid: Any) -> Callable[..., None]:
            def run(
                u: Tensor,
                dt: Tensor,
                A: Tensor,
                B: Tensor,
                C: Tensor,
                h0: Tensor,
                forget: Tensor | None,
                y: Tensor,
                last: Tensor,
                *_: Any,
                **__: Any,
            ) -> None:
                resets = None if forget is None else forget > 0
                found = selective_scan_loop(u, dt, A, B, C, h0, resets)
                y.copy_(found[0] * (1 + wrong))
                last.copy_(found[1])

            return run

    triton_kernels = pytest.importorskip("hooked_hybrid.network.kernels.triton_kernels")
    monkeypatch.setattr(linear_scan, "_launch", launch)
    monkeypatch.setattr(triton_kernels, "selective_scan", Kernel())
    for module in (linear_scan, selective_scan):
        monkeypatch.setattr(module, "triton_reads", lambda *_: True)


TRIALS = {
    "linear scan": linear_scan._trial,
    "selective scan": selective_scan._trial,
    "mamba-ssm": mamba_ssm._trial,
    "causal-conv1d": causal_conv1d._trial,
    "causal-conv1d with gradients": causal_conv1d._trial_of_gradients,
    "grouped experts": grouped_experts._trial,
}


def put_in_place(monkeypatch, wrong: float = 0.0) -> None:
    def scale(result: Any) -> Any:
        return tuple(t * (1 + wrong) for t in result) if isinstance(result, tuple) else result

    triton_as_loops(monkeypatch, wrong)
    conv, scan = packages.causal_conv1d_fn, packages.selective_scan_fn
    install(monkeypatch, "causal_conv1d", causal_conv1d_fn=lambda *a, **k: scale(conv(*a, **k)))
    install(
        monkeypatch,
        mamba_ssm.MODULE,
        selective_scan_fn=lambda *a, **k: scan(*a, **k) * (1 + wrong),
    )
    grouped = grouped_experts._grouped
    monkeypatch.setattr(grouped_experts, "_grouped", lambda *a: grouped(*a) * (1 + wrong))


@pytest.mark.parametrize("name", TRIALS)
def test_a_kernel_that_is_right_is_used_and_tried_once(monkeypatch, on_gpu, name):
    put_in_place(monkeypatch)
    tried = []

    def trial(*given: Any) -> Any:
        tried.append(given)
        return TRIALS[name](*given)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        state = torch.random.get_rng_state()
        assert on_gpu(trial) and on_gpu(trial)
        assert torch.equal(torch.random.get_rng_state(), state)
    assert len(tried) == 1
    with torch.inference_mode():
        assert on_gpu(trial, torch.float32, "cuda:1")  # each GPU by itself
    assert len(tried) == 2


@pytest.mark.parametrize("name", TRIALS)
def test_a_wrong_kernel_is_not_used_and_warns_once(monkeypatch, on_gpu, name):
    put_in_place(monkeypatch, wrong=0.03)
    with pytest.warns(UserWarning, match=r"the kernel is off by 0\.0.*on cuda:0 in torch.float32"):
        assert not on_gpu(TRIALS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert not on_gpu(TRIALS[name])


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float16, torch.float64], ids=["bf16", "fp16", "fp64"]
)
def test_trials_hold_in_every_dtype_that_a_kernel_takes(monkeypatch, on_gpu, dtype):
    put_in_place(monkeypatch)
    names = ["linear scan"] if dtype == torch.float64 else ["causal-conv1d"]
    for name in [*names, *(["grouped experts"] if dtype == torch.bfloat16 else [])]:
        assert on_gpu(TRIALS[name], dtype)


FAILURES = {
    "no compiler": RuntimeError("Failed to find C compiler"),
    "no code": AttributeError("no kernel image is available"),
    "anything": Exception("what"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_kernel_that_cannot_run_is_left_out(on_gpu, kind):
    def trial(*_: Any) -> Any:
        raise FAILURES[kind]

    with pytest.warns(UserWarning, match="the kernel cannot run on cuda:0: "):
        assert not on_gpu(trial)
    assert not on_gpu(trial)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_no_numbers_and_other_shapes_are_wrong(on_gpu, bad):
    for found in (torch.full((2,), bad), torch.ones(1)):
        trials._found.clear()
        with pytest.warns(UserWarning, match="off by inf"):
            assert not on_gpu(lambda *_, found=found: ((found,), (torch.ones(2),)))


def test_a_full_gpu_is_not_reported_as_a_kernels_error(on_gpu):
    def trial(*_: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        on_gpu(trial)
    right = (torch.ones(2),), (torch.ones(2),)
    assert on_gpu(lambda *_: right)


def test_nothing_is_tried_where_values_cannot_be_read(on_gpu, monkeypatch):
    right = (torch.ones(2),), (torch.ones(2),)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert not on_gpu(lambda *_: right)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    with torch._subclasses.FakeTensorMode():
        assert not on_gpu(lambda *_: right)
    assert on_gpu(lambda *_: right)  # nothing was remembered


def test_each_kernel_is_asked_for_its_trial(monkeypatch):
    asked: list[str] = []

    def works(name: str, *_: Any) -> bool:
        asked.append(name)
        return False

    for module in (causal_conv1d, grouped_experts, linear_scan, mamba_ssm, selective_scan):
        monkeypatch.setattr(module, "works", works)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for module in (mamba_ssm, causal_conv1d):
        monkeypatch.setattr(module, "importable", lambda name: True)
    for module in (linear_scan, selective_scan):
        monkeypatch.setattr(module, "triton_reads", lambda *_: True)
    x, w = torch.ones(1, 2, 8), torch.ones(8, 4)
    B, stack = torch.ones(1, 2, 4), torch.ones(2, 8, 8, dtype=torch.bfloat16)
    assert not linear_scan.usable(x, x, x[:, 0])
    assert not selective_scan.usable(x, x, w, B, B, torch.ones(1, 8, 4))
    assert not mamba_ssm.usable(x, x, w, B, B)
    assert not causal_conv1d.usable(x, torch.ones(1, 3, 8), w.T, None)
    assert not causal_conv1d.usable(x, torch.ones(1, 3, 8), w.T.clone().requires_grad_(), None)
    assert not grouped_experts.usable(x.bfloat16(), stack, stack, stack)
    assert len(asked) == len({*asked}) == len(TRIALS)


def test_packages_are_not_given_what_torch_transforms(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(causal_conv1d, "importable", lambda name: True)
    weight, asked = torch.ones(4, 8), []
    ask = partial(causal_conv1d.usable, weight=weight, bias=None)

    def f(u: Tensor) -> Tensor:
        asked.append(ask(u, torch.ones(1, 3, 8)))
        return u.sum()

    torch.func.grad(f)(torch.ones(1, 2, 8))
    assert asked == [False] and ask(torch.ones(1, 2, 8), torch.ones(1, 3, 8))
