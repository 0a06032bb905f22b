"""Kernels that need a GPU, replaced by their definitions behind the checks of the real ones."""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Callable, Iterator
from importlib.machinery import ModuleSpec
from typing import Any
from unittest import mock

from torch import Tensor

from hooked_hybrid.network import kernels
from hooked_hybrid.network.kernels import linear_scan, trials
from hooked_hybrid.network.scans.loops import scan_loop, selective_scan_loop
from tests.pretended_gpu import packages
from tests.pretended_gpu.device import PretendedGPU, on_the_numbers, real

calls = packages.calls


@contextlib.contextmanager
def _one_launch(name: str, n: int = 1) -> Iterator[None]:
    """Count what is computed as the launches of a kernel."""
    calls[name] += 1
    with on_the_numbers():
        yield
    PretendedGPU.entered().launches[name] += n


def _launch(a: Tensor, x: Tensor, h0: Tensor, states: Tensor, reverse: bool) -> None:
    """Stand for the launches of Triton's linear scan."""
    assert all(t.is_cuda and t.is_contiguous() and t.dtype == x.dtype for t in (a, x, h0, states))
    assert a.shape == x.shape == states.shape and h0.shape == (x.shape[0], x.shape[2])
    with _one_launch("Triton linear scan", 3 if x.shape[1] > linear_scan.CHUNK else 1):
        a, x, h0, states = real((a, x, h0, states))
        if reverse:
            states.copy_(scan_loop(a.flip(1), x.flip(1), h0).flip(1))
        else:
            states.copy_(scan_loop(a, x, h0))


class _SelectiveScan:
    """Stands for Triton's selective scan."""

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*given: Any, **_: Any) -> None:
            *inputs, forget, y, last, _, _, _, has_resets, _, _, _ = given
            tensors = [*inputs, y, last, *([forget] if has_resets else [])]
            assert all(t.is_cuda and t.is_contiguous() for t in tensors)
            assert (forget is not None) == has_resets and all(grid)
            with _one_launch("Triton selective scan"):
                inputs, forget, y, last = real((inputs, forget, y, last))
                resets = None if forget is None else forget > 0
                for out, found in zip((y, last), selective_scan_loop(*inputs, resets), strict=True):
                    out.copy_(found)

        return launch


def _module(name: str, **contents: Any) -> Iterator[tuple[str, types.ModuleType]]:
    """Give a module of this name, and its parents."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        module = types.ModuleType(".".join(parts[:depth]))
        module.__spec__, module.__path__ = ModuleSpec(module.__name__, None), []  # type: ignore
        vars(module).update(contents if depth == len(parts) else {})
        yield module.__name__, module


@contextlib.contextmanager
def _imported(names: dict[str, types.ModuleType]) -> Iterator[None]:
    """Let imports find these; what else is imported meanwhile stays, as Triton must."""
    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update(names)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


@contextlib.contextmanager
def pretended_kernels(with_packages: bool = True) -> Iterator[None]:
    """Replace Triton's kernels and, if wanted, put mamba-ssm and causal-conv1d in place."""
    given = {"selective_scan_fn": packages.selective_scan_fn}
    modules = dict(_module("mamba_ssm.ops.selective_scan_interface", **given))
    modules |= dict(_module("causal_conv1d", causal_conv1d_fn=packages.causal_conv1d_fn))
    triton_kernels = types.ModuleType("hooked_hybrid.network.kernels.triton_kernels")
    triton_kernels.selective_scan = _SelectiveScan()  # type: ignore[attr-defined]
    installed = {"mamba_ssm": with_packages, "causal_conv1d": with_packages, "triton": True}
    cached = kernels.importable, kernels._is_capable
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        names = {**modules, triton_kernels.__name__: triton_kernels}
        enter(_imported(names))
        enter(mock.patch.object(kernels, "triton_kernels", triton_kernels, create=True))
        enter(mock.patch.object(kernels, "_is_installed", lambda p: installed.get(p, False)))
        enter(mock.patch.object(linear_scan, "_launch", _launch))
        enter(mock.patch.object(trials, "_found", {}))
        for each in cached:
            each.cache_clear()
        yield
    for each in cached:
        each.cache_clear()
