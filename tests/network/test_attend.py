"""Attention in blocks of queries, or inside torch's kernel, is attention as it is defined."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.network.attention import attend
from hooked_hybrid.network.attention.attend import (
    Hooks,
    Sight,
    attend_blocks,
    attend_fused,
    attend_whole,
)
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.plan import piece_length
from hooked_hybrid.network.state import HybridState
from tests.loops import looped
from tests.models import CONFIGS, griffin_config, random_model, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY

FP64_PARITY = 1e-12
N_POS = 23
HEADS = {"MHA": (4, 4), "GQA": (4, 2), "MQA": (4, 1), "one head": (1, 1)}
LAYOUTS = ["plain", "left", "right", "both sides", "packed"]
INSIDE = ["hook_attn_scores", "hook_pattern"]

models = pytest.mark.parametrize("name", list(CONFIGS))
layouts = pytest.mark.parametrize("layout", LAYOUTS)


# --- attention alone ------------------------------------------------------------------------------


@dataclass
class Case:
    """Where queries and keys stand: the document (-1: none) and the position of each."""

    sight: Sight
    q_doc: list[list[int]]
    k_doc: list[list[int]]

    def sees(self, row: int, query: int, key: int) -> bool:
        q_doc, k_doc = self.q_doc[row][query], self.k_doc[row][key]
        if q_doc < 0 or q_doc != k_doc:
            return False
        distance = int(self.sight.layout.pos[row, query] - self.sight.key_pos[row, key])
        return distance >= 0 and (self.sight.n_keys is None or distance < self.sight.n_keys)


def case(layout: str, length: int, batch: int, n_keys: int | None, n_cached: int) -> Case:
    """Return new positions after cached keys; rows differ unless the layout is plain.

    Plain rows have seen more tokens than are cached where a window forgot them. Of others, row r
    lacks the first r of the cached keys.
    """
    ids = [[1] * length for _ in range(batch)]
    for row in range(batch):
        pad = min(length - 1, 2 + row)
        if layout in ("left", "both sides"):
            ids[row][:pad] = [0] * pad
        if layout in ("right", "both sides"):
            right = min(pad, ids[row].count(1) - 1)
            ids[row][length - right :] = [0] * right
        if layout == "packed":
            ids[row] = [1 + (t + row) // 5 for t in range(length)]
            if row:
                ids[row][-1] = 0 if length > 1 else 1
    seen = n_cached + (3 if n_keys is not None and n_cached >= n_keys - 1 else 0)
    plain = layout == "plain"
    lacks = [0 if plain else min(row, n_cached) for row in range(batch)]
    cached = [[-1] * n + list(range(seen - n_cached + n, seen)) for n in lacks]
    state = HybridState((), torch.full((batch,), seen), torch.ones(batch).long(), seen)
    if not plain:
        state = HybridState((), state.next_pos, state.segment)
    given = torch.tensor(ids)
    laid = lay_out(
        given,
        state,
        None if layout in ("plain", "packed") else given,
        given if layout == "packed" else None,
    )
    key_pos = torch.cat([torch.tensor(cached).long().view(batch, n_cached), laid.pos], dim=1)
    q_doc = [[i if i else -1 for i in row] for row in ids]
    k_doc = [[1 if p >= 0 else -1 for p in c] + q for c, q in zip(cached, q_doc, strict=True)]
    return Case(Sight(laid, key_pos, n_keys), q_doc, k_doc)


def queries_keys_values(
    sight: Sight, heads: str, dtype: torch.dtype = torch.float32, d_head: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(sight.key_pos.numel())
    (n_heads, n_kv), (batch, n_keys) = HEADS[heads], sight.key_pos.shape

    def draw(n: int, of: int) -> Tensor:
        return torch.randn(batch, n, of, d_head, generator=generator, dtype=dtype)

    return draw(sight.layout.length, n_heads), draw(n_keys, n_kv), draw(n_keys, n_kv)


def no_hooks() -> Hooks:
    return Hooks(HookPoint(), HookPoint(), HookPoint())


def by_loops(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    """Return what each query reads, one query of one head after another, in fp64."""
    z, group = torch.zeros_like(q, dtype=torch.float64), q.shape[2] // k.shape[2]
    for row in range(q.shape[0]):
        for t in range(q.shape[1]):
            keys = [s for s in range(k.shape[1]) if case.sees(row, t, s)]
            for head in range(q.shape[2] if keys else 0):
                mine = k[row, keys, head // group].double(), v[row, keys, head // group].double()
                scores = mine[0] @ q[row, t, head].double() / math.sqrt(q.shape[-1])
                z[row, t, head] = scores.softmax(0) @ mine[1]
    return z


def assert_twins_agree(case: Case, heads: str) -> None:
    for dtype, bound in ((torch.float32, FP32_PARITY), (torch.float64, FP64_PARITY)):
        inputs = queries_keys_values(case.sight, heads, dtype)
        whole = attend_whole(*inputs, case.sight, no_hooks())
        blocks = attend_blocks(*inputs, case.sight, no_hooks())
        fused = attend_fused(*inputs, case.sight)
        assert relative(blocks, whole) < bound
        real = case.sight.layout.is_real
        assert relative(fused[real], whole[real]) < bound
        assert fused.isfinite().all()


WINDOWS = {  # window and cached keys, for 13 queries
    "no window": (None, 0),
    "no window, cached keys": (None, 5),
    "window": (5, 0),
    "window, some keys cached": (5, 2),
    "window, cache full": (5, 4),
    "window, cache more than full": (5, 9),
    "window of one": (1, 0),
    "window of two": (2, 1),
    "window of the sequence": (13, 0),
    "window of the sequence, cache full": (13, 12),
    "window longer than everything": (40, 6),
}
windows = looped("window", WINDOWS)


@layouts
@windows
@looped("batch", [1, 3])
def test_the_definition_is_what_loops_over_visible_keys_compute(
    layout: str, window: str, batch: int
):
    where = case(layout, 13, batch, *WINDOWS[window])
    inputs = queries_keys_values(where.sight, "GQA", torch.float64)
    whole = attend_whole(*inputs, where.sight, no_hooks())
    assert relative(whole, by_loops(*inputs, where)) < FP64_PARITY


@layouts
@windows
@looped("batch", [1, 3])
def test_blocks_and_kernel_equal_the_definition(
    layout: str, window: str, batch: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hooked_hybrid.network.attention.attend.BLOCK", 4)
    monkeypatch.setattr("hooked_hybrid.network.kernels.fused_attention.BLOCK", 5)
    with torch.no_grad():
        where = case(layout, 13, batch, *WINDOWS[window])
        for heads in HEADS if batch > 1 else ["GQA"]:
            assert_twins_agree(where, heads)


@layouts
@looped("length", [1, 3, 4, 5, 8, 22])
@looped("window", [(None, 0), (None, 6), (6, 0), (6, 3), (6, 5)])
def test_blocks_and_kernel_equal_the_definition_at_any_length(
    layout: str, length: int, window: Any, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hooked_hybrid.network.attention.attend.BLOCK", 4)
    monkeypatch.setattr("hooked_hybrid.network.kernels.fused_attention.BLOCK", 4)
    with torch.no_grad():
        assert_twins_agree(case(layout, length, 3, *window), "GQA")


@layouts
@pytest.mark.parametrize("window", [(None, 0), (None, 31), (90, 0), (90, 89), (17, 16)], ids=str)
def test_real_blocks_of_a_longer_sequence_equal_the_definition(layout: str, window: Any):
    with torch.no_grad():
        assert_twins_agree(case(layout, 200, 2, *window), "GQA")


@layouts
@windows
def test_a_range_of_keys_holds_all_that_its_queries_see(layout: str, window: str):
    where = case(layout, 13, 3, *WINDOWS[window])
    sight, n_keys = where.sight, where.sight.key_pos.shape[1]
    for start, stop in ((0, 13), (0, 4), (3, 9), (12, 13)):
        keys, mask = sight.keys_of(start, stop), sight.mask(start, stop)
        mask = mask.expand(3, -1, -1)
        seen = torch.zeros(3, stop - start, n_keys, dtype=torch.bool)
        seen[:, :, keys] = mask
        wanted = [
            [[where.sees(row, t, s) for s in range(n_keys)] for t in range(start, stop)]
            for row in range(3)
        ]
        assert seen.tolist() == wanted
        hidden = sight.hide(torch.zeros(3, 2, *mask.shape[1:]), start, stop)
        assert ((hidden == 0) == mask[:, None]).all()
        assert hidden[hidden != 0].eq(torch.finfo(torch.float32).min).all()


def test_blocks_of_a_window_leave_out_the_keys_that_none_of_them_sees():
    sight = case("plain", 200, 1, 10, 0).sight
    assert sight.keys_of(128, 192) == slice(128 - 9, 192)
    assert sight.keys_of(0, 64) == slice(0, 64)


@layouts
@pytest.mark.parametrize("window", ["window, cache full", "no window, cached keys"])
def test_gradients_inside_the_kernel_equal_those_of_the_definition(layout: str, window: str):
    where = case(layout, 13, 3, *WINDOWS[window])
    inputs = queries_keys_values(where.sight, "GQA", torch.float64)
    leaves = [t.requires_grad_() for t in inputs]
    real = where.sight.layout.is_real
    whole = attend_whole(*leaves, where.sight, no_hooks())[real]
    fused = attend_fused(*leaves, where.sight)[real]
    wanted = torch.autograd.grad(whole.sin().sum(), leaves)
    got = torch.autograd.grad(fused.sin().sum(), leaves)
    for a, b in zip(got, wanted, strict=True):
        assert relative(a, b) < FP64_PARITY


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_blocks_round_no_more_than_the_definition(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("hooked_hybrid.network.attention.attend.BLOCK", 4)
    where = case("plain", 13, 3, 5, 4)
    exact = queries_keys_values(where.sight, "GQA", torch.float64)
    rounded = [t.to(dtype) for t in exact]
    truth = attend_whole(*(t.double() for t in rounded), where.sight, no_hooks())
    blocks = attend_blocks(*rounded, where.sight, no_hooks())
    whole = attend_whole(*rounded, where.sight, no_hooks())
    assert blocks.dtype == dtype
    assert relative(blocks.double(), truth) < 1.5 * relative(whole.double(), truth)


# --- in a model -----------------------------------------------------------------------------------


model_of = cache(tiny_model)


def counting(fn: Callable, name: str, calls: list[str]) -> Callable:
    def counted(*args: Any) -> Any:
        calls.append(name)
        return fn(*args)

    return counted


@pytest.fixture
def ways(monkeypatch: pytest.MonkeyPatch, unchecked: None) -> list[str]:
    """Cut everything small, and return the list of the ways that attention takes from here on."""
    taken: list[str] = []
    for way in ("whole", "blocks", "fused"):
        fn = getattr(attend, f"attend_{way}")
        monkeypatch.setattr(attend, f"attend_{way}", counting(fn, way, taken))
    monkeypatch.setattr("hooked_hybrid.network.attention.attend.BLOCK", 4)
    monkeypatch.setattr(
        "hooked_hybrid.model.language_model.piece_length",
        lambda n_pos, points, **options: piece_length(n_pos, points, **{**options, "piece": 10}),
    )
    return taken


@contextmanager
def as_defined() -> Iterator[None]:
    """Compute attention as it is defined, and the sequence whole."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hooked_hybrid.network.attention.attend.attention_way", lambda *_: "whole")
        whole = "hooked_hybrid.model.language_model.piece_length"
        patch.setattr(whole, lambda n_pos, *_, **__: n_pos)
        yield


@cache
def defined_logits(name: str, layout: str) -> Tensor:
    model = model_of(name)
    with torch.no_grad(), as_defined():
        return model(random_tokens(2, N_POS), **options_of(name, layout)[0])


@cache
def options_of(name: str, layout: str) -> tuple[dict[str, Any], Tensor]:
    """Return options of a forward over two rows, and where they hold tokens."""
    mask = torch.ones(2, N_POS).long()
    if layout == "left":
        mask[1, :6] = 0
    if layout == "right":
        mask[0, 13:] = 0
    if layout == "packed":
        ids = torch.tensor([[1] * 9 + [2] * 2 + [3] * 12, [0] * 2 + [4] + [9] * 17 + [0] * 3])
        return {"segment_ids": ids}, ids > 0
    if layout == "continued":
        _, state = model_of(name)(random_tokens(2, 9, seed=5), return_state=True)
        return {"state": state}, mask > 0
    return ({} if layout == "plain" else {"attention_mask": mask}), mask > 0


def attention(model: HookedHybrid, leaf: str) -> list[str]:
    return [f"blocks.{layer}.attn.{leaf}" for layer in model.cfg.attention_layers]


in_layouts = pytest.mark.parametrize(
    ("name", "layout"),
    [
        *(("griffin", layout) for layout in ("plain", "left", "right", "packed", "continued")),
        ("griffin-gqa-ends-in-attention", "plain"),
        ("griffin-gqa-ends-in-attention", "packed"),
        ("jamba", "left"),
        ("jamba-dense-ends-in-attention", "plain"),
        ("jamba-dense-ends-in-attention", "continued"),
    ],
)


@in_layouts
def test_unhooked_blocks_give_the_logits_of_the_definition(name: str, layout: str, ways: list[str]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    with torch.no_grad():
        ways.clear()
        logits = model(tokens, **options)
    assert set(ways) == {"blocks"}
    assert relative(logits[real], defined_logits(name, layout)[real]) < FP32_PARITY


@in_layouts
@looped("leaf", [*INSIDE, "hook_z"])
def test_hooks_on_blocks_see_the_values_of_the_whole(
    name: str, layout: str, leaf: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    names = attention(model, leaf)
    with torch.no_grad(), as_defined():
        _, defined = model.run_with_cache(tokens, names_filter=names, **options)
    blocks: dict[str, list[tuple[Tensor, Any]]] = {n: [] for n in names}

    @per_position
    def look(value: Tensor, hook: HookPoint) -> None:
        blocks[str(hook.name)].append((value, hook.run))

    # On z alone, nothing asks for blocks: an idle hook inside does.
    inside = [(attention(model, "hook_pattern"), per_position(lambda value, hook: None))]
    with torch.no_grad():
        ways.clear()
        model.run_with_hooks(tokens, fwd_hooks=[(names, look), *inside], **options)
    assert set(ways) == {"blocks"}
    for n in names:
        assert len(blocks[n]) >= N_POS / 4
        whole, where = defined[n], torch.cat([run.query_pos for _, run in blocks[n]], dim=1)
        lowest = torch.finfo(whole.dtype).min
        for value, run in blocks[n]:
            assert value.shape[model.hook_dict[n].pos_dim] == run.query_pos.shape[1] <= 4
            assert (run.key_pos is None) == (leaf == "hook_z")
        if leaf == "hook_z":
            assert relative(torch.cat([v for v, _ in blocks[n]], dim=1)[real], whole[real]) < (
                FP32_PARITY
            )
            continue
        if layout == "packed":  # documents have positions in common: the next test is for them
            assert where[real].tolist() == [t for row in where for t in row.tolist() if t >= 0]
            continue
        assembled = placed(blocks[n], where, whole)
        scores = leaf == "hook_attn_scores"
        hidden = whole == (lowest if scores else 0)
        is_hidden = assembled == (lowest if scores else 0)
        at = real[:, None, :, None].expand_as(hidden)
        assert torch.equal(is_hidden[at], hidden[at])
        seen = at & ~hidden
        assert relative(assembled[seen], whole[seen]) < FP32_PARITY


def placed(blocks: list[tuple[Tensor, Any]], query_pos: Tensor, whole: Tensor) -> Tensor:
    """Return blocks of scores or patterns put where positions say, in the whole's axes.

    Keys that no block was given are as they are in the whole where that is hidden, else NaN.
    """
    hidden = whole.flatten().min() if whole.min() < 0 else 0
    out = torch.where(whole == hidden, whole, torch.nan)
    for row in range(whole.shape[0]):
        n_keys, at = whole.shape[-1], query_pos[row].tolist()
        last = query_pos[row].max() + 1
        # The whole's keys end with the new positions, and those before them are cached.
        n_cached = n_keys - query_pos.shape[1]
        first = int(query_pos[row][query_pos[row] >= 0].min()) - n_cached
        column = {int(p): n_cached + t for t, p in enumerate(at) if p >= 0}
        column |= {first + s: s for s in range(n_cached)}
        for value, run in blocks:
            for i, t in enumerate(run.query_pos[row].tolist()):
                for j, s in enumerate(run.key_pos[row].tolist()):
                    if t >= 0 and 0 <= s < last and s in column:
                        out[row, :, column[t] - n_cached, column[s]] = value[row, :, i, j]
    return out


@models
def test_blocks_of_packed_documents_see_what_each_document_alone_sees(name: str, ways: list[str]):
    model, tokens = model_of(name), random_tokens(1, N_POS)
    ids = torch.tensor([[3] * 9 + [4] * 14])
    seen: list[tuple[Tensor, Any]] = []

    @per_position
    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append((value, hook.run))

    point = attention(model, "hook_pattern")[0]
    with torch.no_grad():
        model.run_with_hooks(tokens, segment_ids=ids, fwd_hooks=[(point, look)])
        assert set(ways) == {"blocks"} and len(seen) > 4
        with as_defined():
            _, first = model.run_with_cache(tokens[:, :9], names_filter=point)
            _, second = model.run_with_cache(tokens[:, 9:], names_filter=point)
    done = 0
    for value, run in seen:
        for i in range(value.shape[2]):
            alone, t = (first[point], done) if done < 9 else (second[point], done - 9)
            assert int(run.query_pos[0, i]) == t
            n = min(t + 1, value.shape[3])  # keys end where the block's queries do
            end = value.shape[3] - (value.shape[2] - 1 - i)
            own = value[0, :, i, end - min(n, end) : end]
            assert relative(own, alone[0, :, t, t + 1 - own.shape[-1] : t + 1]) < FP32_PARITY
            assert float(value[0, :, i].sum(-1).sub(1).abs().max()) < FP32_PARITY
            done += 1
    assert done == N_POS


def moved(value: Tensor, hook: HookPoint) -> Tensor:
    """Return scores or patterns with something added everywhere, hidden edges included."""
    query, key = hook.run.query_pos[:, None, :, None], hook.run.key_pos[:, None, None, :]
    return 0.7 * value.clamp_min(-50) + 0.1 * torch.cos(query - 2.0 * key)


def turned(value: Tensor, hook: HookPoint) -> Tensor:
    """Return what heads read, changed by an amount that the position decides."""
    return value * torch.cos(hook.run.query_pos.float())[:, :, None, None]


def changed_in_place(value: Tensor, hook: HookPoint) -> None:
    value *= 0.5


EDITS: dict[str, list[tuple[str, Callable]]] = {
    "scores": [("hook_attn_scores", moved)],
    "pattern": [("hook_pattern", moved)],
    "scores and pattern": [("hook_attn_scores", moved), ("hook_pattern", moved)],
    "z": [("hook_z", turned)],
    "pattern and z": [("hook_pattern", moved), ("hook_z", turned)],
    "all, twice": [
        (leaf, turned if leaf == "hook_z" else moved) for leaf in [*INSIDE, "hook_z"] * 2
    ],
    "in place": [(leaf, changed_in_place) for leaf in ("hook_pattern", "hook_z")],
}


def edits_of(model: HookedHybrid, edit: str, mark: Callable) -> list[Any]:
    """Return hooks of an edit, each a function of its own, with a mark."""

    def own(fn: Callable) -> Callable:
        return mark(lambda value, hook: fn(value, hook))

    return [(attention(model, leaf), own(fn)) for leaf, fn in EDITS[edit]]


@in_layouts
@looped("edit", list(EDITS))
def test_an_edit_of_blocks_is_that_edit_of_the_whole(
    name: str, layout: str, edit: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    with torch.no_grad():
        marked = edits_of(model, edit, per_position)
        blocks = model.run_with_hooks(tokens, fwd_hooks=marked, **options)
        assert set(ways) == {"blocks"}
        ways.clear()
        unmarked = edits_of(model, edit, lambda fn: fn)
        whole = model.run_with_hooks(tokens, fwd_hooks=unmarked, **options)
        assert set(ways) == {"whole" if edit != "z" else "blocks"}
    assert relative(blocks[real], whole[real]) < FP32_PARITY
    plain = defined_logits(name, layout)
    assert relative(blocks[real], plain[real]) > 100 * FP32_PARITY


@in_layouts
@looped("pair", ["keep_top_heads", "boost_span", "permute"])
def test_what_one_hook_leaves_for_the_next_holds_block_by_block(
    name: str, layout: str, pair: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    make = {
        "keep_top_heads": lambda: interventions.keep_top_heads(2, "l2", ties="lowest"),
        "boost_span": lambda: interventions.boost_span(2, (1, 4), 1.5, ties="lowest"),
        "permute": lambda: interventions.manipulate_span("permute", (1, 6)),
    }[pair]
    with torch.no_grad():
        blocks = model.run_with_hooks(tokens, fwd_hooks=make(), **options)
        assert set(ways) == {"blocks"}
        with as_defined():
            defined = model.run_with_hooks(tokens, fwd_hooks=make(), **options)
    assert relative(blocks[real], defined[real]) < FP32_PARITY
    plain = defined_logits(name, layout)
    if layout != "continued":  # there, windows have left the span
        assert relative(blocks[real], plain[real]) > 100 * FP32_PARITY


@in_layouts
def test_watchers_of_a_whole_run_get_the_scores_and_patterns_of_the_definition(
    name: str, layout: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    names = [
        *attention(model, INSIDE[0]),
        *attention(model, INSIDE[1]),
        *attention(model, "hook_z"),
    ]
    with torch.no_grad():
        ways.clear()
        logits, cached = model.run_with_cache(tokens, names_filter=names, **options)
        assert set(ways) == {"blocks"}
        with as_defined():
            defined_logits, defined = model.run_with_cache(tokens, names_filter=names, **options)
    assert relative(logits[real], defined_logits[real]) < FP32_PARITY
    for n in names:
        got, wanted = cached[n], defined[n]
        assert got.shape == wanted.shape
        if n.endswith("hook_attn_scores"):
            lowest = torch.finfo(got.dtype).min
            assert torch.equal(got == lowest, wanted == lowest)
            got, wanted = (t[t != lowest] for t in (got, wanted))
        assert relative(got, wanted) < FP32_PARITY


@models
@pytest.mark.parametrize("first", ["editor", "watcher"])
def test_an_editor_of_blocks_and_a_cache_together_see_the_sequence_whole(
    name: str, first: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    names = attention(model, "hook_pattern")
    edits = edits_of(model, "scores and pattern", per_position)

    def run() -> tuple[Tensor, dict[str, Tensor]]:
        kept: dict[str, Tensor] = {}

        @watcher
        def keep(value: Tensor, hook: HookPoint) -> None:
            kept[str(hook.name)] = value.clone()

        hooks = [*edits, (names, keep)] if first == "editor" else [(names, keep), *edits]
        return model.run_with_hooks(tokens, fwd_hooks=hooks), kept

    with torch.no_grad():
        ways.clear()
        logits, kept = run()
        assert set(ways) == {"whole"}
        alone = model.run_with_hooks(tokens, fwd_hooks=edits)
        with as_defined():
            defined_logits, defined = run()
    assert relative(logits, defined_logits) < FP32_PARITY
    assert relative(alone, defined_logits) < FP32_PARITY
    for n in names:
        assert kept[n].shape[2:] == (N_POS, N_POS)
        assert relative(kept[n], defined[n]) < FP32_PARITY


@models
@pytest.mark.parametrize("layout", ["plain", "left", "packed"])
def test_watchers_of_blocks_and_of_the_whole_may_share_a_point(
    name: str, layout: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, _ = options_of(name, layout)
    shapes: list[tuple[int, ...]] = []

    @watcher
    @per_position
    def look(value: Tensor, hook: HookPoint) -> None:
        assert hook.run.query_pos.shape[1] == value.shape[2]
        shapes.append(tuple(value.shape[2:]))

    names = attention(model, "hook_pattern")
    with torch.no_grad(), model.hooks(fwd_hooks=[(names, look)]):
        ways.clear()
        _, cached = model.run_with_cache(tokens, names_filter=names, **options)
    assert set(ways) == {"blocks"}
    assert shapes == [(N_POS, N_POS)] * len(names)
    with torch.no_grad(), as_defined():
        _, defined = model.run_with_cache(tokens, names_filter=names, **options)
    for n in names:
        assert relative(cached[n], defined[n]) < FP32_PARITY


@models
def test_hooks_on_z_alone_are_called_once_a_piece(name: str, ways: list[str]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    lengths: list[int] = []

    @per_position
    def look(z: Tensor, hook: HookPoint) -> None:
        lengths.append(z.shape[1])
        assert hook.run.query_pos.shape[1] == z.shape[1]

    with torch.no_grad():
        model.run_with_hooks(tokens, fwd_hooks=[(attention(model, "hook_z"), look)])
    n_layers = len(model.cfg.attention_layers)
    assert sorted(lengths) == sorted([10, 10, 3] * n_layers)
    assert set(ways) == {"blocks"}


@in_layouts
@pytest.mark.parametrize("leaf", INSIDE)
def test_no_edit_of_blocks_opens_a_hidden_edge(name: str, layout: str, leaf: str, ways: list[str]):
    """Queries before an edited value read the same whatever stands after them."""
    model = model_of(name)
    options, _ = options_of(name, layout)
    after: list[Tensor] = []

    @per_position
    def flood(value: Tensor, hook: HookPoint) -> Tensor:
        return torch.ones_like(value)

    @per_position
    def look(value: Tensor, hook: HookPoint) -> None:
        hidden = torch.finfo(value.dtype).min if leaf == "hook_attn_scores" else 0
        run = hook.run
        distance = run.query_pos[:, :, None] - run.key_pos[:, None, :]
        sees = (distance >= 0) & (run.key_pos >= 0)[:, None, :]
        n_keys = getattr(model.cfg.layers[hook.layer()].mixer, "n_keys", None)
        if n_keys is not None:
            sees &= distance < n_keys
        is_open = value[:, 0] != hidden
        assert not (is_open & ~sees).any()
        if layout != "packed":
            assert torch.equal(is_open, sees)
        after.append(value)

    names = attention(model, leaf)
    with torch.no_grad():
        ways.clear()
        hooks = [(names, flood), (names, look)]
        model.run_with_hooks(random_tokens(2, N_POS), fwd_hooks=hooks, **options)
    assert set(ways) == {"blocks"} and len(after) >= N_POS / 4


@models
@pytest.mark.parametrize("layout", ["plain", "left", "continued"])
def test_a_query_without_any_edge_attends_to_nothing(name: str, layout: str, ways: list[str]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, real = options_of(name, layout)
    ways.clear()  # a state may just have been made
    gone = [12, 13, 15]
    hooks = interventions.knock_out_edges(gone, None)
    seen: dict[str, list[Tensor]] = {n: [] for n in attention(model, "hook_z")}
    where: list[Tensor] = []

    @per_position
    def look(z: Tensor, hook: HookPoint) -> None:
        seen[str(hook.name)].append(z)
        where.append(hook.run.query_pos)

    with torch.no_grad():
        ways.clear()
        looks = [(list(seen), look)]
        logits = model.run_with_hooks(tokens, fwd_hooks=[*hooks, *looks], **options)
        assert set(ways) == {"blocks"}
        with as_defined():
            defined = model.run_with_hooks(tokens, fwd_hooks=hooks, **options)
    assert relative(logits[real], defined[real]) < FP32_PARITY
    at = torch.cat(where[:: len(seen)], dim=1)[:, :N_POS]
    for blocks in seen.values():
        z = torch.cat(blocks, dim=1)
        silent = z.abs().amax((2, 3)) == 0
        assert torch.equal(silent[real], torch.isin(at, torch.tensor(gone))[real])


@in_layouts
def test_gradients_are_those_of_the_definition_whichever_way_is_taken(
    name: str, layout: str, ways: list[str]
):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    options, _ = options_of(name, layout)
    options = {key: value for key, value in options.items() if key != "state"}
    names = ["hook_embed", *attention(model, "hook_q"), *attention(model, "hook_v")]
    ways.clear()
    loss, cache_fused = model.run_with_cache(
        tokens, "loss", names_filter=names, incl_bwd=True, **options
    )
    assert set(ways) == {"fused"}
    ways.clear()
    inside = [*names, *attention(model, "hook_pattern")]
    loss_whole, cache_whole = model.run_with_cache(
        tokens, "loss", names_filter=inside, incl_bwd=True, **options
    )
    assert set(ways) == {"whole"}
    assert relative(loss, loss_whole) < FP32_PARITY
    for n in names:
        grad = cache_fused[f"{n}_grad"]
        assert grad.isfinite().all()
        assert relative(grad, cache_whole[f"{n}_grad"]) < FP32_PARITY


@pytest.mark.parametrize("n_keys", [1, 2, 4, 5, N_POS, 40])
def test_a_model_of_any_window_runs_in_blocks_as_it_is_defined(n_keys: int, ways: list[str]):
    model = random_model(griffin_config("RA", n_keys=n_keys))
    tokens, following = random_tokens(2, N_POS), random_tokens(2, 9, seed=1)
    with torch.no_grad():
        logits, state = model(tokens, return_state=True)
        after = model(following, state=state)
        with as_defined():
            defined, defined_state = model(tokens, return_state=True)
            defined_after = model(following, state=defined_state)
    assert relative(logits, defined) < FP32_PARITY
    assert relative(after, defined_after) < FP32_PARITY
