"""A step captured for one GPU after a capture on another: torch's own classes, stand-in streams.

A stream belongs to a GPU; what runs on a GPU's tensors goes to the current stream of that GPU, and
is captured only where this is the stream that captures.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hooked_hybrid.model import step_graph
from hooked_hybrid.model.step_graph import StepGraph, capture_steps, record
from tests.model.test_step_graph import after, assert_follows, eager_step
from tests.models import random_tokens, tiny_model

_numbers = itertools.count()


class Stream:
    """A stream of the GPU that is current when it is made."""

    def __init__(self, device: int | None = None) -> None:
        self.device = torch.device("cuda", Machine.now.current if device is None else device)
        self.number = next(_numbers)

    def wait_stream(self, other: Stream) -> None:
        assert isinstance(other, Stream)


class Machine:
    """Two GPUs, the current one, the current stream of each, and the capture that is underway."""

    now: Machine

    def __init__(self) -> None:
        Machine.now, self.current = self, 0
        self.streams: dict[int, Any] = {i: Stream(i) for i in (0, 1)}
        self.capturing: tuple[Stream, list[Callable[[], None]]] | None = None

    def set_stream(self, stream: Stream) -> None:
        self.current = stream.device.index
        self.streams[self.current] = stream

    def exchange(self, device: int) -> int:
        before, self.current = self.current, device if device >= 0 else self.current
        return before

    def launch(self, work: Callable[[], None], device: int) -> None:
        """Run work on a GPU's tensors, or note it where its stream is captured."""
        if self.capturing is not None and self.streams[device] is self.capturing[0]:
            self.capturing[1].append(work)
        else:
            work()


class Graph:
    """A CUDA graph: what was launched on the stream that captured it."""

    def __init__(self) -> None:
        self.work: list[Callable[[], None]] = []

    def capture_begin(self, *_: Any, **__: Any) -> None:
        Machine.now.capturing = (Machine.now.streams[Machine.now.current], self.work)

    def capture_end(self) -> None:
        Machine.now.capturing = None

    def replay(self) -> None:
        for work in self.work:
            work()


@pytest.fixture
def machine(monkeypatch):
    machine, cuda = Machine(), torch.cuda
    for name, value in {
        "is_available": lambda: True,
        "_lazy_init": lambda: None,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "set_stream": machine.set_stream,
        "current_stream": lambda device=None: machine.streams[
            machine.current if device is None else torch.device(device).index
        ],
        "current_device": lambda: machine.current,
        "_exchange_device": machine.exchange,
        "_maybe_exchange_device": machine.exchange,
        "synchronize": lambda *_: None,
        "empty_cache": lambda: None,
    }.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch._C, "_host_emptyCache", lambda: None, raising=False)
    monkeypatch.setattr(cuda.graph, "default_capture_stream", None)
    with torch.no_grad():
        yield machine


def on_gpu(machine: Machine, device: int) -> Callable[..., Callable[[], None]]:
    """Return a capture by `record` on a GPU, of a step whose tensors lie there."""

    def capture(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
        return record(lambda: machine.launch(step, device), torch.device("cuda", device))

    return capture


def capture_somebody_elses(machine: Machine) -> None:
    """Capture a graph on the first GPU, as torch's examples do."""
    with torch.cuda.graph(torch.cuda.CUDAGraph()):
        machine.launch(lambda: None, 0)


@pytest.mark.parametrize("order", [[1], [1, 0]], ids=str)
def test_a_graph_is_captured_on_the_gpu_of_its_model(machine, order):
    capture_somebody_elses(machine)
    model = tiny_model("jamba-dense-ends-in-attention")
    state = after(model, random_tokens(2, 5))
    before = dict(machine.streams)
    for device in order:
        graph = StepGraph(model, state, 20, on_gpu(machine, device))
        assert_follows(graph, state, 2)
        assert (machine.current, machine.streams) == (0, before)


def empty(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
    step()
    return lambda: None


def stale(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
    """Return a replay whose logits are right only the first time it runs after a load."""

    def replay() -> None:
        step()
        step.__self__._count.sub_(1)  # type: ignore[attr-defined]

    return replay


def rounded(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
    """Return a replay whose states alone are off by a little more than sums are."""

    def replay() -> None:
        step()
        for name, t in step.__self__._buffers.items():  # type: ignore[attr-defined]
            if name.endswith("ssm"):
                t.mul_(1.01)

    return replay


@pytest.mark.parametrize(
    ("capture", "differs"), [(empty, "logits"), (stale, "count of steps"), (rounded, "ssm")]
)
def test_a_graph_that_computes_another_step_is_not_used_and_warns_once(
    monkeypatch, capture, differs
):
    model = tiny_model("griffin")
    monkeypatch.setitem(step_graph.CAPTURES, "cpu", capture)
    with torch.no_grad():
        state = after(model, random_tokens(2, 5))
        with pytest.raises(RuntimeError, match=f"replay of the captured step gives.*{differs}"):
            StepGraph(model, state, 20)
        with pytest.warns(RuntimeWarning, match="one kernel at a time.*replay"):
            assert capture_steps(model, state, 100) is None
        assert capture_steps(model, state, 100) is None
        expected, _ = eager_step(model, random_tokens(2, 1), state)
        assert expected.isfinite().all()


def test_a_model_of_no_numbers_is_captured_as_it_is():
    model = tiny_model("griffin")
    model.ln_final.weight.data[0] = torch.nan
    with torch.no_grad():
        StepGraph(model, after(model, random_tokens(1, 5)), 20, lambda step, _: step)
