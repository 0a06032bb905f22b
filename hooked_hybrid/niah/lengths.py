"""Default prompt lengths."""

from __future__ import annotations

from collections.abc import Sequence

from hooked_hybrid.config import AttentionConfig, HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.mixers import windows_of
from hooked_hybrid.niah.needles import AnyNeedle
from hooked_hybrid.niah.prompts import default_lengths, shortest_length

LONGEST = 4096
"""Tokens of the papers' longest prompt, the limit of defaults."""
ROOM = 32
"""Least tokens of haystack in the shortest prompt, for long templates and needles."""


def longest_prompt(cfg: HybridConfig) -> int:
    """Return the longest prompt of a default sweep.

    As in the papers, twice the window, or the context length of a model without a window; at most
    the papers' longest prompt.
    """
    windows = windows_of(cfg)
    own = 2 * min(windows) if windows else cfg.n_ctx
    return LONGEST if own is None else min(own, LONGEST)


def attention_of(cfg: HybridConfig) -> list[AttentionConfig]:
    """Return the attention of each layer that has it."""
    return [layer.attention for layer in cfg.layers if layer.attention is not None]


def lengths_for(
    model: HookedHybrid,
    needles: Sequence[AnyNeedle | None],
    template: str,
    read_twice: bool,
    distractors: int,
    seed: int,
) -> list[int]:
    """Return ten lengths, the first of which leaves tokens for some haystack.

    Raises:
        ValueError: needle, template and distractors take more than the longest prompt.
    """
    longest, form = longest_prompt(model.cfg), (template, read_twice, distractors)
    needed = max(shortest_length(model, needle, *form, seed=seed) for needle in needles)
    if needed > longest:
        raise ValueError(
            f"needle, template and distractors take {needed} tokens, the longest prompt by default "
            f"is {longest}: give --lengths, or fewer --distractors"
        )
    lengths = default_lengths(longest)
    return (
        lengths
        if lengths[0] >= needed
        else default_lengths(longest, shortest=min(needed + ROOM, longest))
    )
