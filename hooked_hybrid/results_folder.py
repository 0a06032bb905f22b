"""A folder of results: one run at a time in it, and every file in it whole or not there.

The lock is the operating system's and dies with its process, however that ends: a lock file that is
left behind blocks nobody. Its text only says who holds it.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shlex
import socket
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import get_ident

from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

LOCK = ".hooked-hybrid.lock"
WAIT = 0.5
"""Seconds after which a folder that another run holds is given up."""
_UNFINISHED = re.compile(r"\..+\.\d+\.tmp(-journal)?")
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_GO_ON = "then go on (--resume, where there is one)"
_HELD: dict[Path, tuple[int, int]] = {}
"""Folders that this process holds, with the process (a fork has a copy) and thread that do."""


class FolderInUseError(OSError):
    """Another run writes into the folder."""


@contextmanager
def claimed(folder: Path, resume: bool) -> Iterator[None]:
    """Hold a folder for a run that writes its results there.

    The same thread may claim it again on the way: whoever writes claims, whoever runs several
    writers claims for all of them.

    Args:
        folder: made where there is none; what was made and is empty in the end is removed again.
        resume: whether the folder may hold results already.

    Raises:
        FolderInUseError: another run holds it; the message says which.
        FileExistsError: it holds something, and `resume` is false.
        OSError: it cannot be made or written.

    Warns:
        UserWarning: the file system has no locks, so that another run would not be noticed.
    """
    missing = [path for path in (folder, *folder.parents) if not _exists(path)]
    with ExitStack() as stack:
        try:
            stack.callback(_remove_empty, missing)
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(_locked(folder))
        except FolderInUseError:
            raise
        except OSError as error:
            raise unwritten(folder, error) from error
        if not resume and holds_results(folder):
            raise FileExistsError(
                f"{folder} is not empty: go on with --resume (resume=True), or give another folder"
            )
        yield


def holds_results(folder: Path) -> bool:
    """Return whether a folder holds anything but a lock and files that were never finished."""
    return folder.is_dir() and any(
        path.name != LOCK and not _UNFINISHED.fullmatch(path.name) for path in folder.iterdir()
    )


def remove_unfinished(folder: Path) -> None:
    """Remove what killed runs began to write; only for who holds the folder.

    Folders in it are looked through too, but for those that another run holds.
    """
    inner = (path for path in folder.iterdir() if path.is_dir() and not path.is_symlink())
    for place in (folder, *(path for path in inner if not (path / LOCK).exists())):
        for path in place.iterdir():
            if _UNFINISHED.fullmatch(path.name) and path.is_file():
                path.unlink(missing_ok=True)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a name to write to that becomes `path` when all went well, and is removed otherwise.

    The file is on the disk before it gets its name, so that a cut of power leaves the old one or
    the new one.

    Raises:
        OSError: it cannot be written; the message says why and what to do. One that names a file
            elsewhere, such as one that was to be read, passes as it is.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every system can do this with a folder
            _to_disk(path.parent)
    except OSError as error:
        if _is_elsewhere(error, path):
            raise
        raise unwritten(path, error, "one that was there is as it was") from error
    finally:
        with suppress(OSError):  # of which the first error said enough
            temporary.unlink(missing_ok=True)


def unwritten(path: Path, error: OSError, kept: str = "") -> OSError:
    """Return an error that says what could not be written, why, and what to do about it.

    Args:
        path: that could not be written.
        error: what the system said; one that says as much already is returned as it is.
        kept: what there is nevertheless.
    """
    if error.errno is None:
        return error
    place = path if os.path.isdir(path) else path.parent
    remedy = "give another folder"
    if error.errno in _FULL:
        remedy = f"free some space on the disk of {place}, {_GO_ON}"
    elif error.errno == errno.EFBIG:
        remedy = f"raise the limit on the size of files (ulimit -f), {_GO_ON}"
    elif error.errno == errno.EBUSY:
        remedy = f"close what else has it open, {_GO_ON}"
    elif error.errno in _CLOSED:
        remedy = f"make {place} writable, or give another folder"
    return OSError(
        f"{path} cannot be written ({error.strerror or error}){kept and '; '}{kept}: {remedy}"
    )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock; nothing to do where this thread holds it already."""
    place, me = folder.resolve(), (os.getpid(), get_ident())
    if _HELD.get(place) == me:
        yield
        return
    lock = _acquired(place / LOCK, folder)
    _HELD[place] = me
    try:
        with suppress(OSError):  # on a full disk the lock still holds, without a name
            (place / LOCK).write_text(json.dumps(_holder()), encoding="utf-8")
        yield
    finally:
        if os.getpid() == me[0]:  # a fork that ends here holds nothing that it could let go
            _HELD.pop(place, None)
            with suppress(OSError):  # before the release: afterwards it may be another run's
                (place / LOCK).unlink(missing_ok=True)
            if lock is not None:
                lock.release()


def _acquired(path: Path, folder: Path) -> BaseFileLock | None:
    """Return the lock, held; None where the file system has none, after a warning."""
    while True:
        lock: BaseFileLock = FileLock(path, timeout=WAIT)
        try:
            with warnings.catch_warnings():  # it would tell of a fallback, which is not used
                warnings.simplefilter("ignore")
                lock.acquire(poll_interval=WAIT / 10)
        except Timeout:
            raise FolderInUseError(_in_use(path, folder)) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            return _warn_of(folder)
        if isinstance(lock, SoftFileLock):  # a mere file: it would outlive a killed process
            lock.release()
            return _warn_of(folder)
        if path.exists():  # else its last holder removed it while we waited
            return lock
        lock.release()


def _warn_of(folder: Path) -> BaseFileLock | None:
    """Say that there are no locks; return that there is none."""
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
            said = json.loads(path.read_text(encoding="utf-8"))
            who = "{command} (process {pid} on {host}, since {since})".format(**said)
            break
        time.sleep(WAIT / 10)
    return f"{folder} is in use by {who}: wait for it, stop it, or give another folder"


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # such as a name that is too long: making it says so
        return False


def _is_elsewhere(error: OSError, path: Path) -> bool:
    """Return whether an error names a file that lies neither beside a path nor above it."""
    if not isinstance(error.filename, str | Path):
        return False
    named = Path(error.filename)
    return named.parent != path.parent and named not in path.parents


def _remove_empty(folders: list[Path]) -> None:
    """Remove folders from the innermost up, as far as they are empty."""
    with suppress(OSError):
        for folder in folders:
            folder.rmdir()


def _to_disk(path: Path) -> None:
    # Windows can do this only with what is open to be written.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "LOCK",
    "FolderInUseError",
    "claimed",
    "holds_results",
    "remove_unfinished",
    "replacing",
    "unwritten",
]
