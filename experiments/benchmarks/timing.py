"""Timing several ways to do one thing, round by round, so that a slow minute hits all of them."""

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
"""Seconds of one timed stretch at least: shorter work is repeated."""
TOLERANCE = 1e-4
"""Largest difference of two results, over the largest entry, with which they count as equal."""


class DisagreementError(Exception):
    """Two competitors do not compute the same, so that their times would not compare."""


def interleaved(
    works: Mapping[str, Work],
    rounds: int,
    what: str = "",
    check: Callable[[dict[str, Any]], None] | None = None,
    shortest: float = SHORTEST,
    read: Callable[[], float] | None = None,
) -> dict[str, list[float]]:
    """Return the seconds of each work in each round.

    Garbage is collected in between. A first round warms up, is not kept, and says how often to
    repeat short work. Who begins changes from round to round.

    Args:
        works: what to time, by name.
        rounds: how many to keep.
        what: shown with the progress.
        check: given what the works returned in the first round; raises where they disagree.
        shortest: seconds of a timed stretch at least.
        read: the seconds so far; None for `clock`, which sees this process alone.
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
    """Return what some work returns and the seconds it takes by `read`, else by `clock`."""
    read = read or clock
    start = read()
    for _ in range(repeats - 1):
        work()
    result = work()
    return result, (read() - start) / repeats


def clock() -> float:
    """Return the seconds so far: the processor's where one thread works, else the wall's.

    The two are the same on an idle machine; on a shared one, the first leaves out other programs.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@contextmanager
def no_collector() -> Iterator[None]:
    """Collect no garbage by itself in a `with` block, and what is there already never."""
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def check_equal(results: Mapping[str, Any], tolerance: float = TOLERANCE) -> None:
    """Raise where two tensors differ; what is not a tensor is left out.

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
    """Show on the standard error how far a loop is, where somebody is looking."""
    return tqdm(items, desc=what, unit=unit, file=sys.stderr, leave=False, disable=None)
