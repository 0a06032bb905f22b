"""Run-time checks of types and shapes, made no more often than they are asked for.

jaxtyping's import hook wraps every function of the library. Three parts of that cost more than the
tests themselves: beartype writes the code of a check here when the check first runs, not on import;
a function defined within another one, which would be wrapped anew in every call of the outer one,
is checked only while checks are on, and once in a test; and of a function's calls in a test the
first are checked, then one in so many.
"""

from __future__ import annotations

import functools
import inspect
from collections import Counter
from collections.abc import Callable
from typing import Any

import jaxtyping
from beartype import beartype

wrap = jaxtyping.jaxtyped
checked_in_this_test: set[Any] = set()
"""The code of inner functions."""
calls_in_this_test: Counter[Any] = Counter()
FIRST, THEN_ONE_IN = 4, 128
"""How many calls of one function are checked in a test: the first, then one in so many."""


def when_called(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that beartype checks from its first call on: the hook's type checker."""
    checked: Callable[..., Any] | None = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = beartype(fn)
        return checked(*args, **kwargs)

    return check


def is_due(fn: Any) -> bool:
    """Count a call of a function in this test; whether it is one of those that are checked."""
    calls_in_this_test[fn] = n = calls_in_this_test[fn] + 1
    return n <= FIRST or n % THEN_ONE_IN == 0


WRAPPERS = """
def unchecked(fn):
    @wraps(fn)
    def call(*args, **kwargs):
        return fn(*args, **kwargs)
    return call

def sometimes(fn, checked):
    @wraps(fn)
    def call(*args, **kwargs):
        if config.jaxtyping_disable or not is_due(fn):
            return fn(*args, **kwargs)
        return checked(*args, **kwargs)
    return call
"""
names: dict[str, Any] = {"wraps": functools.wraps, "config": jaxtyping.config, "is_due": is_due}
exec(compile(WRAPPERS, "jaxtyping/wrappers.py", "exec"), names)
unchecked, sometimes = names["unchecked"], names["sometimes"]
"""Wrap a function as jaxtyping does, to check nothing, or some calls. The library looks through
wrappers of a file of jaxtyping's when it tells functions apart: one function is the same, checked
or not."""


def jaxtyped(*, typechecker: Any) -> Callable[[Any], Any]:
    """Return jaxtyping's decorator, which checks inner functions now and then only."""

    def decorate(fn: Any) -> Any:
        if "<locals>" in fn.__qualname__:
            code = getattr(fn, "__code__", fn)
            if jaxtyping.config.jaxtyping_disable or code in checked_in_this_test:
                return unchecked(fn)
            checked_in_this_test.add(code)
            return wrap(fn, typechecker=typechecker)
        return sometimes_checked(fn, typechecker)

    return decorate


def sometimes_checked(fn: Any, typechecker: Any = when_called) -> Any:
    """Return a function of which some calls are checked; what else is decorated, as it was."""
    checked = wrap(fn, typechecker=typechecker)
    return sometimes(fn, checked) if inspect.isfunction(fn) else checked


def turn(on: bool) -> None:
    """Turn checks on or off, for the test that begins now."""
    checked_in_this_test.clear()
    calls_in_this_test.clear()
    jaxtyping.config.update("jaxtyping_disable", not on)


def put_off() -> None:
    """Let the import hook, which looks its decorator up by name, find the one above."""
    jaxtyping.jaxtyped = jaxtyped  # type: ignore[assignment]
