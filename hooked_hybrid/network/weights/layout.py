"""The memory layout of weights; shapes, names and values do not depend on it."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 2
"""Weights of numbers with up to this many bytes have the layout of `torch.nn.Linear`."""


def laid_out(weight: Tensor) -> Tensor:
    """Return a weight [... d_out d_in] in the layout that is read fastest; unchanged if it has it.

    For one token the time to read a weight depends on its contiguous axis. In fp32 on a CPU, a
    weight with many outputs and few inputs is read up to twice as fast along the outputs, one with
    many inputs along the inputs (for long sequences it does not matter). In 16 bits, a CPU without
    instructions for them reads 10 to 30 times as fast along the inputs as along the outputs.
    """
    d_out, d_in = weight.shape[-2:]
    if d_out > d_in and weight.itemsize > NARROW:
        return weight.mT.contiguous().mT
    return weight.contiguous()


def empty_weight(*shape: int) -> Tensor:
    """Return an empty weight [... d_out d_in] in torch's default dtype and this layout."""
    return laid_out(torch.empty(shape))
