"""The linear form of the RG-LRU.

x is `hook_conv`; gain is the input gate times sqrt(1 - decay^2), or only the input gate at the
start of a document; read is 1 and skip 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.analysis.forms.base import (
    DecayRange,
    Index,
    LinearForm,
    PerChannel,
    PerState,
    Ran,
    Terms,
)
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.mixers import RGLRU


class RGLRUForm(LinearForm):
    """One state a channel.

    Examples:
        >>> from hooked_hybrid.analysis.forms import RGLRUForm, form_of
        >>> isinstance(form_of(model.cfg.layers[0].mixer), RGLRUForm)
        True
    """

    kind = RGLRU.kind

    def terms(self, ran: Ran, channels: Index) -> Terms:
        """Return the terms of some channels, in the order and dtypes of the forward."""
        layout = ran.layout
        log_a = layout.zero_padding(ran["log_decay"][..., channels])
        scale = torch.sqrt(1 - torch.exp(log_a + log_a))
        starts, padding = layout.is_start[..., None], ~layout.is_real[..., None]
        scale = scale.masked_fill(starts, 1).masked_fill(padding, 0)
        decay = torch.exp(log_a).masked_fill(starts, 0)
        gain = ran["input_gate"][..., channels] * scale
        one = at_least_fp32(gain.new_ones(*layout.pos.shape, 1, 1))
        u, decay, gain, write = (
            at_least_fp32(t)
            for t in (ran["conv"][..., channels], decay, gain, ran["ssm_write"][..., channels])
        )
        skip, h0 = u.new_zeros(len(channels)), ran.h0(channels)
        return Terms(u, decay[..., None], gain[..., None], write[..., None], one, skip, h0)

    def log_decay(self, ran: Ran, channels: Index) -> PerState:
        """Return log decays of some channels in fp64, without the resets of documents."""
        return ran["log_decay"][..., channels, None].double()

    def decay_range(self, mixer: RGLRU) -> DecayRange:
        """Return the decays at r = 1, at the gate's bias, and towards r = 0."""
        log_a = mixer.log_a_at_1.double()
        typical = mixer.rec_gate.bias.double().sigmoid().flatten() * log_a
        return DecayRange(log_a.exp(), typical.exp(), torch.ones_like(log_a))

    def taps(self, mixer: RGLRU) -> Float[Tensor, "tap channel"]:
        """Return the weights of its convolution, the current token's last."""
        return mixer.conv.weight

    def slope(self, ran: Ran, channels: Index) -> PerChannel:
        """Return ones: there is no activation after the convolution."""
        return torch.ones_like(at_least_fp32(ran["conv"][..., channels]))

    def maps(self, mixer: RGLRU) -> dict[str, Float[Tensor, "a b"]]:
        """Return the maps of both branches, and of the output."""
        return {"in": mixer.linear_x.W, "gate": mixer.linear_y.W, "out": mixer.linear_out.W}
