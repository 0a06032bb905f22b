"""Arithmetic that several layers use: nonlinearities, products, norms and constants."""

from __future__ import annotations

import math
from functools import cache

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from hooked_hybrid.config import Activation
from hooked_hybrid.hooks import transforms

WORTH_SPLITTING = 2**16
"""From this many values on, a function of one argument is computed some rows at a time."""
_n_modes = torch._C._len_torch_dispatch_stack
GELU_ROWS = 32
"""Rows computed together, so that they and a temporary fit a core's cache."""


def activate(x: Tensor, name: Activation, overwrite: bool = False) -> Tensor:
    """Return the nonlinearity of `x`, in place with `overwrite`; gelu is the tanh approximation."""
    if name == "silu":
        return nn.functional.silu(x, inplace=overwrite)
    if x.numel() >= WORTH_SPLITTING and x.device.type == "cpu" and not transforms.is_followed():
        return gelu_tanh_(x if overwrite else x.clone())
    return nn.functional.gelu(x, approximate="tanh")


def gelu_tanh_(x: Tensor) -> Tensor:
    """Return gelu's tanh approximation, in place if the rows of `x` can be viewed.

    It is computed as x sigmoid(2 c (x + 0.044715 x^3)), which equals 0.5 x (1 + tanh(c (x +
    0.044715 x^3))) for c = sqrt(2 / pi); a CPU computes a sigmoid in a third of a tanh's time.
    """
    slope_at_0 = 2 * math.sqrt(2 / math.pi)
    at_0 = constant(slope_at_0, x.dtype, x.device)
    rows = x.reshape(-1, x.shape[-1])  # a copy if a hook returned another layout
    for block in rows.split(GELU_ROWS):
        slope = torch.addcmul(at_0, block, block, value=0.044715 * slope_at_0)
        block.mul_(slope.mul_(block).sigmoid_())
    return rows.view(x.shape)


def times(
    a: Float[Tensor, "*shape"], b: Float[Tensor, "*#shape"], overwrite: bool
) -> Float[Tensor, "*shape"]:
    """Return `a * b`, in the memory of `a` with `overwrite`."""
    return a.mul_(b) if overwrite else a * b


def inverse_rms(x: Float[Tensor, "... width"], eps: float) -> Float[Tensor, "... 1"]:
    """Return 1 / sqrt(mean(x^2) + eps); products with it round as in the references."""
    if transforms.is_followed():
        return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.addcmul(
        constant(eps, x.dtype, x.device), norm, norm, value=1 / x.shape[-1]
    ).rsqrt_()


def constant(value: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, ""]:
    """Return a number as a tensor, which is cached: making one costs more than adding it.

    Inside a transform or a dispatch mode a new tensor is made each time, as it (a fake tensor, say)
    is valid only there; modes with `only_watches` are an exception.
    """
    if transforms.are_active() or (_n_modes() and not _are_only_watching()):
        return torch.tensor(value, dtype=dtype, device=device)
    return _constant(value, dtype, device)


def _are_only_watching() -> bool:
    return all(getattr(m, "only_watches", False) for m in _get_current_dispatch_mode_stack())


@cache
def _constant(value: float, dtype: torch.dtype, device: torch.device) -> Float[Tensor, ""]:
    with torch.inference_mode(False):
        return torch.tensor(value, dtype=dtype, device=device)


def at_least_fp32(x: Tensor) -> Tensor:
    """Return `x` in fp32, or unchanged if it is fp32 or fp64."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()
