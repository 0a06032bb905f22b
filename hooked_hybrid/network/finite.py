"""Whether values are finite, at the price of a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hooked_hybrid.hooks import transforms


def is_finite(*values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, as far as the host can ask.

    By sums, in fp32 or wider: those of huge values may overflow, and then the answer is False. What
    cannot be read (a tensor without memory, anything inside a transform) counts as finite.
    """
    if transforms.are_active():
        return True
    total: Tensor | float = 0.0
    for x in values:
        if not x.is_meta:
            total = total + x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return math.isfinite(float(total))  # a GPU is waited for once


def require_numbers(values: Tensor, what: str) -> None:
    """Refuse to rank values of which some are NaN, which would come first.

    Raises:
        ValueError: with the first index at which one stands.
    """
    if bool((bad := values.isnan()).any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{what}: {int(bad.sum())} of {values.numel()} values are NaN, the first at index "
            f"{at}: there is no order among them"
        )
