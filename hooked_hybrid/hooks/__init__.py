"""Hook points, what runs at them, and their names."""

from hooked_hybrid.hooks.marks import (
    F,
    HookFn,
    is_per_position,
    is_watcher,
    per_position,
    positions_of,
    watcher,
)
from hooked_hybrid.hooks.one_position import OnePosition
from hooked_hybrid.hooks.point import Direction, HookPoint, LensHandle, changed_meanwhile
from hooked_hybrid.hooks.run import Run, RunHolder, Stage

__all__ = [
    "Direction",
    "F",
    "HookFn",
    "HookPoint",
    "LensHandle",
    "OnePosition",
    "Run",
    "RunHolder",
    "Stage",
    "changed_meanwhile",
    "is_per_position",
    "is_watcher",
    "per_position",
    "positions_of",
    "watcher",
]
