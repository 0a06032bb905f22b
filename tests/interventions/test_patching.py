"""Patches and cut edges mean one thing, and the thing that a computation by hand gives."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions.patching import freeze, knock_out_edges, patch
from hooked_hybrid.network.plan import piece_length
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

N_POS = 23
LENGTHS = [N_POS, 9, 16]
CONFIGS = {"griffin": griffin_config("ARA", n_kv_heads=2), "jamba": jamba_config("AMA")}
models = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


@cache
def donor_of(name: str, n_rows: int = 3) -> Any:
    tokens = random_tokens(n_rows, N_POS, seed=5)
    return model_of(name).run_with_cache(tokens, names_filter=lambda n: "_input" not in n)[1]


def padded(rows: list[Tensor], side: str, n_pos: int = N_POS) -> tuple[Tensor, Tensor]:
    """Return rows with arbitrary tokens as padding on a side, and their mask."""
    ids = random_tokens(len(rows), n_pos, seed=9)
    mask = torch.zeros(len(rows), n_pos, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(n_pos - len(row), None) if side == "left" else slice(len(row))
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


def each_way(
    model: HookedHybrid, hooks: Any, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[str, Any]]:
    """Yield the logits of each row, from many ways to run the same three rows."""
    tokens = random_tokens(3, N_POS)

    def whole(**options: Any) -> Any:
        return model.run_with_hooks(fwd_hooks=hooks, **options)

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
                ids, mask = padded([tokens[i, :n] for i, n in enumerate(LENGTHS)], side)
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


def put(donor: Tensor, at: Any) -> Callable[..., Tensor]:
    """Return a hook for a single row, which puts a donor's value at an index."""

    def by_hand(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        value[at] = donor[at]
        return value

    return by_hand


# --- patch --------------------------------------------------------------------------------------

SHARED = [
    ("z", 2),
    ("pattern", 0),
    ("pattern", 2),
    ("attn_scores", 2),
    ("k", 2),
    ("v", 2),
    ("resid_mid", 1),
    ("mlp_out", 0),
    ("scale", 1, "ln1"),
    ("ssm_y", 1),
    "hook_embed",
]


@models
@pytest.mark.parametrize("point", SHARED, ids=str)
def test_a_patch_puts_the_donor_at_some_positions(
    name: str, point: Any, monkeypatch: pytest.MonkeyPatch
):
    model, donor = model_of(name), donor_of(name)
    full = next(n for n in donor if donor[n] is donor[point])
    at = [2, 3, 8, 15, 22]
    index: Any = (slice(None), slice(None), at) if "query" in axes(model, full) else (0, at)

    def alone(i: int) -> list[Any]:
        return [(full, put(donor[point][i, None], index))]

    hooks = patch(donor, point, positions=at)
    assert_rows_are(model, hooks, monkeypatch, alone)


def axes(model: HookedHybrid, name: str) -> tuple[str, ...]:
    return model.hook_dict[name].axes


@models
def test_a_patched_state_reaches_later_positions_and_keeps_the_fast_scan(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    model, donor = model_of(name), donor_of(name)
    full = "blocks.1.mixer.hook_ssm_state"
    calls: list[int] = []

    def alone(i: int) -> list[Any]:
        def by_hand(h: Tensor, hook: HookPoint) -> Tensor:
            t = int(hook.run.query_pos[0, 0])
            calls.append(t)
            return donor[full][i, None, t, None] if t in (3, 12) else h

        return [(full, by_hand)]

    hooks = patch(donor, ("ssm_state", 1), positions=[3, 12])
    assert_rows_are(model, hooks, monkeypatch, alone)
    assert len(calls) == 3 * N_POS
    seen: list[int] = []

    def counting(h: Tensor, hook: HookPoint) -> Tensor:
        seen.append(int(hook.run.query_pos[0, 0]))
        return fn(h, hook=hook)

    [(where, fn)] = hooks
    counting.positions = fn.positions  # type: ignore[attr-defined]
    model.run_with_hooks(random_tokens(3, N_POS), fwd_hooks=[(where, counting)])
    assert seen == [3, 12]


def test_a_patch_of_a_models_own_values_changes_nothing():
    for name in CONFIGS:
        model, tokens = model_of(name), random_tokens(3, N_POS, seed=5)
        donor = donor_of(name)
        hooks = freeze(donor, list(donor))
        assert len(hooks[0][0]) == len(donor) > 40
        out = model.run_with_hooks(tokens, fwd_hooks=hooks)
        assert relative(out, model(tokens)) < FP32_PARITY


@models
def test_a_patch_of_logits_or_of_every_last_residual_gives_the_donors_logits(name: str):
    model, donor = model_of(name), donor_of(name)
    for names in ("unembed.hook_logits", ("resid_post", -1), lambda n: n.endswith("resid_post")):
        out = model.run_with_hooks(random_tokens(3, N_POS), fwd_hooks=patch(donor, names))
        assert relative(out, model(random_tokens(3, N_POS, seed=5))) < FP32_PARITY


@models
@pytest.mark.parametrize("point", ["z", "pattern", "v"])
def test_a_patch_of_some_heads_and_rows(name: str, point: str, monkeypatch: pytest.MonkeyPatch):
    model, donor = model_of(name), donor_of(name)
    full = f"blocks.0.attn.hook_{point}"
    index: Any = (0, [1]) if point == "pattern" else (0, slice(None), [1])

    def alone(i: int) -> list[Any]:
        return [(full, put(donor[full][i, None], index))] if i != 1 else []

    hooks = patch(donor, (point, 0), heads=1, rows=[0, 2])
    assert_rows_are(model, hooks, monkeypatch, alone)


@models
def test_positions_of_each_row_and_a_donor_for_all_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    model, donor = model_of(name), donor_of(name, 1)
    at = [[4, 20], [0], []]
    mask = torch.zeros(3, N_POS, dtype=torch.bool)
    for i, positions in enumerate(at):
        mask[i, positions] = True
    for point in ("blocks.0.hook_resid_post", "blocks.1.mixer.hook_ssm_y"):
        hooks = patch(donor, point, positions=mask)
        assert hooks[0][1].positions == (0, 4, 20)  # type: ignore[attr-defined]

        def alone(i: int, point: str = point) -> list[Any]:
            return [(point, put(donor[point], (0, at[i])))]

        assert_rows_are(model, hooks, monkeypatch, alone)
    without_batch = {n: donor[n][0] for n in donor}
    single = type(donor)(without_batch, model, has_batch_dim=False)
    a, b = (patch(d, ("z", 2)) for d in (donor, single))
    tokens = random_tokens(3, N_POS)
    assert torch.equal(*(model.run_with_hooks(tokens, fwd_hooks=h) for h in (a, b)))


@models
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("point", ["resid_mid", "pattern", "attn_scores"])
def test_a_padded_donor_is_met_at_its_own_positions(
    name: str, side: str, point: str, monkeypatch: pytest.MonkeyPatch
):
    model = model_of(name)
    rows = [random_tokens(3, N_POS + 3, seed=5)[i, : n + i] for i, n in enumerate(LENGTHS)]
    ids, mask = padded(rows, side, N_POS + 3)
    full = f"blocks.0.hook_{point}" if point == "resid_mid" else f"blocks.0.attn.hook_{point}"
    _, donor = model.run_with_cache(ids, attention_mask=mask, names_filter=full)
    at = [1, 5, 8]

    def alone(i: int) -> list[Any]:
        _, single = model.run_with_cache(rows[i][None], names_filter=full)

        def by_hand(value: Tensor, hook: HookPoint) -> Tensor:
            value = value.clone()
            if point == "resid_mid":
                value[0, at] = single[full][0, at]
            else:  # a query sees no key after itself
                value[0, :, at, :9] = single[full][0, :, at, :9]
            return value

        return [(full, by_hand)]

    hooks = patch(donor, full, positions=at, attention_mask=mask)
    assert_rows_are(model, hooks, monkeypatch, alone)


@models
def test_frozen_patterns_stay_while_something_else_is_edited(
    name: str, monkeypatch: pytest.MonkeyPatch
):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    _, own = model.run_with_cache(tokens)
    edit = ("hook_embed", interventions.per_position(lambda x, hook: 1.5 * x + 0.2))
    is_pattern = lambda n: n.endswith("hook_pattern")  # noqa: E731
    hooks = [edit, *freeze(own, is_pattern)]

    def alone(i: int) -> list[Any]:
        def by_hand(p: Tensor, hook: HookPoint) -> Tensor:
            return own[str(hook.name)][i, None]

        return [edit, (is_pattern, by_hand)]

    assert_rows_are(model, hooks, monkeypatch, alone)
    with model.hooks(hooks):
        _, kept = model.run_with_cache(tokens)
    for layer in (0, 2):
        assert relative(kept["pattern", layer], own["pattern", layer]) < FP32_PARITY
        assert relative(kept["z", layer], own["z", layer]) > 1e-2


def test_chosen_experts_can_be_frozen():
    model, donor, tokens = model_of("jamba"), donor_of("jamba"), random_tokens(3, N_POS)
    with model.hooks(freeze(donor, ("expert_indices", 1))):
        _, kept = model.run_with_cache(tokens)
    assert torch.equal(kept["expert_indices", 1], donor["expert_indices", 1])


def test_patching_all_but_one_way_leaves_the_effect_through_it():
    """Path patching of two patches: one layer frozen, one patched, in either order."""
    model, tokens = model_of("griffin"), random_tokens(3, N_POS)
    _, own = model.run_with_cache(tokens)
    frozen = freeze(own, [("mixer_out", 1), ("mlp_out", 1)])
    patched = patch(donor_of("griffin"), ("z", 0))
    a = model.run_with_hooks(tokens, fwd_hooks=[*frozen, *patched])
    b = model.run_with_hooks(tokens, fwd_hooks=[*patched, *frozen])
    with model.hooks(patched):
        _, edited = model.run_with_cache(tokens, names_filter="blocks.0.hook_resid_post")
    direct = edited["resid_post", 0] + own["mixer_out", 1] + own["mlp_out", 1]
    expected = model(direct, start_at_layer=2)
    assert relative(a, expected) < FP32_PARITY and torch.equal(a, b)


@models
def test_a_generation_that_drops_rows_meets_each_rows_donor(name: str):
    model, tokens = model_of(name), random_tokens(3, 12)
    donor = donor_of(name)
    options: Any = {"max_new_tokens": 9, "return_type": "output", "verbose": False}

    def hooks(d: Any, i: int | None = None) -> list[Any]:
        mask = torch.zeros(3, N_POS, dtype=torch.bool)
        mask[0, 12:], mask[1, ::2], mask[2, 5:] = True, True, True
        rows = mask if i is None else mask[i, None]
        return [
            *patch(d, [("z", 0), ("resid_mid", 1)], positions=rows),
            *patch(d, ("pattern", 2), positions=rows),
            *knock_out_edges(rows, rows, layers=0),
        ]

    free = model.generate(tokens, fwd_hooks=hooks(donor), stop_at_eos=False, **options)
    end = int(free.new_tokens[0, 1])
    out = model.generate(tokens, fwd_hooks=hooks(donor), eos_token_id=end, **options)
    assert bool(out.finished[0]) and not bool(out.finished.all())
    for i in range(3):
        mine = hooks({n: t[i, None] for n, t in donor.items()}, i)
        single = model.generate(tokens[i, None], fwd_hooks=mine, eos_token_id=end, **options)
        n = single.new_tokens.shape[1]
        assert torch.equal(out.new_tokens[i, :n], single.new_tokens[0])
        assert relative(out.logprobs[i, :n], single.logprobs[0]) < FP32_PARITY


def test_a_generation_continues_from_a_frozen_prompt():
    model, tokens = model_of("griffin"), random_tokens(2, 12)
    _, donor = model.run_with_cache(random_tokens(2, 12, seed=5))
    hooks = freeze(donor, ("z", 0))
    options: Any = {"max_new_tokens": 3, "return_type": "tokens", "verbose": False}
    assert model.generate(tokens, prefill_hooks=hooks, **options).shape == (2, 15)
    with pytest.raises(ValueError, match="12 positions for row 0, none for position 12"):
        model.generate(tokens, fwd_hooks=hooks, stop_at_eos=False, **options)
    assert not model.list_hooks()


@models
def test_a_patch_and_top_heads_compose(name: str, monkeypatch: pytest.MonkeyPatch):
    model, donor = model_of(name), donor_of(name)
    top = interventions.keep_top_heads(2, ties="lowest")
    full = "blocks.0.attn.hook_pattern"

    def alone(i: int) -> list[Any]:
        return [(full, put(donor[full][i, None], slice(None))), *top]

    assert_rows_are(model, [*patch(donor, full), *top], monkeypatch, alone)


# --- edges --------------------------------------------------------------------------------------


def cut_by_hand(queries: Any, keys: Any, renormalise: bool = True, heads: Any = slice(None)) -> Any:
    """Return a hook on one row's whole pattern."""

    def by_hand(pattern: Tensor, hook: HookPoint) -> Tensor:
        kept = torch.ones_like(pattern)
        edges = torch.zeros(pattern.shape[2:], dtype=torch.bool)
        for q in range(N_POS) if queries is None else queries:
            edges[q, list(range(N_POS)) if keys is None else keys] = True
        kept[0, heads] = kept[0, heads].masked_fill(edges, 0)
        pattern = pattern * kept
        if renormalise:
            pattern = pattern / pattern.sum(-1, keepdim=True).clamp_min(1e-30)
        return pattern

    return by_hand


EDGES: list[Any] = [
    ([5, 12, 22], [0, 4, 10, 11, 21, 22]),
    (None, [0, 6, 7, 13]),
    (8, None),
    (range(10, 23), 9),
]


@models
@pytest.mark.parametrize("edges", EDGES, ids=str)
@pytest.mark.parametrize("renormalise", [True, False])
def test_cut_edges_equal_a_pattern_without_them(
    name: str, edges: Any, renormalise: bool, monkeypatch: pytest.MonkeyPatch
):
    model = model_of(name)
    queries, keys = ([e] if isinstance(e, int) else e for e in edges)
    by_hand = cut_by_hand(queries, keys, renormalise)
    hooks = knock_out_edges(*edges, renormalise=renormalise)
    is_pattern = lambda n: n.endswith("hook_pattern")  # noqa: E731
    assert_rows_are(model, hooks, monkeypatch, lambda i: [(is_pattern, by_hand)])


@models
def test_edges_of_some_layers_heads_and_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of(name)
    queries, keys = torch.zeros(2, 3, N_POS, dtype=torch.bool)
    at: list[Any] = [([6, 19], [0, 4, 14]), ([7], [6, 7]), ([], [])]
    for i, (q, k) in enumerate(at):
        queries[i, q], keys[i, k] = True, True
    hooks = knock_out_edges(queries, keys, layers=2, heads=[0, 3])

    def alone(i: int) -> list[Any]:
        return [("blocks.2.attn.hook_pattern", cut_by_hand(*at[i], heads=[0, 3]))]

    assert_rows_are(model, hooks, monkeypatch, alone)


@models
@pytest.mark.parametrize("renormalise", [True, False])
def test_a_query_without_keys_attends_to_nothing(name: str, renormalise: bool):
    model, tokens = model_of(name), random_tokens()
    with model.hooks(knock_out_edges(5, None, layers=0, renormalise=renormalise)):
        out, kept = model.run_with_cache(tokens)
    b_O = model.blocks[0].attn.b_O
    assert bool((kept["pattern", 0][:, :, 5] == 0).all())
    assert bool((kept["z", 0][:, 5] == 0).all())
    written = kept["mixer_out", 0][:, 5]
    assert torch.equal(written, torch.zeros_like(written) if b_O is None else b_O.expand(2, -1))
    assert bool(torch.isfinite(out).all())
    with model.hooks(knock_out_edges(5, None, layers=0, renormalise=renormalise)):
        _, kept = model.run_with_cache(tokens, incl_bwd=True)
    grads = [t for n, t in kept.items() if n.endswith("_grad")]
    assert all(bool(torch.isfinite(g).all()) for g in grads)


@models
def test_several_cuts_and_top_heads_compose(name: str, monkeypatch: pytest.MonkeyPatch):
    model = model_of(name)
    top = interventions.keep_top_heads(1, ties="lowest")
    hooks = [*knock_out_edges(9, 4), *top, *knock_out_edges(range(6, 20), [5, 6])]
    is_pattern = lambda n: n.endswith("hook_pattern")  # noqa: E731

    def alone(i: int) -> list[Any]:
        both = [cut_by_hand([9], [4]), cut_by_hand(range(6, 20), [5, 6])]
        return [*((is_pattern, hook) for hook in both), *top]

    assert_rows_are(model, hooks, monkeypatch, alone)


def test_cut_edges_in_generation_only_leave_the_prompt_alone():
    model, tokens = model_of("griffin"), random_tokens(2, 12)
    options: Any = {"max_new_tokens": 4, "return_type": "output", "verbose": False}
    out = model.generate(
        tokens,
        generation_hooks=knock_out_edges(None, range(7, 10)),
        names_filter=True,
        stop_at_eos=False,
        **options,
    )
    pattern = out.cache["pattern", 0]
    assert bool((pattern[:, :, 12:, 7:10] == 0).all())
    assert float(pattern[:, :, 9:12, 7:10].min()) > 0
    assert relative(pattern[:, :, 12:].sum(-1), torch.ones(2, 4, 3)) < FP32_PARITY


# --- errors -------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"names": ("zz", 0)}, HookNameError, "blocks.0.hook_zz"),
        ({"names": []}, HookNameError, "empty"),
        ({"names": lambda n: False}, HookNameError, "true of none"),
        ({"positions": []}, ValueError, "positions \\(\\): give one or more"),
        ({"positions": -1}, ValueError, "counted from 0"),
        ({"positions": True}, ValueError, "whole numbers"),
        ({"positions": 1.5}, ValueError, "whole numbers"),
        ({"positions": torch.ones(1, 2, 3).bool()}, ValueError, "\\[batch pos\\]"),
        ({"positions": torch.zeros(2, 4, dtype=torch.bool)}, ValueError, "one True"),
        ({"rows": [-2]}, ValueError, "rows"),
        ({"heads": "1"}, ValueError, "heads"),
        ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "zeros between tokens"),
    ],
)
def test_bad_arguments_of_patch_are_refused_at_once(options: Any, error: Any, message: str):
    with pytest.raises(error, match=message):
        patch(donor_of("griffin"), **{"names": ("z", 0), **options})


def test_gradients_in_a_cache_are_no_donors():
    model = model_of("griffin")
    _, donor = model.run_with_cache(random_tokens(), incl_bwd=True)
    [(names, _)] = patch(donor, lambda n: "hook_z" in n)
    assert names == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]


def cut(donor: Any, name: str, *index: Any) -> dict[str, Tensor]:
    return {name: donor[name][index]}


Z, PATTERN, RESID = "blocks.0.attn.hook_z", "blocks.0.attn.hook_pattern", "blocks.0.hook_resid_mid"
ALL = slice(None)


@pytest.mark.parametrize(
    ("index", "options", "message"),
    [
        ((Z, slice(2)), {}, "donor of 'blocks.0.attn.hook_z' has 2 entries, the batch has 3 rows"),
        ((Z, ALL, ALL, slice(3)), {}, "shape \\(3, 23, 3, 8\\).*may differ in batch and positions"),
        ((Z, 0), {}, "shape \\(23, 4, 8\\)"),
        ((Z, ALL, slice(9)), {}, "9 positions for row 0, none for position 9"),
        ((Z, ALL, slice(9)), {"positions": [3, 11]}, "9 positions for row 0, none for position 11"),
        ((PATTERN, ALL, ALL, slice(9)), {}, "9 queries and 23 keys"),
        ((PATTERN, ALL, slice(2)), {}, "may differ in batch"),
        ((Z,), {"heads": 4}, "heads \\(4,\\): layer 0 has 4"),
        ((RESID,), {"heads": 0}, "none of them heads"),
        ((Z,), {"rows": [1, 3]}, "rows \\(1, 3\\): the batch has 3 rows"),
        (
            (Z,),
            {"positions": torch.ones(2, 5, dtype=torch.bool)},
            "mask of positions has 2 entries, the batch has 3 rows",
        ),
        (
            (Z,),
            {"attention_mask": torch.ones(3, 9, dtype=torch.long)},
            "attention_mask has shape \\(3, 9\\).*3 rows of 23",
        ),
    ],
)
def test_a_donor_that_does_not_fit_is_refused_and_no_hook_is_left(
    index: Any, options: Any, message: str
):
    model, donor = model_of("griffin"), donor_of("griffin")
    hooks = patch(cut(donor, *index), index[0], **options)
    with pytest.raises(ValueError, match=message):
        model.run_with_hooks(random_tokens(3, N_POS), fwd_hooks=hooks)
    assert not model.list_hooks()


def test_a_donor_of_another_dtype_and_a_longer_padded_row_are_refused():
    model, donor = model_of("griffin"), donor_of("griffin")
    tokens = random_tokens(3, N_POS)
    with pytest.raises(ValueError, match="donor of .* torch.float64"):
        model.run_with_hooks(tokens, fwd_hooks=patch({Z: donor[Z].double()}, Z))
    mask = torch.ones(3, N_POS, dtype=torch.long)
    mask[1, :4] = 0
    with pytest.raises(ValueError, match="19 positions for row 1, none for position 19"):
        model.run_with_hooks(tokens, fwd_hooks=patch(dict(donor), Z, attention_mask=mask))


@pytest.mark.usefixtures("unchecked")
def test_edges_that_do_not_exist_are_refused():
    model, tokens = model_of("griffin"), random_tokens(3, N_POS)
    with pytest.raises(HookNameError, match="blocks.1.attn.hook_attn_scores"):
        model.run_with_hooks(tokens, fwd_hooks=knock_out_edges(3, 2, layers=[0, 1]))
    with pytest.raises(ValueError, match="heads \\(9,\\): layer 0 has 4"):
        model.run_with_hooks(tokens, fwd_hooks=knock_out_edges(3, 2, heads=9))
    for bad in ({"layers": []}, {"heads": [-1]}):
        with pytest.raises(ValueError, match="give one or more"):
            knock_out_edges(3, 2, **bad)
    with pytest.raises(ValueError, match="positions \\(-3,\\)"):
        knock_out_edges(3, -3)
    mask = torch.ones(4, 5, dtype=torch.bool)
    with pytest.raises(ValueError, match="4 entries, the batch has 3 rows"):
        model.run_with_hooks(tokens, fwd_hooks=knock_out_edges(mask, 0))
    assert not model.list_hooks()


def test_a_cache_of_some_positions_is_read_at_these_and_refused_at_others():
    model, tokens = random_model(griffin_config()), random_tokens(1, 12)
    name, run = "blocks.0.hook_resid_pre", partial(model.run_with_hooks, random_tokens(1, 12, 3))
    _, whole = model.run_with_cache(tokens)
    for kept, positions in (((7, None), [7, 9]), ((0, 5), 3)):
        _, some = model.run_with_cache(tokens, pos_slice=slice(*kept))
        got = run(fwd_hooks=patch(some, name, positions=positions))
        assert torch.equal(got, run(fwd_hooks=patch(whole, name, positions=positions)))
        with pytest.raises(ValueError, match="none for position 6"):
            run(fwd_hooks=patch(some, name, positions=6))


def test_rows_by_hand_as_many_as_the_columns_of_a_run_padded_on_the_left_are_refused():
    """A dict of a padded cache does not say that it is padded: read from 0, it would be shifted."""
    model, name = model_of("griffin"), "blocks.0.attn.hook_z"
    rows = [random_tokens(1, n, seed=n)[0] for n in LENGTHS]
    tokens, mask = padded(rows, "left")
    logits, cache = model.run_with_cache(tokens, attention_mask=mask, names_filter=name)
    by_hand = dict(cache)
    for hooks in (patch(by_hand, name), interventions.ablate_heads({0: [1]}, "resample", by_hand)):
        with pytest.raises(ValueError, match="by hand and has 23 positions.*attention_mask="):
            model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
    for hooks in (patch(cache, name), patch(by_hand, name, attention_mask=mask)):
        patched = model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=hooks)
        assert relative(patched[mask > 0], logits[mask > 0]) <= FP32_PARITY
    right, its_mask = padded(rows, "right")
    hooks = patch(by_hand, name, attention_mask=mask)
    model.run_with_hooks(right, attention_mask=its_mask, fwd_hooks=hooks)
    one = {name: cache.apply_slice_to_batch_dim([0])[name]}  # one row is of one length
    model.run_with_hooks(tokens, attention_mask=mask, fwd_hooks=patch(one, name))
