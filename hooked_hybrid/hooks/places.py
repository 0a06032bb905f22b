"""The positions of cached values in their documents, and the positions of their keys.

A cache may hold only some positions, rows may be padded, and a run may have continued from a
state. So code that reads a cache by position uses these, and never counts from a tensor's edge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.hooks.slicing import LAST, PosSlice, indices_on, read_indices


@dataclass(frozen=True, eq=False)
class Places:
    """The position of each entry of a value in its document; -1 at padding and unread entries.

    `key_pos` is the position of each key of scores and patterns.
    """

    pos: Int[Tensor, "batch kept"]
    key_pos: Int[Tensor, "batch key"] | None = None

    def of_rows(self, index: Int[Tensor, " row"]) -> Places:
        """Return the places of some rows."""
        keys = None if self.key_pos is None else self.key_pos[index.to(self.key_pos.device)]
        return Places(self.pos[index.to(self.pos.device)], keys)


def last_index(pos: Int[Tensor, "batch kept"], name: str) -> Int[Tensor, "batch 1"]:
    """Return the index of each row's last token among the entries of a value.

    Raises:
        IndexError: a row has no token among them.
    """
    is_real = pos >= 0
    if bool((empty := ~is_real.any(1)).any()):
        row = int(empty.nonzero()[0])
        raise IndexError(f"{name!r} holds no token of row {row}: its last one was not kept")
    index = torch.arange(pos.shape[1], device=pos.device)
    return torch.where(is_real, index, 0).amax(1, keepdim=True)


def take_per_row(x: Tensor, index: Int[Tensor, "batch taken"], dim: int) -> Tensor:
    """Return the entries along an axis at indices that differ between rows."""
    shape = [1] * x.ndim
    shape[0], shape[dim] = index.shape
    size = list(x.shape)
    size[dim] = index.shape[1]
    return x.gather(dim, index.to(x.device).view(shape).expand(size))


def refuse_padding(
    pos: Int[Tensor, "batch taken"], asked: PosSlice, name: str, what: str = "pos_slice"
) -> None:
    """Refuse single positions that are padding in some row; slices and masks may include padding.

    Raises:
        ValueError: names the row, and how to select its last token.
    """
    if bool((at := pos < 0).any()):
        row, _ = at.nonzero()[0].tolist()
        raise ValueError(
            f"{what}={asked!r}: there {name!r} is padding in row {row}. {what}={LAST!r} is each "
            "row's last token; a slice keeps padding too, and cache.attention_mask says where it is"
        )


def names_single_positions(asked: PosSlice) -> bool:
    """Whether a selection lists single positions, rather than a slice or a mask."""
    if asked is None or isinstance(asked, str):
        return False
    read = read_indices(asked, "positions", tuple_is_slice=True)
    return isinstance(read, int) or (isinstance(read, Tensor) and read.dtype != torch.bool)


def check_pos_slice(asked: PosSlice) -> None:
    """Refuse values that cannot select positions, before anything runs.

    Raises:
        TypeError: neither a kind that `slicing.slice_axis` reads nor "last".
    """
    if asked is not None and not (isinstance(asked, str) and asked == LAST):
        read_indices(asked, "positions", tuple_is_slice=True)


def select_positions(
    value: Tensor,
    asked: PosSlice,
    dim: int,
    pos: Int[Tensor, "batch n"] | None,
    name: str,
    *,
    first: int = 0,
    n_pos: int | None = None,
) -> tuple[Tensor, Int[Tensor, "batch kept"] | None]:
    """Return the selected positions of a value, with their places; the axis is kept.

    Args:
        value: a part of a forward's positions, or all.
        asked: the selection, counted in the whole forward.
        dim: the axis of positions.
        pos: in the document, of the part; None if unknown.
        name: of the value, for errors.
        first, n_pos: index of the part's first position in the forward, and the forward's length.

    Raises:
        IndexError: a position outside the forward, or no position of this part.
        TypeError: as `check_pos_slice`.
        ValueError: single positions that are padding in some row.
    """
    n_here = value.shape[dim]
    if isinstance(asked, str) and asked == LAST:
        if pos is None:
            return value.narrow(dim, n_here - 1, 1), None
        index = last_index(pos, name)
        return take_per_row(value, index, dim), pos.gather(1, index)
    whole = first + n_here if n_pos is None else n_pos
    wanted = indices_on(asked, whole, "positions", tuple_is_slice=True) - first
    here = wanted[(wanted >= 0) & (wanted < n_here)]
    if not len(here):
        raise IndexError(
            f"{name!r} was computed at positions {first} to {first + n_here - 1} of {whole}, none "
            f"of them in {asked!r}"
        )
    value = value.index_select(dim, here.to(value.device))
    if pos is None:
        return value, None
    pos = pos.index_select(1, here.to(pos.device))
    if names_single_positions(asked):
        refuse_padding(pos, asked, name)
    return value, pos


def over_all_columns(
    value: Tensor,
    key_pos: Int[Tensor, "batch key"],
    is_token: Bool[Tensor, "batch column"],
    fill: float,
) -> Tensor:
    """Return scores or patterns [batch head query key] with each key in its column of the row.

    Keys are the last ones of each row, padding anywhere among them; so the last tokens among keys
    and among columns are the same.

    Args:
        value: of some queries.
        key_pos: of its keys, -1 at padding.
        is_token: of every column up to the last query's, of those before this forward too.
        fill: the value where a query has no key.
    """
    n_keys = value.shape[-1]
    is_key = key_pos >= 0
    keys = is_key.int().argsort(dim=1, stable=True)[:, None, None].expand_as(value)
    columns = is_token.int().argsort(dim=1, stable=True)[:, is_token.shape[1] - n_keys :]
    value = value.masked_fill(~is_key[:, None, None], fill).gather(-1, keys)
    whole = value.new_full((*value.shape[:3], is_token.shape[1]), fill)
    return whole.scatter(-1, columns[:, None, None].expand_as(value), value)
