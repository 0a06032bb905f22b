"""The places where a model's parts are kept and run: a device map, checked before loading.

The parts are the blocks, each as a whole, and the ends: embedding, final norm and read-out. The
ends run together on the model's device, which takes tokens and returns logits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hooked_hybrid.config import HybridConfig

DISK = "disk"
ENDS = ("embed", "ln_final", "unembed")
ONE_OF_A_KIND = ("cpu", "meta")
"""Devices whose names have no number."""
DeviceMap = Mapping[str, str | int | torch.device]


@dataclass(frozen=True)
class Place:
    """Where the weights of a part are kept, and where it runs.

    Weights on the disk are mapped into the CPU's memory, each page when it is read.

    Examples:
        >>> from hooked_hybrid.network.placement import resolve
        >>> here = resolve(model.cfg, {"": "cpu", "blocks": "disk"})["blocks.0"]
        >>> here.name, here.on_disk, here.is_streamed
        ('disk', True, False)
    """

    device: torch.device
    runs_on: torch.device
    on_disk: bool = False

    @property
    def is_streamed(self) -> bool:
        """Whether the weights are moved to another device for each forward of the part."""
        return self.device != self.runs_on

    @property
    def name(self) -> str:
        """Return the place as written in a device map."""
        return DISK if self.on_disk else str(self.device)


def parts_of(cfg: HybridConfig) -> list[str]:
    """Return the names of the parts in a device map, in the order in which they run."""
    return ["embed", *(f"blocks.{i}" for i in range(cfg.n_layers)), "ln_final", "unembed"]


def part_of(parameter: str) -> str:
    """Return the part that a parameter belongs to, by its name."""
    path = parameter.split(".")
    return ".".join(path[:2]) if path[0] == "blocks" else path[0]


def everywhere(cfg: HybridConfig, device: torch.device | str) -> dict[str, Place]:
    """Return the places of a model that is entirely on one device."""
    device = torch.device(device)
    return dict.fromkeys(parts_of(cfg), Place(device, device))


def resolve(cfg: HybridConfig, device_map: DeviceMap) -> dict[str, Place]:
    """Return the place of every part.

    A block that is kept on the CPU or on the disk runs on the accelerator of the part before it, or
    of the next part with one; without any, it runs on the CPU. The ends run where they are kept.

    Args:
        cfg: what the model is.
        device_map: device by name of a part or prefix of several: `""` means everything,
            `"blocks"` all blocks; the longest matching name counts. A device is a torch device,
            the number of a GPU, "cpu" or "disk".

    Raises:
        ValueError: not a map, a name that is not a part, a part without a place, a missing device,
            or ends that run on different devices.

    Examples:
        >>> from hooked_hybrid.network.placement import resolve
        >>> places = resolve(model.cfg, {"": "cpu", "blocks.5": "disk"})
        >>> places["blocks.5"].name, places["unembed"].name
        ('disk', 'cpu')
    """
    if not isinstance(device_map, Mapping):
        raise ValueError(f"device_map={device_map!r}: give 'auto', or a dict of parts and devices")
    parts = parts_of(cfg)
    allowed = {"", "blocks", *parts}
    if unknown := [name for name in device_map if name not in allowed]:
        raise ValueError(
            f"device_map names {unknown[0]!r}; its names are {', '.join(ENDS)}, blocks.0 to "
            f"blocks.{cfg.n_layers - 1}, 'blocks' and '' (everything): a block stays whole"
        )
    given = {part: _given(part, device_map) for part in parts}
    if missing := [part for part, device in given.items() if device is None]:
        raise ValueError(
            f"device_map gives {missing[0]} no place: name it, or give the rest with '': 'cpu'"
        )
    rest = {part: _device(device) for part, device in given.items()}
    if cfg.tied_embedding:
        rest["unembed"] = rest["embed"]  # it uses the embedding's weights
    runs = {part: _runs_on(i, parts, rest) for i, part in enumerate(parts)}
    if len(devices := {runs[part] for part in ENDS}) > 1:
        raise ValueError(
            f"embed, ln_final and unembed run on {', '.join(sorted(map(str, devices)))}: give them "
            "one device, where tokens go in and logits come out"
        )
    return {part: Place(rest[part][0], runs[part], rest[part][1]) for part in parts}


def _given(part: str, device_map: DeviceMap) -> str | int | torch.device | None:
    """Return the entry of the longest name that matches a part."""
    for name in (part, part.split(".")[0], ""):
        if name in device_map:
            return device_map[name]
    return None


def _device(given: str | int | torch.device | None) -> tuple[torch.device, bool]:
    """Return the device that holds the weights, and whether it maps them from the disk."""
    if given == DISK:
        return torch.device("cpu"), True
    try:
        device = torch.device("cuda", given) if isinstance(given, int) else torch.device(given)  # type: ignore[arg-type]
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"device_map says {given!r}: give a device such as 'cuda:0', a GPU's number, 'cpu' or "
            "'disk'"
        ) from error
    n_gpus, index = torch.cuda.device_count(), device.index or 0
    if device.type == "cuda" and index >= n_gpus:
        raise ValueError(f"device_map says {given!r}: this machine has {n_gpus} GPUs")
    if device.type not in (*ONE_OF_A_KIND, "cuda"):
        _require_here(device, given)
    if device.type in ONE_OF_A_KIND:
        return torch.device(device.type), False
    return torch.device(device.type, index), False  # as its tensors name it


def _require_here(device: torch.device, given: object) -> None:
    """Refuse a device that torch has a name for, and this machine or this torch does not have."""
    try:
        torch.empty(1, device=device)
    except (AssertionError, ImportError, RuntimeError) as error:
        raise ValueError(
            f"device_map says {given!r}, which this machine or this build of torch does not have: "
            "give 'cuda:0', a GPU's number, 'cpu' or 'disk'"
        ) from error


def _runs_on(
    i: int, parts: Sequence[str], rest: Mapping[str, tuple[torch.device, bool]]
) -> torch.device:
    """Return the device on which part number `i` runs."""
    here = rest[parts[i]][0]
    if here.type != "cpu" or parts[i] in ENDS:
        return here
    near = [rest[part][0] for part in (*reversed(parts[:i]), *parts[i + 1 :])]
    return next((device for device in near if device.type != "cpu"), here)
