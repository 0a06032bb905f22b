"""Mamba's selective scan without hooks, in bounded memory: one chunk of positions at a time.

`selective_scan_loop` is the definition. Layers call `selective_scan`, which chooses among the fast
versions: one step, chunks, and, with autograd, chunks that the backward pass computes again, so
that only the states between chunks are kept.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.network.finite import is_finite
from hooked_hybrid.network.kernels import mamba_ssm, need_gradients
from hooked_hybrid.network.kernels import selective_scan as triton_scan
from hooked_hybrid.network.scans.loops import SmallInputs, SSMState, selective_scan_loop
from hooked_hybrid.network.scans.scan import parts_between, reset_rows
from hooked_hybrid.network.weights.products import in_own_dtype
from hooked_hybrid.shapes import Inner

CHUNK = 32
LOG2_E = 1 / math.log(2)
CHUNK_NUMBERS = 2**19  # decays of one chunk: 2 MB, most of which stays in the cache
# Within a chunk the long axis, channels, is last, so that passes run over contiguous numbers.
Wide = Float[Tensor, "batch pos d_state d_inner"]
WideState = Float[Tensor, "batch d_state d_inner"]


def selective_scan(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    C: SmallInputs,
    h0: SSMState,
    resets: Bool[Tensor, "batch pos"] | None = None,
    begins: bool = False,
) -> tuple[Inner, SSMState]:
    """Return C h at every position and the last state, by the version that applies.

    Args:
        u, dt, A, B, C, h0, resets: as in `selective_scan_loop`.
        begins: whether `h0` is known to be zero, which kernels without an initial state need.
    """
    x = _Inputs(u, dt, A, B, C, h0, resets)
    if transforms.are_active():
        return selective_scan_loop(*x)
    if resets is not None and not is_finite(u, dt, B, h0):
        return _scan_documents(x, resets)
    if need_gradients(u, dt, A, B, C, h0):
        if begins and mamba_ssm.usable(u, dt, A, B, C, resets=resets):
            return mamba_ssm.selective_scan(u, dt, A, B, C)
        return _SelectiveScan.apply(*x)
    if u.is_cuda and triton_scan.usable(*x):
        return triton_scan.selective_scan(*x)
    return _scan_step(x) if u.shape[1] == 1 else _scan_chunks(x, _cut(x, _chunk_length(x)))


class _Inputs(NamedTuple):
    """The inputs of a scan, see `selective_scan_loop`."""

    u: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    h0: Tensor
    resets: Tensor | None


def _scan_documents(x: _Inputs, resets: Bool[Tensor, "batch pos"]) -> tuple[Inner, SSMState]:
    """Return the same for values that are not finite, with nothing of a state passing a reset."""
    h, ys = x.h0, []
    for at in parts_between(resets):
        h = reset_rows(h, resets[:, at.start])
        y, h = selective_scan(x.u[:, at], x.dt[:, at], x.A, x.B[:, at], x.C[:, at], h)
        ys.append(y)
    return torch.cat(ys, dim=1), h


def _scan_step(x: _Inputs) -> tuple[Inner, SSMState]:
    """Return C h and the state of one position, in the memory layout of states."""
    decay = (x.dt.mT * x.A).exp_()
    if x.resets is not None:
        decay.masked_fill_(x.resets[..., None], 0)
    write = (x.dt.mT * x.B).mul_(x.u.mT)
    h = torch.addcmul(write, decay, x.h0, out=write)
    return torch.bmm(x.C, h.mT), h


def _scan_chunks(
    x: _Inputs, chunks: list[_Chunk], starts: Tensor | None = None
) -> tuple[Inner, SSMState]:
    """Compute the same as `selective_scan`, with one chunk's decays and states in memory at a time.

    Args:
        x: the inputs of the scan.
        chunks: the same in chunks, the first one the longest.
        starts: where to write the state before each chunk [chunk batch d_state d_inner].
    """
    y, h, done = torch.empty_like(x.u), x.h0.mT.contiguous(), 0
    decay_room, state_room = _rooms(chunks[0], 2)
    for i, chunk in enumerate(chunks):
        if starts is not None:
            starts[i] = h
        states = _states(chunk, _decays(chunk, decay_room), h, state_room)
        n_pos = states.shape[1]
        y[:, done : done + n_pos] = (chunk.C[:, :, None] @ states)[:, :, 0]
        h = states[:, -1].clone()  # the next chunk is written over this one
        done += n_pos
    return y, h.mT.contiguous()


class _SelectiveScan(torch.autograd.Function):
    """`_scan_chunks` with a backward pass that keeps the states between chunks only."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor]:
        x = _Inputs(*inputs)
        chunks = _cut(x, CHUNK)
        starts = x.h0.new_empty(len(chunks), *x.h0.mT.shape)
        ctx.save_for_backward(*inputs, starts)
        return _scan_chunks(x, chunks, starts)

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor, grad_last: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, starts = ctx.saved_tensors
        with in_own_dtype(grad_y.device):
            if torch.is_grad_enabled():  # a second derivative is wanted
                return _differentiable_gradients(_Inputs(*inputs), grad_y, grad_last)
            return _gradients(_Inputs(*inputs), starts, grad_y, grad_last)


def _differentiable_gradients(
    x: _Inputs, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients with a graph, by the definition, which keeps all states."""
    *numbers, resets = x
    here = u, dt, A, B, C, h0 = tuple(t.view_as(t) for t in numbers)  # dt may depend on u: that
    wanted = [t for t in here if t.requires_grad]  # path is not the scan's
    outputs = selective_scan_loop(u, dt, A, B, C, h0, resets)
    found = iter(
        torch.autograd.grad(
            outputs, wanted, (grad_y, grad_last), create_graph=True, allow_unused=True
        )
    )
    return (*(next(found) if t.requires_grad else None for t in numbers), None)


def _gradients(
    x: _Inputs, starts: Tensor, grad_y: Tensor, grad_last: Tensor
) -> tuple[Tensor | None, ...]:
    """Return gradients of the inputs of `selective_scan`, chunk by chunk from the last one."""
    chunks = _cut(x, CHUNK)
    rooms, pieces, by_rates = _rooms(chunks[0], 3), [], torch.zeros_like(chunks[0].rates)
    by_h, stop = grad_last.mT, x.u.shape[1]
    for chunk, h in zip(reversed(chunks), reversed(starts.unbind()), strict=True):
        start = stop - chunk.u.shape[1]
        *piece, by_rates_here, by_h = _chunk_gradients(chunk, h, grad_y[:, start:stop], by_h, rooms)
        pieces.append(piece)
        by_rates += by_rates_here
        stop = start
    by_u, by_dt, by_B, by_C = (
        torch.cat(parts, dim=1) for parts in zip(*reversed(pieces), strict=True)
    )
    return by_u, by_dt, by_rates.mT, by_B, by_C, by_h.mT, None


class _Chunk(NamedTuple):
    """The inputs of a scan at some positions; `rates` is A, channels last, also for powers of 2."""

    u: Tensor
    dt: Tensor
    B: Tensor
    C: Tensor
    rates: Tensor
    log2_rates: Tensor
    resets: Tensor | None


def _chunk_length(x: _Inputs) -> int:
    """Return how many positions to process at a time if no states are kept."""
    if x.u.device.type != "cpu":
        return CHUNK
    return max(2, min(CHUNK, CHUNK_NUMBERS // x.h0.numel()))


def _cut(x: _Inputs, length: int) -> list[_Chunk]:
    """Return the inputs chunk by chunk."""
    rates = x.A.T.contiguous()
    log2_rates = rates * LOG2_E
    parts = zip(*(t.split(length, dim=1) for t in (x.u, x.dt, x.B, x.C)), strict=True)
    if x.resets is None:
        return [_Chunk(u, dt, B, C, rates, log2_rates, None) for u, dt, B, C in parts]
    resets = x.resets.split(length, dim=1)
    return [
        _Chunk(u, dt, B, C, rates, log2_rates, reset)
        for (u, dt, B, C), reset in zip(parts, resets, strict=True)
    ]


def _rooms(chunk: _Chunk, n: int) -> list[Tensor]:
    """Return scratch memory for `n` tensors as large as the states of a chunk."""
    size = chunk.u.numel() * chunk.rates.shape[0]
    return [chunk.u.new_empty(size) for _ in range(n)]


def _fit(room: Tensor, chunk: _Chunk) -> Wide:
    """Return the part of the scratch memory that the states of a chunk take."""
    shape = (*chunk.u.shape[:2], *chunk.rates.shape)
    return room[: chunk.u.numel() * shape[2]].view(shape)


def _decays(chunk: _Chunk, room: Tensor) -> Wide:
    # exp2 takes two thirds of the time of exp.
    decay = torch.mul(chunk.dt[:, :, None], chunk.log2_rates, out=_fit(room, chunk)).exp2_()
    if chunk.resets is not None:
        decay.masked_fill_(chunk.resets[..., None, None], 0)
    return decay


def _states(chunk: _Chunk, decay: Wide, h: WideState, room: Tensor) -> Wide:
    read = (chunk.dt * chunk.u)[:, :, None]
    states = torch.mul(read, chunk.B[..., None], out=_fit(room, chunk))
    for a, state in zip(decay.unbind(1), states.unbind(1), strict=True):
        h = torch.addcmul(state, a, h, out=state)
    return states


def _chunk_gradients(
    chunk: _Chunk, h: WideState, grad_y: Inner, grad_h: WideState, rooms: list[Tensor]
) -> tuple[Inner, Inner, SmallInputs, SmallInputs, Tensor, WideState]:
    """Return gradients of u, dt, B, C, the rates and the state before a chunk.

    Args:
        chunk: the inputs.
        h: the state before the chunk.
        grad_y, grad_h: gradients of C h and of the state after the chunk.
        rooms: scratch memory for three tensors.
    """
    decay = _decays(chunk, rooms[0])
    states = _states(chunk, decay, h, rooms[1])
    totals = torch.mul(chunk.C[..., None], grad_y[:, :, None], out=_fit(rooms[2], chunk))
    by_C = (states @ grad_y[..., None])[..., 0]
    after = totals[:, -1].add_(grad_h)
    for a, total in zip(decay[:, 1:].unbind(1)[::-1], totals[:, :-1].unbind(1)[::-1], strict=True):
        after = torch.addcmul(total, a, after, out=total)
    grad_h = decay[:, 0] * after
    by_B = (totals @ (chunk.dt * chunk.u)[..., None])[..., 0]
    by_write = (chunk.B[:, :, None] @ totals)[:, :, 0]
    # From here on: the gradient of each decay's exponent.
    totals[:, 1:].mul_(states[:, :-1])
    totals[:, 0].mul_(h)
    totals.mul_(decay)
    by_dt = torch.mul(totals, chunk.rates, out=decay).sum(2).addcmul_(by_write, chunk.u)
    by_rates = torch.mul(totals, chunk.dt[:, :, None], out=states).sum((0, 1))
    return by_write * chunk.dt, by_dt, by_B, by_C, by_rates, grad_h
