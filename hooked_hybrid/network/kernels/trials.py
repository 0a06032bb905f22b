"""Trials of kernels before their first use: one that imports may not run, or may be wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[Sequence[Tensor], Sequence[Tensor]]
"""The results of a kernel and of its definition."""
Trial = Callable[[torch.device, torch.dtype], Pair]
"""Runs a kernel and its definition on small inputs of a dtype on a device."""
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""The largest difference allowed, relative to the largest entry; wrong kernels exceed it by far."""
BOUND_OF_HALF = 0.05


def works(name: str, trial: Trial, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel runs on a GPU and is correct; it is tried once for each dtype.

    A kernel that fails is not used from then on, with a warning.

    Args:
        name: of the kernel, for the warning.
        trial: runs it and its definition; it is called at most once.
        device: kernels run on other devices than CUDA's only in tests, which compare themselves.
        dtype: of the numbers.
    """
    if device.type != "cuda":
        return True
    index = torch.cuda.current_device() if device.index is None else device.index
    key = (name, index, dtype)
    if key not in _found:
        if _cannot_try():
            return False
        _found[key] = _is_right(name, trial, device, dtype)
    return _found[key]


_found: dict[tuple[str, int, torch.dtype], bool] = {}


def _cannot_try() -> bool:
    """Return whether values cannot be read now: in a capture, or with fake tensors."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch.cuda.is_current_stream_capturing() or torch._C._get_dispatch_mode(fake) is not None


def _is_right(name: str, trial: Trial, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            found, expected = trial(device, dtype)
            worst = max(_apart(a, b) for a, b in zip(found, expected, strict=True))
    except torch.OutOfMemoryError:
        raise  # not a fault of the kernel
    except Exception as error:
        why = f"cannot run on {device}: {type(error).__name__}: {error}"
    else:
        if worst <= BOUNDS.get(dtype, BOUND_OF_HALF):
            return True
        why = f"is off by {worst:.1g} of its largest value on {device} in {dtype}"
    warnings.warn(f"{name} {why}; plain torch is used instead", stacklevel=2)
    return False


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry; infinity if a value is NaN."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    apart = float((found - expected).abs().max() / expected.abs().max())
    return apart if apart == apart else float("inf")


def gradients_of(pair: Pair, inputs: Sequence[Tensor]) -> Pair:
    """Return gradients of the inputs, through a kernel and through its definition."""
    found, expected = (
        torch.autograd.grad([t.square().sum() for t in outputs], inputs) for outputs in pair
    )
    return found, expected


def waves(*shape: int, seed: int = 0) -> Tensor:
    """Return fixed numbers between -1 and 1 on the CPU, without using a generator."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (n * (1.7 + 0.3 * seed) + seed).sin().view(shape)
