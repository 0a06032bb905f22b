"""Checks of options: an option without effect is an error.

An option that may be unused defaults to None (or False, or an empty sequence). Its real default is
filled in where it is read. So a given value can be distinguished from a default, and
`refuse_ignored` names the given options that would have no effect.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from enum import Enum
from importlib.util import find_spec
from numbers import Real
from typing import Any, Final, Literal

from torch import Tensor


class Unset(Enum):
    """The default of an option for which None is a value."""

    UNSET = "unset"

    def __repr__(self) -> str:
        return "unset"


UNSET: Final = Unset.UNSET
UnsetType = Literal[Unset.UNSET]

EXTRAS = {
    "accelerate": "offload",
    "lm_eval": "eval",
    "ray": "ray",
    "torchao": "quantized",
}
"""Packages, and the extra of hooked-hybrid that installs each."""


def is_given(value: Any) -> bool:
    """Whether an option was given: None, False and empty sequences count as not given."""
    if value is None or value is False or value is UNSET:
        return False
    return not (isinstance(value, str | Sequence | dict) and not len(value))


def refuse_ignored(why: str, **options: Any) -> None:
    """Refuse options that were given and have no effect.

    Args:
        why: the remedy, as the end of a sentence.
        options: by name.

    Raises:
        ValueError: names the given options and the remedy.
    """
    given = [f"{name}={show(value)}" for name, value in options.items() if is_given(value)]
    if given:
        verb = "has" if len(given) == 1 else "have"
        raise ValueError(f"{' and '.join(given)} {verb} no effect: {why}")


def show(value: Any) -> str:
    """Return a value as shown in messages: a tensor by its shape, a function by its name."""
    if isinstance(value, Tensor):
        return f"<tensor {tuple(value.shape)}>"
    text = getattr(value, "__qualname__", None) or repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_choice(name: str, value: Any, choices: Sequence[Any]) -> None:
    """Refuse a value that is not one of the choices.

    Raises:
        ValueError: lists the choices.
    """
    if not any(value is c or (isinstance(value, str) and value == c) for c in choices):
        *most, last = (repr(choice) for choice in choices)
        listed = f"{', '.join(most)} or {last}" if most else last
        raise ValueError(f"{name}={show(value)}: give {listed}")


def check_count(
    name: str, value: Any, least: int = 1, most: int | None = None, of: str = ""
) -> int:
    """Return a whole number in a range; bools and fractions are refused.

    Args:
        name: of the option.
        value: what was given.
        least, most: the range; None for no upper end.
        of: the source of the range, for the message: "the vocabulary".

    Raises:
        ValueError: states the range.
    """
    try:
        number = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        number = None
    if number is not None and number >= least and (most is None or number <= most):
        return number
    limits = f"{least} or more" if most is None else f"{least} to {most}"
    kind = "" if number is not None else "a whole number, "
    raise ValueError(f"{name}={show(value)}: give {kind}{limits}{f', {of}' if of else ''}")


def check_number(
    name: str,
    value: Any,
    above: float | None = None,
    up_to: float | None = None,
    rather: str = "",
) -> float:
    """Return a finite number in a range.

    Args:
        name: of the option.
        value: what was given.
        above: it must be greater.
        up_to: it must not be greater.
        rather: the alternative, for the message.

    Raises:
        ValueError: not a number, NaN, infinite or out of the range.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool)
    if (
        is_number
        and math.isfinite(value)
        and (above is None or value > above)
        and (up_to is None or value <= up_to)
    ):
        return float(value)
    limits = [f"above {above:g}"] if above is not None else []
    limits += [f"up to {up_to:g}"] if up_to is not None else []
    wanted = f"a finite number {' and '.join(limits)}".rstrip()
    raise ValueError(f"{name}={show(value)}: give {wanted}{f', or {rather}' if rather else ''}")


def require(*packages: str) -> None:
    """Raise before any work if packages are not installed.

    Raises:
        ModuleNotFoundError: names them and what to install.
    """
    missing = [name for name in packages if not _is_installed(name)]
    if missing:
        extras = ",".join(dict.fromkeys(EXTRAS[name] for name in missing))
        raise ModuleNotFoundError(
            f"this needs {' and '.join(missing)}: pip install 'hooked-hybrid[{extras}]'",
            name=missing[0],
        )


def _is_installed(package: str) -> bool:
    try:
        return find_spec(package) is not None
    except ValueError:  # a module that was put in place of the package, without a spec
        return True
