"""The second scan that cuts edges of a recurrence, carried from call to call.

In y_t = read_t . h_t + skip x_t with h_t = a_t h_{t-1} + w_t, the part of some keys in the state is
also a scan, g_t = a_t g_{t-1} + [t is a key] w_t, and y_t without them is y_t - read_t . g_t.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.interventions.places import Chosen, is_among
from hooked_hybrid.interventions.rows import Handover
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.mixers.base import Mixer, ScanTerms
from hooked_hybrid.network.scans.scan import scan

AGREES = 1e-4
"""Largest difference of a state from a_t h_{t-1} + w_t, relative to the largest
|a_t h_{t-1}| + |w_t| of its channel in one call."""
States = Float[Tensor, "batch pos channel n"]
State = Float[Tensor, "batch channel n"]


class Edges(NamedTuple):
    """The edges from each query to each key, in some channels; None means all."""

    queries: Chosen | None
    keys: Chosen | None
    channels: tuple[int, ...] | None


def _expected(terms: ScanTerms, before: State) -> tuple[States, States]:
    """Return a_t h_{t-1} + w_t and |a_t h_{t-1}| + |w_t|."""
    kept = terms.decay * torch.cat([before[:, None], terms.states[:, :-1]], dim=1)
    return kept + terms.write, kept.abs() + terms.write.abs()


@dataclass
class _Followed:
    """The results of a layer's last call: its rows, the states after it, the keys' part in them."""

    rows: Int[Tensor, " row"]
    next_pos: Int[Tensor, " row"]
    states: Float[Tensor, "row channel n"]
    cut: Float[Tensor, "row channel n"]


class Cut:
    """The hooks of `knock_out_state_edges`."""

    def __init__(self, edges: Edges) -> None:
        self.edges = edges
        self.seen: defaultdict[str, Handover] = defaultdict(Handover)
        self.followed: dict[int, _Followed] = {}
        self.skips: dict[int, Tensor] = {}

    @watcher
    @per_position
    def watch(self, value: Tensor, hook: HookPoint) -> None:
        """Keep the decays, writes and states of a recurrence, for `subtract`."""
        self.seen[str(hook.name).rpartition(".")[2]].leave(hook, value)

    @per_position
    def subtract(self, y: Tensor, hook: HookPoint) -> Tensor:
        """Return the layer's output without the edges."""
        earlier, run = self._cuts_before(hook), hook.run
        terms = self._terms(hook)
        is_key = is_among(run.query_pos, self.edges.keys, hook)
        cut = self._follow(terms, is_key, hook)
        is_query = is_among(run.query_pos, self.edges.queries, hook)[..., None]
        is_query = is_query & is_chosen(self.edges.channels, y, hook)
        for other in earlier:
            self._check_apart(other, is_query, hook)
        wide = at_least_fp32(y)
        if not earlier:  # earlier cuts receive y as it was computed
            self.skips[hook.layer()] = wide - (terms.states * terms.read).sum(-1)
        skip = (earlier[0] if earlier else self).skips[hook.layer()]
        without = wide - (cut * terms.read).sum(-1) - skip * is_key[..., None]
        return torch.where(is_query, without.to(y.dtype), y)

    # --- inside -----------------------------------------------------------------------------------

    def _cuts_before(self, hook: HookPoint) -> list[Cut]:
        """Return the other cuts of this layer that act before this one."""
        cuts: list[Cut] = []
        for handle in hook.fwd_hooks:
            owner = getattr(handle.hook, "__self__", None)
            if owner is self:
                return cuts
            if isinstance(owner, Cut):
                cuts.append(owner)
            elif not handle.is_watcher:
                break
        raise ValueError(
            f"edges can be cut from {hook.name!r} before other hooks edit it: attach the hooks of "
            "knock_out_state_edges first, as they come (rows are chosen by masks of positions)"
        )

    def _terms(self, hook: HookPoint) -> ScanTerms:
        """Return the values of the earlier points, with resets at documents and padding."""
        seen = {leaf: left.take(hook) for leaf, left in self.seen.items() if left.has(hook)}
        terms: ScanTerms = owner_of(hook).scan_terms(seen)
        pos = hook.run.query_pos[..., None, None]
        decay = at_least_fp32(terms.decay).masked_fill(pos < 0, 1).masked_fill(pos == 0, 0)
        return terms._replace(decay=decay)

    def _follow(
        self, terms: ScanTerms, is_key: Bool[Tensor, "batch pos"], hook: HookPoint
    ) -> States:
        """Return the keys' part in each state, and keep the state at the end of this call."""
        run, layer, states = hook.run, hook.layer(), terms.states
        is_real = run.query_pos >= 0
        begins = is_real.int().argmax(dim=1, keepdim=True)
        first = run.query_pos.gather(1, begins)[:, 0]  # -1 where the row has no token here
        before, cut, next_pos = self._before(run, layer, states)
        expected, size = _expected(terms, before)
        limit = AGREES * size.amax(dim=1, keepdim=True)
        agrees = ((states - expected).abs() <= limit).flatten(2).all(-1)
        if not bool(agrees[:, 1:].all()):
            raise ValueError(_EDITED.format(layer=layer))
        goes_on = agrees[:, 0] & ((first == next_pos) | (first < 0))
        for row in (~goes_on & (first > 0)).nonzero()[:, 0].tolist():
            if self._is_key_before(row, int(first[row]), hook):
                raise ValueError(
                    _UNFOLLOWED.format(row=int(run.rows[row]), layer=layer, pos=int(first[row]))
                )
        cut = cut * goes_on[:, None, None]
        inside = scan(terms.decay, terms.write * is_key[..., None, None], cut)
        last = is_real.int().cumsum(1).argmax(dim=1, keepdim=True)
        after = run.query_pos.gather(1, last)[:, 0] + 1
        next_pos = torch.where(first < 0, torch.where(goes_on, next_pos, -1), after)
        self.followed[layer] = _Followed(run.rows, next_pos, states[:, -1], inside[:, -1])
        return inside

    def _before(self, run: Run, layer: int, states: States) -> tuple[State, State, Tensor]:
        """Return the results of the last call for these rows: states, cut parts, next positions."""
        left, zeros = self.followed.get(layer), torch.zeros_like(states[:, 0])
        if left is None or left.states.shape[1:] != zeros.shape[1:]:
            return zeros, zeros, torch.full_like(run.rows, -1)
        same = run.rows[:, None] == left.rows
        there, index = same.any(1), same.int().argmax(1)
        where = there[:, None, None]
        return (
            torch.where(where, left.states[index], 0),
            torch.where(where, left.cut[index], 0),
            torch.where(there, left.next_pos[index], -1),
        )

    def _is_key_before(self, row: int, pos: int, hook: HookPoint) -> bool:
        """Whether a token of this row before a position would be a key."""
        every = torch.arange(pos, device=hook.run.rows.device)[None]
        with hook.seeing(hook.run.of_rows(torch.tensor([row], device=every.device))):
            return bool(is_among(every, self.edges.keys, hook).any())

    def _check_apart(self, other: Cut, is_query: Tensor, hook: HookPoint) -> None:
        """Refuse edges that `other` also cuts, as they would be subtracted twice."""
        run = hook.run
        mine = is_query & is_among(run.query_pos, other.edges.queries, hook)[..., None]
        mine = mine & is_chosen(other.edges.channels, is_query, hook)
        for row in mine.flatten(1).any(1).nonzero()[:, 0].tolist():
            pos = int(run.query_pos[row][mine[row].any(-1)].max())
            every = torch.arange(pos + 1, device=run.rows.device)[None]
            with hook.seeing(run.of_rows(torch.tensor([row], device=every.device))):
                both = [is_among(every, c.edges.keys, hook) for c in (self, other)]
            if bool((both[0] & both[1]).any()):
                key = int((both[0] & both[1])[0].nonzero()[0])
                raise ValueError(
                    f"two cuts of layer {hook.layer()} both cut the edge from query {pos} to key "
                    f"{key}: name each edge once"
                )


_EDITED = (
    "layer {layer}: the states are not the decays times the states before plus the writes that "
    "the hooks of knock_out_state_edges saw. Attach these after hooks that edit decays or writes; "
    "where hook_ssm_state is edited, what a token wrote is not known any more"
)
_UNFOLLOWED = (
    "row {row} goes on at position {pos} of layer {layer} with a state that the hooks of "
    "knock_out_state_edges did not follow, and keys stand before it: attach them to every forward "
    "from position 0 on (in generation as fwd_hooks), one run at a time, and leave the state as "
    "it is between them"
)


def owner_of(hook: HookPoint) -> type[Mixer[Any]]:
    """Return the class of the recurrence that has a hook point."""
    assert hook.owner is not None and issubclass(hook.owner, Mixer)  # the hooks are on a mixer's
    return hook.owner


def is_chosen(
    channels: tuple[int, ...] | None, value: Tensor, hook: HookPoint
) -> Bool[Tensor, "*channel"]:
    """Return True at the chosen channels, the last axis of `value`.

    Raises:
        ValueError: a channel that the layer does not have.
    """
    n = value.shape[-1]
    if channels is None:
        return torch.ones((), dtype=torch.bool, device=value.device)
    if max(channels) >= n:
        raise ValueError(f"channels {channels}: layer {hook.layer()} has {n}, from 0")
    chosen = torch.zeros(n, dtype=torch.bool, device=value.device)
    chosen[list(channels)] = True
    return chosen
