"""Positions are read in one way everywhere, and a cache records which of them it holds."""

from __future__ import annotations

import copy
import io
import pickle
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_hybrid import ActivationCache, HookedHybrid
from hooked_hybrid.analysis.activation_patching import generic_activation_patch
from hooked_hybrid.analysis.horizon import half_life
from hooked_hybrid.analysis.lens import logit_lens
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions import (
    ablate_heads,
    ablate_layers,
    edit_state,
    follow_span,
    freeze_state,
    hook_at,
    keep_top_heads,
    knock_out_crossings,
    knock_out_edges,
    manipulate_span,
    on_rows,
    patch,
)
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

N_POS = 9
LENGTHS = (9, 6)
FLAGS = [True, False, False, True, False, False, False, True, False]
CHOSEN = [0, 3, 7]
ATTENTION = 2
MASKS = {
    "a list": FLAGS,
    "an array": np.array(FLAGS),
    "a tensor": torch.tensor(FLAGS),
}
INDICES = {
    "a list": CHOSEN,
    "an array": np.array(CHOSEN),
    "a tensor": torch.tensor(CHOSEN),
    "small integers": torch.tensor(CHOSEN, dtype=torch.uint8),
    "numbers of numpy": [np.int64(i) for i in CHOSEN],
}
masks = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
chosen = pytest.mark.parametrize("positions", (MASKS | INDICES).values(), ids=MASKS | INDICES)
pads = pytest.mark.parametrize("side", ["left", "right"])
names = pytest.mark.parametrize("name", ["griffin", "jamba"])


@cache
def model_of(name: str = "griffin") -> HookedHybrid:
    cfg = griffin_config("RRAR", n_keys=5) if name == "griffin" else jamba_config("MMAM")
    return random_model(cfg, seed=2)


@pytest.fixture
def model():
    yield model_of()
    assert not model_of().attached()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """Return tokens of rows of `LENGTHS`, and their mask."""
    tokens, mask = random_tokens(len(LENGTHS), N_POS), torch.ones(len(LENGTHS), N_POS).long()
    for row, length in enumerate(LENGTHS):
        mask[row, slice(0, N_POS - length) if side == "left" else slice(length, None)] = 0
    return tokens, mask


def zero(value: Tensor, hook: Any) -> Tensor:
    return torch.zeros_like(value)


# --- one reader: hooks ----------------------------------------------------------------------------


@chosen
def test_hook_at_reads_a_mask_as_the_positions_where_it_is_true(model, positions):
    tokens, name = random_tokens(2, N_POS), "blocks.1.hook_resid_pre"
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(zero, CHOSEN))])
    got = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(zero, positions))])
    seen: list[int] = []
    note = lambda v, hook: seen.extend(hook.run.query_pos.unique().tolist())  # noqa: E731
    model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(note, positions))])
    assert torch.equal(got, wanted) and seen == CHOSEN


@chosen
def test_edit_state_and_patch_read_a_mask_as_the_positions_where_it_is_true(model, positions):
    tokens = random_tokens(2, N_POS)
    run = partial(model.run_with_hooks, tokens)
    assert torch.equal(
        run(fwd_hooks=edit_state(zero, positions)), run(fwd_hooks=edit_state(zero, CHOSEN))
    )
    _, other = model.run_with_cache(random_tokens(2, N_POS, 5))
    name = "blocks.1.hook_resid_pre"
    assert torch.equal(
        run(fwd_hooks=patch(other, name, positions=positions)),
        run(fwd_hooks=patch(other, name, positions=CHOSEN)),
    )
    assert torch.equal(
        run(fwd_hooks=knock_out_edges(positions, positions)),
        run(fwd_hooks=knock_out_edges(CHOSEN, CHOSEN)),
    )


def test_a_mask_of_rows_and_positions_acts_in_each_row_at_its_own(model):
    tokens, name = random_tokens(2, N_POS), "blocks.1.hook_resid_pre"
    per_row = torch.zeros(2, N_POS, dtype=torch.bool)
    per_row[0, 2] = per_row[1, 5] = True
    got = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(zero, per_row))])
    one = [(name, on_rows(hook_at(zero, 2), 0)), (name, on_rows(hook_at(zero, 5), 1))]
    torch.testing.assert_close(got, model.run_with_hooks(tokens, fwd_hooks=one))


@pytest.mark.parametrize("given", [slice(3, 6), range(3, 6), (3, 4, 5)], ids=str)
def test_a_slice_with_an_end_is_the_positions_it_holds(model, given):
    tokens, name = random_tokens(2, N_POS), "blocks.1.hook_resid_pre"
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(zero, [3, 4, 5]))])
    got = model.run_with_hooks(tokens, fwd_hooks=[(name, hook_at(zero, given))])
    assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    "rows",
    [[True, False, True], np.array([True, False, True]), torch.tensor([0, 2]), slice(0, 3, 2)],
)
def test_on_rows_reads_a_mask_as_the_rows_where_it_is_true(model, rows):
    tokens, name = random_tokens(3, N_POS), "blocks.1.hook_resid_pre"
    wanted = model.run_with_hooks(tokens, fwd_hooks=[(name, on_rows(zero, [0, 2]))])
    assert torch.equal(
        model.run_with_hooks(tokens, fwd_hooks=[(name, on_rows(zero, rows))]), wanted
    )


MISREAD = [2.0, [1, 2.5], True, [True, 2], torch.tensor([1.0]), "last", None, slice(3, None), [-1]]


@pytest.mark.parametrize("given", MISREAD, ids=str)
def test_positions_and_rows_that_would_be_misread_are_errors(given):
    for make in (lambda: hook_at(zero, given), lambda: on_rows(zero, given)):
        with pytest.raises((ValueError, AssertionError)):
            make()


def test_a_mask_that_ends_before_what_is_read_is_an_error(model):
    hook = ("blocks.1.hook_resid_pre", hook_at(zero, FLAGS[:-1]))
    with pytest.raises(ValueError, match=f"has {N_POS - 1}, and position {N_POS - 1} is read"):
        model.run_with_hooks(random_tokens(2, N_POS), fwd_hooks=[hook])


def test_a_row_that_the_batch_does_not_have_is_an_error(model):
    for rows, message in ((2, "2 rows"), ([True] * 3, "2 rows")):
        with pytest.raises(ValueError, match=message):
            model.run_with_hooks(
                random_tokens(2, N_POS), fwd_hooks=[("hook_embed", on_rows(zero, rows))]
            )


@pytest.mark.parametrize("flag", [True, [True, False], torch.tensor([True, False]), 1.5], ids=str)
def test_numbers_for_each_row_are_not_flags_nor_fractions(flag):
    cfg = model_of().cfg
    for make in (
        lambda: keep_top_heads(flag),
        lambda: freeze_state(flag),
        lambda: knock_out_crossings(cfg, flag),
        lambda: follow_span((1, 3), flag),
    ):
        with pytest.raises(ValueError, match="whole number|position"):
            make()


def test_spans_are_whole_numbers_and_may_be_an_array(model):
    with pytest.raises(ValueError, match="spans"):
        manipulate_span("null", (False, True))
    tokens, spans = random_tokens(2, N_POS), [[(1, 4)], [(2, 5)]]
    wanted = model.run_with_hooks(tokens, fwd_hooks=manipulate_span("null", spans))
    got = model.run_with_hooks(
        tokens, fwd_hooks=manipulate_span("null", np.array([[1, 4], [2, 5]]))
    )
    assert torch.equal(got, wanted)


# --- one reader: caches and states ----------------------------------------------------------------


@masks
def test_the_stacks_of_a_cache_read_a_mask_as_the_positions_where_it_is_true(model, mask):
    _, kept = model.run_with_cache(random_tokens(2, N_POS))
    for stack in (
        kept.accumulated_resid,
        kept.decompose_resid,
        kept.stack_head_results,
        partial(kept.stack_neuron_results, None),
    ):
        assert torch.equal(stack(pos_slice=mask), stack()[:, :, CHOSEN])
    assert torch.equal(
        logit_lens(model, kept, pos_slice=mask).values,
        logit_lens(model, kept, pos_slice=CHOSEN).values,
    )


@pytest.mark.parametrize(
    "rows", [[False, True, True], np.array([False, True, True]), torch.tensor([False, True, True])]
)
def test_rows_of_caches_and_states_read_a_mask_as_the_rows_where_it_is_true(model, rows):
    tokens = random_tokens(3, N_POS)
    _, kept = model.run_with_cache(tokens)
    _, state = model(tokens, return_state=True)
    assert state[rows] == state[[1, 2]]
    assert state.replace(state.fork(1), rows=rows).batch_size == 3
    some = kept.apply_slice_to_batch_dim(rows)
    assert all(torch.equal(some[name], kept[name][1:]) for name in kept)
    for wrong in ([True, False], [0.0], [1.5], 7):
        with pytest.raises((IndexError, ValueError)):
            state[wrong]
        with pytest.raises((IndexError, TypeError)):
            kept.apply_slice_to_batch_dim(wrong)


# --- where positions are counted ------------------------------------------------------------------


def uneven(name: str, model: HookedHybrid) -> dict[str, Any]:
    if name == "mask":
        return {"attention_mask": padded("left")[1]}
    if name == "segments":
        return {"segment_ids": torch.tensor([[1] * 4 + [2] * 5] * 2)}
    _, state = model(random_tokens(2, 5, 3), return_state=True)
    return {"state": state}


@pytest.mark.parametrize("kind", ["mask", "segments", "state"])
@pytest.mark.parametrize("pos", [7, slice(6, 8), [8, 6], "last"], ids=str)
def test_positions_are_counted_in_the_input_where_fewer_logits_are_kept(model, kind, pos):
    tokens, options = padded("left")[0], uneven(kind, model)
    whole = model(tokens, **options)
    wanted = whole[:, [8]] if pos == "last" else whole[:, [pos] if isinstance(pos, int) else pos]
    filter = ["unembed.hook_logits", "blocks.1.hook_resid_post"]
    _, kept = model.run_with_cache(
        tokens, names_filter=filter, pos_slice=pos, logits_to_keep=4, **options
    )
    by_hand, fwd, _ = model.get_caching_hooks(filter, pos_slice=pos)
    model.run_with_hooks(tokens, fwd_hooks=fwd, logits_to_keep=4, **options)
    added = model.add_caching_hooks(filter, pos_slice=pos)
    model(tokens, logits_to_keep=4, **options)
    model.reset_hooks()
    cap = model.cfg.logits_soft_cap
    for found in (kept, by_hand, added):
        logits = found["unembed.hook_logits"]
        torch.testing.assert_close(
            logits if cap is None else cap * torch.tanh(logits / cap), wanted
        )
    with pytest.raises(IndexError, match="hook_logits"):
        model.run_with_cache(tokens, pos_slice=5, logits_to_keep=3, names_filter=filter, **options)


@names
def test_a_long_padded_input_keeps_positions_in_pieces_as_it_does_whole(name):
    """In pieces, patterns come in blocks of queries with the keys these see."""
    model, tokens = model_of(name), random_tokens(2, 700)
    mask = torch.ones_like(tokens)
    mask[0, :530] = mask[1, 690:] = 0
    points = ["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_attn_scores", "hook_embed"]
    _, whole = model.run_with_cache(tokens, attention_mask=mask, names_filter=points)
    for pos in (slice(640, None), "last", [531, 689]):
        _, some = model.run_with_cache(
            tokens, attention_mask=mask, names_filter=points, pos_slice=pos
        )
        at = torch.tensor([[699], [689]])
        if pos != "last":
            at = torch.arange(700)[pos].expand(2, -1)
        for point in points:
            wanted = whole[point].movedim(model.hook_dict[point].pos_dim, 1)
            wanted = torch.stack([wanted[row, at[row]] for row in range(2)])
            found = some[point].movedim(model.hook_dict[point].pos_dim, 1)
            torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)
            assert torch.equal(some.positions(point), whole.positions(point).gather(1, at))


@pytest.mark.parametrize("n_keys", [None, 40])
def test_patterns_of_a_padded_generation_from_a_state_stand_at_their_keys(n_keys):
    """Each row's are those of one forward over all it has read, alone and without padding."""
    model = random_model(griffin_config("RA", n_keys=n_keys), seed=1)
    before, prompt = random_tokens(2, 5, 3), random_tokens(2, 70, 4)
    mask = torch.ones_like(prompt)
    mask[0, :9] = 0
    points = ["blocks.1.attn.hook_pattern", "blocks.1.attn.hook_attn_scores"]
    _, state = model(before, return_state=True)
    out = model.generate(
        prompt, 4, state=state, attention_mask=mask, names_filter=points, verbose=False,
        return_type="output", stop_at_eos=False,
    )  # fmt: skip
    for row in range(2):
        real = mask[row].bool()
        read = torch.cat([before[row], prompt[row][real], out.new_tokens[row, :-1]])
        _, alone = model.run_with_cache(read[None], names_filter=points)
        queries = torch.cat([real, torch.ones(3, dtype=torch.bool)])
        keys = torch.cat([torch.ones(5, dtype=torch.bool), queries])
        for point in points:
            got = out.cache[point][row][:, queries][..., keys]
            torch.testing.assert_close(got, alone[point][0][:, 5:], rtol=1e-4, atol=1e-5)
            assert (out.cache[point][row][..., ~keys] <= 0).all()
        assert torch.equal(
            out.cache.positions("pattern1")[row][queries], torch.arange(5, len(read))
        )


# --- a cache records its positions ----------------------------------------------------------------


@names
@pads
def test_a_padded_cache_is_read_as_each_row_alone(name, side):
    model, (tokens, mask) = model_of(name), padded(side)
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(kept.attention_mask, mask)
    for point in (
        "blocks.1.hook_resid_post",
        "blocks.2.attn.hook_pattern",
        "blocks.0.mixer.hook_conv",
    ):
        last, mean = kept.last_token(point), kept.mean_over_pos(point)
        rows = kept.unpadded(point)
        for row in range(2):
            _, alone = model.run_with_cache(tokens[row : row + 1][:, mask[row] > 0])
            dim = model.hook_dict[point].pos_dim
            torch.testing.assert_close(rows[row], alone[point][0], rtol=1e-4, atol=1e-5)
            if dim == 1:
                want = alone[point][0]
                torch.testing.assert_close(last[row], want[-1], rtol=1e-4, atol=1e-5)
                torch.testing.assert_close(mean[row], want.mean(0), rtol=1e-4, atol=1e-5)


@pads
def test_the_last_token_of_each_row_is_asked_for_by_name(model, side):
    tokens, mask = padded(side)
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    _, last = model.run_with_cache(tokens, attention_mask=mask, pos_slice="last")
    for name in kept:
        dim = model.hook_dict[name].pos_dim
        assert last[name].shape[dim] == 1
        torch.testing.assert_close(last[name].squeeze(dim), kept.last_token(name))
    at = torch.tensor([LENGTHS]).T - 1
    assert torch.equal(last.positions(), at)
    stack = kept.accumulated_resid(pos_slice="last")
    columns = at if side == "right" else torch.full_like(at, N_POS - 1)
    whole = kept.accumulated_resid()
    assert torch.equal(stack, torch.stack([whole[:, r, columns[r, 0]] for r in range(2)], 1))
    torch.testing.assert_close(last.accumulated_resid(pos_slice=-1), stack)
    torch.testing.assert_close(
        kept.logit_attrs(stack, 7, pos_slice="last"),
        torch.stack([kept.logit_attrs(whole, 7)[:, r, columns[r, 0]] for r in range(2)], 1),
    )


def test_a_single_position_that_is_padding_in_some_row_is_an_error_that_names_last(model):
    tokens, mask = padded("right")
    message = r"padding in row 1.*'last'"
    for pos in (-1, [0, 8]):
        with pytest.raises(ValueError, match=message):
            model.run_with_cache(tokens, attention_mask=mask, pos_slice=pos)
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    for read in (
        lambda: kept.accumulated_resid(pos_slice=-1),
        lambda: kept.decompose_resid(pos_slice=[7]),
        lambda: logit_lens(model, kept, pos_slice=-1),
    ):
        with pytest.raises(ValueError, match=message):
            read()
    assert kept.accumulated_resid(pos_slice=slice(6, 9)).shape[2] == 3


def test_what_is_kept_of_a_mask_follows_rows_and_the_batch_axis(model):
    tokens, mask = padded("left")
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    assert torch.equal(kept.apply_slice_to_batch_dim([1]).attention_mask, mask[1:])
    row = kept.apply_slice_to_batch_dim(1)
    assert torch.equal(row.attention_mask, mask[1])
    assert torch.equal(row.last_token("embed"), kept.last_token("embed")[1])
    assert torch.equal(row.accumulated_resid(pos_slice="last"), kept.accumulated_resid()[:, 1, -1])
    assert torch.equal(kept.to("cpu").attention_mask, mask)
    by_hand = ActivationCache(dict(kept), model, attention_mask=mask)
    assert torch.equal(by_hand.positions("pattern2"), kept.positions("pattern2"))
    with pytest.raises(ValueError, match="2 rows of 9"):
        ActivationCache(dict(kept), model, attention_mask=mask[:, 1:])


def test_a_cache_of_a_generation_marks_where_rows_ended(model):
    out = model.generate(
        random_tokens(2, 6), 4, names_filter="hook_embed", verbose=False, return_type="output",
        stop_at_eos=False,
    )  # fmt: skip
    assert torch.equal(out.cache.positions(), torch.arange(9).expand(2, -1))
    end = int(out.new_tokens[1, 1])
    out = model.generate(
        random_tokens(2, 6), 4, names_filter="hook_embed", verbose=False, return_type="output",
        eos_token_id=end,
    )  # fmt: skip
    n_read = [6 + (int((row == end).int().argmax()) if end in row else 3) for row in out.new_tokens]
    assert out.cache.attention_mask.sum(1).tolist() == n_read


# --- what reads caches by position ----------------------------------------------------------------


@pads
def test_patches_means_and_resampling_read_the_padding_of_a_cache(model, side):
    """A donor's padding need not be given again, and is nowhere in a mean."""
    tokens, mask = padded(side)
    _, donor = model.run_with_cache(tokens, attention_mask=mask)
    by_hand = dict(donor)
    own = random_tokens(2, 6, 8)
    run = partial(model.run_with_hooks, own)
    name = ("resid_pre", 1)
    full = "blocks.1.hook_resid_pre"
    for knows, told in (
        (patch(donor, name), patch(by_hand, full, attention_mask=mask)),
        (
            ablate_heads([(ATTENTION, 0)], "resample", donor),
            ablate_heads([(ATTENTION, 0)], "resample", by_hand, attention_mask=mask),
        ),
        (
            ablate_heads([(ATTENTION, 0)], "mean", donor),
            ablate_heads([(ATTENTION, 0)], "mean", by_hand, attention_mask=mask),
        ),
        (
            ablate_layers([0], "mlp", "mean", donor),
            ablate_layers([0], "mlp", "mean", by_hand, attention_mask=mask),
        ),
    ):
        assert torch.equal(run(fwd_hooks=knows), run(fwd_hooks=told))
    with pytest.raises(ValueError, match="not that of the run"):
        patch(donor, name, attention_mask=torch.ones_like(mask))
    grid = partial(
        generic_activation_patch, model, own, metric=lambda logits: logits[:, -1, 3].sum(),
        names=full, axes=("pos",), verbose=False,
    )  # fmt: skip
    torch.testing.assert_close(
        grid(clean_cache=donor).values,
        grid(clean_cache=by_hand, clean_attention_mask=mask).values,
    )
    half_life(donor, 0)


def test_resampling_from_a_cache_of_some_positions_reads_these_or_refuses(model):
    tokens, other = random_tokens(2, 6, 1), random_tokens(2, 6, 2)
    whole = model.run_with_cache(other)[1]
    some = model.run_with_cache(other, pos_slice=slice(2, None))[1]
    heads = [(ATTENTION, 0)]
    with pytest.raises(ValueError, match="none for position 0"):
        model.run_with_hooks(tokens, fwd_hooks=ablate_heads(heads, "resample", some))
    fewer = lambda kept: [  # noqa: E731
        (where, hook_at(fn, [3, 4])) for where, fn in ablate_heads(heads, "resample", kept)
    ]
    assert torch.equal(
        model.run_with_hooks(tokens, fwd_hooks=fewer(some)),
        model.run_with_hooks(tokens, fwd_hooks=fewer(whole)),
    )
    kept, fwd, _ = model.get_caching_hooks(pos_slice=slice(2, None))
    model.run_with_hooks(other, fwd_hooks=fwd)
    with pytest.raises(ValueError, match="none for position 0"):
        model.run_with_hooks(tokens, fwd_hooks=ablate_heads(heads, "resample", kept))


@pytest.mark.parametrize("point", ["resid_pre", "pattern", "attn_scores"])
def test_a_donor_that_continued_from_a_state_gives_its_values_at_their_positions(model, point):
    tokens = random_tokens(2, N_POS, 4)
    _, state = model(tokens[:, :5], return_state=True)
    point = ("resid_pre", 3) if point == "resid_pre" else (point, ATTENTION)
    every = {"names_filter": lambda name: True}
    donor = model.run_with_cache(tokens[:, 5:], state=state, **every)[1]
    whole = model.run_with_cache(tokens, **every)[1]
    run = partial(model.run_with_hooks, random_tokens(2, N_POS, 6))
    got = run(fwd_hooks=patch(donor, point, positions=[6, 8]))
    want = run(fwd_hooks=patch(whole, point, positions=[6, 8]))
    assert relative(got, want) < FP32_PARITY
    with pytest.raises(ValueError, match="none for position 2"):
        run(fwd_hooks=patch(donor, point, positions=2))


def test_a_packed_donor_is_refused(model):
    _, donor = model.run_with_cache(
        random_tokens(1, N_POS), segment_ids=torch.tensor([[1] * 4 + [2] * 5])
    )
    with pytest.raises(ValueError, match="positions 0 twice"):
        patch(donor, ("resid_pre", 1))


# --- caches as values -----------------------------------------------------------------------------


def test_a_cache_pickles_and_copies_without_its_model(model):
    tokens, mask = padded("left")
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    model_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    written = io.BytesIO()
    torch.save(kept, written)
    written.seek(0)
    small = model.run_with_cache(tokens, names_filter="hook_embed")[1]
    assert len(pickle.dumps(small)) < model_bytes / 10
    for other in (pickle.loads(pickle.dumps(kept)), torch.load(written, weights_only=False)):
        assert all(torch.equal(other[name], kept[name]) for name in kept)
        assert torch.equal(other["resid_post", -1], kept["resid_post", -1])
        assert torch.equal(other.last_token("pattern2"), kept.last_token("pattern2"))
        with pytest.raises(ValueError, match="cache.model = model"):
            other.accumulated_resid()
        other.model = model
        assert torch.equal(other.accumulated_resid(), kept.accumulated_resid())
    twin = copy.deepcopy(kept)
    assert twin.model is model and twin["embed"] is not kept["embed"]
    twin["embed"].zero_()
    assert kept["embed"].abs().max() > 0


@names
def test_a_cache_is_written_to_a_file_and_read_back(name, tmp_path):
    model, (tokens, mask) = model_of(name), padded("left")
    _, kept = model.run_with_cache(
        tokens, attention_mask=mask, incl_bwd=True, pos_slice=slice(2, None)
    )
    kept.save(tmp_path / "cache.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["cache.safetensors"]
    again = ActivationCache.load(tmp_path / "cache.safetensors", model)
    assert list(again) == list(kept) and all(torch.equal(again[n], kept[n]) for n in kept)
    assert torch.equal(again.attention_mask, mask[:, 2:])
    assert again.pos_slice == slice(2, None) and again.model is model
    assert torch.equal(again.decompose_resid(), kept.decompose_resid())
    ActivationCache.load(tmp_path / "cache.safetensors").mean_over_pos(("resid_post", -1))
    other = model_of("jamba" if name == "griffin" else "griffin")
    with pytest.raises(ValueError, match="which this model does not have"):
        ActivationCache.load(tmp_path / "cache.safetensors", other)
    save_file(dict(kept), tmp_path / "plain.safetensors")
    assert load_file(tmp_path / "plain.safetensors").keys() == set(kept)
    with pytest.raises(ValueError, match="holds no cache"):
        ActivationCache.load(tmp_path / "plain.safetensors")


def test_what_was_not_kept_is_an_error_that_says_how_to_keep_it():
    model = model_of("jamba")
    _, kept = model.run_with_cache(random_tokens(1, 4))
    for key, name in (
        (("ssm_state", 0), "blocks.0.mixer.hook_ssm_state"),
        (("result", ATTENTION), "blocks.2.attn.hook_result"),
        ("ssm_decay1", "blocks.1.mixer.hook_ssm_decay"),
    ):
        with pytest.raises(HookNameError, match="was not kept, as it is large") as error:
            kept[key]
        assert f"names_filter=[{name!r}]" in str(error.value) and key not in kept
        _, alone = model.run_with_cache(random_tokens(1, 4), names_filter=[name])
        assert key in alone
    with pytest.raises(HookNameError, match="incl_bwd=True"):
        kept["resid_post_grad", 0]


@pytest.mark.parametrize("leaf", ["pattern", "hook_pattern", "attn", "ssm_state", "resid_posts"])
def test_a_leaf_without_its_layer_names_points_that_have_it(model, leaf):
    with pytest.raises(HookNameError, match=r"nearest are blocks\.\d") as error:
        model.run_with_cache(random_tokens(1, 4), names_filter=leaf)
    wanted = {"attn": "pattern", "resid_posts": "resid_post"}.get(leaf, leaf.removeprefix("hook_"))
    assert f"hook_{wanted}" in str(error.value)


# --- who owns a tensor ----------------------------------------------------------------------------


@names
def test_values_states_and_outputs_share_no_memory(name):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    (logits, state), kept = model.run_with_cache(
        tokens, names_filter=lambda n: True, return_state=True
    )
    before = {n: v.clone() for n, v in kept.items()}
    given, after = logits.clone(), copy.deepcopy(state)
    for changed in kept.values():
        changed.fill_(7)
    assert torch.equal(given, logits) and state == after
    _, fresh = model.run_with_cache(tokens, names_filter=lambda n: True)
    for n, value in fresh.items():
        value.fill_(5)
        assert all(
            torch.equal(fresh[m], before[m]) for m in list(fresh)[list(fresh).index(n) + 1 :]
        )


def test_what_a_hook_kept_is_not_the_states(model):
    kept: list[Tensor] = []
    points = [f"blocks.{ATTENTION}.attn.hook_{leaf}" for leaf in ("k", "rot_k", "v")]
    with model.hooks([(name, lambda v, hook: kept.append(v)) for name in points]):
        _, state = model(random_tokens(2, N_POS), return_state=True)
    before = copy.deepcopy(state)
    for value in kept:
        value.zero_()
    assert state == before


def test_rows_of_states_and_caches_are_copies(model):
    tokens = random_tokens(3, N_POS)
    _, state = model(tokens, return_state=True)
    before = copy.deepcopy(state)
    for part in (state[0:2], state[1], state.clone(), state.fork(1)):
        for t in part.tensors().values():
            t.zero_()
    assert state == before
    _, kept = model.run_with_cache(tokens)
    for some in (kept.apply_slice_to_batch_dim((0, 2)), kept.apply_slice_to_batch_dim(1)):
        for value in some.values():
            value.zero_()
    assert kept["embed"].abs().min() > 0


def test_a_slice_of_no_layers_returns_a_copy_of_the_stream(model):
    resid = torch.randn(1, 4, model.cfg.d_model)
    out = model(resid, start_at_layer=1, stop_at_layer=1)
    assert torch.equal(out, resid) and out is not resid
    out.zero_()
    assert resid.abs().min() > 0


def test_caching_hooks_keep_what_stood_before_an_edit_in_place(model):
    """Attached before the edit, they keep what stood before it."""

    def clear(value: Tensor, hook: Any) -> None:
        value[:, 1] = 0

    tokens, name = random_tokens(1, 4), "blocks.1.hook_resid_post"
    kept = model.add_caching_hooks(name)
    wanted = model.run_with_cache(tokens, names_filter=name)[1][name]
    model.run_with_hooks(tokens, fwd_hooks=[(name, clear)])
    model.reset_hooks()
    assert torch.equal(kept[name], wanted)


def test_a_cache_can_be_made_under_vmap(model):
    streams, name = torch.randn(2, 3, model.cfg.d_model), "blocks.1.hook_resid_post"

    def kept(resid: Tensor) -> Tensor:
        return model.run_with_cache(resid[None], start_at_layer=0, names_filter=name)[1][name]

    alone = torch.stack([kept(resid) for resid in streams])
    torch.testing.assert_close(torch.func.vmap(kept)(streams), alone)
