"""Atomic writing of files: under a random name, which is then changed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hooked_hybrid.outputs.foreign import refuse_link

UNFINISHED = re.compile(r"\..+\.\d+(\.[0-9a-f]{16})?\.tmp(-journal)?")
"""Names of unfinished files; those of earlier versions have no random part."""
_FULL = {errno.ENOSPC, errno.EDQUOT}
_CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
_GO_ON = "then go on (--resume, if there is one)"
HELD: dict[Path, tuple[int, int]] = {}
"""Folders that this process holds (`folders.claim`), with the process (a fork has a copy)
and the thread that do."""
_NEW = os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_NOFOLLOW", 0)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path to write to; it is renamed to `path`, or removed after an error.

    The temporary file is new and empty, so an existing link of a similar name is never written to.
    The file is on the disk before it is renamed, so that a power failure leaves the old or the new
    file.

    Raises:
        OSError: it cannot be written; the message states the reason and the remedy. An error that
            names a file elsewhere, such as one to be read, is raised unchanged.
    """
    temporary = unfinished_name(path)
    try:
        refuse_linked_below_held(path.parent)
        path.parent.mkdir(parents=True, exist_ok=True)
        os.close(os.open(temporary, _NEW, 0o666))
        yield temporary
        _to_disk(temporary)
        os.replace(temporary, path)
        with suppress(OSError):  # not every system can do this with a folder
            _to_disk(path.parent)
    except OSError as error:
        if _is_elsewhere(error, path):
            raise
        raise write_error(path, error, "one that was there is as it was") from error
    finally:
        with suppress(OSError):  # the first error is enough
            temporary.unlink(missing_ok=True)


def refuse_linked_below_held(folder: Path) -> None:
    """Refuse a folder that a link inside a folder of results leads to, out of it.

    Raises:
        OSError: such a link exists.
    """
    for path in (folder, *folder.parents):
        if os.path.islink(path) and any(above.resolve() in HELD for above in path.parents):
            refuse_link(path)


def unfinished_name(path: Path) -> Path:
    """Return an unused name in a path's folder that `UNFINISHED` matches."""
    return path.with_name(f".{path.name}.{os.getpid()}.{os.urandom(8).hex()}.tmp")


def write_error(path: Path, error: OSError, kept: str = "") -> OSError:
    """Return an error that states the file that was not written, the reason and the remedy.

    Args:
        path: the file that could not be written.
        error: from the system; one that already has this text is returned unchanged.
        kept: a phrase on what exists nevertheless.
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


def _is_elsewhere(error: OSError, path: Path) -> bool:
    """Return whether an error names a file that is neither in a path's folder nor above it."""
    if not isinstance(error.filename, str | Path):
        return False
    named = Path(error.filename)
    return named.parent != path.parent and named not in path.parents


def _to_disk(path: Path) -> None:
    # On Windows the file must be open for writing.
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
