"""The origin of code: Python itself, an installed package, this library, or the user."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from importlib.util import resolve_name
from types import FunctionType, ModuleType
from typing import Any

OWN = "hooked_hybrid"
UNVERSIONED = sys.stdlib_module_names | {"builtins", "torch", "numpy"}
"""Packages whose version does not count in the identity of a function."""
_INSTALLED: dict[str, bool] = {}
_STORED_AS = {
    "hooked_hybrid.interventions.layers": "hooked_hybrid.interventions.ablation",
    "hooked_hybrid.interventions.sets_of_heads": "hooked_hybrid.interventions.ablation",
    "hooked_hybrid.config.layer": "hooked_hybrid.config",
    "hooked_hybrid.config.mixers": "hooked_hybrid.config",
    "hooked_hybrid.config.mlps": "hooked_hybrid.config",
    "hooked_hybrid.config.model": "hooked_hybrid.config",
    "hooked_hybrid.config.norms": "hooked_hybrid.config",
    "hooked_hybrid.hooks.attaching": "hooked_hybrid.hooked_root",
    "hooked_hybrid.hooks.marks": "hooked_hybrid.hooks",
    "hooked_hybrid.hooks.names": "hooked_hybrid.names",
    "hooked_hybrid.hooks.one_position": "hooked_hybrid.hooks",
    "hooked_hybrid.hooks.places": "hooked_hybrid.places",
    "hooked_hybrid.hooks.point": "hooked_hybrid.hooks",
    "hooked_hybrid.hooks.root": "hooked_hybrid.hooked_root",
    "hooked_hybrid.hooks.run": "hooked_hybrid.hooks",
    "hooked_hybrid.hooks.slicing": "hooked_hybrid.slicing",
    "hooked_hybrid.model.cache": "hooked_hybrid.cache",
    "hooked_hybrid.model.hybrid": "hooked_hybrid.model",
    "hooked_hybrid.hooks.transforms": "hooked_hybrid.transforms",
    "hooked_hybrid.network.elementwise": "hooked_hybrid.network.layers",
    "hooked_hybrid.niah.settings.setting": "hooked_hybrid.niah.settings",
    "hooked_hybrid.text.tokenizer": "hooked_hybrid.tokenizer",
}
"""Modules that have moved, with their earlier names, which older stores recorded."""


def is_installed(module: str) -> bool:
    """Whether a module is Python's own or an installed package's, this library excepted."""
    top = top_of(module)
    if top in (OWN, "__main__"):
        return False
    if top in UNVERSIONED:
        return True
    if top not in _INSTALLED and (found := sys.modules.get(top)) is not None:
        spec = getattr(found, "__spec__", None)
        searched = getattr(spec, "submodule_search_locations", None) or ()
        places = (str(place) for place in (getattr(found, "__file__", None), *searched))
        parts = {part for place in places for part in place.replace("\\", "/").split("/")}
        _INSTALLED[top] = bool(parts & {"site-packages", "dist-packages"})
    return _INSTALLED.get(top, False)


def is_named(module: str) -> bool:
    """Whether a module's functions count by name, as in installed packages and this library."""
    return is_installed(module) or top_of(module) == OWN


def stored_name(module: str) -> str:
    """Return the name of a module in identities, which is kept when the module moves."""
    return _STORED_AS.get(module, module)


def top_of(module: str) -> str:
    """Return the top-level package of a module."""
    return module.partition(".")[0]


@functools.cache
def version_of(package: str) -> str:
    """Return the version of a package, as installed, or its `__version__`."""
    try:
        return version(package)
    except PackageNotFoundError:
        return str(getattr(sys.modules.get(package), "__version__", "of no version"))


def import_for(name: str, level: int, names: Mapping[str, Any]) -> ModuleType | None:
    """Return a module that a function imports when it runs; None for installed packages.

    Args:
        name, level: of the import; the level is the number of dots of a relative one.
        names: of the module that the function is defined in.
    """
    try:
        whole = resolve_name("." * level + name, names.get("__package__") or "") if level else name
        return None if is_installed(whole) else importlib.import_module(whole)
    except Exception:  # an import may raise anything; the function itself will fail then, too
        return None


def wrapped_by_tools(fn: FunctionType) -> Any:
    """Return the function that a type checker or a compiler wraps; None for any other."""
    file = fn.__code__.co_filename
    if file.startswith("<@beartype(") or "jaxtyping" in file.replace("\\", "/").split("/"):
        return vars(fn).get("__wrapped__")
    return vars(fn).get("_torchdynamo_orig_callable")
