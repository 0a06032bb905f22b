"""Timing several ways to do one thing, round by round, so that a slow minute affects them all."""

from __future__ import annotations

import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

Work = Callable[[], Any]
T = TypeVar("T")

SHORTEST = 0.05
"""Least seconds of one timed stretch: shorter work is repeated."""
TOLERANCE = 1e-4
"""Largest difference of two results, over the largest entry, with which they count as equal."""


class DisagreementError(Exception):
    """Two implementations compute different results, so that their times are not comparable."""


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    what: str = "",
    check: Callable[[dict[str, Any]], None] | None = None,
    shortest: float = SHORTEST,
    read: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round.

    Garbage is collected in between. The first round warms up, determines how often short work is
    repeated, and is not kept. The order changes from round to round.

    Args:
        works: what to time, by name.
        rounds: number of rounds to keep.
        what: shown with the progress.
        check: called with the works' results of the first round; raises an error if they disagree.
        shortest: least seconds of a timed stretch.
        read: the seconds so far; None for `clock`, which counts this process only.
    """
    names = list(works)
    results, times = {}, {}
    with no_collector():
        for name in names:
            results[name], times[name] = timed(works[name], read=read)
        if check is not None:
            check(results)
        results.clear()
        repeats = {name: max(1, math.ceil(shortest / max(times[name], 1e-9))) for name in names}
        kept: dict[str, list[float]] = {name: [] for name in names}
        for i in progress(range(rounds), what):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                gc.collect()
                kept[name].append(timed(works[name], repeats[name], read)[1])
    return kept


def timed(
    work: Work, repeats: int = 1, read: Callable[[], float] | None = None
) -> tuple[Any, float]:
    """Return the result of some work and its seconds by `read`, else by `clock`."""
    read = read or clock
    start = read()
    for _ in range(repeats - 1):
        work()
    result = work()
    return result, (read() - start) / repeats


def clock() -> float:
    """Return the seconds so far: of the processor if one thread works, else of the wall clock.

    The two are the same on an idle machine; on a shared one, the first leaves out other programs.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def no_collector() -> Iterator[None]:
    """Disable automatic garbage collection in a `with` block, and freeze existing objects."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def check_equal(results: Mapping[str, Any], tolerance: float = TOLERANCE) -> None:
    """Raise an error if two tensors differ; other values are not compared.

    Raises:
        DisagreementError: the difference over the largest entry is above `tolerance`.
    """
    tensors = {name: value for name, value in results.items() if isinstance(value, Tensor)}
    if not tensors:
        return
    (first, wanted), *others = tensors.items()
    for name, value in others:
        flat, reference = value.detach().double().flatten(), wanted.detach().double().flatten()
        if flat.shape != reference.shape:
            raise DisagreementError(f"{first} and {name} give {wanted.shape} and {value.shape}")
        difference = float((flat - reference).abs().max() / reference.abs().max())
        if not difference <= tolerance:
            raise DisagreementError(f"{first} and {name} differ by {difference:.1e}")


def progress(items: Iterable[T], what: str = "", unit: str = "round") -> Iterable[T]:
    """Show the progress of a loop on the standard error, if it is a terminal."""
    return tqdm(items, desc=what, unit=unit, file=sys.stderr, leave=False, disable=None)
