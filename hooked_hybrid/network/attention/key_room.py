"""Spare space after a state's keys, so that a decoding step appends to them without a copy.

States remain values: each uses its own range of buffers that several states share, and only
entries that belong to no state yet are written. The first continuation of a state appends in
place; a second one copies.
"""

from __future__ import annotations

import threading
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.network.block_state import AttentionState

STEP = 16
"""Up to this many new keys, more are expected to follow, and space is allocated for them too."""


class _Room:
    """Buffers of keys, values and positions, of which `used` entries belong to some state."""

    def __init__(self, buffers: tuple[Tensor, ...], used: int) -> None:
        self.buffers, self.used = buffers, used
        self._lock = threading.Lock()

    def take(self, n: int, after: int) -> bool:
        """Reserve the `n` entries that follow entry `after`; False if they are not free."""
        k = self.buffers[0]
        if k.is_inference() and not torch.is_inference_mode_enabled():
            return False  # torch does not allow writes
        with self._lock:
            if self.used != after or after + n > k.shape[1]:
                return False
            self.used += n
            return True


_rooms: WeakKeyDictionary[AttentionState, tuple[_Room, int]] = WeakKeyDictionary()
"""The room of a state, and the end of its entries in it."""


def with_new_keys(
    state: AttentionState | None,
    k: Float[Tensor, "batch new kv_head d_head"],
    v: Float[Tensor, "batch new kv_head d_head"],
    pos: Int[Tensor, "batch new"],
    are_seen: bool = False,
) -> AttentionState:
    """Return the keys of a state followed by new ones; the state itself is not changed.

    New keys that `are_seen` by hooks are copied, as a hook may have kept them.
    """
    new = (k, v, pos)
    if state is None:
        return AttentionState(*(t.clone() for t in new)) if are_seen else AttentionState(*new)
    old = (state.k, state.v, state.pos)
    if transforms.is_followed() or k.dtype != state.k.dtype:
        return AttentionState(*(torch.cat(pair, dim=1) for pair in zip(old, new, strict=True)))
    n_old, n_new = state.k.shape[1], k.shape[1]
    room, end = _rooms.get(state, (None, 0))
    if room is None or not room.take(n_new, after=end):
        room, end = _new_room(old, n_new), n_old
    for buffer, t in zip(room.buffers, new, strict=True):
        buffer[:, end : end + n_new] = t
    both = AttentionState(*(b[:, end - n_old : end + n_new] for b in room.buffers))
    _rooms[both] = (room, end + n_new)
    return both


def last_keys(state: AttentionState, n: int) -> AttentionState:
    """Return the last `n` keys of a state, with the room behind them."""
    n_keys = state.k.shape[1]
    if n >= n_keys:
        return state
    tensors = (t[:, n_keys - n :] for t in (state.k, state.v, state.pos))
    if 2 * n < n_keys:  # a view would keep all of it in memory
        return AttentionState(*(t.clone() for t in tensors))
    last = AttentionState(*tensors)
    if state in _rooms:
        _rooms[last] = _rooms[state]
    return last


def room_for_steps(n_keys: int) -> int:
    """Return the number of further keys that a decoding step allocates space for."""
    return max(64, n_keys // 8)


def _new_room(old: tuple[Tensor, ...], n_new: int) -> _Room:
    """Return buffers with given entries and space for new ones; after a step, for more."""
    n_old = old[0].shape[1]
    more = room_for_steps(n_old + n_new) if n_new <= STEP else 0
    buffers = tuple(t.new_empty(t.shape[0], n_old + n_new + more, *t.shape[2:]) for t in old)
    for buffer, t in zip(buffers, old, strict=True):
        buffer[:, :n_old] = t
    return _Room(buffers, n_old + n_new)
