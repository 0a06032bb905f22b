"""The values of a cache, and how they are looked up: by name, and by where their entries stood."""

from __future__ import annotations

import copy
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any, TypeVar, overload

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.names import (
    HookNameError,
    NameFilter,
    Shorthand,
    is_pattern,
    matching,
    not_kept,
    resolve,
)
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.network.layout import lay_out

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

C = TypeVar("C", bound="CachedValues")


class CachedValues(Mapping[Any, Tensor]):
    """A read-only mapping from hook names to values, in the order they were computed.

    Functions take it for what they compute from a cache: those of `cache_positions` and of
    `residual`, which `ActivationCache` has as methods. Its arguments are explained there.

    Attributes:
        cache_dict: values by full name.
        axes: names of the axes of each value at a hook point of the model.
        places: positions of each value's entries, as far as a run told.
        has_batch_dim: whether the first axis of each value is the batch.
        pos_slice: the positions of the run that were kept; None means all.
        n_layers: of the model; 0 without one.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: LanguageModel | None,
        has_batch_dim: bool = True,
        pos_slice: PosSlice = None,
        places: dict[str, Places] | None = None,
        *,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
    ) -> None:
        self.cache_dict = cache_dict
        self._model = model
        self.has_batch_dim = has_batch_dim
        self.pos_slice = pos_slice
        self.n_layers = 0 if model is None else model.cfg.n_layers
        points = {} if model is None else model.hook_dict
        known = [name for name in cache_dict if name.removesuffix("_grad") in points]
        self.axes = {name: points[name.removesuffix("_grad")].axes for name in known}
        self.places = dict(places or {})
        if attention_mask is not None:
            self._place_by_mask(attention_mask)

    @property
    def model(self) -> LanguageModel:
        """The model the values come from.

        Raises:
            ValueError: the cache was unpickled or loaded, and was not given one.
        """
        if self._model is None:
            raise ValueError(
                "this cache came without its model, which this needs: set cache.model = model"
            )
        return self._model

    @model.setter
    def model(self, model: LanguageModel) -> None:
        self._model, self.n_layers = model, model.cfg.n_layers

    @property
    def has_embed(self) -> bool:
        """Whether the embedding is in the cache."""
        return "hook_embed" in self.cache_dict

    # --- by name ----------------------------------------------------------------------------------

    def full_name(self, key: Shorthand) -> str:
        """Return the full name of a value that was kept.

        Args:
            key: a full name, a shorthand, or a pattern that fits one name.

        Raises:
            HookNameError: (a KeyError) nothing of this name was kept: a point of the model that was
                not, with the way to keep it, or the nearest names; or several values fit a pattern.

        Examples:
            >>> cache.full_name(("pattern", -1))
            'blocks.5.attn.hook_pattern'
        """
        if isinstance(key, str) and key in self.cache_dict:
            return key
        try:
            return resolve(key, self.cache_dict.keys(), self.n_layers)
        except HookNameError:
            if is_pattern(key):
                self.names_of(key)  # where nothing that fits was kept, it says how to keep it
                raise
            name = resolve(key, self._could_be_kept().keys(), self.n_layers)
            raise self._not_kept(name) from None

    def names_of(self, names: NameFilter) -> list[str]:
        """Return the full names of the values that a filter selects, in the order of the cache.

        Args:
            names: in any spelling, one or several, or a predicate on full names. A pattern may fit
                gradients too.

        Raises:
            HookNameError: as `full_name`.

        Examples:
            >>> cache.names_of("blocks.*.attn.hook_pattern")
            ['blocks.2.attn.hook_pattern', 'blocks.5.attn.hook_pattern']
        """
        try:
            return matching(names, self.cache_dict.keys(), self.n_layers)
        except HookNameError:
            could = matching(names, self._could_be_kept().keys(), self.n_layers)
            lacking = [name for name in could if name not in self.cache_dict]
            raise self._not_kept(lacking[0]) from None

    def _could_be_kept(self) -> dict[str, HookPoint]:
        """Return the points whose values, and at + "_grad" whose gradients, a cache may hold."""
        points = {} if self._model is None else self._model.hook_dict
        return {**points, **{f"{name}_grad": point for name, point in points.items()}}

    def _not_kept(self, name: str) -> HookNameError:
        return HookNameError(not_kept(name, self._could_be_kept()[name].is_large))

    def select(self: C, names: NameFilter) -> C:
        """Return a cache of some of the values, which are not copied.

        Args:
            names: as in `names_of`.

        Raises:
            HookNameError: as `full_name`.

        Examples:
            >>> patterns = cache.select("blocks.*.attn.hook_pattern")
            >>> len(patterns), patterns["pattern", 5].shape
            (2, torch.Size([1, 8, 16, 16]))
        """
        some, kept = copy.copy(self), self.names_of(names)
        some._model = self._model
        some.cache_dict = {name: self.cache_dict[name] for name in kept}
        some.axes = {name: self.axes[name] for name in kept if name in self.axes}
        some.places = {name: self.places[name] for name in kept if name in self.places}
        return some

    @overload
    def __getitem__(self, key: tuple[str | int | None, ...]) -> Tensor: ...
    @overload
    def __getitem__(self, key: str) -> Any: ...
    def __getitem__(self, key: Shorthand) -> Any:
        """Return the value at a full name or shorthand; a pattern gives a cache of all that fit it.

        Raises:
            HookNameError: as `full_name`.
        """
        if is_pattern(key):
            return self.select(key)
        return self.cache_dict[self.full_name(key)]

    def __contains__(self, key: object) -> bool:
        parts = key if isinstance(key, tuple) else (key,)
        if not parts or not isinstance(parts[0], str):
            return False
        try:
            _ = self.names_of(key) if is_pattern(key) else self.full_name(key)  # type: ignore[arg-type]
        except HookNameError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"{type(self).__name__} with {len(self)} values, {self.n_bytes / 1e6:.1f} MB"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the model."""
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self: C, memo: dict[int, Any]) -> C:
        """Return a cache of copies, of the same model."""
        other = type(self).__new__(type(self))
        other.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        other._model = self._model
        return other

    def keys(self) -> KeysView[str]:
        """Return the full names.

        Examples:
            >>> "blocks.2.attn.hook_pattern" in cache.keys()
            True
        """
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """Return the values.

        Examples:
            >>> all(isinstance(value, torch.Tensor) for value in cache.values())
            True
        """
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Return full names and values.

        Examples:
            >>> sum(name.endswith("hook_pattern") for name, value in cache.items())
            2
        """
        return self.cache_dict.items()

    @property
    def n_bytes(self) -> int:
        """Bytes of the storage behind the values, each counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.values()
        }
        return sum(storages.values())

    # --- by position ------------------------------------------------------------------------------

    def dim_of_pos(self, full: str) -> int | None:
        """Return which axis of a value, with its batch axis, is that of positions, or None."""
        axes = self.axes.get(full, ())
        return next((axes.index(a) for a in ("pos", "query") if a in axes), None)

    def batched(self, full: str) -> tuple[Tensor, int]:
        """Return a value with its batch axis, and the index of its axis of positions.

        Raises:
            ValueError: it has none.
        """
        dim = self.dim_of_pos(full)
        if dim is None:
            raise ValueError(f"{full!r} has no positions")
        value = self.cache_dict[full]
        return (value if self.has_batch_dim else value[None]), dim

    def unbatched(self, value: Tensor) -> Tensor:
        """Return a value as this cache holds it, of one with a batch axis."""
        return value if self.has_batch_dim else value[0]

    def pos_of(self, full: str) -> Int[Tensor, "batch kept"]:
        """Return the places of a value; those of a cache made by hand count from 0.

        Raises:
            ValueError: it has no axis of positions.
        """
        if full in self.places:
            return self.places[full].pos
        value, dim = self.batched(full)
        return torch.arange(value.shape[dim]).expand(value.shape[0], -1)

    def key_pos_of(self, full: str) -> Int[Tensor, "batch key"] | None:
        """Return the positions of a value's keys; None where it has none."""
        if full in self.places:
            return self.places[full].key_pos
        return self.pos_of(full) if "key" in self.axes.get(full, ()) else None

    def keep(self, full: str, value: Tensor, like: str) -> None:
        """Keep a value at a hook point of the model, where the entries of another value stood."""
        self.cache_dict[full] = value
        self.axes[full] = self.model.hook_dict[full].axes
        if like in self.places:
            self.places[full] = self.places[like]

    def _place_by_mask(self, attention_mask: Int[Tensor, "batch pos"]) -> None:
        """Take a mask to say where the entries of every value stood."""
        if self.places:
            raise ValueError("give places or attention_mask, not both")
        pos = lay_out(attention_mask, None, attention_mask, None).pos
        for name in self.cache_dict:
            if self.dim_of_pos(name) is not None:
                value, dim = self.batched(name)
                if (value.shape[0], value.shape[dim]) != pos.shape:
                    raise ValueError(
                        f"attention_mask has shape {tuple(pos.shape)}, and {name!r} has "
                        f"{value.shape[0]} rows of {value.shape[dim]} positions"
                    )
                self.places[name] = Places(pos, pos if "key" in self.axes[name] else None)
