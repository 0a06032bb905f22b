"""Interventions as plain hooks: each factory returns what `fwd_hooks` takes."""

from hooked_hybrid.hooks import per_position
from hooked_hybrid.interventions.heads import (
    best_heads,
    keep_top_heads,
    l2_norm,
    negative_entropy,
)
from hooked_hybrid.interventions.where import hook_at, on_rows

__all__ = [
    "best_heads",
    "hook_at",
    "keep_top_heads",
    "l2_norm",
    "negative_entropy",
    "on_rows",
    "per_position",
]
