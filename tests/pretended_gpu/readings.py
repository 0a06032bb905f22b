"""Every public analysis, and what a cache tells of itself, as the stages are given."""

from __future__ import annotations

from typing import Any
from unittest import mock

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, analysis
from hooked_hybrid.analysis.answers import NeedlePrompt
from tests.models import random_tokens
from tests.pretended_gpu.edits import attention, donor, recurrent
from tests.pretended_gpu.stages import EVERYTHING, IDS, QUIET, At, Scenario, mask, metric

READINGS: dict[str, Scenario] = {}
SILENT: dict[str, Any] = {"verbose": False}


def reading(fn: Scenario) -> Scenario:
    READINGS[fn.__name__] = fn
    return fn


def cached(m: HookedHybrid, at: At, **options: Any) -> Any:
    return m.run_with_cache(at(random_tokens()), **options)[1]


def is_griffin(m: HookedHybrid) -> bool:
    return m.cfg.model_name == "griffin"


# --- the residual stream --------------------------------------------------------------------------


@reading
def parts_of_the_stream(m: HookedHybrid, at: At) -> Any:
    c = cached(m, at)
    parts = c.decompose_resid()
    found = [
        parts,
        c.accumulated_resid(incl_mid=True, apply_ln=True),
        c.stack_head_results(incl_remainder=True),
        c.get_full_resid_decomposition(pos_slice=-1),
        c.get_full_resid_decomposition(project_output_onto=m.W_U[:, 5]),
        c.logit_attrs(parts, 5, 7),
        c.logit_attrs(parts, at(torch.tensor([5, 6])), through_soft_cap="slope"),
        c.logit_attrs(parts, at(random_tokens()), through_soft_cap="share"),
        c.apply_ln_to_stack(parts, layer=1, mlp_input=True),
        c.stack_activation("resid_pre"),
        c.stack_neuron_results(-1, neuron_slice=(0, 3), project_output_onto=m.W_U[:, :2]),
    ]
    if not is_griffin(m):
        found.append(c.stack_expert_results(incl_remainder=True))
        found.append(cached(m, at, **EVERYTHING).stack_expert_results())
    return found


@reading
def parts_of_a_cache_on_the_host(m: HookedHybrid, at: At) -> Any:
    c = cached(m, at, device="cpu")
    parts = c.decompose_resid()
    found = [parts, c.logit_attrs(parts, 5, 7), c.stack_head_results(incl_remainder=True)]
    found += [c.get_full_resid_decomposition(), c.accumulated_resid(apply_ln=True)]
    return found if is_griffin(m) else [*found, c.stack_expert_results()]


@reading
def parts_of_a_generation(m: HookedHybrid, at: At) -> Any:
    options: dict[str, Any] = {"return_type": "output", "names_filter": True, **QUIET}
    out = m.generate(at(random_tokens()), 3, **options)
    parts = out.cache.decompose_resid()
    lens = analysis.lens_of_generation(m, out).values
    return parts, out.cache.logit_attrs(parts, 5), lens


@reading
def lenses(m: HookedHybrid, at: At) -> Any:
    found = []
    for c in (cached(m, at), cached(m, at, device="cpu")):
        top = analysis.lens_top_tokens(m, c, 3)
        wanted = at(torch.tensor([3, 4]))
        found += [analysis.logit_lens(m, c, incl_mid=True).values, top.tokens, top.probs]
        found += [analysis.token_over_depth(m, c, wanted, "ranks").values]
        found += [analysis.lens_ranks(m, c, 5).values]
    return found


# --- what recurrences read ------------------------------------------------------------------------


@reading
def implicit_attention(m: HookedHybrid, at: At) -> Any:
    c, r = cached(m, at), recurrent(m)
    options: dict[str, Any] = {"through": "block", "summary": "layer", "measure": "norm"}
    return [
        analysis.effective_attention(c, r),
        analysis.effective_attention(c, r, **options),
        analysis.effective_pattern(c, r, summary=4, keys=[1, 2]),
        analysis.effective_offset(c, r, through="block"),
    ]


@reading
def implicit_attention_of_padded_and_packed_rows(m: HookedHybrid, at: At) -> Any:
    r, found = recurrent(m), []
    for given in ({"attention_mask": at(mask())}, {"segment_ids": at(IDS)}):
        c = cached(m, at, **given, **EVERYTHING)
        found += [analysis.effective_attention(c, r, **given)]
        found += [analysis.memory_horizon(c, r, **given), analysis.half_life(c, r, **given)]
    return found


@reading
def implicit_attention_from_a_state_and_on_the_host(m: HookedHybrid, at: At) -> Any:
    _, state = m(at(random_tokens(2, 12, 8)), return_state=True)
    c, r = cached(m, at, state=state), recurrent(m)
    host = cached(m, at, device="cpu")
    found = [analysis.effective_attention(c, r, state=state)]
    found += [analysis.effective_offset(c, r, state=state)]
    return [*found, analysis.effective_attention(host, r), analysis.half_life(host, r)]


@reading
def horizons(m: HookedHybrid, at: At) -> Any:
    c, r = cached(m, at), recurrent(m)
    reach = [x.tokens for x in analysis.how_far(c)]
    return analysis.memory_horizon(c, r), list(analysis.decay_range(m, r)), reach


# --- heads ----------------------------------------------------------------------------------------


@reading
def scores_of_repeats(m: HookedHybrid, at: At) -> Any:
    scores = analysis.repeat_scores(m, 4, 2)
    induction = analysis.induction_scores(m, 4, 2)
    return {name: s.values for name, s in scores.items()}, induction.values, induction.top(2)


@reading
def entropies(m: HookedHybrid, at: At) -> Any:
    tokens, c = at(random_tokens()), cached(m, at)
    profile = analysis.entropy_profile(m, tokens)
    masked = analysis.entropy_profile(m, tokens, at(mask("right")))
    pattern = cached(m, at, **EVERYTHING)["pattern", attention(m)]
    found = [profile.values, profile.mean().values, masked.values]
    return [*found, analysis.entropy_profile(c).values, analysis.entropy(pattern)]


@reading
def scores_of_retrieval(m: HookedHybrid, at: At) -> Any:
    rows = random_tokens(2, 14).tolist()
    prompts = [NeedlePrompt(row, [(3, 7)]) for row in rows]
    real = m.generate

    def answers(_: Any, tokens: Tensor, n: int, **options: Any) -> Any:
        if options.get("return_type") == "tokens":  # answers that hold the needle
            return torch.cat([tokens, tokens[:, 3:7]], 1)
        return real(tokens, n, **options)

    with mock.patch.object(HookedHybrid, "generate", answers):
        scores = analysis.retrieval_scores(m, prompts, soft=True, **SILENT)
        groups = analysis.channel_scores(m, prompts, 4, **SILENT)
    return scores.values, groups.values, scores.top(2), groups.top(2)


# --- weights --------------------------------------------------------------------------------------


@reading
def circuits(m: HookedHybrid, at: At) -> Any:
    a, r = attention(m), recurrent(m)
    offset = 2 if is_griffin(m) else 0
    f = analysis.ov_circuit(m, a)
    return [
        analysis.qk_circuit(m, a, offset, with_norm=True).AB,
        analysis.recurrent_circuit(m, r, None).AB,
        analysis.full_ov_circuit(m, a).AB,
        analysis.full_qk_circuit(m, a, vocab=[3, 4, 5]).AB,
        analysis.token_directions(m, 1, vocab=at(torch.tensor([4, 5]))),
        analysis.written_tokens(m, (r, 0)),
        [f.S, f.norm(), f.eigenvalues.abs().sort().values, f[0].AB, (f @ f.T).AB],
    ]


@reading
def scores_of_weights(m: HookedHybrid, at: At) -> Any:
    some = at(torch.arange(3, 20))
    found = [analysis.copying_scores(m).values, analysis.matching_scores(m, kind="top1").values]
    found += [analysis.all_matching_scores(m, kind="rank", vocab=some).values]
    for mode in ("Q", "K", "V", "in", "gate"):
        scores = analysis.all_composition_scores(m, mode)
        found += [scores.values, scores.z]
    f = analysis.ov_circuit(m, attention(m))
    return [*found, analysis.composition_scores(f, f)]


# --- causes ---------------------------------------------------------------------------------------


@reading
def grad_attribution(m: HookedHybrid, at: At) -> Any:
    a, b = (at(random_tokens(2, 10, seed)) for seed in (0, 1))
    by_head = {"reduce": "head", "qk_fix": True, "at": "clean"}

    def total(logits: Tensor) -> Tensor:
        return metric(logits).sum()

    found = analysis.attribution_patching(m, a, b, total, **by_head, **SILENT)
    few = {"n_cells": 2, **SILENT}
    agreement = analysis.compare_with_patching(m, a[:1, :3], b[:1, :3], total, **few)
    cells = [(row.attributed, row.patched) for row in agreement.rows]
    return found.values, found.head_scores("z").values, cells


@reading
def activations_patched(m: HookedHybrid, at: At) -> Any:
    c, other = donor(m, at), at(random_tokens(seed=1))
    few = {"positions": [4], **SILENT}
    found = [
        analysis.patch_resid_pre(m, other, c, metric, **few),
        analysis.patch_heads(m, other, c, metric, **SILENT),
        analysis.patch_states(m, other, c, metric, **few),
        analysis.patch_mlp_out(m, other, c, metric, **few),
        analysis.patch_mixer_out(m, other, c, metric, **few),
        analysis.patch_layers(m, other, c, metric, "resid_mid", **few),
        analysis.generic_activation_patch(m, other, c, metric, "blocks.1.hook_mlp_out", **few),
    ]
    a, b = m(at(random_tokens())), m(other)
    return [grid.values for grid in found], analysis.normalised(metric, a, b)(a)


@reading
def paths_patched(m: HookedHybrid, at: At) -> Any:
    c, t, a, r = donor(m, at), at(random_tokens()), attention(m), recurrent(m)
    host = c.to("cpu")
    heads = [("z", a, h) for h in (0, 1)]
    return [
        analysis.path_patch(m, t, c, ("gated", r), ("q_input", a, 1), metric),
        analysis.path_patch(m, t, c, ("embed",), [("final",)], metric, freeze_norm=True),
        analysis.path_patch(m, t, host, ("z", a, 1), ("final",), metric, through="mlps"),
        analysis.path_patch_heads(m, t, c, ("final",), metric, **SILENT).values,
        analysis.path_patch_each(m, t, c, heads, ("final",), metric, **SILENT),
    ]
