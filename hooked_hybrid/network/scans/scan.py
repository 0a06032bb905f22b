"""The linear recurrence h_t = a_t h_{t-1} + x_t: its definition, its fast version, its hook.

`scan_loop` is the definition. Layers call `scan`, which computes the same values up to rounding, in
two passes over chunks or by a GPU kernel. Its backward pass is the same scan, run backwards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.marks import positions_of
from hooked_hybrid.hooks.point import HookPoint, LensHandle
from hooked_hybrid.network.finite import is_finite
from hooked_hybrid.network.kernels import linear_scan, need_gradients
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.scans.loops import State, States, scan_loop

CHUNK = 32


def scan(a: States, x: States, h0: State) -> States:
    """Return every state of h_t = a_t h_{t-1} + x_t; the fast version of `scan_loop`."""
    if a.shape[1] == 1:
        return torch.addcmul(x, a, h0[:, None])
    if a.shape[1] < 2 * CHUNK or transforms.are_active():
        return scan_loop(a, x, h0)
    if need_gradients(a, x, h0):
        return _Scan.apply(a, x, h0)
    return _scan_fast(a, x, h0)


@torch.no_grad()
def _scan_fast(a: States, x: States, h0: State, reverse: bool = False) -> States:
    """Return the states, by the Triton kernel if it runs; `reverse` begins at the last position.

    In reverse, h_t = a_t h_{t+1} + x_t.
    """
    if linear_scan.usable(a, x, h0):
        return linear_scan.linear_scan(a, x, h0, reverse)
    if reverse:
        return scan_chunked(a.flip(1), x.flip(1), h0).flip(1)
    return scan_chunked(a, x, h0)


@torch.no_grad()
def scan_chunked(a: States, x: States, h0: State, chunk: int = CHUNK) -> States:
    """Return the states by two passes over chunks; not differentiable, see `scan`.

    The first pass computes the effect of each chunk on a state (its decay product, its own writes),
    all chunks at once; a short loop carries the state over the chunks; the second pass writes the
    states. No product of decays longer than a chunk is formed and no logarithm is taken, so zero
    and strong decays are exact.
    """
    n_chunks, n_pos = a.shape[1] // chunk, a.shape[1]
    body = n_chunks * chunk
    states = torch.empty_like(x)
    # One tensor [batch chunk *channels] for each index in a chunk.
    a_t, x_t, out_t = (
        t[:, :body].unflatten(1, (n_chunks, chunk)).unbind(2) for t in (a, x, states)
    )
    # A product of rounded decays drifts one way; in fp64 it does not, and it is a small tensor.
    decay, written = a_t[0].to(torch.float64, copy=True), x_t[0].clone()
    for t in range(1, chunk):
        decay *= a_t[t]
        torch.addcmul(x_t[t], a_t[t], written, out=written)

    h_t, h = torch.empty_like(written), h0.double()
    by_chunk = (h_t.unbind(1), decay.unbind(1), written.double().unbind(1))
    for start, factor, more in zip(*by_chunk, strict=True):
        start.copy_(h)
        h = torch.addcmul(more, factor, h)

    for t in range(chunk):
        h_t = torch.addcmul(x_t[t], a_t[t], h_t, out=out_t[t])
    if body < n_pos:
        states[:, body:] = scan_loop(a[:, body:], x[:, body:], h.to(x.dtype))
    return states


class _Scan(torch.autograd.Function):
    """The fast scan with the gradient of the recurrence: g_t + a_{t+1} dh_{t+1}, backwards."""

    @staticmethod
    def forward(ctx: Any, a: Tensor, x: Tensor, h0: Tensor) -> Tensor:
        states = _scan_fast(a, x, h0)
        ctx.save_for_backward(a, h0, states)
        return states

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        a, h0, states = ctx.saved_tensors
        later, zero = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1), torch.zeros_like(h0)
        if torch.is_grad_enabled():  # a second derivative is wanted
            total = _Scan.apply(later.flip(1), grad.flip(1), zero).flip(1)
        else:
            total = _scan_fast(later, grad, zero, reverse=True)
        before = torch.cat([h0[:, None], states[:, :-1]], dim=1)
        return total * before, total, total[:, 0] * a[:, 0]


def scan_documents(
    a: States, x: States, h0: State, resets: Bool[Tensor, "batch pos"] | None
) -> States:
    """Compute the same as `scan`, with nothing of a state passing a reset, not even NaN.

    Args:
        a, x, h0: as in `scan_loop`; `a` is 0 at resets.
        resets: True where the past is forgotten; None: nowhere.
    """
    if resets is None or is_finite(a, x, h0):
        return scan(a, x, h0)
    h, pieces = h0, []
    for part in parts_between(resets):
        h = reset_rows(h, resets[:, part.start])
        pieces.append(scan(a[:, part], x[:, part], h))
        h = pieces[-1][:, -1]
    return torch.cat(pieces, dim=1)


def parts_between(resets: Bool[Tensor, "batch pos"]) -> list[slice]:
    """Return the ranges of positions within which no row is reset."""
    n_pos = resets.shape[1]
    starts = resets.any(dim=0).nonzero()[:, 0].tolist()
    bounds = sorted({0, *starts, n_pos})
    return [slice(start, stop) for start, stop in pairwise(bounds)]


def reset_rows(h: State, resets: Bool[Tensor, " batch"]) -> State:
    """Return the state before a position, with zeros in the rows that are reset there."""
    return h.masked_fill(resets.view(-1, *(1,) * (h.ndim - 1)), 0)


def forget(decay: States, layout: Layout) -> States:
    """Return decays of 0 where a document begins inside the row, and of 1 at padding."""
    axes = (*layout.pos.shape, *(1,) * (decay.ndim - 2))
    if layout.has_padding:
        decay = decay.masked_fill(~layout.is_real.view(axes), 1)
    if layout.resets is not None:
        decay = decay.masked_fill(layout.resets.view(axes), 0)
    return decay


def hooked_scan(a: States, x: States, h0: State, hook: HookPoint, layout: Layout) -> States:
    """Return the states after the hooks on them, whose edits reach every later position.

    Watchers alone keep the fast scan and are given all states at once. Any other hook is called
    once a position, on [batch 1 *channels]; the scan is fast between the positions that
    `interventions.hook_at` names. At padding a state is only carried, so edits there are undone.
    Gradients at this point are total: through the output at t and through all later states. Cached
    gradients include the edits of backward hooks before the caching hook.

    Args:
        a, x, h0: as in `scan_loop`.
        hook: the point on the state.
        layout: states which positions are tokens.
    """
    if not hook.is_hooked:
        return scan_documents(a, x, h0, layout.resets)
    watchers = [h for h in hook.fwd_hooks if h.is_watcher]
    fwd, bwd = [h for h in hook.fwd_hooks if not h.is_watcher], _gradients(x, hook)
    if fwd or any(handles for handles, _ in bwd):
        states = _scan_edited(a, x, h0, hook, layout, fwd, bwd)
    else:
        states = scan_documents(a, _with_probes(x, bwd), h0, layout.resets)
    return hook.apply_hooks(states, watchers, ())


GradientHooks = list[tuple[list[LensHandle], "States | None"]]
"""Backward hooks in order: editors with None; watchers with a zero probe of all states."""


def _gradients(x: States, hook: HookPoint) -> GradientHooks:
    """Return the backward hooks of a point, with consecutive ones of a kind grouped.

    Watchers receive the gradient of a zero that is added to each state. It is the state's total
    gradient, after the edits of hooks before them.
    """
    found: GradientHooks = []
    if not torch.is_grad_enabled():
        return found
    for is_watcher, group in groupby(hook.bwd_hooks, key=lambda h: h.is_watcher):
        handles = list(group)
        if is_watcher:
            found.append(([], hook.apply_hooks(torch.zeros_like(x), (), handles)))
        else:
            found.append((handles, None))
    return found


def _with_probes(x: States, bwd: GradientHooks) -> States:
    """Return values plus the zeros whose gradients are wanted."""
    for _, probe in bwd:
        x = x if probe is None else x + probe
    return x


def _scan_edited(
    a: States,
    x: States,
    h0: State,
    hook: HookPoint,
    layout: Layout,
    fwd: list[LensHandle],
    bwd: GradientHooks,
) -> States:
    """Return the states of a scan that stops at each edited position."""
    x_probed, done, h, pieces = _with_probes(x, bwd), 0, h0, []
    editors, resets = fwd + [handle for handles, _ in bwd for handle in handles], layout.resets
    for t in [*find_edited_positions(editors, layout), layout.length]:
        if t > done:
            here = None if resets is None else resets[:, done:t]
            pieces.append(scan_documents(a[:, done:t], x_probed[:, done:t], h, here))
            h = pieces[-1][:, -1]
        if t == layout.length:
            break
        h = h if resets is None else reset_rows(h, resets[:, t])
        carried = (a[:, t] * h + x[:, t])[:, None]
        is_real = layout.is_real[:, t].view(-1, *(1,) * h.ndim)
        apply = partial(
            hook.apply_hooks,
            constrain=partial(only_where, is_real, carried),
            run=layout.run.at(t, t + 1),
        )
        edited = apply(carried.clone(), fwd, ())
        for handles, probe in reversed(bwd):  # a gradient reaches the last of these nodes first
            edited = apply(edited, (), handles) if probe is None else edited + probe[:, t, None]
        h = edited[:, 0]
        pieces.append(edited)
        done = t + 1
    return torch.cat(pieces, dim=1)


def only_where(is_real: Tensor, carried: Tensor, edited: Tensor) -> Tensor:
    """Return an edit of states at tokens; at padding the state is the previous one."""
    return edited.where(is_real, carried)


def find_edited_positions(handles: Sequence[LensHandle], layout: Layout) -> list[int]:
    """Return the indices at which any handle may act."""
    wanted: set[int] = set()
    for handle in handles:
        positions = positions_of(handle.hook)
        if positions is None:
            return list(range(layout.length))
        wanted.update(positions)
    pos = transforms.plain_rows(layout.pos)
    at = torch.isin(pos, torch.tensor(sorted(wanted), device=pos.device))
    return at.any(dim=0).nonzero()[:, 0].tolist()
