"""Reading positions, rows and other indices along an axis, and selecting with them.

Every selection in the library is read here: an int; a slice; a list, range, numpy array or tensor
of indices; a boolean list, array or tensor, which is a mask and never the indices 0 and 1.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

LAST = "last"
"""As a `pos_slice`: each row's last token, on whichever side its padding is."""
PosSlice = int | slice | str | tuple[int, ...] | Sequence[int] | Tensor | Any | None
Indices = int | slice | Iterable[int] | Iterable[bool] | Tensor | Any
"""A selection of several indices. (Any: a numpy array; numpy is not imported for its type.)"""
Read = int | slice | Int[Tensor, " index"] | Bool[Tensor, " axis"]


def read_indices(given: Any, what: str, *, tuple_is_slice: bool = False) -> Read:
    """Return a selection as an index, a slice, a tensor of indices or a mask.

    Args:
        given: what a caller chose.
        what: the name of the indices in errors, such as "positions".
        tuple_is_slice: whether a tuple is `(start, stop)` or `(start, stop, step)`, as in
            TransformerLens, and not several indices.

    Raises:
        TypeError: fractions, one True or False, several axes, or another type.
    """
    if tuple_is_slice and isinstance(given, tuple):
        if not 1 <= len(given) <= 3:
            raise TypeError(f"{what} {given!r}: a tuple is (start, stop) or (start, stop, step)")
        given = slice(*given)
    if isinstance(given, slice):
        return _read_slice(given, what)
    if isinstance(given, str) or not (hasattr(given, "__index__") or isinstance(given, Iterable)):
        raise TypeError(f"{what} {given!r}: {_KINDS}")
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        return _read_tensor(torch.as_tensor(given), given, what)
    if not isinstance(given, Iterable):
        return _whole(given, given, what)
    several = list(given)
    if several and all(_is_flag(i) for i in several):
        return torch.tensor([bool(i) for i in several])
    return torch.tensor([_whole(i, several, what) for i in several], dtype=torch.long)


def whole_numbers(given: Indices, what: str) -> tuple[int, ...]:
    """Return indices from 0 on, of an axis whose length is not known yet, as a tuple.

    A mask has its own length and is not read here: see `interventions.places`.

    Raises:
        ValueError: no index, or one that is negative, a fraction, or True or False.
    """
    found: tuple[int, ...] = ()
    try:
        read = read_indices(given, what)
        if isinstance(read, int):
            found = (read,)
        elif isinstance(read, slice):
            found = _bounded(read, given, what)
        elif read.dtype != torch.bool:
            found = tuple(read.tolist())
    except TypeError:
        pass
    if not found or min(found) < 0:
        shown = tuple(given) if isinstance(given, Iterable) else (given,)
        raise ValueError(f"{what} {shown}: give one or more whole numbers, counted from 0")
    return found


def indices_on(
    given: Any,
    length: int,
    what: str,
    *,
    tuple_is_slice: bool = False,
    may_be_empty: bool = False,
) -> Int[Tensor, " index"]:
    """Return the indices chosen on an axis of a known length; negative ones count from its end.

    Raises:
        IndexError: an index outside, a mask of another length, or (unless allowed) nothing.
        TypeError: as `read_indices`.
    """
    read = read_indices(given, what, tuple_is_slice=tuple_is_slice)
    if isinstance(read, int):
        read = torch.tensor([read])
    if isinstance(read, slice):
        index = torch.arange(length)[read]
    elif read.dtype == torch.bool:
        if len(read) != length:
            raise IndexError(f"a mask of {len(read)} {what} for the {length} {what} there are")
        index = read.nonzero()[:, 0]
    else:
        index = read
        if bool(((index < -length) | (index >= length)).any()):
            shown = index.tolist() if len(index) > 1 else index.item()
            raise IndexError(f"{what} {shown}: outside the {length} {what} there are")
        index = index % length
    if not len(index) and not may_be_empty:
        raise IndexError(f"{what} {given!r}: none of the {length} {what} there are")
    return index


def slice_axis(x: Tensor, selection: PosSlice, dim: int, what: str = "positions") -> Tensor:
    """Return `x` with one axis reduced to a selection.

    Args:
        x: any tensor.
        selection: an int (the axis is removed), a slice, a tuple `(start, stop)` or
            `(start, stop, step)`, a list, array or tensor of indices, a mask as long as the axis,
            or None for all.
        dim: the axis.
        what: the name of the indices in errors.

    Raises:
        IndexError: an index outside the axis, a mask of another length, or nothing; the message
            gives its length.
        TypeError: a selection of another kind.
    """
    if selection is None:
        return x
    dim = dim % x.ndim
    read = read_indices(selection, what, tuple_is_slice=True)
    index = indices_on(read, x.shape[dim], what)
    if isinstance(read, int):
        return x.select(dim, int(index))
    if isinstance(read, slice):
        return x[(slice(None),) * dim + (read,)]
    return x.index_select(dim, index.to(x.device))


def is_one(selection: PosSlice) -> bool:
    """Whether a selection is a single index, which removes the axis."""
    if selection is None or isinstance(selection, str):
        return False
    return isinstance(read_indices(selection, "selection", tuple_is_slice=True), int)


_KINDS = "give an int, a slice, indices in a list, array or tensor, or a mask of True and False"


def _is_flag(x: Any) -> bool:
    return isinstance(x, bool) or str(getattr(x, "dtype", "")) in ("bool", "torch.bool")


def _whole(x: Any, given: Any, what: str) -> int:
    """Return a whole number; True, which Python counts as 1, is refused."""
    if _is_flag(x) or not hasattr(x, "__index__"):
        raise TypeError(f"{what} {given!r}: {_KINDS}")
    try:
        return operator.index(x)
    except TypeError as error:  # a tensor of several or of fractions
        raise TypeError(f"{what} {given!r}: {_KINDS}") from error


def _read_tensor(x: Tensor, given: Any, what: str) -> Read:
    if x.is_floating_point() or x.is_complex() or x.ndim > 1 or (_is_flag(x) and x.ndim == 0):
        shown = f"of shape {tuple(x.shape)} and {x.dtype}" if x.ndim else repr(given)
        raise TypeError(f"{what} {shown}: {_KINDS}")
    return int(x) if x.ndim == 0 else x if x.dtype == torch.bool else x.long()


def _read_slice(given: slice, what: str) -> slice:
    ends = [
        None if end is None else _whole(end, given, what)
        for end in (given.start, given.stop, given.step)
    ]
    if ends[2] is not None and ends[2] < 1:
        raise TypeError(f"{what} {given!r}: a step is 1 or more")
    return slice(*ends)


def _bounded(read: slice, given: Any, what: str) -> tuple[int, ...]:
    """Return the indices of a slice that states its end."""
    if read.stop is None or read.stop < 0 or (read.start or 0) < 0:
        raise ValueError(f"{what} {given!r}: counted from 0, and with an end, as none is known")
    return tuple(range(read.start or 0, read.stop, read.step or 1))
