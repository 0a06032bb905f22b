"""`HookedHybrid`: a language model to load, run, hook, cache, generate with and save."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.generate import generate
from hooked_hybrid.model.pretrained import PretrainedModel
from hooked_hybrid.network.weights.plain import as_matrix


class LayerStack(NamedTuple):
    """Weights of several layers in one tensor, with the layers they come from.

    Examples:
        >>> layers, weight = model.W_Q
        >>> layers, weight.shape
        ((2, 5), torch.Size([2, 8, 128, 16]))
    """

    layers: tuple[int, ...]
    weight: Float[Tensor, "layer ..."]


class HookedHybrid(PretrainedModel):
    """A hybrid language model whose every intermediate value has a name and can be edited.

    `HookedHybrid(cfg)` draws random weights; `from_pretrained`, `from_hf` and `meta` do not.

    Args:
        cfg: what the model is.
        tokenizer: a Hugging Face tokenizer, or a folder with one; None for a model that accepts
            tokens only.
        device, dtype: of the parameters.

    Examples:
        >>> small = HookedHybrid(presets.griffin("RRA", n_heads=2))  # random weights
        >>> small(torch.tensor([[5, 6, 7]])).shape
        torch.Size([1, 3, 1024])
        >>> model = HookedHybrid.from_pretrained("tiny-griffin")
        >>> model.generate("eat a sandwich and sit in Dolores Park . eat a", 2, verbose=False)
        'eat a sandwich and sit in Dolores Park . eat a sandwich and'
    """

    generate = generate

    # --- what there is --------------------------------------------------------------------------

    def stack(self, name: str) -> LayerStack:
        """Return one weight of every layer that has it, stacked, with the indices of these layers.

        Args:
            name: below the block, such as `"attn.W_Q"`, `"mlp.W_in"` or `"mixer.a_param"`.

        Raises:
            LookupError: no layer has it, or its shape differs between layers.

        Examples:
            >>> layers, weight = model.stack("mixer.a_param")  # of the recurrences
            >>> layers, weight.shape
            ((0, 1, 3, 4), torch.Size([4, 128]))
        """
        found = {i: w for i, b in enumerate(self.blocks) if (w := _reach(b, name)) is not None}
        if len(shapes := {tuple(w.shape) for w in found.values()}) != 1:
            raise LookupError(
                f"no layer has {name!r}" if not shapes else f"{name!r} has shapes {sorted(shapes)}"
            )
        weights = list(found.values())
        return LayerStack(tuple(found), torch.stack([w.to(weights[0].device) for w in weights]))

    @property
    def W_Q(self) -> LayerStack:
        """[layer head d_model d_head] of the attention layers.

        Examples:
            >>> layers, weight = model.W_Q
            >>> layers, weight.shape
            ((2, 5), torch.Size([2, 8, 128, 16]))
        """
        return self.stack("attn.W_Q")

    @property
    def W_K(self) -> LayerStack:
        """[layer kv_head d_model d_head] of the attention layers."""
        return self.stack("attn.W_K")

    @property
    def W_V(self) -> LayerStack:
        """[layer kv_head d_model d_head] of the attention layers."""
        return self.stack("attn.W_V")

    @property
    def W_O(self) -> LayerStack:
        """[layer head d_head d_model] of the attention layers."""
        return self.stack("attn.W_O")

    def _wrap_cache(
        self,
        cache: dict[str, Tensor],
        has_batch_dim: bool,
        pos_slice: PosSlice = None,
        places: dict[str, Places] | None = None,
    ) -> ActivationCache:
        return ActivationCache(cache, self, has_batch_dim, pos_slice, places)


def _reach(block: nn.Module, path: str) -> Tensor | None:
    """Return the tensor below a block at a dotted path, or None."""
    found: Any = block
    for part in path.split("."):
        found = getattr(found, part, None)
    return as_matrix(found) if isinstance(found, Tensor | nn.ParameterList) else None
