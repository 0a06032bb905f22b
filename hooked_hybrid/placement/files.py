"""Weights on the disk, one file a tensor, mapped into memory page by page as they are read.

A mapped weight is a tensor like any other: whoever reads it, gets it. Its pages belong to the
system's file cache, which drops them where memory is short. An edit in place stays in this
process's memory, and the file as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil
import torch
from torch import Tensor

WRITTEN = "{}.partial-{}"
_LEFT = re.compile(r".*\.partial-(\d+)")
START = 2**16
"""Bytes of each file of a checkpoint that tell it from another of the same size and date."""


class OffloadFolder:
    """The folder of one checkpoint in one dtype, inside the folder that the user gave.

    A tensor is written under another name and renamed when it is whole and on the disk, so that
    what bears its name is good, whenever the writing was cut off; what is there already is taken
    as it is. Two processes may fill one folder.

    Args:
        folder: may hold those of other checkpoints.
        identity: tells what the tensors are; None for tensors that only this process has, whose
            files leave with it.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str | None) -> None:
        self.is_kept = identity is not None
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            if identity is None:
                self.path = Path(tempfile.mkdtemp(prefix="of-a-process-", dir=folder))
            else:
                self.path = Path(folder) / identity
                self.path.mkdir(exist_ok=True)
        except OSError as error:
            raise OSError(
                f"offload_folder={os.fspath(folder)!r} cannot be written ({error.strerror}): give "
                "another"
            ) from error
        for left in self.path.iterdir():
            if (match := _LEFT.fullmatch(left.name)) and not psutil.pid_exists(int(match[1])):
                left.unlink(missing_ok=True)

    def require_room(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse what would not fit on the disk, before any of it is written.

        Raises:
            OSError: says how much is missing.
        """
        needed = sum(t.nbytes for name, t in tensors.items() if not self.has(name, t))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(
                f"{self.path} would take {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are "
                "free there: give an offload_folder on another disk"
            )

    def has(self, name: str, like: Tensor) -> bool:
        """Return whether a tensor of this name and size is there."""
        file = self.path / name
        return file.is_file() and file.stat().st_size == like.nbytes

    def write(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """Write a tensor in the dtype and memory layout of another, whole or not at all.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        partial = self.path / WRITTEN.format(name, os.getpid())
        try:
            with open(partial, "wb") as file:
                _make_room(file.fileno(), like.nbytes)
            mapped(partial, like, shared=True).copy_(tensor.detach())
            with open(partial, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.path / name)
        except OSError as error:
            raise OSError(f"{self.path / name} cannot be written: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor, mapped."""
        return mapped(self.path / name, like)

    def close(self) -> None:
        """Remove files that nobody else may use; what is mapped stays readable."""
        if not self.is_kept:
            shutil.rmtree(self.path, ignore_errors=True)


def mapped(path: Path, like: Tensor, shared: bool = False) -> Tensor:
    """Return the content of a file as a tensor with shape, dtype and strides of another.

    Args:
        path: holds the numbers and nothing else, in the order of memory.
        like: dense, on any device.
        shared: whether edits go to the file.
    """
    flat = torch.from_file(str(path), shared=shared, size=like.numel(), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


def identity_of(files: Iterable[Path], dtype: torch.dtype) -> str:
    """Return a name for the tensors of a checkpoint's files in a dtype.

    Files are told apart by name, size, date and their first bytes, where safetensors has all names
    and shapes.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(START))
    return f"{digest.hexdigest()[:16]}-{str(dtype).removeprefix('torch.')}"


def _make_room(descriptor: int, n_bytes: int) -> None:
    """Take the space of a file: a mapped one that meets a full disk would end the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.truncate(descriptor, n_bytes)


__all__ = ["OffloadFolder", "identity_of", "mapped"]
