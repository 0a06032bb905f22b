"""Helpers for scores of heads: the attention layers, and runs with a hook on patterns."""

from __future__ import annotations

from typing import Any

import torch

from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.hooks.marks import HookFn
from hooked_hybrid.model.language_model import LanguageModel
from hooked_hybrid.shapes import Tokens


def attention_of(model: LanguageModel) -> dict[int, AttentionConfig]:
    """Return the attention layers, in order.

    Raises:
        ValueError: there is none.
    """
    layers = enumerate(model.cfg.layers)
    found = {i: of.attention for i, of in layers if of.attention is not None}
    if not found:
        raise ValueError("this model has no attention layer: there are no heads to score")
    return found


def no_totals(model: LanguageModel) -> dict[int, torch.Tensor]:
    """Return zeros [head], in float64, for each attention layer.

    Raises:
        ValueError: no attention, or layers with different numbers of heads.
    """
    layers = attention_of(model).items()
    totals = {i: torch.zeros(mixer.n_heads, dtype=torch.float64) for i, mixer in layers}
    return dict(zip(totals, HeadScores.of(totals).values, strict=True))


def watch_patterns(
    model: LanguageModel, tokens: Tokens, fn: HookFn, start: int = 0, **kwargs: Any
) -> None:
    """Run tokens with a hook on the patterns of queries from `start` on.

    Earlier tokens are run without the hook, and only their state is kept, so that for long prompts
    only the patterns of the last queries are computed.

    Args:
        model: any.
        tokens: of the whole run.
        fn: called with the pattern, or with pieces of it if it is marked `per_position`.
        start: index of the first query for the hook.
        kwargs: of the forward.
    """
    state = None
    with torch.no_grad():
        if start:
            _, state = model(tokens[:, :start], return_type=None, return_state=True)
        with model.hooks([(_is_pattern, fn)]):
            model(tokens[:, start:], return_type=None, state=state, **kwargs)


def _is_pattern(name: str) -> bool:
    return name.endswith(".attn.hook_pattern")
