"""`Network`: embed -> blocks -> ln_final -> unembed, with a hook point on every value."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from copy import deepcopy
from typing import Any, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.root import HookedRootModule
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.network.allocator import keep_freed_memory
from hooked_hybrid.network.block import Block
from hooked_hybrid.network.block_state import BlockState
from hooked_hybrid.network.layers import Embed, RMSNorm, Unembed
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.weights.plain import exact_copy, is_quantized
from hooked_hybrid.network.weights.quantization import Quantization
from hooked_hybrid.shapes import Logits, Resid, Tokens

N = TypeVar("N", bound="Network")


class Network(HookedRootModule):
    """The layers of a hybrid language model, and the loop over them.

    `HookedHybrid` adds text, checked input, caches, generation and published checkpoints.

    Args:
        cfg: what the model is.
        device, dtype: of the parameters, which are drawn at random; on "meta" there are none.
    """

    placement: Any = None
    """The places of the model's parts, a `placement.Placement`; None if it is on one device."""
    quantization: Quantization | None = None
    """A record of how the weights are quantised; None for plain ones."""

    def __init__(
        self,
        cfg: HybridConfig,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        keep_freed_memory()
        self._cfg = cfg
        with torch.device("meta"):
            self.embed = Embed(cfg)
            self.hook_embed = HookPoint("batch pos d_model")
            self.blocks: Any = nn.ModuleList(Block(cfg, layer) for layer in cfg.layers)
            self.ln_final = RMSNorm(cfg.d_model, cfg.norm)
            self.unembed = Unembed(cfg)
        self.to(dtype)
        self.setup()
        if torch.device(device).type != "meta":
            self.to_empty(device=device)
            self.reset_parameters()

    @classmethod
    def meta(cls: type[N], cfg: HybridConfig, dtype: torch.dtype = torch.float32) -> N:
        """Return the model without any memory for its weights: shapes, names and counts.

        Examples:
            >>> large = HookedHybrid.meta(presets.griffin("RRA" * 8, d_model=2560))
            >>> sum(p.numel() for p in large.parameters())
            1917299200
        """
        return cls(cfg, device="meta", dtype=dtype)

    # --- the forward ----------------------------------------------------------------------------

    def run_embed(self, tokens: Tokens) -> Resid:
        """Return the residual stream that enters the first block."""
        return self.hook_embed(self.embed(tokens))

    def run_blocks(
        self, resid: Resid, states: Sequence[BlockState | None], layout: Layout, layers: range
    ) -> tuple[Resid, list[BlockState | None]]:
        """Return the residual stream after some blocks, and all states, with those blocks' updated.

        Args:
            resid: [batch pos d_model], entering the first of the blocks.
            states: of every block; None at the beginning of a sequence.
            layout: of these positions.
            layers: the blocks to run, in order.
        """
        after = list(states)
        for i in layers:
            if self.placement is None:
                resid, after[i] = self.blocks[i](resid, after[i], layout)
            else:
                resid, after[i] = self.placement.run_block(self, i, resid, after[i], layout)
        return resid, after

    def run_ln_final(self, resid: Resid, first: int) -> Float[Tensor, "batch kept d_model"]:
        """Return the final norm from position `first` on; its hooks receive every position."""
        if self.placement is not None:
            resid = resid.to(self.device)
        if self.ln_final.is_hooked:
            return self.ln_final(resid)[:, first:]
        return self.ln_final(resid[:, first:])

    def run_unembed(self, normalized: Resid, run: Run) -> Logits:
        """Return the logits of positions after the final norm; `run` is of these positions."""
        return self.unembed(normalized, self.embed.W_E, run)

    def running(self, layout: Layout) -> AbstractContextManager[None]:
        """Set `hook.run` for this layout, and restore the previous run afterwards."""
        return self.run_holder.holding(layout.run)

    # --- what there is --------------------------------------------------------------------------

    @property
    def cfg(self) -> HybridConfig:
        """The config, with the model's current device and dtype."""
        config, weight = self._cfg, self.embed.W_E
        if config.dtype is not weight.dtype or config.device != weight.device:
            self._cfg = config = config.on(weight.device, weight.dtype)
        return config

    @cfg.setter
    def cfg(self, cfg: HybridConfig) -> None:
        self._cfg = cfg

    @property
    def device(self) -> torch.device:
        """Device of the embedding."""
        return self.embed.W_E.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the embedding."""
        return self.embed.W_E.dtype

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding, before its scale."""
        return self.embed.W_E

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding after the final norm, `logits_scale` included."""
        weight = self.W_E if self.unembed.weight is None else self.unembed.weight
        return weight.T if self.unembed.scale == 1 else weight.T * self.unembed.scale

    @property
    def layer_devices(self) -> tuple[torch.device, ...]:
        """The device on which each block runs and keeps its state."""
        if self.placement is not None:
            return self.placement.layer_devices
        return (self.device,) * self._cfg.n_layers

    def reset_parameters(self) -> None:
        """Draw every parameter again.

        Examples:
            >>> random = HookedHybrid(model.cfg)
            >>> before = random.W_E.clone()
            >>> random.reset_parameters()
            >>> torch.equal(random.W_E, before)
            False
        """
        for module in self.modules():
            reset = getattr(module, "reset_parameters", None)
            if module is not self and callable(reset):
                reset()

    # --- copies -------------------------------------------------------------------------------

    def _apply(self, fn: Any, recurse: bool = True) -> Network:
        """Refuse to move or convert a placed model, or to convert quantised weights."""
        if self.placement is not None:
            raise RuntimeError(
                "this model is placed by a device_map, and is not moved or converted as one: load "
                "it with another device_map, device or dtype"
            )
        if self.quantization is not None and fn(self.W_E[:0]).dtype != self.dtype:
            raise RuntimeError(
                "this model is quantised, and is not converted to another dtype: load it with that "
                "dtype, or call quantized.dequantize_weights first"
            )
        return super()._apply(fn, recurse)

    def __deepcopy__(self, memo: dict[int, Any]) -> Network:
        """Return a copy that shares no memory; quantised weights keep their exact numbers."""
        memo |= {id(p): exact_copy(p) for p in self.parameters() if is_quantized(p)}
        memo[id(self)] = copy = type(self).__new__(type(self))
        copy.__dict__.update(deepcopy(self.__dict__, memo))
        return copy
