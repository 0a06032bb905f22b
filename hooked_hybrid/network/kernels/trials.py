"""A kernel is tried before it is first used: it may import, and still not run, or be wrong."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Pair = tuple[Sequence[Tensor], Sequence[Tensor]]
"""What a kernel and its definition give."""
Trial = Callable[[torch.device, torch.dtype], Pair]
"""Gives what a kernel and its definition compute on a device from small inputs of a dtype."""
BOUNDS = {torch.float64: 1e-8, torch.float32: 1e-3}
"""How far a kernel may be from its definition, over the largest entry: wrong ones are far off."""
BOUND_OF_HALF = 0.05


def works(name: str, trial: Trial, device: torch.device, dtype: torch.dtype) -> bool:
    """Return whether a kernel runs on a GPU and gives what it should, tried once for each dtype.

    One that does not is left out from then on, which a warning says.

    Args:
        name: of the kernel, for the warning.
        trial: runs it and its definition; it is called at most once.
        device: on others than CUDA's, kernels run in tests alone, which compare for themselves.
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
    """Return whether values cannot be read now: in a capture, or where tensors are fake ones."""
    fake = torch._C._TorchDispatchModeKey.FAKE
    return torch.cuda.is_current_stream_capturing() or torch._C._get_dispatch_mode(fake) is not None


def _is_right(name: str, trial: Trial, device: torch.device, dtype: torch.dtype) -> bool:
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            found, expected = trial(device, dtype)
            worst = max(_apart(a, b) for a, b in zip(found, expected, strict=True))
    except torch.OutOfMemoryError:
        raise  # says nothing of the kernel
    except Exception as error:
        why = f"cannot run on {device}: {type(error).__name__}: {error}"
    else:
        if worst <= BOUNDS.get(dtype, BOUND_OF_HALF):
            return True
        why = f"is off by {worst:.1g} of its largest value on {device} in {dtype}"
    warnings.warn(f"{name} {why}; plain torch is used instead", stacklevel=2)
    return False


def _apart(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference over the largest entry; infinity where one is not a number."""
    if found.shape != expected.shape:
        return float("inf")
    found, expected = found.detach().double(), expected.detach().double()
    apart = float((found - expected).abs().max() / expected.abs().max())
    return apart if apart == apart else float("inf")


def gradients_of(pair: Pair, inputs: Sequence[Tensor]) -> Pair:
    """Return gradients by the inputs, through a kernel and through its definition."""
    found, expected = (
        torch.autograd.grad([t.square().sum() for t in outputs], inputs) for outputs in pair
    )
    return found, expected


def waves(*shape: int, seed: int = 0) -> Tensor:
    """Return numbers between -1 and 1 on the CPU, always the same: no generator is touched."""
    n = torch.arange(torch.Size(shape).numel(), dtype=torch.float64)
    return (n * (1.7 + 0.3 * seed) + seed).sin().view(shape)
