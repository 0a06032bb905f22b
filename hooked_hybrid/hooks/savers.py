"""The hooks of `run_with_cache`: watchers that put values and gradients into a dict."""

from __future__ import annotations

from collections.abc import MutableMapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.places import (
    Places,
    check_pos_slice,
    names_single_positions,
    over_all_columns,
    refuse_padding,
    select_positions,
    take_per_row,
)
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import LAST, PosSlice, indices_on


class KeptValues(dict[str, Tensor]):
    """Values by full name, and the places of their entries."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[str, Places] = {}


class Saver:
    """Keeps whole values without copying them, or a copy of selected positions.

    `places` holds the places of the entries of each kept value, if the forward has positions.
    """

    def __init__(
        self,
        cache: MutableMapping[str, Tensor],
        pos_slice: PosSlice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
    ) -> None:
        check_pos_slice(pos_slice)
        self.cache, self.pos_slice = cache, pos_slice
        self.device, self.remove_batch_dim = device, remove_batch_dim
        self.places: dict[str, Places] = getattr(cache, "places", {})

    @watcher
    def save(self, value: Tensor, hook: HookPoint) -> None:
        """Keep a value."""
        self._keep(str(hook.name), value, hook)

    @watcher
    def save_grad(self, grad: Tensor, hook: HookPoint) -> None:
        """Keep a gradient."""
        self._keep(f"{hook.name}_grad", grad, hook)

    def finish(self) -> None:
        """Complete the dict after the forward."""

    def own(self, *others: Any) -> None:
        """Copy values that share memory with another kept value, or with a tensor of `others`."""
        if transforms.are_active():  # their tensors have no memory to compare
            return
        taken = {t.untyped_storage().data_ptr() for t in _tensors(others)} - {0}
        for name, value in self.cache.items():
            at = value.untyped_storage().data_ptr()
            if at in taken:
                self.cache[name] = value.clone()
            elif at:
                taken.add(at)

    def _keep(self, name: str, value: Tensor, hook: HookPoint) -> None:
        value, run = value.detach(), hook.run_or_none
        pos = None if run is None else run.query_pos
        if self.pos_slice is not None:
            first, n_pos = (0, None) if run is None else (run.first, run.n_pos)
            value, pos = select_positions(
                value, self.pos_slice, hook.pos_dim, pos, name, first=first, n_pos=n_pos
            )
        if run is not None and pos is not None:
            self.places[name] = Places(pos, run.key_pos)
        self._put(name, value)

    def _put(self, name: str, value: Tensor) -> None:
        """Keep a value with the selected positions, on the given device."""
        if self.remove_batch_dim:
            if value.shape[0] != 1:
                raise ValueError(f"remove_batch_dim needs one row; {name!r} has {value.shape[0]}")
            value = value[0]
        self.cache[name] = value if self.device is None else value.to(self.device)


class CopyingSaver(Saver):
    """Keeps copies, as hooks attached later may edit the values in place."""

    def _put(self, name: str, value: Tensor) -> None:
        super()._put(name, value.clone() if self.pos_slice is None else value)


@dataclass
class _Pieces:
    """The pieces of one point kept so far, and the places of all positions."""

    values: list[Tensor] = field(default_factory=list)
    columns: list[int] = field(default_factory=list)
    pos: list[Tensor] = field(default_factory=list)
    seen: list[Tensor] = field(default_factory=list)
    n_pos: int = 0


class PieceSaver(Saver):
    """Keeps some positions of values that arrive in pieces; the other positions are not stored.

    For forwards without a state and without packed documents.
    """

    def __init__(
        self,
        cache: MutableMapping[str, Tensor],
        pos_slice: PosSlice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
    ) -> None:
        super().__init__(cache, pos_slice, device, remove_batch_dim)
        self.of: dict[HookPoint, _Pieces] = {}
        self.is_last = isinstance(pos_slice, str) and pos_slice == LAST
        self.are_single = names_single_positions(pos_slice)

    @watcher
    @per_position
    def save(self, value: Tensor, hook: HookPoint) -> None:
        """Keep the selected positions of a piece."""
        run, dim = hook.run, hook.pos_dim
        mine = self.of.setdefault(hook, _Pieces())
        mine.n_pos = run.first + value.shape[dim] if run.n_pos is None else run.n_pos
        mine.seen.append(run.query_pos)
        value = value.detach()
        if self.is_last:
            self._keep_last(value, hook, mine)
            return
        asked = indices_on(self.pos_slice, mine.n_pos, "positions", tuple_is_slice=True)
        here = asked[(asked >= run.first) & (asked < run.first + value.shape[dim])].unique()
        if not len(here) and mine.values:
            return
        pos = run.query_pos.index_select(1, (here - run.first).to(run.query_pos.device))
        if self.are_single:
            refuse_padding(pos, self.pos_slice, str(hook.name))
        piece = value.index_select(dim, (here - run.first).to(value.device))
        mine.values.append(_over_all_keys(piece, hook, mine))
        mine.columns += here.tolist()
        mine.pos.append(pos)

    def finish(self) -> None:
        """Join the pieces, in the order of the selected positions."""
        for hook, mine in self.of.items():
            name, dim = str(hook.name), hook.pos_dim
            value, pos = torch.cat(mine.values, dim=dim), torch.cat(mine.pos, dim=1)
            if self.is_last:
                if bool((pos < 0).any()):
                    raise IndexError(f"{name!r} was not computed at the last token of every row")
            else:
                asked = indices_on(self.pos_slice, mine.n_pos, "positions", tuple_is_slice=True)
                place = {column: i for i, column in enumerate(mine.columns)}
                # Fewer logits than positions may have been computed.
                there = torch.tensor([place[i] for i in asked.tolist() if i in place])
                if not len(there):
                    raise IndexError(f"{name!r} was not computed at {self.pos_slice!r}")
                value = value.index_select(dim, there.to(value.device))
                pos = pos.index_select(1, there.to(pos.device))
            keys = torch.cat(mine.seen, dim=1) if "key" in hook.axes else None
            self.places[name] = Places(pos, keys)
            self._put(name, value)

    def _keep_last(self, value: Tensor, hook: HookPoint, mine: _Pieces) -> None:
        """Keep each row's last token so far, replacing the previous one."""
        pos, dim = hook.run.query_pos, hook.pos_dim
        index = torch.arange(pos.shape[1], device=pos.device)
        index = torch.where(pos >= 0, index, 0).amax(1, keepdim=True)
        value = _over_all_keys(take_per_row(value, index, dim), hook, mine)
        pos = pos.gather(1, index)
        if mine.values:
            is_new = pos >= 0
            shape = (-1, *(1,) * (value.ndim - 1))
            value = torch.where(is_new.to(value.device).view(shape), value, mine.values[0])
            pos = torch.where(is_new, pos, mine.pos[0])
        mine.values, mine.pos = [value], [pos]


def _over_all_keys(piece: Tensor, hook: HookPoint, mine: _Pieces) -> Tensor:
    """Return scores or patterns with a column for every key of the forward; others unchanged."""
    if "key" not in hook.axes:
        return piece
    key_pos = hook.run.key_pos
    assert key_pos is not None
    fill = fill_of(hook, piece.dtype)
    whole = piece.new_full((*piece.shape[:3], mine.n_pos), fill)
    if bool((key_pos == key_pos[:1]).all()) and int(key_pos.min()) >= 0:
        return whole.index_copy_(3, key_pos[0], piece)
    is_token = torch.cat(mine.seen, dim=1) >= 0
    whole[..., : is_token.shape[1]] = over_all_columns(piece, key_pos, is_token, fill)
    return whole


def fill_of(hook: HookPoint, dtype: torch.dtype) -> float:
    """Return the value of scores or patterns where a query sees no key."""
    is_scores = str(hook.name).endswith("hook_attn_scores")
    return torch.finfo(dtype).min if is_scores else 0.0


def _tensors(values: Any) -> list[Tensor]:
    """Return every tensor in nested tuples, lists and dicts, and in states."""
    if isinstance(values, Tensor):
        return [values]
    if hasattr(values, "tensors"):
        values = values.tensors()
    if isinstance(values, dict):
        values = list(values.values())
    if isinstance(values, (tuple, list)):
        return [t for value in values for t in _tensors(value)]
    return []
