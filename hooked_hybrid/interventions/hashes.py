"""Pseudo-random numbers by position, which do not depend on how a sequence is cut."""

from __future__ import annotations

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint

_MASK = 2**32 - 1


def hashes(
    hook: HookPoint, n_heads: int, seed: int, columns: Int[Tensor, " column"] | None = None
) -> Int[Tensor, "batch head query column"]:
    """Return numbers below 2**32, each a function of seed, layer, head, query and key only.

    Without `columns` (indices of keys) there is one column, for no key.
    """
    run = hook.run
    device = run.query_pos.device
    parts = [
        torch.tensor(hook.layer(), device=device),
        torch.arange(n_heads, device=device)[:, None, None],
        run.query_pos[:, None, :, None],
    ]
    if columns is not None:
        assert run.key_pos is not None
        parts.append(run.key_pos[:, columns][:, None, None])
    hashed = _mixed(torch.tensor(seed & _MASK, device=device))
    for part in parts:
        hashed = _mixed(hashed ^ (part & _MASK))
    return hashed


def _mixed(x: Tensor) -> Tensor:
    """Return a pseudo-random 32-bit integer for each.

    Source: `lowbias32` of C. Wellons, "Prospecting for Hash Functions", 2018, after one addition.
    """
    x = (x + 0x9E3779B9) & _MASK  # lowbias32 maps 0 to 0
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)
