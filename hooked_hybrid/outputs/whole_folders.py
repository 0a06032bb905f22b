"""Replacing a folder by another one, whole: at no time is there a mixture of the two."""

from __future__ import annotations

import ctypes
import errno
import os
import sys
from pathlib import Path

_NOT_THERE = {errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
"""Errors of systems and file systems that cannot exchange two names."""
_AT_CWD, _EXCHANGE = -100, 2


def exchange(new: Path, old: Path) -> None:
    """Exchange the names of two folders of one file system.

    Linux does it in one step. Elsewhere the old folder is renamed first; if the process is killed
    before the second step, both are there whole, the new one under its own name.

    Raises:
        OSError: they cannot be renamed; both are as they were.
    """
    if _exchange_in_one_step(new, old):
        return
    aside = old.with_name(f"{old.name}.replaced-{os.getpid()}")
    old.rename(aside)
    try:
        new.rename(old)
    except OSError:
        aside.rename(old)
        raise
    aside.rename(new)


def to_disk(folder: Path) -> None:
    """Wait until the files of a folder are on the disk.

    Raises:
        OSError: the disk cannot write them.
    """
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _exchange_in_one_step(new: Path, old: Path) -> bool:
    """Exchange two names by Linux's `renameat2`; False on systems without it."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if rename is None:
        return False
    if rename(_AT_CWD, os.fsencode(new), _AT_CWD, os.fsencode(old), _EXCHANGE) == 0:
        return True
    if (number := ctypes.get_errno()) in _NOT_THERE:
        return False
    raise OSError(number, os.strerror(number), str(old))
