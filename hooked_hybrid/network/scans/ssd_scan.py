"""Mamba-2's scan, a chunk of positions at a time: a matrix within chunks, states between them.

`ssd_scan_loop` is the definition. With a_t the decay of a head,

    y_t = sum_s (C_t . B_s) a_{s+1} ... a_t x_s  +  a_1 ... a_t C_t h_0

The products of decays within a chunk are those of `Decays`, in one of two forms: from their
logarithms, whose sums are in fp64 so that differences of large ones are exact; or, for decays that
a hook may have set to any value, multiplied one by one.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.network.finite import is_finite
from hooked_hybrid.network.scans.loops import (
    GroupInputs,
    HeadInputs,
    HeadState,
    PerHead,
    ssd_scan_loop,
)
from hooked_hybrid.network.scans.scan import parts_between, reset_rows

CHUNK = 64
"""Positions of a chunk. A matrix of [CHUNK CHUNK] a head costs less than the states it replaces."""
Pairs = Float[Tensor, "batch head query key"]


class Decays(NamedTuple):
    """The decays of each head, by their logarithms (never positive) or by their values.

    `resets` is True where the past is forgotten; with `value`, which is 0 there, it is not read.
    """

    log: PerHead | None = None
    value: PerHead | None = None
    resets: Bool[Tensor, "batch pos"] | None = None

    def at(self, part: slice) -> Decays:
        """Return those of some positions."""
        return Decays(*(None if t is None else t[:, part] for t in self))

    def values(self) -> PerHead:
        """Return the decays, 0 where the past is forgotten."""
        if self.value is not None:
            return self.value
        assert self.log is not None
        decay = self.log.exp()
        return decay if self.resets is None else decay.masked_fill(self.resets[..., None], 0)

    def products(self) -> tuple[Pairs, PerHead]:
        """Return a_{s+1} ... a_t, 0 above the diagonal, and a_1 ... a_t."""
        if self.value is not None:
            return _products(self.value)
        assert self.log is not None
        return _products_of_logs(self.log, self.resets)


class _Inputs(NamedTuple):
    """The inputs of a scan without its decays, see `ssd_scan_loop`."""

    x: HeadInputs
    B: GroupInputs
    C: GroupInputs
    h0: HeadState


def ssd_scan(
    x: HeadInputs, decays: Decays, B: GroupInputs, C: GroupInputs, h0: HeadState
) -> tuple[HeadInputs, HeadState]:
    """Return C h at every position and the last state; the fast version of `ssd_scan_loop`."""
    if transforms.are_active():
        return ssd_scan_loop(x, decays.values(), B, C, h0)
    if decays.resets is not None and not is_finite(x, B, h0, decays.values()):
        return _scan_documents(_Inputs(x, B, C, h0), decays)
    if x.shape[1] == 1:
        return _scan_step(_Inputs(x, B, C, h0), decays.values())
    ys, h = [], h0
    for start in range(0, x.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        y, h = _scan_chunk(_Inputs(x[:, part], B[:, part], C[:, part], h), decays.at(part))
        ys.append(y)
    return torch.cat(ys, dim=1), h


def ssd_scores(B: GroupInputs, C: GroupInputs, n_heads: int) -> Pairs:
    """Return C_t . B_s of each head, for all pairs of positions."""
    scores = torch.einsum("btgn,bsgn->bgts", C, B)
    return scores.repeat_interleave(n_heads // B.shape[2], dim=1)


def read_state(C: GroupInputs, before: PerHead, h0: HeadState) -> HeadInputs:
    """Return a_1 ... a_t C_t h_0, what is read from the state before the first position."""
    h = h0.unflatten(1, (C.shape[2], -1))
    read = torch.einsum("btgn,bgepn->btgep", C, h).flatten(2, 3)
    return before[..., None] * read


def _scan_chunk(of: _Inputs, decays: Decays) -> tuple[HeadInputs, HeadState]:
    """Return C h and the last state of a chunk, by the matrix of its positions."""
    within, before = decays.products()
    n_groups = of.B.shape[2]
    scores = torch.einsum("btgn,bsgn->bgts", of.C, of.B)[:, :, None]
    matrix = (within.unflatten(1, (n_groups, -1)) * scores).flatten(1, 2)
    y = (matrix @ of.x.transpose(1, 2)).transpose(1, 2) + read_state(of.C, before, of.h0)
    kept = (of.x * within[:, :, -1].mT[..., None]).unflatten(2, (n_groups, -1))
    written = torch.einsum("bsgep,bsgn->bgepn", kept, of.B).flatten(1, 2)
    return y, torch.addcmul(written, before[:, -1, :, None, None], of.h0)


def _scan_step(of: _Inputs, decay: PerHead) -> tuple[HeadInputs, HeadState]:
    """Return C h and the state of one position."""
    n_groups = of.B.shape[2]
    x = of.x[:, 0].unflatten(1, (n_groups, -1))
    write = (x[..., None] * of.B[:, 0, :, None, None]).flatten(1, 2)
    h = torch.addcmul(write, decay[:, 0, :, None, None], of.h0)
    y = h.unflatten(1, (n_groups, -1)).flatten(2, 3) @ of.C[:, 0, :, :, None]
    return y.view(of.x.shape), h


def _scan_documents(of: _Inputs, decays: Decays) -> tuple[HeadInputs, HeadState]:
    """Return the same for values that are not finite, with nothing of a state passing a reset."""
    assert decays.resets is not None
    h, ys = of.h0, []
    for at in parts_between(decays.resets):
        h = reset_rows(h, decays.resets[:, at.start])
        here = decays.at(at)._replace(resets=None)
        y, h = ssd_scan(of.x[:, at], here, of.B[:, at], of.C[:, at], h)
        ys.append(y)
    return torch.cat(ys, dim=1), h


def _products_of_logs(
    log: PerHead, resets: Bool[Tensor, "batch pos"] | None
) -> tuple[Pairs, PerHead]:
    n_pos = log.shape[1]
    total = log.double().cumsum(1)
    by_head = total.mT
    hidden = torch.ones(n_pos, n_pos, dtype=torch.bool, device=log.device).triu(1)
    between = (by_head[..., None] - by_head[..., None, :]).to(log.dtype)
    before = total.to(log.dtype)
    if resets is not None:
        n_resets = resets.cumsum(1)
        apart = n_resets[:, :, None] != n_resets[:, None]
        hidden = hidden | apart[:, None]
        before = before.masked_fill((n_resets > 0)[..., None], -torch.inf)
    return between.masked_fill(hidden, -torch.inf).exp(), before.exp()


def _products(decay: PerHead) -> tuple[Pairs, PerHead]:
    by_head = decay.mT
    one = torch.eye(decay.shape[1], dtype=decay.dtype, device=decay.device)
    rows, row = [], torch.zeros_like(by_head)
    for t, a in enumerate(by_head.unbind(-1)):
        # Keys after t have a product of 0 so far; a decay that is not finite must not reach them.
        row = (row * a[..., None]).where(one[t].cumsum(0) == 0, 0) + one[t]
        rows.append(row)
    return torch.stack(rows, dim=2), decay.cumprod(1)
