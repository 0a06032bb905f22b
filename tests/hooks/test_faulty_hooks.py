"""Hooks that do what they should not: the error says where, and the model afterwards is as before.

Also two threads: hooks of one model are not seen by another, and `hook.run` is each thread's own.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.hooks.marks import watcher
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

FAMILIES = {"griffin": griffin_config("RA"), "jamba": jamba_config("MA")}  # one layer of each kind
pytestmark = pytest.mark.usefixtures("plainly")
every_family = pytest.mark.parametrize("family", FAMILIES)
POINT = "blocks.1.hook_resid_mid"
N_FORWARDS = int(os.environ.get("UNDER_FIRE_FORWARDS", "30"))
"""Of each thread."""


@cache
def model_of(family: str) -> HookedHybrid:
    return random_model(FAMILIES[family])


def tokens_of(batch: int = 2, n_pos: int = 6) -> Tensor:
    return random_tokens(batch, n_pos)


@cache
def before(family: str) -> dict[str, Any]:
    """Return what must be as it was after anything a hook does."""
    model = model_of(family)
    with torch.no_grad():
        logits, state = model(tokens_of(), return_state=True)
    return {
        "weights": {name: w.clone() for name, w in model.state_dict().items()},
        "logits": logits,
        "state": state,
        "numbers": [t.clone() for t in numbers(state)],
    }


def numbers(state: Any) -> list[Tensor]:
    """Return every tensor of a state."""
    if isinstance(state, Tensor):
        return [state]
    parts = state if isinstance(state, (tuple, list)) else vars(state).values()
    return [
        t for part in parts if part is not None and not isinstance(part, int) for t in numbers(part)
    ]


def assert_as_before(family: str) -> None:
    """Nothing is attached, no run is on, and weights, states and logits are the same bits."""
    model, was = model_of(family), before(family)
    assert not model.list_hooks()
    assert model.run_holder.run is None and model.context_level == 0
    assert all(torch.equal(w, was["weights"][name]) for name, w in model.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert all(
        torch.equal(*pair) for pair in zip(numbers(was["state"]), was["numbers"], strict=True)
    )
    assert torch.equal(model(tokens_of()), was["logits"])


def run_forward(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    return model.run_with_hooks(tokens_of(), fwd_hooks=[(point, hook)])


def run_block(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    with model.hooks(fwd_hooks=[(point, hook)]):
        return model(tokens_of())


def run_cache(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    with model.hooks(fwd_hooks=[(point, hook)]):
        return model.run_with_cache(tokens_of())


def run_part(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    with model.hooks(fwd_hooks=[(point, hook)]):
        return model(tokens_of(), stop_at_layer=2)


def run_gradients(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    with model.hooks(fwd_hooks=[(point, hook)]):
        return model.run_with_cache(tokens_of(), incl_bwd=True)


def run_backward(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
    with model.hooks(bwd_hooks=[(point, hook)]):
        return model.run_with_cache(tokens_of(), names_filter=POINT, incl_bwd=True)


def generating(**options: Any) -> Callable[..., Any]:
    def run(model: HookedHybrid, hook: Any, point: Any = POINT) -> Any:
        named = {kind: [(point, hook)] for kind in options["hooks"]}
        return model.generate(
            tokens_of(),
            3,
            names_filter=options.get("keep"),
            return_type="output",
            stop_at_eos=False,
            verbose=False,
            **named,
        )

    return run


WAYS: dict[str, Callable[..., Any]] = {
    "run_with_hooks": run_forward,
    "hooks": run_block,
    "run_with_cache": run_cache,
    "stop_at_layer": run_part,
    "gradients": run_gradients,
    "backward": run_backward,
    "generate": generating(hooks=["fwd_hooks"]),
    "prefill": generating(hooks=["prefill_hooks"], keep=True),
    "generation": generating(hooks=["generation_hooks"], keep=True),
}
every_way = pytest.mark.parametrize("way", WAYS)


class Odd(BaseException):
    """An error that no `except Exception` stops."""


# --- what is raised -------------------------------------------------------------------------------


@every_family
@every_way
def test_an_error_passes_with_a_note_of_hook_and_point(family: str, way: str):
    for error in (ZeroDivisionError, StopIteration, KeyboardInterrupt, Odd):

        def broken(value: Tensor, hook: HookPoint, error: Any = error) -> None:
            raise error("mine")

        with pytest.raises(error, match="mine") as raised:
            WAYS[way](model_of(family), broken)
        (note,) = raised.value.__notes__
        assert "broken" in note and POINT in note
    assert_as_before(family)


def many_values(value: Tensor, hook: HookPoint) -> Any:
    yield value


RETURNS: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "another shape": (lambda v: v[..., 1:], "shape"),
    "one that broadcasts": (lambda v: v.mean(2, keepdim=True), "shape"),
    "another dtype": (lambda v: v.double(), "dtype torch.float64"),
    "another device": (lambda v: v.to("meta"), "device meta"),
    "numpy": (lambda v: v.numpy(), "ndarray"),
    "a number": (lambda v: 0.0, "float"),
    "a list": (lambda v: [v], "list"),
    "a generator": (lambda v: many_values(v, None), "generator"),  # type: ignore[arg-type]
    "NotImplemented": (lambda v: NotImplemented, "NotImplemented"),
}


@every_way
def test_what_cannot_replace_a_value_is_refused_by_hook_and_point(way: str):
    for make, said in RETURNS.values():

        def returns_wrong(value: Tensor, hook: HookPoint, make: Any = make) -> Any:
            return make(value.detach())

        with pytest.raises((TypeError, ValueError)) as raised:
            WAYS[way](model_of("griffin"), returns_wrong)
        for part in ("returns_wrong", POINT, said):
            assert part in str(raised.value)
    assert_as_before("griffin")


@pytest.mark.filterwarnings("ignore:coroutine")
def test_an_async_hook_is_refused():
    async def later(value: Tensor, hook: HookPoint) -> None: ...

    with pytest.raises(TypeError, match=f"later on '{POINT}' returned coroutine"):
        run_forward(model_of("griffin"), later)
    assert_as_before("griffin")


# --- what is done to the values -------------------------------------------------------------------


@every_way
def test_none_changes_nothing(way: str):
    model = model_of("jamba")
    WAYS[way](model, lambda value, hook: None)
    assert torch.equal(run_forward(model, lambda value, hook: None), before("jamba")["logits"])
    assert_as_before("jamba")


def not_a_number(value: Tensor, hook: HookPoint) -> Tensor:
    return torch.full_like(value, torch.nan) if value.is_floating_point() else value


def not_a_number_in_place(value: Tensor, hook: HookPoint) -> None:
    value.fill_(torch.nan if value.is_floating_point() else 0)


@every_family
@pytest.mark.parametrize("hook", [not_a_number, not_a_number_in_place])
def test_nan_at_any_point_stays_in_its_run(family: str, hook: Any):
    model, was = model_of(family), before(family)
    for name in model.hook_dict:
        with model.hooks([(name, hook)]):
            model(tokens_of(2, 2), state=was["state"])
    assert not torch.isfinite(run_forward(model, hook)).any()
    assert_as_before(family)


CHOOSES_FROM_NAN = {"generate": 0, "prefill": 0, "generation": 1}
"""Ways that choose tokens: the first new one that would be chosen from NaN."""


@every_way
def test_nan_stays_in_its_run_whatever_runs(way: str):
    for hook in (not_a_number, not_a_number_in_place):
        if way == "gradients" and hook is not_a_number_in_place:
            continue  # autograd refuses what was edited in place
        if way in CHOOSES_FROM_NAN:
            said = f"new token {CHOOSES_FROM_NAN[way]} of rows 0, 1 .*: the logits are NaN"
            with pytest.raises(ValueError, match=said):
                WAYS[way](model_of("jamba"), hook)
        else:
            WAYS[way](model_of("jamba"), hook)
    assert_as_before("jamba")


@every_family
def test_a_returned_tensor_is_never_written_to(family: str):
    model, kept = model_of(family), {}

    def replace_by_mine(value: Tensor, hook: HookPoint) -> Tensor:
        return kept.setdefault((hook.name, value.shape), value.clone())

    with model.hooks([(lambda name: True, replace_by_mine)]):
        model(tokens_of())
    values = {key: value.clone() for key, value in kept.items()}
    for name in model.hook_dict:
        run_forward(model, replace_by_mine, name)
    assert len(kept) > 0.9 * len(model.hook_dict)
    assert all(torch.equal(kept[key], value) for key, value in values.items())
    assert_as_before(family)


@every_family
def test_a_view_counts_as_its_values(family: str):
    """Expanded views share numbers among entries: writing to one would write to others."""
    model = model_of(family)
    for name in model.hook_dict:
        runs = [
            run_forward(model, lambda v, hook, own=own: own(v[:1].expand_as(v)), name)
            for own in (lambda v: v, lambda v: v.clone(memory_format=torch.contiguous_format))
        ]
        assert relative(*runs) < FP32_PARITY, name
    assert_as_before(family)


def doubled_in_place(value: Tensor, hook: HookPoint) -> None:
    value.mul_(2)


@every_family
def test_an_edit_in_place_equals_the_same_edit_returned(family: str):
    model = model_of(family)
    for name, point in model.hook_dict.items():
        if point.is_integer:
            continue
        in_place = run_forward(model, doubled_in_place, name)
        assert torch.equal(in_place, run_forward(model, lambda v, hook: 2 * v, name)), name
    assert_as_before(family)


def test_a_view_of_a_weight_is_not_written_to():
    model = model_of("griffin")
    rows = tokens_of().shape[0]

    def the_embedding(value: Tensor, hook: HookPoint) -> Tensor:
        return model.W_E[: value.shape[1]].expand(rows, -1, -1)

    for name in ("hook_embed", "blocks.1.hook_resid_mid", "blocks.1.hook_resid_pre"):
        run_forward(model, the_embedding, name)
    assert_as_before("griffin")


# --- what is done to the model while it runs ------------------------------------------------------


def test_hooks_that_attach_and_detach_others_while_they_run():
    model = model_of("griffin")
    seen: list[str] = []

    def note(value: Tensor, hook: HookPoint) -> None:
        seen.append(str(hook.name))

    def attach(value: Tensor, hook: HookPoint) -> None:
        model.add_hook(POINT, note)
        model.add_hook("blocks.1.hook_resid_post", note)

    def detach(value: Tensor, hook: HookPoint) -> None:
        model.reset_hooks()

    with model.hooks([(POINT, attach), ("ln_final.hook_scale", detach)]):
        model(tokens_of())
    assert seen == ["blocks.1.hook_resid_post"]  # at the point where the run is, from the next on
    assert_as_before("griffin")


@every_family
def test_a_hook_may_run_the_model_and_keeps_its_own_run(family: str):
    model = model_of(family)
    inner: list[Tensor] = []

    def run_again(value: Tensor, hook: HookPoint) -> None:
        if not inner:  # the inner run calls this hook too
            mine = hook.run
            inner.append(value)
            model.generate(tokens_of(1, 4), 2, verbose=False)
            model.run_with_cache(tokens_of(1, 5))
            assert hook.run is mine

    out = run_forward(model, run_again)
    assert torch.equal(out, before(family)["logits"]) and inner
    assert_as_before(family)


def test_endless_recursion_ends_in_an_error():
    model = model_of("griffin")
    depth = sys.getrecursionlimit()
    sys.setrecursionlimit(400)
    try:
        with pytest.raises(RecursionError):
            run_forward(model, lambda value, hook: model(tokens_of(1, 2)) and None)
    finally:
        sys.setrecursionlimit(depth)
    assert_as_before("griffin")


# --- threads --------------------------------------------------------------------------------------


def in_threads(*works: Callable[[], None]) -> None:
    """Run functions at once, changing between them as often as can be; raise what one raises."""
    errors: list[BaseException] = []
    start = threading.Barrier(len(works))

    def run(work: Callable[[], None]) -> None:
        try:
            with torch.no_grad():  # of each thread, as torch has it
                start.wait()
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    if errors:
        raise errors[0]


def test_two_models_in_two_threads_do_not_see_each_others_hooks():
    def work(family: str, factor: float) -> Callable[[], None]:
        model, tokens = model_of(family), tokens_of(1, 6)
        alone = model.run_with_hooks(tokens, fwd_hooks=[(POINT, lambda v, hook: v * factor)])
        assert not torch.equal(alone, model(tokens))

        def scale(value: Tensor, hook: HookPoint) -> Tensor:
            assert threading.get_ident() == me[0] and hook is model.hook_dict[POINT]
            assert hook.run.query_pos.shape == tokens.shape
            return value * factor

        me: list[int] = []

        def run() -> None:
            me.append(threading.get_ident())
            for _ in range(N_FORWARDS):
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(POINT, scale)]), alone)
                assert not model.list_hooks() and model.run_holder.run is None

        return run

    in_threads(work("griffin", 2.0), work("jamba", -1.0))
    for family in FAMILIES:
        assert_as_before(family)


def test_one_model_in_two_threads_shares_its_hooks_and_nothing_else():
    """As `hooks` says: hooks belong to the model. `hook.run` is each thread's own."""
    model = model_of("griffin")
    seen: dict[int, set[int]] = {}

    def work(n_pos: int) -> Callable[[], None]:
        tokens = tokens_of(1, n_pos)
        alone = model(tokens)

        @watcher
        def watch(value: Tensor, hook: HookPoint) -> None:
            assert value.shape[1] == hook.run.query_pos.shape[1]
            seen.setdefault(n_pos, set()).add(value.shape[1])

        def run() -> None:
            for _ in range(N_FORWARDS):
                assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(POINT, watch)]), alone)

        return run

    in_threads(work(5), work(8))
    assert 5 in seen[5] and 8 in seen[8]
    assert_as_before("griffin")


def test_blocks_of_two_threads_are_all_counted_and_all_forgotten():
    model = model_of("griffin")

    def work() -> None:
        for _ in range(20 * N_FORWARDS):
            with model.hooks([(POINT, doubled_in_place)]):
                assert model.context_level in (1, 2)

    in_threads(work, work)
    assert_as_before("griffin")


def test_a_copy_has_hooks_and_a_run_of_its_own():
    model = model_of("griffin")
    other = copy.deepcopy(model)
    assert other.run_holder is not model.run_holder
    assert all(p.run_holder is other.run_holder for p in other.hook_points())
    with model.hooks([(POINT, not_a_number)]):
        assert torch.equal(other(tokens_of()), before("griffin")["logits"])
    other.run_with_hooks(tokens_of(), fwd_hooks=[(POINT, lambda v, hook: hook.run and None)])
    assert_as_before("griffin")
