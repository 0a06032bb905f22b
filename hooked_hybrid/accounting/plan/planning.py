"""Deciding from the config, before loading, on which device each part of a model goes.

Blocks go to the devices in order, so that the residual stream moves between two devices once; the
ends (embedding, final norm, read-out) go to the first device with room for them. As few devices as
possible are used, filled evenly. Blocks for which no device has room are kept in CPU memory, then
on the disk, and moved to the last device that holds a block when they run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.accounting.plan.changes import Change, changes
from hooked_hybrid.accounting.plan.machine import ANY_DISK, Machine, show_size
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.split import Split, Usage
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.placement.places import DISK, ENDS

if TYPE_CHECKING:
    from hooked_hybrid.network.weights.quantization import Only

ROOM = 2048
"""Tokens of a prompt for which `device_map="auto"` reserves memory."""


@dataclass(frozen=True)
class MemoryPlan:
    """The devices of a model's parts, the bytes on each by length, and why it may not fit."""

    sizes: Sizes
    machine: Machine
    lengths: tuple[int, ...]
    split: Split | None
    """For the longest of the lengths."""

    @property
    def fits(self) -> bool:
        """Whether everything has a place, at every length."""
        return self.split is not None

    @property
    def device_map(self) -> dict[str, str]:
        """The places, as the argument `device_map` of `from_pretrained`.

        Raises:
            MemoryError: see `require`.
        """
        return self.require()

    def require(self) -> dict[str, str]:
        """Return the device map.

        Raises:
            MemoryError: the model does not fit; the message gives the reason and sufficient
                changes.
        """
        if self.split is None:
            raise MemoryError(f"{self.why_not}. {self.remedy([c.option for c in self.changes])}")
        names = [name for name, _ in self.machine.devices]
        split = self.split
        places = {part: names[split.first] for part in ENDS}
        blocks = [name for name, n in zip(names, split.held, strict=True) for _ in range(n)]
        blocks += ["cpu"] * split.on_cpu + [DISK] * split.on_disk
        places |= {f"blocks.{i}": name for i, name in enumerate(blocks)}
        order = ("embed", *(f"blocks.{i}" for i in range(len(blocks))), *ENDS[1:])
        return {part: places[part] for part in order}

    def usages(self, length: int) -> list[Usage]:
        """Return the bytes on each device at a length, in the order of `machine.devices`."""
        assert self.split is not None
        return Planner(self.sizes, self.machine, length).usages(self.split)

    @cached_property
    def whole(self) -> Usage:
        """The memory of everything on one device, at the longest length."""
        planner = Planner(self.sizes, self.machine, max(self.lengths))
        return planner.usage(range(planner.n_layers), range(0), is_first=True)

    @property
    def why_not(self) -> str:
        """The reason why not everything has a place."""
        whole, devices = self.whole, self.machine.devices
        needed = f"{show_size(whole.working)} to work in"
        if whole.loading > whole.running:
            needed += f", or {show_size(whole.loading)} to load it in"
        n_gpus, offered = len(self.machine.gpus), show_size(sum(n for _, n in devices))
        who = "the CPU offers" if not n_gpus else "the GPU offers"
        return (
            f"weights of {show_size(whole.weights)}, and for {self.sizes.batch} x "
            f"{max(self.lengths):,} tokens a state of {show_size(whole.state)} and {needed}, do "
            f"not fit: {f'{len(devices)} GPUs offer' if len(devices) > 1 else who} {offered}"
            f"{self._beside}"
        )

    @property
    def _beside(self) -> str:
        """Return a phrase on the room outside the devices."""
        if self.sizes.quantize is not None:
            return "; quantised blocks stay where they run"
        cpu = f"{show_size(self.machine.cpu)} of CPU memory and " if self.machine.gpus else ""
        if self.machine.disk in (None, ANY_DISK):
            return f", with {cpu}{'nothing' if self.machine.disk is None else 'room'} on the disk"
        return f", with {cpu}{show_size(self.machine.disk)} on the disk"

    def remedy(self, changes: Sequence[str]) -> str:
        """Return a sentence on the sufficient changes."""
        if not changes:
            return "No single change will do"
        return f"It would fit with {', or '.join(changes)}"

    @cached_property
    def changes(self) -> tuple[Change, ...]:
        """The smallest changes, each of which is sufficient."""
        return tuple(changes(self.sizes, self.machine, max(self.lengths)))


def plan(
    cfg: HybridConfig,
    machine: Machine,
    lengths: Sequence[int] = (ROOM,),
    batch: int = 1,
    dtype: torch.dtype = torch.bfloat16,
    quantize: str | Any | None = None,
    quantize_only: Only | None = None,
) -> MemoryPlan:
    """Return the plan of a model on a machine, from its config alone.

    Args:
        cfg: of the model.
        machine: its memory.
        lengths: tokens of a prompt and its continuation; the plan has room for the longest.
        batch: rows.
        dtype: of weights, keys and activations.
        quantize, quantize_only: as `from_pretrained` takes them.

    Raises:
        ValueError: no length, a number out of range, or a part that cannot be quantized.
        ImportError: torchao, needed for the size of quantized weights, is not installed.

    Examples:
        >>> from hooked_hybrid.accounting import PUBLISHED
        >>> from hooked_hybrid.accounting.plan import Machine, gpus_of, plan
        >>> fits = plan(PUBLISHED["recurrentgemma-2b"], Machine(gpus_of("1x8GB")))
        >>> fits.fits, fits.device_map["unembed"]
        (True, 'cuda:0')
        >>> plan(PUBLISHED["jamba-mini"], Machine(gpus_of("2x40GB"))).fits
        False
    """
    if not lengths or min(lengths) < 1 or batch < 1:
        raise ValueError(f"lengths={list(lengths)}, batch={batch}: give 1 or more of each")
    sizes = Sizes(cfg, dtype, batch, not machine.gpus, quantize, quantize_only)
    lengths = tuple(sorted(set(lengths)))
    return MemoryPlan(sizes, machine, lengths, Planner(sizes, machine, lengths[-1]).find())
