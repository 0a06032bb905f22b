"""JSON of a checkpoint, read as data of a bounded size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hooked_hybrid.outputs.foreign import LARGEST_JSON, LARGEST_SMALL
from hooked_hybrid.outputs.foreign import read_json as read_any
from weights_conversion.errors import CheckpointError

LARGEST_CONFIG, LARGEST_INDEX = LARGEST_SMALL, LARGEST_JSON


def read_json(path: Path, largest: int) -> dict[str, Any]:
    """Return the JSON object in a file.

    Raises:
        CheckpointError: the file is larger than `largest` bytes, not plain, not JSON, too deep, or
            not an object.
    """
    try:
        content = read_any(path, largest)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} contains a {type(content).__name__}, not an object")
    return content
