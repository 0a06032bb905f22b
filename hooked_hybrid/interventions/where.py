"""Restricting a hook to some positions, or to some rows of a batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_hybrid.hooks.marks import HookFn, is_per_position, per_position, positions_of
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import Indices
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.places import (
    Positions,
    is_among,
    is_of_rows,
    marks_of,
    read_positions,
    read_rows,
)


@picklable
def hook_at(fn: HookFn, positions: Positions) -> HookFn:
    """Return a hook that applies `fn` at some positions only, one position at a time.

    `fn` is called with the value at one position, `[batch 1 ...]` (or `[batch head 1 key]`), in
    every forward that contains the position: a plain one, prefill, or a generation step. On
    `hook_ssm_state`, where other hooks are called once a position, the scan stays fast between
    the positions.

    Args:
        fn: a hook.
        positions: in the document, counted from 0, as in `hook.run.query_pos`, also in left-padded
            rows. An int, a slice with an end, several in a list, array or tensor; or a mask that
            is True at them: [pos], or [batch pos] if rows differ.

    Raises:
        ValueError: no position, or one that is not a whole number from 0 on; when run, a mask for
            another number of rows, or one that ends before the last token.

    Examples:
        >>> hook = interventions.hook_at(lambda value, hook: 0 * value, [0, 15])
        >>> with model.hooks(fwd_hooks=[("hook_embed", hook)]):
        ...     _, edited = model.run_with_cache(tokens)
        >>> (edited["embed"][0].abs().sum(-1) == 0).nonzero().flatten()
        tensor([ 0, 15])
    """
    wanted = read_positions(positions)
    assert wanted is not None

    def at_positions(value: Tensor, hook: HookPoint) -> Tensor:
        dim = hook.pos_dim
        at = is_among(hook.run.query_pos, wanted, hook).to(value.device)
        for t in at.any(dim=0).nonzero()[:, 0].tolist():
            old = value.narrow(dim, t, 1)
            part = old.clone()
            with hook.seeing(hook.run.at(t, t + 1)):
                new = fn(part, hook=hook)
            new = part if new is None else new  # an edit in place has changed it
            here = at[:, t].view(-1, *(1,) * (value.ndim - 1))
            index = torch.tensor([t], device=value.device)
            value = value.index_copy(dim, index, torch.where(here, new, old))
        return value

    marked: Any = per_position(at_positions)
    marked.positions = marks_of(wanted)
    return marked


@picklable
def on_rows(fn: HookFn, rows: Indices) -> HookFn:
    """Return a hook that applies `fn` to some rows of the batch only.

    `fn` is called with only these rows and their `hook.run`, as if they were the whole batch; other
    rows are unchanged. Rows are those of the original batch, also after a generation has dropped
    finished rows.

    Args:
        fn: a hook; its marks (`per_position`, positions) are kept.
        rows: indices into the original batch, in the forms of positions in `hook_at`, or a mask
            [batch].

    Raises:
        ValueError: no row, or one that is not a whole number from 0 on; when run, a row that the
            batch does not have, or a mask of another number of rows.

    Examples:
        >>> hook = interventions.on_rows(lambda value, hook: 0 * value, [1])
        >>> two = torch.cat([tokens, tokens])
        >>> with model.hooks(fwd_hooks=[("hook_embed", hook)]):
        ...     _, edited = model.run_with_cache(two)
        >>> (edited["embed"] == 0).all(-1).all(-1)
        tensor([False,  True])
    """
    wanted = read_rows(rows)
    assert wanted is not None

    def for_rows(value: Tensor, hook: HookPoint) -> Tensor | None:
        run = hook.run
        index = is_of_rows(wanted, hook).nonzero()[:, 0]
        if index.numel() == 0:
            return None
        with hook.seeing(run.of_rows(index)):
            part = value[index]
            new = fn(part, hook=hook)
        return value.index_copy(0, index, part if new is None else new)

    marked: Any = per_position(for_rows) if is_per_position(fn) else for_rows
    if (positions := positions_of(fn)) is not None:
        marked.positions = positions
    return marked
