"""Marks on hook functions.

A mark states what a function guarantees; the forward reads the marks to choose how it may run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

HookFn = Callable[..., Any]
F = TypeVar("F", bound=HookFn)


def per_position(fn: F) -> F:
    """Mark a hook that treats each position separately.

    Such a hook may be called on pieces of a sequence, so that a forward can run in chunks. It must
    give position t the same result whatever other positions are in the tensor, and attach or remove
    no hooks, which the pieces before would have run without.
    """
    return _marked(fn, "per_position", True)


def watcher(fn: F) -> F:
    """Mark a hook that only reads: its result is ignored, and fast paths give it whole tensors."""
    return _marked(fn, "is_watcher", True)


def is_per_position(fn: HookFn) -> bool:
    """Whether `fn`, or the function inside a `functools.partial`, is marked `per_position`."""
    return bool(_mark(fn, "per_position", False))


def is_watcher(fn: HookFn) -> bool:
    """Whether `fn`, or the function inside a `functools.partial`, is marked `watcher`."""
    return bool(_mark(fn, "is_watcher", False))


def positions_of(fn: HookFn) -> tuple[int, ...] | None:
    """Return the positions `interventions.hook_at` restricted `fn` to, or None for all."""
    return _mark(fn, "positions", None)


def _mark(fn: HookFn, name: str, default: Any) -> Any:
    while isinstance(fn, functools.partial):  # by its own marks: a failed look-up costs more
        if name in vars(fn):
            return vars(fn)[name]
        fn = fn.func
    return getattr(fn, name, default)


def _marked(fn: F, name: str, value: Any) -> F:
    try:
        setattr(fn, name, value)
        return fn
    except AttributeError:  # bound methods and builtins take no attributes
        wrapped: Any = functools.partial(fn)
        setattr(wrapped, name, value)
        return wrapped
