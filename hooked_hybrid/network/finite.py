"""Whether values are finite, for the cost of a sum."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hooked_hybrid.hooks import transforms


def is_finite(*values: Tensor) -> bool:
    """Return whether no value is NaN or infinite, as far as the host can read them.

    It sums in fp32 or wider. The sum of very large values may overflow; the result is then False.
    Tensors that cannot be read (without memory, or inside a transform) count as finite.
    """
    if transforms.are_active():
        return True
    total: Tensor | float = 0.0
    for x in values:
        if not x.is_meta:
            total = total + x.detach().sum(dtype=torch.promote_types(x.dtype, torch.float32))
    return math.isfinite(float(total))  # the host waits for a GPU once


def require_numbers(values: Tensor, what: str) -> None:
    """Refuse to rank values if some are NaN, as NaN would come first.

    Raises:
        ValueError: names the index of the first NaN.
    """
    if bool((bad := values.isnan()).any()):
        at = tuple(bad.nonzero()[0].tolist())
        raise ValueError(
            f"{what}: {int(bad.sum())} of {values.numel()} values are NaN, the first at index "
            f"{at}: there is no order among them"
        )
