"""Where a model keeps what it recalls: accuracy whole, without attention, without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool
from torch import Tensor

from experiments.recall.task import RecallBatch, Task, draw
from experiments.train_tiny import CUTS, cut
from hooked_hybrid import HookedHybrid
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.runs.intervals import SHARE, mean_interval

HELD_OUT = 10**9
"""Offset of the seed of sequences to score on, beyond the seeds of training."""


@dataclass(frozen=True)
class Score:
    """Share of questions answered correctly, with its 95% interval over sequences.

    `half_width` is the distance of the interval's farther end.
    """

    accuracy: float
    half_width: float


@torch.no_grad()
def answered(
    model: HookedHybrid, batch: RecallBatch, hooks: Sequence[HookSpec] = ()
) -> Bool[Tensor, "batch question"]:
    """Return whether a model answers each question correctly, under hooks."""
    logits = model.run_with_hooks(batch.tokens, fwd_hooks=list(hooks))[:, batch.questions]
    return logits.argmax(-1) == batch.answers


def score(right: Bool[Tensor, "batch question"]) -> Score:
    """Return the accuracy; sequences are independent, questions of one are not."""
    each = right.float().mean(dim=1)
    mean, (low, high) = float(each.mean()), mean_interval(each.tolist(), range(len(each)), SHARE)
    return Score(mean, max(mean - low, high - mean))


def scores(model: HookedHybrid, task: Task, n: int = 256, seed: int = 0) -> dict[str, Score]:
    """Return accuracy on `n` new sequences: "whole", "no attention", "no memory".

    Without attention its heads write zeros; without memory every recurrence forgets all tokens
    before the current one, but its convolution still reads the last few.
    """
    batch = draw(task, n, HELD_OUT + seed)
    return {name: score(answered(model, batch, cut(model, name))) for name in CUTS}
