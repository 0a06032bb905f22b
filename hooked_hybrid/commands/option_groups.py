"""Options that several commands share, as the fields of dataclasses."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints

import typer

_given: ContextVar[dict[str, str]] = ContextVar("given", default={})  # noqa: B039  (never changed)


def given_options() -> dict[str, str]:
    """Return the options on the command line, by parameter, as they are spelled there.

    An option that is left out is not among them, even if its default equals a given value. For a
    command called from Python, nothing is returned.
    """
    return _given.get()


def refuse_given(why: str, *names: str) -> None:
    """Refuse options on the command line that have no effect.

    Args:
        why: the remedy, as the end of a sentence.
        names: of parameters.

    Raises:
        ValueError: names the given options.
    """
    if found := [option for name, option in given_options().items() if name in names]:
        verb = "has" if len(found) == 1 else "have"
        raise ValueError(f"{' and '.join(found)} {verb} no effect: {why}")


def make_command(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters may be dataclasses of options.

    Each field of such a dataclass becomes an option, in the place of the parameter, with its own
    annotation and default; the function is called with the dataclass. Meanwhile `given_options`
    says which options were given.

    Args:
        defaults: of fields, for this command, in place of their own.

    Raises:
        TypeError: a default without a field, or two parameters with one name.
    """

    def command(function: Callable[..., None]) -> Callable[..., None]:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, type] = {
            name: hint
            for name, hint in hints.items()
            if isinstance(hint, type) and is_dataclass(hint)
        }
        options = [
            option
            for parameter in signature(function).parameters.values()
            for option in (
                _options(groups[parameter.name], defaults)
                if parameter.name in groups
                else [_alone(parameter, hints[parameter.name])]
            )
        ]
        known = {field.name for group in groups.values() for field in fields(group)}
        if unknown := sorted(defaults.keys() - known):
            raise TypeError(f"{function.__name__} has no option {unknown[0]!r} in its groups")

        @functools.wraps(function)
        def run(context: Any = None, **options: Any) -> None:
            values = {**defaults, **options}
            made = {name: _take(group, values) for name, group in groups.items()}
            with _knowing(context):
                function(**made, **values)

        made_command: Any = run
        told = [*options, Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
        made_command.__signature__ = Signature(told, return_annotation=None)
        made_command.__annotations__ = {option.name: option.annotation for option in told}
        return run

    return command


@contextmanager
def _knowing(context: Any) -> Iterator[None]:
    """Make `given_options` return the options of a command line."""
    found: dict[str, str] = {}
    if context is not None:
        sources = {p: context.get_parameter_source(p.name) for p in context.command.params}
        is_default = lambda source: source is None or source.name.startswith("DEFAULT")  # noqa: E731
        found = {p.name: p.opts[0] for p, source in sources.items() if not is_default(source)}
    token = _given.set(found)
    try:
        yield
    finally:
        _given.reset(token)


def _alone(parameter: Parameter, hint: Any) -> Parameter:
    return parameter.replace(kind=Parameter.KEYWORD_ONLY, annotation=hint)


def _options(group: type, defaults: dict[str, Any]) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=defaults.get(field.name, _default(field)),
            annotation=hints[field.name],
        )
        for field in fields(group)
    ]


def _default(field: Field[Any]) -> Any:
    return Parameter.empty if field.default is MISSING else field.default


def _take(group: type, values: dict[str, Any]) -> Any:
    """Return a group made of its values, which are removed from the others."""
    return group(**{f.name: values.pop(f.name) for f in fields(group) if f.name in values})
