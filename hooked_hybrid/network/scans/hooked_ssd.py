"""Mamba-2's scan with its hooks: the fastest way that those attached allow."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.hooks.marks import positions_of
from hooked_hybrid.hooks.point import HookPoint, LensHandle
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.scans.loops import GroupInputs, HeadInputs, HeadState, PerHead
from hooked_hybrid.network.scans.scan import (
    find_edited_positions,
    forget,
    hooked_scan,
    only_where,
)
from hooked_hybrid.network.scans.ssd_scan import Decays, Pairs, read_state, ssd_scan, ssd_scores
from hooked_hybrid.network.weights.products import autocast_dtype, in_own_dtype


class SSDTerms(NamedTuple):
    """The inputs of the scan, in fp32 or wider, with zeros at padding."""

    u: HeadInputs
    dt: PerHead
    A: Float[Tensor, " head"]
    B: GroupInputs
    C: GroupInputs
    h0: HeadState

    @property
    def x(self) -> HeadInputs:
        """The inputs times their step sizes."""
        return self.dt[..., None] * self.u


class SSDHooks(NamedTuple):
    """The hook points within the scan."""

    decay: HookPoint
    scores: HookPoint
    pattern: HookPoint
    write: HookPoint
    state: HookPoint


def hooked_ssd_scan(of: SSDTerms, hooks: SSDHooks, layout: Layout) -> tuple[HeadInputs, HeadState]:
    """Return C h and the last state, after the hooks on decays, states and patterns.

    An edit of a head's matrix from M to M' adds (M' - M) u to what is read from the states, which
    may be edited as well.
    """
    if autocast_dtype(of.u.device) is not None:
        with in_own_dtype(of.u.device):  # fp32, as without it
            return hooked_ssd_scan(of, hooks, layout)
    decays, state = _decays(of, hooks.decay, layout), hooks.state
    is_edited_at_places = state.fwd_hooks and not any(
        h.is_watcher or positions_of(h.hook) is None for h in state.fwd_hooks
    )
    if hooks.write.is_hooked or state.bwd_hooks:
        y, h = _scan_states(of, decays, hooks, layout)
    elif is_edited_at_places:
        y, h = _scan_between(of, decays, state, layout)
    elif state.fwd_hooks:
        y, h = _scan_states(of, decays, hooks, layout)
    else:
        y, h = ssd_scan(of.x, decays, of.B, of.C, of.h0)
    if hooks.scores.is_hooked or hooks.pattern.is_hooked:
        y = _with_pattern(y, of, decays, hooks, layout)
    return y, h


def _decays(of: SSDTerms, hook: HookPoint, layout: Layout) -> Decays:
    """Return the decays, by their logarithms unless a hook may set or differentiate them."""
    log = of.dt * of.A
    if not hook.is_hooked:
        return Decays(log=log, resets=layout.resets)
    constrain = partial(forget, layout=layout)
    value = hook(constrain(log.exp()), constrain=constrain)
    if hook.has_editors or hook.bwd_hooks:
        return Decays(value=value, resets=layout.resets)
    return Decays(log=log, resets=layout.resets)


def _with_pattern(
    y: HeadInputs, of: SSDTerms, decays: Decays, hooks: SSDHooks, layout: Layout
) -> HeadInputs:
    """Return C h after the hooks on the matrix of each head."""
    hide = partial(_hide, layout=layout)
    weights = decays.products()[0] * of.dt.mT[:, :, None]
    scores = hide(ssd_scores(of.B, of.C, of.u.shape[2]))
    pattern = scores * weights
    run = layout.run.with_keys(layout.pos)
    hooked = hooks.pattern(hooks.scores(scores, hide, run) * weights, hide, run)
    points = (hooks.scores, hooks.pattern)
    if not any(point.has_editors or point.bwd_hooks for point in points):
        return y
    return y + ((hooked - pattern) @ of.u.transpose(1, 2)).transpose(1, 2)


def _scan_states(
    of: SSDTerms, decays: Decays, hooks: SSDHooks, layout: Layout
) -> tuple[HeadInputs, HeadState]:
    """Return C h and the last state through all writes and states, with their hooks."""
    n_heads, d_head = of.u.shape[2:]
    B, C = (t.repeat_interleave(n_heads // t.shape[2], dim=2) for t in (of.B, of.C))
    write = (of.x[..., None] * B[..., None, :]).flatten(2, 3)
    write = hooks.write(write, constrain=layout.zero_padding)
    decay = decays.values().repeat_interleave(d_head, dim=2)[..., None].expand_as(write)
    h = hooked_scan(decay, write, of.h0.flatten(1, 2), hooks.state, layout)
    by_head = h.unflatten(2, (n_heads, d_head))
    return torch.einsum("bshpn,bshn->bshp", by_head, C), by_head[:, -1].clone()


def _scan_between(
    of: SSDTerms, decays: Decays, hook: HookPoint, layout: Layout
) -> tuple[HeadInputs, HeadState]:
    """Compute the same as `_scan_states`, by fast scans that stop at each edited position."""
    x, h, ys, done = of.x, of.h0, [], 0
    handles = tuple(hook.fwd_hooks)
    edited = find_edited_positions(handles, layout)
    for stop in sorted({*(t + 1 for t in edited), layout.length}):
        part = slice(done, stop)
        y, h = ssd_scan(x[:, part], decays.at(part), of.B[:, part], of.C[:, part], h)
        if stop - 1 in edited:
            h = _edit(h, hook, handles, layout, stop - 1)
            last = slice(stop - 1, stop)
            y = torch.cat(
                [y[:, :-1], read_state(of.C[:, last], torch.ones_like(of.dt[:, last]), h)], dim=1
            )
        ys.append(y)
        done = stop
    return torch.cat(ys, dim=1), h


def _edit(
    h: HeadState, hook: HookPoint, handles: Sequence[LensHandle], layout: Layout, t: int
) -> HeadState:
    """Return a state after its hooks at index t, where padding carries it unchanged."""
    is_real = layout.is_real[:, t, None, None, None]
    carried = h.flatten(1, 2)[:, None]
    edited = hook.apply_hooks(
        carried.clone(),
        handles,
        (),
        constrain=partial(only_where, is_real, carried),
        run=layout.run.at(t, t + 1),
    )
    return edited[:, 0].unflatten(1, h.shape[1:3])


def _hide(pairs: Pairs, layout: Layout) -> Pairs:
    """Return 0 at keys after the query, in other documents, and at padding."""

    def make() -> Tensor:
        hidden = torch.ones(layout.length, layout.length, dtype=torch.bool, device=pairs.device)
        hidden = hidden.triu(1) | ~layout.is_real[:, None] | ~layout.is_real[:, :, None]
        if layout.doc is not None:
            hidden = hidden | (layout.doc[:, :, None] != layout.doc[:, None])
        return hidden[:, None]

    return pairs.masked_fill(layout.once("pairs of a scan", make), 0)
