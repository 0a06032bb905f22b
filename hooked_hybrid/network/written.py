"""The output of a mixer or an MLP as a sum of separate parts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import RMSNorm


@dataclass(frozen=True)
class Way:
    """One way to compute the parts of an output: values at hook points, and a map from them.

    `values` maps the values at the hook points to [*batch_pos part inner]. These are the parts, or
    `weight` [part inner d_model] maps them to the parts. Hook points are named as in the block.
    """

    names: tuple[str, ...]
    values: Callable[..., Tensor]
    weight: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """An output as `n` parts, with all ways to compute them, the best first.

    `bias` is the rest of the output, the same at every position.
    """

    n: int
    ways: tuple[Way, ...]
    bias: Float[Tensor, " d_model"] | None = None


def as_they_are(x: Tensor) -> Tensor:
    """Return the values, which are the parts themselves."""
    return x


def weigh(norm: RMSNorm, normalized: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a norm's output for values already divided by their scale, with its rounding."""
    weight = norm.weight.to(normalized.device)
    if norm.adds_one:
        return torch.addcmul(normalized, normalized, at_least_fp32(weight)).to(dtype)
    return normalized.to(dtype) * weight
