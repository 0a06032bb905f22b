"""Work distributed over a Ray cluster, by workers that load the model once and may die.

The caller of `RayWorkers.results` cuts work into items and gets every result once. If a worker or
a node dies, only its current item is repeated: the rest of its unit goes to another worker, and a
new worker is started where the cluster has space. A worker has one unit at a time, so the unit on
which it died is known; the gap between units is a few milliseconds.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from itertools import count
from typing import Any, TypeVar

import torch

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.identity.model import model_identity
from hooked_hybrid.runs.ray_actor import Source, versions
from hooked_hybrid.runs.ray_calls import (
    DiedError,
    Slot,
    Unit,
    begin,
    connect,
    pack_model,
    release,
    request_worker,
    room,
    take_results,
    value_of,
)
from hooked_hybrid.runs.work import Job, spread

Item = TypeVar("Item")
Result = TypeVar("Result")
_LOG = logging.getLogger(__name__)
MOST_DEATHS = 3
"""Consecutive workers that may die on one item, or while loading in one slot."""
PIECES = 4
"""Units for each worker, so that no worker is idle for long at the end."""


class RayWorkers:
    """Workers on a Ray cluster, during a `with` block.

    Args:
        address: "local" starts Ray on this machine; otherwise the address of a cluster for
            `ray.init` ("auto", "HOST:PORT"). An existing connection of this process is used.
        n: workers; None is as many as fit the cluster.
        gpus_per_worker: 0 runs models on processors; 0.5 puts two workers on a GPU.
        threads: processor cores of each worker. Results are those of a process with as many
            threads.
        load: a function that loads the model, such as `partial(HookedHybrid.from_pretrained,
            "NAME", dtype=torch.bfloat16, device="cuda")`; None sends the caller's model through
            Ray's object store, to the worker's GPU if it has one.
        patience: seconds to wait for a cluster without space for any worker.

    Raises:
        ValueError: an argument out of range, a Ray client's address, or Ray is not installed.
    """

    def __init__(
        self,
        address: str = "local",
        n: int | None = None,
        gpus_per_worker: int | float = 0,
        threads: int = 1,
        load: Callable[[], HookedHybrid] | None = None,
        patience: int | float = 600,
    ) -> None:
        if find_spec("ray") is None:
            raise ValueError("workers need Ray: pip install 'hooked-hybrid[ray]'")
        gpus = float(gpus_per_worker)
        if (n is not None and n < 1) or threads < 1:
            raise ValueError(f"{n} workers of {threads} threads: give 1 of each or more")
        if not (0 <= gpus < 1 or (gpus >= 1 and gpus.is_integer())):
            raise ValueError(f"{gpus} GPUs for a worker: give a part of one, or a whole number")
        if address.startswith("ray://"):
            raise ValueError(
                f"{address} is a Ray client's: run this on a machine of the cluster, with the "
                "address 'auto'"
            )
        self.address, self.n, self.load, self.patience = address, n, load, patience
        self.gpus_per_worker, self.threads = gpus_per_worker, threads
        self._depth, self._owns_ray, self._is_working = 0, False, False
        self._slots: list[Slot] = []
        self._source: tuple[dict[str, Any], HookedHybrid | None, Source] = ({}, None, [])
        self._keys = count()

    # --- as long as a `with` block ----------------------------------------------------------

    def __enter__(self) -> RayWorkers:
        """Begin a block; Ray and workers are started when there is work."""
        self._depth += 1
        return self

    def __exit__(self, *_: object) -> None:
        """Release the workers at the end of the outermost block, and the connection made here."""
        self._depth -= 1
        if self._depth:
            return
        self._release_all()
        self._source = ({}, None, [])
        if self._owns_ray:
            import ray

            ray.shutdown()
            self._owns_ray = False

    # --- work -------------------------------------------------------------------------------

    def check(self, model: HookedHybrid, parts: Mapping[str, Any]) -> None:
        """Raise the errors that would stop the work, without starting anything.

        Args:
            model: the model of the work.
            parts: objects sent to workers, by their names for errors.

        Raises:
            ValueError: a part that cannot be pickled, or a model with hooks on it, which a
                worker's model would not have.
        """
        from ray import cloudpickle

        if hooked := model.list_hooks():
            raise ValueError(
                f"{next(iter(hooked))} has a hook on it, which the models of workers would not "
                "have: give it as a setting's, or take it off"
            )
        for name, part in parts.items():
            try:
                cloudpickle.dumps(part)
            except Exception as error:  # a value's own `__reduce__` may raise anything
                raise ValueError(
                    f"{name} cannot be sent to workers ({type(error).__name__}: {error}): let its "
                    "functions hold only what can be pickled, or run it without Ray"
                ) from error

    def results(
        self, model: HookedHybrid, job: Job[Item, Result], units: Sequence[Sequence[Item]]
    ) -> Generator[tuple[Item, Result], None, None]:
        """Yield every item with its result, as completed; close it if not read to the end.

        Args:
            model: the caller's model, with which the workers' models are compared.
            job: the work on each item.
            units: items that are cheaper together; long units are cut, and the costliest run first.

        Raises:
            ValueError: as `check`; a worker's model, library or torch differs from the caller's; or
                no machine has the cores and GPUs of a worker, and none can be added.
            OSError: three consecutive workers died on one item, or in every slot while loading the
                model; or there was no space for any worker within `patience`.
            RuntimeError: other results of these workers are being read, or their block has ended.
            Exception: any error of a worker, which also stops the others.
        """
        if not any(units):
            return
        if self._is_working:
            raise RuntimeError("these workers are at work: read those results to the end, or close")
        import ray
        from ray import cloudpickle

        self.check(model, {f"the work ({type(job).__name__})": job})
        with ExitStack() as block:
            if not self._depth:
                block.enter_context(self)
            self._is_working = True
            block.callback(self._rest)
            self._prepare(model)
            sent = (next(self._keys), [ray.put(cloudpickle.dumps(job))])
            pieces = spread(job, units, PIECES * len(self._slots))
            todo = deque(Unit(items) for items in pieces)
            yield from self._worked(job, sent, todo)

    def _release_all(self) -> None:
        while self._slots:
            release(self._slots.pop())

    def _rest(self) -> None:
        """Stop the workers that are still busy, as their results are no longer needed."""
        for slot in [slot for slot in self._slots if slot.state == "busy"]:
            release(slot)
            self._slots.remove(slot)
        self._is_working = False

    def _worked(
        self, job: Job[Item, Result], sent: tuple[int, Any], todo: deque[Unit]
    ) -> Generator[tuple[Item, Result], None, None]:
        """Give units to idle workers and collect results, until all are done."""
        since, n_left = time.monotonic(), sum(len(unit.items) for unit in todo)
        while n_left or any(slot.state == "busy" for slot in self._slots):
            if not self._slots:
                raise RuntimeError("the block of these workers has ended: read results within it")
            for slot in self._slots:
                if slot.state == "idle" and todo:
                    begin(slot, sent, todo.popleft())
            for slot in self._ready():
                try:
                    if slot.state == "busy":
                        for found in take_results(slot):
                            n_left -= 1
                            yield found
                    else:
                        self._advance(slot)
                except DiedError as error:
                    self._bury(slot, error, job, todo)
                except Exception:  # an error of the work itself
                    release(slot)
                    self._slots.remove(slot)
                    raise
            if any(slot.state != "called" for slot in self._slots):
                since = time.monotonic()
            elif time.monotonic() - since > self.patience:
                raise TimeoutError(
                    f"no room for a worker of {self._needs} in {self.patience:.0f} s: go on when "
                    "the cluster has some; what is done is kept"
                )

    def _ready(self) -> list[Slot]:
        """Return the slots with an answer, after at most a second."""
        import ray

        waiting = {id(slot.answer): slot for slot in self._slots if slot.state != "idle"}
        answers = [slot.answer for slot in waiting.values()]
        ready, _ = ray.wait(answers, timeout=1, fetch_local=False)
        return [waiting[id(answer)] for answer in ready]

    def _advance(self, slot: Slot) -> None:
        """Advance a worker that is not yet ready for work."""
        found = value_of(slot.answer)
        if slot.state == "loading":
            slot.state, slot.lost = "idle", 0
            return
        if found != versions():
            raise ValueError(f"a worker has {found}, this process {versions()}: install the same")
        identity, _, source = self._source
        precision = torch.get_float32_matmul_precision()
        slot.answer = slot.actor.load.remote(source, identity, self.threads, precision)
        slot.state = "loading"

    def _bury(self, slot: Slot, error: DiedError, job: Job[Any, Any], todo: deque[Unit]) -> None:
        """Replace a dead worker, and return its work to the queue."""
        unit, was_busy = slot.unit, slot.state == "busy"
        release(slot)
        if not was_busy:
            slot.lost += 1
            _LOG.warning("a worker died before it had the model (%s)", error)
            if slot.lost == MOST_DEATHS:  # such as on a machine with too little memory
                self._slots.remove(slot)
                if self._slots:
                    return
                raise OSError(f"workers die before they have the model ({error}): is it too large?")
        slot.actor, slot.answer = request_worker(self.threads, self.gpus_per_worker)
        slot.state, slot.unit = "called", None
        if unit is not None and unit.items:
            unit.deaths += 1
            todo.appendleft(unit)
            what = job.describe(unit.items[:1])
            if unit.deaths >= MOST_DEATHS:
                raise OSError(f"{unit.deaths} workers died one after another on {what} ({error})")
            _LOG.warning("a worker died on %s, which goes to another (%s)", what, error)

    def _prepare(self, model: HookedHybrid) -> None:
        """Start the missing workers, with this model."""
        import ray

        self._owns_ray |= connect(self.address, self.n and self.n * self.threads)
        identity, own = model_identity(model), model if self.load is None else None
        if self._source[:2] != (identity, own):  # another model, or this one with a change
            self._release_all()
            source = self.load or [ray.put(pack_model(model))]
            self._source = (identity, own, source)
        held = room(self.threads, self.gpus_per_worker)
        if not held:
            missing = f"no machine of the cluster has {self._needs} for a worker"
            if self.n is None or (self._owns_ray and self.address == "local"):
                raise ValueError(missing)
            _LOG.warning("%s: waiting %.0f s for one that has", missing, self.patience)
        while len(self._slots) < (self.n or held):
            self._slots.append(Slot(*request_worker(self.threads, self.gpus_per_worker)))

    @property
    def _needs(self) -> str:
        return f"{self.threads} CPU and {self.gpus_per_worker:g} GPU"
