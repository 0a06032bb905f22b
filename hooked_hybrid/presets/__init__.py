"""Configs of the published and packaged models."""

from hooked_hybrid.presets.configs import (
    griffin,
    jamba,
)

__all__ = [
    "griffin",
    "jamba",
]
