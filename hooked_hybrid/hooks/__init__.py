"""Hook points, what runs at them, and their names."""

from hooked_hybrid.hooks.point import (
    Direction,
    F,
    HookFn,
    HookPoint,
    LensHandle,
    OnePosition,
    Run,
    RunHolder,
    Stage,
    changed_meanwhile,
    is_per_position,
    per_position,
    positions_of,
    watcher,
)

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
    "per_position",
    "positions_of",
    "watcher",
]
