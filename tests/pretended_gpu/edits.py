"""Every public intervention, in the forms that put tensors of a user's on some device.

Each takes `(model, at)`, as the stages do, and returns hooks, or None where a model has no place
for them. `donor` is a cache of another run, on the model's device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid
from hooked_hybrid import interventions as I
from tests.models import random_tokens
from tests.pretended_gpu.stages import EVERYTHING, QUIET, At, Scenario, gradients, mask, metric

Factory = Callable[[HookedHybrid, At], Any]
FACTORIES: dict[str, Factory] = {}


def edit(fn: Factory) -> Factory:
    FACTORIES[fn.__name__] = fn
    return fn


def donor(m: HookedHybrid, at: At) -> Any:
    with torch.no_grad():
        return m.run_with_cache(at(random_tokens(seed=5)), **EVERYTHING)[1]


def attention(m: HookedHybrid) -> int:
    return m.cfg.attention_layers[0]


def recurrent(m: HookedHybrid) -> int:
    return m.cfg.recurrent_layers[0]


def first(n: int, at: At, rows: int = 2) -> Tensor:
    """Return True at the first n of 20 positions."""
    return at(torch.arange(20) < n)[None].expand(rows, -1)


def zero(x: Tensor, hook: Any) -> Tensor:
    return x * 0


# --- heads ----------------------------------------------------------------------------------------


@edit
def top_heads(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(2)


@edit
def top_heads_by_row(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(at(torch.tensor([1, 2])), I.l2_norm, ties="lowest")


@edit
def top_heads_by_entropy_in_fp64(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(1, I.negative_entropy, score_dtype=torch.float64)


@edit
def top_heads_by_lot(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(1, I.random_score(3))


@edit
def top_heads_reversed(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(1, I.reversed_score("l2"))


@edit
def top_heads_by_attention_to_spans(m: HookedHybrid, at: At) -> Any:
    return I.keep_top_heads(1, I.attention_to(at(torch.tensor([[3, 6], [2, 4]]))))


@edit
def best_of_scores(m: HookedHybrid, at: At) -> Any:
    def keep(z: Tensor, hook: Any) -> Tensor:
        scores = z.norm(dim=-1).transpose(1, 2)
        k = torch.ones(len(z), dtype=torch.long, device=z.device)
        return z * I.best_heads(scores, k, "torch").transpose(1, 2)[..., None]

    return [(f"blocks.{attention(m)}.attn.hook_z", keep)]


@edit
def heads_kept(m: HookedHybrid, at: At) -> Any:
    heads = {attention(m): [0, 1]}
    I.check_heads(m.cfg, heads)
    return I.keep_heads(heads)


@edit
def heads_cut_by_row(m: HookedHybrid, at: At) -> Any:
    a = attention(m)
    return I.cut_heads(I.masks_of_rows(m.cfg, [{a: [0]}, {a: [1]}]))


@edit
def heads_cut_by_mask(m: HookedHybrid, at: At) -> Any:
    n = m.cfg.layers[attention(m)].mixer.n_heads
    return I.cut_heads({attention(m): at(torch.arange(2 * n).view(2, n) % 3 == 0)})


@edit
def heads_at_their_mean(m: HookedHybrid, at: At) -> Any:
    return I.ablate_heads({attention(m): [1]}, "mean", donor(m, at))


@edit
def heads_at_a_mean_of_tokens(m: HookedHybrid, at: At) -> Any:
    a, z = attention(m), donor(m, at)["z", attention(m)]
    means = {a: I.mean_over_tokens(z, attention_mask=at(mask()))}
    return I.ablate_heads({a: [1]}, "mean", means)


@edit
def heads_of_another_row(m: HookedHybrid, at: At) -> Any:
    return I.ablate_heads({attention(m): [1]}, "resample", donor(m, at), seed=1)


@edit
def heads_at_their_norm(m: HookedHybrid, at: At) -> Any:
    return I.ablate_heads({attention(m): [1]}, "norm")


@edit
def layers_at_zero(m: HookedHybrid, at: At) -> Any:
    return I.ablate_layers([attention(m), recurrent(m)])


@edit
def layers_at_their_mean(m: HookedHybrid, at: At) -> Any:
    layers = (*I.layers_of(m.cfg, "rglru"), *I.layers_of(m.cfg, "mamba"))
    return I.ablate_layers(layers[:1], "mixer", "mean", donor(m, at))


@edit
def mixers_of_a_kind_at_their_mean(m: HookedHybrid, at: At) -> Any:
    return I.ablate_mixers(m.cfg, "recurrence", None, "mean", donor(m, at))


# --- patterns and scores --------------------------------------------------------------------------


@edit
def spans_binary(m: HookedHybrid, at: At) -> Any:
    spans = (3, 6)
    return I.manipulate_span("binary", spans)


@edit
def spans_permuted(m: HookedHybrid, at: At) -> Any:
    return I.manipulate_span("permute", [(3, 6), (8, 12)])


@edit
def spans_only(m: HookedHybrid, at: At) -> Any:
    return I.manipulate_span("only", [[(3, 6)], [(2, 5), (9, 12)]], renormalise=True)


@edit
def spans_omitted_by_row(m: HookedHybrid, at: At) -> Any:
    spans = at(torch.tensor([[3, 6], [2, 4]]))
    return I.manipulate_span("omit", spans, heads=[1])


@edit
def spans_null(m: HookedHybrid, at: At) -> Any:
    return I.manipulate_span("null", (3, 6), layers=[attention(m)])


@edit
def spans_boosted(m: HookedHybrid, at: At) -> Any:
    return I.boost_span(at(torch.tensor([1, 2])), (3, 6), 1.5, "l2", "lowest")


@edit
def spans_followed(m: HookedHybrid, at: At) -> Any:
    spans, start = at(torch.tensor([[3, 6], [2, 4]])), at(torch.tensor([10, 12]))
    return I.follow_span(spans, start, "last", weight="mean", outside="keep")


@edit
def edges_cut(m: HookedHybrid, at: At) -> Any:
    return I.knock_out_edges([10, 11], [2, 3])


@edit
def edges_cut_by_masks(m: HookedHybrid, at: At) -> Any:
    return I.knock_out_edges(~first(13, at), first(4, at), layers=[attention(m)])


@edit
def windows(m: HookedHybrid, at: At) -> Any:
    return I.limit_window(4)


@edit
def crossings(m: HookedHybrid, at: At) -> Any:
    return I.knock_out_crossings(m.cfg, at(torch.tensor([8, 9])))


# --- values of another run ------------------------------------------------------------------------


@edit
def patched(m: HookedHybrid, at: At) -> Any:
    return I.patch(donor(m, at), ("z", attention(m)), heads=[1], rows=[1], positions=3)


@edit
def patched_where_a_mask_says(m: HookedHybrid, at: At) -> Any:
    return I.patch(donor(m, at), ("mlp_out", 1), positions=first(7, at))


@edit
def patched_patterns_and_states(m: HookedHybrid, at: At) -> Any:
    c = donor(m, at)
    return [
        *I.patch(c, ("pattern", attention(m))),
        *I.patch(c, ("ssm_state", recurrent(m)), positions=[4]),
    ]


@edit
def patched_from_the_host(m: HookedHybrid, at: At) -> Any:
    return I.patch(donor(m, at).to("cpu"), ("k", attention(m)), heads=[0])


@edit
def frozen(m: HookedHybrid, at: At) -> Any:
    return I.freeze(donor(m, at), lambda name: name.endswith("pattern"))


# --- recurrences ----------------------------------------------------------------------------------


@edit
def states_edited(m: HookedHybrid, at: At) -> Any:
    return I.edit_state(lambda h, hook: h * 0.5, [3, 7])


@edit
def states_edited_everywhere(m: HookedHybrid, at: At) -> Any:
    return I.edit_state(lambda h, hook: h * 0.9, layers=[recurrent(m)])


@edit
def states_frozen(m: HookedHybrid, at: At) -> Any:
    return I.freeze_state(5, 9)


@edit
def states_frozen_by_row(m: HookedHybrid, at: At) -> Any:
    bounds = (at(torch.tensor(pair)) for pair in ([5, 6], [9, 8]))
    return I.freeze_state(*bounds, channels=[1])


@edit
def state_edges_cut(m: HookedHybrid, at: At) -> Any:
    return I.knock_out_state_edges([10, 11], [2, 3])


@edit
def state_edges_cut_by_a_mask(m: HookedHybrid, at: At) -> Any:
    options: dict[str, Any] = {"channels": [0, 3], "layers": [recurrent(m)]}
    return I.knock_out_state_edges(None, first(4, at), **options)


# --- where a hook acts ----------------------------------------------------------------------------


@edit
def at_positions(m: HookedHybrid, at: At) -> Any:
    state = f"blocks.{recurrent(m)}.mixer.hook_ssm_state"
    return [
        ("blocks.1.hook_resid_mid", I.hook_at(zero, [4, 6])),
        (state, I.hook_at(zero, at(torch.tensor([3, 5])))),
    ]


@edit
def on_some_rows(m: HookedHybrid, at: At) -> Any:
    hooks = [(where, I.on_rows(fn, [1])) for where, fn in I.keep_top_heads(1)]
    return [*hooks, ("blocks.1.hook_resid_mid", I.on_rows(zero, at(torch.tensor([0]))))]


@edit
def by_position(m: HookedHybrid, at: At) -> Any:
    @I.per_position
    def halve(x: Tensor, hook: Any) -> Tensor:
        return x / 2

    return [("blocks.1.hook_resid_mid", halve), (f"blocks.{attention(m)}.attn.hook_result", halve)]


@edit
def inputs_of_heads(m: HookedHybrid, at: At) -> Any:
    a = attention(m)
    return [(f"blocks.{a}.attn.hook_{x}_input", lambda x, hook: x / 2) for x in "qkv"]


@edit
def values_of_a_recurrence(m: HookedHybrid, at: At) -> Any:
    names = [n for n in m.hook_dict if n.endswith(("ssm_decay", "ssm_write", "log_decay"))]
    return [(names, lambda x, hook: x * 0.9)]


@edit
def values_of_experts(m: HookedHybrid, at: At) -> Any:
    names = [n for n in m.hook_dict if n.endswith(("expert_post", "expert_out"))]
    if not names:
        return None
    others = [n for n in m.hook_dict if n.endswith("expert_indices")]
    return [(names, lambda x, hook: x * 0.5), (others, lambda x, hook: x.flip(-1))]


# --- as scenarios ---------------------------------------------------------------------------------

FOR_PREFILL = ("patched", "frozen", "heads_of_another_row", "edges_cut_by_masks", "state_edges_cut")
"""Their values are of the prompt's positions alone: they are not for steps after it."""
EDITS: dict[str, Scenario] = {}


def _in_a_forward(fn: Factory) -> Scenario:
    def run(m: HookedHybrid, at: At) -> Any:
        return m.run_with_hooks(at(random_tokens()), fwd_hooks=fn(m, at) or [])

    return run


def _in_generation(fn: Factory) -> Scenario:
    kind = "prefill_hooks" if fn.__name__.startswith(FOR_PREFILL) else "fwd_hooks"

    def run(m: HookedHybrid, at: At) -> Any:
        return m.generate(at(random_tokens()), 3, **{kind: fn(m, at) or []}, **QUIET)

    return run


def _with_gradients(fn: Factory) -> Scenario:
    def run(m: HookedHybrid, at: At) -> Any:
        with m.hooks(fn(m, at) or []):
            return gradients(m, metric(m(at(random_tokens()))).sum())

    return run


for name, factory in FACTORIES.items():
    EDITS[f"{name}, forward"] = _in_a_forward(factory)
    EDITS[f"{name}, generation"] = _in_generation(factory)
    EDITS[f"grad under {name}"] = _with_gradients(factory)
