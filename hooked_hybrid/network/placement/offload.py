"""Weights on the disk, one file for each tensor, mapped into memory page by page as they are read.

A mapped weight is read like any other tensor. Its pages belong to the system's file cache, which
drops them if memory is short. An edit in place changes this process's memory, not the file.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from torch import Tensor

from hooked_hybrid.outputs.folders import (
    FolderInUseError,
    claim,
    remove_unfinished,
    replacing,
)
from hooked_hybrid.outputs.foreign import refuse_link

FORMAT = 1
"""Version of the files' content; to be raised if a conversion changes its numbers."""
WAIT = 1.0
"""Seconds between checks of a folder that another process is filling."""
START = 2**16
"""Bytes at the start of each file of a checkpoint that count in its identity."""
SAMPLES, SAMPLE = 16, 2**12
"""Number and size of further samples of the file that count."""


class OffloadFolder:
    """The folder of one checkpoint in one dtype, inside the folder that the user gave.

    A tensor is written under a temporary name and renamed when it is complete, so a file with the
    final name is always whole, even after an interrupted write; existing files are used. If several
    processes use a folder, one fills it and the others wait.

    Args:
        folder: may also hold folders of other checkpoints.
        identity: identifies the tensors; None for tensors that only this process has, whose files
            are deleted as soon as they are mapped.

    Raises:
        ValueError: `folder` is blank.
        OSError: it cannot be written.
    """

    def __init__(self, folder: str | os.PathLike[str], identity: str | None) -> None:
        if not os.fspath(folder).strip():
            raise ValueError("offload_folder is blank: give the name of a folder")
        self.is_kept = identity is not None
        if identity is not None:
            refuse_link(Path(folder) / identity)
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

    @contextmanager
    def filling(self, tensors: Mapping[str, Tensor]) -> Iterator[None]:
        """Lock the folder while tensors are written, if any of them is missing.

        Raises:
            OSError: the disk has too little space for the missing tensors; none was written.

        Warns:
            UserWarning: another process is filling the folder, and this one waits for it.
        """
        with ExitStack() as stack:
            if not self._holds(tensors):
                self._claim(stack)
                remove_unfinished(self.path)
                self._require_room(tensors)
            yield

    def _holds(self, tensors: Mapping[str, Tensor]) -> bool:
        return all(self.has(name, tensor) for name, tensor in tensors.items())

    def _claim(self, stack: ExitStack) -> None:
        """Lock the folder, after waiting for the process that holds the lock."""
        is_told = False
        while True:
            try:
                stack.enter_context(claim(self.path, resume=True))
                return
            except FolderInUseError as error:
                if not is_told:
                    holder = str(error).rpartition(": ")[0]  # the holder, without the remedy
                    warnings.warn(f"{holder}: waiting until it is filled", stacklevel=2)
                is_told = True
                time.sleep(WAIT)

    def _require_room(self, tensors: Mapping[str, Tensor]) -> None:
        needed = sum(t.nbytes for name, t in tensors.items() if not self.has(name, t))
        free = shutil.disk_usage(self.path).free
        if needed > free:
            raise OSError(
                f"{self.path} would take {needed / 1e9:.2f} GB more, and {free / 1e9:.2f} GB are "
                "free there: give an offload_folder on another disk"
            )

    def has(self, name: str, like: Tensor) -> bool:
        """Return whether a file of this tensor's name and size exists, which is not a link."""
        file = self.path / name
        return file.is_file() and not file.is_symlink() and file.stat().st_size == like.nbytes

    def write(self, name: str, tensor: Tensor, like: Tensor) -> None:
        """Write a tensor in the dtype and memory layout of another, atomically.

        Raises:
            OSError: the disk is full, or cannot be written.
        """
        with replacing(self.path / name) as partial:
            with open(partial, "wb") as file:
                _make_room(file.fileno(), like.nbytes)
            map_file(partial, like, shared=True).copy_(tensor.detach())

    def read(self, name: str, like: Tensor) -> Tensor:
        """Return a tensor, mapped."""
        tensor = map_file(self.path / name, like)
        if not self.is_kept:  # mapped files stay readable, and a killed process leaves none
            (self.path / name).unlink()
        return tensor

    def close(self) -> None:
        """Remove the folder if no other run can use it; mapped files stay readable."""
        if not self.is_kept:
            shutil.rmtree(self.path, ignore_errors=True)


def map_file(path: Path, like: Tensor, shared: bool = False) -> Tensor:
    """Return the content of a file as a tensor with shape, dtype and strides of another.

    Args:
        path: a file of the numbers only, in memory order.
        like: a dense tensor on any device.
        shared: whether edits go to the file.
    """
    flat = torch.from_file(str(path), shared=shared, size=like.numel(), dtype=like.dtype)
    return flat.as_strided(like.shape, like.stride())


def identity_of(files: Iterable[Path], dtype: torch.dtype) -> str:
    """Return a name for the tensors of a checkpoint's files in a dtype.

    Files are distinguished by name, size, date, first bytes (where safetensors has all names and
    shapes) and samples throughout the file, as copies of different files may have the same date.
    """
    digest = hashlib.sha256()
    for path in sorted(files):
        about = path.stat()
        digest.update(f"{path.name} {about.st_size} {about.st_mtime_ns} ".encode())
        with open(path, "rb") as file:
            digest.update(file.read(START))
            for i in range(1, SAMPLES + 1):
                file.seek(max(0, about.st_size - SAMPLE) * i // SAMPLES)
                digest.update(file.read(SAMPLE))
    return f"{digest.hexdigest()[:16]}-{str(dtype).removeprefix('torch.')}"


def layout_of(parameters: Mapping[str, Tensor]) -> str:
    """Return a name for the memory layout of tensors, which is that of their files."""
    about = [f"{name} {tuple(t.shape)} {t.stride()}" for name, t in sorted(parameters.items())]
    return hashlib.sha256("\n".join([str(FORMAT), *about]).encode()).hexdigest()[:8]


def _make_room(descriptor: int, n_bytes: int) -> None:
    """Allocate the space of a file, as writing to a mapped file on a full disk ends the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(descriptor, 0, n_bytes)
    else:
        os.truncate(descriptor, n_bytes)
