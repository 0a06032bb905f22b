"""The choice of how a forward runs, depending on the attached hooks. No other module makes it.

Each fast way has a slow one as its definition, and computes the same values up to rounding.

==========================  =================================================================
attached hooks              what runs
==========================  =================================================================
nothing                     long inputs in pieces, attention in blocks of queries (`attend`),
                            fast scans, values overwritten if not read again
`per_position` hooks only   the same, with hooks called once a piece; on scores and patterns,
                            and then also on `hook_z`, once a block of queries
watchers only               the sequence whole; scores and patterns joined from blocks
any other hook              the sequence whole; on scores or pattern, attention by its
                            definition (`attend.attend_whole`)
on the recurrent state      watchers: the fast scan; `hook_at`: the fast scan split at its
                            positions; any other: one step at a time (`scan.hooked_scan`)
on `hook_result`,           heads computed separately (`Attention`)
`hook_*_input`
on an expert's values       the values of each chosen expert are kept (`MoE`)
==========================  =================================================================

With autograd the sequence is whole and nothing is overwritten; attention is torch's fused one, or
the definition if scores or patterns are hooked. Under transforms of `torch.func` everything runs by
its definition (`transforms`).
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import torch

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.point import HookPoint

PIECE = 512
"""Positions of a piece: large enough for fast products, small enough for small temporaries."""

AttentionWay = Literal["fused", "blocks", "whole"]


def piece_length(n_pos: int, points: Iterable[HookPoint], piece: int = PIECE) -> int:
    """Return how many positions to run at a time.

    Pieces bound the memory of a long prefill, with the same result. With autograd the sequence is
    not cut, as the graph would keep all pieces.

    Args:
        n_pos: positions to run.
        points: the hook points that would be called once a piece.
        piece: tokens in a piece.
    """
    if n_pos <= piece or transforms.is_followed():
        return n_pos
    return piece if all(p.takes_pieces for p in points) else n_pos


def attention_way(
    scores: HookPoint, pattern: HookPoint, z: HookPoint, device: torch.device
) -> AttentionWay:
    """Return how attention computes its scores, pattern and output for the hooks on them.

    "fused" is torch's kernel, without hooks; "blocks" materialises scores and patterns for a block
    of queries at a time; "whole" materialises them for all queries, and is the definition. On a
    CPU, blocks take no more time than the kernel.
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
    """Return a context in which operations of a decoding step skip torch's autograd dispatch.

    Under `no_grad` autograd dispatch does nothing, and takes a tenth of a small step's time. It is
    not skipped with hooks attached, as they may use autograd, nor in long inputs, where it does not
    matter.
    """
    if n_pos > 1 or transforms.is_followed() or any(p.fwd_hooks or p.bwd_hooks for p in points):
        return nullcontext()
    return getattr(torch._C, "_AutoDispatchBelowAutograd", nullcontext)()


def may_overwrite(*points: HookPoint) -> bool:
    """Whether a value may be changed in place after it has passed these points.

    It may not if a hook receives it and may keep it, or if autograd or a transform needs it. Call
    this before the value passes the points, as a hook may remove itself.
    """
    if transforms.is_followed():
        return False
    for point in points:  # noqa: SIM110 (called 25 times a token; a generator costs twice as much)
        if point.fwd_hooks:
            return False
    return True
