"""Products with weights, in fp32 if the CPU has no 16-bit instructions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

MANY = 16
"""From this many rows on, products in fp32 are faster although the weight is converted."""
_PLAIN = (Tensor, nn.Parameter)


def linear(
    x: Float[Tensor, "*row d_in"],
    weight: Float[Tensor, "d_out d_in"],
    bias: Float[Tensor, " d_out"] | None = None,
) -> Float[Tensor, "*row d_out"]:
    """Return `x @ weight.T + bias`.

    A 16-bit product sums in fp32 and rounds once. On a CPU without 16-bit instructions torch does
    this number by number; there, products of many rows are computed in fp32 and rounded once, which
    gives the same except for sums at a rounding boundary. This is not done if a gradient may be
    needed, as the graph would keep each weight in fp32.
    """
    if weight.dtype in _slow_dtypes() and _is_widened(x, weight):
        wide = functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
        return wide.to(x.dtype)
    return functional.linear(x, weight, bias)


def _is_widened(x: Tensor, weight: Tensor) -> bool:
    return (
        x.is_cpu
        and type(weight) in _PLAIN  # quantised weights have products of their own
        and x.shape[:-1].numel() >= MANY
        and not torch.is_grad_enabled()
    )


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """Return the dtype in which `torch.autocast` multiplies on a device now; None without it."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def in_own_dtype(device: torch.device) -> AbstractContextManager[Any]:
    """Return a context in which products keep the dtype of their factors."""
    if autocast_dtype(device) is None:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


@cache
def _slow_dtypes() -> frozenset[torch.dtype]:
    """Return the 16-bit dtypes for which this CPU has no fast product."""
    has = {
        torch.bfloat16: getattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None),
        torch.float16: getattr(torch.ops.mkldnn, "_is_mkldnn_fp16_supported", None),
    }
    return frozenset(dtype for dtype, asked in has.items() if asked is not None and not asked())
