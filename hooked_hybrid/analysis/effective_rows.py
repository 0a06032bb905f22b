"""The matrix of a recurrent layer, a block of queries at a time, from its terms in a cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.analysis.forms import Terms
from hooked_hybrid.analysis.forms.base import Index, PerChannel
from hooked_hybrid.analysis.linear_form import Recurrence
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layout import Layout

Through = Literal["scan", "block"]
Rows = Float[Tensor, "batch channel query key"]

QUERIES = 64
"""Queries worked on together."""


def blocks_of_rows(
    r: Recurrence, channels: Index, terms: Terms, through: Through, stop: int
) -> Iterator[tuple[int, Rows]]:
    """Yield the first query and the rows of one block after another, keys up to its last query.

    Products of decays are taken as products, in fp64: no logarithm, and no difference of sums, so
    that decays of 0 are exact, and products that underflow are 0.

    Args:
        r: the layer.
        channels: the selected channels.
        terms: of these channels.
        through: as in `effective_attention`.
        stop: one more than the last query that is needed.
    """
    taps, gate = [], terms.x
    if through == "block":
        taps, gate = taps_of(r, channels), at_least_fp32(r.form.gate(r, channels))
    decay, gain = (t.transpose(1, 2).double() for t in (terms.decay, terms.gain))
    read = terms.read.transpose(1, 2)
    # The part of each key in the state after the last block [batch channel key n].
    carried = gain[:, :, :0]
    for start in range(0, stop, QUERIES):
        at = slice(start, min(start + QUERIES, stop))
        products = _products(decay[:, :, at])
        since_start = products[:, :, :, 0] * decay[:, :, None, start]
        inside = products * gain[:, :, None, at]
        older = (read[:, :, at] * since_start).to(terms.x.dtype) @ carried.to(terms.x.dtype).mT
        own = (inside * read[:, :, at, None]).sum(-1).to(terms.x.dtype)
        own.diagonal(dim1=-2, dim2=-1).add_(terms.skip[:, None])
        carried = torch.cat([carried * since_start[:, :, -1, None], inside[:, :, -1]], dim=2)
        rows = torch.cat([older, own], dim=-1)
        is_real = r.layout.is_real
        rows *= (is_real[:, at, None] & is_real[:, None, : at.stop])[:, None]
        if through == "block":
            rows = _through_taps(rows, taps) * gate[:, at].mT[..., None]
        yield start, rows


def _products(
    decay: Float[Tensor, "batch channel query n"],
) -> Float[Tensor, "batch channel query query n"]:
    """Return [.. t s n], the product of the decays after s up to t; 1 at s = t, 0 above."""
    n = decay.shape[2]
    above = torch.ones(n, n, dtype=torch.bool, device=decay.device).triu()[..., None]
    factors = decay[:, :, :, None].expand(-1, -1, -1, n, -1).masked_fill(above, 1)
    eye = torch.eye(n, dtype=torch.bool, device=decay.device)[..., None]
    return factors.cumprod(dim=2).masked_fill_(above & ~eye, 0)


def _through_taps(rows: Rows, taps: list[PerChannel]) -> Rows:
    """Return rows over the convolution's input, from rows over its output."""
    mixed, n_keys = torch.zeros_like(rows), rows.shape[-1]
    for back, tap in enumerate(taps[:n_keys]):
        factor = tap.mT[:, :, None, back:n_keys]
        mixed[..., : n_keys - back] += rows[..., back:] * factor
    return mixed


def taps_of(r: Recurrence, channels: Index) -> list[PerChannel]:
    """Return the weights in x of `hook_in_proj` at the position, one position back, and so on.

    Zero if the earlier position belongs to another document, or is padding.
    """
    weight = at_least_fp32(r.form.taps(r.mixer)).to(channels.device)[:, channels].flip(0)
    act = r.form.slope(r, channels)
    return [act * w * _same_document(r.layout, j)[..., None] for j, w in enumerate(weight)]


def convolve(x: PerChannel, taps: list[PerChannel]) -> PerChannel:
    """Return the convolution of `x` by the taps."""
    out = torch.zeros_like(x)
    for back, tap in enumerate(taps[: x.shape[1]]):
        out[:, back:] += tap[:, back:] * x[:, : x.shape[1] - back]
    return out


def _same_document(layout: Layout, back: int) -> Bool[Tensor, "batch pos"]:
    """Return True where the position `back` before is a token of the same document."""
    same = torch.zeros_like(layout.is_real)
    pos, n = layout.pos, layout.length
    if back < n:
        same[:, back:] = (pos[:, back:] >= back) & (pos[:, : n - back] == pos[:, back:] - back)
    return same & layout.is_real


def inputs_of(r: Recurrence, channels: Index, terms: Terms, through: Through) -> PerChannel:
    """Return the input of the matrix, 0 at padding."""
    x = terms.x if through == "scan" else at_least_fp32(r["in_proj"][..., channels])
    return r.layout.zero_padding(x)
