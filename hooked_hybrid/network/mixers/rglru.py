"""Griffin's recurrent block (De et al. 2024, section 2.4), its RG-LRU and its two branches.

    y = gelu(x W_y + b_y)                                  gate branch
    u = conv4(x W_x + b_x)                                 recurrent branch, no activation
    i = sigmoid(u W_i + b_i);  r = sigmoid(u W_r + b_r)    block-diagonal gates
    log a = -8 r softplus(a_param)
    h_t = a_t h_{t-1} + sqrt(1 - a_t^2) i_t u_t            fp32
    out = (h * y) W_out + b_out

At the first position of a document the previous state is dropped (a = 0) and the write is not
scaled (it is i u), as in the published models.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from hooked_hybrid.config import RGLRUConfig
from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.block_state import RecurrentState
from hooked_hybrid.network.costs import ACTIVATION, SIGMOID, Flops, Piece
from hooked_hybrid.network.elementwise import activate, at_least_fp32, constant, times
from hooked_hybrid.network.layers import BlockDiagonalLinear, CausalConv1d, Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers.base import Mixer, ScanTerms
from hooked_hybrid.network.plan import may_overwrite
from hooked_hybrid.network.scans.scan import hooked_scan
from hooked_hybrid.network.written import Split, Way
from hooked_hybrid.shapes import Channels, Resid

DECAY_STRENGTH = 8.0
MAX_SQRT_GRADIENT = 1000.0


class RGLRU(Mixer[RecurrentState]):
    """The recurrent block around a real-gated linear recurrent unit.

    Examples:
        >>> model.blocks[0].recurrence.kind, model.blocks[0].recurrence.title
        ('rglru', 'RG-LRU')
    """

    config, kind, title, row = RGLRUConfig, "rglru", "RG-LRU", "recurrent block"
    reads, writes = ("linear_x.weight", "linear_y.weight"), ("linear_out.weight",)
    holds = MappingProxyType({"hook_log_decay": 0.0, "hook_input_gate": 0.0})
    forgets = MappingProxyType({"hook_log_decay": -torch.inf})
    scan_hooks = ("hook_log_decay", "hook_ssm_write", "hook_ssm_state")
    part_letter, scales_write = "B", True
    rows_within = dict.fromkeys(("input_gate", "rec_gate", "a_param"), "RG-LRU")
    hook_meanings = MappingProxyType(
        {
            "hook_in_proj": "the recurrent branch, before the convolution",
            "hook_gate": "the gate branch, after its gelu",
            "hook_conv": "the convolution's output, the input of the gates and the recurrence",
            "hook_input_gate": "the input gate i, in 0 to 1",
            "hook_rec_gate": "the recurrence gate r, in 0 to 1",
            "hook_log_decay": "the log of the decay a: -8 r softplus(a_param), before any reset",
            "hook_ssm_write": "what is added to the state: sqrt(1 - a^2) i u",
            "hook_ssm_state": "state h after each position, fp32; an edit changes all later ones",
            "hook_ssm_y": "the state in the model's dtype, as read by the product",
            "hook_gated": "the product of state and gate branch, the input of the output map",
        }
    )

    def __init__(self, cfg: RGLRUConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: RGLRUConfig = cfg
        self.linear_x = Linear(d_model, cfg.d_rnn, bias=True)
        self.linear_y = Linear(d_model, cfg.d_rnn, bias=True)
        self.linear_out = Linear(cfg.d_rnn, d_model, bias=True, scale=cfg.write_scale)
        self.conv = CausalConv1d(cfg.d_conv, cfg.d_rnn)
        self.input_gate = BlockDiagonalLinear(cfg.n_gate_blocks, cfg.d_rnn)
        self.rec_gate = BlockDiagonalLinear(cfg.n_gate_blocks, cfg.d_rnn)
        self.a_param = nn.Parameter(torch.empty(cfg.d_rnn))

        self.hook_in_proj = HookPoint("batch pos d_rnn")
        self.hook_gate = HookPoint("batch pos d_rnn")
        self.hook_conv = HookPoint("batch pos d_rnn")
        self.hook_input_gate = HookPoint("batch pos d_rnn")
        self.hook_rec_gate = HookPoint("batch pos d_rnn")
        self.hook_log_decay = HookPoint("batch pos d_rnn")
        self.hook_ssm_write = HookPoint("batch pos d_rnn")
        self.hook_ssm_state = HookPoint("batch pos d_rnn", lazy=True, stepwise=True)
        self.hook_ssm_y = HookPoint("batch pos d_rnn")
        self.hook_gated = HookPoint("batch pos d_rnn")

    def reset_parameters(self) -> None:
        """Draw decays at r = 1 uniformly (in a^2) from 0.9 to 0.999, as Griffin does."""
        with torch.no_grad():
            a_squared = torch.empty_like(self.a_param).uniform_(0.9**2, 0.999**2)
            target = -a_squared.log() / 2 / DECAY_STRENGTH
            self.a_param.copy_(torch.log(torch.expm1(target)))

    def forward(
        self, x: Resid, state: RecurrentState | None, layout: Layout
    ) -> tuple[Resid, RecurrentState]:
        """Return the block's output, and its state after the last token of each row."""
        gate = activate(self.linear_y(x), "gelu_tanh", overwrite=may_overwrite())
        gate = self.hook_gate(gate)
        u = self.hook_in_proj(self.linear_x(x))
        conv_state = self.conv.initial_state(u) if state is None else state.conv
        u, conv_state = self.conv(u, conv_state, layout)
        h, is_ours = self._recur(self.hook_conv(u), state, layout)
        last = h[:, -1].clone()
        is_ours = is_ours and may_overwrite(self.hook_ssm_y)
        y = self.hook_ssm_y.branch(layout.detach_padding(h.to(x.dtype)))
        return self.linear_out(self.hook_gated(times(y, gate, is_ours))), RecurrentState(
            conv_state, last
        )

    @classmethod
    def state_shapes(cls, cfg: RGLRUConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors, without the batch."""
        return {"conv": (cfg.d_conv - 1, cfg.d_rnn), "ssm": (cfg.d_rnn,)}

    @classmethod
    def scan_terms(cls, seen: Mapping[str, Tensor]) -> ScanTerms:
        """Return the decays, writes, states and reads of the scan, with one state a channel."""
        states = at_least_fp32(seen["hook_ssm_state"])[..., None]
        write = at_least_fp32(seen["hook_ssm_write"])[..., None]
        decay = torch.exp(seen["hook_log_decay"])[..., None]
        return ScanTerms(decay, write, states, states.new_ones(*states.shape[:2], 1, 1))

    @classmethod
    def channel_groups(cls, cfg: RGLRUConfig) -> int:
        """Return the blocks of channels in which the gates act."""
        return cfg.n_gate_blocks

    @classmethod
    def operations(cls, cfg: RGLRUConfig, d_model: int) -> dict[str, Flops]:
        """Return the operations of Griffin's recurrent block for one token.

        For each channel: the gate branch's bias and gelu, the other branch's bias, the convolution,
            two gates, log a = r log_a_at_1 and a, sqrt(1 - exp(2 log a)) i u, and h times the gate
            branch.
        """
        d = cfg.d_rnn
        gates, decay, write = 2 * (1 + SIGMOID), 2, 4 + 2
        a_channel = 1 + ACTIVATION["gelu_tanh"] + 1 + 2 * cfg.d_conv + gates + decay + write + 1
        flops = Flops(
            products=3 * 2 * d_model * d + 2 * 2 * d * (d // cfg.n_gate_blocks),
            scan=2 * d,
            elementwise=d * a_channel + d_model + d_model,
        )
        return {cls.row: flops}

    @classmethod
    def working_bytes(cls, cfg: RGLRUConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of branches, convolution, gates, decay, write, states and the output."""
        narrow, wide = 8, 4
        written = d_model * piece.width
        return piece.n * (cfg.d_rnn * (narrow * piece.width + wide * piece.wide) + written)

    def split(self, norm: RMSNorm | None) -> Split:  # noqa: ARG002
        """Return the output of each gate block; the output bias belongs to none.

        The gates act within blocks of channels, whose outputs the output projection adds up.
        """
        n = self.cfg.n_gate_blocks
        gated = Way(
            ("mixer.hook_gated",),
            lambda x: x.unflatten(-1, (n, -1)),
            lambda: self.linear_out.W.unflatten(0, (n, -1)),
        )
        return Split(n, (gated,), self.linear_out.b)

    def _recur(
        self, u: Channels, state: RecurrentState | None, layout: Layout
    ) -> tuple[Channels, bool]:
        """Return the RG-LRU's state at every position, and whether no hook received it.

        Padding writes and forgets nothing.
        """
        u = layout.zero_padding(u)
        input_gate = self.hook_input_gate(self.input_gate(u).sigmoid())
        is_edited = self.hook_rec_gate.has_editors
        rec_gate = self.hook_rec_gate(self.rec_gate(u).sigmoid())
        is_edited |= self.hook_log_decay.has_editors
        log_a = self.hook_log_decay(rec_gate * self.log_a_at_1)
        log_a = layout.zero_padding(log_a)
        log_a = self._checked_decay(log_a) if is_edited else log_a

        one = constant(1.0, log_a.dtype, log_a.device)
        scale = layout.fill_starts(sqrt_bounded(one - torch.exp(log_a + log_a)), 1.0)
        # At padding the decay is 1 and the write 0, whatever the values there.
        write = layout.zero_padding(u * input_gate * scale)
        write = self.hook_ssm_write(write, constrain=layout.zero_padding)
        a = at_least_fp32(layout.fill_starts(torch.exp(log_a), 0.0))
        h0 = torch.zeros_like(a[:, 0]) if state is None else state.ssm
        is_ours = may_overwrite(self.hook_ssm_state)
        return hooked_scan(a, at_least_fp32(write), h0, self.hook_ssm_state, layout), is_ours

    @property
    def log_a_at_1(self) -> Float[Tensor, " d_rnn"]:
        """The log decay where the recurrence gate is 1."""
        return -DECAY_STRENGTH * softplus(self.a_param)

    def _checked_decay(self, log_a: Channels) -> Channels:
        if bool((transforms.plain_rows(log_a) > 0).any()):
            raise ValueError(
                f"{self.hook_log_decay.name!r} is {log_a.max():.3g} after a hook on it or on the "
                "recurrence gate; a log decay must be 0 (keep everything) or less, down to minus "
                "infinity (forget everything)"
            )
        return log_a


class _SqrtBounded(torch.autograd.Function):
    """A square root whose gradient is at most `MAX_SQRT_GRADIENT`, also at 0."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.sqrt(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad / torch.sqrt(torch.clamp_min(4 * x, MAX_SQRT_GRADIENT**-2))


def sqrt_bounded(x: Tensor) -> Tensor:
    """Return sqrt(x) with a gradient bounded by 1000; without autograd, in the memory of `x`.

    A decay of 1 has 1 - a^2 = 0, where the true gradient is infinite. Source: Griffin, appendix A;
    both reference implementations bound it at 1000 too.
    """
    if transforms.are_active():
        return _sqrt_of_operations(x)
    return _SqrtBounded.apply(x) if torch.is_grad_enabled() else x.sqrt_()


def _sqrt_of_operations(x: Tensor) -> Tensor:
    """Compute the same as `_SqrtBounded`, by operations that can be differentiated again.

    An autograd function with its own forward-mode derivative has no second derivatives: they would
    silently be zero.
    """
    is_small = 4 * x < MAX_SQRT_GRADIENT**-2
    value = x.detach()
    line = torch.sqrt(value) + (x - value) * MAX_SQRT_GRADIENT
    return torch.where(is_small, line, torch.sqrt(x.masked_fill(is_small, 1)))
