"""The memory of a machine for a model: its GPUs, CPU and disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

MaxMemory = Mapping[int | str, int | str]
"""Bytes, or such as "20GB", by number of a GPU and for "cpu"."""
UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
UNITS |= {"KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}
ANY_DISK = 2**62
"""Bytes of a disk that is large enough; its free space is checked before writing."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?i?B)", re.IGNORECASE)


@dataclass(frozen=True)
class Machine:
    """Bytes of each GPU, of the CPU and of the disk (None: the disk is not used).

    A GPU of 0 bytes keeps its number and is not used.

    Raises:
        ValueError: a size below 0.

    Examples:
        >>> from hooked_hybrid.accounting.plan import Machine, gpus_of
        >>> Machine(gpus_of("2x40GB"), cpu=64 * 10**9).gpus
        (40000000000, 40000000000)
    """

    gpus: tuple[int, ...] = ()
    cpu: int = 0
    disk: int | None = None

    def __post_init__(self) -> None:
        if (least := min(*self.gpus, self.cpu, self.disk or 0)) < 0:
            raise ValueError(f"a memory of {least} bytes: give 0 or more")
        if not any(self.gpus):  # without GPUs the CPU computes, and is not a second place
            object.__setattr__(self, "gpus", ())

    @property
    def devices(self) -> tuple[tuple[str, int], ...]:
        """The devices that compute, with their bytes: the GPUs, or the CPU if there are none."""
        if self.gpus:
            return tuple((f"cuda:{i}", n) for i, n in enumerate(self.gpus) if n)
        return (("cpu", self.cpu),)

    @property
    def is_uniform(self) -> bool:
        """Whether all GPUs are alike."""
        return len(set(self.gpus)) == 1

    def with_gpus(self, n: int, size: int) -> Machine:
        """Return the machine with other GPUs, all alike."""
        return replace(self, gpus=(size,) * n)


def size_of(text: str) -> int:
    """Return the bytes of a size such as "40GB" or "512MiB".

    Raises:
        ValueError: not of this form.

    Examples:
        >>> from hooked_hybrid.accounting.plan import size_of
        >>> size_of("40GB"), size_of("512MiB")
        (40000000000, 536870912)
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or not (size := int(float(match[1]) * UNITS[match[2].upper()])):
        raise ValueError(f"{text!r} is not a size: give such as 40GB, 512MiB or 1.5TB")
    return size


def gpus_of(text: str) -> tuple[int, ...]:
    """Return the bytes of each GPU in a text such as "8x40GB" or "2x80GB,1x24GB".

    Raises:
        ValueError: not of this form.

    Examples:
        >>> from hooked_hybrid.accounting.plan import gpus_of
        >>> gpus_of("2x80GB,1x24GB")
        (80000000000, 80000000000, 24000000000)
    """
    found: list[int] = []
    for part in text.split(","):
        count, times, size = part.strip().rpartition("x")
        if times and not (count.isdecimal() and 0 < int(count) <= 1024):
            raise ValueError(f"{part.strip()!r}: give GPUs such as 8x40GB or 2x80GB,1x24GB")
        found += [size_of(size)] * (int(count) if times else 1)
    return tuple(found)


def show_size(n_bytes: int) -> str:
    """Return bytes as text, in decimal units: 1 GB is 10^9 bytes."""
    for unit in ("TB", "GB", "MB", "KB"):
        if n_bytes >= UNITS[unit]:
            value = n_bytes / UNITS[unit]
            return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"
    return f"{n_bytes:.0f} B"


def this_machine(max_memory: MaxMemory | None, has_folder: bool) -> Machine:
    """Return this machine's free memory, or what `max_memory` allows of it.

    Args:
        max_memory: bytes, or such as "20GB", by number of a GPU and for "cpu"; a device that it
            leaves out is not used.
        has_folder: whether weights may be kept on the disk.

    Raises:
        ImportError: accelerate, which reads the sizes of the machine, is not installed.
        ValueError: an unknown device or an invalid size.
    """
    disk = ANY_DISK if has_folder else None
    try:
        from accelerate.utils import get_max_memory
    except ImportError as error:
        raise ImportError(
            "device_map='auto' needs accelerate: pip install 'hooked-hybrid[offload]', or give a "
            "dict"
        ) from error
    free = get_max_memory()
    if max_memory is not None:
        if unknown := [name for name in max_memory if name not in free]:
            raise ValueError(
                f"max_memory names {unknown[0]!r}; this machine has {', '.join(map(repr, free))}"
            )
        free = {
            name: size_of(size) if isinstance(size, str) else int(size)
            for name, size in max_memory.items()
        }
    n_gpus = max((name + 1 for name in free if isinstance(name, int)), default=0)
    gpus = tuple(free.get(i, 0) for i in range(n_gpus))  # those left out are not used
    shared = free.get("mps", 0)  # of a Mac, whose GPU is not part of a plan
    return Machine(gpus, free.get("cpu", shared), disk)
