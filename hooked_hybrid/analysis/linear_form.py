"""A recurrent layer as a linear map of its inputs, with decays and gates as a run left them.

For each channel, with as many states n as the kind has (RG-LRU 1, Mamba `d_state`):

    h_t = decay_t h_{t-1} + write_t      write_t = gain_t x_t
    y_t = read_t . h_t + skip x_t

==========  ====================  ==========================================  ==========  ======
kind        x                     gain                                        read        skip
==========  ====================  ==========================================  ==========  ======
RG-LRU      `hook_conv`           input gate times sqrt(1 - decay^2), at the  1           0
                                  start of a document the input gate alone
Mamba       `hook_ssm_input`      dt B                                        C           D
==========  ====================  ==========================================  ==========  ======
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.config import MambaConfig, RGLRUConfig
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.network.layers import at_least_fp32
from hooked_hybrid.network.layout import Layout, lay_out
from hooked_hybrid.network.mixers.mamba import forget
from hooked_hybrid.network.scans.scan import scan
from hooked_hybrid.network.state import HybridState, RecurrentState

PerChannel = Float[Tensor, "batch pos channel"]
PerState = Float[Tensor, "batch pos channel n"]
Index = Int[Tensor, " channel"]
AGREES, AGREES_ROUNDED = 1e-3, 3e-2
"""How far, relative to the largest value, a recurrence that is read as it ran is from its cached
output: in fp32, and in dtypes that round it."""


class Terms(NamedTuple):
    """What the module's equations name, for some channels, in fp32 or wider.

    `write` is as used, also where a hook changed it, and so may differ from `gain` times `x`.
    """

    x: PerChannel
    decay: PerState
    gain: PerState
    write: PerState
    read: Float[Tensor, "batch pos #channel n"]
    skip: Float[Tensor, " channel"]
    h0: Float[Tensor, "batch channel n"]

    def outputs(self, write: PerState, x: PerChannel, h0: Tensor) -> PerChannel:
        """Return y for some writes, inputs and first state."""
        states = scan(self.decay, write, h0)
        return (states * self.read).sum(-1) + self.skip * x


class Recurrence:
    """One recurrent layer in a cache.

    Args:
        cache: of a run that kept what the layer computes (the default of `run_with_cache` does).
        layer: index of the block; a negative one counts from the last.
        attention_mask, segment_ids, state: as that run was given them; the cache holds its padding.

    Raises:
        ValueError: the layer has no recurrence; or a mask or state that does not fit the cache.
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
        self.cfg: RGLRUConfig | MambaConfig = cfg.layers[index].mixer  # type: ignore[assignment]
        self.mixer: Any = cache.model.blocks[index].any_mixer
        y = self["ssm_y"]
        if state is not None and state.batch_size != y.shape[0]:
            raise ValueError(f"the cache has {y.shape[0]} rows, the state {state.batch_size}")
        if attention_mask is None and segment_ids is None and cache.has_padding:
            attention_mask = (cache._pos_of(f"blocks.{index}.mixer.hook_ssm_y") >= 0).long()
        self.layout: Layout = lay_out(y, state, attention_mask, segment_ids, allow_empty_rows=True)
        self.state: RecurrentState | None = None
        if state is not None:
            block = state.blocks[index]
            assert isinstance(block, RecurrentState)
            self.state = block
        self._terms = TERMS[type(self.cfg)]
        self._log_decay = LOG_DECAYS[type(self.cfg)]

    def __getitem__(self, name: str) -> Tensor:
        """Return a cached value of the layer, [batch pos ...]."""
        try:
            value = self.cache[name, self.layer]
        except HookNameError as error:
            raise HookNameError(
                f"the cache has no 'blocks.{self.layer}.mixer.hook_{name}', which this needs: "
                "cache every point of the mixer (names_filter=lambda n: '.mixer.' in n)"
            ) from error
        return value if self.cache.has_batch_dim else value[None]

    def __contains__(self, name: str) -> bool:
        return (name, self.layer) in self.cache

    @property
    def n_channels(self) -> int:
        """Channels of the recurrence."""
        return self["ssm_y"].shape[-1]

    @property
    def n_states(self) -> int:
        """States of each channel."""
        return getattr(self.cfg, "d_state", 1)

    def terms(self, channels: Index) -> Terms:
        """Return what these channels computed with."""
        return self._terms(self, channels)

    def log_decay(self, channels: Index) -> PerState:
        """Return the log decays of these channels in fp64, without the resets of documents."""
        return self._log_decay(self, channels)

    def h0(self, channels: Index) -> Float[Tensor, "batch channel n"]:
        """Return the state that the run began from."""
        y = self["ssm_y"]
        if self.state is None:
            return at_least_fp32(y.new_zeros(y.shape[0], len(channels), self.n_states))
        ssm = self.state.ssm.to(y.device)[:, channels]
        return ssm if ssm.ndim == 3 else ssm[..., None]

    def check(self, channels: Index, terms: Terms) -> None:
        """Compare the recurrence, run again, with what the cache says it gave.

        Raises:
            ValueError: they differ, so that the cache was read as something that it is not.
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


def _rglru_terms(r: Recurrence, channels: Index) -> Terms:
    """Return the RG-LRU's terms, in the order and dtypes of its forward."""
    layout = r.layout
    log_a = layout.zero_padding(r["log_decay"][..., channels])
    scale = torch.sqrt(1 - torch.exp(log_a + log_a))
    starts, padding = layout.is_start[..., None], ~layout.is_real[..., None]
    scale = scale.masked_fill(starts, 1).masked_fill(padding, 0)
    decay = torch.exp(log_a).masked_fill(starts, 0)
    gain = r["input_gate"][..., channels] * scale
    one = at_least_fp32(gain.new_ones(*layout.pos.shape, 1, 1))
    u, decay, gain, write = (
        at_least_fp32(t)
        for t in (r["conv"][..., channels], decay, gain, r["ssm_write"][..., channels])
    )
    skip = u.new_zeros(len(channels))
    return Terms(u, decay[..., None], gain[..., None], write[..., None], one, skip, r.h0(channels))


def _mamba_terms(r: Recurrence, channels: Index) -> Terms:
    """Return Mamba's terms; decays and writes are the cached ones where they were kept."""
    x, dt = (at_least_fp32(r[name][..., channels]) for name in ("ssm_input", "ssm_dt"))
    B, C = (at_least_fp32(r[name]) for name in ("ssm_B", "ssm_C"))
    A, skip = r.mixer.A.to(x.device)[channels], r.mixer.D.to(x.device)[channels]
    if "ssm_decay" in r:
        decay = r["ssm_decay"][:, :, channels]
    else:
        decay = forget(torch.exp(dt[..., None] * A), r.layout)
    gain = dt[..., None] * B[:, :, None]
    write = r["ssm_write"][:, :, channels] if "ssm_write" in r else gain * x[..., None]
    return Terms(x, decay, gain, write, C[:, :, None], at_least_fp32(skip), r.h0(channels))


def _rglru_log_decay(r: Recurrence, channels: Index) -> PerState:
    return r["log_decay"][..., channels, None].double()


def _mamba_log_decay(r: Recurrence, channels: Index) -> PerState:
    if "ssm_decay" in r:
        return r["ssm_decay"][:, :, channels].double().log()
    dt = r["ssm_dt"][..., channels, None].double()
    return dt * r.mixer.A.to(dt.device)[channels].double()


TERMS: dict[type, Callable[[Recurrence, Index], Terms]] = {
    RGLRUConfig: _rglru_terms,
    MambaConfig: _mamba_terms,
}
LOG_DECAYS: dict[type, Callable[[Recurrence, Index], PerState]] = {
    RGLRUConfig: _rglru_log_decay,
    MambaConfig: _mamba_log_decay,
}
