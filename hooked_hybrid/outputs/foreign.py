"""Safe reading of files that others wrote.

Files must be plain and of bounded size, JSON of bounded depth, and text is escaped so that a
terminal does not interpret it. All files that may come from someone else are read by these.
"""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

LARGEST_SMALL, LARGEST_JSON, LARGEST_RESULTS = 2**20, 2**23, 2**28
"""Largest bytes of a config, of an index, and of results, which grow with the run."""
LARGEST_TEXT = 2**30
"""Largest bytes of a document, or of a line that holds one."""
DEEPEST = 100
"""Largest depth of a JSON value; ours have ten levels, and reading recurses once a level."""

_HIDDEN = [*range(0x00, 0x09), *range(0x0B, 0x20), *range(0x7F, 0xA0), 0x200E, 0x200F]
_HIDDEN += [*range(0x2028, 0x202F), *range(0x2066, 0x206A), 0xFEFF]
_SHOWN = {code: f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}" for code in _HIDDEN}


def printable(text: object) -> str:
    """Return text with everything escaped that a terminal would interpret instead of show.

    These are control characters except line feed and tab, changes of the writing direction, line
    separators, and halves of surrogate pairs, which cannot be printed.
    """
    shown = str(text).translate(_SHOWN)
    return shown if shown.isascii() else shown.encode("utf-8", "backslashreplace").decode()


def one_line(text: object, most: int = 200) -> str:
    """Return foreign text on one line, cut to at most `most` characters."""
    shown = " ".join(printable(str(text)[: 4 * most]).split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


def require_plain_file(path: Path, largest: int | None = None) -> int:
    """Return the bytes of a file, after checking that it is a plain file.

    Raises:
        FileNotFoundError: it does not exist.
        ValueError: a pipe, a device or a folder, or larger than `largest` bytes.
    """
    about = path.stat()
    if not stat.S_ISREG(about.st_mode):
        raise ValueError(f"{printable(path)} is not a plain file")
    if largest is not None and about.st_size > largest:
        raise ValueError(
            f"{printable(path)} has {about.st_size:,} bytes, more than {largest:,}: it is another "
            "file"
        )
    return about.st_size


def refuse_link(*paths: Path) -> None:
    """Refuse a link where this library writes, as its target is elsewhere.

    Raises:
        OSError: one of the paths is a link.
    """
    for path in paths:
        if os.path.islink(path):  # False for a name that is too long
            raise OSError(
                f"{printable(path)} is a link, to {one_line(os.readlink(path))!a}: files of "
                "results are not read or written through links, put the real ones there"
            )


def require_safetensors(path: Path) -> None:
    """Refuse files that the safetensors library would wait for, or need far too much memory for.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: not a plain file, or a header larger than `LARGEST_JSON` bytes.
    """
    size = require_plain_file(path)
    with path.open("rb") as file:
        n_bytes = int.from_bytes(file.read(8), "little")
    if LARGEST_JSON < n_bytes < size:  # the library reports a header beyond the end
        raise ValueError(
            f"{printable(path)} has a header of {n_bytes:,} bytes, more than {LARGEST_JSON:,}: "
            "which no file of this library or of a model has"
        )


def bare_name(name: object) -> bool:
    """Return whether a value is the name of a file in a folder, not a path elsewhere."""
    return isinstance(name, str) and name not in ("", ".", "..") and not set(name) & set("/\\\0")


def parse_json(text: str | bytes, where: object) -> Any:
    """Return the value of a JSON text.

    Args:
        text: of a size that was checked.
        where: its location, for the message.

    Raises:
        ValueError: not UTF-8, not JSON, or deeper than `DEEPEST` levels.
    """
    try:
        value = json.loads(text.decode("utf-8") if isinstance(text, bytes) else text)
    except (ValueError, RecursionError) as error:
        why = "it is too deep" if isinstance(error, RecursionError) else one_line(error)
        raise ValueError(f"{printable(where)} is not JSON ({why})") from error
    if _is_deeper(value, DEEPEST):
        raise ValueError(f"{printable(where)} is not JSON of ours: it has over {DEEPEST} levels")
    return value


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for each in level
            if isinstance(each, dict | list)
            for inner in (each.values() if isinstance(each, dict) else each)
        ]
        if not level:
            return False
    return True


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Return the text of a file or a pipe that a user named, or of a file in a folder of theirs.

    Raises:
        OSError: it cannot be read.
        ValueError: larger than `LARGEST_TEXT` bytes.
        UnicodeDecodeError: another encoding.
    """
    with path.open(encoding=encoding) as file:
        about = os.fstat(file.fileno())
        if about.st_size > LARGEST_TEXT:
            raise _too_long(path)
        text = file.read(-1 if stat.S_ISREG(about.st_mode) else LARGEST_TEXT + 1)
    if len(text) > LARGEST_TEXT:
        raise _too_long(path)
    return text


def read_lines(path: Path, encoding: str = "utf-8") -> Iterator[str]:
    """Yield the lines of a file or a pipe.

    Raises:
        OSError: it cannot be read.
        ValueError: a line of over `LARGEST_TEXT` characters.
        UnicodeDecodeError: another encoding.
    """
    with path.open(encoding=encoding) as file:
        while line := file.readline(LARGEST_TEXT + 1):
            if len(line) > LARGEST_TEXT:
                raise _too_long(path)
            yield line


def _too_long(path: Path) -> ValueError:
    return ValueError(
        f"{printable(path)} has over {LARGEST_TEXT:,} bytes in one document: split it"
    )


def read_json(path: Path, largest: int = LARGEST_JSON, may_be_pipe: bool = False) -> Any:
    """Return the value in a JSON file.

    Args:
        path: of the file.
        largest: the most bytes to read.
        may_be_pipe: whether a user typed the path, which may be `<(a command)`; files found in a
            folder must not be pipes.

    Raises:
        OSError: it cannot be read.
        ValueError: not a plain file, larger than `largest` bytes, not UTF-8, not JSON, or too deep.
    """
    if not (may_be_pipe and path.is_fifo()):
        require_plain_file(path, largest)
    with path.open("rb") as file:
        content = file.read(largest + 1)
    if len(content) > largest:
        raise ValueError(f"{printable(path)} has more than {largest:,} bytes: it is another file")
    return parse_json(content, path)
