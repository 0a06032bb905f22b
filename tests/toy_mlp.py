"""An MLP that the library does not know: `down(relu(x W_up)^2)`, without a gate."""

from __future__ import annotations

from dataclasses import dataclass

from hooked_hybrid.config import MLPConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.costs import Flops, Piece
from hooked_hybrid.network.layers import Linear, RMSNorm
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mlps import MLP, register_mlp
from hooked_hybrid.network.written import Split, Way
from hooked_hybrid.shapes import Resid


@dataclass(frozen=True)
class SquaredConfig(MLPConfig):
    """`d_mlp` neurons."""

    d_mlp: int


class SquaredMLP(MLP):
    """A squared ReLU between two linear maps."""

    config, kind, title = SquaredConfig, "squared", "squared MLP"
    reads, writes = ("up.weight",), ("down.weight",)
    part_letter, scales_write = "N", True

    def __init__(self, cfg: SquaredConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.up = Linear(d_model, cfg.d_mlp, bias=False)
        self.down = Linear(cfg.d_mlp, d_model, bias=True, scale=cfg.write_scale)
        self.hook_pre = HookPoint("batch pos d_mlp")
        self.hook_relu = HookPoint("batch pos d_mlp")
        self.hook_post = HookPoint("batch pos d_mlp")

    def forward(self, x: Resid, layout: Layout) -> Resid:
        """Return the MLP's write."""
        return self.down(self.hook_post(self.hook_relu(self.hook_pre(self.up(x)).relu()).square()))

    @classmethod
    def operations(cls, cfg: SquaredConfig, d_model: int) -> dict[str, Flops]:
        """Return two products, the square of the larger of x and 0, bias and sum of the stream."""
        return {
            cls.row: Flops(2 * 2 * d_model * cfg.d_mlp, elementwise=2 * cfg.d_mlp + 2 * d_model)
        }

    @classmethod
    def working_bytes(cls, cfg: SquaredConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of the neurons before and after, and of what is written."""
        return piece.n * (3 * cfg.d_mlp + d_model) * piece.width

    def split(self, norm: RMSNorm | None) -> Split:
        """Return what each neuron writes; the output bias is left over."""
        post = Way(("mlp.hook_post",), lambda x: x[..., None], lambda: self.down.W[:, None])
        return Split(self.cfg.d_mlp, (post,), self.down.b)


register_mlp(SquaredMLP)
