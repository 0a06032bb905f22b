"""Mamba's selective scan by the CUDA kernels of mamba-ssm, which are differentiable once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hooked_hybrid.network.kernels import importable, need_gradients
from hooked_hybrid.network.kernels.trials import Pair, gradients_of, waves, works
from hooked_hybrid.network.kernels.twice import twice_differentiable
from hooked_hybrid.shapes import Inner

MODULE = "mamba_ssm.ops.selective_scan_interface"
MAX_D_STATE = 256
SmallInputs = Float[Tensor, "batch pos d_state"]
SSMState = Float[Tensor, "batch d_inner d_state"]


def usable(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    h0: Tensor | None = None,
    resets: Tensor | None = None,
) -> bool:
    """Return whether `selective_scan` accepts these.

    Args:
        u, dt, A, B, C, resets: as in `network.scans.selective_scan.selective_scan_loop`.
        h0: must be None, a state of zero, as mamba-ssm takes no initial state and no resets.
    """
    return (
        h0 is None
        and resets is None
        and all(t.is_cuda and t.device == u.device for t in (u, dt, A, B, C))
        and all(t.dtype == torch.float32 for t in (u, dt, A, B, C))
        and 0 < A.shape[1] <= MAX_D_STATE
        and u.numel() > 0
        and importable(MODULE)
        and works("mamba-ssm", _trial, u.device, u.dtype)
    )


def selective_scan(
    u: Inner,
    dt: Inner,
    A: Float[Tensor, "d_inner d_state"],
    B: SmallInputs,
    C: SmallInputs,
) -> tuple[Inner, SSMState]:
    """Return C h at every position and the last state, from a state of zero.

    It multiplies decays in fp32 over up to 2048 positions; `kernels.selective_scan` is more
    accurate for long memories. First derivatives are the package's, second derivatives the
    definition's.

    Args:
        u, dt, A, B, C: as in `network.scans.selective_scan.selective_scan_loop`.

    Source: `selective_scan_fn` of mamba-ssm 2.3, without its D, z and softplus.
    """
    y, last = twice_differentiable(_by_package(u, dt, A, B, C), _definition, (u, dt, A, B, C))
    return y, last


def _by_package(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    n_pos, d_state = u.shape[1], A.shape[1]
    u, dt, B, C = (t.transpose(1, 2) for t in (u, dt, B, C))
    if not need_gradients(u, dt, A, B, C):
        y, last = selective_scan_fn(u, dt, A, B, C, return_last_state=True)
        return y.transpose(1, 2), last.contiguous()
    # The package's last state has no gradient. So the state is read as the y of d_state further
    # positions, which do not change it (dt = 0) and whose C selects one entry each.
    u, dt, B = (pad(t, (0, d_state)) for t in (u, dt, B))
    entries = torch.eye(d_state, dtype=C.dtype, device=C.device).expand(len(C), -1, -1)
    y = selective_scan_fn(u, dt, A, B, torch.cat([C, entries], dim=2))
    return y[..., :n_pos].transpose(1, 2), y[..., n_pos:]


def _definition(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the same as `selective_scan`, one position after another."""
    from hooked_hybrid.network.scans.loops import selective_scan_loop

    return selective_scan_loop(u, dt, A, B, C, u.new_zeros(u.shape[0], *A.shape))


def _trial(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return outputs and gradients, by the kernels and by the definition."""
    shapes = ((2, 5, 16), (2, 5, 16), (16, 4), (2, 5, 4), (2, 5, 4))
    u, dt, A, B, C = (waves(*shape, seed=i) for i, shape in enumerate(shapes))
    given = (u, 0.6 + 0.5 * dt, -1.1 - A, B, C)  # step sizes are positive, decay rates negative
    with torch.enable_grad():
        inputs = [t.to(device, dtype).requires_grad_() for t in given]
        pair = selective_scan(*inputs), _definition(*inputs)
        found, expected = gradients_of(pair, inputs)
    return (*pair[0], *found), (*pair[1], *expected)
