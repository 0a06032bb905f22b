"""The identity of a model: everything its numbers depend on, as comparable JSON values."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.weights.plain import as_matrix
from hooked_hybrid.runs.identity.tokenizers import tokenizer_identity
from hooked_hybrid.runs.identity.values import MODELS, Known, UntoldError, describe

_OF_NO_MATTER = ("model_name", "extra", "device", "dtype")
"""Fields of a config without an effect on the numbers; the dtype is recorded with the weights."""
_OF_A_MODEL = frozenset(
    "_cfg tokenizer why_no_tokenizer mod_dict hook_dict run_holder _contexts placement "
    "quantization".split()
)
"""Attributes of a model that are recorded elsewhere or do not affect its numbers."""
_OF_TORCH = frozenset({*vars(nn.Module()), "_compiled_call_impl"})
_TORCH_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_HASHED: ContextVar[dict[int, tuple[HookedHybrid, str]] | None] = ContextVar("hashed", default=None)


@contextmanager
def hash_once() -> Iterator[None]:
    """Hash the weights of each model only once during a `with` block.

    Weights must not change in the block.
    """
    if _HASHED.get() is not None:
        yield
        return
    token = _HASHED.set({})
    try:
        yield
    finally:
        _HASHED.reset(token)


def model_identity(model: HookedHybrid) -> dict[str, Any]:
    """Return the identity of a model; hashing takes about a second for 1 GB of weights.

    Returns:
        "weights" (a hash), "dtype", "quantization", "config" (all fields that affect the numbers),
        "tokenizer" (None without one), "hooks" (all attached ones, in order) and "changes": modules
        that differ from those the config makes. Name and devices do not count.

    Raises:
        UntoldError: a hook or the tokenizer holds something whose content cannot be identified.

    Examples:
        >>> from hooked_hybrid.runs.identity import model_identity
        >>> identity = model_identity(model)
        >>> identity["dtype"], identity["hooks"]
        ('torch.float32', [])
        >>> model_identity(jamba)["weights"] == identity["weights"]
        False
    """
    known = known_of(model)
    return {
        "weights": weights_hash(model),
        "dtype": str(model.dtype),
        "quantization": None if model.quantization is None else str(model.quantization.scheme),
        "config": config_identity(model.cfg),
        "tokenizer": None if model.tokenizer is None else tokenizer_identity(model.text),
        "hooks": [
            {"point": str(h.point.name), "direction": h.direction, **_described(h, known)}
            for h in model.attached()
        ],
        "changes": _changes(model),
    }


def weights_hash(model: HookedHybrid) -> str:
    """Return a short hash of the shapes and values of all weights, about 1 GB a second."""
    hashed = _HASHED.get()
    if hashed is not None and id(model) in hashed:
        return hashed[id(model)][1]
    shape = (model.cfg.layers, model.cfg.d_model, model.cfg.norm)
    digest = hashlib.sha256(_shown_without_options(shape).encode())
    if model.quantization is not None:
        digest.update(model.quantization.scheme.encode())
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        weight = as_matrix(value.detach())
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype}".encode())
        for part in weight.unbind() if weight.ndim > 2 else (weight,):  # a copy of one expert's
            digest.update(part.cpu().flatten().view(torch.uint8).numpy().data)
    found = digest.hexdigest()[:16]
    if hashed is not None:
        hashed[id(model)] = model, found  # the model is kept, so that its id stays valid
    return found


def config_identity(cfg: HybridConfig) -> dict[str, Any]:
    """Return every field of a config that affects the numbers, with the kind of each part."""
    said = _fields(cfg)
    return {name: value for name, value in said.items() if name not in _OF_NO_MATTER}


def without_tokenizer(identity: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of a model without its tokenizer."""
    return {name: value for name, value in identity.items() if name != "tokenizer"}


def identify(what: str, value: Any, known: Known = ()) -> dict[str, str]:
    """Return the identity of a value, see `describe`; errors give its name and the remedy."""
    try:
        return describe(value, known)
    except UntoldError as error:
        raise UntoldError(
            f"{what} could not be recognized when the results are continued: it holds "
            f"{error}, whose content cannot be identified; let it hold only what can be pickled"
        ) from error


def known_of(model: HookedHybrid) -> list[tuple[Any, str]]:
    """Return the objects of the model that hooks may hold, as the model is recorded separately."""
    held: list[tuple[Any, str]] = [(model, "the model that runs")]
    held += [(module, f"its {name}") for name, module in model.named_modules() if name]
    held += [(weight, f"its {name}") for name, weight in model.named_parameters()]
    return held + [(model.tokenizer, "its tokenizer")] * (model.tokenizer is not None)


def _described(handle: Any, known: Known) -> dict[str, str]:
    return identify(f"the hook on {handle.point.name}", handle.user_hook, known)


def _fields(value: Any) -> Any:
    """Return a dataclass of dataclasses as JSON-able values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        found = {name: _fields(getattr(value, name)) for name in _fields_of(value)}
        return {"kind": type(value).__name__, **found}
    if isinstance(value, list | tuple):
        return [_fields(part) for part in value]
    if isinstance(value, Mapping):
        return {str(name): _fields(part) for name, part in value.items()}
    return value if value is None or isinstance(value, bool | int | float | str) else repr(value)


def _fields_of(value: Any) -> list[str]:
    """Return the fields of a config in their order, without options that have their default.

    So a config has the same identity as before the option was there.
    """
    fields = sorted(dataclasses.fields(value), key=lambda f: f.kw_only is True)
    return [
        f.name
        for f in fields
        if not (f.metadata.get("is_option") and getattr(value, f.name) == f.default)
    ]


def _shown_without_options(value: Any) -> str:
    """Return what `repr` gives for a config, without options that have their default."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = (f"{n}={_shown_without_options(getattr(value, n))}" for n in _fields_of(value))
        return f"{type(value).__qualname__}({', '.join(fields)})"
    if isinstance(value, tuple):
        parts = [_shown_without_options(part) for part in value]
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    return repr(value)


def _changes(model: HookedHybrid) -> dict[str, str]:
    """Return the classes and settings of modules that differ from those the config makes."""
    made = _as_made(model.cfg)
    found: dict[str, str] = {}
    for name, module in _modules(model):
        kind, theirs = made.get(name, (None, {}))
        if kind is not type(module):
            digest = identify(f"the class of {name or 'the model'}", type(module))["hash"]
            found[name or "the model"] = f"{type(module).__name__} {digest[:16]}"
        own = _settings(module)
        if kind is not None and identify(f"{name} of the model", own)["hash"] == theirs[""]:
            continue
        for key in sorted({*own, *theirs} - {""}):
            where = f"{name}.{key}".strip(".")
            digest = identify(where, own[key])["hash"] if key in own else "missing"
            if digest != theirs.get(key):
                found[where] = _shown(own.get(key), digest)
    return found


@lru_cache(maxsize=8)
def _as_made(cfg: HybridConfig) -> dict[str, tuple[type, dict[str, str]]]:
    """Return the class of each module of a config's model, and hashes of its settings.

    By the modules' names, and for all together under "".
    """
    found: dict[str, tuple[type, dict[str, str]]] = {}
    for name, module in _modules(HookedHybrid.meta(cfg)):
        own = _settings(module)
        hashes = {key: describe(value)["hash"] for key, value in own.items()}
        found[name] = type(module), {**hashes, "": describe(own)["hash"]}
    return found


def _modules(model: HookedHybrid) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that compute: not hook points, nor lists of quantised weights."""
    for name, module in model.named_modules():
        if not isinstance(module, HookPoint | nn.ParameterList):
            yield name, module


def _settings(module: nn.Module) -> dict[str, Any]:
    """Return a module's attributes other than weights, submodules and torch's own."""
    left_out = _OF_TORCH | (_OF_A_MODEL if isinstance(module, HookedHybrid) else frozenset())
    held = {
        name: value
        for name, value in vars(module).items()
        if name not in left_out and not isinstance(value, nn.Module)
    }
    return held | {name: list(vars(module)[name].values()) for name in _TORCH_HOOKS}


def _shown(value: Any, digest: str) -> str:
    digest = digest[:16]
    return repr(value) if value is None or isinstance(value, bool | int | float | str) else digest


MODELS[HookedHybrid] = model_identity
