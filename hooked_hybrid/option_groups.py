"""Options that several commands share: a dataclass says them once, and a command is given it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import MISSING, Field, fields, is_dataclass
from inspect import Parameter, Signature, signature
from typing import Any, get_type_hints


def grouped(**defaults: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a command of a function whose parameters may be dataclasses of options.

    Each field of such a dataclass becomes an option, in the place of the parameter, with its own
    annotation and default; the function is called with the dataclass.

    Args:
        defaults: of fields, for this command, in place of their own.

    Raises:
        TypeError: a default of no field, or two parameters with one name.
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
        def run(**given: Any) -> None:
            values = {**defaults, **given}
            made = {name: _taken(group, values) for name, group in groups.items()}
            function(**made, **values)

        made_command: Any = run
        made_command.__signature__ = Signature(options, return_annotation=None)
        made_command.__annotations__ = {option.name: option.annotation for option in options}
        return run

    return command


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


def _taken(group: type, values: dict[str, Any]) -> Any:
    """Return a group made of its own values, which are taken out."""
    return group(**{f.name: values.pop(f.name) for f in fields(group) if f.name in values})


__all__ = ["grouped"]
