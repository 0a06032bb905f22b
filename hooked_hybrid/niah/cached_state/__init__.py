"""NIAH with cached states, to separate the effects of prefill and generation."""

from hooked_hybrid.niah.cached_state.sweep import (
    CASES,
    Case,
    cached_state,
    settings_of,
)

__all__ = [
    "CASES",
    "Case",
    "cached_state",
    "settings_of",
]
