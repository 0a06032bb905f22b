"""The Mamba-2 block (Dao & Gu 2024): a scan whose decay is one number a head.

    z, x, B, C, dt = x_in W_in                        B and C for each group of heads
    u, B, C = silu(conv4([x, B, C]) + b)
    delta   = softplus(dt + dt_bias), in a range      fp32 from here to the norm
    a_t     = exp(-exp(A_log) delta_t)                one number a head
    h_t     = a_t h_{t-1} + delta_t u_t B_t           state [d_head d_state] of each head
    y_t     = C_t h_t + D u_t
    out     = norm(y * silu(z)) W_out                 each group of channels by its own scale

Each head is a matrix over positions, M_ts = (C_t . B_s) delta_s a_{s+1} ... a_t, which is at
`hook_ssm_pattern`: y = M u + D u, and what is read from the state before the first position.
The channels of head i are i d_head to (i + 1) d_head of `hook_ssm_input`, `hook_ssm_state` and
`hook_ssm_y`.

transformers limits delta of Nemotron-H and Zamba2 from below in prefill but not in a cached step.
The published Nemotron code has no limit, and this has none unless the config sets one.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import silu, softplus

from hooked_hybrid.config import Mamba2Config
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.block_state import RecurrentState
from hooked_hybrid.network.costs import SILU, SOFTPLUS, Flops, Piece, norm
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.gated_norm import GroupRMSNorm
from hooked_hybrid.network.layers import CausalConv1d, Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers.base import Mixer, ScanTerms
from hooked_hybrid.network.part import FoldedNorm
from hooked_hybrid.network.scans.hooked_ssd import SSDHooks, SSDTerms, hooked_ssd_scan
from hooked_hybrid.network.scans.loops import PerHead
from hooked_hybrid.network.scans.ssd_scan import CHUNK
from hooked_hybrid.network.written import Split, Way, as_they_are
from hooked_hybrid.shapes import Inner, Resid


class Mamba2(Mixer[RecurrentState]):
    """The block around Mamba-2's scan.

    Examples:
        >>> from hooked_hybrid.config import Mamba2Config
        >>> from hooked_hybrid.network.mixers import Mamba2
        >>> mixer = Mamba2(Mamba2Config(n_heads=4, d_head=16, d_state=32), d_model=64)
        >>> mixer.kind, mixer.hook_ssm_state.axes
        ('mamba2', ('batch', 'pos', 'd_inner', 'd_state'))
    """

    config, kind, title, row = Mamba2Config, "mamba2", "Mamba-2", "Mamba-2 block"
    reads, writes, scales_write = ("in_proj.weight",), ("out_proj.weight",), True
    part_letter = "S"
    holds = MappingProxyType({"hook_ssm_dt": 0.0})
    forgets = MappingProxyType({"hook_ssm_decay": 0.0})
    scan_hooks = ("hook_ssm_decay", "hook_ssm_write", "hook_ssm_C", "hook_ssm_state")
    rows_within = dict.fromkeys(("dt_bias", "A_log", "D"), "state space scan")
    hook_meanings = MappingProxyType(
        {
            "hook_in_proj": "x, B and C of the projection, before the convolution",
            "hook_gate": "the gate branch z, after its silu, in fp32",
            "hook_conv": "the convolution's output for x, B and C, before its silu",
            "hook_ssm_input": "the scan's input u: the convolution of x after its silu",
            "hook_ssm_B": "B of each group: the weights of an input in the states",
            "hook_ssm_C": "C of each group: the weights of the states in the output",
            "hook_dt_proj": "the step size of each head before the softplus, with its bias",
            "hook_ssm_dt": "the step size delta of each head, after the softplus, in fp32",
            "hook_ssm_decay": "the decay exp(-exp(A_log) delta) of each head",
            "hook_ssm_scores": "C_t . B_s of each head, query t and key s",
            "hook_ssm_pattern": "the matrix M of each head: y = M u + D u, and the first state",
            "hook_ssm_write": "what is added to each state: delta u B",
            "hook_ssm_state": "states h after each position, fp32; an edit changes all later ones",
            "hook_ssm_y": "the scan's output C h + D u, in fp32",
            "hook_gated": "output and gate branch after the norm, the input of the output map",
            "hook_result": "what each head writes to the residual stream, without the output bias",
        }
    )

    def __init__(self, cfg: Mamba2Config, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: Mamba2Config = cfg
        self.in_proj = Linear(d_model, sum(cfg.sections), bias=cfg.in_bias)
        self.conv = CausalConv1d(cfg.d_conv, cfg.d_convolved, bias=cfg.conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(cfg.n_heads))
        self.A_log = nn.Parameter(torch.empty(cfg.n_heads))
        self.D = nn.Parameter(torch.empty(cfg.n_heads))
        if cfg.norm:
            self.norm = GroupRMSNorm(cfg.d_inner, cfg.n_groups, cfg.norm_eps)
        self.out_proj = Linear(cfg.d_inner, d_model, bias=cfg.out_bias, scale=cfg.write_scale)

        self.hook_in_proj = HookPoint("batch pos d_convolved")
        self.hook_gate = HookPoint("batch pos d_inner")
        self.hook_conv = HookPoint("batch pos d_convolved")
        self.hook_ssm_input = HookPoint("batch pos d_inner")
        self.hook_ssm_B = HookPoint("batch pos group d_state")
        self.hook_ssm_C = HookPoint("batch pos group d_state")
        self.hook_dt_proj = HookPoint("batch pos head")
        self.hook_ssm_dt = HookPoint("batch pos head")
        self.hook_ssm_decay = HookPoint("batch pos head", lazy=True)
        self.hook_ssm_scores = HookPoint("batch head query key", lazy=True, large=True, whole=True)
        self.hook_ssm_pattern = HookPoint("batch head query key", lazy=True, large=True, whole=True)
        self.hook_ssm_write = HookPoint("batch pos d_inner d_state", lazy=True, large=True)
        self.hook_ssm_state = HookPoint(
            "batch pos d_inner d_state", lazy=True, large=True, stepwise=True
        )
        self.hook_ssm_y = HookPoint("batch pos d_inner")
        self.hook_gated = HookPoint("batch pos d_inner")
        self.hook_result = HookPoint("batch pos head d_model", lazy=True, large=True)

    def reset_parameters(self) -> None:
        """Start with A from -1 to -16, steps from 0.001 to 0.1 and D = 1, as Mamba-2 does."""
        n, device = self.cfg.n_heads, self.D.device
        with torch.no_grad():
            self.A_log.copy_(torch.empty(n, device=device).uniform_(1, 16).log())
            dt = torch.empty(n, device=device).uniform_(-6.9, -2.3).exp()
            self.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus
            nn.init.ones_(self.D)

    def forward(
        self, x: Resid, state: RecurrentState | None, layout: Layout
    ) -> tuple[Resid, RecurrentState]:
        """Return the block's output, and its state after the last token of each row."""
        cfg = self.cfg
        z, convolved, dt = self._project(x).split([cfg.d_inner, cfg.d_convolved, cfg.n_heads], -1)
        gate = self.hook_gate(silu(at_least_fp32(z)))
        convolved = self.hook_in_proj.branch(convolved)
        conv_state = self.conv.initial_state(convolved) if state is None else state.conv
        convolved, conv_state = self.conv(convolved, conv_state, layout)
        convolved = silu(self.hook_conv(layout.detach_padding(convolved)))
        y, h = self._recur(convolved, dt, state, layout)
        y = self.hook_ssm_y(layout.detach_padding(y))
        gated = self.hook_gated(self._normalize(y, gate).to(x.dtype))
        return self._write(gated), RecurrentState(conv_state, h)

    # --- facts for the library ------------------------------------------------------------------

    @property
    def inner_norms(self) -> tuple[FoldedNorm, ...]:  # type: ignore[override]
        """The norm before the output map, if there is one."""
        return (FoldedNorm("norm", "out_proj.weight", "hook_gated"),) if self.cfg.norm else ()

    @classmethod
    def state_shapes(cls, cfg: Mamba2Config) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors, without the batch."""
        return {"conv": (cfg.d_conv - 1, cfg.d_convolved), "ssm": (cfg.d_inner, cfg.d_state)}

    @classmethod
    def channel_groups(cls, cfg: Mamba2Config) -> int:
        """Return the heads."""
        return cfg.n_heads

    @classmethod
    def operations(cls, cfg: Mamba2Config, d_model: int) -> dict[str, Flops]:
        """Return the operations of one token, by the recurrence.

        Projections and C h are products. Elementwise are, for each convolved channel, the taps and
        silu; for each head, bias, softplus and decay; for each channel, delta u, D u and its sum,
        the gate's silu and product, and the norm; and the write of each state.
        """
        d, n, heads = cfg.d_inner, cfg.d_state, cfg.n_heads
        taps = 2 * cfg.d_conv - (not cfg.conv_bias)
        norms = cfg.n_groups * norm(d // cfg.n_groups) if cfg.norm else 0
        biases = sum(cfg.sections) * cfg.in_bias + d_model * cfg.out_bias
        scales = d_model * (cfg.in_scale != 1) + sum(cfg.sections) * cls._scales_sections(cfg)
        elementwise = cfg.d_convolved * (taps + SILU) + heads * (1 + SOFTPLUS + 2)
        elementwise += d * (1 + 2 + SILU + 1) + d * n + norms + biases + scales + d_model
        products = 2 * d_model * (sum(cfg.sections) + d) + 2 * d * n
        return {cls.row: Flops(products, scan=2 * d * n, elementwise=elementwise)}

    @classmethod
    def working_bytes(cls, cfg: Mamba2Config, d_model: int, piece: Piece) -> int:
        """Return the bytes of projection, convolution, y, and the matrices of a chunk."""
        narrow = sum(cfg.sections) + 2 * cfg.d_convolved
        wide = 5 * cfg.d_inner + 4 * cfg.n_groups * cfg.d_state + 4 * cfg.n_heads
        length = min(CHUNK, piece.n_pos)
        pairs = piece.batch * cfg.n_heads * length * length
        states = piece.batch * cfg.d_inner * cfg.d_state
        chunk = (4 * pairs + 3 * states + 3 * piece.batch * length * cfg.d_inner) * piece.wide
        own = piece.n * (narrow * piece.width + wide * piece.wide)
        return own + chunk + piece.n * d_model * piece.width

    @classmethod
    def scan_terms(cls, seen: Mapping[str, Tensor]) -> ScanTerms:
        """Return the decays, writes, states and reads of the scan."""
        write, states, C = (
            at_least_fp32(seen[name]) for name in ("hook_ssm_write", "hook_ssm_state", "hook_ssm_C")
        )
        each = states.shape[2] // seen["hook_ssm_decay"].shape[2]
        decay = seen["hook_ssm_decay"].repeat_interleave(each, dim=2)[..., None]
        read = C.repeat_interleave(states.shape[2] // C.shape[2], dim=2)
        return ScanTerms(decay.expand_as(states), write, states, read)

    @classmethod
    def hooked_numbers(cls, cfg: Mamba2Config, n_pos: int, n_keys: int) -> dict[str, int]:  # noqa: ARG003
        """Return the numbers of writes and states of a row, and of its pairs of positions."""
        states = dict.fromkeys(("hook_ssm_write", "hook_ssm_state"), n_pos * cfg.d_inner)
        pairs = dict.fromkeys(("hook_ssm_scores", "hook_ssm_pattern"), cfg.n_heads * n_pos * n_pos)
        return {name: n * cfg.d_state for name, n in states.items()} | pairs

    def split(self, norm: RMSNorm | None) -> Split:  # noqa: ARG002
        """Return the output of each head; the output bias belongs to none."""
        n = self.cfg.n_heads
        results = Way(("mixer.hook_result",), as_they_are)
        gated = Way(("mixer.hook_gated",), lambda y: y.unflatten(-1, (n, -1)), lambda: self.W_O)
        return Split(n, (results, gated), self.out_proj.b)

    @property
    def A(self) -> Float[Tensor, " head"]:
        """The continuous decay rates, all negative, in fp32."""
        return -torch.exp(at_least_fp32(self.A_log))

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of each head, which writes `gated @ W_O`."""
        return self.out_proj.W.unflatten(0, (self.cfg.n_heads, -1))

    @property
    def section_scales(self) -> Float[Tensor, " d_projected"] | None:
        """The factor of each channel of the input projection; None if all are 1."""
        if not self._scales_sections(self.cfg):
            return None
        like = self.dt_bias
        parts = zip(self.cfg.sections, self.cfg.section_scales, strict=True)
        return torch.cat([like.new_full((width,), scale) for width, scale in parts])

    @staticmethod
    def _scales_sections(cfg: Mamba2Config) -> bool:
        return any(scale != 1 for scale in cfg.section_scales)

    # --- the parts of the forward ---------------------------------------------------------------

    def _project(self, x: Resid) -> Float[Tensor, "batch pos d_projected"]:
        x = x if self.cfg.in_scale == 1 else x * self.cfg.in_scale
        projected, scales = self.in_proj(x), self.section_scales
        return projected if scales is None else projected * scales

    def _recur(
        self,
        convolved: Float[Tensor, "batch pos d_convolved"],
        dt: PerHead,
        state: RecurrentState | None,
        layout: Layout,
    ) -> tuple[Inner, Float[Tensor, "batch d_inner d_state"]]:
        """Return y at every position and the last state; padding writes and forgets nothing."""
        cfg = self.cfg
        u, B, C = convolved.split(list(cfg.sections[1:4]), dim=-1)
        u = self.hook_ssm_input.branch(u)
        B = self.hook_ssm_B.branch(B.unflatten(-1, (cfg.n_groups, -1)))
        C = self.hook_ssm_C.branch(C.unflatten(-1, (cfg.n_groups, -1)))
        dt = softplus(self.hook_dt_proj(at_least_fp32(dt) + at_least_fp32(self.dt_bias)))
        if cfg.dt_min > 0 or cfg.dt_max is not None:
            dt = dt.clamp(cfg.dt_min, cfg.dt_max)
        dt = self.hook_ssm_dt(layout.zero_padding(dt), constrain=layout.zero_padding)
        # A step of 0 at padding writes nothing, except where values are not finite.
        u, B, C = (layout.zero_padding(at_least_fp32(t)) for t in (u, B, C))
        heads = u.unflatten(-1, (cfg.n_heads, -1))
        before = heads.new_zeros(len(u), cfg.d_inner, cfg.d_state) if state is None else state.ssm
        h0 = before.unflatten(1, (cfg.n_heads, -1))
        hooks = SSDHooks(
            self.hook_ssm_decay,
            self.hook_ssm_scores,
            self.hook_ssm_pattern,
            self.hook_ssm_write,
            self.hook_ssm_state,
        )
        y, h = hooked_ssd_scan(SSDTerms(heads, dt, self.A, B, C, h0), hooks, layout)
        skip = heads * at_least_fp32(self.D)[:, None]
        return (y + skip).flatten(2), h.flatten(1, 2)

    def _normalize(self, y: Inner, gate: Inner) -> Inner:
        """Return the gated output after its norm, in fp32 or wider."""
        if self.cfg.norm is None:
            return y * gate
        return self.norm(y * gate) if self.cfg.norm == "gate_first" else self.norm(y) * gate

    def _write(self, gated: Inner) -> Resid:
        if not self.hook_result.is_hooked:
            return self.out_proj(gated)
        heads = gated.unflatten(-1, (self.cfg.n_heads, -1))
        result = self.hook_result(torch.einsum("bshe,hed->bshd", heads, self.W_O)).sum(dim=2)
        return result if self.out_proj.b is None else result + self.out_proj.b
