"""Values of another run (the donor), looked up by row and position in the document."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.savers import fill_of
from hooked_hybrid.interventions.places import index_of_rows
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.network.layout import lay_out


def read_kept(cache: Mapping[Any, Tensor], key: Any) -> tuple[Tensor, Places | None]:
    """Return a value with a batch axis, and the positions of its entries if recorded."""
    value: Tensor = cache[key]
    if not isinstance(cache, ActivationCache):
        return value, getattr(cache, "places", {}).get(key)
    places = cache.places.get(cache.full_name(key))
    return (value if cache.has_batch_dim else value[None]), places


def mask_of(
    value: Tensor, attention_mask: Tensor | None, places: Places | None
) -> Int[Tensor, "batch pos"] | None:
    """Return the padding of a cached value [batch pos ...], or None without padding.

    Raises:
        ValueError: the mask is not that of the value's run.
    """
    if places is None:
        return attention_mask
    own = (places.pos >= 0).long()
    if attention_mask is not None and not _agree(own, attention_mask):
        raise ValueError(
            f"attention_mask {tuple(attention_mask.shape)} is not that of the run whose values "
            f"these are {tuple(value.shape)}: leave it out, the cache holds its own"
        )
    return None if bool(own.all()) else own


def _agree(own: Tensor, given: Tensor) -> bool:
    return own.shape == given.shape and bool(((given > 0) == (own > 0).to(given.device)).all())


@dataclass(frozen=True, eq=False)
class Donor:
    """The values of another run at one hook point. Without places they begin at position 0."""

    value: Tensor
    places: Places | None = None

    @classmethod
    def of(
        cls,
        value: Tensor,
        attention_mask: Tensor | None = None,
        places: Places | None = None,
    ) -> Donor:
        """Return the donor of a value [batch pos ...] or [batch head query key].

        Raises:
            ValueError: an invalid mask, or one of another run; a packed donor.
        """
        if attention_mask is not None:
            pos = lay_out(attention_mask, None, attention_mask, None).pos
            mask_of(value, attention_mask, places)
            places = Places(pos, pos) if places is None else places
        donor = cls(value, places)
        _ = donor._query_table  # raises for packed rows
        return donor

    def at(self, value: Tensor, wanted: Bool[Tensor, "batch pos"], hook: HookPoint) -> Tensor:
        """Return the donor's values at the rows and positions of `value`, in its shape.

        Args:
            value: the value passed to a hook.
            wanted: where the result is used; it is arbitrary elsewhere.
            hook: the hook point.

        Raises:
            ValueError: the donor has another shape or dtype, or lacks a row or position.
        """
        donor, pos = self.value.to(value.device), hook.run.query_pos
        n_pos, n_keys = self._checked_lengths(value, hook)
        if self.places is None:
            self._refuse_columns(n_pos, hook)
        row = torch.zeros_like(hook.run.rows)
        if donor.shape[0] > 1:
            row = index_of_rows(donor.shape[0], f"the donor of {hook.name!r}", hook)
        query = _found(self._query_table, n_pos, row, pos)
        if bool((missing := wanted & (query < 0)).any()):
            i, t = missing.nonzero()[0].tolist()
            n_has = n_pos if self.places is None else int((self.places.pos[int(row[i])] >= 0).sum())
            raise ValueError(
                f"the donor of {hook.name!r} has {n_has} positions for row "
                f"{int(hook.run.rows[i])}, none for position {int(pos[i, t])}; say which to "
                "replace with patch(positions=...)"
            )
        query = query.clamp_min(0)
        if n_keys is None:
            return donor[row[:, None], query]
        assert hook.run.key_pos is not None
        key = _found(self._key_table, n_keys, row, hook.run.key_pos)[:, None, None]
        picked = donor[row[:, None], :, query].transpose(1, 2)
        picked = picked.gather(-1, key.clamp_min(0).expand(*picked.shape[:3], -1))
        return picked.masked_fill(key < 0, fill_of(hook, picked.dtype))

    def _refuse_columns(self, n_pos: int, hook: HookPoint) -> None:
        """Refuse a donor made by hand that may be padded on the left like this run."""
        run = hook.run
        n_columns = run.query_pos.shape[1] if run.n_pos is None else run.n_pos
        if run.first or self.value.shape[0] < 2 or n_pos != n_columns:
            return
        if bool((run.query_pos[:, 0] < 0).any()):
            raise ValueError(
                f"the donor of {hook.name!r} was made by hand and has {n_pos} positions, as many "
                "as there are columns of this run, whose rows are padded on the left: whether it "
                "is padded too is not known. Give a cache as it came, or attention_mask= of the "
                "donor's run (ones where nothing is padded)"
            )

    @cached_property
    def _query_table(self) -> Int[Tensor, "donor_batch position"] | None:
        return None if self.places is None else _table(self.places.pos, "positions")

    @cached_property
    def _key_table(self) -> Int[Tensor, "donor_batch position"] | None:
        if self.places is None or self.places.key_pos is None:
            return None
        return _table(self.places.key_pos, "keys")

    def _checked_lengths(self, value: Tensor, hook: HookPoint) -> tuple[int, int | None]:
        """Return the numbers of positions and keys, after checking all else against `value`."""
        mine = self.value
        free = {0} | {hook.axes.index(a) for a in ("pos", "query", "key") if a in hook.axes}
        fits = mine.ndim == value.ndim and mine.dtype == value.dtype
        if not fits or any(mine.shape[i] != n for i, n in enumerate(value.shape) if i not in free):
            raise ValueError(
                f"the donor of {hook.name!r} has shape {tuple(mine.shape)} and {mine.dtype}, the "
                f"value it would replace {tuple(value.shape)} and {value.dtype}: they may differ "
                "in batch and positions only"
            )
        n_pos, n_keys = mine.shape[hook.pos_dim], mine.shape[-1] if "key" in hook.axes else None
        if n_keys is not None and self.places is None and n_keys != n_pos:
            raise ValueError(
                f"the donor of {hook.name!r} has {n_pos} queries and {n_keys} keys: give "
                "a run from position 0 on, if there are as many"
            )
        if self.places is not None and self.places.pos.shape != (mine.shape[0], n_pos):
            raise ValueError(
                f"attention_mask has shape {tuple(self.places.pos.shape)}, the donor of "
                f"{hook.name!r} has {mine.shape[0]} rows of {n_pos} positions"
            )
        return n_pos, n_keys


def _table(pos: Int[Tensor, "batch kept"], what: str) -> Int[Tensor, "batch position"]:
    """Return the index of the entry at each position, -1 if there is none."""
    batch, n = pos.shape
    size = max(int(pos.max()), 0) + 1
    at = torch.where(pos >= 0, pos, size)  # padding goes to an extra column
    counts = pos.new_zeros(batch, size + 1).scatter_add(1, at, torch.ones_like(at))
    if bool((counts[:, :size] > 1).any()):
        row, position = (counts[:, :size] > 1).nonzero()[0].tolist()
        raise ValueError(
            f"row {row} of the donor has {what} {position} twice: it is packed, or positions were "
            "kept twice; give a run of one document in each row"
        )
    index = torch.arange(n, device=pos.device).expand(batch, -1)
    return pos.new_full((batch, size + 1), -1).scatter(1, at, index)[:, :size]


def _found(table: Tensor | None, n: int, row: Tensor, pos: Tensor) -> Int[Tensor, "row n"]:
    """Return the index of each position in the donor's rows, -1 if it is missing."""
    if table is None:
        return torch.where(pos < n, pos, -1)
    table = table.to(pos.device)
    found = table[row[:, None], pos.clamp(0, table.shape[1] - 1)]
    return found.masked_fill((pos < 0) | (pos >= table.shape[1]), -1)
