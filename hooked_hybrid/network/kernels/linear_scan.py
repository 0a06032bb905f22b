"""h_t = a_t h_{t-1} + x_t on a GPU: three Triton kernels, two of them parallel over chunks.

With one program for each block of channels, which runs over all positions, most of a GPU would be
idle at batch 1. So, as in `scan.scan_chunked`, a first kernel computes the effect of each chunk on
a state, a second one carries the state over the chunks, and a third one writes the states. All
three use fp64 and round each state once. No decay is divided by, and no logarithm of one is taken,
so decays of 0 and 1 are exact.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.network.kernels import need_gradients, triton_reads
from hooked_hybrid.network.kernels.trials import Pair, waves, works

CHUNK = 64
BLOCK = 128  # channels of a program, which is one warp: 16 bytes a thread
STAGES = 4  # positions read ahead
DTYPES = (torch.float32, torch.float64)
# Products fuse into sums, as in `addcmul`; Triton 3.10 changes its default.
OPTIONS = {"num_warps": 1, "enable_fp_fusion": True}
States = Float[Tensor, "batch pos *channels"]
State = Float[Tensor, "batch *channels"]


def usable(a: Tensor, x: Tensor, h0: Tensor) -> bool:
    """Return whether `linear_scan` accepts these: fp32 or fp64, on one GPU, without autograd."""
    return (
        x.dtype in DTYPES
        and a.dtype == h0.dtype == x.dtype
        and triton_reads(a, x, h0)
        and not need_gradients(a, x, h0)
        and works("the Triton kernel of linear scans", _trial, x.device, x.dtype)
    )


def linear_scan(a: States, x: States, h0: State, reverse: bool = False) -> States:
    """Return every state of h_t = a_t h_{t-1} + x_t; the fast version of `scan.scan_loop`.

    Args:
        a: decays, 0 where the past is forgotten.
        x: added to the state.
        h0: the state before the first position; with `reverse`, after the last one.
        reverse: run from the last position to the first, h_t = a_t h_{t+1} + x_t, as the backward
            pass of a scan does.

    Raises:
        ValueError: shapes that do not fit, or inputs that are not `usable`. Half precision is
            refused because it cannot hold decays near 1.
    """
    _check(a, x, h0)
    if not x.numel():
        return torch.empty_like(x)
    batch, n_pos = x.shape[:2]
    flat = (batch, n_pos, x[0, 0].numel())
    a, x_flat, h0 = a.reshape(flat).contiguous(), x.reshape(flat).contiguous(), h0.contiguous()
    states = torch.empty_like(x_flat)
    with torch.cuda.device_of(x):
        _launch(a, x_flat, h0, states, reverse)
    return states.view(x.shape)


def _launch(a: Tensor, x: Tensor, h0: Tensor, states: Tensor, reverse: bool) -> None:
    """Fill `states` [batch pos channel] from inputs of that shape."""
    from hooked_hybrid.network.kernels import triton_kernels as kernels

    batch, n_pos, n_channels = x.shape
    blocks, n_full = -(-n_channels // BLOCK), (n_pos - 1) // CHUNK
    start = h0
    if n_full:
        decay = x.new_empty(batch, n_full, n_channels, dtype=torch.float64)
        written = torch.empty_like(decay)
        start = x.new_empty(batch, n_full + 1, n_channels, dtype=torch.float64)
        kernels.summarise_chunks[(blocks, n_full, batch)](
            *(a, x, decay, written, n_pos, n_channels, n_full, reverse, CHUNK, BLOCK, STAGES),
            **OPTIONS,
        )
        kernels.carry_over_chunks[(blocks, batch)](
            *(decay, written, h0, start, n_channels, n_full, BLOCK, 2 * STAGES), **OPTIONS
        )
    kernels.write_states[(blocks, n_full + 1, batch)](
        *(a, x, start, states, n_pos, n_channels, n_full + 1, reverse, CHUNK, BLOCK, STAGES),
        **OPTIONS,
    )


def _check(a: Tensor, x: Tensor, h0: Tensor) -> None:
    if x.ndim < 2 or a.shape != x.shape or h0.shape != (x.shape[0], *x.shape[2:]):
        raise ValueError(
            f"a is {tuple(a.shape)}, x is {tuple(x.shape)} and h0 is {tuple(h0.shape)}; give a and "
            "x as [batch pos *channels] and h0 as [batch *channels]"
        )
    if x.dtype not in DTYPES or not a.dtype == h0.dtype == x.dtype:
        raise ValueError(
            f"a is {a.dtype}, x is {x.dtype} and h0 is {h0.dtype}; give all in float32 or all in "
            "float64"
        )
    if need_gradients(a, x, h0):
        raise ValueError("this kernel has no gradient; `scan.scan` has, and runs it inside its own")
    if not triton_reads(a, x, h0):
        raise ValueError(f"Triton cannot run on {a.device}, {x.device} and {h0.device}; use `scan`")


@torch.no_grad()
def _trial(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return the states of two chunks, forward and reverse, by the kernels and by the loop."""
    from hooked_hybrid.network.scans.loops import scan_loop

    shapes = ((2, CHUNK + 6, 16), (2, CHUNK + 6, 16), (2, 16))
    a, x, h0 = (waves(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes))
    a = a.abs()
    backwards = scan_loop(a.flip(1), x.flip(1), h0).flip(1)
    return (
        (linear_scan(a, x, h0), linear_scan(a, x, h0, reverse=True)),
        (scan_loop(a, x, h0), backwards),
    )
