"""Limits on foreign templates: steps, seconds, and the size of every value.

jinja2's sandbox prevents access to other objects, but not endless loops or texts that fill the
memory. Here each iteration of a loop and each call is a step, and every text, list or number that
an operator, a filter or a call makes has a limited size, larger than any conversation needs.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from typing import Any

from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS, SECONDS = 300_000, 20.0
LARGEST = 2**24
"""Characters of a text, entries of a nested value, bits of a number."""
WIDEST = 10**5
"""The largest number as an argument of a call or a filter, such as a width."""
_WIDE = re.compile(r"[{%][^{}%]*?(\d{6}|\*)")
_MULTIPLY = frozenset("replace join indent expandtabs translate ljust rjust center zfill".split())
"""Methods and filters whose result may be as large as the product of their arguments."""


class BoundsError(Exception):
    """A template exceeds a limit."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """A sandbox for one rendering, which counts its steps."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])

    def __init__(self, **options: Any) -> None:
        super().__init__(**options, finalize=self._sized)
        self.steps, self.until = STEPS, time.monotonic() + SECONDS
        self.globals.pop("lipsum", None)  # unlimited text, which no conversation needs
        self.filters = {name: self.bounded(filter_) for name, filter_ in self.filters.items()}
        self.filters["_counted"], self.filters["_sized"] = self._counted, self._sized

    def step(self) -> None:
        """Count a step.

        Raises:
            BoundsError: too many steps, or too much time.
        """
        self.steps -= 1
        if self.steps < 0 or time.monotonic() > self.until:
            raise BoundsError(f"it takes more than {STEPS:,} steps or {SECONDS:g} seconds")

    def joined(self, pieces: Iterable[str]) -> str:
        """Return the joined pieces, after checking the length."""
        found, size = [], 0
        for piece in pieces:
            found.append(piece)
            size += len(piece)
            if size > LARGEST:
                raise _too_large()
        return "".join(found)

    def bounded(self, filter_: Callable[..., Any]) -> Callable[..., Any]:
        """Return a filter that checks the sizes of its arguments and result."""

        @wraps(filter_)
        def filtered(*args: Any, **kwargs: Any) -> Any:
            self.step()
            self._check_arguments(args, kwargs)
            if args and isinstance(args[0], str) and filter_.__name__ == "do_format":
                _refuse_wide(args[0])
            if filter_.__name__.removeprefix("do_") in _MULTIPLY:
                _refuse_product(*args, *kwargs.values())
            return self._sized(filter_(*args, **kwargs))

        return filtered

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Call something for a template, as a step."""
        __self.step()
        __self._check_arguments(args, kwargs)
        if getattr(__obj, "__name__", "") in _MULTIPLY:
            _refuse_product(getattr(__obj, "__self__", ""), *args)
        return __self._sized(super().call(__context, __obj, *args, **kwargs))

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        """Return a text's own formatting, in the sandbox."""
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _refuse_wide(value.__self__)
        return wrapped

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """Return the result of an operator on two values of limited size."""
        self.step()
        self._check_sizes(left, right)
        if operator in ("*", "**") and isinstance(left, int) and isinstance(right, int):
            n_bits = left.bit_length() * (right if operator == "**" else 1) + right.bit_length()
            if abs(n_bits) > LARGEST // 1024:
                raise _too_large()
        elif operator == "*":
            for one, n in ((left, right), (right, left)):
                if isinstance(n, int) and hasattr(one, "__len__") and len(one) * n > LARGEST:
                    raise _too_large()
        elif operator == "%" and isinstance(left, str):
            _refuse_wide(left)
        return self._sized(super().call_binop(context, operator, left, right))

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Return a template's tree, in which loops are counted and joined texts are checked."""
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = _through("_counted", loop.iter)
        for block in list(tree.find_all(nodes.AssignBlock)):
            block.filter = _through("_sized", block.filter)
        _wrap_concatenations(tree)
        return tree

    def _check_arguments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        for value in (*args, *kwargs.values()):
            if isinstance(value, int) and abs(value) > WIDEST:
                raise BoundsError(f"it gives a call the number {str(value)[:20]}")
            self._sized(value)

    def _check_sizes(self, *values: Any) -> None:
        for value in values:
            self._sized(value)

    def _counted(self, values: Any) -> Iterator[Any]:
        for value in values:
            self.step()
            yield value

    def _sized(self, value: Any) -> Any:
        """Return the value, or raise an error if it is too large."""
        if isinstance(value, str):
            if len(value) > LARGEST:
                raise _too_large()
        elif isinstance(value, list | tuple | dict | set):
            _count(value)
        return value


def _count(value: Any) -> None:
    """Count the entries of a nested value, repeated objects included."""
    left, waiting = LARGEST // 16, [value]
    while waiting:
        one = waiting.pop()
        left -= 1
        if isinstance(one, str):
            left -= len(one) // 16
        elif isinstance(one, dict):
            waiting += one.keys()
            waiting += one.values()
        elif isinstance(one, list | tuple | set):
            waiting += one
        if left < len(waiting):
            raise _too_large()


def _through(name: str, node: Any) -> nodes.Filter:
    through = nodes.Filter(node, name, [], [], None, None)
    through.set_lineno(0 if node is None else node.lineno)
    return through


def _wrap_concatenations(node: nodes.Node) -> None:
    """Wrap every `~` of a tree in the check of sizes."""
    for field, value in node.iter_fields():
        if isinstance(value, list):
            value[:] = [_wrap(one) for one in value]
        elif isinstance(value, nodes.Node):
            setattr(node, field, _wrap(value))


def _wrap(value: Any) -> Any:
    if not isinstance(value, nodes.Node):
        return value
    _wrap_concatenations(value)
    if not isinstance(value, nodes.Concat):
        return value
    value.nodes = [_through("_sized", one) for one in value.nodes]
    return _through("_sized", value)


def _refuse_product(*values: Any) -> None:
    sizes = [v if isinstance(v, int) else len(v) if hasattr(v, "__len__") else 1 for v in values]
    product = 1
    for size in sizes:
        product *= max(abs(size), 1)
    if product > 4 * LARGEST:
        raise _too_large()


def _refuse_wide(text: str) -> None:
    if _WIDE.search(text):
        raise BoundsError("it formats to a width that no conversation has")


def _too_large() -> BoundsError:
    return BoundsError("it makes a value larger than any conversation")
