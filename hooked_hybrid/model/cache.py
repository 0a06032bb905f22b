"""`ActivationCache`: what a run left at its hook points, by full name or by shorthand."""

from __future__ import annotations

import copy
import os
from typing import TYPE_CHECKING, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.slicing import PosSlice, indices_on, is_one
from hooked_hybrid.model import cache_files, cache_positions
from hooked_hybrid.model.cached_values import CachedValues
from hooked_hybrid.model.residual import norms, reading, stacks

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

C = TypeVar("C", bound="ActivationCache")


class ActivationCache(CachedValues):
    """A read-only mapping from hook names to values, in the order they were computed.

    `cache["blocks.2.attn.hook_pattern"]`, `cache["pattern", 2]`, `cache["resid_post", -1]`,
    `cache["scale", 0, "ln1"]` and `cache["embed"]` all work; gradients are at name + "_grad". A
    pattern, `cache["blocks.*.attn.hook_pattern"]`, gives a cache of the values that fit it.
    Each value has memory of its own. What a cache says about positions and padding is in
    `cache_positions`, about the residual stream in `residual.stacks`, about norms and logits in
    `residual.norms`: the functions there are methods here, whose first argument is the cache.

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

    Examples:
        >>> logits, cache = model.run_with_cache(tokens)
        >>> cache["pattern", 2].shape  # attention of layer 2
        torch.Size([1, 8, 16, 16])
        >>> cache["ssm_state", 0].shape  # the state of the recurrence of layer 0
        torch.Size([1, 16, 128])
    """

    positions = cache_positions.positions
    last_token = cache_positions.last_token
    mean_over_pos = cache_positions.mean_over_pos
    unpadded = cache_positions.unpadded
    value_at = cache_positions.value_at
    require_first_positions = cache_positions.require_first_positions

    accumulated_resid = stacks.accumulated_resid
    decompose_resid = stacks.decompose_resid
    compute_head_results = stacks.compute_head_results
    stack_head_results = stacks.stack_head_results
    stack_expert_results = stacks.stack_expert_results
    get_neuron_results = stacks.get_neuron_results
    stack_neuron_results = stacks.stack_neuron_results
    stack_activation = stacks.stack_activation
    get_full_resid_decomposition = stacks.get_full_resid_decomposition
    apply_ln_to_stack = norms.apply_ln_to_stack
    logit_attrs = norms.logit_attrs
    require_parts = reading.require_parts
    read_parts = reading.read_parts

    @property
    def attention_mask(self) -> Int[Tensor, "*batch pos"]:
        """1 at tokens and 0 at padding, for the positions that values hold.

        In a cache of a generation also 0 where a row had ended. (Fewer logits may have been
        computed than positions: `positions(name)` is that of one value.)

        Raises:
            ValueError: no value has positions, or the cache was made by hand without a mask.

        Examples:
            >>> cache.attention_mask.shape, cache.has_padding
            (torch.Size([1, 16]), False)
        """
        return (self.positions() >= 0).long()

    @property
    def has_padding(self) -> bool:
        """Whether any entry of any value is at padding, as far as known."""
        return cache_positions.has_padding(self)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, whole or not at all; `load` reads it.

        Any reader of safetensors finds the values under their full names; under names that begin
        with "places." are the positions of their entries.

        Raises:
            OSError: the file cannot be written.

        Examples:
            >>> from hooked_hybrid import ActivationCache
            >>> cache.save("cache.safetensors")
            >>> again = ActivationCache.load("cache.safetensors", model)
            >>> torch.equal(again["pattern", 2], cache["pattern", 2])
            True
        """
        cache_files.save_values(self, path)

    @classmethod
    def load(
        cls: type[C],
        path: str | os.PathLike[str],
        model: LanguageModel | None = None,
        device: torch.device | str = "cpu",
    ) -> C:
        """Read a cache that `save` wrote.

        Args:
            path: the file.
            model: that it comes from; may also be given later, as `cache.model`.
            device: where the values are put.

        Raises:
            FileNotFoundError, safetensors.SafetensorError: no such file, or no safetensors file.
            ValueError: a safetensors file that holds something else, or of another model.

        Examples:
            >>> from hooked_hybrid import ActivationCache
            >>> cache.save("a.safetensors")
            >>> len(ActivationCache.load("a.safetensors")) == len(cache)
            True
        """
        return cache_files.load_values(cls, path, model, device)

    def remove_batch_dim(self: C) -> C:
        """Drop the batch axis, in place, and return the cache.

        Raises:
            ValueError: there are several rows.

        Examples:
            >>> _, cache = model.run_with_cache(tokens)
            >>> cache.remove_batch_dim()["pattern", 2].shape
            torch.Size([8, 16, 16])
        """
        if self.has_batch_dim:
            rows = {name: t.shape[0] for name, t in self.items() if t.shape[0] != 1}
            if rows:
                name, n = next(iter(rows.items()))
                raise ValueError(f"{name!r} has {n} rows: a batch axis of 1 can be removed")
            self.cache_dict = {name: t[0] for name, t in self.items()}
            self.has_batch_dim = False
        return self

    def apply_slice_to_batch_dim(self: C, batch_slice: PosSlice) -> C:
        """Return a cache of copies of some rows; an int drops the batch axis.

        Args:
            batch_slice: an int, a slice, a tuple `(start, stop)`, indices, or a mask of the rows.

        Raises:
            IndexError, TypeError: as `slicing.slice_axis`.
            ValueError: the batch axis is gone already.

        Examples:
            >>> _, cache = model.run_with_cache(torch.cat([tokens, tokens]))
            >>> cache.apply_slice_to_batch_dim(1)["pattern", 2].shape
            torch.Size([8, 16, 16])
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

    def to(self: C, device: torch.device | str, move_model: bool = False) -> C:
        """Move every value to a device, in place, and return the cache.

        Examples:
            >>> cache.to("cpu")["pattern", 2].device
            device(type='cpu')
        """
        self.cache_dict = {name: t.to(device) for name, t in self.items()}
        if move_model:
            self.model.to(device)
        return self

    def toggle_autodiff(self, mode: bool = False) -> None:
        """Turn autograd on or off everywhere, as TransformerLens's method of this name does.

        Examples:
            >>> cache.toggle_autodiff(mode=False)
            >>> torch.is_grad_enabled()
            False
            >>> cache.toggle_autodiff(mode=True)
        """
        torch.set_grad_enabled(mode)
