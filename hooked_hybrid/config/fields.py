"""Fields of configs: options, and checks of their values."""

from __future__ import annotations

import math
from dataclasses import field
from typing import Any


def option(default: Any) -> Any:
    """Return a keyword-only field. Where it has its default, identities of results leave it out."""
    return field(default=default, kw_only=True, metadata={"is_option": True})


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
