"""Hooks that can be pickled, copied, saved with a model and sent to other processes.

Functions defined inside factories cannot be pickled by default. The functions that a factory marked
`picklable` returns are pickled by name, with the values of their closures, and rebuilt from the
factory's code. Hooks that pass values to each other still do if they are pickled together. A user's
own function is pickled as usual: it must be defined in a module.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])
_LOCAL = ".<locals>."


def picklable(factory: F) -> F:
    """Make the hook, the hooks or the score that a factory returns picklable."""

    @functools.wraps(factory)
    def made(*args: Any, **kwargs: Any) -> Any:
        found = factory(*args, **kwargs)
        if not isinstance(found, list):
            return _wrapped(found)
        return [(_wrapped(where), _wrapped(hook)) for where, hook in found]

    return made  # type: ignore[return-value]


class Made(functools.partial):
    """A function made by a factory, with the marks and the name of that function."""

    def __reduce__(self) -> tuple[Any, ...]:
        """Return the arguments of `_rebuilt`."""
        *parts, marks = _parts(cast(FunctionType, self.func))
        return _rebuilt, (*parts, {**marks, **vars(self)})

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the function."""
        return getattr(self.func, name)


def _wrapped(value: Any) -> Any:
    """Return a picklable version of a function made inside one of this library."""
    if isinstance(value, FunctionType) and _is_ours(inspect.unwrap(value)):
        return Made(value)
    if isinstance(value, functools._lru_cache_wrapper):
        return _Cached(_wrapped(value.__wrapped__))
    return value


class _Cached:
    """A cached function, which is pickled without its cache."""

    def __init__(self, fn: Any) -> None:
        self.fn = fn

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.cache, (self.fn,)


def _is_ours(fn: Any) -> bool:
    return _LOCAL in fn.__code__.co_qualname and fn.__module__.startswith("hooked_hybrid.")


def _parts(fn: FunctionType) -> tuple[Any, ...]:
    """Return the location of a function's code, and the other parts of the function."""
    inner: Any = inspect.unwrap(fn)
    code, cells = inner.__code__, inner.__closure__ or ()
    held = zip(code.co_freevars, cells, strict=True)
    marks = {name: mark for name, mark in vars(fn).items() if name != "__wrapped__"}
    return (
        inner.__module__,
        code.co_qualname,
        _codes(inner.__module__, code.co_qualname).index(code),
        {name: _wrapped(cell.cell_contents) for name, cell in held},
        inner.__defaults__,
        inner.__kwdefaults__,
        marks,
    )


def _rebuilt(
    module: str,
    name: str,
    index: int,
    held: dict[str, Any],
    defaults: tuple[Any, ...] | None,
    keyword_defaults: dict[str, Any] | None,
    marks: dict[str, Any],
) -> Made:
    """Return the function with the parts of `_parts`."""
    codes = _codes(module, name)
    if index >= len(codes) or set(codes[index].co_freevars) != held.keys():
        raise ValueError(
            f"this pickle holds the hook {name}, and this version of hooked_hybrid has another "
            "one: make the hook anew"
        )
    code = codes[index]
    cells = tuple(CellType(held[variable]) for variable in code.co_freevars)
    names = vars(importlib.import_module(module))
    fn = FunctionType(code, names, code.co_name, defaults, cells)
    fn.__kwdefaults__, fn.__qualname__ = keyword_defaults, name
    vars(fn).update(marks)
    return Made(fn)


def _codes(module: str, name: str) -> list[CodeType]:
    """Return the code objects of this qualified name, in source order."""
    path = name.split(_LOCAL)[0].split(".")
    found: Any = importlib.import_module(module)
    for part in path:
        found = getattr(found, part, None)
    found = inspect.unwrap(found) if callable(found) else None
    if not isinstance(found, FunctionType):
        return []
    return [code for code in _inside(found.__code__) if code.co_qualname == name]


def _inside(code: CodeType) -> Iterator[CodeType]:
    for part in code.co_consts:
        if isinstance(part, CodeType):
            yield part
            yield from _inside(part)
