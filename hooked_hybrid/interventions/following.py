"""Attention weights that follow the generated text: on one token of a span at each step."""

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
    """Give weight to one token of a span at each query: the one that the output has reached.

    The query at position `begin + j` is assumed to write token j of the span, whatever the model
    actually writes. Only one token of the span then has a weight:

    - token "next": the token to be written, j. A copying head attends to it.
    - token "last": the token before it, j - 1. For j = 0 it would be outside the span, so there is
      none.

    Queries before `begin`, after the last token of the span, and those whose window excludes the
    token have no such token: all their weights on the span are 0.

    Args:
        spans: (start, stop) of the text to write, in document positions; one, or one for each row
            of the original batch as a tensor [batch 2] or as `[[(3, 6)], [(2, 5)]]`. If a row has
            several (a context read twice), the last is used.
        begin: position of the query that writes the first token of the span, for all rows or for
            each: that of the prompt's last token, if the answer begins with the span.
        token: the token with a weight.
        weight: "one" is 1; "mean" the mean of the query's weights on the span, as "binary" of
            `manipulate_span` gives to each of its tokens; "sum" all the weight on the span.
        outside: "zero" sets weights outside the span to 0, as in the paper's "binary"; "keep"
            does not change them.

    Returns:
        Hooks on `hook_attn_scores`, which read the keys that a query can see, and on `hook_pattern`
        [batch head query key]; weights are not renormalised.

    Raises:
        ValueError: invalid spans or `begin`, an unknown option; when first run, entries for another
            number of rows.

    Source: ours; the thesis (Michalak 2025) proposes a binary manipulation that moves with the
    predicted token.

    Examples:
        >>> hooks = interventions.follow_span((7, 9), begin=15)  # where the answer begins
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, cache = model.run_with_cache(tokens)
        >>> cache["pattern", 5][0, 0, 15].nonzero().tolist()
        [[7]]
        >>> cache["pattern", 5][0, 0, 15, 7].item()
        1.0
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
    """Return True at the key of each query's token of the span."""
    run = hook.run
    assert run.key_pos is not None  # checked by `in_spans`
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
