"""States share memory behind their keys, and stay values all the same."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HybridState
from hooked_hybrid.network.attention.key_room import last_keys, with_new_keys
from hooked_hybrid.network.block_state import AttentionState
from tests.models import (
    griffin_config,
    jamba_config,
    random_model,
    random_tokens,
    relative,
)
from tests.tolerances import FP32_PARITY

CONFIGS = {
    "window": griffin_config("RA"),
    "global": jamba_config("MA", n_experts=1),
}
BATCH = 2
PROMPT = 5
pytestmark = pytest.mark.usefixtures("unchecked")  # checks take three quarters of a step
ROOM = 64
"""Steps after which the room that the first one makes is full."""
LONG = ROOM + 8

models = pytest.mark.parametrize("name", list(CONFIGS))
modes = pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])


@cache
def model_of(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name])


def tokens_of(seed: int, n: int = 1) -> Tensor:
    return random_tokens(BATCH, n, seed=seed)


def prompt_state(name: str) -> HybridState:
    return model_of(name)(tokens_of(0, PROMPT), return_state=True)[1]


def step(name: str, state: HybridState, tokens: Tensor) -> tuple[Tensor, HybridState]:
    return model_of(name)(tokens, state=state, return_state=True)


def decoded(name: str, state: HybridState, tokens: Tensor) -> tuple[list[Tensor], HybridState]:
    """Return the logits of each token, run one after another, and the last state."""
    logits = []
    for t in range(tokens.shape[1]):
        out, state = step(name, state, tokens[:, t : t + 1])
        logits.append(out)
    return logits, state


def snapshot(state: HybridState) -> HybridState:
    """Return a state that shares no memory with another."""
    return HybridState.from_tensors(
        {n: t.clone() for n, t in state.tensors().items()}, state.n_seen
    )


def keys_of(state: HybridState) -> AttentionState:
    return next(block for block in state.blocks if isinstance(block, AttentionState))


def memory_of(state: HybridState) -> int:
    return keys_of(state).k.untyped_storage().data_ptr()


def keys(n: int, seed: int = 0, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(BATCH, n, 1, 3, generator=generator) for _ in range(2))
    return k, v, (torch.arange(n) + first).expand(BATCH, -1)


def assert_holds(state: AttentionState, parts: Sequence[tuple[Tensor, Tensor, Tensor]]) -> None:
    for got, wanted in zip((state.k, state.v, state.pos), zip(*parts, strict=True), strict=True):
        assert torch.equal(got, torch.cat(wanted, dim=1))


# --- the room itself ------------------------------------------------------------------------------


@torch.no_grad()
def test_appended_keys_follow_the_old_ones_and_share_their_memory():
    parts = [keys(PROMPT)]
    state = with_new_keys(None, *parts[0])
    spaces = []
    for t in range(3 * ROOM):
        parts.append(keys(1, seed=t, first=PROMPT + t))
        state = with_new_keys(state, *parts[-1])
        spaces.append(state.k.untyped_storage().data_ptr())
        assert_holds(state, parts)
    moves = sum(a != b for a, b in pairwise(spaces))
    assert 1 <= moves <= 4


@torch.no_grad()
def test_only_the_first_continuation_takes_the_room():
    old = with_new_keys(with_new_keys(None, *keys(4)), *keys(1, 1))
    first = with_new_keys(old, *keys(2, 2))
    second = with_new_keys(old, *keys(2, 3))
    third = with_new_keys(first, *keys(1, 4))
    assert first.k.data_ptr() == old.k.data_ptr() == third.k.data_ptr()
    assert second.k.data_ptr() != old.k.data_ptr()
    start = [keys(4), keys(1, 1)]
    assert_holds(old, start)
    assert_holds(first, [*start, keys(2, 2)])
    assert_holds(second, [*start, keys(2, 3)])
    assert_holds(third, [*start, keys(2, 2), keys(1, 4)])


@torch.no_grad()
def test_the_last_keys_of_a_state_may_be_continued_in_its_room_once():
    old = with_new_keys(with_new_keys(None, *keys(6)), *keys(1, 1))
    last = last_keys(old, 4)
    first = with_new_keys(last, *keys(1, 2))
    second = with_new_keys(old, *keys(1, 3))
    assert first.k.untyped_storage().data_ptr() == old.k.untyped_storage().data_ptr()
    whole = [torch.cat(pair, dim=1) for pair in zip(keys(6), keys(1, 1), strict=True)]
    tail = tuple(t[:, -4:] for t in whole)
    assert_holds(last, [tail])
    assert_holds(first, [tail, keys(1, 2)])
    assert_holds(second, [tuple(whole), keys(1, 3)])


@torch.no_grad()
def test_few_of_many_keys_do_not_keep_the_others_in_memory():
    many = with_new_keys(None, *keys(100))
    assert last_keys(many, 100) is many and last_keys(many, 200) is many
    few = last_keys(many, 10)
    assert few.k.untyped_storage().nbytes() == few.k.numel() * few.k.element_size()
    assert last_keys(many, 0).k.shape[1] == 0


@torch.no_grad()
def test_half_of_the_keys_are_a_view_and_fewer_a_copy():
    many = with_new_keys(None, *keys(100))
    half, fewer = last_keys(many, 50), last_keys(many, 49)
    assert half.k.untyped_storage().data_ptr() == many.k.untyped_storage().data_ptr()
    assert fewer.k.untyped_storage().nbytes() == fewer.k.nbytes
    assert torch.equal(half.k, many.k[:, 50:]) and torch.equal(fewer.v, many.v[:, 51:])


@torch.no_grad()
@pytest.mark.parametrize(
    ("n_old", "n_new", "more"),
    [(4, 1, 64), (4, 16, 64), (4, 17, 0), (511, 1, 64), (519, 1, 65), (800, 1, 100)],
)
def test_room_is_made_for_64_steps_or_an_eighth_of_the_keys(n_old: int, n_new: int, more: int):
    """And none behind a piece of more than 16 keys, after which no step is expected."""
    state = with_new_keys(with_new_keys(None, *keys(n_old)), *keys(n_new))
    a_key = state.k.nbytes // (n_old + n_new)
    assert state.k.untyped_storage().nbytes() == (n_old + n_new + more) * a_key


@torch.no_grad()
@pytest.mark.parametrize("n", [64, 65])
def test_the_last_entry_of_the_room_is_taken_too(n: int):
    state = with_new_keys(with_new_keys(None, *keys(4)), *keys(1))
    after = with_new_keys(state, *keys(n, 1))
    assert (after.k.data_ptr() == state.k.data_ptr()) == (n == 64)
    assert_holds(after, [keys(4), keys(1), keys(n, 1)])


@torch.no_grad()
def test_the_first_keys_are_copied_where_a_hook_may_have_kept_them():
    k, v, pos = keys(3)
    kept, copied = (with_new_keys(None, k, v, pos, are_seen=seen) for seen in (False, True))
    assert kept.k is k and kept.v is v and kept.pos is pos
    shared = {t.data_ptr() for t in (k, v, pos)}
    assert not shared & {t.data_ptr() for t in (copied.k, copied.v, copied.pos)}
    assert_holds(copied, [(k, v, pos)])


@torch.no_grad()
def test_a_state_rebuilt_from_the_same_tensors_has_no_room_to_take():
    old = with_new_keys(with_new_keys(None, *keys(4)), *keys(1, 1))
    copy = AttentionState(old.k, old.v, old.pos)
    first = with_new_keys(copy, *keys(1, 2))
    second = with_new_keys(old, *keys(1, 3))
    assert second.k.data_ptr() == old.k.data_ptr() != first.k.data_ptr()
    assert_holds(first, [keys(4), keys(1, 1), keys(1, 2)])
    assert_holds(second, [keys(4), keys(1, 1), keys(1, 3)])


@torch.no_grad()
def test_keys_of_another_dtype_never_go_into_the_room():
    old = with_new_keys(with_new_keys(None, *keys(4)), *keys(1, 1))
    k, v, pos = keys(1, 2)
    wide = with_new_keys(old, k.double(), v.double(), pos)
    assert wide.k.dtype == torch.float64
    assert torch.equal(wide.k.float(), torch.cat([old.k, k], dim=1))
    assert torch.equal(wide.v.float(), torch.cat([old.v, v], dim=1))
    assert_holds(old, [keys(4), keys(1, 1)])


# --- states of a model ----------------------------------------------------------------------------


@models
@modes
@pytest.mark.parametrize("n_before", [0, 1, ROOM - 1])
def test_two_continuations_of_one_state_are_those_of_two_runs(name: str, mode: Any, n_before: int):
    one, other = tokens_of(2, 3), tokens_of(3, 3)
    with mode():
        _, state = decoded(name, prompt_state(name), tokens_of(1, n_before))
        before = snapshot(state)
        logits, first = decoded(name, state, one)
        kept = snapshot(first)
        other_logits, second = decoded(name, state, other)
        assert state == before and first == kept
        if n_before == 1:
            assert memory_of(first) == memory_of(state) != memory_of(second)
        for continuation, got, after in ((one, logits, first), (other, other_logits, second)):
            wanted, end = decoded(name, snapshot(before), continuation)
            assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
            assert after == end


@models
@modes
def test_every_state_of_a_chain_stays_as_it_was_and_can_be_continued(name: str, mode: Any):
    tokens = tokens_of(1, LONG)
    with mode():
        states = [prompt_state(name)]
        taken = [snapshot(states[0])]
        for t in range(LONG):
            _, state = step(name, states[-1], tokens[:, t : t + 1])
            states.append(state)
            taken.append(snapshot(state))
        spaces = [memory_of(state) for state in states[1:]]
        assert len(set(spaces)) == 2
        for state, snap in zip(states, taken, strict=True):
            assert state == snap
        for t in range(0, LONG, 12):
            logits, after = step(name, states[t], tokens_of(7))
            alone, wanted = step(name, taken[t], tokens_of(7))
            assert torch.equal(logits, alone) and after == wanted
        for state, snap in zip(states, taken, strict=True):
            assert state == snap


@models
@pytest.mark.parametrize(
    "lengths", [[1, 3, 1, 16, 1, 17, 1], [17, 1, 40, 1, 1, 2], [1] * LONG], ids=str
)
def test_steps_of_any_length_give_the_logits_of_one_forward(name: str, lengths: list[int]):
    tokens = tokens_of(0, PROMPT + sum(lengths))
    with torch.no_grad():
        _, state = model_of(name)(tokens[:, :PROMPT], return_state=True)
        start, logits, states = PROMPT, [], []
        for n in lengths:
            out, state = step(name, state, tokens[:, start : start + n])
            states.append((state, snapshot(state)))
            logits.append(out)
            start += n
        whole = model_of(name)(tokens)[:, PROMPT:]
    assert relative(torch.cat(logits, dim=1), whole) < FP32_PARITY
    assert all(state == snap for state, snap in states)


OTHER_STATES = {
    "fork": lambda state, donor, path: state.fork(2)[::2],
    "rows": lambda state, donor, path: state[[0, 1]],
    "a slice of rows": lambda state, donor, path: state[0:2],
    "detach": lambda state, donor, path: state.detach(),
    "to": lambda state, donor, path: state.to("cpu", torch.float32),
    "replaced by itself": lambda state, donor, path: state.replace(state, "ssm"),
    "replaced twice": lambda state, donor, path: state.replace(donor, "kv").replace(state, "kv"),
    "cat": lambda state, donor, path: HybridState.cat([state[0], state[1]]),
    "saved": lambda state, donor, path: saved_and_loaded(state, path),
}


def saved_and_loaded(state: HybridState, path: Path) -> HybridState:
    state.save(path / "state.safetensors")
    return HybridState.load(path / "state.safetensors")


@models
@pytest.mark.parametrize("how", list(OTHER_STATES))
def test_states_made_of_one_in_a_room_are_values_too(name: str, how: str, tmp_path: Path):
    with torch.no_grad():
        _, state = decoded(name, prompt_state(name), tokens_of(1, 20))
        _, donor = decoded(name, prompt_state(name), tokens_of(2, 20))
        before = snapshot(state)
        made = OTHER_STATES[how](state, donor, tmp_path)
        made_before = snapshot(made)
        first, after = decoded(name, state, tokens_of(3, 4))
        second, made_after = decoded(name, made, tokens_of(4, 4))
        again, _ = decoded(name, made, tokens_of(3, 4))
        assert state == before and made == made_before
        wanted, end = decoded(name, snapshot(before), tokens_of(3, 4))
        assert all(torch.equal(a, b) for a, b in zip(first, wanted, strict=True)) and after == end
        # Rows of which nothing is assumed are run with a mask: apart by a rounding.
        for got, seed in ((second, 4), (again, 3)):
            wanted, _ = decoded(name, snapshot(before), tokens_of(seed, 4))
            for a, b in zip(got, wanted, strict=True):
                assert relative(a, b) < FP32_PARITY
        assert memory_of(made_after) != memory_of(after)


def test_changing_a_fork_in_place_leaves_the_state_and_its_room_alone():
    with torch.no_grad():
        _, state = decoded("global", prompt_state("global"), tokens_of(1, 20))
        before, fork = snapshot(state), state.fork(1)
        keys_of(fork).k.zero_()
        assert state == before


@models
@pytest.mark.parametrize("order", ["inference first", "no_grad first"])
def test_states_pass_between_inference_mode_and_no_grad(name: str, order: str):
    modes = [torch.inference_mode, torch.no_grad]
    if order == "no_grad first":
        modes.reverse()
    with modes[0]():
        _, state = decoded(name, prompt_state(name), tokens_of(1, 20))
        before = snapshot(state)
        _, other = decoded(name, state, tokens_of(5, 2))
        kept = snapshot(other)
    chain = [(state, before), (other, kept)]
    for i in range(1, 5):
        with modes[i % 2]():
            logits, state = decoded(name, state, tokens_of(2 + i, 2))
            wanted, end = decoded(name, before, tokens_of(2 + i, 2))
            assert all(torch.equal(a, b) for a, b in zip(logits, wanted, strict=True))
            assert state == end
            before = snapshot(state)
            chain.append((state, before))
    assert all(state == snap for state, snap in chain)


@models
def test_with_autograd_no_room_is_used_and_gradients_flow(name: str):
    with torch.no_grad():
        _, state = decoded(name, prompt_state(name), tokens_of(1, 20))
    before = snapshot(state)
    chain = [state]
    logits = None
    for t in range(3):
        logits, following = step(name, chain[-1], tokens_of(t))
        chain.append(following)
    assert len({memory_of(s) for s in chain}) == 4
    assert state == before

    leaves = []
    tensors = {n: t.clone() for n, t in state.tensors().items()}
    for n, t in tensors.items():
        if n.rsplit(".")[-1] in ("k", "v"):
            leaves.append(t.requires_grad_())
            tensors[n] = t
    state = HybridState.from_tensors(tensors, state.n_seen)
    logits, after = decoded(name, state, tokens_of(9, 3))
    with torch.no_grad():  # takes no room that the graph needs
        decoded(name, after, tokens_of(4, 2))
        decoded(name, state, tokens_of(4, 2))
    grads = torch.autograd.grad(logits[-1].square().sum(), leaves, allow_unused=True)
    whole, _ = step(name, state, tokens_of(9, 3))
    wanted = torch.autograd.grad(whole[:, -1].square().sum(), leaves)
    for got, true in zip(grads, wanted, strict=True):
        assert got is not None and float(got.abs().max()) > 0
        assert relative(got, true) < FP32_PARITY


@models
def test_threads_that_continue_one_state_at_once_do_not_meet(name: str):
    n_rounds, n_threads = 24, 2
    with torch.no_grad():
        _, state = decoded(name, prompt_state(name), tokens_of(1, 3))
        wanted = [decoded(name, snapshot(state), tokens_of(10 + i, 3)) for i in range(n_threads)]
    failures: list[str] = []
    barrier = threading.Barrier(n_threads)
    states = [state]

    def work(i: int) -> None:
        with torch.no_grad():
            for n in range(n_rounds):
                barrier.wait(60)
                logits, after = decoded(name, states[n], tokens_of(10 + i, 3))
                same = all(torch.equal(a, b) for a, b in zip(logits, wanted[i][0], strict=True))
                if not same or after != wanted[i][1]:
                    failures.append(f"thread {i}, round {n}")
                if i == 0:  # a state of the same values whose room is not taken
                    _, fresh = decoded(name, prompt_state(name), tokens_of(1, 3))
                    states.append(fresh)
                barrier.wait(60)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures and len(states) == n_rounds + 1


def test_threads_that_append_to_one_room_at_once_do_not_meet():
    n_rounds, n_threads = 60, 4
    barrier, failures = threading.Barrier(n_threads), []
    with torch.no_grad():
        states = [
            with_new_keys(with_new_keys(None, *keys(4)), *keys(1, 1)) for _ in range(n_rounds)
        ]

    def work(i: int) -> None:
        with torch.no_grad():
            for n in range(n_rounds):
                barrier.wait(60)
                state, parts = states[n], [keys(4), keys(1, 1)]
                for t in range(3):
                    parts.append(keys(1, 100 * i + t))
                    state = with_new_keys(state, *parts[-1])
                barrier.wait(60)
                try:
                    assert_holds(state, parts)
                    assert_holds(states[n], parts[:2])
                except AssertionError:
                    failures.append((i, n))

    threads = [threading.Thread(target=work, args=(i,)) for i in range(n_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failures
