"""What reads values, states and logits recovers the planted circuit too: the answer key of all.

Finders with tests of their own: `test_head_finders`, `test_circuits`, `test_composition`,
`test_path_patching`, `test_attribution`, `test_activation_patching`.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, interventions
from hooked_hybrid.analysis import (
    effective_pattern,
    half_life,
    lens_ranks,
    logit_lens,
)
from hooked_hybrid.analysis.planted import Planted, PlantedPrompts, planted_retrieval

NOISE = 0.1


class Run(NamedTuple):
    planted: Planted
    prompts: PlantedPrompts
    logits: Tensor
    cache: ActivationCache


@cache
def run() -> Run:
    planted = planted_retrieval(noise=NOISE)
    prompts = planted.prompts(batch=8, length=24)
    return Run(planted, prompts, *planted.model.run_with_cache(prompts.tokens))


def answers() -> Tensor:
    return run().prompts.answers[:, 0]


def is_right(logits: Tensor) -> Tensor:
    return logits[:, -1].argmax(-1) == answers()


def test_the_heads_write_is_the_answers_logit():
    """Its direct attribution is more than 20 times the next head's."""
    cache = run().cache
    stack, labels = cache.stack_head_results(-1, True, pos_slice=-1)
    attribution = cache.logit_attrs(stack, answers(), pos_slice=-1).mean(-1)
    first, second = attribution.abs().topk(2).values
    layer, head = run().planted.head
    assert labels[int(attribution.abs().argmax())] == f"L{layer}H{head}"
    assert first > 20 * second


def test_the_answer_appears_in_the_lens_where_the_head_writes():
    model, cache = run().planted.model, run().cache
    layer = run().planted.head[0]
    ranks = lens_ranks(model, cache, answers(), pos_slice=-1)
    depth = {label: i for i, label in enumerate(ranks.labels)}
    before, after = (ranks.values[depth[f"{i}_pre"]] for i in (layer, layer + 1))
    assert (after == 0).all()
    assert (before > 0).any()
    lens = logit_lens(model, cache, pos_slice=-1)
    assert torch.equal(lens.values[-1], run().logits[:, -1])


def test_the_carriers_memory_is_as_long_as_planted():
    planted, cache = run().planted, run().cache
    layer, _ = planted.carrier
    found = half_life(cache, layer)[planted.channels]
    assert torch.allclose(found, torch.ones_like(found), rtol=1e-4)


def test_the_carrier_reads_the_token_and_the_one_before_at_half_its_weight():
    planted, cache = run().planted, run().cache
    layer, block = planted.carrier
    pattern = effective_pattern(cache, layer, summary="gate_block")[:, block]
    here, before = (pattern.diagonal(-lag, -2, -1)[:, 8:].median() for lag in (0, 1))
    assert abs(float(before / here) - planted.decay) < 0.2


def test_cutting_the_carriers_edge_ends_retrieval_and_no_other_edge_does():
    """From the needle's first token to its second, in the carrier's channels."""
    planted, prompts, *_ = run()
    start, n_pos = prompts.needle_start, prompts.tokens.shape[1]
    at = torch.arange(n_pos)
    channels = range(planted.channels.start, planted.channels.stop)
    assert is_right(run().logits).all()

    def right(queries: Tensor, keys: Tensor, layer: int) -> float:
        hooks = interventions.knock_out_state_edges(queries, keys, layers=layer, channels=channels)
        logits = planted.model.run_with_hooks(prompts.tokens, fwd_hooks=hooks)
        return float(is_right(logits).float().mean())

    first, second = at == start[:, None], at == start[:, None] + 1
    carrier = planted.carrier[0]
    others = [i for i in planted.model.cfg.recurrent_layers if i != carrier]
    assert right(second, first, carrier) <= 0.25
    assert right(second, at == start[:, None] - 1, carrier) == 1
    assert all(right(second, first, other) == 1 for other in others)
