"""How a forward runs, chosen from what is attached: the one place that decides it.

=========================  ==================================================================
what is attached           what runs
=========================  ==================================================================
nothing                    fused attention, fast scans, long inputs in pieces (without autograd)
`per_position` hooks only  the same, hooks called once a piece
any other hook             the sequence whole
on scores or pattern       attention through materialised scores (`Attention._attend_hooked`)
on the recurrent state     watchers: the fast scan; `hook_at`: the fast scan split at its
                           positions; any other: one step at a time (`scan.hooked_scan`)
on `hook_result`, `hook_*_input`   heads written or read one by one (`Attention`)
=========================  ==================================================================
"""

from __future__ import annotations

from collections.abc import Iterable

import torch

from hooked_hybrid.hooks import HookPoint

PIECE = 512


def piece_length(n_pos: int, points: Iterable[HookPoint], piece: int = PIECE) -> int:
    """Return how many positions to run at a time.

    Pieces bound the memory of a long prefill and give the same result as the whole. A graph for
    autograd is kept whole, as cutting it saves nothing.

    Args:
        n_pos: positions to run.
        points: every hook point that would be called once a piece.
        piece: tokens in a piece.
    """
    if n_pos <= piece or torch.is_grad_enabled():
        return n_pos
    return piece if all(p.takes_pieces for p in points) else n_pos
