"""`ActivationCache`: what a run left at its hook points, by full name or by shorthand."""

from __future__ import annotations

from collections.abc import ItemsView, Iterator, KeysView, Mapping, ValuesView
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hooked_hybrid.names import HookNameError, Shorthand, resolve
from hooked_hybrid.residual import ResidualStacks
from hooked_hybrid.slicing import PosSlice, slice_axis

if TYPE_CHECKING:
    from hooked_hybrid.model import HookedHybrid


class ActivationCache(ResidualStacks, Mapping[Any, Tensor]):
    """A read-only mapping from hook names to values, in the order they were computed.

    `cache["blocks.2.attn.hook_pattern"]`, `cache["pattern", 2]`, `cache["resid_post", -1]`,
    `cache["scale", 0, "ln1"]` and `cache["embed"]` all work; gradients are at name + "_grad".
    What it says about the residual stream and the logits is in `ResidualStacks`.

    Args:
        cache_dict: values by full name.
        model: the model they come from.
        has_batch_dim: whether the first axis of each value is the batch.
        pos_slice: the positions of the run that were kept; None means all.
    """

    def __init__(
        self,
        cache_dict: dict[str, Tensor],
        model: HookedHybrid,
        has_batch_dim: bool = True,
        pos_slice: PosSlice = None,
    ) -> None:
        self.cache_dict = cache_dict
        self.model = model
        self.has_batch_dim = has_batch_dim
        self.pos_slice = pos_slice

    @property
    def has_embed(self) -> bool:
        """Whether the embedding is in the cache."""
        return "hook_embed" in self.cache_dict

    def __getitem__(self, key: Shorthand) -> Tensor:
        """Return the value at a full name or shorthand.

        Raises:
            HookNameError: (a KeyError) nothing of this name was kept; the nearest names are listed.
        """
        if isinstance(key, str) and key in self.cache_dict:
            return self.cache_dict[key]
        return self.cache_dict[resolve(key, self.cache_dict.keys(), self.model.cfg.n_layers)]

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
        """Return a cache of some rows; an int drops the batch axis.

        Raises:
            ValueError: the batch axis is gone already.
        """
        if not self.has_batch_dim:
            raise ValueError("this cache has no batch axis any more")
        rows = {name: slice_axis(t, batch_slice, 0) for name, t in self.items()}
        has_batch_dim = not isinstance(batch_slice, int)
        return ActivationCache(rows, self.model, has_batch_dim, self.pos_slice)

    def require_first_positions(self, purpose: str) -> None:
        """Refuse a cache whose values are not those of the run's first positions, one by one.

        Raises:
            ValueError: it was made with another `pos_slice`, so that an index means another place.
        """
        kept = self.pos_slice
        if isinstance(kept, slice):
            kept = None if kept.start in (None, 0) and kept.step in (None, 1) else kept
        if kept is not None:
            raise ValueError(
                f"{purpose} needs values from the run's first position on, and this cache was made "
                f"with pos_slice={self.pos_slice}: make it without, or with slice(n)"
            )

    def to(self, device: torch.device | str, move_model: bool = False) -> ActivationCache:
        """Move every value to a device, in place, and return the cache."""
        self.cache_dict = {name: t.to(device) for name, t in self.items()}
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn autograd on or off everywhere, as TransformerLens's method of this name does."""
        torch.set_grad_enabled(mode)
