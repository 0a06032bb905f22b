"""Mamba's selective scan without its hooks: bounded scratch, one time-chunk after another."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.scan import scan, scan_loop
from hooked_hybrid.shapes import Inner

CHUNK = 32
SmallInputs = Float[Tensor, "batch pos d_state"]
SSMState = Float[Tensor, "batch d_inner d_state"]


def selective_scan_loop(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    C: SmallInputs,
    h0: SSMState,
    resets: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Inner, SSMState]:
    """Return C h at every position and the last state: the definition.

    Args:
        u: what the recurrence reads.
        dt: step sizes, after softplus.
        A: decay rates, negative.
        B, C: input and output maps of each position.
        h0: the state before the first position.
        resets: True where the past is forgotten.

    Source: Mamba, algorithm 2; `selective_scan_ref` of mamba-ssm without its D and z.
    """
    h = scan_loop(*_decays_and_writes(u, dt, A, B, resets), h0)
    return torch.einsum("bsen,bsn->bse", h, C), h[:, -1]


def selective_scan(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    C: SmallInputs,
    h0: SSMState,
    resets: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Inner, SSMState]:
    """Return C h at every position and the last state; the fast twin of `selective_scan_loop`.

    Decays and writes of one chunk of positions are held at a time. With autograd, the states of
    the whole sequence are kept for the backward pass.
    """
    if torch.is_grad_enabled() and any(t.requires_grad for t in (u, dt, A, B, C, h0)):
        h = scan(*_decays_and_writes(u, dt, A, B, resets), h0)
        return torch.einsum("bsen,bsn->bse", h, C), h[:, -1].clone()
    y = torch.empty_like(u)
    h = h0.transpose(1, 2)
    rates = A.T.contiguous()
    for start in range(0, u.shape[1], CHUNK):
        part = slice(start, start + CHUNK)
        reset = None if resets is None else resets[:, part]
        y[:, part], h = _scan_chunk(
            u[:, part], dt[:, part], rates, B[:, part], C[:, part], h, reset
        )
    return y, h.transpose(1, 2).contiguous()


def _scan_chunk(
    u: Inner,
    dt: Inner,
    rates: Float[Tensor, "d_state d_inner"],
    B: SmallInputs,
    C: SmallInputs,
    h: Float[Tensor, "batch d_state d_inner"],
    resets: Bool[Tensor, "batch pos"] | None,
) -> tuple[Inner, Float[Tensor, "batch d_state d_inner"]]:
    """Return C h of one chunk, the long axis of channels last and so contiguous."""
    decay = (dt[:, :, None] * rates).exp_()
    if resets is not None:
        decay.masked_fill_(resets[..., None, None], 0)
    states = (dt[:, :, None] * B[..., None]).mul_(u[:, :, None])
    for t in range(u.shape[1]):
        h = torch.addcmul(states[:, t], decay[:, t], h, out=states[:, t])
    return (C[:, :, None] @ states)[:, :, 0], states[:, -1].clone()


def _decays_and_writes(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    resets: Bool[Tensor, "batch pos"] | None,
) -> tuple[Tensor, Tensor]:
    decay = torch.exp(dt[..., None] * A)
    if resets is not None:
        decay = decay.masked_fill(resets[..., None, None], 0)
    return decay, dt[..., None] * B[:, :, None] * u[..., None]
