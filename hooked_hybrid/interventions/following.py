"""Attention weights that follow what is being written: one token of a span at each step."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.rows import (
    Handover,
    PerRow,
    Spans,
    entries_of_rows,
    in_spans,
    read_per_row,
    read_spans,
)
from hooked_hybrid.shapes import Pattern

Token = Literal["next", "last"]
Weight = Literal["one", "mean", "sum"]
Outside = Literal["zero", "keep"]
_BACK: dict[str, int] = {"next": 0, "last": 1}


@picklable
def follow_span(
    spans: Spans,
    begin: PerRow,
    token: Token = "next",
    *,
    weight: Weight = "one",
    outside: Outside = "zero",
) -> list[HookSpec]:
    """Give weight to one token of a span at each query, the one that its writing has come to.

    The query at position `begin + j` is taken to write token j of the span: by its place, whatever
    the model has really written. Of the span, only one token then has a weight:

    - token "next": the one to be written, j. A head that copies looks there.
    - token "last": the one before it, j - 1, whose successor is the one to be written. For j = 0 it
      would stand outside the span, and there is none.

    Queries before `begin`, after the last token of the span, and those that cannot see the token
    (out of their window) have no such token: all their weights on the span are 0.

    Args:
        spans: (start, stop) of what is written, in document positions; one of them, or one for each
            row of the original batch as a tensor [batch 2] or as `[[(3, 6)], [(2, 5)]]`. Where a
            row has several (a context read twice), the last.
        begin: position of the query that writes the first token of the span, for all rows or each:
            that of the prompt's last token, where an answer begins with the span.
        token: which one has a weight.
        weight: "one" is 1; "mean" the mean of the query's weights on the span, as "binary" of
            `manipulate_span` gives to each of its tokens; "sum" all the weight on the span.
        outside: "zero" sets weights outside the span to 0, as in the paper's "binary"; "keep"
            leaves them.

    Returns:
        Hooks on `hook_attn_scores`, which say what a query can see, and on `hook_pattern`
        [batch head query key]; no weight is renormalised.

    Raises:
        ValueError: spans or a beginning that are none, an unknown option; when it first runs, for
            another number of rows.

    Source: ours; the thesis (Michalak 2025) asks for a binary manipulation that moves with the
    token being predicted.
    """
    bounds, first = read_spans(spans)[..., -1:, :], read_per_row(begin, "begin")
    _check(token, weight, outside)
    visible = Handover()

    @watcher
    @per_position
    def look(scores: Pattern, hook: HookPoint) -> None:
        visible.leave(hook, scores > torch.finfo(scores.dtype).min)

    @per_position
    def follow(pattern: Pattern, hook: HookPoint) -> Pattern:
        span = in_spans(bounds, hook)[:, None, None] & visible.take(hook)
        target = _target(bounds, first, _BACK[token], hook)[:, None] & span
        wide = torch.promote_types(pattern.dtype, torch.float32)
        on_span = pattern.masked_fill(~span, 0).sum(-1, keepdim=True, dtype=wide)
        mean = on_span / span.sum(-1, keepdim=True).clamp_min(1)
        given = {"one": torch.ones_like(on_span), "mean": mean, "sum": on_span}[weight]
        rest = torch.zeros_like(pattern) if outside == "zero" else pattern.masked_fill(span, 0)
        return torch.where(target, given.to(pattern.dtype), rest)

    return [
        (lambda name: name.endswith(".attn.hook_attn_scores"), look),
        (lambda name: name.endswith(".attn.hook_pattern"), follow),
    ]


def _target(
    bounds: Tensor, first: Tensor, back: int, hook: HookPoint
) -> Bool[Tensor, "batch query key"]:
    """Return True at the key that each query's token of the span is at."""
    run = hook.run
    assert run.key_pos is not None  # `in_spans` has looked
    if bounds.ndim == 3:
        bounds = entries_of_rows(bounds, hook, "spans")
    start, stop = bounds.to(run.key_pos.device)[..., 0, :].expand(len(run.rows), 2).unbind(-1)
    if first.ndim:
        first = entries_of_rows(first, hook, "begin")[:, None]
    step = run.query_pos - first.to(run.query_pos.device)
    place = start[:, None] + step - back
    there = (step >= 0) & (place >= start[:, None]) & (place + back < stop[:, None])
    return (run.key_pos[:, None] == place[..., None]) & there[..., None]


def _check(token: str, weight: str, outside: str) -> None:
    for name, value, known in (
        ("token", token, get_args(Token)),
        ("weight", weight, get_args(Weight)),
        ("outside", outside, get_args(Outside)),
    ):
        if value not in known:
            raise ValueError(f"{name}={value!r}: give one of {', '.join(known)}")
