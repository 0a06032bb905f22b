"""JSON of a checkpoint, read as data of a bounded size."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from weights_conversion.errors import CheckpointError

LARGEST_CONFIG, LARGEST_INDEX = 2**20, 2**23
"""Bytes, of a header too; published ones are a hundredth of it, and JSON takes 20 times its size to
read."""


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """Return the object that a file holds.

    Raises:
        CheckpointError: the file is larger than so many bytes, no JSON, or no object.
    """
    if (size := path.stat().st_size) > largest:
        raise CheckpointError(
            f"{path} has {size:,} bytes, more than {largest:,}: it is another file"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # no UTF-8, no JSON, too deep, too long a number
        raise CheckpointError(f"{path} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not an object")
    return content
