"""Putting a model's weights in their places, from a checkpoint or from memory."""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import Tensor, nn

from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.doors import Placement, is_one_device
from hooked_hybrid.network.placement.offload import OffloadFolder, layout_of
from hooked_hybrid.network.placement.places import DeviceMap, Place, part_of, parts_of, resolve
from hooked_hybrid.network.weights.quantization import require_plain_weights
from hooked_hybrid.options import refuse_ignored

if TYPE_CHECKING:
    from hooked_hybrid.config import HybridConfig

N = TypeVar("N", bound=Network)


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

    def filling(self, parameters: Mapping[str, Tensor]) -> AbstractContextManager[None]:
        """Return a context in which parameters go to the disk; see `OffloadFolder.filling`."""
        if self.folder is None:
            return nullcontext()
        return self.folder.filling({n: t for n, t in parameters.items() if self.on_disk(n)})

    def found(self, name: str, like: Tensor) -> Tensor | None:
        """Return a parameter that an earlier run wrote to the disk, or None."""
        if self.folder is None or not self.on_disk(name) or not self.folder.has(name, like):
            return None
        return self.folder.read(name, like)

    def on_disk_now(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """Write a parameter to the disk, and return it from there."""
        assert self.folder is not None  # `homes_of` made one
        self.folder.write(name, tensor, like)
        return self.folder.read(name, like)

    def close(self) -> None:
        """Remove files that no other run can use; see `OffloadFolder.close`."""
        if self.folder is not None:
            self.folder.close()

    def finish(self, model: N) -> N:
        """Make the model run with its weights in these places; weights kept elsewhere are frozen.

        Their gradients would take as much memory as the weights, which is short.
        """
        for name, parameter in model.named_parameters():
            place = self.places[part_of(name)]
            if place.on_disk or place.is_streamed:
                parameter.requires_grad_(False)
        model.placement = None if is_one_device(self.places) else Placement(model, self.places)
        return model


def one_home(cfg: HybridConfig, device: torch.device) -> Homes:
    """Return the places of a model that is entirely on one device."""
    return Homes(dict.fromkeys(parts_of(cfg), Place(device, device)), None)


def homes_of(
    model: Network,
    device_map: DeviceMap,
    offload_folder: str | os.PathLike[str] | None = None,
    identity: str | None = None,
    is_quantized: bool = False,
    is_planned: bool = False,
) -> Homes:
    """Return the place of each parameter, before any is read.

    Args:
        model: the model to place, with or without weights.
        device_map: see `places.resolve`.
        offload_folder: for the weights on the disk.
        identity: of the weights, see `OffloadFolder`.
        is_quantized: whether weights will be quantised.
        is_planned: whether the map is from a plan, which may leave the folder unused.

    Raises:
        ValueError: an impossible map, one that needs a folder without one, or one that keeps
            quantised blocks on another device than they run on.
    """
    places = resolve(model.cfg, device_map)
    if is_quantized:
        _require_at_home(places)
    if not any(place.on_disk for place in places.values()):
        if not is_planned:
            refuse_ignored("device_map puts nothing on the disk", offload_folder=offload_folder)
        return Homes(places, None)
    if offload_folder is None:
        part = next(part for part, place in places.items() if place.on_disk)
        raise ValueError(f"device_map puts {part} on the disk: say where with offload_folder=")
    if identity is not None:
        identity += f"-{layout_of(dict(model.named_parameters()))}"
    return Homes(places, OffloadFolder(offload_folder, identity))


def _require_at_home(places: Mapping[str, Place]) -> None:
    """Refuse places from which weights would be moved: quantised weights cannot be."""
    for part, place in places.items():
        if place.is_streamed or place.on_disk:
            raise ValueError(
                f"device_map keeps {part} on {place.name} and runs it on {place.runs_on}: "
                "quantised weights stay where they run, so give each part a device, or leave "
                "quantize out"
            )


def place(
    model: N,
    device_map: DeviceMap,
    offload_folder: str | os.PathLike[str] | None = None,
) -> N:
    """Move a model in memory to several places, and return it.

    Files on the disk belong to this process and are deleted with it.

    Args:
        model: the model to move.
        device_map: see `places.resolve`.
        offload_folder: for the weights on the disk.

    Raises:
        ValueError: a model that is already placed, quantised or without weights, or as in
            `homes_of`.
        OSError: the disk is full, or cannot be written; the model is unchanged.
    """
    if model.placement is not None:
        raise ValueError("this model is placed already: load it again with another device_map")
    require_plain_weights(
        model.quantization, "place", "load it with device_map and quantize together"
    )
    parameters, moved = dict(model.named_parameters()), {}
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("this model has no weights (it is on the meta device): nothing to place")
    homes = homes_of(model, device_map, offload_folder=offload_folder)
    try:
        with homes.filling(parameters):
            for name, parameter in parameters.items():
                if homes.on_disk(name):
                    moved[name] = homes.on_disk_now(name, parameter, parameter)
                else:
                    moved[name] = parameter.detach().to(homes.device_of(name))
    finally:
        homes.close()
    for name, tensor in moved.items():
        path, _, leaf = name.rpartition(".")
        new = nn.Parameter(tensor, requires_grad=parameters[name].requires_grad)
        setattr(model.get_submodule(path), leaf, new)
    return homes.finish(model)
