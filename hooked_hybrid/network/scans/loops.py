"""The definitions of the scans: one step after another, by operations that torch differentiates."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.shapes import Inner

States = Float[Tensor, "batch pos *channels"]
State = Float[Tensor, "batch *channels"]
SmallInputs = Float[Tensor, "batch pos d_state"]
SSMState = Float[Tensor, "batch d_inner d_state"]


def scan_loop(a: States, x: States, h0: State) -> States:
    """Return every state of h_t = a_t h_{t-1} + x_t, one step at a time: the definition.

    Args:
        a: decays, 0 where the past is forgotten.
        x: added to the state.
        h0: the state before the first position.
    """
    h, states = h0, []
    for a_t, x_t in zip(a.unbind(1), x.unbind(1), strict=True):
        h = a_t * h + x_t
        states.append(h)
    return torch.stack(states, dim=1)


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
        u: the input.
        dt: step sizes, after softplus.
        A: decay rates, negative.
        B, C: input and output maps of each position.
        h0: the state before the first position.
        resets: True where the past is forgotten.

    Source: Mamba, algorithm 2; `selective_scan_ref` of mamba-ssm without its D and z.
    """
    decay = torch.exp(dt[..., None] * A)
    if resets is not None:
        decay = decay.masked_fill(resets[..., None, None], 0)
    h = scan_loop(decay, dt[..., None] * B[:, :, None] * u[..., None], h0)
    return torch.einsum("bsen,bsn->bse", h, C), h[:, -1]


HeadInputs = Float[Tensor, "batch pos head d_head"]
PerHead = Float[Tensor, "batch pos head"]
GroupInputs = Float[Tensor, "batch pos group d_state"]
HeadState = Float[Tensor, "batch head d_head d_state"]


def ssd_scan_loop(
    x: HeadInputs, decay: PerHead, B: GroupInputs, C: GroupInputs, h0: HeadState
) -> tuple[HeadInputs, HeadState]:
    """Return C h at every position and the last state, for h_t = a_t h_{t-1} + x_t B_t.

    Args:
        x: the scan's input, times its step sizes.
        decay: one number a head, 0 where the past is forgotten.
        B, C: input and output maps of each position, shared by the heads of a group.
        h0: the state before the first position.

    Source: Mamba-2 (Dao & Gu 2024), section 3; `ssd_minimal_discrete` of mamba-ssm.
    """
    n_each = x.shape[2] // B.shape[2]
    B, C = (t.repeat_interleave(n_each, dim=2) for t in (B, C))
    write = x[..., None] * B[..., None, :]
    h = scan_loop(decay[..., None, None].expand_as(write), write, h0)
    return torch.einsum("bshpn,bshn->bshp", h, C), h[:, -1]
