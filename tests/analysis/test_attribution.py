"""Attributions are derivatives at every hook point, and are compared with patching fairly."""

from __future__ import annotations

import random
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.analysis.attribution import Attribution, attribution_patching
from hooked_hybrid.analysis.attribution_check import (
    compare_with_patching,
    kind_of,
    rank_correlation,
)
from hooked_hybrid.analysis.planted import Planted, planted_retrieval
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.niah.needles import PAPER, draw_needle
from hooked_hybrid.niah.prompts import build_prompt
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FINITE_DIFFERENCE, FP32_PARITY

CONFIGS = {"griffin": griffin_config("RA"), "jamba": jamba_config("MA", expert_offset=0)}
models = pytest.mark.parametrize("name", list(CONFIGS))
N_POS = 8
CLEAN, CORRUPTED = random_tokens(2, N_POS, seed=1), random_tokens(2, N_POS, seed=2)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    return random_model(CONFIGS[name], dtype=dtype)


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5] - logits[:, 3, 7] + 0.1 * logits[:, 5, 9].square()


def attribute(model: HookedHybrid, **options: Any) -> Attribution:
    return attribution_patching(model, CLEAN, CORRUPTED, metric, verbose=False, **options)


def floating(model: HookedHybrid) -> list[str]:
    return [name for name, point in model.hook_dict.items() if not point.is_integer]


@models
def test_an_attribution_is_the_derivative_along_the_patch_at_every_floating_point_hook(name: str):
    """By central differences in float64, each row for itself; of a state, later ones follow."""
    model, t, step = model_of(name, torch.float64), 3, 1e-6
    names = floating(model)
    found = attribute(model, names_filter=names)
    clean = model.run_with_cache(CLEAN, names_filter=names)[1]
    corrupted = model.run_with_cache(CORRUPTED, names_filter=names)[1]

    def slope(full: str) -> Tensor:
        def nudge(value: Tensor, hook: HookPoint) -> Tensor:
            gap = (clean[full] - corrupted[full]).narrow(hook.pos_dim, t, 1)
            return value + step * torch.cat([gap, -gap])

        hook = interventions.hook_at(nudge, t)
        up_and_down = CORRUPTED.repeat(2, 1)
        up, down = metric(model.run_with_hooks(up_and_down, fwd_hooks=[(full, hook)])).split(2)
        return (up - down) / (2 * step)

    largest = max(float(value[:, t].abs().max()) for value in found.values.values())
    for full in names:
        wanted = slope(full)
        error = float((found[full][:, t] - wanted).abs().max())
        assert error < FINITE_DIFFERENCE * (float(wanted.abs().max()) + 1e-3 * largest), full
    assert {n for n in names if found[n][:, t].any()} >= {
        n for n in names if "blocks.0" in n or "ssm" in n
    }


@models
def test_reductions_are_sums_of_one_product(name: str):
    model = model_of(name)
    whole = attribute(model, reduce=None)
    points = model.hook_dict
    for reduce, kept in {
        "hook": set(),
        "position": {"pos", "query"},
        "head": {"head", "kv_head"},
        ("position", "head"): {"pos", "query", "head", "kv_head"},
    }.items():
        found = attribute(model, reduce=reduce)
        assert set(found.values) | set(found.excluded) == set(points)
        for full, value in found.values.items():
            axes = points[full].axes
            gone = [i for i, axis in enumerate(axes) if i and axis not in kept]
            assert found.axes[full] == tuple(a for i, a in enumerate(axes) if i not in gone)
            assert relative(value, whole[full].sum(gone) if gone else whole[full]) < FP32_PARITY
    channels = attribute(model, reduce="channel")
    assert "none kept by" in channels.excluded["blocks.1.attn.hook_pattern"]
    assert channels["z", 1].shape == (2, 8 if name == "griffin" else 6)
    heads = attribute(model, reduce="head")
    assert "none kept by" in heads.excluded["hook_embed"]
    assert "large" in heads.excluded["blocks.1.attn.hook_result"]


def test_choices_of_experts_are_excluded_with_a_note():
    found = attribute(model_of("jamba"))
    integers = [name for name, point in model_of("jamba").hook_dict.items() if point.is_integer]
    assert integers
    assert all("integers" in found.excluded[name] for name in integers)


@models
def test_groups_that_fit_into_memory_give_what_one_run_gives(name: str):
    model = model_of(name)
    one, many = attribute(model), attribute(model, max_bytes=20_000)
    assert list(one.values) == list(many.values)
    for full, value in one.values.items():
        assert relative(many[full], value) < FP32_PARITY, full
    assert relative(many.change, one.change) < FP32_PARITY


@models
def test_at_the_clean_run_it_is_the_other_way_round(name: str):
    model = model_of(name)
    there = attribute(model, at="clean")
    swapped = attribution_patching(model, CORRUPTED, CLEAN, metric, verbose=False)
    assert relative(there.change, metric(model(CLEAN)) - metric(model(CORRUPTED))) < FP32_PARITY
    for full, value in there.values.items():
        assert torch.equal(value, -swapped[full])


@models
def test_rows_are_their_own_and_a_number_for_all_is_their_sum(name: str):
    model = model_of(name)
    rows = attribute(model)
    total = attribution_patching(
        model, CLEAN, CORRUPTED, lambda logits: metric(logits).sum(), verbose=False
    )
    assert total.axes["hook_embed"] == ("pos",)
    for i in range(2):
        alone = attribution_patching(
            model, CLEAN[i : i + 1], CORRUPTED[i : i + 1], metric, verbose=False
        )
        for full, value in rows.values.items():
            scale = value.abs().max() + 1e-4
            assert (alone[full][0] - value[i]).abs().max() < FP32_PARITY * scale * 10, full
    for full, value in total.values.items():
        assert (rows[full].sum(0) - value).abs().max() < FP32_PARITY * (value.abs().max() + 1e-4)


@models
def test_padding_on_the_left_changes_nothing(name: str):
    model, n = model_of(name), 6
    mask = torch.ones(2, N_POS, dtype=torch.long)
    mask[1, : N_POS - n] = 0
    pair = [tokens.clone() for tokens in (CLEAN, CORRUPTED)]
    for tokens, source in zip(pair, (CLEAN, CORRUPTED), strict=True):
        tokens[1, N_POS - n :] = source[1, :n]
    last: Any = lambda logits: logits[:, -1, 5]  # noqa: E731
    padded = attribution_patching(model, *pair, last, attention_mask=mask, verbose=False)
    alone = attribution_patching(model, CLEAN[1:, :n], CORRUPTED[1:, :n], last, verbose=False)
    for full, value in alone.values.items():
        scale = value.abs().max() + 1e-3
        assert (padded[full][1, N_POS - n :] - value[0]).abs().max() < 2 * FP32_PARITY * scale, full


@models
def test_in_bfloat16_products_are_taken_in_fp32(name: str):
    model, full = model_of(name, torch.bfloat16), "blocks.1.hook_resid_mid"
    found = attribute(model, names_filter=full, reduce=None)[full]
    with torch.no_grad():
        clean = model.run_with_cache(CLEAN, names_filter=full)[1]
    kept = model.run_with_cache(
        CORRUPTED, names_filter=full, incl_bwd=True, metric=lambda y: metric(y).sum()
    )[1]
    wanted = (clean[full].float() - kept[full].float()) * kept[f"{full}_grad"].float()
    assert found.dtype == torch.float32
    assert torch.equal(found, wanted)


def test_the_largest_are_listed_with_their_places():
    found = attribute(model_of("griffin"), names_filter=["hook_embed", "blocks.1.attn.hook_z"])
    (name, index, value), *rest = found.top(5)
    assert float(found[name][index]) == value
    assert abs(value) == max(float(v.abs().max()) for v in found.values.values())
    assert [abs(r[2]) for r in rest] == sorted((abs(r[2]) for r in rest), reverse=True)
    heads = attribute(model_of("griffin"), reduce="head").head_scores()
    assert heads.layers == (1,)
    whole = attribute(model_of("griffin"), reduce=None)["z", 1]
    assert relative(heads.values[0], whole.sum((1, 3)).mean(0)) < FP32_PARITY


@models
@pytest.mark.parametrize("at", ["corrupted", "clean"])
def test_the_fix_of_queries_and_keys_is_the_softmax_of_each_patch(name: str, at: Any):
    """Each query, or each key, patched by itself; its new pattern times the pattern's gradient."""
    model = model_of(name, torch.float64)
    leaves = ["q", "k", "attn_scores"] + (["rot_q", "rot_k"] if name == "griffin" else [])
    names = [f"blocks.1.attn.hook_{leaf}" for leaf in leaves]
    options: dict[str, Any] = {"reduce": ("position", "head"), "at": at}
    found = attribute(model, names_filter=names, qk_fix=True, **options)
    plain = attribute(model, names_filter=names, **options)
    here, other, sign = (CLEAN, CORRUPTED, -1) if at == "clean" else (CORRUPTED, CLEAN, 1)
    full = "blocks.1.attn.hook_pattern"
    donor = model.run_with_cache(other, names_filter=names)[1]
    kept = model.run_with_cache(
        here, names_filter=full, incl_bwd=True, metric=lambda y: metric(y).sum()
    )[1]
    for point in names:
        heads = model.hook_dict[point].axes.index("head" if "_k" not in point[-2:] else "kv_head")
        for head in range(donor[point].shape[heads]):
            for t in (0, 2, N_POS - 1):
                hooks = interventions.patch(donor, point, positions=t, heads=head)
                with model.hooks(hooks):
                    pattern = model.run_with_cache(here, names_filter=full)[1][full]
                effect = ((pattern - kept[full]) * kept[f"{full}_grad"]).sum((1, 2, 3))
                got = found[point][:, head, t] if heads == 1 else found[point][:, t, head]
                assert float((got - sign * effect).abs().max()) < 1e-12, point
        assert found[point].shape == plain[point].shape
        assert relative(found[point], plain[point]) > 1e-3


# --- against patching ---------------------------------------------------------------------------


@models
def test_the_comparison_patches_each_cell(name: str):
    model = model_of(name)
    leaves = ("ssm_state", "pattern", ".hook_z", "mixer_out")
    names = [n for n in floating(model) if n.startswith("blocks.") and n.endswith(leaves)]
    found = compare_with_patching(model, CLEAN, CORRUPTED, metric, names, n_cells=3, verbose=False)
    assert {row.kind for row in found.rows} == {kind_of(name) for name in names}
    cache = model.run_with_cache(CLEAN, names_filter=names)[1]
    guesses = attribute(model, names_filter=names, reduce=("position", "head"))
    before = metric(model(CORRUPTED))
    leaf = "blocks.0.mixer.hook_ssm_state"
    best = int(guesses[leaf].abs().sum(0).argmax())
    hooks = interventions.patch(cache, leaf, positions=best)
    wanted = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks)) - before
    row = found["mixer.ssm_state"]
    assert row.n_cells == 6  # three runs of two rows
    assert torch.equal(row.attributed[:2], guesses[leaf][:, best])
    assert float((row.patched[:2] - wanted).abs().max()) < FP32_PARITY * 10
    at = guesses["pattern", 1].abs().sum(0)
    head, query = (int(i) for i in torch.unravel_index(at.argmax(), at.shape))
    hooks = interventions.patch(cache, ("pattern", 1), positions=query, heads=head)
    wanted = metric(model.run_with_hooks(CORRUPTED, fwd_hooks=hooks)) - before
    assert float((found["attn.pattern"].patched[:2] - wanted).abs().max()) < FP32_PARITY * 10
    assert "| attn.z |" in str(found)


def test_where_the_metric_is_linear_the_two_are_one():
    def linear(logits: Tensor) -> Tensor:
        return (logits * torch.arange(N_POS)[:, None])[..., :9].sum((1, 2))

    found = compare_with_patching(
        model_of("jamba", torch.float64),
        CLEAN,
        CORRUPTED,
        linear,
        ["unembed.hook_logits", "ln_final.hook_normalized"],
        verbose=False,
    )
    for kind in ("unembed.logits", "ln_final.normalized"):
        assert found[kind].error < 1e-9
        assert found[kind].spearman == pytest.approx(1)
        assert found[kind].n_cells == 2 * (N_POS - 1)  # at position 0 the metric does not look


def test_the_rank_correlation_is_spearmans():
    x = torch.tensor([106.0, 100, 86, 101, 99, 103, 97, 113, 112, 110])
    y = torch.tensor([7.0, 27, 2, 50, 28, 29, 20, 12, 6, 17])
    assert rank_correlation(x, y) == pytest.approx(-29 / 165)  # Wikipedia's example
    assert rank_correlation(x, x.pow(3)) == pytest.approx(1)
    assert rank_correlation(x, -x) == pytest.approx(-1)
    # With ties: ranks 1.5 1.5 3 4 and 1 2.5 2.5 4, by hand 4.25 / 4.5.
    ties = torch.tensor([0.0, 0, 1, 2]), torch.tensor([0.0, 1, 1, 2])
    assert rank_correlation(*ties) == pytest.approx(3.75 / 4.5)


# --- a planted circuit --------------------------------------------------------------------------


@cache
def planted() -> Planted:
    return planted_retrieval(noise=0.1)


@pytest.mark.parametrize("kind", ["key", "value"])
def test_the_planted_head_is_found(kind: str):
    prompts = planted().prompts(batch=6)
    answers = prompts.answers[:, :1]
    found = attribution_patching(
        planted().model,
        prompts.tokens,
        prompts.corrupted(kind),
        lambda logits: logits[:, -1].gather(1, answers)[:, 0] - logits[:, -1].mean(1),
        reduce="head",
        verbose=False,
    )
    scores = found.head_scores("z")
    assert scores.top(1) == [planted().head]
    size = scores.values.abs().flatten().sort(descending=True).values
    assert size[0] > 100 * size[1]


def test_the_planted_group_of_channels_is_found():
    """By the state's total gradient, summed over positions: which channels carry the key."""
    prompts = planted().prompts(batch=6)
    answers = prompts.answers[:, :1]
    layer, block = planted().carrier
    found = attribution_patching(
        planted().model,
        prompts.tokens,
        prompts.corrupted("key"),
        lambda logits: logits[:, -1].gather(1, answers)[:, 0] - logits[:, -1].mean(1),
        lambda name: name.endswith("hook_ssm_state"),
        reduce="channel",
        at="clean",
        verbose=False,
    )
    groups = {
        (i, b): float(value.mean(0).view(4, -1)[b].sum())
        for i in (0, 1, 3)
        for value in [found["ssm_state", i]]
        for b in range(4)
    }
    size = sorted((abs(v) for v in groups.values()), reverse=True)
    assert max(groups, key=lambda g: abs(groups[g])) == (layer, block)
    assert size[0] > 20 * size[1]


# --- mistakes -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reduce": "layer"}, "none of 'position'"),
        ({"at": "both"}, "give 'corrupted' or 'clean'"),
        ({"qk_fix": True, "reduce": None}, "qk_fix has no channels"),
        ({"names_filter": "hook_embed", "reduce": "head"}, "nothing to attribute to"),
    ],
)
def test_options_that_are_none_are_refused(unchecked: None, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        attribute(model_of("griffin"), **options)


def test_other_mistakes_are_refused(unchecked: None):
    model = model_of("griffin")
    with pytest.raises(HookNameError):
        attribute(model, names_filter="hook_none")
    with pytest.raises(ValueError, match="position by position"):
        attribution_patching(model, CLEAN[:, 1:], CORRUPTED, metric, verbose=False)
    for bad, message in (
        (lambda y: y[:, -1], "the metric gave"),
        (lambda y: metric(y.detach()), "no gradient"),
    ):
        with pytest.raises(ValueError, match=message):
            attribution_patching(model, CLEAN, CORRUPTED, bad, verbose=False)
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_with_patching(model, CLEAN, CLEAN, metric, verbose=False)
    with pytest.raises(ValueError, match="reduce='head'"):
        attribute(model).head_scores()
    assert not model.list_hooks()


# --- the packaged models ------------------------------------------------------------------------


@cache
def needle_swap(name: str) -> tuple[HookedHybrid, Tensor, Tensor]:
    """A packaged model in float64, and a prompt with each of two needles, up to where they part."""
    model = HookedHybrid.from_pretrained(name, dtype=torch.float64)
    paper = build_prompt(model, PAPER, 90, 0.5)
    start, stop = paper.needle_spans[0]
    for seed in range(100):
        other = build_prompt(model, draw_needle(random.Random(seed), PAPER.city), 90, 0.5)
        if other.needle_spans == paper.needle_spans:
            break
    pair = torch.tensor([paper.tokens, other.tokens])
    parts = int((pair[0] != pair[1]).nonzero()[0])
    said = pair[:, start:parts]
    clean, corrupted = torch.cat([pair, said], dim=1)[:, None]
    assert start < parts < stop
    return model, clean, corrupted


@pytest.mark.parametrize("name", ["tiny-griffin", "tiny-jamba"])
def test_on_a_swapped_needle_attributions_rank_as_patches_do(name: str):
    """Measured with more cells: z 1.00, pattern 0.98, queries 0.3 and with the fix 0.9 or more.

    States rank at 0.8 (RG-LRU, whose largest attributions overshoot) and 0.99 (Mamba).
    """
    model, clean, corrupted = needle_swap(name)
    with torch.no_grad():
        ends = [int(model(tokens)[0, -1].argmax()) for tokens in (clean, corrupted)]
    assert ends[0] != ends[1]  # each needle is retrieved

    def answer(logits: Tensor) -> Tensor:
        return logits[:, -1, ends[0]] - logits[:, -1, ends[1]]

    leaves = ("attn.hook_z", "hook_ssm_state", "attn.hook_q")
    where: Any = lambda n: n.endswith(leaves)  # noqa: E731
    options: dict[str, Any] = {"names_filter": where, "n_cells": 12, "verbose": False}
    found = compare_with_patching(model, clean, corrupted, answer, qk_fix=True, **options)
    for kind, least in {"z": 0.95, "q": 0.8}.items():
        assert found[f"attn.{kind}"].spearman > least, kind
    assert found["mixer.ssm_state"].spearman > 0.5
    options["names_filter"] = lambda n: n.endswith("attn.hook_q")
    plain = compare_with_patching(model, clean, corrupted, answer, **options)
    assert plain["attn.q"].error > 2 * found["attn.q"].error
