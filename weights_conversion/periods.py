"""Layers at equal distances: a period and an offset."""

from __future__ import annotations

from typing import Any

from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import ConfigReader


def periodic(
    reader: ConfigReader, period: str, offset: str, default_period: int, default_offset: int
) -> Any:
    """Return a test of layer indices: `i % period == offset`."""
    every = reader.integer(period, default_period)
    first = reader.get(offset, default_offset)
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise CheckpointError(f"config.json: {offset}={first!r} is not a layer index")
    return lambda i: i % every == first


def period_of(layers: list[int], n_layers: int) -> tuple[int, int] | None:
    """Return (period, offset) that select exactly these layers."""
    if not layers:
        return n_layers + 1, n_layers
    for period in range(1, n_layers + 1):
        if list(range(layers[0], n_layers, period)) == layers and layers[0] < period:
            return period, layers[0]
    return (n_layers, layers[0]) if len(layers) == 1 else None
