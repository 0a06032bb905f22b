"""Positions and rows at which a hook acts, read before a run and looked up in each call.

Positions are those of the document, counted from 0, as in `hook.run.query_pos`. A mask of positions
is True at them: [pos] for every row, [batch pos] if rows differ. It must cover all tokens of a
forward or a prefill; tokens generated after its end are not selected.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import Indices, read_indices, whole_numbers
from hooked_hybrid.interventions.rows import entries_of_rows

Positions = Indices
Chosen = tuple[int, ...] | Bool[Tensor, "*batch pos"]
"""Indices, or a mask."""


def read_positions(positions: Positions | None, what: str = "positions") -> Chosen | None:
    """Return positions as a tuple, or as a copied mask; None is returned unchanged.

    Raises:
        ValueError: no entry, one that is not a whole number from 0 on, or a mask with other axes.
    """
    if positions is None:
        return None
    mask = _as_mask(positions, what)
    if mask is None:
        return whole_numbers(positions, what)
    if mask.ndim > 2 or not bool(mask.any()):
        raise ValueError(
            f"{what} of shape {tuple(mask.shape)}: a mask is [pos] or [batch pos], with one True"
        )
    return mask


def read_rows(rows: Indices | None, what: str = "rows") -> Chosen | None:
    """Return rows of the original batch as a tuple, or as a mask [batch]; None unchanged.

    Raises:
        ValueError: no entry, one that is not a whole number from 0 on, or a mask with other axes.
    """
    chosen = read_positions(rows, what)
    if isinstance(chosen, Tensor) and chosen.ndim != 1:
        raise ValueError(f"{what} of shape {tuple(chosen.shape)}: a mask of rows is [batch]")
    return chosen


def marks_of(chosen: Chosen) -> tuple[int, ...]:
    """Return every position selected in any row, at which a scan of states must stop."""
    if isinstance(chosen, tuple):
        return chosen
    return tuple(chosen.view(-1, chosen.shape[-1]).any(dim=0).nonzero()[:, 0].tolist())


def is_among(
    pos: Int[Tensor, "batch n"], chosen: Chosen | None, hook: HookPoint
) -> Bool[Tensor, "batch n"]:
    """Return True at the tokens at the selected positions.

    Raises:
        ValueError: a mask for another number of rows, or one that ends before the last token.
    """
    if isinstance(chosen, Tensor) and chosen.ndim == 2:
        row = index_of_rows(chosen.shape[0], "the mask of positions", hook)
        chosen = chosen.to(row.device)[row]
    return at_positions(pos, chosen, may_pass_the_end=hook.run.stage == "generation")


def at_positions(
    pos: Int[Tensor, "batch n"], chosen: Chosen | None, may_pass_the_end: bool = False
) -> Bool[Tensor, "batch n"]:
    """Return True where `pos` is a selected position; a mask has the rows of `pos`.

    Raises:
        ValueError: a mask that ends before the positions do, unless that is allowed.
    """
    if chosen is None:
        return pos >= 0
    if isinstance(chosen, tuple):
        return torch.isin(pos, torch.tensor(chosen, dtype=pos.dtype, device=pos.device))
    n = chosen.shape[-1]
    if not may_pass_the_end and bool((pos >= n).any()):
        raise ValueError(f"the mask of positions has {n}, and position {int(pos.max())} is read")
    mask = chosen.to(pos.device).expand(pos.shape[0], n)
    return mask.gather(1, pos.clamp(0, n - 1)) & (pos >= 0) & (pos < n)


def is_of_rows(chosen: Chosen, hook: HookPoint) -> Bool[Tensor, " row"]:
    """Return True at the selected rows of this forward.

    Raises:
        ValueError: a row that the batch does not have, or a mask of another number of rows.
    """
    run = hook.run
    if isinstance(chosen, Tensor):
        return entries_of_rows(chosen, hook, "the mask of rows")
    n_rows = run.n_rows
    if n_rows is None and run.step == 0:
        n_rows = int(run.rows.max()) + 1
    if n_rows is not None and max(chosen) >= n_rows:
        raise ValueError(f"rows {chosen}: the batch has {n_rows} rows, from 0")
    return torch.isin(run.rows, torch.tensor(chosen, dtype=run.rows.dtype, device=run.rows.device))


def index_of_rows(n: int, what: str, hook: HookPoint) -> Int[Tensor, " row"]:
    """Return the index of each row of this forward among `n` entries, one for each original row.

    Raises:
        ValueError: the batch has another number of rows.
    """
    return entries_of_rows(torch.arange(n), hook, what)


def _as_mask(given: Any, what: str) -> Tensor | None:
    """Return a mask as a copied tensor, and None for indices."""
    if hasattr(given, "dtype") and hasattr(given, "shape"):
        given = torch.as_tensor(given)
        return given.clone() if given.dtype == torch.bool and given.ndim else None
    if isinstance(given, (list, tuple)) and given and isinstance(given[0], (list, tuple)):
        nested = torch.as_tensor(given)
        if nested.dtype != torch.bool:
            raise ValueError(f"{what} {given}: rows that differ are given as a mask [batch pos]")
        return nested
    if isinstance(given, (list, tuple)):
        try:
            read = read_indices(given, what)
        except TypeError:
            return None
        return read if isinstance(read, Tensor) and read.dtype == torch.bool else None
    return None
