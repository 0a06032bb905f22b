"""Ablation means one thing, and the thing that a computation by hand gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions.ablation import (
    ablate_heads,
    ablate_layers,
    cut_heads,
    keep_heads,
    mean_over_tokens,
)
from hooked_hybrid.interventions.layers import layers_of
from hooked_hybrid.interventions.sets_of_heads import check_heads, masks_of_rows
from hooked_hybrid.network.plan import piece_length
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

N_POS = 23
LENGTHS = [N_POS, 9, 16]
CONFIGS = {"griffin": griffin_config("ARA"), "jamba": jamba_config("AMA")}
HEADS = {0: [1, 3], 2: [0]}
models = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


@cache
def donor_of(name: str) -> Any:
    return model_of(name).run_with_cache(random_tokens(3, N_POS, seed=5))[1]


def z_hook(edit: Callable[[Tensor, int], Tensor]) -> list[Any]:
    return [
        (lambda n: n.endswith("attn.hook_z"), lambda z, hook: edit(z.clone(), hook.layer())),
    ]


def each_way(model: HookedHybrid, hooks: Any, monkeypatch: Any) -> Iterator[tuple[str, Any]]:
    """Yield the logits of each row, from many ways to run the same three rows."""
    tokens = random_tokens(3, N_POS)
    rows = [tokens[i, :n] for i, n in enumerate(LENGTHS)]

    def whole(**options: Any) -> Tensor:
        return model.run_with_hooks(fwd_hooks=hooks, **options)

    def padded(side: str) -> tuple[Tensor, Tensor]:
        ids, mask = random_tokens(3, N_POS, seed=9), torch.zeros(3, N_POS, dtype=torch.long)
        for i, row in enumerate(rows):
            part = slice(N_POS - len(row), None) if side == "left" else slice(len(row))
            ids[i, part], mask[i, part] = row, 1
        return ids, mask

    def in_pieces(n_pos: int, points: Any) -> int:
        assert all(p.takes_pieces for p in points)
        return piece_length(n_pos, points, piece=4)

    yield "whole", whole(input=tokens)
    logits, state = [], None
    for part in tokens.split([5, 4, 11, 1, 1, 1], dim=1):
        out, state = whole(input=part, state=state, return_state=True)
        logits.append(out)
    yield "steps", torch.cat(logits, dim=1)
    for piece in (False, True):
        with monkeypatch.context() as patched, torch.no_grad():
            if piece:
                patched.setattr("hooked_hybrid.model.language_model.piece_length", in_pieces)
                yield "pieces", whole(input=tokens)
            for side in ("left", "right"):
                ids, mask = padded(side)
                out = whole(input=ids, attention_mask=mask)
                yield f"{side} {piece}", [out[i][mask[i] > 0] for i in range(3)]
    assert not model.list_hooks()


def assert_rows_are(
    model: HookedHybrid, hooks: Any, monkeypatch: Any, alone: Callable[[int], list[Any]]
) -> None:
    """Check `hooks`, in every way to run three rows, against each row's hooks by hand."""
    tokens = random_tokens(3, N_POS)
    expected = [model.run_with_hooks(tokens[i, None], fwd_hooks=alone(i))[0] for i in range(3)]
    plain = model(tokens)
    assert any(relative(plain[i], expected[i]) > 1e-2 for i in range(3))
    for way, logits in each_way(model, hooks, monkeypatch):
        for i in range(3):
            assert relative(logits[i], expected[i][: len(logits[i])]) < FP32_PARITY, (way, i)


# --- by hand ------------------------------------------------------------------------------------


@models
@pytest.mark.parametrize("keep", [False, True])
def test_cut_and_kept_heads_are_those_whose_output_weights_are_zero(
    name: str, keep: bool, monkeypatch: pytest.MonkeyPatch
):
    model, removed = model_of(name), random_model(CONFIGS[name])
    heads = {2: [0, 3]}
    for layer in (0, 2):
        cut = {h for h in range(4) if (h in heads.get(layer, ())) != keep}
        for h in cut:
            d = model.cfg.d_head
            removed.blocks[layer].attn.o.weight[:, h * d : (h + 1) * d] = 0
    factory = keep_heads if keep else cut_heads
    expected = removed(random_tokens(3, N_POS))
    for same in (heads, [(2, 3), (2, 0)], {2: torch.tensor([True, False, False, True])}):
        out = model.run_with_hooks(random_tokens(3, N_POS), fwd_hooks=factory(same))
        assert relative(out, expected) < FP32_PARITY
    for _, logits in each_way(model, factory(heads), monkeypatch):
        for i in range(3):
            assert relative(logits[i], expected[i][: len(logits[i])]) < FP32_PARITY


@models
def test_no_heads_cut_and_all_heads_kept_are_the_model_and_none_kept_is_no_attention(name: str):
    model, tokens = model_of(name), random_tokens()
    everything = {0: range(4), 2: range(4)}
    same = [cut_heads({}), cut_heads({0: []}), keep_heads(everything)]
    for hooks in same:
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=hooks), model(tokens))
    none = model.run_with_hooks(tokens, fwd_hooks=z_hook(lambda z, _: 0 * z))
    for hooks in (keep_heads({}), keep_heads({2: []}), cut_heads(everything)):
        assert relative(model.run_with_hooks(tokens, fwd_hooks=hooks), none) < FP32_PARITY
    assert relative(none, model(tokens)) > 1e-2


def with_heads(edit: Callable[[int, int], Tensor]) -> Callable[[Tensor, int], Tensor]:
    """Return a function that puts `edit(layer, head)` in place of the z of HEADS."""

    def edited(z: Tensor, layer: int) -> Tensor:
        for h in HEADS[layer]:
            z[:, :, h] = edit(layer, h)
        return z

    return edited


@models
@pytest.mark.parametrize("given", ["cache", "by layer", "means", "without batch"])
def test_mean_ablated_heads_write_their_mean(
    name: str, given: str, monkeypatch: pytest.MonkeyPatch
):
    model, donor = model_of(name), donor_of(name)
    if given == "without batch":
        _, donor = model.run_with_cache(random_tokens(1, N_POS, seed=5), remove_batch_dim=True)
    z = {layer: donor["z", layer].reshape(-1, 4, model.cfg.d_head) for layer in HEADS}
    mean = {layer: sum(z[layer].unbind(0)) / len(z[layer]) for layer in HEADS}
    values: Any = {
        "cache": donor,
        "without batch": donor,
        "by layer": {layer: donor["z", layer] for layer in HEADS},
        "means": mean,
    }[given]
    by_hand = z_hook(with_heads(lambda layer, h: mean[layer][h]))
    assert_rows_are(model, ablate_heads(HEADS, "mean", values), monkeypatch, lambda i: by_hand)


@models
def test_keeping_heads_by_means_ablates_the_others_so(name: str, monkeypatch: pytest.MonkeyPatch):
    model, donor = model_of(name), donor_of(name)

    def edit(z: Tensor, layer: int) -> Tensor:
        mean = donor["z", layer].mean(dim=(0, 1)).expand_as(z).clone()
        if layer == 0:
            mean[:, :, [1, 3]] = z[:, :, [1, 3]]
        return mean

    hooks = keep_heads({0: [1, 3]}, "mean", donor)
    assert_rows_are(model, hooks, monkeypatch, lambda i: z_hook(edit))


@models
def test_resampled_heads_write_what_they_wrote_elsewhere(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    model, donor = model_of(name), donor_of(name)

    def by_hand(i: int) -> list[Any]:
        return z_hook(with_heads(lambda layer, h: donor["z", layer][i, :, h]))

    assert_rows_are(model, ablate_heads(HEADS, "resample", donor), monkeypatch, by_hand)


@models
def test_a_seed_exchanges_every_row_with_another(name: str, monkeypatch: pytest.MonkeyPatch):
    model, donor = model_of(name), donor_of(name)
    hooks = ablate_heads(HEADS, "resample", donor, seed=0)
    with model.hooks(hooks):
        _, kept = model.run_with_cache(random_tokens(3, N_POS))
    first = donor["z", 0][:, :, 1]
    source = [
        next(j for j in range(3) if torch.equal(kept["z", 0][i, :, 1], first[j])) for i in range(3)
    ]
    assert sorted(source) == [0, 1, 2] and all(i != j for i, j in enumerate(source))

    def by_hand(i: int) -> list[Any]:
        return z_hook(with_heads(lambda layer, h: donor["z", layer][source[i], :, h]))

    assert_rows_are(model, hooks, monkeypatch, by_hand)
    cycles = {str(_source_of(donor, model, seed)) for seed in range(8)}
    assert cycles == {"[1, 2, 0]", "[2, 0, 1]"}


def _source_of(donor: Any, model: HookedHybrid, seed: int) -> list[int]:
    with model.hooks(ablate_heads({0: [1]}, "resample", donor, seed=seed)):
        _, kept = model.run_with_cache(random_tokens(3, N_POS), names_filter="blocks.0.attn.hook_z")
    same = (kept["z", 0][:, None, :, 1] == donor["z", 0][None, :, :, 1]).flatten(2).all(-1)
    return same.int().argmax(1).tolist()


@models
def test_padding_of_the_reference_run_is_left_out(name: str):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    mask = torch.ones(2, N_POS, dtype=torch.long)
    mask[0, :6], mask[1, -5:] = 0, 0
    donor_tokens = random_tokens(2, N_POS, seed=6)
    _, padded = model.run_with_cache(donor_tokens, attention_mask=mask)
    rows = [model.run_with_cache(donor_tokens[i, mask[i] > 0][None])[1] for i in range(2)]
    means = {i: torch.cat([row["z", i][0] for row in rows]).mean(0) for i in (0, 2)}
    a = ablate_heads(HEADS, "mean", padded, attention_mask=mask)
    b = ablate_heads(HEADS, "mean", means)
    a, b = (model.run_with_hooks(tokens, fwd_hooks=hooks) for hooks in (a, b))
    assert relative(a, b) < FP32_PARITY

    short = tokens[:2, :15]
    by_mask = ablate_heads(HEADS, "resample", padded, attention_mask=mask)
    out = model.run_with_hooks(short, fwd_hooks=by_mask)
    for i in range(2):
        alone = ablate_heads(HEADS, "resample", rows[i])
        expected = model.run_with_hooks(short[i, None], fwd_hooks=alone)
        assert relative(out[i, None], expected) < FP32_PARITY
    exchanged = ablate_heads(HEADS, "resample", padded, seed=1, attention_mask=mask)
    out = model.run_with_hooks(short, fwd_hooks=exchanged)
    for i in range(2):
        alone = ablate_heads(HEADS, "resample", rows[1 - i])
        expected = model.run_with_hooks(short[i, None], fwd_hooks=alone)
        assert relative(out[i, None], expected) < FP32_PARITY


@models
def test_norm_ablation_keeps_the_norm_of_what_all_heads_write(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    model = model_of(name)

    def edit(z: Tensor, layer: int) -> Tensor:
        W_O = model.blocks[layer].attn.W_O
        before = torch.einsum("bshe,hed->bsd", z, W_O).square().sum(-1).sqrt()
        z[:, :, HEADS[layer]] = 0
        after = torch.einsum("bshe,hed->bsd", z, W_O).square().sum(-1).sqrt()
        return z * (before / after)[..., None, None]

    hooks = ablate_heads(HEADS, "norm")
    assert_rows_are(model, hooks, monkeypatch, lambda i: z_hook(edit))
    out, z = "blocks.0.hook_mixer_out", "blocks.0.attn.hook_z"
    tokens, b_O = random_tokens(), model.blocks[0].attn.b_O
    b_O = 0 if b_O is None else b_O
    with model.hooks(hooks):
        _, kept = model.run_with_cache(tokens, names_filter=[out, z])
    _, plain = model.run_with_cache(tokens, names_filter=[out, z])
    norms = [(c[out] - b_O).norm(dim=-1) for c in (kept, plain)]
    assert relative(*norms) < FP32_PARITY
    assert relative(kept[out], plain[out]) > 1e-2
    nothing_left = model.run_with_hooks(tokens, fwd_hooks=ablate_heads({0: range(4)}, "norm"))
    cut = model.run_with_hooks(tokens, fwd_hooks=cut_heads({0: range(4)}))
    assert relative(nothing_left, cut) < FP32_PARITY


@models
@pytest.mark.parametrize("kind", ["mixer", "mlp"])
@pytest.mark.parametrize("method", ["zero", "mean"])
def test_ablated_layers_write_zero_or_their_mean(
    name: str, kind: str, method: str, monkeypatch: pytest.MonkeyPatch
):
    model, donor = model_of(name), donor_of(name)
    layers, values = [0, 1], donor if method == "mean" else None

    def by_hand(out: Tensor, hook: HookPoint) -> Tensor:
        if method == "zero":
            return torch.zeros_like(out)
        return donor[f"{kind}_out", hook.layer()].flatten(0, 1).mean(0).expand_as(out)

    hooks = ablate_layers(layers, kind, method, values)
    plain_hooks = [([f"blocks.{i}.hook_{kind}_out" for i in layers], by_hand)]
    assert_rows_are(model, hooks, monkeypatch, lambda i: plain_hooks)


@models
def test_means_and_kinds_of_layers(name: str):
    cfg = CONFIGS[name]
    assert layers_of(cfg, "attention") == cfg.attention_layers == (0, 2)
    recurrence, absent = ("rglru", "mamba") if name == "griffin" else ("mamba", "rglru")
    assert layers_of(cfg, recurrence) == cfg.recurrent_layers == (1,)
    assert layers_of(cfg, absent) == ()
    model, tokens = model_of(name), random_tokens()
    means = {0: torch.linspace(-1, 1, 24)}
    for values in (means, {"blocks.0.hook_mixer_out": means[0]}):
        with model.hooks(ablate_layers(0, "mixer", "mean", values)):
            _, kept = model.run_with_cache(tokens)
        assert torch.equal(kept["mixer_out", 0], means[0].expand(2, 20, 24))


# --- rows ---------------------------------------------------------------------------------------

ROWS: list[Any] = [{0: [1], 2: [0, 2]}, {}, [(2, 3)]]


@models
@pytest.mark.parametrize("method", ["zero", "mean", "resample", "norm"])
def test_heads_of_each_row_equal_single_runs(
    name: str, method: Any, monkeypatch: pytest.MonkeyPatch
):
    model, masks = model_of(name), masks_of_rows(CONFIGS[name], ROWS)
    assert masks[0].tolist() == [[False, True, False, False], [False] * 4, [False] * 4]
    values = donor_of(name) if method in ("mean", "resample") else None

    def alone(i: int) -> list[Any]:
        mine = values
        if method == "resample":
            mine = {n: t[i, None] for n, t in values.items()}
        return ablate_heads(ROWS[i], method, mine)

    assert_rows_are(model, ablate_heads(masks, method, values), monkeypatch, alone)
    if method == "zero":
        kept = keep_heads(masks)
        assert_rows_are(model, kept, monkeypatch, lambda i: keep_heads(ROWS[i]))


@models
@pytest.mark.parametrize("method", ["zero", "resample", "norm"])
def test_rows_keep_their_heads_when_generation_drops_others(name: str, method: Any):
    model, tokens = model_of(name), random_tokens(3, 12)
    masks = masks_of_rows(CONFIGS[name], ROWS)
    values = donor_of(name) if method == "resample" else None
    options: Any = {"max_new_tokens": 8, "return_type": "output", "verbose": False}
    hooks = ablate_heads(masks, method, values)
    free = model.generate(tokens, fwd_hooks=hooks, stop_at_eos=False, **options)
    end = int(free.new_tokens[0, 1])
    out = model.generate(tokens, fwd_hooks=hooks, eos_token_id=end, **options)
    assert bool(out.finished[0]) and not bool(out.finished.all())
    for i in range(3):
        mine = None if values is None else {n: t[i, None] for n, t in values.items()}
        alone = ablate_heads(ROWS[i], method, mine)
        single = model.generate(tokens[i, None], fwd_hooks=alone, eos_token_id=end, **options)
        n = single.new_tokens.shape[1]
        assert torch.equal(out.new_tokens[i, :n], single.new_tokens[0])
        assert relative(out.logprobs[i, :n], single.logprobs[0]) < FP32_PARITY


# --- with others --------------------------------------------------------------------------------


@models
def test_cut_heads_and_top_heads_compose_either_way(name: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of(name)
    top, cut = interventions.keep_top_heads(2, ties="lowest"), cut_heads(HEADS)
    keep = {}

    def choose(pattern: Tensor, hook: HookPoint) -> None:
        peaked = torch.special.xlogy(pattern + 1e-12, pattern + 1e-12).sum(-1)
        order = peaked.argsort(dim=1, descending=True, stable=True)[:, :2]
        keep[hook.layer()] = torch.zeros_like(peaked).scatter(1, order, 1).transpose(1, 2)

    def edit(z: Tensor, layer: int) -> Tensor:
        z = z * keep[layer][..., None]
        z[:, :, HEADS[layer]] = 0
        return z

    by_hand = [(lambda n: n.endswith("hook_pattern"), choose), *z_hook(edit)]
    assert_rows_are(model, [*top, *cut], monkeypatch, lambda i: by_hand)
    assert_rows_are(model, [*cut, *top], monkeypatch, lambda i: by_hand)


def test_hooks_act_in_the_stage_they_are_given_for():
    model, tokens = model_of("griffin"), random_tokens(2, 12)
    options: Any = {"max_new_tokens": 4, "return_type": "output", "verbose": False}
    options |= {"stop_at_eos": False, "names_filter": True}
    for stage, is_cut in (("prefill", slice(0, 12)), ("generation", slice(12, None))):
        out = model.generate(tokens, **{f"{stage}_hooks": cut_heads({0: [1]})}, **options)
        z = out.cache["z", 0][:, :, 1].abs().amax(-1)
        assert bool((z[:, is_cut] == 0).all())
        assert int((z == 0).sum()) == z[:, is_cut].numel() > 0


def test_gradients_pass_what_is_left_and_not_what_is_cut():
    model, tokens = model_of("griffin"), random_tokens()
    for method in ("zero", "norm"):
        with model.hooks(ablate_heads({2: [1]}, method)):
            _, kept = model.run_with_cache(tokens, incl_bwd=True)
        grad = kept["blocks.2.attn.hook_v_grad"]
        assert bool(torch.isfinite(grad).all()) and float(grad.abs().max()) > 0
    with model.hooks(cut_heads({2: range(4)})):
        _, kept = model.run_with_cache(tokens, incl_bwd=True)
    assert bool((kept["blocks.2.attn.hook_v_grad"] == 0).all())


def test_bfloat16_models_take_means_and_norms_of_their_own_dtype():
    model, tokens = random_model(CONFIGS["griffin"], dtype=torch.bfloat16), random_tokens(3, 8)
    _, donor = model.run_with_cache(tokens)
    for hooks in (
        ablate_heads(HEADS, "mean", donor),
        ablate_heads(HEADS, "mean", {i: torch.zeros(4, 8) for i in HEADS}),
        ablate_heads(HEADS, "resample", donor, seed=0),
        ablate_heads(HEADS, "norm"),
        ablate_layers(0, "mlp", "mean", donor),
    ):
        assert model.run_with_hooks(tokens, fwd_hooks=hooks).dtype == torch.bfloat16


# --- errors -------------------------------------------------------------------------------------

Z = torch.zeros(3, N_POS, 4, 8)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("factory", "arguments", "message"),
    [
        (cut_heads, [{0: [-1]}], "heads of layer 0 \\(-1,\\): give one or more whole"),
        (cut_heads, [{0: [True, False]}], "whole numbers"),
        (cut_heads, [{0: [0.5]}], "whole numbers"),
        (keep_heads, [{-1: [0]}], "layer \\(-1,\\)"),
        (cut_heads, [[(1, 2, 3)]], "pairs \\(layer, head\\)"),
        (cut_heads, [{0: torch.ones(1, 1, 4, dtype=torch.bool)}], "is \\[batch head\\]"),
        (ablate_heads, [HEADS, "median"], "method='median'"),
        (ablate_heads, [HEADS, "mean"], "needs values"),
        (keep_heads, [HEADS, "resample"], "needs values"),
        (ablate_heads, [HEADS, "norm", {0: Z}], "takes no values"),
        (ablate_heads, [HEADS, "mean", {0: Z}], "nothing for layer 2"),
        (ablate_layers, [[], "mixer"], "one or more"),
        (ablate_layers, [-1], "counted from 0"),
        (ablate_layers, [0, "attention"], "kind='attention'"),
        (ablate_layers, [0, "mixer", "norm"], "method='norm'"),
        (ablate_layers, [0, "mixer", "mean"], "needs values"),
        (ablate_layers, [0, "mixer", "mean", {0: Z[0, 0]}], "3 axes"),
        (layers_of, [CONFIGS["griffin"], "ssm"], "attention, rglru, mamba"),
        (masks_of_rows, [CONFIGS["griffin"], []], "for each row"),
        (
            masks_of_rows,
            [CONFIGS["griffin"], [{0: torch.ones(2, 4, dtype=torch.bool)}]],
            "for each row",
        ),
        (mean_over_tokens, [Z, torch.ones(3, 4)], "attention_mask has shape"),
    ],
)
def test_bad_arguments_are_refused_at_once(factory: Any, arguments: list[Any], message: str):
    with pytest.raises(ValueError, match=message):
        factory(*arguments)


def test_arguments_of_another_method_are_refused():
    for options in ({"seed": 1}, {"attention_mask": torch.ones(3, N_POS, dtype=torch.long)}):
        with pytest.raises(ValueError, match="method='zero' takes no"):
            ablate_heads(HEADS, **options)


def masks(n_rows: int, n_heads: int = 4) -> dict[int, Tensor]:
    return {0: torch.ones(n_rows, n_heads, dtype=torch.bool)}


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (cut_heads({0: [4]}), "head 4: layer 0 has 4 heads"),
        (keep_heads({2: [1, 7]}), "head 7: layer 2 has 4 heads"),
        (cut_heads(masks(3, 5)), "the mask of layer 0 is of 5 heads; it has 4"),
        (cut_heads(masks(2)), "the mask of layer 0 has 2 entries, the batch has 3 rows"),
        (cut_heads(masks(4)), "the mask of layer 0 has 4 entries, the batch has 3 rows"),
        (ablate_heads({0: [1]}, "mean", {0: Z[0, 0, :3]}), "has shape \\(3, 8\\), not \\(4, 8\\)"),
        (ablate_heads({0: [1]}, "mean", {0: Z[0]}), "\\(23, 4, 8\\): give"),
        (ablate_heads({0: [1]}, "resample", {0: Z[:2]}), "has 2 entries, the batch has 3"),
        (ablate_heads({0: [1]}, "resample", {0: Z[:, :9]}), "9 positions for row 0, none for.* 9"),
        (ablate_heads({0: [1]}, "resample", {0: Z[:, :, :3]}), "differ in batch and positions"),
        (ablate_heads({0: [1]}, "resample", {0: Z[:1]}, seed=0), "one row cannot"),
        (keep_heads({0: [1]}, "mean", {0: Z}), "nothing for layer 2"),
        (ablate_layers(0, "mixer", "mean", {0: torch.zeros(23)}), "has shape \\(23,\\)"),
    ],
)
def test_what_does_not_fit_the_model_or_batch_is_named_and_no_hook_is_left(
    hooks: Any, message: str
):
    model = model_of("griffin")
    with pytest.raises(ValueError, match=message):
        model.run_with_hooks(random_tokens(3, N_POS), fwd_hooks=hooks)
    assert not model.list_hooks()


def test_layers_without_heads_are_refused_by_name():
    model, cfg = model_of("griffin"), CONFIGS["griffin"]
    for hooks in (cut_heads({1: [0]}), keep_heads({1: [0]}), ablate_heads({1: [0]}, "norm")):
        with pytest.raises(HookNameError, match="blocks.1.attn.hook_.*nearest are blocks"):
            model.run_with_hooks(random_tokens(), fwd_hooks=hooks)
    check_heads(cfg, {0: range(4), 2: []})
    has = "heads are in layers 0 \\(4 heads\\), 2 \\(4 heads\\)"
    bad: list[Any] = [{1: [0]}, [(3, 0)], {2: [4]}, masks(2, 3)]
    for heads in bad:
        with pytest.raises(ValueError, match=has):
            check_heads(cfg, heads)
    with pytest.raises(ValueError, match="no layer has"):
        check_heads(griffin_config("RR"), {1: [0]})
