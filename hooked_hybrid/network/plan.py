"""How a forward runs, chosen from what is attached: the one place that decides it.

Each fast way has a slow one that is its definition, and gives the same values to rounding.

==========================  =================================================================
what is attached            what runs
==========================  =================================================================
nothing                     long inputs in pieces, attention in blocks of queries (`attend`),
                            fast scans, values overwritten if nothing else reads them
`per_position` hooks only   the same, hooks called once a piece; on scores and patterns, and
                            then on `hook_z` too, once a block of queries
watchers only               the sequence whole; scores and patterns put together from blocks
any other hook              the sequence whole; on scores or pattern, attention as it is
                            defined (`attend.attend_whole`)
on the recurrent state      watchers: the fast scan; `hook_at`: the fast scan split at its
                            positions; any other: one step at a time (`scan.hooked_scan`)
on `hook_result`,           heads written or read one by one (`Attention`)
`hook_*_input`
on an expert's own values   each chosen expert's values are kept (`MoE`)
==========================  =================================================================

With autograd the sequence is whole and nothing is overwritten; attention is torch's fused one, or
as it is defined where scores or patterns are hooked. Under transforms of `torch.func` everything
runs by its definition (`transforms`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.point import HookPoint

PIECE = 512
"""Positions of a piece: matrices are multiplied at full speed, and temporaries stay small."""

AttentionWay = Literal["fused", "blocks", "whole"]


def piece_length(n_pos: int, points: Iterable[HookPoint], piece: int = PIECE) -> int:
    """Return how many positions to run at a time.

    Pieces bound the memory of a long prefill and give the same result as the whole. A graph for
    autograd is kept whole, as cutting it saves nothing.

    Args:
        n_pos: positions to run.
        points: every hook point that would be called once a piece.
        piece: tokens in a piece.
    """
    if n_pos <= piece or transforms.is_followed():
        return n_pos
    return piece if all(p.takes_pieces for p in points) else n_pos


def attention_way(
    scores: HookPoint, pattern: HookPoint, z: HookPoint, device: torch.device
) -> AttentionWay:
    """Return how attention computes what the hooks on its scores, pattern and output see.

    "fused" is torch's kernel, where nothing is attached; "blocks" materialises scores and patterns
    for a block of queries at a time; "whole" does for all of them, and is the definition. Blocks
    cost a CPU no more than the kernel does.
    """
    if transforms.are_active():
        return "whole"
    if not (scores.is_hooked or pattern.is_hooked):
        return "fused" if torch.is_grad_enabled() or device.type != "cpu" else "blocks"
    if torch.is_grad_enabled():
        return "whole"
    points = (scores, pattern, z)
    takes_blocks = all(p.takes_pieces for p in points)
    only_watched = not any(p.has_editors for p in points)
    return "blocks" if takes_blocks or only_watched else "whole"


def dispatch(n_pos: int, points: Iterable[HookPoint]) -> AbstractContextManager[Any]:
    """Return a context in which a step's operations skip autograd's part of torch's dispatcher.

    Under `no_grad` that part does nothing and still costs a tenth of a small step's time. Hooks may
    use autograd themselves, so that it stays where any is attached; in long inputs it does not
    matter.
    """
    if n_pos > 1 or transforms.is_followed() or any(p.fwd_hooks or p.bwd_hooks for p in points):
        return nullcontext()
    return getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)()


def may_overwrite(*points: HookPoint) -> bool:
    """Whether a value may be changed in place after it has passed these points.

    It may not where a hook sees it, and may keep it, or where autograd or a transform needs it. To
    be called before the value passes: a hook may remove itself.
    """
    if transforms.is_followed():
        return False
    for point in points:  # noqa: SIM110 (called 25 times a token; a generator costs twice as much)
        if point.fwd_hooks:
            return False
    return True
