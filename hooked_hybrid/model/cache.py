"""`ActivationCache`: what a run left at its hook points, by full name or by shorthand."""

from __future__ import annotations

import copy
from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.names import HookNameError, Shorthand, not_kept, resolve
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.slicing import PosSlice, indices_on, is_one
from hooked_hybrid.model.cache_positions import CachePositions
from hooked_hybrid.model.residual.stacks import ResidualStacks

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel


class ActivationCache(CachePositions, ResidualStacks, Mapping[Any, Tensor]):
    """A read-only mapping from hook names to values, in the order they were computed.

    `cache["blocks.2.attn.hook_pattern"]`, `cache["pattern", 2]`, `cache["resid_post", -1]`,
    `cache["scale", 0, "ln1"]` and `cache["embed"]` all work; gradients are at name + "_grad".
    Each value has memory of its own. What a cache says about positions and padding is in
    `CachePositions`, about the residual stream and the logits in `ResidualStacks`.

    A copy (`copy.deepcopy`) has the same model; pickled, or saved with `save`, a cache is without
    it, and is given one by `cache.model = model`.

    Args:
        cache_dict: values by full name.
        model: the model they come from.
        has_batch_dim: whether the first axis of each value is the batch.
        pos_slice: the positions of the run that were kept; None means all.
        places: where the entries of each value stood, as a run tells; without, they are taken to
            be the tokens of a whole run from position 0 on.
        attention_mask: instead of `places`: 1 at tokens and 0 at padding [batch pos].

    Raises:
        ValueError: `attention_mask` with `places`, or one that is not a mask.
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

    def full_name(self, key: Shorthand) -> str:
        """Return the full name of a value that was kept.

        Raises:
            HookNameError: (a KeyError) nothing of this name was kept: a point of the model that was
                not, with the way to keep it, or the nearest names.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return key
        try:
            return resolve(key, self.cache_dict.keys(), self.n_layers)
        except HookNameError:
            points = {} if self._model is None else self._model.hook_dict
            known = {**points, **{f"{name}_grad": point for name, point in points.items()}}
            name = resolve(key, known.keys(), self.n_layers)
            raise HookNameError(not_kept(name, known[name].is_large)) from None

    def __getitem__(self, key: Shorthand) -> Tensor:
        """Return the value at a full name or shorthand.

        Raises:
            HookNameError: as `full_name`.
        """
        return self.cache_dict[self.full_name(key)]

    def __contains__(self, key: object) -> bool:
        parts = key if isinstance(key, tuple) else (key,)
        if not parts or not isinstance(parts[0], str):
            return False
        try:
            self[key]  # type: ignore[index]
        except HookNameError:
            return False
        return True

    def __iter__(self) -> Iterator[str]:
        return iter(self.cache_dict)

    def __len__(self) -> int:
        return len(self.cache_dict)

    def __repr__(self) -> str:
        return f"ActivationCache with {len(self)} values, {self.n_bytes / 1e6:.1f} MB"

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled: everything but the model."""
        return {**self.__dict__, "_model": None}

    def __deepcopy__(self, memo: dict[int, Any]) -> ActivationCache:
        """Return a cache of copies, of the same model."""
        other = type(self).__new__(type(self))
        other.__dict__ = copy.deepcopy(self.__getstate__(), memo)
        other._model = self._model
        return other

    def keys(self) -> KeysView[str]:
        """Return the full names."""
        return self.cache_dict.keys()

    def values(self) -> ValuesView[Tensor]:
        """Return the values."""
        return self.cache_dict.values()

    def items(self) -> ItemsView[str, Tensor]:
        """Return full names and values."""
        return self.cache_dict.items()

    @property
    def n_bytes(self) -> int:
        """Bytes of the storage behind the values, each counted once."""
        storages = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in self.values()
        }
        return sum(storages.values())

    def remove_batch_dim(self) -> ActivationCache:
        """Drop the batch axis, in place, and return the cache.

        Raises:
            ValueError: there are several rows.
        """
        if self.has_batch_dim:
            rows = {name: t.shape[0] for name, t in self.items() if t.shape[0] != 1}
            if rows:
                name, n = next(iter(rows.items()))
                raise ValueError(f"{name!r} has {n} rows: a batch axis of 1 can be removed")
            self.cache_dict = {name: t[0] for name, t in self.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self, batch_slice: PosSlice) -> ActivationCache:
        """Return a cache of copies of some rows; an int drops the batch axis.

        Args:
            batch_slice: an int, a slice, a tuple `(start, stop)`, indices, or a mask of the rows.

        Raises:
            IndexError, TypeError: as `slicing.slice_axis`.
            ValueError: the batch axis is gone already.
        """
        if not self.has_batch_dim:
            raise ValueError("this cache has no batch axis any more")
        some = copy.copy(self)
        some.cache_dict, some.places = {}, {}
        some._model = self._model
        for name, t in self.items():
            index = indices_on(batch_slice, t.shape[0], "rows", tuple_is_slice=True)
            some.cache_dict[name] = t.index_select(0, index.to(t.device))
            if name in self.places:
                some.places[name] = self.places[name].of_rows(index)
        return some.remove_batch_dim() if is_one(batch_slice) else some

    def to(self, device: torch.device | str, move_model: bool = False) -> ActivationCache:
        """Move every value to a device, in place, and return the cache."""
        self.cache_dict = {name: t.to(device) for name, t in self.items()}
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn autograd on or off everywhere, as TransformerLens's method of this name does."""
        torch.set_grad_enabled(mode)
