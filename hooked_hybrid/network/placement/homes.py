"""Where each weight of a model is kept and in which form, planned before any is read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from hooked_hybrid.network.allocator import give_back_freed_memory
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.doors import Placement, is_one_device
from hooked_hybrid.network.placement.offload import OffloadFolder, layout_of
from hooked_hybrid.network.placement.places import DeviceMap, Place, part_of, resolve
from hooked_hybrid.network.weights.plain import set_weight
from hooked_hybrid.network.weights.quantization import (
    Only,
    QuantizedWeight,
    require_plain_weights,
)
from hooked_hybrid.network.weights.quantized import Quantizer
from hooked_hybrid.options import refuse_ignored

N = TypeVar("N", bound=Network)


@dataclass(frozen=True)
class Home:
    """Where one weight is kept, and in which form.

    Attributes:
        shape, dtype: of the weight.
        stride: its order in memory, and in its file.
        place: the device that holds it, and the device that it runs on.
        file: of a weight on the disk.
        scheme: of a quantised weight, such as "int8".
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    stride: tuple[int, ...]
    place: Place
    file: Path | None = None
    scheme: str | None = None

    @property
    def like(self) -> Tensor:
        """A tensor of this form without memory."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")

    @property
    def is_trained(self) -> bool:
        """Whether it has gradients.

        Those of a weight kept elsewhere would take as much memory as it does, which is short.
        """
        return not (self.place.on_disk or self.place.is_streamed or self.scheme is not None)


@dataclass(frozen=True)
class Homes:
    """The plan for a model's weights: the home of each.

    Attributes:
        of: homes by the name of the weight.
        places: by part of the model.
        folder: for the weights on the disk.
        quantizer: for the weights that are quantised.
    """

    of: Mapping[str, Home]
    places: Mapping[str, Place]
    folder: OffloadFolder | None = None
    quantizer: Quantizer | None = None

    def filling(self) -> AbstractContextManager[None]:
        """Return a context for writing weights to the disk; see `OffloadFolder.filling`."""
        if self.folder is None:
            return nullcontext()
        return self.folder.filling({n: home.like for n, home in self.of.items() if home.file})

    def are_filled(self, names: Iterable[str]) -> bool:
        """Return whether an earlier run wrote all of these weights to the disk."""
        return self.folder is not None and all(
            self.of[name].file and self.folder.has(name, self.of[name].like) for name in names
        )

    def keep_on_disk(self, name: str, tensor: Tensor | None) -> Tensor:
        """Write a weight to the disk, or take the one there (None), and return it mapped."""
        assert self.folder is not None  # `plan_homes` made one
        like = self.of[name].like
        if tensor is not None:
            self.folder.write(name, tensor, like)
        return self.folder.read(name, like)

    def put(self, model: Network, name: str, tensor: Tensor | None) -> QuantizedWeight | None:
        """Put a weight into its home, in its form.

        Args:
            model: the model that the weight belongs to.
            name: of the weight.
            tensor: its values in any dtype; None if an earlier run wrote them to the disk.

        Returns:
            The record of a quantised weight, else None.
        """
        home = self.of[name]
        if home.file is not None:
            weight = self.keep_on_disk(name, tensor)
        else:
            assert tensor is not None  # what is not in a file is given
            weight = _copy(tensor, home)
        if home.scheme is None:
            set_weight(model, name, nn.Parameter(weight, requires_grad=home.is_trained))
            return None
        assert self.quantizer is not None  # `plan_homes` made one
        new, record = self.quantizer.quantize(name, weight)
        set_weight(model, name, new)
        give_back_freed_memory()  # of the temporaries: they may be larger than what is kept
        return record

    def close(self) -> None:
        """Remove files that no other run can use; see `OffloadFolder.close`."""
        if self.folder is not None:
            self.folder.close()

    def finish(self, model: N, quantized: Iterable[QuantizedWeight] = ()) -> N:
        """Make the model run with its weights in these places; record how they are quantised."""
        if self.quantizer is not None:
            model.quantization = self.quantizer.quantization(quantized)
        model.placement = None if is_one_device(self.places) else Placement(model, self.places)
        return model


def plan_homes(
    model: Network,
    places: Mapping[str, Place],
    *,
    offload_folder: str | os.PathLike[str] | None = None,
    identity: str | None = None,
    quantize: str | Any | None = None,
    quantize_only: Only | None = None,
    is_planned: bool = False,
) -> Homes:
    """Return the home of each weight, and refuse a plan that is impossible.

    Args:
        model: the model to place, with or without weights.
        places: of every part; see `places.resolve` and `places.everywhere`.
        offload_folder: for the weights on the disk.
        identity: of the weights, see `OffloadFolder`.
        quantize: the scheme for the large weights; see `quantized`.
        quantize_only: names of some of them, or a predicate.
        is_planned: whether the places are from a plan, which may leave the folder unused.

    Raises:
        ImportError: torchao is not installed.
        OSError: the folder cannot be written.
        ValueError: places that need a folder without one, or that keep quantised blocks on another
            device than they run on; weights that cannot be quantised so.
    """
    quantizer = None
    if quantize is not None:
        _require_at_home(places)
        device_of = lambda name: places[part_of(name)].device  # noqa: E731
        quantizer = Quantizer(model, quantize, quantize_only, device_of)
    folder = _open_folder(model, places, offload_folder, identity, is_planned)
    schemes = {} if quantizer is None else dict.fromkeys(quantizer.names, quantizer.label)
    homes = {}
    for name, weight in model.named_parameters():
        place = places[part_of(name)]
        file = folder.path / name if folder is not None and place.on_disk else None
        form = tuple(weight.shape), weight.dtype, weight.stride()
        homes[name] = Home(*form, place, file, schemes.get(name))
    return Homes(homes, places, folder, quantizer)


def _open_folder(
    model: Network,
    places: Mapping[str, Place],
    offload_folder: str | os.PathLike[str] | None,
    identity: str | None,
    is_planned: bool,
) -> OffloadFolder | None:
    """Return the folder for the weights on the disk."""
    part = next((part for part, place in places.items() if place.on_disk), None)
    if part is None:
        if not is_planned:
            refuse_ignored("device_map puts nothing on the disk", offload_folder=offload_folder)
        return None
    if offload_folder is None:
        raise ValueError(f"device_map puts {part} on the disk: say where with offload_folder=")
    if identity is not None:
        identity += f"-{layout_of(dict(model.named_parameters()))}"
    return OffloadFolder(offload_folder, identity)


def _copy(tensor: Tensor, home: Home) -> Tensor:
    """Return a copy of values in the form of a home, independent of the file."""
    like, device = home.like, home.place.device
    if like.is_contiguous():
        return torch.empty(like.shape, dtype=like.dtype, device=device).copy_(tensor.detach())
    # The other way round in memory, see `weights.layout`; torch transposes fastest like this.
    return tensor.detach().mT.clone(memory_format=torch.contiguous_format).to(device, like.dtype).mT


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
            `places.resolve` and `plan_homes`.
        OSError: the disk is full, or cannot be written; the model is unchanged.

    Examples:
        >>> from hooked_hybrid.network.placement import place
        >>> moved = HookedHybrid.from_pretrained("tiny-griffin")
        >>> moved = place(moved, {"": "cpu", "blocks": "disk"}, offload_folder=".")
        >>> torch.allclose(moved(tokens), logits, atol=1e-4)
        True
    """
    if model.placement is not None:
        raise ValueError("this model is placed already: load it again with another device_map")
    require_plain_weights(
        model.quantization, "place", "load it with device_map and quantize together"
    )
    parameters, moved = dict(model.named_parameters()), {}
    if any(parameter.is_meta for parameter in parameters.values()):
        raise ValueError("this model has no weights (it is on the meta device): nothing to place")
    places = resolve(model.cfg, device_map)
    homes = plan_homes(model, places, offload_folder=offload_folder)
    try:
        with homes.filling():
            for name, home in homes.of.items():
                values = parameters[name].detach()
                if home.file is not None:
                    moved[name] = homes.keep_on_disk(name, values)
                else:
                    moved[name] = values.to(home.place.device)
    finally:
        homes.close()
    for name, tensor in moved.items():
        is_trained = parameters[name].requires_grad and homes.of[name].is_trained
        set_weight(model, name, nn.Parameter(tensor, requires_grad=is_trained))
    return homes.finish(model)
