"""The Mamba-1 block (Gu & Dao 2023, algorithm 2), with Jamba's norms on dt, B and C or without.

    u, z    = x W_in                                     two branches
    u       = silu(conv4(u) + b)
    dt, B, C = norm(u W_dt), norm(u W_B), norm(u W_C)    low rank, d_state, d_state
    delta   = softplus(dt W_up + b_up)                   fp32 from here to y
    h_t     = exp(delta_t A) h_{t-1} + delta_t B_t u_t   A = -exp(A_log), state [d_inner d_state]
    y_t     = C_t h_t + D u_t
    out     = (y * silu(z)) W_out

The official kernels compute in fp32 from delta to y. transformers' own torch code rounds delta and
the state to the model's dtype, so it agrees in fp32 and differs by a rounding in bf16.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import softplus

from hooked_hybrid.config import MambaConfig
from hooked_hybrid.hooks.marks import positions_of
from hooked_hybrid.hooks.point import HookPoint, LensHandle
from hooked_hybrid.network.block_state import RecurrentState
from hooked_hybrid.network.costs import SILU, SOFTPLUS, Flops, Piece, norm
from hooked_hybrid.network.elementwise import activate, at_least_fp32, times
from hooked_hybrid.network.layers import CausalConv1d, InnerNorm, Linear
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers.base import Mixer, ScanTerms
from hooked_hybrid.network.part import FoldedNorm
from hooked_hybrid.network.plan import may_overwrite
from hooked_hybrid.network.scans.loops import SmallInputs, SSMState
from hooked_hybrid.network.scans.scan import (
    find_edited_positions,
    forget,
    hooked_scan,
    only_where,
)
from hooked_hybrid.network.scans.selective_scan import CHUNK, CHUNK_NUMBERS, selective_scan
from hooked_hybrid.network.weights.products import autocast_dtype, in_own_dtype
from hooked_hybrid.shapes import Inner, Resid


class Mamba(Mixer[RecurrentState]):
    """The selective state space block.

    Examples:
        >>> mixer = jamba.blocks[0].mixer
        >>> mixer.kind, mixer.hook_ssm_state.axes
        ('mamba', ('batch', 'pos', 'd_inner', 'd_state'))
    """

    config, kind, title, row = MambaConfig, "mamba", "Mamba", "Mamba block"
    reads, writes, scales_write = ("in_proj.weight",), ("out_proj.weight",), True
    holds = MappingProxyType({"hook_ssm_dt": 0.0})
    forgets = MappingProxyType({"hook_ssm_decay": 0.0})
    scan_hooks = ("hook_ssm_decay", "hook_ssm_write", "hook_ssm_C", "hook_ssm_state")
    rows_within = dict.fromkeys(
        ("x_proj", "dt_norm", "B_norm", "C_norm", "dt_proj", "A_log", "D"), "selective SSM"
    )
    hook_meanings = MappingProxyType(
        {
            "hook_in_proj": "the recurrent branch, before the convolution",
            "hook_gate": "the gate branch z, after its silu",
            "hook_conv": "the convolution's output, before its silu",
            "hook_ssm_input": "the scan's input u: the convolution after its silu",
            "hook_dt_low": "the low-rank step sizes, after their norm",
            "hook_ssm_B": "B, after its norm: the weights of an input in the states",
            "hook_ssm_C": "C, after its norm: the weights of the states in the output",
            "hook_dt_proj": "the step sizes before the softplus",
            "hook_ssm_dt": "the step sizes delta, after the softplus, in fp32",
            "hook_ssm_decay": "the decay exp(delta A) of each state",
            "hook_ssm_write": "what is added to each state: delta B u",
            "hook_ssm_state": "states h after each position, fp32; an edit changes all later ones",
            "hook_ssm_y": "the scan's output C h + D u",
            "hook_gated": "the product of output and gate branch, the input of the output map",
        }
    )

    def __init__(self, cfg: MambaConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: MambaConfig = cfg
        self.in_proj = Linear(d_model, 2 * cfg.d_inner, bias=cfg.proj_bias)
        self.conv = CausalConv1d(cfg.d_conv, cfg.d_inner, bias=cfg.conv_bias)
        self.x_proj = Linear(cfg.d_inner, cfg.dt_rank + 2 * cfg.d_state, bias=False)
        self.dt_norm = _inner_norm(cfg, cfg.dt_rank)
        self.B_norm = _inner_norm(cfg, cfg.d_state)
        self.C_norm = _inner_norm(cfg, cfg.d_state)
        self.dt_proj = Linear(cfg.dt_rank, cfg.d_inner, bias=True)
        self.A_log = nn.Parameter(torch.empty(cfg.d_inner, cfg.d_state))
        self.D = nn.Parameter(torch.empty(cfg.d_inner))
        self.out_proj = Linear(cfg.d_inner, d_model, bias=cfg.proj_bias, scale=cfg.write_scale)

        self.hook_in_proj = HookPoint("batch pos d_inner")
        self.hook_gate = HookPoint("batch pos d_inner")
        self.hook_conv = HookPoint("batch pos d_inner")
        self.hook_ssm_input = HookPoint("batch pos d_inner")
        self.hook_dt_low = HookPoint("batch pos dt_rank")
        self.hook_ssm_B = HookPoint("batch pos d_state")
        self.hook_ssm_C = HookPoint("batch pos d_state")
        self.hook_dt_proj = HookPoint("batch pos d_inner")
        self.hook_ssm_dt = HookPoint("batch pos d_inner")
        self.hook_ssm_decay = HookPoint("batch pos d_inner d_state", lazy=True, large=True)
        self.hook_ssm_write = HookPoint("batch pos d_inner d_state", lazy=True, large=True)
        self.hook_ssm_state = HookPoint(
            "batch pos d_inner d_state", lazy=True, large=True, stepwise=True
        )
        self.hook_ssm_y = HookPoint("batch pos d_inner")
        self.hook_gated = HookPoint("batch pos d_inner")

    def reset_parameters(self) -> None:
        """Start with A = -1, -2, ..., and D = 1, as Mamba does."""
        with torch.no_grad():
            n = torch.arange(1, self.cfg.d_state + 1, device=self.A_log.device).float()
            self.A_log.copy_(n.log().expand_as(self.A_log))
            nn.init.ones_(self.D)

    def forward(
        self, x: Resid, state: RecurrentState | None, layout: Layout
    ) -> tuple[Resid, RecurrentState]:
        """Return the block's output, and its state after the last token of each row."""
        u, z = self.in_proj(x).chunk(2, dim=-1)
        gate = self.hook_gate(activate(z, "silu", may_overwrite()))
        u = self.hook_in_proj.branch(u)  # one half of a projection
        conv_state = self.conv.initial_state(u) if state is None else state.conv
        u, conv_state = self.conv(u, conv_state, layout)
        u = layout.detach_padding(u)
        is_ours = may_overwrite(self.hook_conv)
        u = self.hook_ssm_input(activate(self.hook_conv(u), "silu", is_ours))
        y, h = self._recur(u, state, layout)
        is_ours = may_overwrite(self.hook_ssm_y)
        y = self.hook_ssm_y(layout.detach_padding(y.to(x.dtype)))
        gated = self.hook_gated(times(y, gate, is_ours))
        return self.out_proj(gated), RecurrentState(conv_state, h)

    @property
    def inner_norms(self) -> tuple[FoldedNorm, ...]:  # type: ignore[override]
        """The norm of dt, if it has a weight."""
        if self.cfg.inner_norm != "weight":
            return ()
        return (FoldedNorm("dt_norm", "dt_proj.weight", "hook_dt_low"),)

    @classmethod
    def state_shapes(cls, cfg: MambaConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors, without the batch."""
        return {"conv": (cfg.d_conv - 1, cfg.d_inner), "ssm": (cfg.d_inner, cfg.d_state)}

    @classmethod
    def operations(cls, cfg: MambaConfig, d_model: int) -> dict[str, Flops]:
        """Return the operations of the Mamba block for one token.

        For each channel: the convolution and its silu, the bias of the step size and softplus,
        delta u, D u and its sum, the silu of the gate and the product with it. For each of its
        states: exp(delta A), the write, h, and C h, which counts as a matrix product.
        """
        d, n, rank = cfg.d_inner, cfg.d_state, cfg.dt_rank
        taps = 2 * cfg.d_conv - (not cfg.conv_bias)
        a_channel = taps + SILU + 1 + SOFTPLUS + 1 + 2 + SILU + 1
        biases = (2 * d + d_model) * cfg.proj_bias
        norms = (norm(rank) + 2 * norm(n)) * (cfg.inner_norm is not None)
        norms -= (rank + 2 * n) * (cfg.inner_norm == "plain")
        projected = d_model * 2 * d + d * (rank + 2 * n) + rank * d + d * d_model
        flops = Flops(
            products=2 * projected + 2 * d * n,
            scan=2 * d * n,
            elementwise=d * a_channel + 3 * d * n + norms + biases + d_model,
        )
        return {cls.row: flops}

    @classmethod
    def working_bytes(cls, cfg: MambaConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of branches, convolution, step sizes, y, and chunks of the scan."""
        narrow, wide = 3, 4
        a_chunk = piece.batch * min(CHUNK, piece.n_pos) * cfg.d_inner * cfg.d_state
        chunk = 2 * (min(a_chunk, CHUNK_NUMBERS) if piece.on_cpu else a_chunk) * piece.wide
        own = piece.n * (cfg.d_inner * (narrow * piece.width + wide * piece.wide))
        return own + chunk + piece.n * d_model * piece.width

    @classmethod
    def scan_terms(cls, seen: Mapping[str, Tensor]) -> ScanTerms:
        """Return the decays, writes, states and reads of the scan."""
        write, states, C = (
            at_least_fp32(seen[name]) for name in ("hook_ssm_write", "hook_ssm_state", "hook_ssm_C")
        )
        return ScanTerms(seen["hook_ssm_decay"], write, states, C[:, :, None])

    @classmethod
    def hooked_numbers(cls, cfg: MambaConfig, n_pos: int, n_keys: int) -> dict[str, int]:  # noqa: ARG003
        """Return the numbers of decays, writes and states of a row."""
        names = ("hook_ssm_decay", "hook_ssm_write", "hook_ssm_state")
        return dict.fromkeys(names, n_pos * cfg.d_inner * cfg.d_state)

    @property
    def A(self) -> Float[Tensor, "d_inner d_state"]:
        """The continuous decay rates, all negative, in fp32."""
        return -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))

    def _recur(
        self, u: Inner, state: RecurrentState | None, layout: Layout
    ) -> tuple[Inner, SSMState]:
        """Return y at every position and the last state; padding writes and forgets nothing."""
        cfg, u = self.cfg, layout.zero_padding(u)
        dt, B, C = self.x_proj(u).split([cfg.dt_rank, cfg.d_state, cfg.d_state], dim=-1)
        dt = self.hook_dt_low(self.dt_norm(dt))
        B, C = self.hook_ssm_B(self.B_norm(B)), self.hook_ssm_C(self.C_norm(C))
        dt = softplus(at_least_fp32(self.hook_dt_proj(self.dt_proj(dt))))
        dt = self.hook_ssm_dt(layout.zero_padding(dt), constrain=layout.zero_padding)
        u, B, C = at_least_fp32(u), at_least_fp32(B), at_least_fp32(C)
        # A step of 0 at padding writes nothing, except where values are not finite.
        B, C = layout.zero_padding(B), layout.zero_padding(C)
        h0 = u.new_zeros(u.shape[0], cfg.d_inner, cfg.d_state) if state is None else state.ssm
        y, h = self._scan(u, dt, B, C, h0, layout, begins=state is None)
        skip = u * self.D.to(u.dtype)
        return torch.add(y, skip, out=y if may_overwrite() else None), h

    def _scan(
        self,
        u: Inner,
        dt: Inner,
        B: SmallInputs,
        C: SmallInputs,
        h0: SSMState,
        layout: Layout,
        begins: bool,
    ) -> tuple[Inner, SSMState]:
        """Return C h and the last state, in the fastest way that the attached hooks allow."""
        if autocast_dtype(u.device) is not None:
            with in_own_dtype(u.device):  # fp32, as without it
                return self._scan(u, dt, B, C, h0, layout, begins)
        hook = self.hook_ssm_state
        if self.hook_ssm_decay.is_hooked or self.hook_ssm_write.is_hooked or hook.bwd_hooks:
            return self._scan_hooked(u, dt, B, C, h0, layout)
        if not hook.fwd_hooks:
            return selective_scan(u, dt, self.A, B, C, h0, layout.resets, begins)
        if any(h.is_watcher or positions_of(h.hook) is None for h in hook.fwd_hooks):
            return self._scan_hooked(u, dt, B, C, h0, layout)
        return self._scan_edited(u, dt, B, C, h0, layout)

    def _scan_hooked(
        self,
        u: Inner,
        dt: Inner,
        B: SmallInputs,
        C: SmallInputs,
        h0: SSMState,
        layout: Layout,
    ) -> tuple[Inner, SSMState]:
        """Return C h and the last state through decays, writes and states, with their hooks."""
        decay = torch.exp(dt[..., None] * self.A)
        decay = self.hook_ssm_decay(forget(decay, layout), constrain=lambda a: forget(a, layout))
        write = dt[..., None] * B[:, :, None] * u[..., None]
        write = self.hook_ssm_write(write, constrain=layout.zero_padding)
        h = hooked_scan(decay, write, h0, self.hook_ssm_state, layout)
        return torch.einsum("bsen,bsn->bse", h, C), h[:, -1].clone()

    def _scan_edited(
        self,
        u: Inner,
        dt: Inner,
        B: SmallInputs,
        C: SmallInputs,
        h0: SSMState,
        layout: Layout,
    ) -> tuple[Inner, SSMState]:
        """Compute the same as `_scan_hooked`, by fast scans that stop at each edited position."""
        rates, resets, h, ys, done = self.A, layout.resets, h0, [], 0
        handles = tuple(self.hook_ssm_state.fwd_hooks)
        edited = find_edited_positions(handles, layout)
        for stop in sorted({*(t + 1 for t in edited), layout.length}):
            part = slice(done, stop)
            reset = None if resets is None else resets[:, part]
            y, h = selective_scan(u[:, part], dt[:, part], rates, B[:, part], C[:, part], h, reset)
            if stop - 1 in edited:
                h = self._edit(h, handles, layout, stop - 1)
                y = torch.cat([y[:, :-1], C[:, stop - 1 : stop] @ h.mT], dim=1)
            ys.append(y)
            done = stop
        return torch.cat(ys, dim=1), h

    def _edit(self, h: SSMState, handles: Sequence[LensHandle], layout: Layout, t: int) -> SSMState:
        """Return a state after its hooks at index t, where padding carries it unchanged."""
        is_real = layout.is_real[:, t, None, None, None]
        hook, carried = self.hook_ssm_state, h[:, None]
        return hook.apply_hooks(
            carried.clone(),
            handles,
            (),
            constrain=partial(only_where, is_real, carried),
            run=layout.run.at(t, t + 1),
        )[:, 0]


def _inner_norm(cfg: MambaConfig, width: int) -> InnerNorm | nn.Identity:
    if cfg.inner_norm is None:
        return nn.Identity()
    return InnerNorm(width, cfg.norm_eps, has_weight=cfg.inner_norm == "weight")
