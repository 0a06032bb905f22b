"""Tables of options: each option of a public function, where it acts, and where it would be idle.

A row says how the option is given so that the result changes, and in which calls nothing would
read it. An option without a row fails the tests: whoever adds one writes down what it does.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

Call = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One option of one function.

    `acts` are keywords that give the option so that what the call returns differs from a call with
    `base`; `idle` are calls in which it has no effect, each of which must be refused by a message
    that names the option. `see` is called in place of the function, where what the option does is
    not in what is returned.
    """

    acts: Mapping[str, Any]
    base: Mapping[str, Any] = field(default_factory=dict)
    idle: Sequence[Mapping[str, Any]] = ()
    see: Call | None = None


def options_of(function: Call) -> list[str]:
    """Return the names of the options of a function, those of its own keywords."""
    kinds = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.default is not p.empty and p.kind not in kinds]


def check_complete(function: Call, rows: Mapping[str, Row], elsewhere: Sequence[str] = ()) -> None:
    """Check that each option of a function has a row here (or stands in another test, by name)."""
    assert sorted({*rows, *elsewhere}) == sorted(options_of(function))


def check_acts(call: Call, row: Row) -> None:
    """Check that the option changes what is returned, or done."""
    see = row.see or call
    before = seen(see(**row.base))
    assert seen(see(**row.base)) == before, "the call does not repeat itself"
    assert seen(see(**{**row.base, **row.acts})) != before, f"{[*row.acts]} changed nothing"


def check_refuses(call: Call, option: str, keywords: Mapping[str, Any]) -> None:
    """Check that an option which nothing would read is refused by name."""
    with pytest.raises((ValueError, TypeError), match=option):
        call(**keywords)


def seen(value: Any) -> Any:
    """Return a result in a form that `==` compares by value."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        dtype = str(value.dtype)
        return dtype, tuple(value.shape), repr(torch.nan_to_num(value.double(), 7e7).tolist())
    if isinstance(value, Mapping):
        return {str(k): seen(v) for k, v in value.items()}
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: seen(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, list | tuple):
        return type(value).__name__, [seen(v) for v in value]
    if isinstance(value, str | int | float | bool | type(None)):
        return value
    if hasattr(value, "cache_dict"):
        return seen(value.cache_dict)
    return repr(value)
