"""Which part of a model goes where, decided from the config before anything is loaded.

Blocks go to the devices in order, so that the residual stream crosses each border once; the ends
go to the first. What fits on few devices stays on few, filled evenly. What no device has room for
stays on the CPU, and then on the disk, and is brought to the last device that holds a block.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.placement.machine import Machine, shown
from hooked_hybrid.placement.places import DISK, ENDS
from hooked_hybrid.placement.sizes import Sizes
from hooked_hybrid.placement.split import Split, Usage

ROOM = 2048
"""Tokens of a prompt for which `device_map="auto"` leaves room."""
CUDA_CONTEXT = 10**9
"""Bytes of a GPU that CUDA, its libraries and the gaps between tensors are taken to need."""
EVENLY = 32
"""Steps in which the evenest filling is looked for: a share of 2^-32 is nothing."""


class Planner:
    """Looks for a split of one model over one machine, for prompts of one length."""

    def __init__(self, sizes: Sizes, machine: Machine, length: int) -> None:
        self.sizes, self.machine, self.length = sizes, machine, length
        self.names = [name for name, _ in machine.devices]
        self.room = [n for _, n in machine.devices]
        self.n_layers = sizes.cfg.n_layers
        self._weights = [sizes.weights[f"blocks.{i}"] for i in range(self.n_layers)]
        self._ends = sum(sizes.weights[part] for part in ENDS)

    @cached_property
    def _sums(self) -> tuple[list[int], list[int], list[int]]:
        """Weights, states and what stands beside these, of the first n blocks."""
        states, beside = (
            [of(i, self.length) for i in range(self.n_layers)]
            for of in (self.sizes.state, self.sizes.beside_state)
        )
        weights, states, beside = (
            [0, *accumulate(each)] for each in (self._weights, states, beside)
        )
        return weights, states, beside

    @cached_property
    def _working(self) -> list[int]:
        return [self.sizes.working(i, self.length) for i in range(self.n_layers)]

    def usage(self, held: range, elsewhere: range, is_first: bool) -> Usage:
        """Return what a device holds that keeps some blocks and runs others too."""
        own, others = slice(held.start, held.stop), slice(elsewhere.start, elsewhere.stop)
        working = max((*self._working[own], *self._working[others]), default=0)
        if is_first:
            working = max(working, self.sizes.ends(self.length))
        if elsewhere:
            working += self.sizes.streams(self.length)
        weights, states, beside = self._sums
        return Usage(
            weights=_within(weights, held) + (self._ends if is_first else 0),
            brought=max(self._weights[others], default=0),
            state=_within(states, held) + _within(states, elsewhere),
            working=working + _within(beside, held) + _within(beside, elsewhere),
            context=CUDA_CONTEXT if self.machine.gpus else 0,
        )

    def usages(self, split: Split) -> list[Usage]:
        """Return what each device holds."""
        tail = split.kept_elsewhere
        found = [
            self.usage(split.blocks(k), tail if k == split.last else range(0), k == 0)
            for k in range(len(split.held))
        ]
        is_used = (k == 0 or n > 0 for k, n in enumerate(split.held))
        return [
            used if runs else Usage(0, 0, 0, 0, 0)
            for used, runs in zip(found, is_used, strict=True)
        ]

    def fits(self) -> bool:
        """Return whether there is a split."""
        return self.find(evenly=False) is not None

    def find(self, evenly: bool = True) -> Split | None:
        """Return the split with most blocks on devices, or None where there is none.

        Args:
            evenly: fill devices to equal shares; else one after another.
        """
        for n_held in range(self.n_layers, -1, -1):
            n_kept = self.n_layers - n_held
            rest = self._rest(n_held)
            if n_kept and rest is None:
                continue
            if (held := self._on_devices(n_held, evenly)) is not None:
                return Split(held, *(rest or (0, 0)))
        return None

    def _rest(self, n_held: int) -> tuple[int, int] | None:
        """Return how many of the other blocks go to the CPU and to the disk, or None."""
        on_cpu, free = 0, self.machine.cpu if self.machine.gpus else 0
        kept = self._weights[n_held:]
        while on_cpu < len(kept) and kept[on_cpu] <= free:
            free -= kept[on_cpu]
            on_cpu += 1
        on_disk = kept[on_cpu:]
        if on_disk and (self.machine.disk is None or sum(on_disk) > self.machine.disk):
            return None
        return on_cpu, len(on_disk)

    def _on_devices(self, n_held: int, evenly: bool) -> tuple[int, ...] | None:
        """Return the blocks of each device, on as few as will do."""
        for n_used in range(1, min(len(self.room), self.n_layers) + 1):
            if (best := self._fill(n_held, n_used, 1.0)) is None:
                continue
            if evenly and n_held == self.n_layers:  # else the devices are full anyway
                low, high = 0.0, 1.0
                for _ in range(EVENLY):
                    share = (low + high) / 2
                    found = self._fill(n_held, n_used, share)
                    low, high, best = (share, high, best) if found is None else (low, share, found)
            return best + (0,) * (len(self.room) - n_used)
        return None

    def _fill(self, n_held: int, n_used: int, share: float) -> tuple[int, ...] | None:
        """Return the blocks of each of the first devices, filled one after another, or None."""
        tail = range(n_held, self.n_layers)
        held, done = [], 0
        for k in range(n_used):
            is_last, left = k == n_used - 1, n_held - done
            most = left if is_last else left - 1  # the last holds a block: there the others run
            n = most
            if not is_last:
                n = self._most(done, max(most, 0), k == 0, self.room[k] * share)
            if n < 0 or (is_last and n_used > 1 and n == 0):
                return None
            used = self.usage(range(done, done + n), tail if is_last else range(0), k == 0)
            if used.total > self.room[k] * share:
                return None
            held.append(n)
            done += n
        return tuple(held)

    def _most(self, start: int, most: int, is_first: bool, room: float) -> int:
        """Return how many blocks from one on fit into a device, or -1 if not even the ends do."""
        for n in range(most + 1):
            if self.usage(range(start, start + n), range(0), is_first).total > room:
                return n - 1
        return most


def _within(sums: list[int], blocks: range) -> int:
    """Return the sum over some blocks, from the sums over the first ones."""
    return sums[blocks.stop] - sums[blocks.start]


@dataclass(frozen=True)
class Plan:
    """Where a model goes, what each device then holds by length, and why not if it cannot."""

    sizes: Sizes
    machine: Machine
    lengths: tuple[int, ...]
    split: Split | None
    """For the longest of the lengths."""

    @property
    def fits(self) -> bool:
        """Whether there is a place for everything, at every length."""
        return self.split is not None

    @property
    def device_map(self) -> dict[str, str]:
        """The places, as `from_pretrained` takes them.

        Raises:
            MemoryError: see `require`.
        """
        return self.require()

    def require(self) -> dict[str, str]:
        """Return the device map.

        Raises:
            MemoryError: there is none; says why, and what would do.
        """
        if self.split is None:
            raise MemoryError(f"{self.why_not}. {self.remedy}")
        names = [name for name, _ in self.machine.devices]
        split = self.split
        places = {part: names[0] for part in ENDS}
        blocks = [name for name, n in zip(names, split.held, strict=True) for _ in range(n)]
        blocks += ["cpu"] * split.on_cpu + [DISK] * split.on_disk
        places |= {f"blocks.{i}": name for i, name in enumerate(blocks)}
        order = ("embed", *(f"blocks.{i}" for i in range(len(blocks))), *ENDS[1:])
        return {part: places[part] for part in order}

    def usages(self, length: int) -> list[Usage]:
        """Return what each device holds at a length, in the order of `machine.devices`."""
        assert self.split is not None
        return Planner(self.sizes, self.machine, length).usages(self.split)

    @cached_property
    def whole(self) -> Usage:
        """What one device would hold of it all, at the longest length."""
        planner = Planner(self.sizes, self.machine, max(self.lengths))
        return planner.usage(range(planner.n_layers), range(0), is_first=True)

    @property
    def why_not(self) -> str:
        """Why there is no place for everything."""
        whole, devices = self.whole, self.machine.devices
        offered = sum(n for _, n in devices)
        gpus = f"{len(devices)} GPUs offer" if len(devices) > 1 else "the GPU offers"
        kind = gpus if self.machine.gpus else "the CPU offers"
        beside = [f"{shown(self.machine.cpu)} of CPU memory"] if self.machine.gpus else []
        if self.machine.disk is None:
            beside.append("nothing on the disk")
        else:
            beside.append(f"{shown(self.machine.disk)} on the disk")
        return (
            f"weights of {shown(whole.weights)}, and for {self.sizes.batch} x "
            f"{max(self.lengths):,} tokens a state of {shown(whole.state)} and "
            f"{shown(whole.working)} to work in, do not fit: {kind} {shown(offered)}, beside "
            f"{' and '.join(beside)}"
        )

    @property
    def remedy(self) -> str:
        """What would do, each by itself."""
        found = list(self.changes)
        return f"It would fit with {', or '.join(found)}" if found else "No single change will do"

    @property
    def changes(self) -> Iterator[str]:
        """The smallest changes that would do, each by itself."""
        from hooked_hybrid.placement.changes import changes

        return changes(self)


def plan(
    cfg: HybridConfig,
    machine: Machine,
    lengths: Sequence[int] = (ROOM,),
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
) -> Plan:
    """Return where a model would go, from its config alone.

    Args:
        cfg: what the model is.
        machine: what there is.
        lengths: tokens of a prompt and its continuation; places are made for the longest.
        batch: rows.
        dtype: of weights, keys and activations.

    Raises:
        ValueError: no length, or a number that cannot be.
    """
    if not lengths or min(lengths) < 1 or batch < 1:
        raise ValueError(f"lengths={list(lengths)}, batch={batch}: give 1 or more of each")
    sizes = Sizes(cfg, dtype, batch, on_cpu=not machine.gpus)
    lengths = tuple(sorted(set(lengths)))
    return Plan(sizes, machine, lengths, Planner(sizes, machine, lengths[-1]).find())


__all__ = ["CUDA_CONTEXT", "ROOM", "Plan", "Planner", "plan"]
