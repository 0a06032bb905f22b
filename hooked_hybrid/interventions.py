"""Interventions as plain hooks: each factory returns what `fwd_hooks` takes."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.hooks import HookFn, HookPoint, is_per_position, per_position, positions_of
from hooked_hybrid.shapes import Pattern, Queries

HeadScore = Callable[[Tensor, HookPoint], Tensor]
Scores = Float[Tensor, "batch head query"]


def negative_entropy(pattern: Pattern, hook: HookPoint) -> Scores:  # noqa: ARG001
    """Return minus the entropy, in bits, of each head's pattern: largest for the most peaked.

    Source: Zani et al. 2025, as their code computes it, with 1e-12 added to each weight.
    """
    p = pattern + 1e-12
    return (p * p.log2()).sum(-1)


def l2_norm(pattern: Pattern, hook: HookPoint) -> Scores:  # noqa: ARG001
    """Return the Euclidean norm of each head's pattern: 1 for a single key, less when spread."""
    return pattern.norm(dim=-1)


SCORES: dict[str, HeadScore] = {"entropy": negative_entropy, "l2": l2_norm}


def keep_top_heads(
    k: int | Int[Tensor, " batch"],
    score: Literal["entropy", "l2"] | HeadScore = "entropy",
    ties: Literal["torch", "lowest"] = "torch",
    score_dtype: torch.dtype | None = None,
) -> list[HookSpec]:
    """Zero the outputs of all but the `k` best-scoring heads, per attention layer and position.

    Args:
        k: heads kept at each position, or one number for each row of the batch. All heads or more
            cannot be asked for: `n_heads` leaves the model as it is, above it is an error.
        score: how peaked a head is, from its pattern: "entropy" (bits), "l2", or any function
            `(pattern [batch head query key], hook) -> [batch head query]`; the largest are kept.
        ties: "torch" leaves equal scores to `torch.topk`, as the papers' code does (at position 0
            every head ties); "lowest" prefers the lower head.
        score_dtype: dtype in which patterns are scored; None means the model's, as in the papers.

    Returns:
        Hooks on every `hook_pattern` and `hook_z`, for `run_with_hooks` and `generate` alike.

    Raises:
        ValueError: `k` below 0, or above the heads of a layer (when it first runs); an unknown
            score or rule for ties; a score of another shape.

    Source: Zani, Michalak & Abreu 2025, top-k contextual sparsity. Their masks act where ours do,
    on head outputs before the output projection, whose bias stays.
    """
    if isinstance(score, str) and score not in SCORES:
        raise ValueError(f"score={score!r}: give one of {', '.join(SCORES)}, or a function")
    if ties not in ("torch", "lowest"):
        raise ValueError(f"ties={ties!r}: give 'torch' or 'lowest'")
    per_row = torch.as_tensor(k)
    if per_row.ndim > 1 or per_row.is_floating_point() or bool((per_row < 0).any()):
        raise ValueError(f"k={k}: give a whole number of heads, 0 or more, or one for each row")
    score_fn: HeadScore = SCORES[score] if isinstance(score, str) else score
    kept: dict[int, Bool[Tensor, "batch head query"]] = {}

    @per_position
    def choose_heads(pattern: Pattern, hook: HookPoint) -> None:
        scores = score_fn(pattern if score_dtype is None else pattern.to(score_dtype), hook)
        if scores.shape != pattern.shape[:3]:
            raise ValueError(
                f"the head score returned shape {tuple(scores.shape)}; give one score for each "
                f"row, head and query, {tuple(pattern.shape[:3])}"
            )
        kept[hook.layer()] = best_heads(scores, _k_of_rows(per_row, pattern.shape[1], hook), ties)

    @per_position
    def silence_the_others(z: Queries, hook: HookPoint) -> Queries:
        keep = kept.pop(hook.layer()).transpose(1, 2)
        return z.masked_fill(~keep[..., None], 0)

    return [(_is_pattern, choose_heads), (_is_z, silence_the_others)]


def best_heads(
    scores: Scores, k: Int[Tensor, " batch"], ties: Literal["torch", "lowest"]
) -> Bool[Tensor, "batch head query"]:
    """Return True at the `k` highest-scoring heads of each position.

    `torch.topk` is called once for each distinct k, on the whole head axis.
    """
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


def hook_at(fn: HookFn, positions: int | Iterable[int]) -> HookFn:
    """Return a hook that applies `fn` at some positions only, one position at a time.

    `fn` is called with the value at one position, `[batch 1 ...]` (or `[batch head 1 key]`), in
    every forward that contains the position: a plain one, prefill, or a generation step. On
    `hook_ssm_state` the scan stays fast between the positions.

    Args:
        fn: a hook.
        positions: counted in the document from 0, as `hook.run.query_pos` does; rows that have
            padding in front are met at their own positions.

    Raises:
        ValueError: no position, or a negative one.
    """
    wanted = _indices(positions)
    if not wanted or min(wanted) < 0:
        raise ValueError(f"positions {wanted}: give one or more, counted from 0")

    def at_positions(value: Tensor, hook: HookPoint) -> Tensor:
        dim = hook.pos_dim
        at = torch.isin(hook.run.query_pos, torch.tensor(wanted, device=value.device))
        for t in at.any(dim=0).nonzero()[:, 0].tolist():
            old = value.narrow(dim, t, 1)
            part = old.clone()
            with hook.seeing(hook.run.at(t, t + 1)):
                new = fn(part, hook=hook)
            new = part if new is None else new  # which an edit in place has changed
            here = at[:, t].view(-1, *(1,) * (value.ndim - 1))
            index = torch.tensor([t], device=value.device)
            value = value.index_copy(dim, index, torch.where(here, new, old))
        return value

    marked: Any = per_position(at_positions)
    marked.positions = wanted
    return marked


def on_rows(fn: HookFn, rows: int | Iterable[int]) -> HookFn:
    """Return a hook that applies `fn` to some rows of the batch only.

    `fn` is called with these rows alone and sees `hook.run` of them alone, as if they were the
    whole batch; the others pass unchanged. Rows are those of the original batch, also after a
    generation has dropped the rows that ended.

    Args:
        fn: a hook; its marks (`per_position`, positions) stay.
        rows: indices into the original batch.

    Raises:
        ValueError: no row, or a negative one.
    """
    wanted = _indices(rows)
    if not wanted or min(wanted) < 0:
        raise ValueError(f"rows {wanted}: give one or more, counted from 0")

    def for_rows(value: Tensor, hook: HookPoint) -> Tensor | None:
        run = hook.run
        mine = torch.isin(run.rows, torch.tensor(wanted, device=run.rows.device))
        index = mine.nonzero()[:, 0]
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


def _indices(given: int | Iterable[int]) -> tuple[int, ...]:
    """Return whole numbers, also where numpy's or torch's are given."""
    several = given if isinstance(given, Iterable) else (given,)
    return tuple(operator.index(i) for i in several)


def _k_of_rows(k: Tensor, n_heads: int, hook: HookPoint) -> Int[Tensor, " batch"]:
    """Return k for each row of this forward."""
    if int(k.max()) > n_heads:
        raise ValueError(f"k={int(k.max())}: layer {hook.layer()} has {n_heads} heads")
    rows = hook.run.rows
    if k.ndim == 0:
        return k.to(rows.device).expand(rows.shape[0])
    is_whole_batch = hook.run.step == 0
    if int(rows.max()) >= k.shape[0] or (is_whole_batch and rows.shape[0] < k.shape[0]):
        raise ValueError(f"k has {k.shape[0]} entries, the batch has {int(rows.max()) + 1} rows")
    return k.to(rows.device)[rows]


def _is_pattern(name: str) -> bool:
    return name.endswith(".attn.hook_pattern")


def _is_z(name: str) -> bool:
    return name.endswith(".attn.hook_z")


__all__ = [
    "best_heads",
    "hook_at",
    "keep_top_heads",
    "l2_norm",
    "negative_entropy",
    "on_rows",
    "per_position",
]
