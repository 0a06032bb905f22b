"""An intervention means one thing: however the sequence is cut, padded, packed or batched."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.network.plan import piece_length
from tests.loops import looped
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY

N_POS = 23
HOOKS = {
    "none": [],
    "entropy": interventions.keep_top_heads(2, "entropy"),
    "l2": interventions.keep_top_heads(1, "l2", ties="lowest"),
}

models = pytest.mark.parametrize("name", list(CONFIGS))
hooked = looped("hooks", list(HOOKS))


model_of = cache(tiny_model)


def run(model: HookedHybrid, tokens: Tensor, hooks: str, **options: Any) -> Any:
    return model.run_with_hooks(tokens, fwd_hooks=HOOKS[hooks], **options)


def run_in_parts(
    model: HookedHybrid,
    tokens: Tensor,
    hooks: str,
    lengths: Sequence[int],
    state: Any = None,
    **options: Any,
) -> tuple[Tensor, Any]:
    """Return the logits and the last state of a sequence run in parts of some lengths."""
    logits, start = [], 0
    for n in lengths:
        part = slice(start, start + n)
        cut = {key: value[:, part] for key, value in options.items()}
        out, state = run(model, tokens[:, part], hooks, state=state, return_state=True, **cut)
        logits.append(out)
        start += n
    return torch.cat(logits, dim=1), state


def assert_same_state(state: Any, other: Any, rows: slice = slice(None)) -> None:
    """Check that two states would continue alike, whatever room they keep for absent keys."""
    assert torch.equal(state.next_pos, other.next_pos)
    for mine, theirs in zip(state.blocks, other.blocks, strict=True):
        for field in vars(mine):
            a, b = getattr(mine, field), getattr(theirs, field)
            if field in ("k", "v", "pos"):
                seen = (mine.pos >= 0).sum(1), (theirs.pos >= 0).sum(1)
                assert torch.equal(*seen)
                a, b = a[mine.pos >= 0], b[theirs.pos >= 0]
            if a.numel():
                assert relative(a.float(), b.float()) < FP32_PARITY, field


CUTS = [[1] * N_POS, [5, 18], [22, 1], [1, 22], [3, 7, 7, 6], [8, 8, 7]]


@models
@hooked
@pytest.mark.parametrize("cut", CUTS, ids=str)
def test_split_anywhere_equals_whole(name: str, hooks: str, cut: list[int]):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    whole, state = run(model, tokens, hooks, return_state=True)
    parts, state_of_parts = run_in_parts(model, tokens, hooks, cut)
    assert relative(parts, whole) < FP32_PARITY
    assert_same_state(state_of_parts, state)


@models
@hooked
def test_a_batch_row_equals_its_single_run(name: str, hooks: str):
    model, tokens = model_of(name), random_tokens(4, N_POS)
    batch = run(model, tokens, hooks)
    for row in range(4):
        single = run(model, tokens[row : row + 1], hooks)
        assert relative(batch[row], single[0]) < FP32_PARITY


LENGTHS = [N_POS, 1, 12, 4]


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return rows of different lengths, with arbitrary tokens as padding, and their mask."""
    tokens = random_tokens(len(LENGTHS), N_POS)
    mask = torch.zeros_like(tokens)
    for row, n in enumerate(LENGTHS):
        mask[row, (slice(N_POS - n, None) if side == "left" else slice(0, n))] = 1
    return tokens, mask


@models
@hooked
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_equals_unpadded_and_continues_alike(name: str, hooks: str, side: str):
    model = model_of(name)
    tokens, mask = padded(side)
    out, state = run(model, tokens, hooks, attention_mask=mask, return_state=True)
    following = random_tokens(len(LENGTHS), 9, seed=1)
    after = run(model, following, hooks, state=state)
    for row in range(len(LENGTHS)):
        real = mask[row].bool()
        alone = torch.cat([tokens[row][real], following[row]])[None]
        whole = run(model, alone, hooks)[0]
        n = int(real.sum())
        assert relative(out[row][real], whole[:n]) < FP32_PARITY
        assert relative(after[row], whole[n:]) < FP32_PARITY


@models
@hooked
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("cut", CUTS[1:4], ids=str)
def test_padded_rows_may_be_cut_too(name: str, hooks: str, side: str, cut: list[int]):
    """A part may be all padding for some rows, so this runs below the checks of `forward`."""
    from hooked_hybrid.network.layout import lay_out

    model = model_of(name)
    tokens, mask = padded(side)
    whole, end = run(model, tokens, hooks, attention_mask=mask, return_state=True)
    state, start, logits = None, 0, []
    with model.hooks(HOOKS[hooks]):
        for n in cut:
            part = slice(start, start + n)
            layout = lay_out(tokens[:, part], state, mask[:, part], None, allow_empty_rows=True)
            out, state = model.run_layout(tokens[:, part], layout, state)
            logits.append(out)
            start += n
    real = mask.bool()
    assert relative(torch.cat(logits, dim=1)[real], whole[real]) < FP32_PARITY
    assert_same_state(state, end)


@models
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_of_a_continuation_is_invisible(name: str, side: str):
    model = model_of(name)
    first = random_tokens(len(LENGTHS), 10, seed=2)
    _, state = model(first, return_state=True)
    tokens, mask = padded(side)
    out, state = model(tokens, attention_mask=mask, state=state, return_state=True)
    last = random_tokens(len(LENGTHS), 3, seed=3)
    after = model(last, state=state)
    for row in range(len(LENGTHS)):
        real = mask[row].bool()
        whole = model(torch.cat([first[row], tokens[row][real], last[row]])[None])[0]
        n = int(real.sum())
        assert relative(out[row][real], whole[10 : 10 + n]) < FP32_PARITY
        assert relative(after[row], whole[10 + n :]) < FP32_PARITY


def packed() -> tuple[Tensor, Tensor, list[list[Tensor]]]:
    """Return two rows of packed documents, their ids, and the documents one by one."""
    tokens = random_tokens(2, N_POS)
    ids = torch.tensor([[1] * 9 + [2] * 2 + [3] * 12, [0] * 2 + [4] * 1 + [9] * 17 + [0] * 3])
    documents = [[tokens[row][ids[row] == i] for i in ids[row].unique() if i] for row in range(2)]
    return tokens, ids, documents


@models
@hooked
def test_packed_equals_separate(name: str, hooks: str):
    model = model_of(name)
    tokens, ids, documents = packed()
    out, state = run(model, tokens, hooks, segment_ids=ids, return_state=True)
    following = random_tokens(2, 5, seed=4)
    after = run(model, following, hooks, state=state)
    for row, row_documents in enumerate(documents):
        for i, document in zip([i for i in ids[row].unique() if i], row_documents, strict=True):
            alone = run(model, document[None], hooks)[0]
            assert relative(out[row][ids[row] == i], alone) < FP32_PARITY
        last = torch.cat([row_documents[-1], following[row]])[None]
        n = len(row_documents[-1])
        assert relative(after[row], run(model, last, hooks)[0, n:]) < FP32_PARITY


@models
@hooked
@pytest.mark.parametrize("cut", [[9, 14], [4, 6, 13], [10, 1, 12]], ids=str)
def test_packed_rows_may_be_cut_anywhere(name: str, hooks: str, cut: list[int]):
    model = model_of(name)
    tokens, ids, _ = packed()
    tokens, ids = tokens[:1], ids[:1]
    whole, state = run(model, tokens, hooks, segment_ids=ids, return_state=True)
    parts, end = run_in_parts(model, tokens, hooks, cut, segment_ids=ids)
    assert relative(parts, whole) < FP32_PARITY
    assert_same_state(end, state)


@models
@hooked
def test_pieces_of_a_long_forward_equal_the_whole(
    name: str, hooks: str, monkeypatch: pytest.MonkeyPatch
):
    model = model_of(name)
    tokens, mask = padded("left")
    pieces: list[int] = []

    def small(n_pos: int, points: Any) -> int:
        pieces.append(piece_length(n_pos, points, piece=4))
        return pieces[-1]

    with torch.no_grad(), monkeypatch.context() as patch:
        whole, state = run(model, tokens, hooks, attention_mask=mask, return_state=True)
        patch.setattr("hooked_hybrid.model.language_model.piece_length", small)
        cut, end = run(model, tokens, hooks, attention_mask=mask, return_state=True)
        assert pieces == [4]
        assert relative(cut[mask.bool()], whole[mask.bool()]) < FP32_PARITY
        assert_same_state(end, state)
        # A hook that is not marked per_position makes the forward run whole.
        seen: list[int] = []

        def look(x: Tensor, hook: HookPoint) -> None:
            seen.append(x.shape[1])

        model.run_with_hooks(
            tokens,
            attention_mask=mask,
            fwd_hooks=[
                *HOOKS[hooks],
                ("blocks.0.hook_mlp_out", look),
            ],
        )
        assert seen == [N_POS] and pieces[-1] == N_POS


@models
def test_hook_run_says_where_each_position_and_key_stands(name: str):
    model = model_of(name)
    tokens, mask = padded("left")
    seen: list[tuple[Tensor, Tensor | None]] = []

    def look(value: Tensor, hook: HookPoint) -> None:
        seen.append((hook.run.query_pos, hook.run.key_pos))

    layer = model.cfg.attention_layers[0]
    names = [f"blocks.{layer}.attn.hook_pattern", f"blocks.{layer}.hook_mlp_out"]
    _, state = model.run_with_hooks(
        tokens, attention_mask=mask, fwd_hooks=[(names, look)], return_state=True
    )
    expected = torch.where(mask > 0, mask.cumsum(1) - 1, -1)
    assert torch.equal(seen[0][0], expected) and torch.equal(seen[0][1], expected)
    assert torch.equal(seen[1][0], expected) and seen[1][1] is None
    seen.clear()
    model.run_with_hooks(random_tokens(4, 2), state=state, fwd_hooks=[(names, look)])
    assert seen[0][0].tolist() == [[n, n + 1] for n in LENGTHS]
    assert seen[0][1][:, -2:].tolist() == [[n, n + 1] for n in LENGTHS]


@models
def test_k_of_each_row_equals_single_runs(name: str):
    model, tokens = model_of(name), random_tokens(5, N_POS)
    k = torch.tensor([0, 1, 2, 3, 4])
    together = model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(k))
    for row in range(5):
        hooks = interventions.keep_top_heads(row)
        alone = model.run_with_hooks(tokens[row : row + 1], fwd_hooks=hooks)
        assert relative(together[row], alone[0]) < FP32_PARITY


def test_all_heads_kept_is_the_model_itself():
    model, tokens = model_of("griffin"), random_tokens()
    kept = model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(4))
    assert relative(kept, model(tokens)) < FP32_PARITY


@pytest.mark.parametrize("score", ["entropy", "l2"])
@pytest.mark.parametrize("ties", ["torch", "lowest"])
def test_top_heads_are_those_a_direct_computation_keeps(score: str, ties: str):
    model, tokens = model_of("griffin"), random_tokens()
    layer = model.cfg.attention_layers[0]
    _, plain = model.run_with_cache(tokens)
    pattern = plain["pattern", layer]
    peakedness = {
        "entropy": torch.special.xlogy(pattern, pattern).sum(-1),
        "l2": pattern.square().sum(-1),
    }[score]
    hooks = interventions.keep_top_heads(2, score, ties)
    with model.hooks(fwd_hooks=hooks):
        _, kept = model.run_with_cache(tokens)
    alive = kept["z", layer].abs().amax(-1).transpose(1, 2) > 0
    assert bool((alive.sum(1) == 2).all())
    best = peakedness[:, :, 1:].topk(2, dim=1).indices
    assert bool(alive[:, :, 1:].gather(1, best).all())
    if ties == "lowest":
        assert alive[:, :, 0].tolist() == [[True, True, False, False]] * 2


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "0 or more"),
        ({"k": 1.5}, "whole number"),
        ({"k": 1, "score": "peak"}, "score='peak'"),
        ({"k": 1, "ties": "first"}, "ties='first'"),
    ],
)
def test_bad_arguments_of_keep_top_heads_are_refused_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        interventions.keep_top_heads(**options)


def test_k_above_the_heads_or_of_the_wrong_length_names_what_there_is():
    model, tokens = model_of("griffin"), random_tokens()
    with pytest.raises(ValueError, match="layer 2 has 4 heads"):
        model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(5))
    with pytest.raises(ValueError, match="k has 1 entries"):
        k = torch.tensor([1])
        model.run_with_hooks(tokens, fwd_hooks=interventions.keep_top_heads(k))
    assert not model.list_hooks()


@models
def test_a_hook_on_some_rows_is_that_hook_in_their_single_runs_and_none_in_the_others(name: str):
    model, tokens = model_of(name), random_tokens(3, N_POS)
    hooks = [
        *interventions.keep_top_heads(1),
        (f"blocks.{model.cfg.recurrent_layers[0]}.mixer.hook_ssm_state", lambda h, hook: 0.5 * h),
    ]
    on_some = [(where, interventions.on_rows(fn, [0, 2])) for where, fn in hooks]
    together = model.run_with_hooks(tokens, fwd_hooks=on_some)
    for row in range(3):
        alone = model.run_with_hooks(tokens[row : row + 1], fwd_hooks=hooks if row != 1 else [])
        assert relative(together[row], alone[0]) < FP32_PARITY
    with pytest.raises(ValueError, match="counted from 0"):
        interventions.on_rows(hooks[0][1], [])
