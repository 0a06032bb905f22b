"""The linear form of Mamba: x is `hook_ssm_input`, gain dt B, read C and skip D."""

from __future__ import annotations

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
from hooked_hybrid.config import MambaConfig
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import InnerNorm
from hooked_hybrid.network.mixers import Mamba
from hooked_hybrid.network.scans.scan import forget


class MambaForm(LinearForm):
    """`d_state` states a channel.

    Examples:
        >>> from hooked_hybrid.analysis.forms import MambaForm, form_of
        >>> isinstance(form_of(jamba.cfg.layers[0].mixer), MambaForm)
        True
    """

    kind, has_states = Mamba.kind, True

    def n_states(self, cfg: MambaConfig) -> int:
        """Return the states of each channel."""
        return cfg.d_state

    def terms(self, ran: Ran, channels: Index) -> Terms:
        """Return the terms of some channels, with cached decays and writes if available."""
        x, dt = (at_least_fp32(ran[name][..., channels]) for name in ("ssm_input", "ssm_dt"))
        B, C = (at_least_fp32(ran[name]) for name in ("ssm_B", "ssm_C"))
        A, skip = ran.mixer.A.to(x.device)[channels], ran.mixer.D.to(x.device)[channels]
        if "ssm_decay" in ran:
            decay = ran["ssm_decay"][:, :, channels]
        else:
            decay = forget(torch.exp(dt[..., None] * A), ran.layout)
        gain = dt[..., None] * B[:, :, None]
        write = ran["ssm_write"][:, :, channels] if "ssm_write" in ran else gain * x[..., None]
        read, h0 = C[:, :, None], ran.h0(channels)
        return Terms(x, decay, gain, write, read, at_least_fp32(skip), h0)

    def log_decay(self, ran: Ran, channels: Index) -> PerState:
        """Return log decays of some channels in fp64, without the resets of documents."""
        if "ssm_decay" in ran:
            return ran["ssm_decay"][:, :, channels].double().log()
        dt = ran["ssm_dt"][..., channels, None].double()
        return dt * ran.mixer.A.to(dt.device)[channels].double()

    def moves(self, ran: Ran) -> Bool[Tensor, "batch pos"] | None:
        """Return True where the step is not 0; it is 0 at padding, with or without a given mask."""
        return (ran["ssm_dt"] != 0).any(-1) if "ssm_dt" in ran else None

    def decay_range(self, mixer: Mamba) -> DecayRange:
        """Return the decays at the largest possible step, at the bias, and at the smallest step.

        Without a norm of dt nothing bounds the steps: decays reach 0 and 1.
        """
        W = mixer.dt_proj.W.double()
        assert mixer.dt_proj.bias is not None
        bias, A = mixer.dt_proj.bias.double(), mixer.A.double()
        typical = torch.exp(softplus(bias)[:, None] * A)
        norm = mixer.dt_norm
        if not isinstance(norm, InnerNorm):
            return DecayRange(torch.zeros_like(typical), typical, torch.ones_like(typical))
        W = W if norm.weight is None else norm.weight.double()[:, None] * W
        most = W.norm(dim=0) * mixer.cfg.dt_rank**0.5
        fastest, slowest = (torch.exp(softplus(bias + s * most)[:, None] * A) for s in (1, -1))
        return DecayRange(fastest, typical, slowest)

    def taps(self, mixer: Mamba) -> Float[Tensor, "tap channel"]:
        """Return the weights of its convolution, the current token's last."""
        return mixer.conv.weight

    def slope(self, ran: Ran, channels: Index) -> PerChannel:
        """Return sigmoid(c), as silu(c) = sigmoid(c) c."""
        return torch.sigmoid(at_least_fp32(ran["conv"][..., channels]))

    def maps(self, mixer: Mamba) -> dict[str, Float[Tensor, "a b"]]:
        """Return the maps of both branches, and of the output."""
        W_in, W_gate = mixer.in_proj.W.chunk(2, dim=1)
        return {"in": W_in, "gate": W_gate, "out": mixer.out_proj.W}
