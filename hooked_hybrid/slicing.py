"""Selecting along one axis: ints, slices, `(start, stop)` tuples and lists of indices."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PosSlice = int | slice | tuple[int, ...] | Sequence[int] | Tensor | None


def slice_axis(x: Tensor, selection: PosSlice, dim: int) -> Tensor:
    """Return `x` with one axis reduced to a selection.

    Args:
        x: any tensor.
        selection: an int (the axis is removed), a slice, a tuple `(start, stop)` or
            `(start, stop, step)`, a list or integer tensor of indices, or None for all.
        dim: the axis.

    Raises:
        IndexError: an index outside the axis; the message gives its length.
        TypeError: a selection of another kind.
    """
    if selection is None:
        return x
    dim = dim % x.ndim
    length = x.shape[dim]
    if isinstance(selection, int) and not isinstance(selection, bool):
        if not -length <= selection < length:
            raise IndexError(f"position {selection} is outside the {length} positions there are")
        return x.select(dim, selection)
    if isinstance(selection, tuple):
        selection = slice(*selection)
    if isinstance(selection, slice):
        return x[(slice(None),) * dim + (selection,)]
    if not isinstance(selection, (list, Tensor, range)):
        raise TypeError(f"select positions with an int, slice, tuple or list, not {selection!r}")
    index = torch.as_tensor(list(selection), device=x.device)
    if index.numel() and not (-length <= int(index.min()) and int(index.max()) < length):
        raise IndexError(f"positions {list(selection)} reach outside the {length} there are")
    return x.index_select(dim, index % length)
