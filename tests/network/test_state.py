"""Properties of HybridState: a value that can be picked apart, saved, exchanged and continued."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.network.block_state import AttentionState, RecurrentState
from hooked_hybrid.network.state import HybridState
from tests.loops import looped
from tests.models import griffin_config, random_model, random_tokens, tiny_model

N_KEYS, N_LAYERS = 7, 4
ATTENTION, RECURRENT = 2, (0, 1, 3)
KIND = {"k": "kv", "v": "kv", "pos": "kv", "conv": "conv", "ssm": "ssm"}
SHORT, LONG = 4, 12  # fewer keys than the window holds, and more


def floating(config: str) -> list[str]:
    return [name for name, point in model_of(config).hook_dict.items() if not point.is_integer]


model_of = cache(tiny_model)


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return random_model(griffin_config("RRAR", n_keys=N_KEYS))


@pytest.fixture
def state(model) -> HybridState:
    """Three rows, each after other tokens."""
    return state_after(model, random_tokens(3, LONG))


@pytest.fixture
def uneven(model) -> HybridState:
    """Three rows after 3, 12 and 8 tokens."""
    mask = torch.zeros(3, LONG, dtype=torch.long)
    for row, n in enumerate((3, 12, 8)):
        mask[row, :n] = 1
    return state_after(model, random_tokens(3, LONG), attention_mask=mask)


def state_after(model: HookedHybrid, tokens: Tensor, **options: Any) -> HybridState:
    return model(tokens, return_type=None, return_state=True, **options)[1]


def same(a: HybridState, b: HybridState) -> bool:
    """Whether two states are equal in every bit."""
    mine, theirs = a.tensors(), b.tensors()
    return (
        mine.keys() == theirs.keys()
        and a.n_seen == b.n_seen
        and all(
            t.dtype == theirs[n].dtype
            and t.device == theirs[n].device
            and torch.equal(t, theirs[n])
            for n, t in mine.items()
        )
    )


def copied(state: HybridState) -> HybridState:
    tensors = {name: t.clone() for name, t in state.tensors().items()}
    return HybridState.from_tensors(tensors, state.n_seen)


def parts(state: HybridState) -> dict[tuple[int, str], Tensor]:
    """Return the tensors of the blocks by layer and name."""
    return {(i, n): t for i, block in enumerate(state.blocks) for n, t in vars(block).items()}


def real_keys(block: Any, row: int) -> tuple[list[int], Tensor, Tensor]:
    at = block.pos[row] >= 0
    return block.pos[row, at].tolist(), block.k[row, at], block.v[row, at]


def continued(model: HookedHybrid, state: HybridState) -> Tensor:
    """Return the logits of the same five more tokens for every row."""
    more = random_tokens(1, 5, seed=77).repeat(state.batch_size, 1)
    return model(more, state=state)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5)


# --- what a state is --------------------------------------------------------------------------


def test_a_block_of_state_is_of_the_kind_of_its_layer(state):
    assert state.batch_size == 3 and len(state.blocks) == N_LAYERS
    assert isinstance(state.blocks[ATTENTION], AttentionState)
    assert all(isinstance(state.blocks[i], RecurrentState) for i in RECURRENT)


def test_an_attention_layer_keeps_the_keys_a_later_token_may_see_oldest_first(state, model):
    block = state.blocks[ATTENTION]
    assert block.pos.tolist() == [list(range(LONG - N_KEYS + 1, LONG))] * 3
    assert block.k.shape == block.v.shape == (3, N_KEYS - 1, 1, 8)
    assert state.next_pos.tolist() == [LONG] * 3
    short = state_after(model, random_tokens(2, SHORT))
    assert short.blocks[ATTENTION].pos.tolist() == [list(range(SHORT))] * 2


def test_rows_of_unequal_lengths_have_empty_places_at_minus_one(uneven):
    assert uneven.next_pos.tolist() == [3, 12, 8]
    assert uneven.blocks[ATTENTION].pos.tolist() == [
        [-1, -1, -1, 0, 1, 2],
        [6, 7, 8, 9, 10, 11],
        [2, 3, 4, 5, 6, 7],
    ]


def test_n_bytes_is_the_memory_of_all_tensors(state):
    per_row = 3 * (3 * 32 + 32) * 4 + (N_KEYS - 1) * (2 * 8 * 4 + 8) + 8 + 8
    assert state.n_bytes == 3 * per_row
    assert state.fork(2).n_bytes == 2 * state.n_bytes
    assert state[0].n_bytes * 3 == state.n_bytes


def test_a_state_cannot_be_written_to(state):
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.next_pos = torch.zeros(3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        state.blocks[0].ssm = torch.zeros(3)


def test_states_are_equal_where_all_they_hold_is(state):
    assert state == state.clone() and state != state[[0, 0]]
    assert state.n_seen is not None
    assert state != dataclasses.replace(state, n_seen=None)
    assert state != dataclasses.replace(state, next_pos=state.next_pos + 1)
    for name in state.tensors():
        other = {k: t + (k == name) for k, t in state.tensors().items()}
        assert state != HybridState.from_tensors(other, state.n_seen), name
    assert state != "state"


def test_tensors_are_named_by_block_and_rebuild_the_state(state):
    names = set(state.tensors())
    assert {"next_pos", "segment", "blocks.0.conv", "blocks.0.ssm"} <= names
    assert {"blocks.2.k", "blocks.2.v", "blocks.2.pos"} <= names and len(names) == 11
    assert same(HybridState.from_tensors(state.tensors(), state.n_seen), state)


def test_blocks_are_rebuilt_in_order_beyond_ten_layers(state):
    deep = dataclasses.replace(state, blocks=state.blocks * 3)
    tensors = dict(sorted(deep.tensors().items()))  # blocks.10 sorts before blocks.2
    assert same(HybridState.from_tensors(tensors, deep.n_seen), deep)


# --- rows -------------------------------------------------------------------------------------


def test_fork_repeats_each_row_next_to_itself(state):
    forked = state.fork(2)
    assert forked.batch_size == 6
    assert same(forked, state[[0, 0, 1, 1, 2, 2]])
    assert same(state.fork(1), state)


@pytest.mark.parametrize("n", [0, -1])
def test_fork_into_no_copies_is_refused(state, n):
    with pytest.raises(ValueError, match=rf"fork\({n}\).*1 or more"):
        state.fork(n)


def test_forks_continue_apart_from_each_other(model, state):
    forked = state[0].fork(2)
    more = random_tokens(2, 4, seed=9)
    logits = model(more, state=forked)
    for row in range(2):
        assert_close(logits[row], model(more[row : row + 1], state=state[0])[0])


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1, [1]),
        (-1, [2]),
        (slice(1, None), [1, 2]),
        (slice(None, None, 2), [0, 2]),
        (slice(5, 9), []),
        ([2, 0, 2], [2, 0, 2]),
        ([-1, -3], [2, 0]),
        ((0, 1), [0, 1]),
        (range(2), [0, 1]),
        (torch.tensor([1, 0]), [1, 0]),
        (torch.tensor(2), [2]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([False, True, False], [1]),
        (torch.tensor([False] * 3), []),
        ([], []),
    ],
    ids=str,
)
def test_rows_are_picked_in_the_order_given_and_keep_the_batch_axis(uneven, rows, wanted):
    some = uneven[rows]
    assert some.batch_size == len(wanted)
    for name, t in some.tensors().items():
        assert torch.equal(t, uneven.tensors()[name][torch.tensor(wanted, dtype=torch.long)]), name


@pytest.mark.parametrize("rows", [3, -4, [0, 3], torch.tensor([-4])], ids=str)
def test_a_row_outside_is_an_index_error_that_says_how_many_there_are(state, rows):
    with pytest.raises(IndexError, match="3 rows"):
        state[rows]


@pytest.mark.parametrize("rows", [0.5, [0.5], "0", torch.tensor([0.5])])
def test_rows_that_are_no_numbers_of_rows_are_refused(state, unchecked, rows):
    with pytest.raises(ValueError, match="rows"):
        state[rows]
    with pytest.raises(ValueError, match="rows"):
        state.replace(state, rows=rows)


@pytest.mark.parametrize("mask", [[True, False], torch.ones(4, dtype=torch.bool)], ids=str)
def test_a_row_mask_of_another_length_is_refused(state, mask):
    with pytest.raises(IndexError, match="3 rows"):
        state[mask]


def test_picked_rows_continue_as_they_do_among_the_others(model, uneven):
    whole = continued(model, uneven)
    assert_close(continued(model, uneven[[2, 0]]), whole[[2, 0]])


def test_cat_puts_rows_in_order_and_undoes_picking(model, state, uneven):
    assert same(HybridState.cat([state[:1], state[1:]]), state)
    assert same(HybridState.cat([uneven[0], uneven[1], uneven[2]]), uneven)
    assert same(HybridState.cat([state]), state)


def test_cat_of_unequal_lengths_fills_up_on_the_left_and_changes_no_continuation(model, state):
    short = state_after(model, random_tokens(2, SHORT, seed=3))
    both = HybridState.cat([short, state])
    assert both.next_pos.tolist() == [SHORT] * 2 + [LONG] * 3
    assert both.blocks[ATTENTION].pos[0].tolist() == [-1, -1, 0, 1, 2, 3]
    assert both.n_seen is None
    expected = torch.cat([continued(model, short), continued(model, state)])
    assert_close(continued(model, both), expected)


def test_cat_takes_states_of_one_model(state):
    with pytest.raises(ValueError, match="one or more"):
        HybridState.cat([])
    fewer = dataclasses.replace(state, blocks=state.blocks[:3])
    with pytest.raises(ValueError, match="one model"):
        HybridState.cat([state, fewer])
    turned = dataclasses.replace(state, blocks=state.blocks[::-1])
    with pytest.raises(ValueError, match="one model"):
        HybridState.cat([state, turned])


# --- parts of another state -------------------------------------------------------------------


@pytest.fixture
def donor(model) -> HybridState:
    return state_after(model, random_tokens(3, LONG, seed=8))


@pytest.mark.parametrize("layers", [None, [0, 2], [ATTENTION], []], ids=str)
@pytest.mark.parametrize("kinds", [("ssm", "conv", "kv"), ("ssm",), ("conv",), ("kv",), "kv", ()])
def test_replace_takes_the_kinds_and_layers_asked_for_and_nothing_else(state, donor, kinds, layers):
    mixed = state.replace(donor, kinds=kinds, layers=layers)
    chosen = {kinds} if isinstance(kinds, str) else set(kinds)
    for (layer, name), t in parts(mixed).items():
        takes = KIND[name] in chosen and (layers is None or layer in layers)
        assert torch.equal(t, parts(donor if takes else state)[layer, name]), (layer, name)
    assert torch.equal(mixed.next_pos, state.next_pos)
    assert torch.equal(mixed.segment, state.segment)


def test_replace_of_everything_continues_as_the_donor_where_positions_are_alike(
    model, state, donor
):
    assert_close(continued(model, state.replace(donor)), continued(model, donor))
    assert not torch.allclose(continued(model, state), continued(model, donor), atol=1e-3)


@pytest.mark.parametrize(
    ("rows", "wanted"),
    [
        (1, [1]),
        (-1, [2]),
        ([0, 2], [0, 2]),
        (slice(1, None), [1, 2]),
        (torch.tensor([True, False, True]), [0, 2]),
        ([], []),
        (None, [0, 1, 2]),
    ],
    ids=str,
)
def test_replace_gives_to_the_rows_asked_for_from_the_same_rows(state, donor, rows, wanted):
    mixed = state.replace(donor, rows=rows)
    for key, t in parts(mixed).items():
        for row in range(3):
            source = donor if row in wanted else state
            assert torch.equal(t[row], parts(source)[key][row]), (key, row)


def test_replace_leaves_both_states_as_they_were(state, donor):
    mine, theirs = copied(state), copied(donor)
    state.replace(donor)
    state.replace(donor, kinds="kv", rows=[0])
    assert same(state, mine) and same(donor, theirs)


@pytest.mark.parametrize(("n_mine", "n_theirs"), [(SHORT, LONG), (LONG, SHORT), (2, SHORT)])
def test_replace_between_unequal_numbers_of_keys_fills_up_on_the_left(model, n_mine, n_theirs):
    mine, theirs = (state_after(model, random_tokens(2, n, seed=n)) for n in (n_mine, n_theirs))
    mixed = mine.replace(theirs, kinds="kv", rows=[1])
    for row, source in ((0, mine), (1, theirs)):
        found = real_keys(mixed.blocks[ATTENTION], row)
        wanted = real_keys(source.blocks[ATTENTION], row)
        assert found[0] == wanted[0]
        assert torch.equal(found[1], wanted[1]) and torch.equal(found[2], wanted[2])
    pos = mixed.blocks[ATTENTION].pos
    n_keys = [min(n, N_KEYS - 1) for n in (n_mine, n_theirs)]
    assert pos.shape[1] == max(n_keys)
    assert [(row >= 0).int().diff().min().item() >= 0 for row in pos] == [True, True]
    assert mixed.next_pos.tolist() == [n_mine] * 2
    # The row that received nothing goes on as before; rows are not assumed to be alike any more.
    assert_close(continued(model, mixed)[0], continued(model, mine)[0])


def test_keys_of_a_donor_are_seen_at_their_own_positions(model):
    """A state given every part of a donor with other positions differs from it in those alone."""
    mine, theirs = (state_after(model, random_tokens(1, n, seed=n)) for n in (8, 10))
    moved = mine.replace(theirs)
    moved = dataclasses.replace(moved, next_pos=theirs.next_pos)
    assert_close(continued(model, moved), continued(model, theirs))


def test_replace_without_keys_keeps_what_is_known_of_the_rows(state, donor):
    assert state.replace(donor, kinds=("ssm", "conv")).n_seen == state.n_seen == LONG
    assert state.replace(donor, kinds=("kv",)).n_seen is None


def test_the_dtype_stays_that_of_the_receiving_state(state, donor):
    mixed = state.replace(donor.to(dtype=torch.bfloat16))
    assert {n: t.dtype for n, t in mixed.tensors().items()} == {
        n: t.dtype for n, t in state.tensors().items()
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("ssm", "keys")}, "'ssm', 'conv' and 'kv'.*keys"),
        ({"kinds": "attention"}, "attention"),
        ({"layers": [4]}, r"\[4\].*4"),
        ({"layers": [-1]}, r"\[-1\]"),
        ({"rows": 3}, "3 rows"),
        ({"rows": [0, -4]}, "3 rows"),
        ({"rows": torch.tensor([True, False])}, "3 rows"),
    ],
    ids=str,
)
def test_replace_refuses_what_does_not_exist(state, donor, options, message):
    with pytest.raises((ValueError, IndexError), match=message):
        state.replace(donor, **options)


def test_replace_refuses_a_donor_of_another_batch_or_model(state, donor):
    with pytest.raises(ValueError, match="2 rows.*3"):
        state.replace(donor[:2])
    with pytest.raises(ValueError, match="3 blocks"):
        state.replace(dataclasses.replace(donor, blocks=donor.blocks[:3]))
    with pytest.raises(ValueError, match="kinds"):
        state.replace(dataclasses.replace(donor, blocks=donor.blocks[::-1]))
    wide = state_after(random_model(griffin_config("RRAR", d_rnn=64)), random_tokens(3, LONG))
    with pytest.raises(ValueError, match=r"64.*32"):
        state.replace(wide)


# --- moving and saving ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_to_changes_keys_values_and_convolution_inputs_and_keeps_the_recurrence_wide(state, dtype):
    moved = state.to(dtype=dtype)
    for (layer, name), t in parts(moved).items():
        before = parts(state)[layer, name]
        if name in ("k", "v", "conv"):
            assert t.dtype == dtype and torch.equal(t, before.to(dtype))
        else:
            assert t.dtype == before.dtype and torch.equal(t, before)
    assert parts(moved)[0, "ssm"].dtype == torch.float32
    assert torch.equal(moved.next_pos, state.next_pos) and moved.n_seen == state.n_seen


def test_to_moves_every_tensor_to_a_device(state):
    moved = state.to("meta")
    assert {t.device.type for t in moved.tensors().values()} == {"meta"}
    assert moved.device.type == "meta" and state.device.type == "cpu"
    assert moved.n_bytes == state.n_bytes


def test_to_nothing_changes_nothing(state):
    assert same(state.to(), state)


@pytest.mark.parametrize("which", ["state", "uneven"])
def test_a_saved_state_is_read_back_in_every_bit(tmp_path, request, which):
    state = request.getfixturevalue(which)
    path = tmp_path / "after.safetensors"
    state.save(path)
    assert same(HybridState.load(path), state)
    assert [p.name for p in tmp_path.iterdir()] == ["after.safetensors"], "nothing is left over"


def test_views_and_narrow_dtypes_are_saved_too(tmp_path, state):
    for i, some in enumerate((state[1:], state[::2], state.to(dtype=torch.bfloat16), state[0:0])):
        some.save(str(tmp_path / f"{i}"))
        assert same(HybridState.load(str(tmp_path / f"{i}")), some)


def test_saving_again_replaces_the_file(tmp_path, state, donor):
    path = tmp_path / "state"
    state.save(path)
    donor.save(path)
    assert same(HybridState.load(path), donor)


def test_a_failed_save_leaves_the_old_file(tmp_path, state, donor, monkeypatch):
    path = tmp_path / "state"
    state.save(path)

    def fail(*_: Any, **__: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hooked_hybrid.network.state.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        donor.save(path)
    assert same(HybridState.load(path), state)


def test_what_is_no_state_file_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        HybridState.load(tmp_path / "nowhere")
    (tmp_path / "text").write_text("not a state")
    with pytest.raises(safetensors.SafetensorError):
        HybridState.load(tmp_path / "text")


@pytest.mark.parametrize("n_seen", ["-1", "-0.5", "1.5", "true", '"3"', "[3]"])
def test_a_count_of_tokens_that_cannot_be_is_an_error(tmp_path, state, n_seen):
    save_file(dict(state.clone().tensors()), tmp_path / "state", {"n_seen": n_seen})
    with pytest.raises(ValueError, match="holds no whole state .n_seen="):
        HybridState.load(tmp_path / "state")


def test_a_count_of_no_tokens_is_one(tmp_path, state):
    save_file(dict(state.clone().tensors()), tmp_path / "state", {"n_seen": "0"})
    assert HybridState.load(tmp_path / "state").n_seen == 0


def test_a_loaded_state_continues_bit_for_bit(tmp_path, model, uneven):
    uneven.save(tmp_path / "state")
    loaded = HybridState.load(tmp_path / "state")
    assert torch.equal(continued(model, loaded), continued(model, uneven))


# --- a state is a value -----------------------------------------------------------------------


def zero_in_place(value: Tensor, hook: HookPoint) -> None:
    value.zero_()


def weaken(value: Tensor, hook: HookPoint) -> Tensor:
    """An edit that is legal everywhere."""
    return 0.75 * value


def weaken_in_place(value: Tensor, hook: HookPoint) -> None:
    value.mul_(0.75)


@pytest.mark.parametrize("which", ["state", "uneven"])
@pytest.mark.parametrize(
    "use",
    [
        lambda m, s: m(random_tokens(3, 5), state=s, return_state=True),
        lambda m, s: m(random_tokens(3, 1), state=s),
        lambda m, s: m(random_tokens(3, 5), "loss", state=s),
        lambda m, s: m.run_with_cache(
            random_tokens(3, 5), state=s, names_filter=lambda n: True, incl_bwd=True
        ),
        lambda m, s: m(random_tokens(3, 100), state=s),
        lambda m, s: m.generate(random_tokens(3, 2), 9, state=s, verbose=False),
        lambda m, s: m.generate(
            random_tokens(3, 2),
            4,
            state=s,
            verbose=False,
            names_filter=lambda n: True,
            return_type="output",
        ),
        lambda m, s: m.run_with_hooks(
            random_tokens(3, 3), state=s, fwd_hooks=[(lambda n: "scale" not in n, zero_in_place)]
        ),
        lambda m, s: m(
            random_tokens(3, 4), state=s, attention_mask=torch.tensor([[0, 0, 1, 1]] * 3)
        ),
        lambda m, s: m(random_tokens(3, 4), state=s, segment_ids=torch.tensor([[1, 2, 2, 3]] * 3)),
    ],
    ids="forward one_token loss gradients long generate recording in_place padded packed".split(),
)
def test_a_state_passed_in_is_unchanged_in_every_bit(model, request, which, use):
    state = request.getfixturevalue(which)
    before = copied(state)
    with torch.no_grad():
        use(model, state)
    assert same(state, before)


def test_a_state_can_be_continued_many_times_with_the_same_result(model, state):
    first = continued(model, state)
    model.generate(random_tokens(3, 2), 3, state=state, verbose=False)
    assert torch.equal(continued(model, state), first)


def test_later_forwards_do_not_reach_into_an_earlier_state(model, state):
    states = [state]
    for token in random_tokens(3, 4, seed=6).split(1, dim=1):
        states.append(state_after(model, token, state=states[-1]))
    copies = [copied(s) for s in states]
    state_after(model, random_tokens(3, 9), state=states[-1])
    assert all(same(s, c) for s, c in zip(states, copies, strict=True))
    assert [s.next_pos[0].item() for s in states] == [12, 13, 14, 15, 16]


@pytest.mark.parametrize("config", ["griffin", "jamba"])
@looped("name", floating)
def test_an_edit_in_place_is_the_same_edit_returned(config, name):
    """In the logits, in the state, and in every other value, computed before it or after."""
    model, tokens = model_of(config), random_tokens(2, 6)
    others = [n for n in model.hook_dict if n != name]

    def run(fn: Callable[..., Any]) -> tuple[Tensor, HybridState, dict[str, Tensor]]:
        cached, watchers, _ = model.get_caching_hooks(others)
        hooks = [*watchers, (name, fn)]
        logits, state = model.run_with_hooks(tokens, fwd_hooks=hooks, return_state=True)
        return logits, state, dict(cached)

    (logits, state, values), (expected, wanted, others_wanted) = run(weaken_in_place), run(weaken)
    assert [n for n in others if not torch.equal(values[n], others_wanted[n])] == []
    assert torch.equal(logits, expected)
    assert same(state, wanted)


# --- states that do not fit -------------------------------------------------------------------


def refused(model: HookedHybrid, state: Any, message: str, batch: int = 3) -> None:
    tokens = random_tokens(batch, 2)
    for use in (
        lambda: model(tokens, state=state),
        lambda: model.generate(tokens, 2, state=state, verbose=False),
    ):
        with pytest.raises(ValueError, match=message):
            use()


def test_a_state_of_another_batch_is_refused_with_the_remedy(model, state):
    refused(model, state, r"3 rows and the input 2.*fork.*state\[rows\]", batch=2)


@pytest.mark.parametrize(
    "other",
    ["RRA", "RRRA", "AARR"],
)
def test_a_state_of_a_model_with_other_layers_is_refused(model, other):
    theirs = state_after(random_model(griffin_config(other)), random_tokens(3, 5))
    refused(model, theirs, "another model's")


@pytest.mark.parametrize(
    "changes", [{"d_rnn": 64}, {"d_conv": 3}, {"d_head": 4}, {"n_kv_heads": 2}], ids=str
)
def test_a_state_of_a_model_with_other_widths_is_refused_by_block(model, changes):
    theirs = state_after(random_model(griffin_config("RRAR", **changes)), random_tokens(3, 5))
    refused(model, theirs, r"block \d.*another model's")


def test_a_state_in_another_dtype_is_refused_with_the_remedy(model, state):
    refused(model, state.to(dtype=torch.bfloat16), r"bfloat16.*float32.*state\.to\(dtype=")


def test_a_state_on_another_device_is_refused_with_the_remedy(model, state):
    meta = dataclasses.replace(state, blocks=state.to("meta").blocks)
    refused(model, meta, r"block 0.*meta.*cpu.*state\.to\(device\)")


def test_what_is_no_state_is_refused(model, unchecked):
    refused(model, {"k": torch.zeros(1)}, "dict; give a HybridState")


def test_a_partial_forward_takes_and_returns_no_state(model, state):
    for options in ({"state": state}, {"return_state": True}):
        with pytest.raises(ValueError, match="every layer"):
            model(random_tokens(3, 2), stop_at_layer=2, **options)
