"""The linear form of Mamba-2: x is `hook_ssm_input`, gain dt B, read C and skip D."""

from __future__ import annotations

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import softplus

from hooked_hybrid.analysis.forms.base import (
    DecayRange,
    Index,
    LinearForm,
    PerChannel,
    PerState,
    Ran,
    Terms,
)
from hooked_hybrid.config import Mamba2Config
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.mixers import Mamba2
from hooked_hybrid.network.scans.scan import forget


class Mamba2Form(LinearForm):
    """`d_state` states a channel; the channels of a head have one decay, those of a group B, C.

    Examples:
        >>> from hooked_hybrid.analysis.forms import form_of
        >>> from hooked_hybrid.config import Mamba2Config
        >>> form_of(Mamba2Config(n_heads=4, d_head=16, d_state=32)).kind
        'mamba2'
    """

    kind, has_states = Mamba2.kind, True

    def n_states(self, cfg: Mamba2Config) -> int:
        """Return the states of each channel."""
        return cfg.d_state

    def terms(self, ran: Ran, channels: Index) -> Terms:
        """Return the terms of some channels, with cached decays and writes if available."""
        cfg, device = ran.mixer.cfg, channels.device
        heads, groups = channels // cfg.d_head, channels // (cfg.d_inner // cfg.n_groups)
        x = at_least_fp32(ran["ssm_input"][..., channels])
        dt = at_least_fp32(ran["ssm_dt"][..., heads])
        B, C = (at_least_fp32(ran[name][:, :, groups]) for name in ("ssm_B", "ssm_C"))
        if "ssm_decay" in ran:
            decay = ran["ssm_decay"][..., heads, None]
        else:
            decay = forget(torch.exp(dt * ran.mixer.A.to(device)[heads]), ran.layout)[..., None]
        gain = dt[..., None] * B
        write = ran["ssm_write"][:, :, channels] if "ssm_write" in ran else gain * x[..., None]
        skip = at_least_fp32(ran.mixer.D.to(device)[heads])
        return Terms(x, decay.expand_as(gain), gain, write, C, skip, ran.h0(channels))

    def log_decay(self, ran: Ran, channels: Index) -> PerState:
        """Return log decays of some channels in fp64, without the resets of documents."""
        cfg, heads = ran.mixer.cfg, channels // ran.mixer.cfg.d_head
        if "ssm_decay" in ran:
            log = ran["ssm_decay"][..., heads].double().log()
        else:
            log = ran["ssm_dt"][..., heads].double()
            log = log * ran.mixer.A.to(log.device)[heads].double()
        return log[..., None].expand(*log.shape, cfg.d_state)

    def moves(self, ran: Ran) -> Bool[Tensor, "batch pos"] | None:
        """Return True where the step is not 0; it is 0 at padding, with or without a given mask."""
        return (ran["ssm_dt"] != 0).any(-1) if "ssm_dt" in ran else None

    def decay_range(self, mixer: Mamba2) -> DecayRange:
        """Return the decays at the largest step, at the step of the bias, and at the smallest.

        No norm bounds the steps, only the config's limits: without them decays reach 0 and 1.
        """
        cfg, A = mixer.cfg, mixer.A.double()
        largest = math.inf if cfg.dt_max is None else cfg.dt_max
        typical = softplus(mixer.dt_bias.double()).clamp(cfg.dt_min, largest)
        steps = torch.full_like(typical, largest), typical, torch.full_like(typical, cfg.dt_min)
        return DecayRange(*(self._by_state(mixer, torch.exp(dt * A)) for dt in steps))

    def _by_state(self, mixer: Mamba2, by_head: Tensor) -> Float[Tensor, "channel d_state"]:
        by_channel = by_head.repeat_interleave(mixer.cfg.d_head)
        return by_channel[:, None].expand(-1, mixer.cfg.d_state)

    def taps(self, mixer: Mamba2) -> Float[Tensor, "tap channel"]:
        """Return the weights of x in its convolution, the current token's last."""
        return mixer.conv.weight[:, : mixer.cfg.d_inner]

    def slope(self, ran: Ran, channels: Index) -> PerChannel:
        """Return sigmoid(c), as silu(c) = sigmoid(c) c."""
        return torch.sigmoid(at_least_fp32(ran["conv"][..., channels]))

    def gate(self, ran: Ran, channels: Index) -> PerChannel:
        """Return the gate times the factor of the norm, whose scale is that of the run."""
        cfg, gate = ran.mixer.cfg, at_least_fp32(ran["gate"])
        if cfg.norm is None:
            return gate[..., channels]
        y = at_least_fp32(ran["ssm_y"])
        normed = (y * gate if cfg.norm == "gate_first" else y).unflatten(-1, (cfg.n_groups, -1))
        inverse = torch.rsqrt(normed.square().mean(-1, keepdim=True) + cfg.norm_eps)
        weight = at_least_fp32(ran.mixer.norm.weight.to(gate.device))
        factor = inverse.expand_as(normed).flatten(-2) * weight
        return (gate * factor)[..., channels]

    def maps(self, mixer: Mamba2) -> dict[str, Float[Tensor, "a b"]]:
        """Return the maps of x and of the gate branch z, and of the output."""
        W, scales = mixer.in_proj.W * mixer.cfg.in_scale, mixer.section_scales
        W = W if scales is None else W * scales
        W_gate, W_in, *_ = W.split(list(mixer.cfg.sections), dim=1)
        return {"in": W_in, "gate": W_gate, "out": mixer.out_proj.W}
