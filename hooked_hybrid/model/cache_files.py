"""A cache as a safetensors file: its values under their names, and where their entries stood."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.slicing import PosSlice, read_indices
from hooked_hybrid.model.cached_values import CachedValues
from hooked_hybrid.outputs.foreign import one_line, parse_json, require_safetensors
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

_PLACES = "places."
_FORMAT = "hooked_hybrid.ActivationCache"

C = TypeVar("C", bound=CachedValues)


def save_values(cache: CachedValues, path: str | os.PathLike[str]) -> None:
    """Write a cache to a safetensors file, whole or not at all; `load_values` reads it.

    Any reader of safetensors finds the values under their full names; under names that begin
    with "places." are the positions of their entries.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    tensors = {name: t.detach().contiguous() for name, t in cache.items()}
    if len({t.untyped_storage().data_ptr() for t in tensors.values()}) < len(tensors):
        tensors = {name: t.clone() for name, t in tensors.items()}
    index: dict[str, list[int | None]] = {}
    numbers: dict[int, int] = {}
    for name, places in cache.places.items():
        index[name] = []
        for pos in (places.pos, places.key_pos):
            if pos is not None and id(pos) not in numbers:
                numbers[id(pos)] = len(numbers)
                tensors[f"{_PLACES}{numbers[id(pos)]}"] = pos.contiguous().clone()
            index[name].append(None if pos is None else numbers[id(pos)])
    about = {
        "format": _FORMAT,
        "names": list(cache),
        "axes": {name: list(axes) for name, axes in cache.axes.items()},
        "places": index,
        "has_batch_dim": cache.has_batch_dim,
        "pos_slice": _as_json(cache.pos_slice),
        "n_layers": cache.n_layers,
    }
    with replacing(Path(path)) as partial:
        save_file(tensors, partial, metadata={"about": json.dumps(about)})


def load_values(
    kind: type[C],
    path: str | os.PathLike[str],
    model: LanguageModel | None = None,
    device: torch.device | str = "cpu",
) -> C:
    """Read a cache that `save_values` wrote.

    Args:
        kind: the class of the cache.
        path: the file.
        model: that it comes from; may also be given later, as `cache.model`.
        device: where the values are put.

    Raises:
        FileNotFoundError, safetensors.SafetensorError: no such file, or no safetensors file.
        ValueError: a safetensors file that holds something else, or of another model.
    """
    about, tensors = _read(path, device)
    cache = kind({}, None)
    try:
        _require_types(about, tensors)
        cache.cache_dict = {name: tensors[name] for name in about["names"]}
        cache.axes = {str(n): tuple(map(str, axes)) for n, axes in about["axes"].items()}
        at: Any = lambda i: None if i is None else tensors[f"{_PLACES}{int(i)}"]  # noqa: E731
        cache.places = {str(n): Places(at(p), at(k)) for n, (p, k) in about["places"].items()}
        cache.has_batch_dim, cache.n_layers = bool(about["has_batch_dim"]), int(about["n_layers"])
        cache.pos_slice = _of_json(about["pos_slice"])
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise ValueError(f"{path} holds no whole cache: {one_line(repr(error))}") from error
    if model is not None:
        if unknown := [n for n in cache.axes if n.removesuffix("_grad") not in model.hook_dict]:
            raise ValueError(f"{path} holds {unknown[0]!r}, which this model does not have")
        cache.model = model
    return cache


def _require_types(about: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Refuse what `save_values` does not write: names, axes, places and flags of other kinds.

    Raises:
        LookupError, TypeError, ValueError: what is wrong, shortly.
    """
    names, axes, places = about["names"], about["axes"], about["places"]
    if not isinstance(names, list) or len(set(names)) < len(names) or {*axes} - {*names}:
        raise ValueError("names or axes")
    for name, its in axes.items():
        is_whole = isinstance(its, list) and all(isinstance(axis, str) for axis in its)
        if not is_whole or len(its) != tensors[name].ndim:
            raise ValueError(f"axes of {name}")
    n_places = sum(name.startswith(_PLACES) for name in tensors)
    indices = [i for pair in places.values() for i in pair if i is not None]
    if not all(type(i) is int and 0 <= i < n_places for i in indices):
        raise ValueError("places")
    if type(about["has_batch_dim"]) is not bool or type(about["n_layers"]) is not int:
        raise TypeError("has_batch_dim or n_layers")
    if about["n_layers"] < 0:
        raise ValueError("n_layers")
    read = about["pos_slice"]
    numbers = read if isinstance(read, list) else [read]
    if isinstance(read, dict):
        numbers = [number for number in read["slice"] if number is not None]
    if read is not None and read != "last" and not all(type(i) is int for i in numbers):
        raise ValueError("pos_slice")


def _read(
    path: str | os.PathLike[str], device: torch.device | str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what a file says of a cache, and its tensors."""
    from safetensors import safe_open

    require_safetensors(Path(path))
    with safe_open(path, "pt", device=str(device)) as file:
        try:
            about = parse_json((file.metadata() or {}).get("about", "null"), path)
            is_ours = isinstance(about, dict) and about.get("format") == _FORMAT
        except ValueError:
            is_ours = False
        if not is_ours:
            raise ValueError(f"{path} holds no cache: write one with cache.save(path)")
        return about, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def _as_json(pos_slice: PosSlice) -> Any:
    """Return a selection of positions as JSON holds it."""
    if pos_slice is None or isinstance(pos_slice, str):
        return pos_slice
    read = read_indices(pos_slice, "positions", tuple_is_slice=True)
    if isinstance(read, slice):
        return {"slice": [read.start, read.stop, read.step]}
    return read if isinstance(read, int) else read.tolist()


def _of_json(read: Any) -> PosSlice:
    return slice(*read["slice"]) if isinstance(read, dict) else read
