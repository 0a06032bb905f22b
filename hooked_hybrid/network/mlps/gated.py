"""The gated MLP: `down(act(x W_gate) * (x W_in))`."""

from __future__ import annotations

from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.config import GatedMLPConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.costs import ACTIVATION, Flops, Piece
from hooked_hybrid.network.elementwise import activate, times
from hooked_hybrid.network.layers import Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mlps.base import MLP
from hooked_hybrid.network.plan import may_overwrite
from hooked_hybrid.network.written import Split, Way
from hooked_hybrid.shapes import Resid


class GatedMLP(MLP):
    """GeGLU or SwiGLU, depending on the config's activation.

    Examples:
        >>> mlp = model.blocks[0].mlp
        >>> mlp.kind, mlp.W_gate.shape
        ('mlp', torch.Size([128, 256]))
    """

    config, kind, title = GatedMLPConfig, "mlp", "MLP"
    part_letter, scales_write = "N", True
    reads, writes = ("gate.weight", "up.weight"), ("down.weight",)
    hook_meanings = MappingProxyType(
        {
            "hook_pre": "the gate, before its nonlinearity",
            "hook_act": "the gate, after its nonlinearity",
            "hook_pre_linear": "the linear branch",
            "hook_post": "the product of the two, the input of the output map",
        }
    )

    def __init__(self, cfg: GatedMLPConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: GatedMLPConfig = cfg
        self.gate = Linear(d_model, cfg.d_mlp, bias=cfg.bias)
        self.up = Linear(d_model, cfg.d_mlp, bias=cfg.bias)
        self.down = Linear(cfg.d_mlp, d_model, bias=cfg.bias, scale=cfg.write_scale)
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_act = HookPoint("batch pos d_mlp")
        self.hook_pre_linear = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")

    def split(self, norm: RMSNorm | None) -> Split:  # noqa: ARG002
        """Return the output of each neuron; the output bias belongs to none."""
        post = Way(("mlp.hook_post",), lambda x: x[..., None], lambda: self.W_out[:, None])
        return Split(self.cfg.d_mlp, (post,), self.down.b)

    @property
    def W_gate(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the gate."""
        return self.gate.W

    @property
    def W_in(self) -> Float[Tensor, "d_model d_mlp"]:
        """Weights of the linear branch."""
        return self.up.W

    @property
    def W_out(self) -> Float[Tensor, "d_mlp d_model"]:
        """Output weights."""
        return self.down.W

    @classmethod
    def operations(cls, cfg: GatedMLPConfig, d_model: int) -> dict[str, Flops]:
        """Return the operations of one token."""
        biases = (2 * cfg.d_mlp + d_model) * cfg.bias
        flops = Flops(
            products=3 * 2 * d_model * cfg.d_mlp,
            elementwise=(ACTIVATION[cfg.act] + 1) * cfg.d_mlp + biases + d_model,
        )
        return {cls.row: flops}

    @classmethod
    def working_bytes(cls, cfg: GatedMLPConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of gate and linear branch, the nonlinearity, and the output."""
        copies = 2 if cfg.act == "silu" or piece.on_cpu else 3
        return piece.n * (copies * cfg.d_mlp + d_model) * piece.width

    def forward(self, x: Resid, layout: Layout) -> Resid:  # noqa: ARG002  (experts need it)
        """Return the MLP's output."""
        is_ours = may_overwrite(self.hook_pre)
        pre = self.hook_pre(self.gate(x))
        act = activate(pre, self.cfg.act, is_ours)
        is_ours = is_ours and may_overwrite(self.hook_act)
        act = self.hook_act(act)
        post = times(act, self.hook_pre_linear(self.up(x)), is_ours)
        return self.down(self.hook_post(post))
