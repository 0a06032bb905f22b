"""Putting a model's weights in their places: while a checkpoint is read, or from memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn

from hooked_hybrid.placement.files import OffloadFolder
from hooked_hybrid.placement.places import DeviceMap, Place, part_of, resolve
from hooked_hybrid.placement.running import Placement, is_one_device
from hooked_hybrid.weights import require_plain_weights

if TYPE_CHECKING:
    from hooked_hybrid.config import HybridConfig
    from hooked_hybrid.model import HookedHybrid

MaxMemory = Mapping[int | str, int | str]


@dataclass(frozen=True)
class Homes:
    """The place of each parameter of a model, and the folder of those on the disk."""

    places: Mapping[str, Place]
    folder: OffloadFolder | None

    def device_of(self, name: str) -> torch.device:
        """Return the device that a parameter is kept on."""
        return self.places[part_of(name)].device

    def on_disk(self, name: str) -> bool:
        """Return whether a parameter is kept on the disk."""
        return self.places[part_of(name)].on_disk

    def require_room(self, parameters: Mapping[str, Tensor]) -> None:
        """Refuse parameters that do not fit on the disk; see `OffloadFolder.require_room`."""
        if self.folder is not None:
            self.folder.require_room({n: t for n, t in parameters.items() if self.on_disk(n)})

    def found(self, name: str, like: Tensor) -> Tensor | None:
        """Return a parameter that is on the disk from an earlier time, or None."""
        if self.folder is None or not self.on_disk(name) or not self.folder.has(name, like):
            return None
        return self.folder.read(name, like)

    def on_disk_now(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """Write a parameter to the disk, and return it from there."""
        assert self.folder is not None  # `homes_of` made one
        self.folder.write(name, tensor, like)
        return self.folder.read(name, like)

    def close(self) -> None:
        """Remove what nobody else may use; see `OffloadFolder.close`."""
        if self.folder is not None:
            self.folder.close()

    def finish(self, model: HookedHybrid) -> HookedHybrid:
        """Let the model run as its weights lie; those kept elsewhere are frozen.

        A graph over their gradients would hold every weight where it runs.
        """
        for name, parameter in model.named_parameters():
            place = self.places[part_of(name)]
            if place.on_disk or place.is_streamed:
                parameter.requires_grad_(False)
        model.placement = None if is_one_device(self.places) else Placement(model, self.places)
        return model


def homes_of(
    cfg: HybridConfig,
    dtype: torch.dtype,
    device_map: DeviceMap | Literal["auto"],
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
    identity: str | None,
) -> Homes:
    """Return where each parameter will go, before any is read.

    Args:
        cfg, dtype: what the model is.
        device_map: see `places.resolve`; "auto" takes the plan for what this machine has free.
        max_memory: bytes, or such as "20GB", by number of a GPU and for "cpu"; for "auto".
        offload_folder: of what goes to the disk.
        identity: of the weights, see `OffloadFolder`.

    Raises:
        ValueError: a map that cannot be, or that needs a folder and has none.
        MemoryError: the model does not fit; says what is missing.
    """
    if isinstance(device_map, str) and device_map != "auto":
        raise ValueError(f"device_map={device_map!r}: give 'auto', or a dict of parts and devices")
    if isinstance(device_map, str):
        from hooked_hybrid.placement.machine import this_machine
        from hooked_hybrid.placement.planning import plan

        found = plan(cfg, this_machine(max_memory, offload_folder is not None), dtype=dtype)
        device_map = found.require()
    elif max_memory is not None:
        raise ValueError("max_memory is for device_map='auto'; a dict says all there is to say")
    places = resolve(cfg, device_map)
    if not any(place.on_disk for place in places.values()):
        return Homes(places, None)
    if offload_folder is None:
        part = next(part for part, place in places.items() if place.on_disk)
        raise ValueError(f"device_map puts {part} on the disk: say where with offload_folder=")
    return Homes(places, OffloadFolder(offload_folder, identity))


def place(
    model: HookedHybrid,
    device_map: DeviceMap,
    offload_folder: str | os.PathLike[str] | None = None,
) -> HookedHybrid:
    """Put a model that is in memory in several places, and return it.

    What goes to the disk is this process's own: its files leave with it.

    Args:
        model: whose weights are moved.
        device_map: see `places.resolve`.
        offload_folder: of what goes to the disk.

    Raises:
        ValueError: a model that is placed already, or as in `homes_of`.
    """
    if model.placement is not None:
        raise ValueError("this model is placed already: load it again with another device_map")
    require_plain_weights(model, "place", "load it with a device_map instead of quantize")
    homes = homes_of(model.cfg, model.dtype, device_map, None, offload_folder, None)
    parameters = dict(model.named_parameters())
    try:
        homes.require_room(parameters)
        for name, parameter in parameters.items():
            if homes.on_disk(name):
                moved = homes.on_disk_now(name, parameter, parameter)
            else:
                moved = parameter.detach().to(homes.device_of(name))
            path, _, leaf = name.rpartition(".")
            new = nn.Parameter(moved, requires_grad=parameter.requires_grad)
            setattr(model.get_submodule(path), leaf, new)
        return homes.finish(model)
    finally:
        homes.close()


__all__ = ["Homes", "MaxMemory", "homes_of", "place"]
