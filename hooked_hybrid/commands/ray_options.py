"""Options of a command that may run on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Annotated, Any

import typer

from hooked_hybrid.commands.option_groups import refuse_given
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.ray_workers import RayWorkers


def where(text: str, *names: str, **settings: Any) -> Any:
    """Return an option on the place of a model; the help groups these."""
    return typer.Option(*names, help=text, rich_help_panel="Where the model runs", **settings)


def elsewhere(text: str, *names: str, **settings: Any) -> Any:
    """Return an option of models larger than a device, or of clusters."""
    panel = "Large models, several machines"
    return typer.Option(*names, help=text, rich_help_panel=panel, **settings)


Ray = Annotated[
    str | None,
    elsewhere(
        "Run on a Ray cluster: --ray local starts one here, --ray HOST:PORT or auto uses one.",
        "--ray",
        show_default="in this process",
    ),
]
Workers = Annotated[
    int | None,
    elsewhere(
        "Processes that load the model, of --threads cores each: --ray auto --workers 8.",
        min=1,
        show_default="as many as fit the cluster",
    ),
]
GpusPerWorker = Annotated[
    float,
    elsewhere("GPUs of each, 0.5 for two on one: --ray auto --gpus-per-worker 1.", min=0),
]


def workers_of(
    ray: str | None,
    workers: int | None,
    gpus_per_worker: int | float,
    threads: int | None,
    device: str,
    load: Callable[..., HookedHybrid],
) -> AbstractContextManager[RayWorkers | None]:
    """Return the workers of these options, as a context manager; None for this process.

    Args:
        ray, workers, gpus_per_worker: the options above.
        threads: cores of each worker; None is 1.
        device: the option; with GPUs, the workers' device is always "cuda". A device map sees only
            the GPUs of its worker.
        load: called with `device=` in each worker, and pickled for it.

    Raises:
        ValueError: options of Ray without `--ray`, a GPU for this process alone, a device with
            workers' GPUs, or no Ray.
    """
    if ray is None:
        if workers is not None or gpus_per_worker:
            raise ValueError("--workers, --gpus-per-worker: give --ray too, --ray local for one")
        return nullcontext()
    if device != "cpu" and not gpus_per_worker:
        raise ValueError(
            f"--device {device} with --ray: give --gpus-per-worker 1, or workers have no GPU"
        )
    if gpus_per_worker and device not in ("cpu", "cuda"):
        raise ValueError(
            f"--device {device} has no effect with --gpus-per-worker: Ray says which GPU a worker "
            "sees, leave it out"
        )
    if gpus_per_worker and device == "cpu":
        refuse_given("a worker with a GPU runs on it; leave one of them out", "device")
    on = "cuda" if gpus_per_worker else device
    return RayWorkers(ray, workers, gpus_per_worker, threads or 1, partial(load, device=on))
