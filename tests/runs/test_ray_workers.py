"""What `RayWorkers` makes of workers that die and callers that err: workers of this process."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from ray import cloudpickle

from hooked_hybrid.runs import ray_calls, ray_workers
from hooked_hybrid.runs.identity.model import model_identity
from hooked_hybrid.runs.ray_actor import Worker, pack_to_bytes, versions
from hooked_hybrid.runs.ray_calls import DiedError, what_died
from hooked_hybrid.runs.ray_workers import MOST_DEATHS, RayWorkers
from hooked_hybrid.runs.work import Job
from tests.models import tiny_model


class Tens(Job[int, int]):
    def __call__(self, model: Any, items: Any) -> Iterator[int]:
        yield from (10 * item for item in items)


class Machine:
    """A stand-in for Ray with so many places, of which some kill whoever loads a model there."""

    def __init__(self, patch: pytest.MonkeyPatch, deadly: set[int], n: int = 2) -> None:
        self.free, self.deadly, self.n_started = list(range(n)), deadly, 0
        patch.setattr(ray, "put", lambda value: value)
        patch.setattr(ray, "wait", lambda answers, **_: (answers[:1], answers[1:]))
        patch.setattr(ray, "shutdown", lambda: None)
        patch.setattr(ray_workers, "connect", lambda *_: True)
        patch.setattr(ray_workers, "room", lambda *_: n)
        patch.setattr(ray_workers, "request_worker", lambda *_: self.called())
        patch.setattr(ray_workers, "release", lambda slot: self.free.append(slot.actor.place))
        for module in (ray_workers, ray_calls):
            patch.setattr(module, "value_of", lambda answer: answer())

    def called(self) -> tuple[Any, Callable[[], Any]]:
        place = self.free.pop(0)
        self.n_started += 1

        def load() -> None:
            if place in self.deadly:
                raise DiedError("of too little memory")

        def run(key: int, sent: list[bytes], items: Any) -> Callable[[], Any]:
            return iter(cloudpickle.loads(sent[0])(None, items)).__next__

        run_remote = SimpleNamespace(remote=run)
        actor = SimpleNamespace(
            place=place,
            load=SimpleNamespace(remote=lambda *_: load),
            run=SimpleNamespace(options=lambda **_: run_remote),
        )
        return actor, versions


def test_a_place_where_workers_die_is_given_up_and_the_others_continue(
    monkeypatch: pytest.MonkeyPatch, caplog: Any
):
    machine = Machine(monkeypatch, deadly={0})
    with caplog.at_level(logging.WARNING), RayWorkers(n=2) as workers:
        found = list(workers.results(tiny_model(), Tens(), [range(40)]))
        assert sorted(found) == [(i, 10 * i) for i in range(40)]
        assert machine.n_started <= 1 + MOST_DEATHS
    assert "died before it had the model (of too little memory)" in caplog.text


def test_where_workers_die_at_every_place_the_work_ends(monkeypatch: pytest.MonkeyPatch):
    machine = Machine(monkeypatch, deadly={0, 1})
    words = r"die before they have the model \(of too little memory\)"
    with RayWorkers(n=2) as workers, pytest.raises(OSError, match=words):
        list(workers.results(tiny_model(), Tens(), [range(40)]))
    assert machine.n_started == 2 * MOST_DEATHS


def test_workers_serve_one_caller_at_a_time(monkeypatch: pytest.MonkeyPatch):
    Machine(monkeypatch, deadly=set())
    with RayWorkers(n=2) as workers:
        first = workers.results(tiny_model(), Tens(), [range(9)])
        some = [next(first)]
        with pytest.raises(RuntimeError, match="these workers are at work"):
            next(workers.results(tiny_model(), Tens(), [range(9)]))
        assert sorted([*some, *first]) == [(i, 10 * i) for i in range(9)]
        begun = workers.results(tiny_model(), Tens(), [range(9)])
        next(begun)
        begun.close()
        assert len(list(workers.results(tiny_model(), Tens(), [range(9)]))) == 9


def test_the_end_of_the_block_ends_workers_and_a_later_read_is_an_error(
    monkeypatch: pytest.MonkeyPatch,
):
    machine = Machine(monkeypatch, deadly=set())
    with RayWorkers(n=2) as workers:
        results = workers.results(tiny_model(), Tens(), [range(9)])
        next(results)
    assert len(machine.free) == 2
    with pytest.raises(RuntimeError, match="the block of these workers has ended"):
        list(results)


def test_workers_of_a_model_that_has_changed_get_it_anew(monkeypatch: pytest.MonkeyPatch):
    machine, model = Machine(monkeypatch, deadly=set()), tiny_model()
    sent: list[Any] = []

    def pack(model: Any) -> bytes:
        sent.append((model.cfg.eos_token_id, model.unembed.soft_cap))
        return pack_to_bytes(model)

    monkeypatch.setattr(ray_workers, "pack_model", pack)
    with RayWorkers(n=2) as workers:
        for change in (None, None, "cfg", "cap"):
            if change == "cfg":
                model.cfg = model.cfg.with_overrides(eos_token_id=40)
            elif change == "cap":
                model.unembed.soft_cap = 3.0
            assert len(list(workers.results(model, Tens(), [range(4)]))) == 4
    assert sent == [(1, 30.0), (40, 30.0), (40, 3.0)]
    assert machine.n_started == 6


def test_a_worker_names_what_its_model_has_otherwise():
    ours = tiny_model()
    theirs = tiny_model()
    theirs.cfg = theirs.cfg.with_overrides(logits_soft_cap=10.0)
    precision = torch.get_float32_matmul_precision()
    with pytest.raises(ValueError, match="another model than .*config logits_soft_cap .* -> 10.0"):
        Worker().load(lambda: theirs, model_identity(ours), torch.get_num_threads(), precision)


class Refused(Exception):
    """An error that can be pickled, but not made again from that."""

    def __init__(self, url: str, code: int) -> None:
        super().__init__(f"{url} said {code}")


def test_any_error_of_loading_a_model_is_reported_whatever_its_class():
    def load() -> Any:
        raise Refused("hub", 403)

    precision = torch.get_float32_matmul_precision()
    with pytest.raises(RuntimeError, match="Refused: hub said 403"):
        Worker().load(load, {}, torch.get_num_threads(), precision)


def test_workers_notice_a_change_of_one_row_of_a_weight():
    model = tiny_model(seed=3)
    before = model_identity(model)
    with torch.no_grad():
        model.embed.W_E[7] = 0
    assert model_identity(model) != before


@pytest.mark.parametrize("gpus", [-1, 1.5, float("nan"), float("inf")])
def test_gpus_that_no_worker_can_have_are_refused(gpus: float):
    with pytest.raises(ValueError, match="give a part of one, or a whole number"):
        RayWorkers(gpus_per_worker=gpus)


DIED = """The actor died unexpectedly before finishing this task.
\tclass_name: Worker
\tactor_id: 3ee622309dbeb51b2deba00a01000000
\tpid: 14152
\tnamespace: d7134b64-4662-4e9c-8f84-a5709519415c
\tip: 192.0.2.2
"""
"""As Ray 2.60 says it."""


@pytest.mark.parametrize(
    ("said", "told"),
    [
        (
            DIED + "The actor is dead because its worker process has died. Worker exit type: "
            "SYSTEM_ERROR Worker exit detail: Worker unexpectedly exits with a connection error "
            "code 2. End of file. Some common causes include: (1) the process was killed by",
            "process 14152 on 192.0.2.2: Worker unexpectedly exits with a connection error code 2. "
            "End of file.",
        ),
        (
            DIED + "The actor died because its node has died. Node Id: 6cc0f",
            "process 14152 on 192.0.2.2: The actor died because its node has died.",
        ),
        ("Failed to retrieve\nobject 00ff.", "Failed to retrieve object 00ff."),
    ],
)
def test_the_report_of_a_dead_worker_gives_only_its_name_and_the_cause(said: str, told: str):
    assert what_died(said) == told
