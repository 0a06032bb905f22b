"""Each option of interventions, analyses and the cache does something, or is refused."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch

from hooked_hybrid import ActivationCache, HookedHybrid, analysis, interventions
from hooked_hybrid.model.residual import norms, stacks
from tests.models import griffin_config, random_model, random_tokens
from tests.options import check_refuses, options_of, seen

N_POS = 12
ATTENTION = 1
SPAN = (3, 6)
MASK = torch.ones(2, N_POS, dtype=torch.long)
MASK[1, :2] = 0


@cache
def model() -> HookedHybrid:
    return random_model(griffin_config("RARA"))


@cache
def cached(seed: int = 0) -> Any:
    keep = {"names_filter": lambda name: True} if seed == 0 else {}
    return model().run_with_cache(random_tokens(2, N_POS, seed), **keep)[1]


def logits_under(hooks: Any) -> Any:
    return model().run_with_hooks(random_tokens(2, N_POS), fwd_hooks=hooks)


def tied(pattern: Any, hook: Any) -> Any:
    """Score the first three heads alike, the last one higher."""
    return torch.zeros_like(pattern[..., 0]).add_(torch.arange(4.0)[:, None] // 3)


def by_dtype(pattern: Any, hook: Any) -> Any:
    return pattern.amax(-1) * (1 if pattern.dtype == torch.float64 else -1)


def negative(pattern: Any, hook: Any) -> Any:
    return -pattern.amax(-1)


def double(x: Any, hook: Any) -> Any:
    return 2 * x


# --- interventions --------------------------------------------------------------------------------

Z = dict.fromkeys((1, 3), torch.full((4, 8), 0.3))
RUN = dict.fromkeys((1, 3), torch.linspace(-1, 1, 2 * N_POS * 4 * 8).view(2, N_POS, 4, 8))
WRITES = {0: torch.linspace(-1, 1, 2 * N_POS * 24).view(2, N_POS, 24)}
HEADS = {ATTENTION: [1]}
MEAN = {"method": "mean", "values": RUN}
BY_HAND = {"donor": "tensors"}  # of no known run: a cache holds the padding of its own

# Factory -> arguments, and for each option: how it is given (with what else), and idle calls.
Option = tuple[dict[str, Any], dict[str, Any], tuple[dict[str, Any], ...]]
OF_HEADS: dict[str, Option] = {
    "method": ({}, {"method": "norm"}, ({"method": "other"},)),
    "values": (
        {"method": "mean", "values": Z},
        {"values": dict.fromkeys((1, 3), Z[ATTENTION] + 1)},
        ({"values": RUN}, {"values": RUN, "method": "norm"}),
    ),
    "seed": (
        {"method": "resample", "values": RUN},
        {"seed": 1},
        ({"seed": 0}, {**MEAN, "seed": 0}, {"method": "norm", "seed": 0}),
    ),
    "attention_mask": (
        MEAN,
        {"attention_mask": MASK},
        ({"attention_mask": MASK}, {"method": "norm", "attention_mask": MASK}),
    ),
}
INTERVENTIONS: dict[str, tuple[tuple[Any, ...], dict[str, Option]]] = {
    "ablate_heads": ((HEADS,), OF_HEADS),
    "keep_heads": ((HEADS,), OF_HEADS),
    "ablate_layers": (
        (0,),
        {
            "kind": ({}, {"kind": "mlp"}, ({"kind": "attn"},)),
            "method": (
                {"method": "mean", "values": WRITES},
                {"method": "zero", "values": None},
                ({"method": "norm"},),
            ),
            "values": (
                {"method": "mean", "values": WRITES},
                {"values": {0: torch.ones(24)}},
                ({"values": WRITES},),
            ),
            "attention_mask": (
                {"method": "mean", "values": WRITES},
                {"attention_mask": MASK},
                ({"attention_mask": MASK},),
            ),
        },
    ),
    "ablate_mixers": (
        ("cfg", "recurrence"),
        {
            "layers": ({}, {"layers": 2}, ({"layers": ATTENTION},)),
            "method": (
                {"layers": 0, "method": "mean", "values": WRITES},
                {"method": "zero", "values": None},
                ({"method": "norm"},),
            ),
            "values": (
                {"layers": 0, "method": "mean", "values": WRITES},
                {"values": {0: torch.ones(24)}},
                ({"values": WRITES},),
            ),
            "attention_mask": (
                {"layers": 0, "method": "mean", "values": WRITES},
                {"attention_mask": MASK},
                ({"attention_mask": MASK},),
            ),
        },
    ),
    "follow_span": (
        (SPAN, 7),
        {
            "token": ({}, {"token": "last"}, ({"token": "first"},)),
            "weight": ({}, {"weight": "mean"}, ({"weight": "two"},)),
            "outside": ({}, {"outside": "keep"}, ({"outside": "half"},)),
        },
    ),
    "keep_top_heads": (
        (2,),
        {
            "score": ({}, {"score": negative}, ({"score": "l1"},)),
            "ties": (
                {"score": tied},
                {"ties": "lowest"},
                ({"ties": "highest"},),
            ),
            "score_dtype": (
                {
                    "score": lambda p, hook: (
                        p.amax(-1).double() if p.dtype == torch.float64 else -p.amax(-1)
                    )
                },
                {"score_dtype": torch.float64},
                ({"score_dtype": torch.int32},),
            ),
        },
    ),
    "boost_span": (
        (2, SPAN, 3.0),
        {
            "score": ({}, {"score": negative}, ({"score": "l1"},)),
            "ties": (
                {"score": tied},
                {"ties": "lowest"},
                ({"ties": "highest"},),
            ),
        },
    ),
    "manipulate_span": (
        ("permute", SPAN),
        {
            "renormalise": ({"mode": "omit"}, {"renormalise": True}, ()),
            "layers": (
                {"mode": "omit"},
                {"layers": [ATTENTION], "heads": [0]},
                ({"layers": [0], "heads": HEADS},),
            ),
            "heads": ({"mode": "omit"}, {"heads": [0]}, ({"heads": []},)),
            "seed": ({}, {"seed": 3}, ({"mode": "omit", "seed": 3}, {"mode": "keep", "seed": 0})),
        },
    ),
    "limit_window": ((2,), {"layers": ({}, {"layers": [ATTENTION]}, ({"layers": [-1]},))}),
    "random_score": ((), {"seed": ({}, {"seed": 1}, ())}),
    "edit_state": (
        (double,),
        {
            "positions": ({}, {"positions": [3]}, ({"positions": [-1]},)),
            "layers": ({}, {"layers": [0]}, ({"layers": [0.5]},)),
        },
    ),
    "freeze_state": (
        (4,),
        {
            "stop": ({}, {"stop": 6}, ({"stop": 3},)),
            "layers": ({}, {"layers": [0]}, ({"layers": [-1]},)),
            "channels": ({}, {"channels": [0, 1]}, ({"channels": [-1]},)),
        },
    ),
    "knock_out_state_edges": (
        ([8], [2]),
        {
            "layers": ({}, {"layers": [2]}, ({"layers": [-1]},)),
            "channels": ({}, {"channels": [0, 1]}, ({"channels": [-1]},)),
        },
    ),
    "knock_out_edges": (
        ([8], [4, 5]),
        {
            "layers": ({}, {"layers": [ATTENTION]}, ({"layers": [-1]},)),
            "heads": ({}, {"heads": [0]}, ({"heads": [-1]},)),
            "renormalise": ({}, {"renormalise": False}, ()),
        },
    ),
    "patch": (
        ("other", ("z", ATTENTION)),
        {
            "positions": ({}, {"positions": [3]}, ({"positions": [-1]},)),
            "rows": ({}, {"rows": [0]}, ({"rows": [-1]},)),
            "heads": ({}, {"heads": [0]}, ({"heads": [-1]},)),
            "attention_mask": (
                {**BY_HAND, "positions": [4, 5]},
                {"attention_mask": MASK},
                ({"attention_mask": MASK},),
            ),
        },
    ),
    "freeze": (
        ("other", ("z", ATTENTION)),
        {"attention_mask": (BY_HAND, {"attention_mask": MASK}, ({"attention_mask": MASK},))},
    ),
    "knock_out_crossings": (
        ("cfg", 5),
        {"layers": ({}, {"layers": [0]}, ({"layers": [99]},))},
    ),
    "mean_over_tokens": (
        (RUN[ATTENTION],),
        {"attention_mask": ({}, {"attention_mask": MASK}, ({"attention_mask": MASK[:1]},))},
    ),
}


def factories() -> dict[str, Callable[..., Any]]:
    return {
        name: made
        for name in interventions.__all__
        if options_of(made := getattr(interventions, name))
    }


def test_each_option_of_an_intervention_stands_in_the_table():
    assert factories().keys() == INTERVENTIONS.keys()
    for name, made in factories().items():
        assert sorted(INTERVENTIONS[name][1]) == sorted(options_of(made)), name


def run_intervention(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> Any:
    made = getattr(interventions, name)
    options = dict(options)
    given = [
        {"other": lambda: cached(1), "cfg": lambda: model().cfg}.get(a, lambda a=a: a)()
        if isinstance(a, str)
        else a
        for a in args
    ]
    if "mode" in options:
        given[0] = options.pop("mode")
    if options.pop("donor", None) == "tensors":
        given[0] = dict(given[0])
    result = made(*given, **options)
    if name == "mean_over_tokens":
        return result
    if name == "random_score":
        result = interventions.keep_top_heads(2, score=result)
    try:
        return logits_under(result)
    except ValueError as error:  # a padded donor has too few positions
        return str(error)


@pytest.mark.parametrize("name", INTERVENTIONS)
def test_each_option_of_an_intervention_acts_or_is_refused(unchecked, name):
    args, options = INTERVENTIONS[name]
    for option, (base, change, idle) in options.items():
        before = run_intervention(name, args, base)
        after = run_intervention(name, args, {**base, **change})
        assert seen(before) != seen(after), option
        for bad in idle:
            check_refuses(lambda bad=bad: run_intervention(name, args, bad), option, {})


# --- the residual stream, from a cache ------------------------------------------------------------

STACKED = {"layer": 2}
LABELS = ({}, {"return_labels": True}, ())
NORM = ({}, {"apply_ln": True}, ())
POSITIONS = ({}, {"pos_slice": slice(3)}, ({"pos_slice": [99]},))
UP_TO = ({}, {"layer": 1}, ({"layer": 99},))
TO_MLP = (STACKED, {"mlp_input": True}, ({"mlp_input": True},))
REST = ({}, {"incl_remainder": True}, ())
ONTO = ({}, {"project_output_onto": torch.linspace(-1, 1, 24)}, ())
SOME = ({}, {"neuron_slice": slice(3)}, ())


def stack_of(n: int = 3) -> Any:
    return torch.linspace(-1, 1, n * 2 * N_POS * 24).view(n, 2, N_POS, 24)


STACKS: dict[str, tuple[dict[str, Any], dict[str, Option]]] = {
    "accumulated_resid": (
        {},
        {
            "layer": UP_TO,
            "incl_mid": ({}, {"incl_mid": True}, ()),
            "apply_ln": NORM,
            "pos_slice": POSITIONS,
            "mlp_input": TO_MLP,
            "return_labels": LABELS,
        },
    ),
    "decompose_resid": (
        {},
        {
            "layer": UP_TO,
            "mlp_input": TO_MLP,
            "mode": ({}, {"mode": "mlp"}, ({"mode": "heads"},)),
            "apply_ln": NORM,
            "pos_slice": POSITIONS,
            "incl_embeds": ({}, {"incl_embeds": False}, ()),
            "return_labels": LABELS,
        },
    ),
    "stack_head_results": (
        {},
        {
            "layer": ({}, {"layer": 2}, ({"layer": 99},)),
            "return_labels": LABELS,
            "incl_remainder": REST,
            "pos_slice": POSITIONS,
            "apply_ln": NORM,
            "mlp_input": ({"layer": 3}, {"mlp_input": True}, ({"mlp_input": True},)),
            "recurrent": ({}, {"recurrent": "layer"}, ({"recurrent": "head"},)),
        },
    ),
    "stack_neuron_results": (
        {"layer": 2},
        {
            "pos_slice": POSITIONS,
            "neuron_slice": SOME,
            "return_labels": LABELS,
            "incl_remainder": REST,
            "apply_ln": NORM,
            "project_output_onto": ONTO,
            "mlp_input": (
                {"incl_remainder": True},
                {"mlp_input": True},
                ({"layer": None, "mlp_input": True},),
            ),
        },
    ),
    "get_neuron_results": (
        {"layer": 1},
        {
            "neuron_slice": SOME,
            "pos_slice": ({}, {"pos_slice": slice(3)}, ()),
            "project_output_onto": ONTO,
        },
    ),
    "stack_activation": (
        {"activation_name": "z"},
        {
            "layer": ({}, {"layer": 2}, ({"layer": 99},)),
            "sublayer_type": (
                {"activation_name": "scale", "sublayer_type": "ln1"},
                {"sublayer_type": "ln2"},
                (),
            ),
            "return_labels": LABELS,
        },
    ),
    "get_full_resid_decomposition": (
        {},
        {
            "layer": UP_TO,
            "mlp_input": TO_MLP,
            "expand_neurons": ({}, {"expand_neurons": False}, ()),
            "apply_ln": NORM,
            "pos_slice": POSITIONS,
            "return_labels": LABELS,
            "project_output_onto": ONTO,
            "recurrent": ({}, {"recurrent": "layer"}, ({"recurrent": "none"},)),
        },
    ),
    "apply_ln_to_stack": (
        {"residual_stack": stack_of()},
        {
            "layer": UP_TO,
            "mlp_input": ({"layer": 1}, {"mlp_input": True}, ({"mlp_input": True},)),
            "pos_slice": (
                {},
                {"residual_stack": stack_of()[:, :, :3], "pos_slice": slice(3)},
                ({"recompute_ln": True, "pos_slice": 0},),
            ),
            "batch_slice": ({}, {"batch_slice": [0]}, ()),
            "has_batch_dim": (
                {},
                {"residual_stack": stack_of()[:, 0], "batch_slice": 0, "has_batch_dim": False},
                (),
            ),
            "recompute_ln": ({}, {"recompute_ln": True}, ()),
        },
    ),
    "logit_attrs": (
        {"residual_stack": stack_of(), "tokens": 5},
        {
            "incorrect_tokens": ({}, {"incorrect_tokens": 6}, ()),
            "pos_slice": (
                {},
                {"residual_stack": stack_of()[:, :, :3], "pos_slice": slice(3)},
                ({"pos_slice": slice(3)},),
            ),
            "batch_slice": ({}, {"batch_slice": [0]}, ()),
            "has_batch_dim": (
                {},
                {"residual_stack": stack_of()[:, 0], "batch_slice": 0, "has_batch_dim": False},
                (),
            ),
            "through_soft_cap": ({}, {"through_soft_cap": "share"}, ({"through_soft_cap": "no"},)),
        },
    ),
}
OF_MIXTURES = {"stack_expert_results": "tests/model/test_residual.py", "expand_experts": ""}
"""Of Jamba's mixtures, which this model has none of: test_residual.py holds them."""


def test_each_option_of_a_stack_stands_in_the_table():
    methods = {
        name: method
        for name, method in vars(ActivationCache).items()
        if getattr(method, "__module__", None) in (stacks.__name__, norms.__name__)
    }
    assert {"decompose_resid", "logit_attrs"} <= methods.keys()
    for name in methods.keys() - OF_MIXTURES.keys():
        wanted = [o for o in options_of(methods[name]) if o not in OF_MIXTURES]
        assert not wanted or sorted(STACKS[name][1]) == sorted(wanted), name


@pytest.mark.parametrize("name", STACKS)
def test_each_option_of_a_stack_acts_or_is_refused(unchecked, name):
    method, (given, options) = getattr(cached(), name), STACKS[name]
    for option, (base, change, idle) in options.items():
        before, after = method(**{**given, **base}), method(**{**given, **base, **change})
        assert seen(before) != seen(after), option
        for bad in idle:
            words = "layer" if "layer" in bad else option
            check = pytest.raises((ValueError, IndexError, KeyError), match=f"{words}|position")
            with check:
                method(**{**given, **bad})


def test_each_option_of_a_cache_acts(unchecked):
    values = {"hook_embed": torch.zeros(1, 3, 24)}
    assert options_of(ActivationCache.to) == ["move_model"]
    assert options_of(ActivationCache.toggle_autodiff) == ["mode"]
    moved = random_model(griffin_config("RA"))
    ActivationCache(values, moved).to("meta", move_model=True)
    assert moved.device.type == "meta"
    ActivationCache(values, moved).toggle_autodiff(False)
    assert not torch.is_grad_enabled()
    ActivationCache(values, moved).toggle_autodiff(True)
    assert torch.is_grad_enabled()


# --- analyses -------------------------------------------------------------------------------------

TOKENS = random_tokens(2, N_POS)
OTHER = random_tokens(2, N_POS, 1)


def last_logit(logits: Any) -> Any:
    return logits[:, -1, 5]


VOCAB = ({}, {"vocab": [1, 2, 3]}, ({"vocab": [99]},))
ALONE = ({}, {"tokens": "alone"}, ({"tokens": "other"},))
CENTRED = ({}, {"centred": False}, ())
DISTANCE = ({}, {"distance": 3}, ({"distance": 99},))
KIND = ({}, {"kind": "rank"}, ({"kind": "other"},))
BY_LAYER = ({}, {"layers": [1]}, ({"layers": [99]},))
LENS: dict[str, Option] = {
    "layers": BY_LAYER,
    "soft_cap": ({"kind": "logits"}, {"soft_cap": False}, ()),
    "incl_mid": ({}, {"incl_mid": True}, ({"layers": [-1], "incl_mid": True},)),
    "pos_slice": ({}, {"pos_slice": slice(3)}, ()),
}
LENS_KIND = ({}, {"kind": "probs"}, ({"kind": "other"},))
ANALYSES: dict[str, tuple[Callable[[], tuple[Any, ...]], dict[str, Option]]] = {
    "qk_circuit": (
        lambda: (model(), ATTENTION),
        {
            "distance": DISTANCE,
            "scaled": ({}, {"scaled": True}, ()),
            "with_norm": ({}, {"with_norm": True}, ()),
        },
    ),
    "ov_circuit": (
        lambda: (model(), ATTENTION),
        {"with_norm": ({}, {"with_norm": True}, ())},
    ),
    "recurrent_circuit": (
        lambda: (model(), 0),
        {
            "lag": ({}, {"lag": 0}, ({"lag": 99},)),
            "with_norm": ({}, {"with_norm": True}, ()),
        },
    ),
    "composition_scores": (
        lambda: (
            analysis.ov_circuit(model(), 1)[:2],
            analysis.ov_circuit(model(), 3)[:2],
        ),
        {"broadcast_dims": ({}, {"broadcast_dims": False}, ())},
    ),
    "all_composition_scores": (
        lambda: (model(), "K"),
        {
            "distance": (*DISTANCE[:2], ({"mode": "V", "distance": 3},)),
            "by_block": ({}, {"by_block": False}, ()),
        },
    ),
    "all_matching_scores": (
        lambda: (model(),),
        {
            "distance": DISTANCE,
            "kind": KIND,
            "centred": CENTRED,
            "tokens": ALONE,
            "lag": ({}, {"lag": 0}, ({"lag": 99},)),
            "vocab": VOCAB,
        },
    ),
    "matching_scores": (
        lambda: (model(),),
        {
            "distance": DISTANCE,
            "kind": KIND,
            "centred": CENTRED,
            "tokens": ALONE,
            "through": ({}, {"through": (0, 0)}, ()),
            "lag": (
                {"through": (0, 0)},
                {"lag": 1},
                ({"lag": 1}, {"through": (1, 0), "lag": 0}),
            ),
            "vocab": VOCAB,
        },
    ),
    "copying_scores": (
        lambda: (model(),),
        {"kind": KIND, "centred": CENTRED, "tokens": ALONE, "vocab": VOCAB},
    ),
    "full_qk_circuit": (
        lambda: (model(), 3),
        {
            "distance": DISTANCE,
            "scaled": ({}, {"scaled": True}, ()),
            "tokens": ALONE,
            "through": ({}, {"through": (0, 0)}, ({"through": (3, 0)},)),
            "lag": (
                {"through": (0, 0)},
                {"lag": 1},
                ({"lag": 1}, {"through": (1, 0), "lag": 0}),
            ),
            "vocab": VOCAB,
        },
    ),
    "full_ov_circuit": (lambda: (model(), 3), {"tokens": ALONE, "vocab": VOCAB}),
    "written_tokens": (
        lambda: (model(), (2, 0)),
        {
            "tokens": ALONE,
            "vocab": VOCAB,
            "lag": ({}, {"lag": 0}, ({"component": (1, 0), "lag": 0},)),
        },
    ),
    "token_directions": (lambda: (model(), 3), {"tokens": ALONE, "vocab": VOCAB}),
    "logit_lens": (lambda: (model(), cached()), {"kind": LENS_KIND, **LENS}),
    "token_over_depth": (lambda: (model(), cached(), 5), {"kind": LENS_KIND, **LENS}),
    "lens_ranks": (
        lambda: (model(), cached(), 5),
        {name: option for name, option in LENS.items() if name != "soft_cap"},
    ),
    "lens_top_tokens": (
        lambda: (model(), cached()),
        {
            "k": ({}, {"k": 2}, ({"k": 0},)),
            **LENS,
            "soft_cap": ({}, {"soft_cap": False}, ()),
        },
    ),
    "lens_of_generation": (
        lambda: (model(), generated()),
        {
            "kind": LENS_KIND,
            **{name: option for name, option in LENS.items() if name != "pos_slice"},
        },
    ),
    "effective_attention": (
        lambda: (cached(), 0),
        {
            "through": ({}, {"through": "block"}, ({"through": "layer"},)),
            "summary": ({}, {"summary": "layer"}, ({"summary": "head"},)),
            "measure": (
                {"summary": "layer"},
                {"measure": "norm"},
                ({"measure": "norm"}, {"measure": "sum"}),
            ),
            "which": ({}, {"which": [0]}, ({"which": [99]},)),
            "queries": ({}, {"queries": [0]}, ()),
            "keys": ({}, {"keys": [0]}, ()),
            "max_bytes": ({}, {"max_bytes": 1}, ()),
            "check": ({"cache": "changed"}, {"check": False}, ()),
        },
    ),
    "effective_pattern": (lambda: (cached(), 0), {"keys": ({}, {"keys": [0]}, ())}),
    "effective_offset": (
        lambda: (cached(), 0),
        {"through": ({}, {"through": "block"}, ({"through": "layer"},))},
    ),
    "memory_horizon": (lambda: (cached(), 0), {"eps": ({}, {"eps": 0.5}, ({"eps": 0.0},))}),
    "how_far": (lambda: (cached(),), {"eps": ({}, {"eps": 0.5}, ({"eps": 1.0},))}),
    "entropy_profile": (
        lambda: (model(), TOKENS),
        {
            "tokens": ({}, {"tokens": OTHER}, ({"source": "cached", "tokens": TOKENS},)),
            "attention_mask": ({}, {"attention_mask": MASK}, ()),
        },
    ),
    "repeat_scores": (
        lambda: (model(),),
        {
            "n_tokens": ({"n_tokens": 4}, {"n_tokens": 5}, ({"n_tokens": 2},)),
            "batch": ({"n_tokens": 4}, {"batch": 2}, ({"n_tokens": 4, "batch": 0},)),
            "seed": ({"n_tokens": 4}, {"seed": 1}, ()),
        },
    ),
    "attribution_patching": (
        lambda: (model(), TOKENS, OTHER, last_logit),
        {
            "names_filter": ({}, {"names_filter": "blocks.1.attn.hook_z"}, ()),
            "reduce": ({}, {"reduce": "head"}, ({"reduce": "other"},)),
            "at": ({}, {"at": "clean"}, ({"at": "both"},)),
            "attention_mask": ({}, {"attention_mask": MASK}, ()),
            "qk_fix": ({}, {"qk_fix": True}, ()),
            "max_bytes": ({}, {"max_bytes": 0}, ()),
        },
    ),
    "generic_activation_patch": (
        lambda: (model(), OTHER, cached(), last_logit, ["blocks.1.attn.hook_z"]),
        {
            "axes": ({}, {"axes": ["head"]}, ({"axes": ["key"]},)),
            "positions": ({}, {"positions": [1]}, ()),
            "heads": ({}, {"heads": [1]}, ()),
            "attention_mask": ({"positions": [1]}, {"attention_mask": MASK}, ()),
            "clean_attention_mask": (
                {"attention_mask": MASK, "positions": [3]},
                {"clean_attention_mask": MASK.flip(0)},
                (),
            ),
            "difference": ({}, {"difference": False}, ()),
        },
    ),
    "patch_layers": (
        lambda: (model(), OTHER, cached(), last_logit, "z"),
        {"axes": ({}, {"axes": ["head"]}, ())},
    ),
    "patch_heads": (
        lambda: (model(), OTHER, cached(), last_logit),
        {"leaf": ({}, {"leaf": "q"}, ()), "by_position": ({}, {"by_position": True}, ())},
    ),
}
HELD_ELSEWHERE = {
    "retrieval_scores": "test_head_finders.py",
    "channel_scores": "test_head_finders.py",
    "induction_scores": "repeat_scores above, of which it is one",
    "compare_with_patching": "test_attribution.py",
    "path_patch_each": "its one option shows a bar",
    "path_patch_heads": "its one option shows a bar",
}
SEEN_BY_PEOPLE = {"verbose"}


@cache
def generated() -> Any:
    keep = ("hook_resid_pre", "hook_resid_post", "hook_resid_mid")
    return model().generate(
        TOKENS,
        3,
        names_filter=lambda name: name.endswith(keep),
        return_type="output",
        verbose=False,
    )


def analyses() -> dict[str, Callable[..., Any]]:
    named = {n: getattr(analysis, n) for n in analysis.__all__ if n[0].islower() and n != "plots"}
    return {name: function for name, function in named.items() if options_of(function)}


def test_each_option_of_an_analysis_stands_in_the_table():
    assert analyses().keys() == ANALYSES.keys() | HELD_ELSEWHERE.keys()
    for name, function in analyses().items():
        if name not in HELD_ELSEWHERE:
            wanted = sorted({*options_of(function)} - SEEN_BY_PEOPLE)
            assert sorted(ANALYSES[name][1]) == wanted, name


def run_analysis(name: str, options: dict[str, Any]) -> Any:
    function = getattr(analysis, name)
    options, given = dict(options), list(ANALYSES[name][0]())
    for i, parameter in enumerate(list(inspect.signature(function).parameters)[: len(given)]):
        if isinstance(options.get(parameter), str) and options[parameter] in CACHES:
            given[i] = CACHES[options.pop(parameter)]()
        elif parameter in options:
            given[i] = options.pop(parameter)
    if "verbose" in options_of(function) or "options" in inspect.signature(function).parameters:
        options.setdefault("verbose", False) if "patch" in name else None
    result = function(*given, **options)
    return (result.A, result.B) if hasattr(result, "A") else result


def changed_cache() -> ActivationCache:
    values = dict(cached().cache_dict)
    values["blocks.0.mixer.hook_ssm_y"] = values["blocks.0.mixer.hook_ssm_y"] + 9
    return ActivationCache(values, model())


CACHES = {"changed": changed_cache, "cached": cached}


def outcome(name: str, options: dict[str, Any]) -> Any:
    try:
        return seen(run_analysis(name, options))
    except (ValueError, MemoryError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", ANALYSES)
def test_each_option_of_an_analysis_acts_or_is_refused(unchecked, name):
    for option, (base, change, idle) in ANALYSES[name][1].items():
        known = {n for n in inspect.signature(getattr(analysis, name)).parameters}
        base = {n: v for n, v in base.items() if n in known}
        before, after = outcome(name, base), outcome(name, {**base, **change})
        assert before != after, option
        for bad in idle:
            with pytest.raises(ValueError, match=option):
                run_analysis(name, bad)
