"""How weights lie in memory: shapes, names and values are not affected."""

from __future__ import annotations

import torch
from torch import Tensor

NARROW = 2
"""Bytes of a number up to which a weight lies as `torch.nn.Linear` would have it."""


def laid_out(weight: Tensor) -> Tensor:
    """Return a weight [... d_out d_in] laid out as it is read fastest; itself where it is already.

    One token reads a weight once, and how fast depends on which axis is contiguous: in fp32 on a
    CPU a wide output from few inputs is read up to twice as fast along the outputs, a wide input
    along the inputs (long inputs do not care). In 16 bits, a CPU without instructions for them
    reads along the inputs 10 to 30 times as fast as along the outputs.
    """
    d_out, d_in = weight.shape[-2:]
    if d_out > d_in and weight.itemsize > NARROW:
        return weight.mT.contiguous().mT
    return weight.contiguous()


def empty_weight(*shape: int) -> Tensor:
    """Return an empty weight [... d_out d_in] in torch's default dtype, laid out so."""
    return laid_out(torch.empty(shape))
