"""Run-time checks of types and shapes, made no more often than they are asked for.

jaxtyping's import hook wraps every function of the library. Two parts of that cost more than the
tests themselves, and are put off here: beartype writes the code of a check when the check first
runs, not on import; and a function defined within another one, which would be wrapped anew in
every call of the outer one, is checked only while checks are on, and once in a test.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

wrap = jaxtyping.jaxtyped
checked_in_this_test: set[Any] = set()
"""The code of inner functions."""


def when_called(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that beartype checks from its first call on: the hook's type checker."""
    checked: Callable[..., Any] | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = beartype(fn)
        return checked(*args, **kwargs)

    return check


UNCHECKED = """
def unchecked(fn):
    @wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)
    return call
"""
names: dict[str, Any] = {"wraps": functools.wraps}
exec(compile(UNCHECKED, "jaxtyping/unchecked.py", "exec"), names)
unchecked = names["unchecked"]
"""Wraps a function as jaxtyping does, and checks nothing. The library looks through wrappers of a
file of jaxtyping's when it tells functions apart: one function is the same, checked or not."""


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Return jaxtyping's decorator, which checks inner functions now and then only."""

    def decorate(fn: Any) -> Any:
        if "<locals>" in fn.__qualname__:
            code = getattr(fn, "__code__", fn)
            if jaxtyping.config.jaxtyping_disable or code in checked_in_this_test:
                return unchecked(fn)
            checked_in_this_test.add(code)
        return wrap(fn, typechecker=typechecker)

    return decorate


def turn(on: bool) -> None:
    """Turn checks on or off, for the test that begins now."""
    checked_in_this_test.clear()
    jaxtyping.config.update("jaxtyping_disable", not on)


def put_off() -> None:
    """Let the import hook, which looks its decorator up by name, find the one above."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
