"""Marks on hook functions.

A mark states what a function guarantees; the forward reads the marks to choose how it may run.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

HookFn = Callable[..., Any]
"""A hook, called as `fn(tensor, hook=point)`; it returns a tensor, or None for no edit."""
F = TypeVar("F", bound=HookFn)
"""A hook, whose type a mark leaves as it is."""


def per_position(fn: F) -> F:
    """Mark a hook that treats each position separately.

    Such a hook may be called on pieces of a sequence, so that a forward can run in chunks. It must
    give position t the same result whatever other positions are in the tensor, and attach or remove
    no hooks, which the pieces before would have run without.

    Examples:
        >>> from hooked_hybrid.hooks import per_position
        >>> @per_position
        ... def halve(value, hook):
        ...     return value / 2
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=[("hook_embed", halve)])
        >>> hooked.shape
        torch.Size([1, 16, 583])
    """
    return _marked(fn, "per_position", True)


def watcher(fn: F) -> F:
    """Mark a hook that only reads: its result is ignored, and fast paths give it whole tensors.

    Examples:
        >>> from hooked_hybrid.hooks import watcher
        >>> norms = []
        >>> @watcher
        ... def note(value, hook):
        ...     norms.append(value.norm(dim=-1).shape)
        >>> hooks = [("blocks.0.mixer.hook_ssm_state", note)]
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
        >>> norms
        [torch.Size([1, 16])]
    """
    return _marked(fn, "is_watcher", True)


def is_per_position(fn: HookFn) -> bool:
    """Whether `fn`, or the function inside a `functools.partial`, is marked `per_position`.

    Examples:
        >>> from hooked_hybrid.hooks import is_per_position
        >>> is_per_position(lambda value, hook: value)
        False
        >>> is_per_position(interventions.cut_heads({2: [0]})[0][1])
        True
    """
    return bool(_mark(fn, "per_position", False))


def is_watcher(fn: HookFn) -> bool:
    """Whether `fn`, or the function inside a `functools.partial`, is marked `watcher`.

    Examples:
        >>> from hooked_hybrid.hooks import is_watcher
        >>> is_watcher(lambda value, hook: None)
        False
    """
    return bool(_mark(fn, "is_watcher", False))


def positions_of(fn: HookFn) -> tuple[int, ...] | None:
    """Return the positions `interventions.hook_at` restricted `fn` to, or None for all.

    Examples:
        >>> from hooked_hybrid.hooks import positions_of
        >>> positions_of(interventions.hook_at(lambda value, hook: 0 * value, [3, 5]))
        (3, 5)
    """
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
