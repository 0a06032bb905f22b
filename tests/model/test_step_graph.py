"""A captured step is the eager step: the same values, and only where it makes no difference.

On a CPU `repeat` stands for a graph: it calls the step again on the same buffers, so that all but
the capture is tested anywhere. The last tests need a GPU.
"""

from __future__ import annotations

import dataclasses
import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model import step_graph
from hooked_hybrid.model.sampling import Sampling
from hooked_hybrid.model.step_graph import StepGraph, capture_steps, record, usable
from hooked_hybrid.network.host_waits import AsksNothing
from hooked_hybrid.network.kernels import grouped_experts
from hooked_hybrid.network.state import HybridState
from tests.models import (
    CONFIGS,
    griffin_config,
    jamba_config,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import FP32_PARITY

ALL = {
    **CONFIGS,
    "one-key": griffin_config("RA", n_keys=1),
    "all-keys": griffin_config("AR", n_keys=None),
}
WINDOW = 7  # of CONFIGS["griffin"]
N_NEW = 16
# The window not full, filled by the step that follows the prompt, and long past; one row, several.
CASES = [(1, 3), (WINDOW - 1, 1), (20, 3)]
QUIET: dict[str, Any] = {"verbose": False, "return_type": "output"}


def repeat(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """Stand for a capture: the step runs before it, as a graph's does, and then each time."""
    step()
    step()
    return step


@cache
def model_of(name: str) -> HookedHybrid:
    return lively(ALL[name])


def lively(cfg: HybridConfig) -> HookedHybrid:
    """Return a model whose greedy tokens vary."""
    return random_model(dataclasses.replace(cfg, tied_embedding=False, eos_token_id=None), seed=4)


@pytest.fixture(params=ALL)
def model(request):
    yield model_of(request.param)
    assert not model_of(request.param).list_hooks()


@pytest.fixture(params=["griffin", "jamba", "all-keys"])
def each_model(request):
    yield model_of(request.param)
    assert not model_of(request.param).list_hooks()


@pytest.fixture
def griffin():
    yield model_of("griffin")
    assert not model_of("griffin").list_hooks()


@pytest.fixture
def forced(monkeypatch):
    """Let `generate` use the runner on this machine, for any model; return the graphs it makes."""
    made = []

    class Noted(StepGraph):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(self)

    monkeypatch.setitem(step_graph.CAPTURES, "cpu", repeat)
    monkeypatch.setattr(step_graph, "WORTH_CAPTURING", 4)
    monkeypatch.setattr(step_graph, "_asks_for_counts", lambda model: False)
    monkeypatch.setattr(step_graph, "StepGraph", Noted)
    monkeypatch.setattr(step_graph, "_failed", weakref.WeakSet())
    return made


@pytest.fixture(autouse=True)
def without_autograd():
    with torch.no_grad():
        yield


def after(model: HookedHybrid, tokens: Tensor, mask: Tensor | None = None) -> HybridState:
    return model(tokens, None, attention_mask=mask, return_state=True)[1]


def eager_step(
    model: HookedHybrid, tokens: Tensor, state: HybridState
) -> tuple[Tensor, HybridState]:
    logits, state = model(tokens, state=state, return_state=True, stage="generation")
    return logits[:, -1], state


def assert_same_state(actual: HybridState, expected: HybridState) -> None:
    """Equal to rounding, shapes and absent keys included."""
    assert actual.n_seen == expected.n_seen
    mine, theirs = actual.tensors(), expected.tensors()
    assert mine.keys() == theirs.keys()
    for name, t in mine.items():
        assert t.shape == theirs[name].shape and t.dtype == theirs[name].dtype, name
        if not t.is_floating_point():
            assert torch.equal(t, theirs[name]), name
        elif t.numel():
            assert relative(t, theirs[name]) < FP32_PARITY, name


def assert_follows(graph: StepGraph, state: HybridState, n_steps: int) -> None:
    """The runner gives what eager steps give, fed the same tokens, and ends in the same state."""
    drawn = random_tokens(state.batch_size, n_steps, seed=5).to(graph.model.device)
    looks = {0, 1, n_steps // 2, n_steps - 1}
    for i in range(n_steps):
        expected, state = eager_step(graph.model, drawn[:, i : i + 1], state)
        logits = graph.step(drawn[:, i : i + 1])
        assert relative(logits, expected) < FP32_PARITY
        assert torch.equal(logits.argmax(-1), expected.argmax(-1))
        if i in looks:
            assert_same_state(graph.state(), state)


def padded_rows() -> tuple[Tensor, Tensor]:
    """Return rows of 9, 1 and 4 tokens, padded on the left with a real word."""
    tokens, mask = random_tokens(3, 9), torch.ones(3, 9, dtype=torch.long)
    for row, n in enumerate((9, 1, 4)):
        mask[row, : 9 - n] = 0
        tokens[row, : 9 - n] = 5
    return tokens, mask


# --- the same values --------------------------------------------------------------------------


@pytest.mark.parametrize(("n_prompt", "batch"), CASES)
def test_steps_are_the_eager_steps(model, n_prompt, batch):
    state = after(model, random_tokens(batch, n_prompt))
    assert_follows(StepGraph(model, state, 20, repeat), state, WINDOW + 5)


def test_rows_of_different_lengths(model):
    tokens, mask = padded_rows()
    state = after(model, tokens, mask)
    assert state.n_seen is None
    assert_follows(StepGraph(model, state, 20, repeat), state, WINDOW + 5)


def test_the_state_it_began_with_is_not_changed(each_model):
    state = after(each_model, random_tokens(2, 5))
    copy = state.fork(1)
    graph = StepGraph(each_model, state, 20, repeat)
    assert_same_state(graph.state(), state)
    graph.step(random_tokens(2, 1))
    assert state == copy


def test_states_and_logits_are_copies(each_model):
    graph = StepGraph(each_model, after(each_model, random_tokens(2, 5)), 20, repeat)
    logits, state = graph.step(random_tokens(2, 1)), graph.state()
    kept, copy = logits.clone(), state.fork(1)
    for _ in range(WINDOW):
        graph.step(random_tokens(2, 1, seed=3))
    assert torch.equal(logits, kept) and state == copy


@pytest.mark.parametrize("n_prompt", [2, 11])
def test_a_graph_continues_from_another_state(each_model, n_prompt):
    graph = StepGraph(each_model, after(each_model, random_tokens(2, 5)), 20, repeat)
    for i in range(WINDOW + 1):
        graph.step(random_tokens(2, 1, seed=i))
    graph.keep(torch.tensor([True, False]))
    other = after(each_model, random_tokens(2, n_prompt, seed=7))
    graph.load(other)
    assert_follows(graph, other, WINDOW + 2)


def test_leaving_a_graph_and_making_another(each_model):
    state = after(each_model, random_tokens(2, 5))
    for n_steps in (4, WINDOW, 3):
        graph = StepGraph(each_model, state, n_steps, repeat)
        assert_follows(graph, state, n_steps)
        state = graph.state()
        _, state = eager_step(each_model, random_tokens(2, 1), state)


def test_rows_can_be_dropped(each_model):
    state = after(each_model, random_tokens(3, 5))
    graph = StepGraph(each_model, state, 40, repeat)
    assert_follows(graph, state, 4)
    graph.keep(torch.tensor([True, False, True]))
    assert_follows(graph, graph.state(), 4)
    graph.keep(torch.tensor([False, True]))
    assert_follows(graph, graph.state(), WINDOW)
    graph.keep(torch.tensor([False]))
    assert graph.state().batch_size == 0


def test_keys_at_any_positions_are_seen_as_eager_steps_see_them(griffin):
    state = after(griffin, random_tokens(2, 12))
    donor = after(griffin, random_tokens(2, 4, seed=1))
    state = state.replace(donor, kinds="kv", rows=[1])  # far behind, and fewer
    assert_follows(StepGraph(griffin, state, 20, repeat), state, WINDOW + 2)


def test_room_for_all_keys(griffin, monkeypatch):
    monkeypatch.setattr(step_graph, "KEYS_MULTIPLE", 8)
    model = model_of("all-keys")
    state = after(model, random_tokens(1, 5))
    graph = StepGraph(model, state, 20, repeat)
    n_left = int(graph.n_left)
    assert n_left >= 20
    assert_follows(graph, state, n_left)
    assert not graph.is_valid
    with pytest.raises(ValueError, match=f"no room for a token after {n_left}"):
        graph.step(random_tokens(1, 1))
    with pytest.raises(ValueError, match="keys more than"):
        graph.load(after(model, random_tokens(1, 100)))
    with pytest.raises(ValueError, match="2 rows for a graph of 1"):
        graph.load(after(model, random_tokens(2, 5)))
    assert StepGraph(griffin, after(griffin, random_tokens(1, 5)), 1, repeat).n_left == float("inf")


# --- where it is used -------------------------------------------------------------------------


def test_a_cpu_has_no_graphs(griffin):
    state = after(griffin, random_tokens(1, 5))
    assert not usable(griffin, state)
    assert capture_steps(griffin, state, 100) is None


def test_where_it_is_usable(griffin, monkeypatch):
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", repeat)
    state = after(griffin, random_tokens(1, 5))
    assert usable(griffin, state)
    assert usable(griffin, state.fork(step_graph.MAX_BATCH))
    assert not usable(griffin, state.fork(step_graph.MAX_BATCH + 1))
    assert not usable(griffin, state[:0])
    with torch.enable_grad():
        assert not usable(griffin, state)
    with torch.autocast("cpu", torch.bfloat16):
        assert not usable(griffin, state)
    for direction in ("fwd", "bwd"):
        handles = griffin.add_hook("hook_embed", lambda x, hook: None, direction)
        assert not usable(griffin, state)
        handles[0].remove()
    assert usable(griffin, state)


def noop(*_: Any) -> None:
    return None


TORCH_HOOKS = {
    "forward": lambda m: m.blocks[1].mlp.register_forward_hook(noop),
    "pre": lambda m: m.register_forward_pre_hook(noop),
    "backward": lambda m: m.ln_final.register_full_backward_hook(noop),
    "of all modules": lambda m: torch.nn.modules.module.register_module_forward_hook(noop),
}


@pytest.mark.parametrize("kind", TORCH_HOOKS)
def test_torchs_own_hooks_forbid_it_and_end_it(griffin, monkeypatch, kind):
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", repeat)
    state = after(griffin, random_tokens(1, 5))
    graph = StepGraph(griffin, state, 20)
    handle = TORCH_HOOKS[kind](griffin)
    try:
        assert not usable(griffin, state) and not graph.is_valid
    finally:
        handle.remove()
    assert usable(griffin, state) and graph.is_valid


def test_a_mixture_needs_experts_that_ask_nothing(monkeypatch):
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", repeat)
    for name, is_usable in (("jamba", False), ("jamba-dense-ends-in-attention", True)):
        model = model_of(name)
        assert usable(model, after(model, random_tokens(1, 5))) is is_usable
    monkeypatch.setattr(grouped_experts, "usable", lambda *tensors: True)
    model = model_of("jamba")
    assert usable(model, after(model, random_tokens(1, 5)))


ASKS = {
    "a number": lambda x: x.sum().item(),
    "a condition": lambda x: bool((x > 0).any()),
    "where": lambda x: x.nonzero(),
    "a mask": lambda x: x[x > 0],
    "writing at a mask": lambda x: x.index_put_((x > 0,), torch.zeros(1)),
    "counts": lambda x: torch.bincount(x.long()),
    "equality": lambda x: torch.equal(x, x + 1),
    "another device": lambda x: x.to("meta"),
    "another device and dtype": lambda x: x.to("meta", torch.float64),
    "numbers for another device": lambda x: torch.tensor([1.0, 2.0], device="meta"),
    "copying to another device": lambda x: torch.empty(4, device="meta").copy_(x),
    "where, of a mask alone": lambda x: torch.where(x > 0),
    "a condition in Python": lambda x: 1 if x[1] > 0 else 2,
    "repeats that a tensor counts": lambda x: torch.repeat_interleave(x.long()),
    "repeats of another, that it counts": lambda x: torch.repeat_interleave(x, x.long()),
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "draws": lambda x: torch.multinomial(x, 1),
    "what is different": lambda x: torch.unique(x),
    "closeness": lambda x: torch.allclose(x, x + 1),
}


@pytest.mark.parametrize("below", [False, True], ids=["with autograd", "where a step runs"])
@pytest.mark.parametrize("kind", ASKS)
def test_what_the_host_waits_for_is_found_before_a_capture(kind, below):
    """Below autograd, as `plan.dispatch` runs a step, composite operations come whole."""
    skipping = torch._C._AutoDispatchBelowAutograd() if below else nullcontext()
    with skipping, pytest.raises(RuntimeError, match="the host waits"), AsksNothing():
        ASKS[kind](torch.arange(4.0))


ASKS_NOTHING: dict[str, Callable[[Tensor], Any]] = {
    "another dtype": lambda x: x.to(torch.float64).to(x),
    "the same device": lambda x: x.to("cpu"),
    "where, of two": lambda x: torch.where(x > 0, x, 0),
    "repeats of a number": lambda x: torch.repeat_interleave(x, 3),
    "filling at a mask": lambda x: x.masked_fill(x > 0, 1),
    "indices": lambda x: x[torch.tensor([1, 2])],
    "a product": lambda x: torch.nn.functional.linear(x, torch.ones(3, 4)),
    "a copy": lambda x: x.clone().copy_(x),
}


@pytest.mark.parametrize("below", [False, True], ids=["with autograd", "where a step runs"])
@pytest.mark.parametrize("kind", ASKS_NOTHING)
def test_what_a_gpu_does_alone_may_be_captured(kind, below):
    x = torch.arange(4.0)
    expected = ASKS_NOTHING[kind](x)
    with torch._C._AutoDispatchBelowAutograd() if below else nullcontext(), AsksNothing():
        found = ASKS_NOTHING[kind](x)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("way", ["fused", "blocks"])
def test_a_step_asks_nothing_but_how_many_tokens_each_expert_got(model, monkeypatch, way):
    monkeypatch.setattr(
        "hooked_hybrid.network.attention.attend.attention_way", lambda *_: way
    )  # a GPU's, a CPU's
    asking = []

    def checking(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        step()  # what is made once, and then kept
        with AsksNothing():
            step()
        asking.append(False)
        return step

    state = after(model, random_tokens(2, 5))
    if step_graph._asks_for_counts(model):
        with pytest.raises(RuntimeError, match="the host waits.*bincount"):
            StepGraph(model, state, 20, checking)
    else:
        assert_follows(StepGraph(model, state, 20, checking), state, 3)
        assert asking == [False]


def test_a_failing_capture_warns_once_and_is_not_tried_again(griffin, forced, monkeypatch):
    tries = []

    def fails(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        tries.append(step())  # it has run, and changed the buffers
        raise RuntimeError("operation not permitted when stream is capturing")

    tokens = random_tokens(2, 5)
    expected = griffin.generate(tokens, N_NEW, **QUIET)  # with `repeat`
    assert forced
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", fails)
    with pytest.warns(RuntimeWarning, match="cannot be captured.*not permitted"):
        first = griffin.generate(tokens, N_NEW, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = griffin.generate(tokens, N_NEW, **QUIET)
    assert len(tries) == 1
    for out in (first, again):
        assert torch.equal(out.tokens, expected.tokens)
        assert_same_state(out.state, expected.state)


def test_a_graph_and_its_buffers_go_with_their_owner(griffin):
    def replays(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        mine = weakref.WeakMethod(step)  # like a graph, it does not hold the step
        return lambda: mine()()

    state = after(griffin, random_tokens(1, 5))
    gc.disable()
    try:
        graph = StepGraph(griffin, state, 20, replays)
        gone = weakref.ref(graph)
        del graph
        assert gone() is None
    finally:
        gc.enable()


# --- in generate ------------------------------------------------------------------------------


def assert_same_output(actual: Any, expected: Any) -> None:
    assert torch.equal(actual.tokens, expected.tokens)
    assert torch.equal(actual.finished, expected.finished)
    torch.testing.assert_close(actual.logprobs, expected.logprobs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(actual.margins, expected.margins, rtol=1e-4, atol=1e-5)
    assert_same_state(actual.state, expected.state)


def eagerly(model: HookedHybrid, *args: Any, **options: Any) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(step_graph, "CAPTURES", {})
        return model.generate(*args, **{**QUIET, **options})


@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_generate_gives_what_it_gives_without(each_model, forced, stage):
    tokens = random_tokens(3, 5)
    expected = eagerly(each_model, tokens, N_NEW, first_token_stage=stage)
    assert not forced
    assert len(set(expected.new_tokens.flatten().tolist())) > 5
    assert_same_output(
        each_model.generate(tokens, N_NEW, first_token_stage=stage, **QUIET), expected
    )
    assert len(forced) == 1


def test_generate_continues_padded_rows_and_from_a_state(each_model, forced):
    tokens, mask = padded_rows()
    state = after(each_model, random_tokens(3, 4, seed=3))
    for options in ({"attention_mask": mask}, {"state": state}):
        expected = eagerly(each_model, tokens, N_NEW, **options)
        assert_same_output(each_model.generate(tokens, N_NEW, **options, **QUIET), expected)
    assert len(forced) == 2


def test_rows_that_end_early(each_model, forced):
    tokens = random_tokens(3, 5)
    free = eagerly(each_model, tokens, N_NEW)
    for eos in (
        [int(free.new_tokens[0, 5])],
        [int(t) for t in free.new_tokens[:, 3]],  # all rows end
        [int(free.new_tokens[1, 0]), int(free.new_tokens[2, 10])],
    ):
        expected = eagerly(each_model, tokens, N_NEW, eos_token_id=eos)
        assert expected.finished.any()
        assert_same_output(each_model.generate(tokens, N_NEW, eos_token_id=eos, **QUIET), expected)
    assert forced


def test_drawn_tokens_are_the_same(each_model, forced):
    def draw(run: Callable[..., Any]) -> Any:
        generator = torch.Generator().manual_seed(3)
        return run(random_tokens(2, 5), N_NEW, do_sample=True, generator=generator, **QUIET)

    assert_same_output(
        draw(each_model.generate), draw(lambda *a, **k: eagerly(each_model, *a, **k))
    )
    assert len(forced) == 1


def test_few_tokens_are_not_worth_a_graph(griffin, forced):
    least = step_graph.WORTH_CAPTURING
    griffin.generate(random_tokens(1, 5), least + 1, **QUIET)  # steps 2 to `least`: one too few
    assert not forced
    griffin.generate(random_tokens(1, 5), least + 2, **QUIET)
    assert len(forced) == 1


def test_hooks_of_generation_and_caches_run_eagerly(griffin, forced):
    tokens = random_tokens(2, 5)
    griffin.generate(tokens, N_NEW, generation_hooks=[("hook_embed", noop_hook)], **QUIET)
    out = griffin.generate(tokens, N_NEW, names_filter="hook_embed", **QUIET)
    assert out.cache["hook_embed"].shape[1] == N_NEW + 4
    assert not forced
    griffin.generate(tokens, N_NEW, prefill_hooks=[("hook_embed", noop_hook)], **QUIET)
    assert len(forced) == 1


def noop_hook(x: Tensor, hook: Any) -> None:
    return None


def test_a_hook_attached_on_the_way_is_called_from_the_next_step_on(
    each_model, forced, monkeypatch
):
    """Attached and detached between two steps, by whoever has the model too."""
    seen: list[int] = []

    def double(x: Tensor, hook: Any) -> Tensor:
        seen.append(hook.run.step)
        return 2 * x

    def run(generate: Callable[..., Any]) -> Any:
        seen.clear()
        chosen, handles = [], []
        choose = Sampling.choose

        def meddling(sampling: Any, *given: Any) -> Any:
            chosen.append(None)
            if len(chosen) == 6:
                handles.extend(each_model.add_hook("hook_embed", double))
            if len(chosen) == 9:
                handles.pop().remove()
            return choose(sampling, *given)

        with monkeypatch.context() as patch:
            patch.setattr(Sampling, "choose", meddling)
            return generate(random_tokens(2, 5), N_NEW, **QUIET), list(seen)

    expected, steps = run(lambda *a, **k: eagerly(each_model, *a, **k))
    assert steps == [6, 7, 8]
    actual, steps = run(each_model.generate)
    assert steps == [6, 7, 8]
    assert_same_output(actual, expected)
    assert len(forced) == 2  # before and after


def test_a_long_generation_takes_several_graphs(forced, monkeypatch):
    monkeypatch.setattr(step_graph, "MAX_STEPS", 10)
    monkeypatch.setattr(step_graph, "KEYS_MULTIPLE", 8)
    model, tokens = model_of("all-keys"), random_tokens(2, 5)
    expected = eagerly(model, tokens, 40)
    assert_same_output(model.generate(tokens, 40, **QUIET), expected)
    assert len(forced) > 2
    assert all(int(graph._buffers["blocks.0.k"].shape[1]) < 60 for graph in forced)


# --- on a GPU ---------------------------------------------------------------------------------

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
GPU = {**ALL, "jamba": jamba_config(n_experts=1)}


@pytest.fixture(params=GPU)
def gpu_model(request):
    return lively(GPU[request.param]).to("cuda")


@needs_gpu
@pytest.mark.parametrize(("n_prompt", "batch"), CASES)
def test_a_captured_step_is_the_eager_step(gpu_model, n_prompt, batch):
    state = after(gpu_model, random_tokens(batch, n_prompt).cuda())
    eager_step(gpu_model, random_tokens(batch, 1).cuda(), state)
    assert usable(gpu_model, state)
    assert_follows(StepGraph(gpu_model, state, 20, record), state, WINDOW + 5)


@needs_gpu
def test_a_captured_step_of_rows_of_different_lengths(gpu_model):
    tokens, mask = (t.cuda() for t in padded_rows())
    state = after(gpu_model, tokens, mask)
    graph = StepGraph(gpu_model, state, 40, record)
    assert_follows(graph, state, WINDOW + 5)
    graph.load(state)
    assert_follows(graph, state, 3)


@needs_gpu
@pytest.mark.parametrize("sampling", [{}, {"do_sample": True}], ids=["greedy", "drawn"])
def test_generate_on_a_gpu_gives_what_it_gives_without(gpu_model, sampling, monkeypatch):
    tokens, captures = random_tokens(3, 5).cuda(), []

    def noting(step: Callable[[], None], device: torch.device) -> Callable[[], None]:
        captures.append(device)
        return record(step, device)

    torch.manual_seed(0)
    expected = eagerly(gpu_model, tokens, 40, **sampling)
    monkeypatch.setitem(step_graph.CAPTURES, "cuda", noting)
    torch.manual_seed(0)
    assert_same_output(gpu_model.generate(tokens, 40, **sampling, **QUIET), expected)
    assert len(captures) == 1


@needs_gpu
def test_a_mixture_that_synchronises_falls_back_and_leaves_the_generator_usable(monkeypatch):
    model, tokens = tiny_model("jamba").to("cuda"), random_tokens(2, 5).cuda()
    expected = model.generate(tokens, 30, **QUIET)
    monkeypatch.setattr(step_graph, "_asks_for_counts", lambda model: False)
    with pytest.warns(RuntimeWarning, match="the host waits"):
        out = model.generate(tokens, 30, **QUIET)
    assert_same_output(out, expected)
    stream = torch.cuda.current_stream()
    torch.rand(3, device="cuda")
    assert stream == torch.cuda.default_stream()
