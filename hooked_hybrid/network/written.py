"""What a mixer or an MLP writes to the residual stream, as parts that act apart."""

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
    """One way to find parts of a write: which values at hook points, and what they go through.

    `values` makes [*batch_pos part inner] of them. They are the writes themselves, or what
    `weight` [part inner d_model] turns into them. A mixer or an MLP names hook points as they are
    called in its block.
    """

    names: tuple[str, ...]
    values: Callable[..., Tensor]
    weight: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Split:
    """A write as `n` parts, with all ways to them, the best first.

    `bias` is what is written beside these parts, the same at every position.
    """

    n: int
    ways: tuple[Way, ...]
    bias: Float[Tensor, " d_model"] | None = None


def as_they_are(x: Tensor) -> Tensor:
    """Return values that are parts already."""
    return x


def weigh(norm: RMSNorm, normalized: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a norm gives for values it has divided by their scale, rounded as it rounds."""
    weight = norm.weight.to(normalized.device)
    if norm.adds_one:
        return torch.addcmul(normalized, normalized, at_least_fp32(weight)).to(dtype)
    return normalized.to(dtype) * weight
