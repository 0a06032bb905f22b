"""Searching for a split of one model over one machine."""

from __future__ import annotations

from functools import cached_property
from itertools import accumulate

from hooked_hybrid.accounting.plan.machine import Machine
from hooked_hybrid.accounting.plan.split import Split, Usage
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.network.placement.places import ENDS

CUDA_CONTEXT = 10**9
"""Bytes of a GPU assumed for CUDA, its libraries and the gaps between tensors."""
EVENLY = 32
"""Bisection steps of the search for the most even filling, to a share of 2^-32."""


class Planner:
    """A search for a split of one model over one machine, for prompts of one length.

    Quantised blocks stay on the devices that run them.
    """

    def __init__(self, sizes: Sizes, machine: Machine, length: int) -> None:
        self.sizes, self.machine, self.length = sizes, machine, length
        self.room = [n for _, n in machine.devices]
        self.n_layers = sizes.cfg.n_layers
        self._weights = [sizes.weights[f"blocks.{i}"] for i in range(self.n_layers)]
        self._ends = sum(sizes.weights[part] for part in ENDS)

    @cached_property
    def _sums(self) -> tuple[list[int], list[int], list[int]]:
        """Bytes of the first n blocks: weights, states, and memory besides these."""
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

    @cached_property
    def _loading(self) -> list[int]:
        return [self.sizes.loading(f"blocks.{i}") for i in range(self.n_layers)]

    def usage(
        self, held: range, elsewhere: range, is_first: bool, brings: bool | None = None
    ) -> Usage:
        """Return the bytes that a device holds.

        Args:
            held: blocks whose weights are on the device.
            elsewhere: blocks that run on it with weights kept elsewhere.
            is_first: whether the embedding, final norm and read-out are on it.
            brings: whether weights are moved to some device for each forward, so that each block
                reads the whole prompt before the next; None: only if they are moved to this one.
        """
        own, others = slice(held.start, held.stop), slice(elsewhere.start, elsewhere.stop)
        working = max((*self._working[own], *self._working[others]), default=0)
        loading = max((*self._loading[own], *self._loading[others]), default=0)
        if is_first:
            working = max(working, self.sizes.ends(self.length))
            loading = max(loading, *(self.sizes.loading(part) for part in ENDS))
        if bool(elsewhere) if brings is None else brings:
            working += self.sizes.streams(self.length)
        weights, states, beside = self._sums
        return Usage(
            weights=_within(weights, held) + (self._ends if is_first else 0),
            brought=max(self._weights[others], default=0),
            state=_within(states, held) + _within(states, elsewhere),
            working=working + _within(beside, held) + _within(beside, elsewhere),
            loading=loading,
            context=CUDA_CONTEXT if self.machine.gpus else 0,
        )

    def usages(self, split: Split) -> list[Usage]:
        """Return the bytes that each device holds."""
        tail = split.kept_elsewhere
        return [
            self.usage(
                split.blocks(k), tail if k == split.last else range(0), k == split.first, bool(tail)
            )
            if split.uses(k)
            else Usage()
            for k in range(len(split.held))
        ]

    def fits(self) -> bool:
        """Return whether there is a split."""
        return self.find(evenly=False) is not None

    def find(self, evenly: bool = True) -> Split | None:
        """Return the split with the most blocks on devices, or None if nothing fits.

        Args:
            evenly: fill devices to equal shares; otherwise one after another.
        """
        ends = self.usage(range(0), range(0), is_first=True).total
        first = next((k for k, room in enumerate(self.room) if ends <= room), None)
        if first is None:
            return None
        for n_held in range(self.n_layers, -1, -1):
            rest = self._rest(n_held)
            if rest is not None and (held := self._on_devices(first, n_held, evenly)) is not None:
                return Split(held, *rest, first=first)
        return None

    def _rest(self, n_held: int) -> tuple[int, int] | None:
        """Return how many of the other blocks go to the CPU and to the disk, or None."""
        on_cpu, free = 0, self.machine.cpu if self.machine.gpus else 0
        kept = self._weights[n_held:]
        if kept and self.sizes.quantize is not None:
            return None
        while on_cpu < len(kept) and kept[on_cpu] <= free:
            free -= kept[on_cpu]
            on_cpu += 1
        on_disk = kept[on_cpu:]
        if on_disk and (self.machine.disk is None or sum(on_disk) > self.machine.disk):
            return None
        return on_cpu, len(on_disk)

    def _on_devices(self, first: int, n_held: int, evenly: bool) -> tuple[int, ...] | None:
        """Return the blocks of each device, on as few devices from the first on as possible."""
        for stop in range(first + 1, len(self.room) + 1):
            if (best := self._fill(range(first, stop), n_held, 1.0)) is None:
                continue
            if evenly and n_held == self.n_layers:  # otherwise the devices are full anyway
                low, high = 0.0, 1.0
                for _ in range(EVENLY):
                    share = (low + high) / 2
                    found = self._fill(range(first, stop), n_held, share)
                    low, high, best = (share, high, best) if found is None else (low, share, found)
            return (0,) * first + best + (0,) * (len(self.room) - stop)
        return None

    def _fill(self, devices: range, n_held: int, share: float) -> tuple[int, ...] | None:
        """Return the blocks of each of some devices, filled one after another, or None.

        The last holds at least one: blocks that no device holds run there.
        """
        tail = range(n_held, self.n_layers)
        held: list[int] = []
        for k in devices:
            done, room = sum(held), self.room[k] * share
            is_first, is_last = k == devices.start, k == devices.stop - 1
            n = n_held - done
            if not is_last:
                n = self._most(done, n - 1, is_first, bool(tail), room)
            if n < 0:
                return None
            others = tail if is_last else range(0)
            used = self.usage(range(done, done + n), others, is_first, bool(tail))
            if (n or is_first) and used.total > room:
                return None
            held.append(n)
        return tuple(held)

    def _most(self, start: int, most: int, is_first: bool, brings: bool, room: float) -> int:
        """Return how many blocks from `start` on fit on a device, at most `most`."""
        for n in range(1, most + 1):
            if self.usage(range(start, start + n), range(0), is_first, brings).total > room:
                return n - 1
        return most


def _within(sums: list[int], blocks: range) -> int:
    """Return the sum over some blocks, from the sums over the first ones."""
    return sums[blocks.stop] - sums[blocks.start]
