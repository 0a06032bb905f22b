"""Hashes of values by content: equal content has the same hash in every process.

Functions count by their code, defaults, keyword defaults, closures, marks, and the objects they
look up in their modules; partials and bound methods by their parts; tensors, arrays, modules and
everything picklable by content. Functions of Python, torch and numpy count by name, those of other
installed packages by name and version. Addresses, and names given by a user, do not count.
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import json
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from hashlib import sha256
from typing import Any

import torch
from torch import Tensor, nn

from hooked_hybrid.network.weights.plain import as_matrix
from hooked_hybrid.runs.identity.code import PYTHON, read_code
from hooked_hybrid.runs.identity.modules import (
    UNVERSIONED,
    import_for,
    is_installed,
    is_named,
    stored_name,
    top_of,
    version_of,
    wrapped_by_tools,
)

Known = Iterable[tuple[Any, str]]
"""Objects, each with the text that replaces it."""
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type(...), type(NotImplemented))
_TORCH_ATOMS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
_C_FUNCTIONS = (
    types.BuiltinFunctionType,
    types.WrapperDescriptorType,
    types.MethodWrapperType,
    types.MethodDescriptorType,
    types.ClassMethodDescriptorType,
    types.GetSetDescriptorType,
    types.MemberDescriptorType,
)
_NOT_OF_A_CLASS = frozenset(
    "__dict__ __weakref__ __doc__ __module__ __qualname__ __annotations__ __annotate__ "
    "__annotate_func__ __annotations_cache__ __abstractmethods__ _abc_impl __slotnames__ "
    "__firstlineno__ __static_attributes__ __orig_bases__ __parameters__ __match_args__ "
    "__dataclass_fields__ __dataclass_params__ __type_params__".split()
)
"""Attributes of a class that do not count: documentation, and those that Python derives."""


MODELS: dict[type, Callable[[Any], Any]] = {}
"""Classes of models, with the function that returns an identity; set by `identity.model`."""


class UntoldError(ValueError):
    """The content of an object cannot be identified, so it could not be recognised later."""


def describe(value: Any, known: Known = ()) -> dict[str, str]:
    """Return the identity of a value: its hash, and the versions that the hash depends on.

    Args:
        value: a hook, a list of them, a setting's functions, an object: anything.
        known: objects that it may hold, with the text that replaces each.

    Returns:
        "hash"; the version of Python if it contains a user's code ("python"); and the versions of
        the packages whose functions it calls, by name.

    Raises:
        UntoldError: it holds something that cannot be pickled, such as a lock or an open file.
    """
    return _Reader(known).read(value)


def describe_callable(fn: Callable[..., Any]) -> dict[str, str]:
    """Return the identity of a function; see `describe`."""
    return describe(fn)


class _Reader:
    """One reading of a value. Each object is read once; cycles are given as distances back."""

    def __init__(self, known: Known) -> None:
        self._known = {id(value): (value, said) for value, said in known}
        self._done: dict[int, tuple[Any, str]] = {}
        self._open: dict[int, int] = {}
        self._n_opened = 0
        self._names: dict[tuple[int, str], int] = {}
        self._modules: set[tuple[int, tuple[str, ...]]] = set()
        self._to_read: deque[tuple[str, Any]] = deque()
        self._path: list[str] = []
        self._versions: dict[str, str] = {}

    def read(self, value: Any) -> dict[str, str]:
        """Return the result of `describe`."""
        try:
            said = [self._said(value)]
            while self._to_read:  # globals of functions, each once, in the order of first use
                name, found = self._to_read.popleft()
                with self._within(f"the global {name!r}"):
                    said.append(self._said(found))
        except RecursionError:
            raise UntoldError("what is nested too deeply, or holds a set of itself") from None
        return {"hash": _hash("value", *said)[:32], **self._versions}

    @contextmanager
    def _within(self, where: str) -> Iterator[None]:
        self._path.append(where)
        try:
            yield
        finally:
            self._path.pop()

    def _untold(self, what: str) -> UntoldError:
        return UntoldError(", in ".join([what, *reversed(self._path[-4:])]))

    # --- any value --------------------------------------------------------------------------

    def _said(self, value: Any) -> str:
        """Return the digest of a value."""
        kind = type(value)
        if kind in _ATOMS:
            return _hash("atom", kind.__name__, repr(value))
        if kind in _TORCH_ATOMS:
            return _hash("torch", str(value))
        if id(value) in self._known:
            return _hash("known", self._known[id(value)][1])
        if id(value) in self._done:
            return self._done[id(value)][1]
        if id(value) in self._open:
            return _hash("within", str(self._open[id(value)]))
        self._open[id(value)] = self._n_opened
        self._n_opened += 1
        digest = self._of(value)
        del self._open[id(value)]
        self._done[id(value)] = (value, digest)  # the value is kept, so that its id stays valid
        return digest

    def _of(self, value: Any) -> str:
        kind = type(value)
        if kind in (list, tuple):
            if set(map(type, value)) <= {int, str}:
                return _hash(kind.__name__, repr(value))
            return self._all(kind.__name__, value)
        if kind in (set, frozenset):
            return self._set(kind.__name__, value)
        if kind in (dict, types.MappingProxyType):
            return self._all("dict", [part for item in value.items() for part in item])
        if isinstance(value, Tensor):
            return self._tensor(value)
        if isinstance(value, torch.Generator):
            return self._all("generator", [str(value.device), value.get_state()])
        if isinstance(value, types.ModuleType):
            return _hash("module", stored_name(value.__name__))
        if isinstance(value, type):
            return self._class(value)
        found = self._function(value)
        return self._object(value) if found is None else found

    def _all(self, kind: str, values: Iterable[Any]) -> str:
        return _hash(kind, *[self._said(value) for value in values])

    def _named(self, kind: str, values: Mapping[str, Any]) -> str:
        """Return the digest of values by name, in any order."""
        said = [kind]
        for name in sorted(values):
            with self._within(repr(name)):
                said += [name, self._said(values[name])]
        return _hash(*said)

    def _set(self, kind: str, values: Iterable[Any]) -> str:
        """Return the digest of values whose order differs between processes, each separately."""
        said = []
        for value in values:
            found = _Reader(self._known.values()).read(value)
            said.append(found.pop("hash"))
            self._versions |= found
        return _hash(kind, *sorted(said))

    def _tensor(self, value: Tensor) -> str:
        said = ["tensor", str(value.dtype), str(tuple(value.shape))]
        if type(value) not in (Tensor, nn.Parameter):
            said.append(_name_of(type(value)))
        if value.device.type == "meta":
            return _hash(*said)
        try:
            plain = as_matrix(value.detach())
            plain = plain if plain.layout is torch.strided else plain.to_dense()
            plain = plain.resolve_conj().resolve_neg().cpu().contiguous().flatten()
            content = plain.view(torch.uint8).numpy().data
        except RuntimeError as error:  # a kind of tensor without plain numbers
            raise self._untold(f"a tensor of {value.dtype}") from error
        digest = sha256("\n".join(said).encode())
        digest.update(content)
        return digest.hexdigest()

    def _object(self, value: Any) -> str:
        """Return the digest of an object by its pickled state."""
        name = _name_of(type(value))
        if type(value).__module__ == "torch._ops":
            return _hash("name", str(value))
        for kind, identity in MODELS.items():
            if isinstance(value, kind):
                return _hash("another model", json.dumps(identity(value), sort_keys=True))
        try:
            reduced = copyreg.dispatch_table.get(type(value))
            kept = value.__reduce_ex__(4) if reduced is None else reduced(value)
        except Exception as error:  # a class may raise anything
            raise self._untold(f"a {name}") from error
        if isinstance(kept, str):
            return _hash("global", str(getattr(value, "__module__", None)), kept)
        made, arguments, state, listed, items = (*kept, None, None, None)[:5]
        with self._within(f"a {name}"):
            said = [self._said(made), self._said(tuple(arguments))]
            for part in state if isinstance(state, tuple) else (state,):
                is_named = type(part) is dict and all(type(key) is str for key in part)
                said.append(self._named("state", part) if is_named else self._said(part))
            said += [self._said(list(listed or ())), self._said(list(items or ()))]
        return _hash("object", *said)

    def _class(self, value: type) -> str:
        if is_named(value.__module__):
            return self._by_name(value.__module__, value.__qualname__)
        held = {k: v for k, v in vars(value).items() if k not in _NOT_OF_A_CLASS}
        with self._within(f"the class {value.__qualname__}"):
            return _hash("class", self._all("bases", value.__bases__), self._named("held", held))

    def _by_name(self, module: str, name: str) -> str:
        top = top_of(module)
        if is_installed(module) and top not in UNVERSIONED:
            self._versions[top] = version_of(top)
        return _hash("name", stored_name(module), name)

    # --- functions --------------------------------------------------------------------------

    def _function(self, value: Any) -> str | None:
        """Return the digest of a function or a callable like one; None for another value."""
        if isinstance(value, types.FunctionType):
            return self._python_function(value)
        if isinstance(value, types.MethodType):
            return self._all("method", [value.__func__, value.__self__])
        if isinstance(value, functools.partial):
            keywords, marks = self._named("", value.keywords), self._named("", vars(value))
            return _hash("partial", self._all("", [value.func, value.args]), keywords, marks)
        if isinstance(value, property):
            return self._all("property", [value.fget, value.fset, value.fdel])
        if isinstance(value, staticmethod | classmethod):
            return self._all(type(value).__name__, [value.__func__])
        if isinstance(value, functools.cached_property):
            return self._all("cached property", [value.func])
        if isinstance(value, functools._lru_cache_wrapper):
            return self._all("cached", [value.__wrapped__])
        if isinstance(value, types.CodeType):
            return self._code(value)
        if isinstance(value, _C_FUNCTIONS):
            return self._c_function(value)
        return None

    def _c_function(self, value: Any) -> str:
        owner, home = getattr(value, "__self__", None), getattr(value, "__objclass__", None)
        if owner is not None and not isinstance(owner, types.ModuleType):
            return _hash("bound", value.__name__, self._said(owner))
        if home is not None:
            return _hash("method", home.__module__, home.__qualname__, value.__name__)
        return self._by_name(value.__module__ or "builtins", value.__qualname__)

    def _python_function(self, fn: types.FunctionType) -> str:
        inner = wrapped_by_tools(fn)
        if inner is not None:
            return self._said(inner)
        # Not by the function's attributes, as `functools.wraps` copies those of another function.
        module, name = str(fn.__globals__.get("__name__", "__main__")), fn.__code__.co_qualname
        if is_installed(module) and "<locals>" not in name:
            return self._by_name(module, name)
        with self._within(f"the function {name}"):
            marks = {key: mark for key, mark in vars(fn).items() if key != "__wrapped__"}
            said = [
                self._code(fn.__code__),
                self._said(fn.__defaults__),
                self._named("keyword defaults", fn.__kwdefaults__ or {}),
                self._named("marks", marks),
            ]
            for variable, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
                with self._within(f"{variable!r} of its closure"):
                    said += self._cell(cell, read_code(fn.__code__).attributes)
            if not is_installed(module):
                said += self._looked_up(fn)
        return _hash("function", *said)

    def _code(self, code: types.CodeType) -> str:
        self._versions["python"] = PYTHON
        return _hash("code", read_code(code).digest)

    def _cell(self, cell: types.CellType, attributes: tuple[str, ...]) -> list[str]:
        try:
            held = cell.cell_contents
        except ValueError:
            return [_hash("empty cell")]
        is_module = isinstance(held, types.ModuleType)
        return [self._said(held), *(self._of_module(held, attributes) if is_module else ())]

    def _looked_up(self, fn: types.FunctionType) -> list[str]:
        """Return the numbers of the objects that a function looks up; each is read later, once."""
        code, said = read_code(fn.__code__), []
        for name in code.names:
            if name in fn.__globals__:
                said += self._reference(fn.__globals__, name, code.attributes)
            else:
                said.append(_hash("builtin" if hasattr(builtins, name) else "missing", name))
        for name, level in code.imports:
            said.append(_hash("import", name, str(level)))
            if (module := import_for(name, level, fn.__globals__)) is not None:
                said += self._of_module(module, code.attributes)
        return said

    def _reference(self, names: dict[str, Any], name: str, attributes: Sequence[str]) -> list[str]:
        value = names[name]
        if isinstance(value, types.ModuleType):
            return [self._said(value), *self._of_module(value, tuple(attributes))]
        key = id(names), name
        if key not in self._names:
            self._names[key] = len(self._names)
            self._to_read.append((name, value))
        return [_hash("global", str(self._names[key]))]

    def _of_module(self, module: types.ModuleType, attributes: tuple[str, ...]) -> list[str]:
        """Return the names that a function may look up in a module of a user."""
        key = id(module), attributes
        if is_installed(module.__name__) or key in self._modules:
            return []
        self._modules.add(key)
        said = []
        for name in attributes:
            if hasattr(module, name) and name in vars(module):  # `hasattr` may import it
                said += [_hash("attribute", name)]
                said += self._reference(vars(module), name, attributes)
        return said


def _hash(*said: str) -> str:
    whole = "\n".join(f"{len(part)} {part}" for part in said)
    return sha256(whole.encode("utf-8", "surrogatepass")).hexdigest()


def _name_of(kind: type) -> str:
    return f"{stored_name(kind.__module__)}.{kind.__qualname__}".removeprefix("builtins.")
