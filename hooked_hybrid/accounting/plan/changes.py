"""The smallest changes of a machine or a task that make a model fit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from hooked_hybrid.accounting.plan.machine import ANY_DISK, UNITS, Machine, show_size
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.working import Sizes

GB = UNITS["GB"]
MOST_GPUS = 64
MOST_GB = 2**20
SCHEMES = ("int8", "nf4")


class Change(NamedTuple):
    """A change that would be sufficient."""

    option: str
    """As an option of the command."""
    to_load: str | None
    """As text for callers of `from_pretrained`; None if `from_pretrained` has no such argument."""


def changes(sizes: Sizes, machine: Machine, longest: int) -> Iterator[Change]:
    """Yield the smallest sufficient change of each kind.

    Args:
        sizes: of a model that does not fit.
        machine: its memory.
        longest: tokens of the longest input.
    """

    def fits(changed: Machine) -> bool:
        return Planner(sizes, changed, longest).fits()

    def fits_as(changed: Sizes) -> bool:
        return Planner(changed, machine, longest).fits()

    yield from _of_gpus(machine, fits)
    if sizes.quantize is None or not machine.gpus:
        cpu = _smallest(lambda gb: fits(replace(machine, cpu=gb * GB)), machine.cpu // GB, MOST_GB)
        if cpu is not None:
            yield Change(f"--cpu {cpu}GB", f"{cpu} GB of CPU memory")
    if machine.disk is None and fits(replace(machine, disk=ANY_DISK)):
        yield Change("--disk", "offload_folder=")
    shorter = _largest(lambda length: Planner(sizes, machine, length).fits(), longest)
    if shorter is not None:
        yield Change(f"--lengths {shorter}", None)
    if sizes.dtype.itemsize > 2 and fits_as(_as(sizes, torch.bfloat16, sizes.quantize)):
        yield Change("--dtype bfloat16", "dtype=torch.bfloat16")
    for scheme in _narrower(sizes.quantize):
        with suppress(ImportError, ValueError):  # no torchao, or a shape that it does not support
            if fits_as(_as(sizes, sizes.dtype, scheme)):
                yield Change(f"--quantize {scheme}", f"quantize={scheme!r}")
                break
    rows = _largest(lambda batch: fits_as(sizes.of_rows(batch)), sizes.batch)
    if rows is not None:
        yield Change(f"--batch {rows}", None)


def _of_gpus(machine: Machine, fits: Callable[[Machine], bool]) -> Iterator[Change]:
    """Yield more GPUs, and larger ones, if all are alike."""
    if not machine.is_uniform:
        return
    n, size = len(machine.gpus), machine.gpus[0]
    more = _smallest(lambda m: fits(machine.with_gpus(m, size)), n, MOST_GPUS)
    if more is not None:
        yield Change(f"--gpus {more}x{_size(size)}", f"{more} GPUs of {show_size(size)}")
    larger = _smallest(lambda gb: fits(machine.with_gpus(n, gb * GB)), size // GB, MOST_GB)
    if larger is not None:
        yield Change(f"--gpus {n}x{larger}GB", f"{n} x {larger} GB of GPU memory")


def _as(sizes: Sizes, dtype: torch.dtype, quantize: str | None) -> Sizes:
    return Sizes(sizes.cfg, dtype, sizes.batch, sizes.on_cpu, quantize, sizes.quantize_only)


def _narrower(scheme: str | Any | None) -> tuple[str, ...]:
    """Return the schemes that need fewer bytes than a given one."""
    if scheme is None:
        return SCHEMES
    return SCHEMES[1:] if scheme == "int8" else ()


def _smallest(fits: Callable[[int], bool], above: int, most: int) -> int | None:
    """Return the smallest number over `above` that fits, or None; every larger one must fit too."""
    if above >= most or not fits(most):
        return None
    low, high = above, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _largest(fits: Callable[[int], bool], below: int) -> int | None:
    """Return the largest number from 1 to `below - 1` that fits, or None."""
    if below <= 1 or not fits(1):
        return None
    low, high = 1, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(n_bytes: int) -> str:
    """Return an exact size in the form of the command's option."""
    units = ((unit, n) for unit, n in (("GB", GB), ("MB", UNITS["MB"])) if n_bytes % n == 0)
    unit, n = next(units, ("B", 1))
    return f"{n_bytes // n}{unit}"
