"""The smallest changes of a machine or a task with which a model that does not fit would."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

from hooked_hybrid.placement.machine import UNITS, Machine
from hooked_hybrid.placement.planning import Plan, Planner
from hooked_hybrid.placement.sizes import Sizes

GB = UNITS["GB"]
MOST_GPUS = 64
MOST_GB = 2**20


def changes(plan: Plan) -> Iterator[str]:
    """Yield changes that would each do by itself, as options of the command."""
    machine, longest = plan.machine, max(plan.lengths)

    def fits(changed: Machine, length: int = longest) -> bool:
        return Planner(plan.sizes, changed, length).fits()

    if machine.gpus and machine.is_uniform:
        n, size = len(machine.gpus), machine.gpus[0]
        if (
            more := _smallest(lambda m: fits(machine.with_gpus(m, size)), n, MOST_GPUS)
        ) is not None:
            yield f"--gpus {more}x{_size(size)}"
        larger = _smallest(lambda gb: fits(machine.with_gpus(n, gb * GB)), size // GB, MOST_GB)
        if larger is not None:
            yield f"--gpus {n}x{larger}GB"
    cpu = _smallest(lambda gb: fits(replace(machine, cpu=gb * GB)), machine.cpu // GB, MOST_GB)
    if cpu is not None:
        yield f"--cpu {cpu}GB"
    if machine.disk is None and fits(replace(machine, disk=2**62)):
        yield "--disk"
    if (shorter := _largest(lambda length: fits(machine, length), longest)) is not None:
        yield f"--lengths {shorter}"
    if plan.sizes.dtype.itemsize > 2:
        narrow = Sizes(plan.sizes.cfg, torch.bfloat16, plan.sizes.batch, plan.sizes.on_cpu)
        if Planner(narrow, machine, longest).fits():
            yield "--dtype bfloat16"
    if plan.sizes.batch > 1 and (rows := _largest(_fits_rows(plan), plan.sizes.batch)) is not None:
        yield f"--batch {rows}"


def _fits_rows(plan: Plan) -> Callable[[int], bool]:
    def fits(rows: int) -> bool:
        sizes = Sizes(plan.sizes.cfg, plan.sizes.dtype, rows, plan.sizes.on_cpu)
        return Planner(sizes, plan.machine, max(plan.lengths)).fits()

    return fits


def _smallest(fits: Callable[[int], bool], above: int, most: int) -> int | None:
    """Return the smallest number above one that fits, or None: what fits, fits with more too."""
    if above >= most or not fits(most):
        return None
    low, high = above, most
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high


def _largest(fits: Callable[[int], bool], below: int) -> int | None:
    """Return the largest number from 1 on, below one that does not fit, or None."""
    if below <= 1 or not fits(1):
        return None
    low, high = 1, below
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _size(n_bytes: int) -> str:
    """Return a size as the command takes it, exactly."""
    units = ((unit, n) for unit, n in (("GB", GB), ("MB", UNITS["MB"])) if n_bytes % n == 0)
    unit, n = next(units, ("B", 1))
    return f"{n_bytes // n}{unit}"


__all__ = ["changes"]
