"""Interventions on attention weights to a span of tokens."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, get_args

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.names import NameFilter
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import whole_numbers
from hooked_hybrid.interventions.hashes import hashes
from hooked_hybrid.interventions.heads import SCORES, HeadScore, at_tokens, best_heads
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.rows import (
    Handover,
    PerRow,
    Spans,
    in_spans,
    k_of_rows,
    read_k,
    read_spans,
)
from hooked_hybrid.network.attention.attend import softmax_or_zero
from hooked_hybrid.options import refuse_ignored
from hooked_hybrid.shapes import Pattern, Queries

Mode = Literal["keep", "null", "only", "omit", "binary", "permute"]
Heads = Iterable[int] | Mapping[int, Iterable[int]]
Edit = Callable[[Tensor, Tensor, HookPoint, int], Tensor]
MODES: tuple[str, ...] = get_args(Mode)


@picklable
def manipulate_span(
    mode: Mode,
    spans: Spans,
    *,
    renormalise: bool = False,
    layers: Iterable[int] | None = None,
    heads: Heads | None = None,
    seed: int | None = None,
) -> list[HookSpec]:
    """Change the attention weights that queries give to a span of tokens.

    ===========  =============================================================================
    keep         nothing changes
    null         every weight is 0
    only         weights outside the span are 0
    omit         weights in the span are 0
    binary       as only, and weights in the span are replaced by their mean over its tokens
                 that the query can see
    permute      the weights of the span's tokens that the query can see are permuted
    ===========  =============================================================================

    A query can see the keys that its scores do not mask: those of its document, up to itself, in
    the window, except keys removed by earlier hooks. The hooks act in every forward in which they
    are attached, so `prefill_hooks` and `generation_hooks` give the "mode-mode" settings of the
    paper.

    In permute, token p of the span has a pseudo-random number, a hash of `seed`, layer, head, the
    query's position and p. The i-th visible token of the span gets the weight of the visible one
    with the i-th smallest number. Every order is equally likely, and it does not depend on how the
    sequence is cut or on other rows.

    Args:
        mode: see above.
        spans: (start, stop) in document positions, from 0 without padding; several of them, whose
            tokens count as one span; or either for each row of the original batch, as
            `[[(3, 6)], [(2, 5), (9, 12)]]` or a tensor [batch 2] or [batch span 2].
        renormalise: divide the weights of each query and head by their sum after the change; zeros
            stay zeros. The papers do not.
        layers: attention layers to act in; None for all.
        heads: heads to act on in each of these layers, or `{layer: heads}` instead of `layers`.
        seed: for permute only; None is 0.

    Returns:
        Hooks on `hook_pattern` [batch head query key], for binary and permute on
        `hook_attn_scores` too; for `run_with_hooks` and `generate` alike. None for keep.

    Raises:
        ValueError: an unknown mode, invalid spans or indices; when first run, a head that a layer
            does not have, or spans for another number of rows; in generation, a span that ends
            after the tokens so far (a forward may be a piece: see `check_spans`).
        HookNameError: a layer without attention, when the hooks are attached.

    Source: Michalak & Abreu 2025, weight manipulation (Table 6.1: keep, null, only, omit, binary;
    their code for it is not public). Permute and `renormalise` are ours.

    Examples:
        >>> hooks = interventions.manipulate_span("only", (7, 9))
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, only = model.run_with_cache(tokens)
        >>> only["pattern", 5][0, 0, 15].nonzero().flatten()
        tensor([7, 8])
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r}: give one of {', '.join(MODES)}")
    if mode != "permute":
        refuse_ignored("mode='permute' alone draws", seed=seed)
    bounds, seed = read_spans(spans), 0 if seed is None else operator.index(seed)
    layers, heads_of = _layers_and_heads(layers, heads)
    if mode == "keep":
        return []
    needs_visible, edit, visible = mode in ("binary", "permute"), EDITS[mode], Handover()

    @watcher
    @per_position
    def look(scores: Pattern, hook: HookPoint) -> None:
        visible.leave(hook, scores > torch.finfo(scores.dtype).min)

    @per_position
    def manipulate(pattern: Pattern, hook: HookPoint) -> Pattern:
        span = in_spans(bounds, hook)[:, None, None]
        if needs_visible:
            span = span & visible.take(hook)
        edited = edit(pattern, span, hook, seed)
        edited = normalised(edited) if renormalise else edited
        return torch.where(_is_chosen(heads_of, pattern, hook), edited, pattern)

    hooks: list[HookSpec] = [(_points("hook_pattern", layers), manipulate)]
    return [(_points("hook_attn_scores", layers), look), *hooks] if needs_visible else hooks


@picklable
def boost_span(
    k: PerRow,
    spans: Spans,
    scale: float,
    score: Literal["entropy", "l2"] | HeadScore = "entropy",
    ties: Literal["torch", "lowest"] = "torch",
) -> list[HookSpec]:
    """Raise the scores of a span in the `k` highest-scoring heads of each position; zero the rest.

    In the kept heads every score of the span that the query can see becomes `scale` times the
    largest score of that query, before the softmax; if the largest is negative, a scale above 1
    lowers them. Heads are chosen by their patterns before this change, as in `keep_top_heads`,
    which these hooks replace. With k = `n_heads` every head is boosted.

    Args:
        k: heads kept at each position, or one number for each row of the batch.
        spans: as in `manipulate_span`.
        scale: the factor of the largest score.
        score: as in `keep_top_heads`; a function is called with
            `hook_attn_scores` as its hook.
        ties: as in `keep_top_heads`.

    Returns:
        Hooks on `hook_attn_scores` [batch head query key] and `hook_z` [batch pos head d_head].

    Raises:
        ValueError: as `keep_top_heads` and `manipulate_span` do; a scale that is not finite.

    Source: the code of Michalak & Abreu 2025 (`increase_attention_on_needle`), which boosts in
    steps of one token only: use `generation_hooks` for that. Differences: spans are positions, not
    slots of the ring buffer; masked keys stay masked; scores are in the model's dtype, theirs in
    fp32; they boost nothing when all heads are kept.

    Examples:
        >>> hooks = interventions.boost_span(2, (7, 9), 1.5)  # "Dolores Park"
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, boosted = model.run_with_cache(tokens)
        >>> (boosted["z", 5][0, -1] != 0).any(-1).sum().item()  # heads that were kept
        2
    """
    bounds, per_row = read_spans(spans), read_k(k)
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score={score!r}: give one of {', '.join(SCORES)}, or a function")
    if ties not in ("torch", "lowest"):
        raise ValueError(f"ties={ties!r}: give 'torch' or 'lowest'")
    if not math.isfinite(scale):
        raise ValueError(f"scale={scale}: give a finite number")
    score_fn: HeadScore = SCORES[score] if isinstance(score, str) else score
    kept = Handover()

    @per_position
    def boost(scores: Pattern, hook: HookPoint) -> Pattern:
        peakedness = score_fn(softmax_or_zero(scores), hook)
        peakedness = at_tokens(peakedness, hook)
        best = best_heads(peakedness, k_of_rows(per_row, scores.shape[1], hook), ties)
        kept.leave(hook, best)
        span = in_spans(bounds, hook)[:, None, None] & best[..., None]
        return torch.where(span, _scaled(scores.amax(-1, keepdim=True), scale), scores)

    @per_position
    def silence_the_others(z: Queries, hook: HookPoint) -> Queries:
        return z.masked_fill(~kept.take(hook).transpose(1, 2)[..., None], 0)

    return [(_points("hook_attn_scores"), boost), (_points("hook_z"), silence_the_others)]


def _scaled(largest: Tensor, scale: float) -> Tensor:
    """Return scores times a factor, clamped to their dtype, as infinity makes the softmax NaN."""
    limit = torch.finfo(largest.dtype).max
    wide = largest.to(torch.promote_types(largest.dtype, torch.float32)) * scale
    # A key below the lowest finite score counts as masked, which float16 scores must not reach.
    return wide.clamp(-limit * (1 - torch.finfo(largest.dtype).eps), limit).to(largest.dtype)


def normalised(pattern: Pattern) -> Pattern:
    """Return the weights of each query and head divided by their sum; zeros stay zeros."""
    total = pattern.sum(-1, keepdim=True, dtype=_wide(pattern))
    return (pattern / total.masked_fill(total == 0, 1)).to(pattern.dtype)


# --- the edits ------------------------------------------------------------------------------------


def _mean_of_span(pattern: Pattern, span: Tensor, hook: HookPoint, seed: int) -> Pattern:  # noqa: ARG001
    total = pattern.masked_fill(~span, 0).sum(-1, keepdim=True, dtype=_wide(pattern))
    mean = total / span.sum(-1, keepdim=True).clamp_min(1)
    return torch.where(span, mean.to(pattern.dtype), 0)


def _permuted(pattern: Pattern, span: Tensor, hook: HookPoint, seed: int) -> Pattern:
    columns = span.flatten(0, 2).any(0).nonzero()[:, 0]  # sorting all keys would be slow
    part, mask = pattern[..., columns], span[..., columns]
    numbers = hashes(hook, pattern.shape[1], seed, columns)
    # Both orders put other keys after the visible tokens of the span, in key order.
    source = torch.where(mask, numbers, 2**32).argsort(dim=-1, stable=True)
    target = (~mask).byte().argsort(dim=-1, stable=True)
    return pattern.index_copy(-1, columns, part.scatter(-1, target, part.gather(-1, source)))


def _nothing(pattern: Pattern, span: Tensor, hook: HookPoint, seed: int) -> Pattern:  # noqa: ARG001
    return torch.zeros_like(pattern)


def _span_alone(pattern: Pattern, span: Tensor, hook: HookPoint, seed: int) -> Pattern:  # noqa: ARG001
    return pattern.masked_fill(~span, 0)


def _without_span(pattern: Pattern, span: Tensor, hook: HookPoint, seed: int) -> Pattern:  # noqa: ARG001
    return pattern.masked_fill(span, 0)


EDITS: dict[str, Edit] = {
    "null": _nothing,
    "only": _span_alone,
    "omit": _without_span,
    "binary": _mean_of_span,
    "permute": _permuted,
}


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


# --- where they act -------------------------------------------------------------------------------


def _points(name: str, layers: list[int] | None = None) -> NameFilter:
    """Return a selector of one attention point in some layers, or in all."""
    if layers is None:
        return lambda full: full.endswith(f".attn.{name}")
    return [f"blocks.{layer}.attn.{name}" for layer in layers]


def _layers_and_heads(
    layers: Iterable[int] | None, heads: Heads | None
) -> tuple[list[int] | None, dict[int | None, list[int]]]:
    """Return the layers, and the heads of each; under None the heads of every layer."""
    if isinstance(heads, Mapping):
        if layers is not None:
            raise ValueError("heads of each layer say which layers: leave layers out")
        return _indices(heads, "heads"), {i: _indices(heads[i], f"heads[{i}]") for i in heads}
    return (
        None if layers is None else _indices(layers, "layers"),
        {} if heads is None else {None: _indices(heads, "heads")},
    )


def _indices(given: Iterable[int], name: str) -> list[int]:
    return list(whole_numbers(given, name))


def _is_chosen(
    heads_of: dict[int | None, list[int]], pattern: Pattern, hook: HookPoint
) -> Bool[Tensor, "head 1 1"]:
    n_heads, layer = pattern.shape[1], hook.layer()
    heads = heads_of.get(layer, heads_of.get(None, list(range(n_heads))))
    if max(heads) >= n_heads:
        raise ValueError(f"head {max(heads)}: layer {layer} has heads 0 to {n_heads - 1}")
    chosen = torch.zeros(n_heads, dtype=torch.bool, device=pattern.device)
    chosen[heads] = True
    return chosen[:, None, None]
