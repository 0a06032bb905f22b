"""`looped`: the cases of a test run one after the other within it, where there are hundreds.

A case of pytest's own costs as much as a forward of a tiny model; and what the cases share is
made once in a loop.
"""

from __future__ import annotations

import functools
import inspect
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from _pytest.mark import ParameterSet
from jaxtyping import config

CHECKED_ONE_IN = 8
"""Of a test's cases, one in so many runs with types and shapes checked at run time."""


def looped(
    names: str | tuple[str, ...], values: Iterable[Any] | Callable[..., Iterable[Any]]
) -> Callable[..., Any]:
    """Return a decorator that runs a test for each of the values, all of them, before it fails.

    It stands for `pytest.mark.parametrize` and reads like it; several of them run the product.
    A test that fails names every failing case, each with its error. Fixtures are made once for
    all the cases: not for a test that changes what it is given.

    Args:
        names: of the test's arguments, one string with commas or a tuple.
        values: one for each case, a tuple of them where there are several names; or a function
            of arguments of the test that returns them.
    """
    keys = [name.strip() for name in names.split(",")] if isinstance(names, str) else list(names)
    loop = Loop(keys, values if callable(values) else list(values))

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        inner = getattr(test, "loops", ())
        plain = inspect.unwrap(test) if inner else test
        loops = (loop, *inner)

        @functools.wraps(plain)
        def run(**given: Any) -> None:
            _run(plain, loops, given)

        signature = inspect.signature(test)
        left = [p for name, p in signature.parameters.items() if name not in keys]
        assert len(left) == len(signature.parameters) - len(keys), f"{keys}: not the arguments"
        run.__signature__ = signature.replace(parameters=left)  # type: ignore[attr-defined]
        run.loops = loops  # type: ignore[attr-defined]
        return run

    return decorate


Row = tuple[str, dict[str, Any]]
"""A case's name, and its arguments."""


class Loop(NamedTuple):
    """The arguments of a test that a loop gives it, and what they are in each case."""

    keys: list[str]
    values: Any

    def rows(self, given: dict[str, Any]) -> list[Row]:
        """Return the cases, where the test is given these other arguments."""
        values = self.values
        if callable(values):
            values = values(**{name: given[name] for name in inspect.signature(values).parameters})
        return [_row(self.keys, value) for value in values]


def _row(keys: list[str], value: Any) -> Row:
    if isinstance(value, ParameterSet):
        assert not value.marks, "a marked case is one of pytest's own"
        given, name = tuple(value.values), value.id
    else:
        given, name = tuple(value) if len(keys) > 1 else (value,), None
    arguments = dict(zip(keys, given, strict=True))
    return str(name) if name is not None else "-".join(map(_name, given)), arguments


def _name(value: Any) -> str:
    return str(getattr(value, "__name__", value))


def _run(test: Callable[..., None], loops: tuple[Loop, ...], given: dict[str, Any]) -> None:
    unchecked, failed = config.jaxtyping_disable, []
    cases = list(itertools.product(*(loop.rows(given) for loop in loops)))
    assert cases, "no case to run"
    try:
        for i, rows in enumerate(cases):
            config.update("jaxtyping_disable", unchecked or i % CHECKED_ONE_IN > 0)
            arguments = {key: value for _, row in rows for key, value in row.items()}
            try:
                test(**given, **arguments)
            except Exception as error:
                error.add_note(name := "-".join(name for name, _ in rows))
                failed.append((name, error))
    finally:
        config.update("jaxtyping_disable", unchecked)
    if failed:
        named = ", ".join(name for name, _ in failed)
        errors = [error for _, error in failed]
        raise ExceptionGroup(f"{len(failed)} of {len(cases)} cases: {named}", errors)
