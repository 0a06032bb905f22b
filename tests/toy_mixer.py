"""A mixer that the library does not know: an exponential moving average, with a decay per head.

u   = x W_in
h_t = a h_{t-1} + (1 - a) u_t      a = sigmoid(decay) of the head; fp32
out = h W_out
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_hybrid.analysis.forms import DecayRange, LinearForm, Ran, Terms, register_form
from hooked_hybrid.analysis.forms.base import Index, PerChannel, PerState
from hooked_hybrid.config import MixerConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.block_state import BlockState
from hooked_hybrid.network.costs import Flops, Piece
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers import Mixer, register_mixer
from hooked_hybrid.network.mixers.base import ScanTerms
from hooked_hybrid.network.scans.scan import hooked_scan
from hooked_hybrid.network.written import Split, Way
from hooked_hybrid.shapes import Resid


@dataclass(frozen=True)
class EmaConfig(MixerConfig):
    """`n_heads` averages of `d_head` channels."""

    n_heads: int
    d_head: int

    @property
    def d_inner(self) -> int:
        """Channels of all heads."""
        return self.n_heads * self.d_head


@dataclass(frozen=True, eq=False)
class EmaState(BlockState):
    """The averages."""

    ssm: Float[Tensor, "batch channel"]


class Ema(Mixer[EmaState]):
    """The moving average between two linear maps."""

    config, kind, title, row = EmaConfig, "ema", "EMA", "EMA block"
    reads, writes = ("in_proj.weight",), ("out_proj.weight",)
    holds = MappingProxyType({"hook_log_decay": 0.0})
    forgets = MappingProxyType({"hook_ssm_decay": 0.0})
    scan_hooks = ("hook_ssm_decay", "hook_ssm_write", "hook_ssm_state")
    part_letter, scales_write = "B", True

    def __init__(self, cfg: EmaConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: EmaConfig = cfg
        self.in_proj = Linear(d_model, cfg.d_inner, bias=False)
        self.out_proj = Linear(cfg.d_inner, d_model, bias=True, scale=cfg.write_scale)
        self.decay = nn.Parameter(torch.empty(cfg.n_heads))
        self.hook_in_proj = HookPoint("batch pos d_inner")
        self.hook_log_decay = HookPoint("batch pos head")
        self.hook_ssm_decay = HookPoint("batch pos d_inner")
        self.hook_ssm_write = HookPoint("batch pos d_inner")
        self.hook_ssm_state = HookPoint("batch pos d_inner", lazy=True, stepwise=True)
        self.hook_ssm_y = HookPoint("batch pos d_inner")

    def reset_parameters(self) -> None:
        """Start with decays from a half to nearly one."""
        with torch.no_grad():
            self.decay.copy_(torch.linspace(0, 3, self.cfg.n_heads))

    def forward(self, x: Resid, state: EmaState | None, layout: Layout) -> tuple[Resid, EmaState]:
        """Return what the averages write, and the averages after the last token of each row."""
        u = layout.zero_padding(self.hook_in_proj(self.in_proj(x)))
        log_a = nn.functional.logsigmoid(self.decay).expand(*x.shape[:2], -1).clone()
        log_a = layout.zero_padding(self.hook_log_decay(log_a))
        a = log_a.exp().repeat_interleave(self.cfg.d_head, dim=-1)
        write = self.hook_ssm_write((1 - a) * u, constrain=layout.zero_padding)
        forget = partial(_forget, layout=layout)
        a = self.hook_ssm_decay(forget(at_least_fp32(a)), constrain=forget)
        h0 = torch.zeros_like(a[:, 0]) if state is None else state.ssm
        h = hooked_scan(a, at_least_fp32(write), h0, self.hook_ssm_state, layout)
        last = h[:, -1].clone()
        y = self.hook_ssm_y.branch(layout.detach_padding(h.to(x.dtype)))
        return self.out_proj(y), EmaState(last)

    # --- what the library asks of it ------------------------------------------------------------

    @classmethod
    def state_shapes(cls, cfg: EmaConfig) -> dict[str, tuple[int, ...]]:
        """Return the shape of the averages."""
        return {"ssm": (cfg.d_inner,)}

    @classmethod
    def channel_groups(cls, cfg: EmaConfig) -> int:
        """Return the heads."""
        return cfg.n_heads

    @classmethod
    def operations(cls, cfg: EmaConfig, d_model: int) -> dict[str, Flops]:
        """Return two products, the average, and (1 - a) u; biases and the sum of the stream."""
        d = cfg.d_inner
        flops = Flops(2 * 2 * d_model * d, scan=2 * d, elementwise=d + 2 * d_model)
        return {cls.row: flops}

    @classmethod
    def working_bytes(cls, cfg: EmaConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of inputs, decays, writes, averages and the output."""
        inside = cfg.d_inner * (3 * piece.width + 3 * piece.wide)
        return piece.n * (inside + d_model * piece.width)

    @classmethod
    def scan_terms(cls, seen: Mapping[str, Tensor]) -> ScanTerms:
        """Return what the scan computed with."""
        states = at_least_fp32(seen["hook_ssm_state"])[..., None]
        write = at_least_fp32(seen["hook_ssm_write"])[..., None]
        one = states.new_ones(*states.shape[:2], 1, 1)
        return ScanTerms(seen["hook_ssm_decay"][..., None], write, states, one)

    def split(self, norm: RMSNorm | None) -> Split:
        """Return what each head writes; the output bias is left over."""
        n = self.cfg.n_heads
        y = Way(
            ("mixer.hook_ssm_y",),
            lambda y: y.unflatten(-1, (n, -1)),
            lambda: self.out_proj.W.unflatten(0, (n, -1)),
        )
        return Split(n, (y,), self.out_proj.b)


def _forget(
    decay: Float[Tensor, "batch pos channel"], layout: Layout
) -> Float[Tensor, "batch pos channel"]:
    """Return decays of 0 where a document begins, and of 1 at padding."""
    decay = layout.fill_starts(decay, 0.0)
    return decay.masked_fill(~layout.is_real[..., None], 1) if layout.has_padding else decay


class EmaForm(LinearForm):
    """One state a channel: x is `hook_in_proj`, gain 1 - a, read 1 and skip 0."""

    kind = Ema.kind

    def terms(self, ran: Ran, channels: Index) -> Terms:
        """Return what some channels computed with."""
        layout, heads = ran.layout, channels // ran.mixer.cfg.d_head
        gain = at_least_fp32(1 - layout.zero_padding(ran["log_decay"])[..., heads].exp())
        x, decay, write = (
            at_least_fp32(ran[name][..., channels])
            for name in ("in_proj", "ssm_decay", "ssm_write")
        )
        read, skip = x.new_ones(*x.shape[:2], 1, 1), x.new_zeros(len(channels))
        h0 = ran.h0(channels)
        return Terms(x, decay[..., None], gain[..., None], write[..., None], read, skip, h0)

    def log_decay(self, ran: Ran, channels: Index) -> PerState:
        """Return the log decays of the channels' heads."""
        return ran["log_decay"][..., channels // ran.mixer.cfg.d_head, None].double()

    def decay_range(self, mixer: Any) -> DecayRange:
        """Return the decay, which is always the same."""
        decay = mixer.decay.double().sigmoid().repeat_interleave(mixer.cfg.d_head)
        return DecayRange(decay, decay, decay)

    def taps(self, mixer: Any) -> Float[Tensor, "tap channel"]:
        """Return ones: there is no convolution."""
        return mixer.decay.new_ones(1, mixer.cfg.d_inner)

    def slope(self, ran: Ran, channels: Index) -> PerChannel:
        """Return ones."""
        return torch.ones_like(at_least_fp32(ran["in_proj"][..., channels]))

    def gate(self, ran: Ran, channels: Index) -> PerChannel:
        """Return ones: there is no gate."""
        return torch.ones_like(ran["ssm_y"][..., channels])

    def maps(self, mixer: Any) -> dict[str, Float[Tensor, "a b"]]:
        """Return the maps in and out, and zeros for the gate that is not there."""
        into = mixer.in_proj.W
        return {"in": into, "gate": torch.zeros_like(into), "out": mixer.out_proj.W}


register_mixer(Ema)
register_form(EmaForm())
