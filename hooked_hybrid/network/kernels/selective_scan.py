"""Mamba's selective scan on a GPU as one Triton kernel that stores no states but the last."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.network.kernels import need_gradients, triton_reads
from hooked_hybrid.network.kernels.trials import Pair, waves, works
from hooked_hybrid.shapes import Inner

BLOCK_D = 16  # channels of a program, which is one warp, at most
ENTRIES = 1024  # of a state in a program: more than 32 a thread do not stay in registers
STAGES = 4  # positions that are read ahead
# Products fuse into sums, as in `addcmul`; Triton 3.10 changes its default.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
SmallInputs = Float[Tensor, "batch pos d_state"]
SSMState = Float[Tensor, "batch d_inner d_state"]


def usable(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    resets: Tensor | None = None,
) -> bool:
    """Return whether `selective_scan` accepts these: fp32, on one GPU, without autograd."""
    floats = (u, dt, A, B, C, h0)
    return (
        all(t.dtype == torch.float32 for t in floats)
        and triton_reads(*floats, *(() if resets is None else (resets,)))
        and not need_gradients(*floats)
        and works("the Triton kernel of selective scans", _trial, u.device, u.dtype)
    )


def selective_scan(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    C: SmallInputs,
    h0: SSMState,
    resets: Bool[Tensor, "batch pos"] | None = None,
) -> tuple[Inner, SSMState]:
    """Return C h at every position and the last state; twin of `selective_scan_loop`.

    Each program runs over all positions of a block of channels. Decays near 1 are applied as their
    difference from 1, so for long memories the result is closer to a float64 loop than with fp32
    decays.

    Args:
        u, dt, A, B, C, h0, resets: as in `network.scans.selective_scan.selective_scan_loop`.

    Raises:
        ValueError: shapes that do not fit, or inputs that are not `usable`.

    Source: Mamba (Gu & Dao 2023), algorithm 2 and section 3.3.2.
    """
    _check(u, dt, A, B, C, h0, resets)
    y, last = torch.empty_like(u, memory_format=torch.contiguous_format), h0.clone()
    if not u.numel():
        return y, last
    from hooked_hybrid.network.kernels import triton_kernels

    batch, n_pos, d_inner = u.shape
    last = torch.empty_like(h0, memory_format=torch.contiguous_format)
    inputs = [t.contiguous() for t in (u, dt, A, B, C, h0)]
    forget = None if resets is None else resets.int().contiguous()
    block_d, block_n = blocks(A.shape[1])
    with torch.cuda.device_of(u):
        triton_kernels.selective_scan[(-(-d_inner // block_d), batch)](
            *(*inputs, forget, y, last, n_pos, d_inner, A.shape[1]),
            *(resets is not None, block_d, block_n, STAGES),
            **OPTIONS,
        )
    return y, last


def blocks(d_state: int) -> tuple[int, int]:
    """Return how many channels, and entries of each state, a program holds: powers of 2."""
    block_n = 1 << (d_state - 1).bit_length()
    return max(1, min(BLOCK_D, ENTRIES // block_n)), block_n


@torch.no_grad()
def _trial(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return outputs and last states, with resets and without, by the kernel and by the loop."""
    from hooked_hybrid.network.scans.loops import selective_scan_loop

    shapes = ((2, 9, 16), (2, 9, 16), (16, 16), (2, 9, 16), (2, 9, 16), (2, 16, 16))
    u, dt, A, B, C, h0 = (waves(*shape, seed=i) for i, shape in enumerate(shapes))
    given = (u, 0.6 + 0.5 * dt, -1.1 - A, B, C, h0)  # step sizes are positive, rates negative
    inputs = [t.to(device, dtype) for t in given]
    with_resets = (*inputs, inputs[0][:, :, 0] > 0.5)
    found = (*selective_scan(*inputs), *selective_scan(*with_resets))
    expected = (*selective_scan_loop(*inputs), *selective_scan_loop(*with_resets))
    return found, expected


def _check(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor,
    resets: Tensor | None,
) -> None:
    floats = {"u": u, "dt": dt, "A": A, "B": B, "C": C, "h0": h0}
    shapes = {name: tuple(t.shape) for name, t in floats.items()}
    if u.ndim != 3 or A.ndim != 2 or not A.shape[1]:
        raise ValueError(f"{shapes}: give u as [batch pos d_inner] and A as [d_inner d_state]")
    (batch, n_pos, d_inner), d_state = u.shape, A.shape[1]
    wanted = {
        **{"u": (batch, n_pos, d_inner), "dt": (batch, n_pos, d_inner), "A": (d_inner, d_state)},
        **{"B": (batch, n_pos, d_state), "C": (batch, n_pos, d_state)},
        "h0": (batch, d_inner, d_state),
    }
    if shapes != wanted:
        raise ValueError(f"shapes are {shapes}; with this u and A they must be {wanted}")
    if resets is not None and (resets.shape != (batch, n_pos) or resets.dtype != torch.bool):
        raise ValueError(
            f"resets is {resets.dtype} of {tuple(resets.shape)}; give booleans of {(batch, n_pos)}"
        )
    if any(t.dtype != torch.float32 for t in floats.values()):
        raise ValueError(f"{ {name: t.dtype for name, t in floats.items()} }: give all in float32")
    if need_gradients(*floats.values()):
        raise ValueError("this kernel has no gradient; use `kernels.mamba_ssm` or `selective_scan`")
    if not triton_reads(*floats.values(), *(() if resets is None else (resets,))):
        raise ValueError(f"Triton cannot run on {u.device}; use the plain `selective_scan`")
