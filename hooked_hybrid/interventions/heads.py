"""Interventions on attention heads, which are selected by their patterns."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.interventions.hashes import hashes
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
from hooked_hybrid.shapes import Pattern, Queries

HeadScore = Callable[[Tensor, HookPoint], Tensor]
Scores = Float[Tensor, "batch head query"]


def negative_entropy(pattern: Pattern, hook: HookPoint) -> Scores:  # noqa: ARG001
    """Return minus the entropy, in bits, of each head's pattern: largest for the most peaked.

    Source: Zani et al. 2025, as in their code, with 1e-12 added to each weight. Float16, in which
    1e-12 is 0, is scored in float32.

    Examples:
        >>> pattern = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])  # of 2 heads at one query
        >>> interventions.negative_entropy(pattern, None).squeeze().round().abs()
        tensor([0., 1.])
    """
    p = (pattern.float() if pattern.dtype == torch.float16 else pattern) + 1e-12
    return (p * p.log2()).sum(-1)


def l2_norm(pattern: Pattern, hook: HookPoint) -> Scores:  # noqa: ARG001
    """Return the Euclidean norm of each head's pattern: 1 for a single key, less when spread.

    Examples:
        >>> pattern = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])  # of 2 heads at one query
        >>> interventions.l2_norm(pattern, None).squeeze()
        tensor([1.0000, 0.7071])
    """
    return pattern.norm(dim=-1)


@picklable
def reversed_score(score: Literal["entropy", "l2"] | HeadScore) -> HeadScore:
    """Return minus a score, which keeps the heads that `score` would remove first. A control.

    Examples:
        >>> pattern = torch.tensor([[[[1.0, 0.0]], [[0.5, 0.5]]]])  # of 2 heads at one query
        >>> interventions.reversed_score("l2")(pattern, None).squeeze()
        tensor([-1.0000, -0.7071])
    """
    fn = _score(score)
    return lambda pattern, hook: -fn(pattern, hook)


@picklable
def random_score(seed: int = 0) -> HeadScore:
    """Return a random score, for each layer, head and position. A control.

    The heads kept at a position do not depend on how the sequence is cut or on other rows of the
    batch.

    Examples:
        >>> hooks = interventions.keep_top_heads(2, interventions.random_score(seed=1))
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, kept = model.run_with_cache(tokens)
        >>> (kept["z", 5][0, -1] != 0).any(-1).sum().item()  # heads that were kept
        2
    """
    return lambda pattern, hook: hashes(hook, pattern.shape[1], seed)[..., 0].double()


@picklable
def attention_to(spans: Spans) -> HeadScore:
    """Return a score: the weight that each head gives to a span, such as the needle. A control.

    Args:
        spans: as in `manipulate_span`.

    Raises:
        ValueError: invalid `spans`.

    Examples:
        >>> score = interventions.attention_to((7, 9))  # "Dolores Park"
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(8, score))
        >>> torch.equal(hooked, logits)  # all eight heads are kept
        True
    """
    bounds = read_spans(spans)
    return lambda pattern, hook: pattern.masked_fill(~in_spans(bounds, hook)[:, None, None], 0).sum(
        -1
    )


SCORES: dict[str, HeadScore] = {"entropy": negative_entropy, "l2": l2_norm}


@picklable
def keep_top_heads(
    k: PerRow,
    score: Literal["entropy", "l2"] | HeadScore = "entropy",
    ties: Literal["torch", "lowest"] = "torch",
    score_dtype: torch.dtype | None = None,
) -> list[HookSpec]:
    """Zero the outputs of all heads except the `k` highest-scoring, per layer and position.

    Args:
        k: heads kept at each position, or one number for each row of the batch. With `n_heads` the
            model is unchanged; more is an error.
        score: how peaked the pattern of a head is: "entropy" (bits), "l2", or any function
            `(pattern [batch head query key], hook) -> [batch head query]`; the largest are kept.
        ties: "torch" breaks ties as `torch.topk` does, like the papers' code (at position 0 all
            heads tie); "lowest" prefers the lower head.
        score_dtype: dtype in which patterns are scored; None means the model's, as in the papers.

    Returns:
        Hooks on every `hook_pattern` and `hook_z`, for `run_with_hooks` and `generate` alike.

    Raises:
        ValueError: `k` below 0, or above the number of heads (when first run); an unknown score
            or rule for ties; a score of another shape, or a NaN; an integer score dtype.
            RuntimeError: the hooks are attached twice at the same time; make them twice instead.

    Source: Zani, Michalak & Abreu 2025, top-k contextual sparsity. Like theirs, our masks act on
    head outputs before the output projection, and do not change its bias.

    Examples:
        >>> for k in (0, 8):
        ...     hooked = model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(k))
        ...     print(k, (hooked[0, -1].argmax() == answer).item())
        0 False
        8 True
    """
    score_fn = _score(score)
    if ties not in ("torch", "lowest"):
        raise ValueError(f"ties={ties!r}: give 'torch' or 'lowest'")
    if score_dtype is not None and not score_dtype.is_floating_point:
        raise ValueError(f"score_dtype={score_dtype}: give a floating-point dtype")
    per_row = read_k(k)
    kept = Handover()

    @per_position
    def choose_heads(pattern: Pattern, hook: HookPoint) -> None:
        scores = score_fn(pattern if score_dtype is None else pattern.to(score_dtype), hook)
        if scores.shape != pattern.shape[:3]:
            raise ValueError(
                f"the head score returned shape {tuple(scores.shape)}; give one score for each "
                f"row, head and query, {tuple(pattern.shape[:3])}"
            )
        kept.leave(
            hook,
            best_heads(at_tokens(scores, hook), k_of_rows(per_row, pattern.shape[1], hook), ties),
        )

    @per_position
    def silence_the_others(z: Queries, hook: HookPoint) -> Queries:
        keep = kept.take(hook).transpose(1, 2)
        return z.masked_fill(~keep[..., None], 0)

    return [(_is_pattern, choose_heads), (_is_z, silence_the_others)]


def best_heads(
    scores: Scores, k: Int[Tensor, " batch"], ties: Literal["torch", "lowest"]
) -> Bool[Tensor, "batch head query"]:
    """Return True at the `k` highest-scoring heads of each position.

    `torch.topk` is called once for each distinct k, on the whole head axis.

    Raises:
        ValueError: a score that is NaN, which `topk` would treat as the largest.

    Examples:
        >>> scores = torch.tensor([[[1.0], [3.0], [2.0]]])  # of 3 heads at one query
        >>> interventions.best_heads(scores, torch.tensor([2]), "lowest").squeeze()
        tensor([False,  True,  True])
    """
    if bool((bad := transforms.plain_rows(scores.isnan())).any()):
        row, head, query = bad.nonzero()[0].tolist()
        raise ValueError(
            f"the score of head {head} is NaN at query {query} of row {row}, and "
            f"{int(bad.sum())} of {bad.numel()} scores are: there are no best heads among them"
        )
    keep = torch.zeros_like(scores, dtype=torch.bool)
    n_heads = scores.shape[1]
    for n in k.unique().tolist():
        rows = k == n
        if n == n_heads:
            best = torch.ones_like(keep)
        elif ties == "torch":
            best = torch.zeros_like(keep).scatter(1, scores.topk(n, dim=1).indices, True)
        else:
            order = scores.argsort(dim=1, descending=True, stable=True)[:, :n]
            best = torch.zeros_like(keep).scatter(1, order, True)
        keep = torch.where(rows[:, None, None], best, keep)
    return keep


def at_tokens(scores: Scores, hook: HookPoint) -> Scores:
    """Return scores with 0 at padding, where patterns have no meaning."""
    return scores.masked_fill((hook.run.query_pos < 0)[:, None], 0)


def _score(score: str | HeadScore) -> HeadScore:
    if not isinstance(score, str):
        return score
    if score not in SCORES:
        raise ValueError(f"score={score!r}: give one of {', '.join(SCORES)}, or a function")
    return SCORES[score]


def _is_pattern(name: str) -> bool:
    return name.endswith(".attn.hook_pattern")


def _is_z(name: str) -> bool:
    return name.endswith(".attn.hook_z")
