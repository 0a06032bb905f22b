"""The identity of a code object: its instructions, constants, and the names it looks up."""

from __future__ import annotations

import dis
import inspect
import sys
from dataclasses import dataclass
from hashlib import sha256
from types import CodeType
from typing import Any

PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
"""The version of Python; others have other instructions for the same source."""


@dataclass(frozen=True)
class Code:
    """A code object, including those nested in it.

    Attributes:
        digest: of instructions, constants, names of variables and flags; not of lines, names or
            docstrings.
        names: those looked up in the module, in order.
        attributes: those looked up on any object, such as a module.
        imports: imported modules, with the level of a relative import.
    """

    digest: str
    names: tuple[str, ...]
    attributes: tuple[str, ...]
    imports: tuple[tuple[str, int], ...]


_READ: dict[int, tuple[CodeType, Code]] = {}
"""By id, as a code object's own hash reads all constants. Keeping it keeps its id valid."""
_MOST = 10_000


def read_code(code: CodeType) -> Code:
    """Return the identity of a code object, equal in every process of one version of Python."""
    if id(code) not in _READ:
        if len(_READ) >= _MOST:
            _READ.clear()
        _READ[id(code)] = code, _read(code)
    return _READ[id(code)][1]


def _read(code: CodeType) -> Code:
    names: dict[str, None] = {}
    imports: dict[tuple[str, int], None] = {}
    attributes: dict[str, None] = {}
    before: list[Any] = [0, 0]
    for step in dis.get_instructions(code):
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"):
            names[step.argval] = None
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR", "IMPORT_FROM"):
            attributes[step.argval] = None
        elif step.opname == "IMPORT_NAME":  # after the level and the imported names
            level = before[-2] if isinstance(before[-2], int) else 0
            imports[step.argval, level] = None
        before = [before[-1], step.argval]
    inner = [read_code(part) for part in code.co_consts if isinstance(part, CodeType)]
    for part in inner:
        names |= dict.fromkeys(part.names)
        imports |= dict.fromkeys(part.imports)
        attributes |= dict.fromkeys(part.attributes)
    shape = (
        code.co_argcount,
        code.co_posonlyargcount,
        code.co_kwonlyargcount,
        code.co_flags,
        code.co_varnames,
        code.co_freevars,
        code.co_cellvars,
        code.co_names,
    )
    said = [repr(shape), code.co_code.hex(), code.co_exceptiontable.hex()]
    said += [constant(part) for part in _constants(code)]
    digest = sha256("\n".join(said).encode("utf-8", "surrogatepass")).hexdigest()
    return Code(digest, tuple(names), tuple(attributes), tuple(imports))


def _constants(code: CodeType) -> tuple[Any, ...]:
    """Return the constants, with None for a docstring, which has no effect."""
    if sys.version_info >= (3, 13):
        has_docstring = bool(code.co_flags & inspect.CO_HAS_DOCSTRING)
    else:  # the first constant of a function is its docstring, or None
        is_function = bool(code.co_flags & inspect.CO_OPTIMIZED) and code.co_name[0] != "<"
        has_docstring = is_function and isinstance(code.co_consts[0], str)
    return (None, *code.co_consts[1:]) if has_docstring else code.co_consts


def constant(value: Any) -> str:
    """Return a constant of a code object as text, which differs between types and values."""
    if isinstance(value, CodeType):
        return read_code(value).digest
    if isinstance(value, tuple | frozenset):
        parts = [constant(part) for part in value]
        parts = parts if isinstance(value, tuple) else sorted(parts)
        return f"{type(value).__name__}({len(parts)}: {', '.join(parts)})"
    if isinstance(value, slice):
        return f"slice({', '.join(map(constant, (value.start, value.stop, value.step)))})"
    return f"{type(value).__name__} {value!r}"
