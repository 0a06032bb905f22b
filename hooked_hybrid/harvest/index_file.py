"""Reading the index of a harvest, which is checked before any file or number in it is used."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from hooked_hybrid.harvest.shards import (
    AGAIN,
    BESIDE,
    FORMAT,
    INDEX,
    RECIPE,
    shard_name,
    shard_paths,
)
from hooked_hybrid.outputs.foreign import LARGEST_RESULTS, read_json

_HOOK_NAME = re.compile(r"[\w.]+")
_DTYPE = re.compile(r"(bfloat|float|int|uint)\d+|bool")


def read_index(folder: Path) -> dict[str, Any]:
    """Return the index of a finished harvest.

    Raises:
        ValueError: there is none, or it is incomplete or of a newer version.
    """
    path = folder / INDEX
    if not path.exists():
        if not (folder / RECIPE).exists():
            raise ValueError(f"{folder} holds no harvest")
        raise ValueError(
            f"the harvest in {folder} is not finished ({len(shard_paths(folder))} shards are "
            f"there): continue with --resume"
        )
    try:
        index = read_json(path, LARGEST_RESULTS)
        is_newer = type(index["format"]) is int and index["format"] > FORMAT
        is_whole = is_newer or _adds_up(index)
    except (AttributeError, LookupError, TypeError, ValueError):
        is_newer = is_whole = False
    if not is_whole:
        raise ValueError(f"{path} is damaged: {AGAIN}")
    if is_newer:
        raise ValueError(f"{path} was written by a newer version of this library")
    return index


def _adds_up(index: dict[str, Any]) -> bool:
    """Whether an index has all fields, of the right types, and the sum of its shards' tokens."""
    shards, hooks = index["shards"], index["hooks"]
    return (
        type(index["format"]) is int
        and isinstance(shards, list)
        and isinstance(index["recipe"], dict)
        and index["beside"] == list(BESIDE)
        and all(_is_shard(shard, i, len(shards)) for i, shard in enumerate(shards))
        and all(_is_hook(name, hook) for name, hook in hooks.items())
        and type(index["tokens"]) is int
        and sum(shard["tokens"] for shard in shards) == index["tokens"] > 0 < len(hooks)
    )


def _is_shard(shard: dict[str, Any], i: int, n: int) -> bool:
    """Whether a shard has its one possible name, and enough bytes for its tokens."""
    numbers, hashes = (shard["tokens"], shard["bytes"]), shard["sha256"]
    return (
        shard["file"] == shard_name(i, n)
        and all(type(number) is int for number in numbers)
        and 0 < numbers[0] * 4 * len(BESIDE) < numbers[1]  # four bytes for each column of a row
        and all(isinstance(value, str) for value in hashes.values())
    )


def _is_hook(name: str, hook: dict[str, Any]) -> bool:
    means = (hook["mean_norm"], hook["mean_squared_norm"])
    return bool(
        _HOOK_NAME.fullmatch(name)
        and _DTYPE.fullmatch(hook["dtype"])
        and isinstance(hook["shape"], list)
        and all(type(n) is int and n >= 0 for n in hook["shape"])
        and all(mean is None or type(mean) is float for mean in means)
    )
