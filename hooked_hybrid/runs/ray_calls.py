"""Calls of Ray: connections, actors, and their results."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.ray_actor import Worker, pack_to_bytes

STARTS = 3
"""Attempts to start Ray, whose limit of 30 s is too short on a busy machine."""


@dataclass
class Unit:
    """Items still to do, and the number of workers that died on the first of them."""

    items: Sequence[Any]
    deaths: int = 0


@dataclass
class Slot:
    """The slot of one worker: the worker, and the answer that is awaited.

    A worker is `called` until the cluster has space for it, then `loading` the model; after
    that `idle` or `busy`. `lost` counts consecutive workers that died before loading it.
    """

    actor: Any
    answer: Any
    state: Literal["called", "loading", "idle", "busy"] = "called"
    unit: Unit | None = None
    lost: int = 0


class DiedError(Exception):
    """A worker, or its node, is gone."""


def connect(address: str, n_cores: int | None) -> bool:
    """Connect to a cluster, or start one here; return whether there was no connection before.

    Args:
        address: of `RayWorkers`.
        n_cores: number of cores for a Ray started here; None uses all.

    Raises:
        ValueError: the cluster has another version of Ray or Python.
        OSError: no cluster at the address, or Ray does not start.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address == "local":
        options |= {"num_cpus": n_cores, "include_dashboard": False}
    for left in reversed(range(STARTS)):
        try:
            ray.init(address, **options)
            break
        except OSError:
            raise
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"no work can be sent to {address}: {error}") from error
        except Exception as error:  # Ray raises a plain Exception after 30 s
            if not left:
                raise OSError(f"Ray cannot be started: {error} Try when less runs here") from error
    return True


def request_worker(cores: int, gpus: int | float) -> tuple[Any, Any]:
    """Request a new worker; return it and the reference of its first answer."""
    import ray

    asked: dict[str, Any] = {"num_cpus": cores, "num_gpus": gpus}
    actor: Any = ray.remote(**asked, max_restarts=0, max_task_retries=0)(Worker).remote()
    return actor, actor.hello.remote()


def room(cores: int, gpus: int | float) -> int:
    """Return how many workers with these cores and GPUs fit the nodes."""
    import ray

    has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    by_cores = [int(node.get("CPU", 0) // cores) for node in has]
    by_gpus = [int(node.get("GPU", 0) / gpus) for node in has] if gpus else by_cores
    return sum(map(min, by_cores, by_gpus))


def begin(slot: Slot, sent: tuple[int, Any], unit: Unit) -> None:
    """Send a unit of a job to an idle worker."""
    run = slot.actor.run.options(num_returns="streaming")
    slot.answer, slot.state, slot.unit = run.remote(*sent, unit.items), "busy", unit


def take_results(slot: Slot) -> Iterator[tuple[Any, Any]]:
    """Yield the next item of a worker's unit with its result; none at its end."""
    unit = slot.unit
    assert unit is not None
    try:
        result = value_of(slot.answer)
    except StopIteration:
        slot.state, slot.unit = "idle", None
        return
    item, unit.items, unit.deaths = unit.items[0], unit.items[1:], 0
    yield item, result


def value_of(answer: Any) -> Any:
    """Return an answer that has arrived.

    Raises:
        StopIteration: of a stream at its end.
        DiedError: no answer will come.
        Exception: what the worker raised.
    """
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return ray.get(next(answer) if isinstance(answer, ray.ObjectRefGenerator) else answer)
    except RayTaskError as error:
        cause = error.cause if isinstance(error.cause, Exception) else RuntimeError(str(error))
        raise cause from error
    except RayError as error:
        raise DiedError(what_died(str(error))) from error


def what_died(said: str) -> str:
    """Return the process and the cause of a death, from Ray's longer message."""
    said = " ".join(said.split())
    who = re.search(r" pid: (\d+) .*?ip: (\S+) (.*)", said)
    detail = re.sub(r".*Worker exit detail: ", "", who[3] if who else said)
    detail = re.split(r" Some common causes| Node Id:", detail)[0][:200]
    return f"process {who[1]} on {who[2]}: {detail}" if who else detail


def release(slot: Slot) -> None:
    """End a worker."""
    import ray

    with suppress(Exception):  # it, or its node, may be dead
        ray.kill(slot.actor)


def pack_model(model: HookedHybrid) -> bytes:
    """Return a model for workers.

    Raises:
        ValueError: it cannot be pickled.
    """
    try:
        return pack_to_bytes(model)
    except Exception as error:  # a model may hold anything
        raise ValueError(
            f"this model cannot be sent to workers ({type(error).__name__}: {error}): say how they "
            "load it, RayWorkers(load=...)"
        ) from error
