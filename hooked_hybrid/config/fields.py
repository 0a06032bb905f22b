"""Fields of configs: which are options, and checks of their values."""

from __future__ import annotations

import dataclasses
import math
from types import MappingProxyType
from typing import Any

OPTION = MappingProxyType({"is_option": True})
"""Metadata of a field that identities of results leave out where it has its default."""


def options_set(config: Any, path: str = "") -> dict[str, Any]:
    """Return the options that do not have their default, by their path in a config."""
    found: dict[str, Any] = {}
    if isinstance(config, tuple):
        for i, part in enumerate(config):
            found |= options_set(part, f"{path}.{i}")
    elif dataclasses.is_dataclass(config):
        for field in dataclasses.fields(config):
            value, here = getattr(config, field.name), f"{path}.{field.name}".strip(".")
            if field.metadata.get("is_option") and value != field.default:
                found[here] = value
            found |= options_set(value, here)
    return found


def require_positive(config: object, *names: str) -> None:
    """Refuse a field that is no positive integer."""
    for name in names:
        value = getattr(config, name)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{type(config).__name__}.{name}={value!r}: give a positive integer")


def require_scale(config: object, *names: str) -> None:
    """Refuse a field that is no positive number."""
    for name in names:
        value = getattr(config, name)
        if (
            isinstance(value, bool)
            or not isinstance(value, int | float)
            or not 0 < value < math.inf
        ):
            raise ValueError(f"{type(config).__name__}.{name}={value!r}: give a positive number")


def require_one_of(config: object, name: str, *values: str | None) -> None:
    """Refuse a field that has none of some values."""
    if (value := getattr(config, name)) not in values:
        shown = ", ".join(repr(v) for v in values)
        raise ValueError(f"{type(config).__name__}.{name}={value!r}: give one of {shown}")
