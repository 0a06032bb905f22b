"""Every intervention and every analysis in float16 and bfloat16, against float32.

The weights are the same numbers, as those of float32 are rounded to the narrow dtype first. What is
public and stands in no table below makes a test fail.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import ActivationCache, FactoredMatrix, HookedHybrid, HookPoint, analysis
from hooked_hybrid import interventions as iv
from hooked_hybrid.analysis.answers import NeedlePrompt
from hooked_hybrid.analysis.planted import planted_retrieval
from hooked_hybrid.hooks.run import Run
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import BF16_ONE_STEP, FP32_EIGENVALUES, FP32_PARITY

FAMILIES = {
    "griffin": griffin_config("RARA", n_keys=9),
    # Without a choice of experts, which a rounding may change: then another function is computed.
    "jamba": jamba_config("MAMA", n_experts=1),
}
BITS = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
"""The distance of 1 to the next number."""
QUIET: dict[str, Any] = {"verbose": False}
N_POS = 9


def bound(dtype: torch.dtype, roundings: float) -> float:
    """Return so many last places: each value is rounded that often on its way, at random."""
    return roundings * BITS[dtype]


@dataclass(frozen=True)
class Case:
    """A model in one dtype, and runs of it."""

    family: str
    dtype: torch.dtype

    @cached_property
    def model(self) -> HookedHybrid:
        narrow = random_model(FAMILIES[self.family], dtype=self.rounded_to)
        return narrow.to(self.dtype)

    rounded_to: torch.dtype = torch.float32

    @cached_property
    def tokens(self) -> Tensor:
        return random_tokens(2, N_POS)

    @cached_property
    def other(self) -> Tensor:
        return random_tokens(2, N_POS, seed=3)

    @cached_property
    def cache(self) -> ActivationCache:
        return self.model.run_with_cache(self.tokens, names_filter=lambda _: True)[1]

    @cached_property
    def other_cache(self) -> ActivationCache:
        return self.model.run_with_cache(self.other, names_filter=lambda _: True)[1]

    def edited(self, hooks: Any) -> Tensor:
        with torch.no_grad():
            return self.model.run_with_hooks(self.tokens, fwd_hooks=hooks)


def metric(logits: Tensor) -> Tensor:
    return (logits[:, -1, 7] - logits[:, -1, 9]).float().mean()


def halve(value: Tensor, hook: HookPoint) -> Tensor:
    return 0.5 * value


A, R = 1, 0  # an attention layer, a recurrent one
Z, RESID, STATE = (
    f"blocks.{A}.attn.hook_z",
    "blocks.1.hook_resid_mid",
    "blocks.0.mixer.hook_ssm_state",
)
SPAN = (2, 5)


def kept_scores(c: Case, hooks: Any, score: Any = iv.negative_entropy) -> Tensor:
    """Return the sum of fp32 scores of the heads that are kept, at the first attention layer.

    Rounding may exchange heads that score nearly the same: then this hardly changes.
    """
    with c.model.hooks(hooks), torch.no_grad():
        _, cache = c.model.run_with_cache(c.tokens, names_filter=Z)
    wide = case_of(c.family, torch.float32, c.rounded_to)
    hook = wide.model.hook_dict[Z]
    run = Run("forward", 0, torch.arange(N_POS).expand(2, -1), torch.arange(2))
    with hook.seeing(run.with_keys(run.query_pos)):
        scores = score(wide.cache["pattern", A], hook).transpose(1, 2)
    return (scores * cache[Z].abs().sum(-1).gt(0)).sum(-1)


def best_of_three(c: Case) -> Tensor:
    """Return the sum of fp32 scores of the heads that score best in the narrow dtype."""
    wide = case_of(c.family, torch.float32, c.rounded_to)
    narrow, scores = (iv.l2_norm(x.cache["pattern", A], x.model.hook_dict[Z]) for x in (c, wide))
    return (scores * iv.best_heads(narrow, torch.tensor([2, 1]), "lowest")).sum(1)


INTERVENTIONS: dict[str, Callable[[Case], Tensor]] = {
    "ablate_heads": lambda c: torch.stack(
        [
            c.edited(iv.ablate_heads([(A, 1)])),
            c.edited(iv.ablate_heads([(A, 1)], "mean", c.other_cache)),
            c.edited(iv.ablate_heads([(A, 1)], "resample", c.other_cache)),
            c.edited(iv.ablate_heads([(A, 1)], "norm")),
        ]
    ),
    "ablate_layers": lambda c: c.edited(iv.ablate_layers([A], "mixer", "mean", c.other_cache)),
    "ablate_mixers": lambda c: c.edited(
        iv.ablate_mixers(c.model.cfg, "attention", [A], "mean", c.other_cache)
    ),
    "attention_to": lambda c: kept_scores(
        c, iv.keep_top_heads(2, iv.attention_to(SPAN)), iv.attention_to(SPAN)
    ),
    "boost_span": lambda c: kept_scores(c, iv.boost_span(2, SPAN, 2.0)),
    "cut_heads": lambda c: c.edited(iv.cut_heads([(A, 0)])),
    "edit_state": lambda c: c.edited(iv.edit_state(halve, 3)),
    "follow_span": lambda c: c.edited(iv.follow_span(SPAN, 4, weight="sum", outside="keep")),
    "freeze": lambda c: c.edited(iv.freeze(c.other_cache, lambda n: n.endswith("hook_pattern"))),
    "freeze_state": lambda c: c.edited(iv.freeze_state(3, 6)),
    "hook_at": lambda c: c.edited([(RESID, iv.hook_at(halve, 4))]),
    "keep_heads": lambda c: c.edited(iv.keep_heads([(A, 2)])),
    "keep_top_heads": lambda c: kept_scores(c, iv.keep_top_heads(2)),
    "knock_out_crossings": lambda c: c.edited(iv.knock_out_crossings(c.model.cfg, 4)),
    "knock_out_edges": lambda c: torch.stack(
        [
            c.edited(iv.knock_out_edges(6, (1, 2))),
            c.edited(iv.knock_out_edges(6, (1, 2), renormalise=False)),
        ]
    ),
    "knock_out_state_edges": lambda c: c.edited(iv.knock_out_state_edges(6, (1, 2, 3, 4, 5))),
    "limit_window": lambda c: c.edited(iv.limit_window(3)),
    "manipulate_span": lambda c: torch.stack(
        [
            c.edited(iv.manipulate_span(mode, SPAN, renormalise=n))
            for mode, n in [
                ("null", False),
                ("only", True),
                ("omit", True),
                ("binary", False),
                ("permute", False),
            ]
        ]
    ),
    "on_rows": lambda c: c.edited([(RESID, iv.on_rows(halve, 1))]),
    "patch": lambda c: c.edited(iv.patch(c.other_cache, ("ssm_state", R), positions=3)),
    "per_position": lambda c: c.edited([(RESID, iv.per_position(halve))]),
    "random_score": lambda c: c.edited(iv.keep_top_heads(2, iv.random_score(1))),
    "reversed_score": lambda c: kept_scores(
        c, iv.keep_top_heads(3, iv.reversed_score("l2")), iv.l2_norm
    ),
    "mean_over_tokens": lambda c: iv.mean_over_tokens(c.cache["z", A]),
    # Scores themselves, of one pattern: heads are chosen by them.
    "best_heads": best_of_three,
    "l2_norm": lambda c: iv.l2_norm(c.cache["pattern", A], c.model.hook_dict[Z]),
    "negative_entropy": lambda c: iv.negative_entropy(c.cache["pattern", A], c.model.hook_dict[Z])[
        ..., 1:
    ],
}
WITHOUT_NUMBERS = {"check_heads", "check_spans", "layers_of", "masks_of_rows"}
"""Public functions that compute nothing in the model's dtype."""


def lens(c: Case, name: str, *args: Any, **kwargs: Any) -> Tensor:
    return getattr(analysis, name)(c.model, c.cache, *args, **kwargs)[0].float()


def patched(c: Case, name: str, *args: Any) -> Tensor:
    fn = getattr(analysis, name)
    # The metric itself: of a difference much may cancel, and what is left is rounding.
    return fn(c.model, c.other, c.cache, metric, *args, difference=False, **QUIET).values


def paths(c: Case, name: str, *args: Any, **kwargs: Any) -> Any:
    return getattr(analysis, name)(c.model, c.tokens, c.other_cache, *args, metric, **kwargs)


@cache
def planted() -> Any:
    return planted_retrieval()


def retrieving(c: Case, fn: Callable[..., Any]) -> Tensor:
    """Return scores of the planted circuit, whose answers no rounding changes."""
    prompts = planted().prompts(2, 40, n_needle=4)
    pairs = zip(prompts.tokens.tolist(), prompts.spans, strict=True)
    model = planted().model.to(c.rounded_to).to(c.dtype)
    try:
        return fn(model, [NeedlePrompt(t, [s]) for t, s in pairs], max_new_tokens=4, **QUIET).values
    finally:
        planted.cache_clear()


def attributed(c: Case) -> Tensor:
    found = analysis.attribution_patching(
        c.model, c.tokens, c.other, metric, ["blocks.1.hook_resid_pre", Z], **QUIET
    )
    return torch.cat([v.flatten() for v in found.values.values()])


def agreement(c: Case) -> Tensor:
    """Return the sizes of effects over all cells; which of two small ones is larger may change."""
    found = analysis.compare_with_patching(
        c.model, c.tokens, c.other, metric, ["blocks.3.hook_resid_pre"], n_cells=1000, **QUIET
    )
    return torch.stack([torch.stack([r.attributed.norm(), r.patched.norm()]) for r in found.rows])


def reach(c: Case) -> Tensor:
    return torch.tensor([[r.tokens, r.longest] for r in analysis.how_far(c.cache)]).log1p()


def generated(c: Case) -> Tensor:
    out = c.model.generate(
        c.tokens, 2, names_filter=True, return_type="output", stop_at_eos=False, **QUIET
    )
    return analysis.lens_of_generation(c.model, out)[0].float()[..., 0]


ANALYSES: dict[str, Callable[[Case], Tensor]] = {
    "all_composition_scores": lambda c: analysis.all_composition_scores(c.model, "K").values,
    "all_matching_scores": lambda c: analysis.all_matching_scores(c.model).values,
    "attribution_patching": attributed,
    "channel_scores": lambda c: retrieving(c, analysis.channel_scores),
    "compare_with_patching": agreement,
    "composition_scores": lambda c: analysis.composition_scores(
        c.model.blocks[A].attn.OV, c.model.blocks[A].attn.OV
    ),
    "copying_scores": lambda c: analysis.copying_scores(c.model).values,
    "decay_range": lambda c: torch.cat([t.flatten() for t in analysis.decay_range(c.model, R)]),
    "effective_attention": lambda c: analysis.effective_attention(c.cache, R),
    "effective_offset": lambda c: analysis.effective_offset(c.cache, R, through="block"),
    "effective_pattern": lambda c: analysis.effective_pattern(c.cache, R, summary="layer"),
    "entropy": lambda c: analysis.entropy(c.cache["pattern", A]),
    "entropy_profile": lambda c: analysis.entropy_profile(c.cache).values,
    "full_ov_circuit": lambda c: analysis.full_ov_circuit(c.model, A).AB,
    "full_qk_circuit": lambda c: analysis.full_qk_circuit(c.model, A).AB,
    "generic_activation_patch": lambda c: patched(
        c, "generic_activation_patch", [RESID, Z], ("pos",)
    ),
    "half_life": lambda c: analysis.half_life(c.cache, R).log(),
    "how_far": reach,
    "induction_scores": lambda c: analysis.induction_scores(c.model, 6, 2).values,
    "lens_of_generation": generated,
    "lens_ranks": lambda c: lens(c, "lens_ranks", 7) / 61,
    "lens_top_tokens": lambda c: analysis.lens_top_tokens(c.model, c.cache, 1).probs,
    "logit_lens": lambda c: lens(c, "logit_lens"),
    "matching_scores": lambda c: analysis.matching_scores(c.model).values,
    "memory_horizon": lambda c: analysis.memory_horizon(c.cache, R).log(),
    "normalised": lambda c: analysis.normalised(metric, c.model(c.tokens), c.model(c.other))(
        c.edited([(RESID, halve)])
    ),
    "ov_circuit": lambda c: analysis.ov_circuit(c.model, A).AB,
    "patch_heads": lambda c: patched(c, "patch_heads"),
    "patch_layers": lambda c: patched(c, "patch_layers", "mlp_out"),
    "patch_mixer_out": lambda c: patched(c, "patch_mixer_out"),
    "patch_mlp_out": lambda c: patched(c, "patch_mlp_out"),
    "patch_resid_pre": lambda c: patched(c, "patch_resid_pre"),
    "patch_states": lambda c: patched(c, "patch_states"),
    "path_patch": lambda c: paths(c, "path_patch", ("z", A, 0), ("final",)),
    "path_patch_each": lambda c: torch.stack(
        paths(c, "path_patch_each", [("z", A, 0), ("z", A, 1)], ("final",), **QUIET)
    ),
    "path_patch_heads": lambda c: paths(c, "path_patch_heads", ("final",), **QUIET).values,
    "qk_circuit": lambda c: analysis.qk_circuit(c.model, A, 2).AB,
    "recurrent_circuit": lambda c: analysis.recurrent_circuit(c.model, R).AB,
    "repeat_scores": lambda c: torch.stack(
        [s.values for s in analysis.repeat_scores(c.model, 6, 2).values()]
    ),
    "retrieval_scores": lambda c: retrieving(c, analysis.retrieval_scores),
    "token_directions": lambda c: analysis.token_directions(c.model, A, "alone"),
    "token_over_depth": lambda c: lens(c, "token_over_depth", 7),
    "written_tokens": lambda c: analysis.written_tokens(c.model, (A, 0)),
}

ROUNDINGS: dict[str, float] = {
    "attribution_patching": 24,  # products of a difference and a gradient
    "effective_pattern": 32,  # shares of a row, whose sum may be small
    "memory_horizon": 32,  # whole tokens
    "how_far": 32,
    "compare_with_patching": 24,  # differences of metrics, of which some cancels
    "path_patch": 32,  # a difference of two logits, of which much may cancel
    "path_patch_each": 32,
    "path_patch_heads": 32,
    "lens_ranks": 64,  # of 61: neighbours change places
    "normalised": 32,  # over the difference of two runs, a third of either
}
"""Where the default of 16 last places is not the bound, with the reason."""


def public(module: Any, names: list[str]) -> set[str]:
    return {name for name in names if inspect.isfunction(getattr(module, name))}


def test_every_public_intervention_and_analysis_is_in_a_table():
    assert public(iv, iv.__all__) == set(INTERVENTIONS) | WITHOUT_NUMBERS
    assert public(analysis, analysis.__all__) == set(ANALYSES)


@cache
def case_of(family: str, dtype: torch.dtype, rounded_to: torch.dtype) -> Case:
    return Case(family, dtype, rounded_to)


@cache
def in_fp32(family: str, rounded_to: torch.dtype, name: str) -> Tensor:
    return (INTERVENTIONS | ANALYSES)[name](case_of(family, torch.float32, rounded_to))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", BITS)
def test_in_16_bits_it_is_what_it_is_in_fp32_up_to_rounding(
    family: str, dtype: torch.dtype, unchecked: None
):
    off: dict[str, tuple[float, float]] = {}
    for name, compute in (INTERVENTIONS | ANALYSES).items():
        found = compute(case_of(family, dtype, dtype)).double()
        expected = in_fp32(family, dtype, name).double()
        seen = ~expected.isnan() & ~expected.isinf()
        assert torch.equal(found.isnan(), expected.isnan()), name
        assert torch.equal(found.isinf(), expected.isinf()), name
        error, limit = relative(found[seen], expected[seen]), bound(dtype, ROUNDINGS.get(name, 16))
        if not error <= limit:
            off[name] = (error / BITS[dtype], limit / BITS[dtype])
    assert not off


@pytest.mark.parametrize("dtype", BITS)
def test_a_16_bit_factored_matrix_is_decomposed_in_fp32(dtype: torch.dtype):
    torch.manual_seed(0)
    A, B = torch.randn(2, 7, 3).to(dtype), torch.randn(2, 3, 7).to(dtype)
    product, wide = FactoredMatrix(A, B), A.double() @ B.double()
    assert relative(product.S.double(), torch.linalg.svdvals(wide)[:, :3]) < FP32_PARITY
    U, S, V = product.svd()
    assert relative((U @ S.diag_embed() @ V.mT).double(), wide) < FP32_PARITY
    found = product.eigenvalues.abs().sort(descending=True).values.double()
    by_size = torch.linalg.eigvals(wide).abs().sort(descending=True).values[:, :3]
    assert relative(found, by_size) < FP32_EIGENVALUES
    assert relative(product.norm().double(), torch.linalg.matrix_norm(wide)) < FP32_PARITY
    for same in (product.make_even().AB, product.U @ product.collapse_l()):
        assert relative(same.double(), wide) < FP32_PARITY
    assert relative((product.collapse_r() @ product.Vh.mT).double(), wide) < FP32_PARITY


def test_scores_in_fp16_are_numbers_and_say_what_they_say_in_fp32():
    """A weight of 0 has no entropy: 1e-12, which the papers add to it, is 0 in float16."""
    pattern = torch.tensor([[[[0.75, 0.25, 0.0, 0.0]], [[0.25, 0.25, 0.25, 0.25]]]])
    hook = HookPoint()
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        found = iv.negative_entropy(pattern.to(dtype), hook).float()[0, :, 0]
        assert relative(found, torch.tensor([-0.811278, -2.0])) < BF16_ONE_STEP


def test_a_boost_beyond_the_range_of_fp16_keeps_the_pattern_a_distribution():
    model = random_model(FAMILIES["griffin"], dtype=torch.float16)
    hooks = iv.boost_span(model.cfg.n_heads, SPAN, 1e6)
    seen: list[Tensor] = []

    def look(pattern: Tensor, hook: HookPoint) -> None:
        seen.append(pattern.float())

    with torch.no_grad(), model.hooks([*hooks, (f"blocks.{A}.attn.hook_pattern", look)]):
        assert model(random_tokens(2, N_POS)).isfinite().all()
    assert ((seen[0].sum(-1) - 1).abs() < 2**-9).all()


def test_layers_of_different_numbers_of_heads_are_refused_by_number():
    from dataclasses import replace

    cfg = griffin_config("AA")
    last = replace(cfg.layers[1], mixer=replace(cfg.layers[1].mixer, n_heads=1))
    model = random_model(replace(cfg, layers=(cfg.layers[0], last)))
    with pytest.raises(ValueError, match="layer 0 has 4, layer 1 has 1"):
        analysis.entropy_profile(model, random_tokens(1, 4))
    _, cache = model.run_with_cache(random_tokens(1, 4))
    with pytest.raises(ValueError, match="layer 0 has 4, layer 1 has 1"):
        analysis.entropy_profile(cache)
