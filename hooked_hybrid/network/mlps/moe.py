"""Jamba's mixture of experts (Lieber et al. 2024): the top k of a softmax over all experts.

p       = softmax(x W_router)                       fp32, over all experts
weights = the n_chosen largest of p                 not renormalised
out     = sum_chosen weight_e down_e(act(gate_e x) * up_e x)
"""

from __future__ import annotations

from functools import partial
from types import MappingProxyType

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_hybrid.config import MoEConfig
from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.costs import ACTIVATION, SOFTMAX, Flops, Piece
from hooked_hybrid.network.elementwise import activate, times
from hooked_hybrid.network.kernels import grouped_experts
from hooked_hybrid.network.layers import Linear, RMSNorm, draw_normal
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mlps.base import MLP
from hooked_hybrid.network.plan import may_overwrite
from hooked_hybrid.network.weights.layout import empty_weight
from hooked_hybrid.network.weights.plain import Stored, as_matrix
from hooked_hybrid.network.weights.products import linear
from hooked_hybrid.network.written import Split, Way, weigh
from hooked_hybrid.shapes import Resid

Weights = Float[Tensor, "batch pos n_chosen"]
Indices = Int[Tensor, "batch pos n_chosen"]


class MoE(MLP):
    """A router and its experts, whose weights are stacked on a leading axis.

    Examples:
        >>> moe = jamba.blocks[1].mlp
        >>> moe.kind, moe.W_gate.shape
        ('moe', torch.Size([4, 128, 192]))
    """

    config, kind, title = MoEConfig, "moe", "experts"
    reads, writes = ("router.weight", "gate", "up"), ("down",)
    part_letter, scales_write = "E", True
    kept_plain = ("router.weight",)
    rows_apart = MappingProxyType({"router": "router"})
    matrices = ("gate", "up", "down")
    hook_meanings = MappingProxyType(
        {
            "hook_router_logits": "the router's logit of every expert",
            "hook_expert_weights": "softmax over all experts, of the chosen ones, not renormalized",
            "hook_expert_indices": "which experts are chosen, the largest share first",
            "hook_expert_post": "each chosen expert's product of gate and linear branch",
            "hook_expert_out": "each chosen expert's output, times its share",
        }
    )

    def __init__(self, cfg: MoEConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: MoEConfig = cfg
        self.router = Linear(d_model, cfg.n_experts, bias=False)
        self.gate: Stored = nn.Parameter(empty_weight(cfg.n_experts, cfg.d_mlp, d_model))
        self.up: Stored = nn.Parameter(empty_weight(cfg.n_experts, cfg.d_mlp, d_model))
        self.down: Stored = nn.Parameter(empty_weight(cfg.n_experts, d_model, cfg.d_mlp))
        self.hook_router_logits = HookPoint("batch pos n_experts")
        self.hook_expert_weights = HookPoint("batch pos n_chosen")
        self.hook_expert_indices = HookPoint("batch pos n_chosen", integer=True)
        self.hook_expert_post = HookPoint("batch pos n_chosen d_mlp", lazy=True, large=True)
        self.hook_expert_out = HookPoint("batch pos n_chosen d_model", lazy=True, large=True)

    def reset_parameters(self) -> None:
        """Draw experts from N(0, 1 / d_in)."""
        for weight in self.stacks or ():
            draw_normal(weight, std=weight.shape[-1] ** -0.5)

    @classmethod
    def operations(cls, cfg: MoEConfig, d_model: int) -> dict[str, Flops]:
        """Return the operations of the router over all experts and of the chosen experts."""
        router = Flops(
            products=2 * d_model * cfg.n_experts,
            elementwise=(SOFTMAX + cfg.n_chosen) * cfg.n_experts,
        )
        one = Flops(
            products=3 * 2 * d_model * cfg.d_mlp,
            elementwise=(ACTIVATION[cfg.act] + 1) * cfg.d_mlp + 2 * d_model,
        )
        experts = one * cfg.n_chosen + Flops(elementwise=d_model)
        return {cls.rows_apart["router"]: router, cls.row: experts}

    @classmethod
    def working_bytes(cls, cfg: MoEConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of the experts' inputs and values; on a CPU one expert runs at a time.

        One expert may receive every token; on a GPU all chosen experts run together.
        """
        at_once, copies = (1, 2) if piece.on_cpu else (cfg.n_chosen, 3)
        routed = piece.n * cfg.n_experts * (piece.width + piece.wide)
        inputs = piece.n * d_model * piece.width * (cfg.n_chosen + 1)
        a_token = (copies * cfg.d_mlp + 2 * d_model) * piece.width
        return routed + inputs + at_once * piece.n * a_token

    @classmethod
    def active_parameters(cls, cfg: MoEConfig, child: str, n: int) -> int:
        """Return how many parameters act on one token: the router's and the chosen experts'."""
        return n if child == "router" else n * cfg.n_chosen // cfg.n_experts

    def split(self, norm: RMSNorm | None) -> Split:
        """Return the output of each expert, zero if it was not chosen."""
        chosen = ("mlp.hook_expert_weights", "mlp.hook_expert_indices")
        read = "hook_mlp_in" if norm is None else "ln2.hook_normalized"
        ways = (
            Way(("mlp.hook_expert_out", chosen[1]), partial(_by_expert, self)),
            Way(("mlp.hook_expert_post", *chosen), partial(_from_post, self)),
            Way((read, *chosen), partial(_run, self, norm)),
        )
        return Split(self.cfg.n_experts, ways)

    @property
    def W_gate(self) -> Float[Tensor, "expert d_model d_mlp"]:
        """Gate weights of each expert."""
        return as_matrix(self.gate).mT

    @property
    def W_in(self) -> Float[Tensor, "expert d_model d_mlp"]:
        """Weights of each expert's linear branch."""
        return as_matrix(self.up).mT

    @property
    def W_out(self) -> Float[Tensor, "expert d_mlp d_model"]:
        """Output weights of each expert."""
        return self._scaled(as_matrix(self.down).mT)

    @property
    def stacks(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """Gate, up and down as stored; None if they are lists of quantised matrices."""
        stored = [w for w in (self.gate, self.up, self.down) if isinstance(w, Tensor)]
        return (stored[0], stored[1], stored[2]) if len(stored) == 3 else None

    def forward(self, x: Resid, layout: Layout) -> Resid:  # noqa: ARG002  (one signature for MLPs)
        """Return the weighted sum of the chosen experts' outputs."""
        weights, indices = self._route(x)
        if transforms.are_active():
            return self._run_all(x, weights, indices)
        if self.hook_expert_post.is_hooked or self.hook_expert_out.is_hooked:
            return self._run_hooked(x, weights, indices)
        if x.is_cuda and (stacks := self.stacks) and grouped_experts.usable(x, *stacks):
            out = grouped_experts.run_experts(x, weights, indices, *stacks, self.cfg.act)
        elif x.shape[:2].numel() == 1:
            out = self._run_one(x, weights, indices)
        else:
            out = self._run_sorted(x, weights, indices)
        return self._scaled(out)

    def _scaled(self, out: Tensor) -> Tensor:
        return out if self.cfg.write_scale == 1 else out * self.cfg.write_scale

    def asks_for_counts(self, x: Tensor) -> bool:
        """Return whether the host reads the number of tokens of each expert."""
        return not (self.stacks and grouped_experts.usable(x, *self.stacks))

    def _route(self, x: Resid) -> tuple[Weights, Indices]:
        """Return the chosen experts of each token and their shares."""
        wide = torch.promote_types(x.dtype, torch.float32)
        logits = self.hook_router_logits(self.router(x))
        shares, indices = logits.softmax(-1, dtype=wide).topk(self.cfg.n_chosen, dim=-1)
        weights = self.hook_expert_weights(shares.to(x.dtype))
        is_edited = self.hook_expert_indices.has_editors
        indices = self.hook_expert_indices(indices)
        return weights, self._checked(indices) if is_edited else indices

    def _run_sorted(self, x: Resid, weights: Weights, indices: Indices) -> Resid:
        """Return the sum, running each expert once on all tokens that chose it."""
        flat, (experts, slots) = x.flatten(0, 1), indices.flatten().sort(stable=True)
        tokens = slots // self.cfg.n_chosen
        counts = torch.bincount(experts, minlength=self.cfg.n_experts).tolist()
        inputs, shares = flat[tokens].split(counts), weights.reshape(-1, 1)[slots].split(counts)
        out = torch.zeros_like(flat)
        for expert, chosen in enumerate(tokens.split(counts)):
            if not counts[expert]:
                continue
            written = linear(self.activations_of(inputs[expert], expert), self.down[expert])
            written = times(written.to(x.dtype), shares[expert], may_overwrite())
            add = out.index_add_ if may_overwrite() else out.index_add
            out = add(0, chosen, written)
        return out.view_as(x)

    def _run_one(self, x: Resid, weights: Weights, indices: Indices) -> Resid:
        """Return the sum for a single token, without sorting."""
        chosen = zip(indices.flatten().tolist(), weights.flatten().unbind(), strict=True)
        parts = ((linear(self.activations_of(x, e), self.down[e]), s) for e, s in chosen)
        written = [part.to(x.dtype) * scale for part, scale in parts]
        return torch.stack(written).sum(0)

    def _run_hooked(self, x: Resid, weights: Weights, indices: Indices) -> Resid:
        """Return the sum through each chosen expert's own values: the definition."""
        post = x.new_zeros(*indices.shape, self.cfg.d_mlp)
        for expert in indices.unique().tolist():
            b, s, slot = (indices == expert).nonzero(as_tuple=True)
            post = post.index_put((b, s, slot), self.activations_of(x[b, s], expert).to(x.dtype))
        post = self.hook_expert_post(post)
        out = x.new_zeros(*indices.shape, x.shape[-1])
        for expert in indices.unique().tolist():
            b, s, slot = (indices == expert).nonzero(as_tuple=True)
            written = linear(post[b, s, slot], self.down[expert])
            out = out.index_put((b, s, slot), written.to(x.dtype))
        return self.hook_expert_out(self._scaled(out * weights[..., None])).sum(dim=2)

    def _run_all(self, x: Resid, weights: Weights, indices: Indices) -> Resid:
        """Compute the same as `_run_hooked` by every expert on every token, without indexing."""
        is_chosen = [(indices == expert)[..., None] for expert in range(self.cfg.n_experts)]
        post = x.new_zeros(*indices.shape, self.cfg.d_mlp)
        for expert, here in enumerate(is_chosen):
            post = torch.where(here, self.activations_of(x, expert)[:, :, None].to(x.dtype), post)
        post = self.hook_expert_post(post)
        out = x.new_zeros(*indices.shape, x.shape[-1])
        for expert, here in enumerate(is_chosen):
            out = torch.where(here, linear(post, self.down[expert]).to(x.dtype), out)
        return self.hook_expert_out(self._scaled(out * weights[..., None])).sum(dim=2)

    def activations_of(
        self, x: Float[Tensor, "*token d_model"], expert: int
    ) -> Float[Tensor, "*token d_mlp"]:
        """Return one expert's activations, which its down projection reads."""
        act = activate(linear(x, self.gate[expert]), self.cfg.act, may_overwrite())
        return times(act, linear(x, self.up[expert]), may_overwrite())

    def _checked(self, indices: Indices) -> Indices:
        low, high = (int(v) for v in torch.aminmax(transforms.plain_rows(indices)))
        if low < 0 or high >= self.cfg.n_experts:
            raise ValueError(
                f"a hook on {self.hook_expert_indices.name!r} chose experts {low} to {high}; "
                f"there are {self.cfg.n_experts}, from 0"
            )
        return indices


def _by_expert(
    moe: MoE,
    written: Float[Tensor, "*batch_pos n_chosen d_model"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return the outputs of the chosen experts, indexed by the number of the expert."""
    empty = written.new_zeros(*indices.shape[:-1], moe.cfg.n_experts, written.shape[-1])
    return empty.scatter_add(-2, indices[..., None].expand_as(written), written)


def _from_post(
    moe: MoE,
    post: Float[Tensor, "*batch_pos n_chosen d_mlp"],
    weights: Float[Tensor, "*batch_pos n_chosen"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return each expert's output from its values after the nonlinearity."""
    down = as_matrix(moe.down)
    written = post.new_zeros(*indices.shape, down.shape[1])
    for expert in indices.unique().tolist():
        at = (indices == expert).nonzero(as_tuple=True)
        written[at] = linear(post[at], down[expert].to(post.device)) * weights[at][:, None]
    return _by_expert(moe, written * moe.cfg.write_scale, indices)


def _run(
    moe: MoE,
    norm: RMSNorm | None,
    normalized: Float[Tensor, "*batch_pos d_model"],
    weights: Float[Tensor, "*batch_pos n_chosen"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return each expert's output, by running the chosen ones again on the mixture's input."""
    down = as_matrix(moe.down)
    device = down.device
    x = normalized.to(device)
    x = x.to(down.dtype) if norm is None else weigh(norm, x, down.dtype)
    post = x.new_zeros(*indices.shape, moe.cfg.d_mlp)
    for expert in indices.unique().tolist():
        at = (indices == expert).to(device).nonzero(as_tuple=True)
        post[at] = moe.activations_of(x[at[:-1]], expert)
    return _from_post(moe, post.to(weights.device), weights, indices)
