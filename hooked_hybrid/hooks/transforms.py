"""Whether autograd, torch.func or forward-mode derivatives trace a computation.

Under a transform of `torch.func` (`grad`, `vjp`, `jvp`, `jacrev`, `jacfwd`, `hessian`, `vmap`) and
under forward-mode derivatives a model runs by its definitions: attention with all scores, scans
one step at a time, every expert on every token. torch can transform these operations, and none of
them reads the value of a tensor.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch
_in_functorch = torch._C._are_functorch_transforms_active


def are_active() -> bool:
    """Return whether a transform of `torch.func`, or a forward-mode derivative, is active."""
    return _in_functorch() or forward_ad._current_level >= 0


def is_followed() -> bool:
    """Return whether autograd or a transform may need every value; then none may be overwritten."""
    return torch.is_grad_enabled() or _in_functorch() or forward_ad._current_level >= 0


def refuse(what: str) -> None:
    """Raise inside a transform.

    Args:
        what: the start of the error message, such as "generate cannot run".

    Raises:
        RuntimeError: a transform is active.
    """
    if are_active():
        raise RuntimeError(
            f"{what} inside a transform of torch.func (or a forward-mode derivative): call it "
            "outside, or transform a plain forward"
        )


def plain_rows(x: Tensor) -> Tensor:
    """Return the values [row ...] of `x` [batch ...], of all samples where `vmap` maps over it.

    For checks: `vmap` hides the values of what it maps over.
    """
    if torch.compiler.is_compiling() or not _in_functorch():
        return x
    n_mapped = 0
    while _functorch.is_functorch_wrapped_tensor(x):
        dim = _functorch.maybe_get_bdim(x) if _functorch.is_batchedtensor(x) else -1
        x = _functorch.get_unwrapped(x)
        if dim >= 0:
            n_mapped, x = n_mapped + 1, x.movedim(dim, 0)
    return x.flatten(0, n_mapped) if n_mapped else x
