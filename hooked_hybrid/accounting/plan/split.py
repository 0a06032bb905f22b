"""A split of a model over devices, and the bytes on each."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Usage:
    """Bytes that a device holds while prompts of one length are read and continued."""

    weights: int = 0
    brought: int = 0
    """Bytes for the largest block that is kept elsewhere and runs here."""
    state: int = 0
    working: int = 0
    """Peak bytes of a forward's values, the state before it included."""
    loading: int = 0
    """Peak bytes of loading on top of the weights, before anything runs."""
    context: int = 0

    @property
    def total(self) -> int:
        """Peak bytes of all: while loading, or while running."""
        return self.weights + self.context + max(self.loading, self.running)

    @property
    def running(self) -> int:
        """Bytes of a run on top of the weights."""
        return self.brought + self.state + self.working


@dataclass(frozen=True)
class Split:
    """The number of blocks on each device, in order, and where the remaining blocks are kept."""

    held: tuple[int, ...]
    on_cpu: int = 0
    on_disk: int = 0
    first: int = 0
    """The device with the ends; those before it are not used."""

    @property
    def last(self) -> int:
        """The device that runs the blocks which no device holds."""
        return max((i for i, n in enumerate(self.held) if n), default=self.first)

    def uses(self, device: int) -> bool:
        """Return whether a device holds or runs anything."""
        return device == self.first or self.held[device] > 0

    def blocks(self, device: int) -> range:
        """Return the blocks that a device holds."""
        start = sum(self.held[:device])
        return range(start, start + self.held[device])

    @property
    def kept_elsewhere(self) -> range:
        """The blocks that no device holds."""
        return range(sum(self.held), sum(self.held) + self.on_cpu + self.on_disk)
