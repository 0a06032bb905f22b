"""Edits of recurrences mean one thing however a sequence is cut, and cut edges are exact."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.analysis.implicit_attention import effective_attention
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions.patching import freeze, patch
from hooked_hybrid.interventions.recurrence import (
    edit_state,
    freeze_state,
    knock_out_state_edges,
)
from hooked_hybrid.interventions.where import on_rows
from hooked_hybrid.network.plan import piece_length
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import BF16, FINITE_DIFFERENCE, FP32_PARITY

N_POS = 23
LENGTHS = [N_POS, 9, 16]
CONFIGS = {"griffin": griffin_config("RAR"), "jamba": jamba_config("MAM")}
READS = {"griffin": "conv", "jamba": "ssm_input"}
models = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


def padded(rows: list[Tensor], side: str) -> tuple[Tensor, Tensor]:
    ids = random_tokens(len(rows), N_POS, seed=9)
    mask = torch.zeros(len(rows), N_POS, dtype=torch.long)
    for i, row in enumerate(rows):
        part = slice(N_POS - len(row), None) if side == "left" else slice(len(row))
        ids[i, part], mask[i, part] = row, 1
    return ids, mask


def each_way(
    model: HookedHybrid, hooks: Any, monkeypatch: pytest.MonkeyPatch, packs: bool
) -> Iterator[tuple[str, Any]]:
    """Yield the logits of each row, from many ways to run the same three rows with these hooks."""
    tokens = random_tokens(3, N_POS)

    def whole(**options: Any) -> Any:
        return model.run_with_hooks(fwd_hooks=hooks, **options)

    def in_pieces(n_pos: int, points: Any) -> int:
        assert all(p.takes_pieces for p in points)
        return piece_length(n_pos, points, piece=4)

    yield "whole", whole(input=tokens)
    logits, state = [], None
    for part in tokens.split([5, 4, 12, 1, 1], dim=1):
        out, state = whole(input=part, state=state, return_state=True)
        logits.append(out)
    yield "steps", torch.cat(logits, dim=1)
    for side in ("left", "right"):
        ids, mask = padded([tokens[i, :n] for i, n in enumerate(LENGTHS)], side)
        with monkeypatch.context() as patched, torch.no_grad():
            patched.setattr("hooked_hybrid.model.language_model.piece_length", in_pieces)
            out = whole(input=ids, attention_mask=mask)
            yield f"{side} in pieces", [out[i][mask[i] > 0] for i in range(3)]
    out = whole(input=ids, attention_mask=mask)
    yield "padded", [out[i][mask[i] > 0] for i in range(3)]
    if packs:
        ids = torch.tensor([LENGTHS[0] * [1] + LENGTHS[1] * [2] + LENGTHS[2] * [3]])
        packed = torch.cat([tokens[i, :n] for i, n in enumerate(LENGTHS)])[None]
        yield "packed", whole(input=packed, segment_ids=ids)[0].split(LENGTHS)
    assert not model.list_hooks()


def assert_rows_are(
    model: HookedHybrid, hooks: Any, monkeypatch: Any, expected: Any, packs: bool = True
) -> None:
    """Check `hooks`, in every way to run three rows, against the logits of each row by hand."""
    plain = model(random_tokens(3, N_POS))
    assert any(relative(plain[i], expected[i]) > 1e-3 for i in range(3))
    for way, logits in each_way(model, hooks, monkeypatch, packs):
        for i in range(3):
            assert relative(logits[i], expected[i][: len(logits[i])]) < FP32_PARITY, (way, i)


def without_edges(
    model: HookedHybrid, name: str, tokens: Tensor, edges: Tensor, layers: list[int], channels: Any
) -> Tensor:
    """Return logits with entries of the effective attention of some layers set to 0 in turn.

    Args:
        edges: True where an entry is cut [query key].
    """
    hooks: list[Any] = []
    for layer in layers:
        with model.hooks(hooks):
            _, kept = model.run_with_cache(tokens)
        # The last layer's output alone is edited, so that its cache agrees with itself.
        matrix = effective_attention(kept, layer)
        chosen = torch.zeros(matrix.shape[1], dtype=torch.bool)
        chosen[channels] = True
        cut = matrix * edges * chosen[:, None, None]
        lost = torch.einsum("bcqk,bkc->bqc", cut, kept[READS[name], layer])
        hooks.append((f"blocks.{layer}.mixer.hook_ssm_y", lambda y, hook, lost=lost: y - lost))
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


def grid(queries: Any, keys: Any) -> Tensor:
    edges = torch.zeros(N_POS, N_POS, dtype=torch.bool)
    every = list(range(N_POS))
    for q in every if queries is None else [queries] if isinstance(queries, int) else queries:
        edges[q, every if keys is None else keys] = True
    return edges


# --- edges ----------------------------------------------------------------------------------------

EDGES: list[Any] = [
    ([5, 12, 22], [0, 4, 10, 11, 12]),
    (None, [0, 6, 13]),
    (8, None),
]


@models
@pytest.mark.parametrize("edges", EDGES, ids=str)
def test_cut_edges_equal_an_effective_attention_without_them(
    name: str, edges: Any, monkeypatch: pytest.MonkeyPatch
):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    layers = list(model.cfg.recurrent_layers)
    expected = without_edges(model, name, tokens, grid(*edges), layers, slice(None))
    assert_rows_are(model, knock_out_state_edges(*edges), monkeypatch, expected)


@models
def test_edges_of_some_layers_channels_and_rows(name: str, monkeypatch: pytest.MonkeyPatch):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    queries, keys = torch.zeros(2, 3, N_POS, dtype=torch.bool)
    at: list[Any] = [([6, 19], [0, 4, 14]), ([7], [6, 7]), ([], [])]
    for i, (q, k) in enumerate(at):
        queries[i, q], keys[i, k] = True, True
    layer, channels = model.cfg.recurrent_layers[-1], [0, 3, 17]
    expected = [
        without_edges(model, name, tokens[i, None], grid(*at[i]), [layer], channels)[0]
        for i in range(3)
    ]
    hooks = knock_out_state_edges(queries, keys, layers=layer, channels=channels)
    assert_rows_are(model, hooks, monkeypatch, expected, packs=False)


@models
def test_nothing_else_of_the_layer_changes(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    outputs, found = model.run_with_cache(tokens)
    caches, states = [], []
    for queries in ([7, 15], [N_POS]):  # the second cuts nothing
        with model.hooks(knock_out_state_edges(queries, range(3, 8), layers=0, channels=range(9))):
            (out, state), kept = model.run_with_cache(tokens, return_state=True)
        caches.append(kept)
        states.append(state.blocks[0])
    assert relative(out, outputs) < FP32_PARITY
    cut, same = caches
    for full in same:
        if full.startswith("blocks.0.mixer.") and not full.endswith(("ssm_y", "gated")):
            assert torch.equal(cut[full], same[full]), full
            assert relative(same[full], found[full]) < FP32_PARITY
    assert torch.equal(states[0].ssm, states[1].ssm) and torch.equal(states[0].conv, states[1].conv)
    changed = cut["ssm_y", 0] != same["ssm_y", 0]
    expected = torch.zeros_like(changed)
    expected[:, [7, 15], :9] = True
    assert not bool((changed & ~expected).any()) and bool(changed[:, 7, :9].all())


@models
def test_an_output_without_any_edge_is_zero(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    _, plain = model.run_with_cache(tokens)
    with model.hooks(knock_out_state_edges(None, None, layers=0)):
        _, kept = model.run_with_cache(tokens)
    assert float(kept["ssm_y", 0].abs().max()) < FP32_PARITY * float(plain["ssm_y", 0].abs().max())


@models
def test_edited_decays_are_those_that_carry(name: str):
    """Hooks on decays and writes that come first are part of the recurrence whose edges are cut."""
    model, tokens = model_of(name), random_tokens(2, N_POS)
    leaf = "log_decay" if name == "griffin" else "ssm_dt"
    edit = (lambda n: n.endswith(leaf), lambda a, hook: 0.5 * a)
    with model.hooks([edit]):
        expected = without_edges(model, name, tokens, grid([20], [4]), [0], slice(None))
        cut = knock_out_state_edges(20, 4, layers=0)
        assert relative(model.run_with_hooks(tokens, fwd_hooks=cut), expected) < FP32_PARITY
    if name == "griffin":
        with pytest.raises(ValueError, match="after hooks that edit decays"):
            model.run_with_hooks(tokens, fwd_hooks=[*cut, edit])
    assert not model.list_hooks()


@models
def test_the_convolution_spreads_what_a_token_writes(name: str):
    """With gates held, a token is out of reach when the positions it is convolved into are cut."""
    model, tokens = model_of(name), random_tokens(2, N_POS)
    leaves = ["input_gate", "log_decay"] if name == "griffin" else ["ssm_dt", "ssm_B", "ssm_C"]
    _, plain = model.run_with_cache(tokens)
    held = freeze(plain, [(leaf, 0) for leaf in leaves])

    def move(x: Tensor, hook: HookPoint) -> Tensor:
        x = x.clone()
        x[:, 6] += 1.0
        return x

    def change(keys: Any) -> float:
        cut = [*held, *knock_out_state_edges(range(10, N_POS), keys, layers=0)]
        both = []
        for hooks in (cut, [*cut, ("blocks.0.mixer.hook_in_proj", move)]):
            with model.hooks(hooks):
                _, kept = model.run_with_cache(tokens, names_filter="blocks.0.mixer.hook_ssm_y")
            both.append(kept["ssm_y", 0][:, 10:])
        return relative(both[1], both[0])

    d_conv = model.cfg.layers[0].mixer.d_conv
    assert change(range(6, 6 + d_conv)) < FP32_PARITY < 1e-3 < change([6])


@models
def test_generation_cuts_as_one_forward_does(name: str):
    model, tokens = model_of(name), random_tokens(3, 12)
    mask = torch.ones_like(tokens)
    mask[1, :5] = 0
    hooks = knock_out_state_edges(None, [2, 3, 13])
    options: Any = {"max_new_tokens": 9, "return_type": "output", "verbose": False}
    free = model.generate(
        tokens, attention_mask=mask, fwd_hooks=hooks, stop_at_eos=False, **options
    )
    whole = torch.cat([mask, mask.new_ones(3, 9)], dim=1)
    logits = model.run_with_hooks(free.tokens, fwd_hooks=hooks, attention_mask=whole)
    assert torch.equal(logits[:, 11:-1].argmax(-1), free.new_tokens)
    expected = logits[:, 11:-1].log_softmax(-1).amax(-1)
    assert relative(free.logprobs, expected) < FP32_PARITY
    end = int(free.new_tokens[0, 1])
    out = model.generate(tokens, attention_mask=mask, fwd_hooks=hooks, eos_token_id=end, **options)
    assert bool(out.finished[0])
    for i in range(3):
        n = min(9, 1 + int((free.new_tokens[i] != end).cumprod(0).sum()))
        assert torch.equal(out.new_tokens[i, :n], free.new_tokens[i, :n])
        assert relative(out.logprobs[i, :n], free.logprobs[i, :n]) < FP32_PARITY


@models
def test_a_state_that_was_not_followed_is_refused(name: str):
    model, tokens = model_of(name), random_tokens(2, 12)
    options: Any = {"max_new_tokens": 3, "verbose": False, "stop_at_eos": False}
    late = knock_out_state_edges(None, [2])
    with pytest.raises(ValueError, match="row 0 goes on at position 12 .* did not follow"):
        model.generate(tokens, generation_hooks=late, **options)
    model.generate(tokens, generation_hooks=knock_out_state_edges(None, [12, 13]), **options)
    states = [model(random_tokens(2, 12, seed=i), return_state=True)[1] for i in range(2)]
    hooks = knock_out_state_edges(None, [2])
    _, followed = model.run_with_hooks(tokens, fwd_hooks=hooks, return_state=True)
    with pytest.raises(ValueError, match="one run at a time"):  # another state of this length
        model.run_with_hooks(tokens[:, :2], fwd_hooks=hooks, state=states[1])
    model.run_with_hooks(tokens[:, :2], fwd_hooks=hooks, state=followed)
    with pytest.raises(ValueError, match="did not follow"):  # gone past it meanwhile
        model.run_with_hooks(tokens[:, :2], fwd_hooks=hooks, state=followed)
    masked = torch.zeros(2, 14, dtype=torch.bool)
    masked[0, 12:], masked[1, 3] = True, True
    with pytest.raises(ValueError, match="row 1 goes on at position 12"):
        model.run_with_hooks(
            tokens[:, :2], fwd_hooks=knock_out_state_edges(None, masked), state=followed
        )


@models
def test_what_would_cut_wrongly_is_refused(name: str):
    model, tokens = model_of(name), random_tokens(2, 12)

    def run(*hooks: Any) -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=hooks)

    cut = knock_out_state_edges([9, 10], [2, 4], layers=0)
    halve: Callable[..., Tensor] = lambda x, hook: 0.5 * x  # noqa: E731
    state_edit = edit_state(halve, 5, layers=0)
    for hooks in ([*cut, *state_edit], [*state_edit, *cut]):
        with pytest.raises(ValueError, match="hook_ssm_state is edited"):
            run(*hooks)
    with pytest.raises(ValueError, match="before other hooks edit it"):
        run(("blocks.0.mixer.hook_ssm_y", halve), *cut)
    with pytest.raises(ValueError, match="rows are chosen by masks"):
        run(*((where, on_rows(fn, 0)) for where, fn in cut[1:]))
    with pytest.raises(ValueError, match="both cut the edge from query 9 to key 4"):
        run(*cut, *knock_out_state_edges(9, [4, 5], layers=0))
    twice = run(*cut, *knock_out_state_edges([9, 10], [5, 10], layers=0))
    assert (
        relative(twice, run(*knock_out_state_edges([9, 10], [2, 4, 5, 10], layers=0))) < FP32_PARITY
    )


@models
def test_the_gradient_is_that_of_what_is_computed(name: str):
    model, tokens = random_model(CONFIGS[name], dtype=torch.float64), random_tokens(1, N_POS)
    hooks = knock_out_state_edges([9, 22], [3, 9, 15])
    with torch.no_grad():
        embedded = model.run_with_cache(tokens, names_filter="hook_embed")[1]["embed"]
        weights = torch.linspace(-1, 1, 61, dtype=torch.float64)

    def metric(x: Tensor) -> Tensor:
        out = model.run_with_hooks(x, fwd_hooks=hooks, start_at_layer=0)
        return (out[:, -1] * weights).sum()

    x = embedded.clone().requires_grad_()
    (grad,) = torch.autograd.grad(metric(x), x)
    torch.manual_seed(0)
    along = torch.randn_like(x)
    difference = (metric(embedded + 1e-6 * along) - metric(embedded - 1e-6 * along)) / 2e-6
    assert relative((grad * along).sum(), difference) < FINITE_DIFFERENCE


@models
def test_bfloat16(name: str):
    model, tokens = random_model(CONFIGS[name], dtype=torch.bfloat16), random_tokens(2, N_POS)
    hooks = knock_out_state_edges(None, range(3, 9), layers=0)
    with model.hooks(hooks):
        _, kept = model.run_with_cache(tokens)
    _, plain = model.run_with_cache(tokens)
    cut = effective_attention(plain, 0)[..., 3:9]
    lost = torch.einsum("bcqk,bkc->bqc", cut, plain[READS[name], 0][:, 3:9].float())
    assert relative(kept["ssm_y", 0].float(), plain["ssm_y", 0].float() - lost) < BF16


# --- states ---------------------------------------------------------------------------------------


@models
def test_a_frozen_state_is_held(name: str, monkeypatch: pytest.MonkeyPatch):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    layer = model.cfg.recurrent_layers[0]
    _, plain = model.run_with_cache(tokens, names_filter=f"blocks.{layer}.mixer.hook_ssm_state")
    for start, stop in ((6, None), (6, 10), (0, 3), (torch.tensor([6, 2, 9]), 11)):
        hooks = freeze_state(start, stop, layers=layer, channels=[1, 4])
        with model.hooks(hooks):
            _, kept = model.run_with_cache(tokens, names_filter=list(plain))
        found, expected = kept["ssm_state", layer], plain["ssm_state", layer]
        for i, first in enumerate([start] * 3 if isinstance(start, int) else start.tolist()):
            held = torch.zeros_like(expected[i, 0, 1]) if first == 0 else expected[i, first - 1, 1]
            last = N_POS if stop is None else stop
            assert bool((found[i, first:last, 1] == found[i, first, 1]).all())
            assert relative(found[i, first, 1], held) < FP32_PARITY
            assert relative(found[i, :, 2], expected[i, :, 2]) < FP32_PARITY
    hooks = freeze_state(6, 10)
    expected_logits = model.run_with_hooks(tokens, fwd_hooks=hooks)
    assert relative(expected_logits, model(tokens)) > 1e-2
    assert_rows_are(model, hooks, monkeypatch, expected_logits)


@models
def test_an_edited_state_reaches_every_later_position(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    layer = model.cfg.recurrent_layers[0]
    names = f"blocks.{layer}.mixer.hook_ssm_state"
    calls = []

    def clear(h: Tensor, hook: HookPoint) -> Tensor:
        calls.append(int(hook.run.query_pos[0, 0]))
        return torch.zeros_like(h)

    _, plain = model.run_with_cache(tokens, names_filter=names)
    with model.hooks(edit_state(clear, [4, 8], layers=layer)):
        _, kept = model.run_with_cache(tokens, names_filter=names)
    assert calls == [4, 8]
    found = kept["ssm_state", layer]
    assert not bool(found[:, [4, 8]].any())
    assert relative(found[:, :4], plain["ssm_state", layer][:, :4]) < FP32_PARITY
    assert relative(found[:, 5:], plain["ssm_state", layer][:, 5:]) > 1e-3
    calls.clear()
    model.run_with_hooks(tokens, fwd_hooks=edit_state(clear))
    assert calls == list(range(N_POS)) * len(model.cfg.recurrent_layers)


@models
def test_a_patched_state_is_the_donors_also_in_generation(name: str):
    """In a model whose only recurrence is its last layer, that is the same as a replaced state."""
    cfg = griffin_config("AR") if name == "griffin" else jamba_config("AM")
    model, tokens = random_model(cfg), random_tokens(2, 12)
    other = random_tokens(2, 12, seed=3)
    point = "blocks.1.mixer.hook_ssm_state"
    _, donor = model.run_with_cache(other, names_filter=point)
    hooks = patch(donor, point, positions=11)
    options: Any = {"max_new_tokens": 4, "stop_at_eos": False, "verbose": False}
    out = model.generate(tokens, fwd_hooks=hooks, return_type="output", **options)
    _, mine = model(tokens, return_state=True)
    _, theirs = model(other, return_state=True)
    grafted = mine.replace(theirs, kinds="ssm")
    state = model.run_with_hooks(tokens, fwd_hooks=hooks, return_state=True)[1]
    assert relative(state.blocks[1].ssm, grafted.blocks[1].ssm) < FP32_PARITY
    logits = model(out.new_tokens[:, :-1], state=grafted)
    assert torch.equal(logits.argmax(-1), out.new_tokens[:, 1:])
    assert relative(logits.log_softmax(-1).amax(-1), out.logprobs[:, 1:]) < FP32_PARITY


@models
def test_a_recurrent_state_carried_under_another_prompts_keys(name: str):
    """Recurrent layers go on from prompt A, attention still reads prompt B's keys."""
    model, a, b = model_of(name), random_tokens(2, 14, seed=1), random_tokens(2, 9, seed=2)
    more, names = random_tokens(2, 3, seed=4), lambda n: ".mixer." in n or ".attn." in n
    _, of_a = model(a, return_state=True)
    _, of_b = model(b, return_state=True)
    both = of_b.replace(of_a, kinds=("ssm", "conv"))
    assert both.next_pos.tolist() == [9, 9] and both.n_seen == 9
    kept_a, kept_b, kept = (
        model.run_with_cache(more, state=state, names_filter=names)[1]
        for state in (of_a, of_b, both)
    )
    for leaf in ("ssm_y", "ssm_state", "gated"):  # layer 0 holds A alone
        assert torch.equal(kept[leaf, 0], kept_a[leaf, 0])
        assert relative(kept[leaf, 0], kept_b[leaf, 0]) > 1e-2
    for leaf in ("k", "v"):  # of B's prompt, under queries that come after A
        assert torch.equal(getattr(both.blocks[1], leaf), getattr(of_b.blocks[1], leaf))
    assert torch.equal(kept["q", 1], kept_a["q", 1])
    assert all(relative(kept["z", 1], other["z", 1]) > 1e-2 for other in (kept_a, kept_b))
    # Taken whole, a state of the same length is the donor's.
    _, of_c = model(random_tokens(2, 14, seed=7), return_state=True)
    assert torch.equal(model(more, state=of_c.replace(of_a)), model(more, state=of_a))


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: freeze_state(-1), "start=-1"),
        (lambda: freeze_state(1.5), "start=1.5"),
        (lambda: freeze_state(1, True), "stop=True"),
        (lambda: freeze_state(1, channels=[]), "channels"),
        (lambda: edit_state(print, [-3]), "positions"),
        (lambda: edit_state(print, layers=-1), "layers"),
        (lambda: knock_out_state_edges([], 3), "positions"),
        (lambda: knock_out_state_edges(2, -3), "counted from 0"),
        (lambda: knock_out_state_edges(2, 3, channels=1.5), "channels"),
    ],
)
def test_bad_arguments_are_refused_at_once(make: Any, message: str):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    "factory",
    [
        lambda **o: edit_state(lambda h, hook: h, **o),
        lambda **o: freeze_state(2, **o),
        lambda **o: knock_out_state_edges(2, 1, **o),
    ],
)
def test_a_layer_without_a_recurrence_is_an_error(factory: Any):
    model, tokens = model_of("griffin"), random_tokens(2, 6)
    with pytest.raises(HookNameError, match="blocks.1.mixer.hook_ssm_y"):
        model.run_with_hooks(tokens, fwd_hooks=factory(layers=[0, 1]))
    assert not model.list_hooks()


def test_errors_when_first_run():
    model, tokens = model_of("griffin"), random_tokens(2, 6)
    for hooks, message in (
        (freeze_state(1, channels=32), "channels \\(32,\\): layer 0 has 32"),
        (freeze_state(torch.tensor([1, 2, 3])), "start has 3 entries, the batch has 2"),
        (knock_out_state_edges(2, 1, channels=40), "channels \\(40,\\)"),
        (knock_out_state_edges(torch.ones(3, 4, dtype=torch.bool), 1), "3 entries"),
    ):
        with pytest.raises(ValueError, match=message):
            model.run_with_hooks(tokens, fwd_hooks=hooks)


def test_a_state_cannot_be_held_from_a_start_to_a_stop_before_it():
    with pytest.raises(ValueError, match="start=30, stop=20"):
        freeze_state(30, 20)
