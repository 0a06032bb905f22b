"""Retrieval heads and induction heads: a score of every head, from its patterns.

Patterns are reduced as they are computed, in pieces if the forward runs in pieces, and not kept. To
test the effect of the heads with high scores, use `interventions.cut_heads` and `keep_heads`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_hybrid.analysis.answers import Copied, HasNeedle, copies
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.watching import attention_of, no_totals, watch_patterns
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.shapes import Pattern, Tokens

Kind = Literal["current", "previous", "duplicate", "induction"]


def retrieval_scores(
    model: HookedHybrid,
    prompts: Sequence[HasNeedle],
    *,
    soft: bool = False,
    max_new_tokens: int = 40,
    min_recall: float = 0.5,
    batch_size: int = 8,
    verbose: bool = True,
) -> HeadScores:
    """Return how often each head attends to the needle's token that the model copies next.

    The model answers every prompt. A new token that is in the needle counts as copied. For each of
    these, a head scores 1 if its largest weight, at the position that predicts the token, is on
    that token in the needle; with `soft`, it scores the weight on it. The result is the mean over
    copied tokens.

    Args:
        model: generates greedily.
        prompts: tokens, and spans of the needle.
        soft: weights instead of largest weights.
        max_new_tokens: of an answer.
        min_recall: share of the needle's tokens that an answer must contain to count.
        batch_size: prompts of one length that run together.
        verbose: show a progress bar.

    Raises:
        ValueError: no prompt, one without a needle, no attention, or no needle found, as the model
            does not retrieve it or the needle is beyond the attention window.

    Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality". They
    divide by the needle's length, which is equal if the answer is the needle exactly once.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> analysis.retrieval_scores(model, cells, verbose=False).values.shape
        torch.Size([2, 8])
    """
    totals = no_totals(model)
    n_copied = 0
    for copied in copies(model, prompts, max_new_tokens, min_recall, batch_size, verbose):
        n_copied += int(copied.is_copy.sum())
        last = copied.n_prompt - 1  # the first position at which a new token is chosen
        watch_patterns(model, copied.tokens[:, :-1], _tally(copied, soft, totals), start=last)
    how = "mean weight on" if soft else "share with largest weight on"
    scores = {i: (total / n_copied).float() for i, total in totals.items()}
    return HeadScores.of(scores, f"retrieval score ({how} {n_copied} copied tokens)")


def _tally(
    copied: Copied, soft: bool, totals: dict[int, Tensor]
) -> Callable[[Pattern, HookPoint], None]:
    """Return a hook that sums the weights of heads on the tokens copied next."""

    @per_position
    def add(pattern: Pattern, hook: HookPoint) -> None:
        wanted = _sources_seen(copied, hook.run)
        if soft:
            given = pattern.masked_fill(~wanted[:, None], 0).sum(-1)
        else:
            best = pattern.argmax(-1).transpose(1, 2)  # [batch query head]
            given = wanted.gather(2, best).transpose(1, 2)
        totals[hook.layer()] += given.sum(dim=(0, 2), dtype=torch.float64).cpu()

    return add


def _sources_seen(copied: Copied, run: Run) -> Bool[Tensor, "batch query key"]:
    """Return the sources of the next token at each query of a pattern, along its own keys."""
    assert run.key_pos is not None
    step = run.query_pos - (copied.n_prompt - 1)
    key = run.key_pos.clamp(0, copied.n_prompt - 1)
    found = copied.sources[run.rows[:, None, None], step[:, :, None], key[:, None]]
    return found & (key == run.key_pos)[:, None]


def repeat_scores(
    model: HookedHybrid, n_tokens: int = 50, batch: int = 8, seed: int = 0
) -> dict[Kind, HeadScores]:
    """Return the mean weight of each head on four positions, in repeated random tokens.

    After BOS, `n_tokens` distinct random tokens are repeated once. For a token of the second copy,
    "current" is the token itself, "previous" the one before it, "duplicate" the same token in the
    first copy, and "induction" the one after that.

    Args:
        model: any with attention; `n_tokens` must be below its attention window.
        n_tokens: of one copy.
        batch: rows, each with different tokens.
        seed: of the tokens.

    Raises:
        ValueError: fewer than 3 tokens, or a copy longer than the vocabulary or than an attention
            window, in which the first copy could not be seen.

    Source: Olsson et al. 2022, prefix matching. TransformerLens's `head_detector` uses the caller's
    tokens and divides by the weights of all queries, including those without such a position.

    Examples:
        >>> scores = analysis.repeat_scores(model, n_tokens=20, batch=2)
        >>> list(scores)
        ['current', 'previous', 'duplicate', 'induction']
    """
    tokens, first = _repeated(model, n_tokens, batch, seed)
    back: dict[Kind, int] = {
        "current": 0, "previous": 1, "duplicate": n_tokens, "induction": n_tokens - 1,
    }  # fmt: skip
    totals = {kind: no_totals(model) for kind in back}

    @per_position
    def add(pattern: Pattern, hook: HookPoint) -> None:
        query, key = hook.run.query_pos, hook.run.key_pos
        assert key is not None
        for kind, distance in back.items():
            wanted = (key[:, None] == query[:, :, None] - distance) & (query >= first)[:, :, None]
            given = pattern.masked_fill(~wanted[:, None], 0).sum(dim=(0, 2, 3), dtype=torch.float64)
            totals[kind][hook.layer()] += given.cpu()

    watch_patterns(model, tokens, add)
    n_queries = batch * n_tokens
    return {
        kind: HeadScores.of({i: (t / n_queries).float() for i, t in mine.items()}, f"{kind} score")
        for kind, mine in totals.items()
    }


def induction_scores(
    model: HookedHybrid, n_tokens: int = 50, batch: int = 8, seed: int = 0
) -> HeadScores:
    """Return "induction" of `repeat_scores`: the weight on the token after an earlier equal one.

    Raises:
        ValueError: as `repeat_scores`.

    Examples:
        >>> analysis.induction_scores(model, n_tokens=20, batch=2).top(1)
        [(2, 2)]
    """
    return repeat_scores(model, n_tokens, batch, seed)["induction"]


def _repeated(model: HookedHybrid, n: int, batch: int, seed: int) -> tuple[Tokens, int]:
    """Return rows of tokens, and the index of their second copy."""
    cfg = model.cfg
    given = (cfg.bos_token_id, cfg.pad_token_id, *cfg.eos_token_ids)
    special = {token for token in given if token is not None}
    usable = torch.tensor([token for token in range(cfg.d_vocab) if token not in special])
    if not 3 <= n <= len(usable) or batch < 1:
        raise ValueError(
            f"n_tokens={n}, batch={batch}: give 3 to {len(usable)} tokens, which are distinct, and "
            "1 row or more"
        )
    windows = [m.n_keys for m in attention_of(model).values() if m.n_keys is not None]
    if windows and n >= min(windows):
        raise ValueError(
            f"n_tokens={n}: a query of this model sees {min(windows)} keys, itself included, so "
            f"that a copy must have {min(windows) - 1} tokens or fewer"
        )
    generator = torch.Generator().manual_seed(seed)
    rows = [usable[torch.randperm(len(usable), generator=generator)[:n]] for _ in range(batch)]
    copy = torch.stack(rows)
    bos = [] if cfg.bos_token_id is None else [torch.full((batch, 1), cfg.bos_token_id)]
    return torch.cat([*bos, copy, copy], dim=1).to(model.device), len(bos) + n
