"""A recurrent layer as a linear map of its inputs, with decays and gates fixed by a run.

For each channel, with as many states n as the kind has (RG-LRU 1, Mamba `d_state`):

    h_t = decay_t h_{t-1} + write_t      write_t = gain_t x_t
    y_t = read_t . h_t + skip x_t

The values of these terms in a run are defined by the `forms` of each kind.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.analysis.forms import Terms, form_of
from hooked_hybrid.analysis.forms.base import Index, PerState
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layout import Layout, lay_out
from hooked_hybrid.network.state import HybridState

AGREES, AGREES_ROUNDED = 1e-3, 3e-2
"""Largest difference between a recomputed recurrence and its cached output, relative to the
largest value: in fp32, and in narrower dtypes."""


class Recurrence:
    """One recurrent layer in a cache.

    Args:
        cache: of a run, with the layer's hook points (by default `run_with_cache` keeps them).
        layer: index of the block; a negative one counts from the last.
        attention_mask, segment_ids, state: the run's arguments; the cache has the padding.

    Raises:
        ValueError: the layer has no recurrence; or a mask or state that does not fit the cache.
        NotSupported: its kind has no linear form.
        HookNameError: the cache lacks a value.
    """

    def __init__(
        self,
        cache: ActivationCache,
        layer: int,
        attention_mask: Int[Tensor, "batch pos"] | None = None,
        segment_ids: Int[Tensor, "batch pos"] | None = None,
        state: HybridState | None = None,
    ) -> None:
        cache.require_first_positions("following a recurrence")
        cfg = cache.model.cfg
        recurrent = cfg.recurrent_layers
        index = layer + cfg.n_layers if layer < 0 else layer
        if index not in recurrent:
            raise ValueError(f"layer {layer} has no recurrence; those that have: {recurrent}")
        self.cache, self.layer = cache, index
        self.mixer: Any = cache.model.blocks[index].recurrence
        self.cfg: Any = self.mixer.cfg
        self.form = form_of(self.cfg)
        y = self["ssm_y"]
        if state is not None and state.batch_size != y.shape[0]:
            raise ValueError(f"the cache has {y.shape[0]} rows, the state {state.batch_size}")
        if attention_mask is None and segment_ids is None and cache.has_padding:
            attention_mask = (cache.pos_of(self._full("ssm_y")) >= 0).long()
        self.layout: Layout = lay_out(y, state, attention_mask, segment_ids, allow_empty_rows=True)
        self.state: Any = None if state is None else state.blocks[index]

    def __getitem__(self, name: str) -> Tensor:
        """Return a cached value of the layer, [batch pos ...]."""
        try:
            value = self.cache[self._full(name)]
        except HookNameError as error:
            raise HookNameError(
                f"the cache has no {self._full(name)!r}, which this needs: cache every point of "
                f"the mixer (names_filter=lambda n: '.{self.mixer.path}.' in n)"
            ) from error
        return value if self.cache.has_batch_dim else value[None]

    def __contains__(self, name: str) -> bool:
        return self._full(name) in self.cache

    @property
    def n_channels(self) -> int:
        """Channels of the recurrence."""
        return self["ssm_y"].shape[-1]

    @property
    def n_states(self) -> int:
        """States of each channel."""
        return self.form.n_states(self.cfg)

    def terms(self, channels: Index) -> Terms:
        """Return the terms of these channels."""
        return self.form.terms(self, channels)

    def log_decay(self, channels: Index) -> PerState:
        """Return the log decays of these channels in fp64, without the resets of documents."""
        return self.form.log_decay(self, channels)

    def h0(self, channels: Index) -> Float[Tensor, "batch channel n"]:
        """Return the state that the run began from."""
        y = self["ssm_y"]
        if self.state is None:
            return at_least_fp32(y.new_zeros(y.shape[0], len(channels), self.n_states))
        ssm = self.state.ssm.to(y.device)[:, channels]
        return ssm if ssm.ndim == 3 else ssm[..., None]

    def _is_packed(self) -> bool:
        """Whether a position of the cached run is the first of a document after another."""
        pos = self.cache.pos_of(self._full("ssm_y"))
        return pos is not None and bool(((pos[:, 1:] == 0) & (pos[:, :-1] >= 0)).any())

    def _full(self, name: str) -> str:
        return f"blocks.{self.layer}.{self.mixer.path}.hook_{name}"

    def check(self, channels: Index, terms: Terms) -> None:
        """Compare the recomputed recurrence with its cached output.

        Raises:
            ValueError: they differ, so the cache does not match the arguments.
        """
        found = terms.outputs(terms.write, terms.x, terms.h0)
        cached = self["ssm_y"][..., channels]
        rounds = cached.dtype not in (torch.float32, torch.float64)
        is_real = self.layout.is_real[..., None]
        off = float(((found - cached) * is_real).abs().max())
        largest = float((cached * is_real).abs().max())
        if not off <= (AGREES_ROUNDED if rounds else AGREES) * largest:
            raise ValueError(
                f"layer {self.layer}: the cached decays and writes give an output that is "
                f"{off:.2g} away from the cached hook_ssm_y (at most {largest:.2g}). Give "
                "attention_mask, segment_ids and state as the run had them; if the run edited "
                "decays or writes of Mamba, cache hook_ssm_decay and hook_ssm_write too; if it "
                "edited hook_ssm_state or hook_ssm_y, or the cache holds some positions only, no "
                "matrix gives that output (check=False leaves this comparison out)"
            )
        if self.layout.doc is None and self._is_packed():
            raise ValueError(
                f"layer {self.layer}: the rows of the cached run hold several documents: give "
                "segment_ids as the run had them"
            )
