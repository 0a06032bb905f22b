"""Heads that retrieve and heads that induce: a score of every head, read off its patterns.

Patterns are reduced as they are computed, in pieces where the forward runs in pieces; none is kept.
What follows from a score for the model, `interventions.cut_heads` and `keep_heads` say.
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
    """Return how often each head looks at the needle's token that the model is about to copy.

    The model answers every prompt. A new token that stands in the needle counts as copied. For each
    of these, a head scores 1 if, where the token is chosen, its largest weight is on that token in
    the needle; with `soft`, it scores the weight on it. The score is the mean over copied tokens.

    Args:
        model: that generates, greedily.
        prompts: tokens, and spans of the needle.
        soft: weights instead of largest weights.
        max_new_tokens: of an answer.
        min_recall: share of the needle's tokens that an answer must hold; others do not count.
        batch_size: prompts of one length that run together.
        verbose: show a progress bar.

    Raises:
        ValueError: no prompt or one without a needle, no attention, or no needle is found: the
            model does not retrieve here, or the needle is beyond the attention window.

    Source: Wu et al. 2024, "Retrieval Head Mechanistically Explains Long-Context Factuality". They
    divide by the needle's length: the same where an answer is the needle, whole and once.
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
    """Return a hook that adds up what heads give to the tokens about to be copied."""

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
    """Return the mean weight that each head gives to four places, on random tokens given twice.

    After BOS come `n_tokens` distinct random tokens and the same again. From a token of the second
    copy, "current" is the token itself, "previous" the one before it, "duplicate" the same token in
    the first copy, and "induction" the one after that.

    Args:
        model: any with attention; `n_tokens` below its attention window.
        n_tokens: of one copy.
        batch: rows, each of its own tokens.
        seed: of the tokens.

    Raises:
        ValueError: fewer than 3 tokens or a copy that is longer than the vocabulary, or reaches out
            of the attention window of a layer, whose heads could not see the first copy.

    Source: Olsson et al. 2022, prefix matching. TransformerLens's `head_detector` takes tokens from
    its caller and divides by the weights of all queries, those that have no such place included.
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
    """Return the "induction" of `repeat_scores`: weight on what came after the same token before.

    Raises:
        ValueError: as `repeat_scores`.
    """
    return repeat_scores(model, n_tokens, batch, seed)["induction"]


def _repeated(model: HookedHybrid, n: int, batch: int, seed: int) -> tuple[Tokens, int]:
    """Return rows of tokens, and where their second copy begins."""
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
