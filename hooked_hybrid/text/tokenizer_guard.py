"""Limits on foreign tokenizers: errors become ValueErrors, and memory is bounded."""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hooked_hybrid.outputs.foreign import one_line, parse_json, require_plain_file

LARGEST = {"tokenizer.json": 2**28, "tokenizer.model": 2**26}
"""Largest bytes; published files have up to 2**25 and 2**23."""
LARGEST_OTHER = 2**24
MOST_GROWTH = 10_000
"""Largest number of characters that a normaliser or decoder may make of one."""
_ESCAPED = re.compile(rb"\\u00[2-7]")
"""Escaped letters, which no JSON writer produces, and which would hide a name."""


def read_bytes(path: Path) -> bytes:
    """Return the content of a tokenizer's file.

    Raises:
        ValueError: not a plain file, or larger than any tokenizer's.
    """
    require_plain_file(path, LARGEST.get(path.name, LARGEST_OTHER))
    return path.read_bytes()


@contextmanager
def breaking_off(what: object) -> Iterator[None]:
    """Turn whatever `tokenizers` raises into a ValueError.

    Its panics are not an `Exception`: `except Exception` would not catch them.

    Args:
        what: the failed action, for the message.
    """
    try:
        yield
    except BaseException as error:
        is_panic = type(error).__name__ == "PanicException"
        if not is_panic and not isinstance(error, Exception):
            raise
        raise ValueError(f"{what} ({one_line(error)})") from error


def refuse_bombs(content: bytes) -> None:
    """Refuse a `tokenizer.json` whose table of characters would need too much memory.

    Raises:
        ValueError: it has such a table.
    """
    if b"recompiled" not in content and not _ESCAPED.search(content):
        return
    waiting = [parse_json(content, "it")]
    while waiting:
        value = waiting.pop()
        if isinstance(value, dict):
            if "precompiled_charsmap" in value:
                require_charsmap(_of_base64(value["precompiled_charsmap"]))
            waiting += [v for v in value.values() if isinstance(v, dict | list)]
        elif isinstance(value, list):
            waiting += [v for v in value if isinstance(v, dict | list)]


def require_charsmap(table: bytes) -> None:
    """Refuse a table of normalised characters that is incomplete.

    It consists of the number of bytes of a trie, the trie, and the replacement texts, each ended by
    a zero.

    Raises:
        ValueError: it is cut off, or makes more than `MOST_GROWTH` characters of one.

    Source: sentencepiece, `normalizer.cc`, `DecodePrecompiledCharsMap`.
    """
    n_trie = struct.unpack("<I", table[:4].ljust(4, b"\xff"))[0]
    if n_trie > len(table) - 4 or n_trie % 4:
        raise ValueError("its table of normalised characters is cut off")
    if max(map(len, table[4 + n_trie :].split(b"\0"))) > MOST_GROWTH:
        raise ValueError("its table of normalised characters makes a book of one")


def refuse_growth(tokenizer: Tokenizer) -> None:
    """Refuse a tokenizer that makes more than `MOST_GROWTH` characters of one.

    Raises:
        ValueError: its normaliser or its decoder does.
    """
    for part in (tokenizer.normalizer, tokenizer.decoder):
        state = None if part is None else json.loads(part.__getstate__())
        if _growth(state) > MOST_GROWTH:
            raise ValueError(f"its steps make more than {MOST_GROWTH:,} characters of one")


def _growth(step: Any) -> float:
    """Return how many characters the steps of a sequence make of one, at most."""
    if not isinstance(step, dict):
        return 1.0
    growth = 1.0
    for inner in (*step.get("normalizers", ()), *step.get("decoders", ())):
        growth *= _growth(inner)
    if step.get("type") == "Replace":
        pattern = step.get("pattern")
        plain = pattern.get("String") if isinstance(pattern, dict) else None
        growth *= max(1, len(step.get("content") or "") / max(1, len(plain or "")))
    return growth


def _of_base64(value: Any) -> bytes:
    import base64

    if not isinstance(value, str):
        raise ValueError("its table of normalised characters is not text")
    return base64.b64decode(value)
