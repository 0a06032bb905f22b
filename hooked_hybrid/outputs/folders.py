"""A folder of results, in which one run writes at a time, and files are written atomically.

The operating system releases the lock when its process ends, in any way: a stale lock file does not
block. The text in it is informational.
"""

from __future__ import annotations

import errno
import json
import os
import shlex
import socket
import stat
import sys
import time
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import get_ident

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from hooked_hybrid.outputs.foreign import LARGEST_SMALL, one_line, read_json
from hooked_hybrid.outputs.whole_files import (
    HELD,
    UNFINISHED,
    refuse_linked_below_held,
    write_error,
)
from hooked_hybrid.outputs.whole_files import (
    replacing as replacing,
)

LOCK = ".hooked-hybrid.lock"
WAIT = 0.5
"""Seconds to wait for a folder that another run holds."""
_NOT_THROUGH = getattr(os, "O_NOFOLLOW", 0)
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}


class FolderInUseError(OSError):
    """Another run is writing to the folder."""


@contextmanager
def claim(folder: Path, resume: bool) -> Iterator[None]:
    """Lock a folder for a run that writes its results there.

    The same thread may claim it again: every function that writes claims the folder, and a function
    that calls several of these claims it for all of them.

    Args:
        folder: created if missing; if it was created and is empty at the end, it is removed.
        resume: whether the folder may hold results already.

    Raises:
        FolderInUseError: another run holds it; the message names the run.
        FileExistsError: it is not empty, and `resume` is false.
        OSError: it cannot be created or written, or a link inside a folder of results leads to it.

    Warns:
        UserWarning: the file system has no locks, so another run would not be noticed.
    """
    refuse_linked_below_held(folder)
    missing = [path for path in (folder, *folder.parents) if not _exists(path)]
    with ExitStack() as stack:
        try:
            stack.callback(_remove_empty, missing)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_lock(folder))
        except FolderInUseError:
            raise
        except OSError as error:
            raise write_error(folder, error) from error
        if not resume and holds_results(folder):
            raise FileExistsError(
                f"{folder} is not empty: continue with --resume (resume=True), or give another "
                "folder"
            )
        yield


def holds_results(folder: Path, begun: Collection[Path] = ()) -> bool:
    """Return whether a folder holds anything except a lock and unfinished files.

    Args:
        folder: a folder of results, or one to be created.
        begun: further unfinished files.
    """
    return folder.is_dir() and any(
        path.name != LOCK and not UNFINISHED.fullmatch(path.name) and path not in begun
        for path in folder.iterdir()
    )


def remove_unfinished(folder: Path) -> None:
    """Remove unfinished files of killed runs; the caller must hold the folder.

    Its subfolders are cleaned too, except those that another run holds.
    """
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for place in (folder, *(path for path in inner if not (path / LOCK).exists())):
        for path in place.iterdir():
            if UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; nothing is done if this thread already holds it."""
    place, me = folder.resolve(), (os.getpid(), get_ident())
    if HELD.get(place) == me:
        yield
        return
    _refuse_other_lock(place / LOCK)
    lock = _acquire(place / LOCK, folder)
    HELD[place] = me
    try:
        with suppress(OSError):  # on a full disk the lock still holds, without a name
            _write_over(place / LOCK, json.dumps(_holder()))
        yield
    finally:
        if os.getpid() == me[0]:  # a forked process has no lock to release
            HELD.pop(place, None)
            with suppress(OSError):  # before the release: afterwards it may be another run's
                (place / LOCK).unlink(missing_ok=True)
            if lock is not None:
                lock.release()


def _refuse_other_lock(path: Path) -> None:
    """Refuse a lock that is not a plain file, as a write to it would go elsewhere."""
    with suppress(FileNotFoundError):
        about = path.lstat()
        if not stat.S_ISREG(about.st_mode) or about.st_nlink > 1:
            raise OSError(
                f"{path} is not a file of its own but a link, a pipe or a folder, which no run of "
                "this library leaves: remove it, or give another folder"
            )


def _write_over(path: Path, text: str) -> None:
    """Write to a file, without following a link of its name."""
    descriptor = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC | _NOT_THROUGH, 0o666)
    with open(descriptor, "w", encoding="utf-8") as file:
        file.write(text)


def _acquire(path: Path, folder: Path) -> BaseFileLock | None:
    """Return the acquired lock; None, with a warning, if the file system has no locks."""
    while True:
        lock: BaseFileLock = FileLock(path, timeout=WAIT)
        try:
            with warnings.catch_warnings():  # it would warn of a fallback that is not used
                warnings.simplefilter("ignore")
                lock.acquire(poll_interval=WAIT / 10)
        except Timeout:
            raise FolderInUseError(_in_use(path, folder)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return _warn_of(folder)
        if isinstance(lock, SoftFileLock):  # only a file, which would outlive a killed process
            lock.release()
            return _warn_of(folder)
        if path.exists():  # else its last holder removed it while we waited
            return lock
        lock.release()


def _warn_of(folder: Path) -> BaseFileLock | None:
    """Warn that the file system has no locks, and return None."""
    warnings.warn(
        f"{folder} is on a file system without locks: a second run there would not be noticed, so "
        "start none",
        stacklevel=2,
    )
    return None


def _holder() -> dict[str, str | int]:
    name = Path(sys.argv[0]).name or "python"
    return {
        "command": shlex.join([name, *sys.argv[1:]]),
        "pid": os.getpid(),
        "host": socket.gethostname(),
        "since": datetime.now().astimezone().isoformat(" ", "seconds"),
    }


def _in_use(path: Path, folder: Path) -> str:
    who = "another run"
    for _ in range(3):  # it may be about to write its name
        with suppress(OSError, ValueError, KeyError, TypeError):
            said = read_json(path, LARGEST_SMALL)
            told = {name: one_line(said[name], 300) for name in ("command", "pid", "host", "since")}
            who = "{command} (process {pid} on {host}, since {since})".format(**told)
            break
        time.sleep(WAIT / 10)
    return f"{folder} is in use by {who}: wait for it, stop it, or give another folder"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long; creating it raises then
        return False


def _remove_empty(folders: list[Path]) -> None:
    """Remove empty folders, from the innermost up."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()
