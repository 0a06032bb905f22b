"""Softmax attention with every score, pattern and head output hookable.

MHA, MQA and GQA; an optional window of `n_keys` keys, the query itself included; optional partial
rotary positions. Position t of a row reads the keys of its own document at t and before it.

    q, k, v = x W_Q, x W_K, x W_V                    per head; q and k with an optional norm
    scores  = rot(q) . rot(k) / sqrt(d_head)         masked at keys that t may not see
    pattern = softmax(scores)                        fp32, then the model's dtype
    z       = pattern v;    out = sum_heads z W_O + b_O
"""

from __future__ import annotations

from types import MappingProxyType

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.config import AttentionConfig, QKNormConfig
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.attention.attend import Hooks, Sight, attend
from hooked_hybrid.network.attention.key_room import last_keys, with_new_keys
from hooked_hybrid.network.attention.working import kernel_bytes, working_bytes
from hooked_hybrid.network.block_state import AttentionState
from hooked_hybrid.network.costs import SOFTMAX, Flops, Piece, norm
from hooked_hybrid.network.layers import Linear, RMSNorm, rotate
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.mixers.base import Mixer
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.network.weights.factored import FactoredMatrix
from hooked_hybrid.network.weights.plain import as_matrix
from hooked_hybrid.network.written import Split, Way, as_they_are
from hooked_hybrid.shapes import Queries, Resid


class Attention(Mixer[AttentionState]):
    """Multi-head attention over the keys of the state and the new positions.

    Examples:
        >>> attn = model.blocks[2].attn
        >>> attn.kind, attn.W_Q.shape
        ('attention', torch.Size([8, 128, 16]))
    """

    config, kind, label, path = AttentionConfig, "attention", "attn", "attn"
    out_hooks, write_hook, grows = ("hook_attn_out",), "hook_attn_out", AttentionState.growing
    part_letter, scales_write = "H", True
    reads, writes = ("q.weight", "k.weight", "v.weight"), ("o.weight",)
    hooks_after_norm = ("hook_q_input", "hook_k_input", "hook_v_input")
    hook_meanings = MappingProxyType(
        {
            "hook_q_input": "each query head's own copy of the layer's input, after `ln1`",
            "hook_k_input": "each key-value head's own copy of it, for its keys",
            "hook_v_input": "each key-value head's own copy of it, for its values",
            "hook_q": "queries, before rotation",
            "hook_k": "keys, before rotation",
            "hook_v": "values",
            "hook_rot_q": "queries, rotated by their positions",
            "hook_rot_k": "keys, rotated by their positions, as stored in the state",
            "hook_attn_scores": "scaled and masked scores, before the softmax",
            "hook_pattern": "attention weights: the softmax of the scores over keys",
            "hook_z": "the values each head reads, weighted by its pattern",
            "hook_result": "what each head writes to the residual stream, without the output bias",
        }
    )

    def __init__(self, cfg: AttentionConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: AttentionConfig = cfg
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q = Linear(d_model, d_q, bias=cfg.qkv_bias)
        self.k = Linear(d_model, d_kv, bias=cfg.qkv_bias)
        self.v = Linear(d_model, d_kv, bias=cfg.qkv_bias)
        if cfg.qk_norm:
            self.q_norm = _head_norm(cfg.qk_norm, cfg.n_heads, cfg.d_head)
            self.k_norm = _head_norm(cfg.qk_norm, cfg.n_kv_heads, cfg.d_head)
        self.o = Linear(d_q, d_model, bias=cfg.out_bias, scale=cfg.write_scale)

        self.hook_q_input = HookPoint("batch pos head d_model", lazy=True, large=True)
        self.hook_k_input = HookPoint("batch pos kv_head d_model", lazy=True, large=True)
        self.hook_v_input = HookPoint("batch pos kv_head d_model", lazy=True, large=True)
        self.hook_q = HookPoint("batch pos head d_head")
        self.hook_k = HookPoint("batch pos kv_head d_head")
        self.hook_v = HookPoint("batch pos kv_head d_head")
        if cfg.rotary:
            self.hook_rot_q = HookPoint("batch pos head d_head")
            self.hook_rot_k = HookPoint("batch pos kv_head d_head")
        self.hook_attn_scores = HookPoint("batch head query key", lazy=True)
        self.hook_pattern = HookPoint("batch head query key", lazy=True)
        self.hook_z = HookPoint("batch pos head d_head")
        self.hook_result = HookPoint("batch pos head d_model", lazy=True, large=True)

    def forward(
        self, x: Resid, state: AttentionState | None, layout: Layout
    ) -> tuple[Resid, AttentionState]:
        """Return the layer's output, and the keys and values that later positions may see."""
        are_seen = state is None and self._keys_are_seen()
        q = self.hook_q(self._project(self.q, self.hook_q_input, x, self.cfg.n_heads))
        k = self.hook_k(self._project(self.k, self.hook_k_input, x, self.cfg.n_kv_heads))
        v = self.hook_v(self._project(self.v, self.hook_v_input, x, self.cfg.n_kv_heads))
        if self.cfg.qk_norm:
            q, k = self._normalize(self.q_norm, q), self._normalize(self.k_norm, k)
        if self.cfg.rotary:
            q = self.hook_rot_q(rotate(q, layout, self.cfg.rotary))
            k = self.hook_rot_k(rotate(k, layout, self.cfg.rotary))
        # Values at padding are never read: 0 times a value that is not finite is NaN.
        if layout.has_padding:
            q, k, v = (layout.zero_padding(t) for t in (q, k, v))
        keys = with_new_keys(state, k, v, layout.pos, are_seen)
        hooks = Hooks(self.hook_attn_scores, self.hook_pattern, self.hook_z)
        z = attend(q, keys.k, keys.v, Sight(layout, keys.pos, self.cfg.n_keys), hooks)
        return self._write(layout.detach_padding(z)), self._remember(keys, layout)

    # --- facts for the library ------------------------------------------------------------------

    @classmethod
    def state_shapes(cls, cfg: AttentionConfig) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the state's tensors, without batch and keys."""
        heads = (cfg.n_kv_heads, cfg.d_head)
        return {"k": heads, "v": heads, "pos": ()}

    @classmethod
    def window(cls, cfg: AttentionConfig) -> int | None:
        """Return how many keys a query sees, itself included; None for all before it."""
        return cfg.n_keys

    @classmethod
    def position_width(cls, cfg: AttentionConfig) -> int:
        """Return the cosines or sines of a position."""
        return cfg.rotary.d_rotary if cfg.rotary else 0

    @classmethod
    def operations(cls, cfg: AttentionConfig, d_model: int) -> dict[str, Flops]:
        """Return projections, biases and rotations of one token."""
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        biases = (d_q + 2 * d_kv) * cfg.qkv_bias + d_model * cfg.out_bias
        rotated = (cfg.n_heads + cfg.n_kv_heads) * cls.position_width(cfg)
        products = 2 * d_model * (2 * d_q + 2 * d_kv)
        norms = _norm_operations(cfg)
        return {cls.row: Flops(products, elementwise=biases + norms + 3 * rotated + d_model)}

    @classmethod
    def pair_operations(cls, cfg: AttentionConfig) -> Flops:
        """Return the operations of a query and a key: score, scale, softmax and weighted value."""
        return Flops(products=4 * cfg.n_heads * cfg.d_head, elementwise=cfg.n_heads * (1 + SOFTMAX))

    @classmethod
    def working_bytes(cls, cfg: AttentionConfig, d_model: int, piece: Piece) -> int:
        """Return the bytes of queries, keys and values, scores and patterns of a piece."""
        return working_bytes(cfg, d_model, piece)

    @classmethod
    def hooked_numbers(cls, cfg: AttentionConfig, n_pos: int, n_keys: int) -> dict[str, int]:
        """Return the numbers of scores and pattern of a row."""
        return dict.fromkeys(("hook_attn_scores", "hook_pattern"), cfg.n_heads * n_pos * n_keys)

    def kernel_bytes(
        self, layout: Layout, n_cached: int, piece: int, dtype: torch.dtype, device: torch.device
    ) -> int:
        """Return the bytes of masks and unfused scores inside torch's kernel."""
        if self.hook_attn_scores.is_hooked or self.hook_pattern.is_hooked:
            return 0  # scores outside the kernel are counted by `hooked_numbers`
        return kernel_bytes(self.cfg, layout, n_cached, piece, dtype, device)

    def split(self, norm: RMSNorm | None) -> Split:  # noqa: ARG002
        """Return the output of each head; `b_O` belongs to none."""
        results = Way(("attn.hook_result",), as_they_are)
        z = Way(("attn.hook_z",), as_they_are, lambda: self.W_O)
        return Split(self.cfg.n_heads, (results, z), self.b_O)

    # --- weights as circuits --------------------------------------------------------------------

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights of each head: `q = x @ W_Q`."""
        return rearrange(as_matrix(self.q.weight), "(h e) d -> h d e", h=self.cfg.n_heads)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights of each key-value head."""
        return rearrange(as_matrix(self.k.weight), "(h e) d -> h d e", h=self.cfg.n_kv_heads)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights of each key-value head."""
        return rearrange(as_matrix(self.v.weight), "(h e) d -> h d e", h=self.cfg.n_kv_heads)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of each head, which writes `z @ W_O`."""
        return rearrange(self.o.W, "(h e) d -> h e d", h=self.cfg.n_heads)

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        """Output bias, shared by the heads; None where the model has none."""
        return self.o.b

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T` [head d_model d_model] per query head, before rotation and scaling.

        Raises:
            NotSupported: queries and keys are normalised, so that no such matrix makes scores.
        """
        if self.cfg.qk_norm:
            raise NotSupported("queries and keys have norms: no one matrix W_Q W_K^T makes scores")
        return FactoredMatrix(self.W_Q, self._per_query_head(self.W_K).transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` [head d_model d_model] per query head."""
        return FactoredMatrix(self._per_query_head(self.W_V), self.W_O)

    # --- the parts of the forward ---------------------------------------------------------------

    def _project(
        self, linear: Linear, hook_input: HookPoint, x: Resid, n_heads: int
    ) -> Float[Tensor, "batch pos n_heads d_head"]:
        """Return `x W` split into heads; if hooked, each head reads its own copy of `x`."""
        if not hook_input.is_hooked:
            return linear(x).unflatten(-1, (n_heads, self.cfg.d_head))
        copies = hook_input(x[:, :, None].repeat(1, 1, n_heads, 1))
        weight = rearrange(as_matrix(linear.weight), "(h e) d -> h e d", h=n_heads)
        out = torch.einsum("bshd,hed->bshe", copies, weight)
        return out if linear.bias is None else out + linear.bias.view(n_heads, -1)

    def _normalize(self, over: RMSNorm, x: Queries) -> Queries:
        """Return queries or keys after their norm, per head or over all heads."""
        if self.cfg.qk_norm is not None and self.cfg.qk_norm.over == "head":
            return over(x)
        return over(x.flatten(-2)).unflatten(-1, x.shape[-2:])

    def _keys_are_seen(self) -> bool:
        """Whether a hook receives the tensors that the state would hold."""
        last_of_k = self.hook_rot_k if self.cfg.rotary else self.hook_k
        return self.hook_k.is_hooked or last_of_k.is_hooked or self.hook_v.is_hooked

    def _write(self, z: Queries) -> Resid:
        if not self.hook_result.is_hooked:
            return self.o(z.flatten(-2))
        result = self.hook_result(torch.einsum("bshe,hed->bshd", z, self.W_O)).sum(dim=2)
        return result if self.b_O is None else result + self.b_O

    def _remember(self, keys: AttentionState, layout: Layout) -> AttentionState:
        """Return the keys that a later token of each row's last document may see."""
        n = keys.k.shape[1] if self.cfg.n_keys is None else self.cfg.n_keys - 1
        docs = layout.key_docs(keys.k.shape[1] - layout.length)
        if docs is None and not layout.has_padding:
            return last_keys(keys, n)
        pos = keys.pos
        if docs is not None and layout.last_doc is not None:
            pos = pos.masked_fill(docs != layout.last_doc, -1)
        k, v, pos = (layout.last_real(t, pos >= 0, n) for t in (keys.k, keys.v, pos))
        gone = (pos < 0)[..., None, None]  # steps mask these, and must not read a NaN there
        return AttentionState(k.masked_fill(gone, 0), v.masked_fill(gone, 0), pos)

    def _per_query_head(self, W: Float[Tensor, "kv_head m n"]) -> Float[Tensor, "head m n"]:
        return W.repeat_interleave(self.cfg.n_heads // self.cfg.n_kv_heads, dim=0)


def _head_norm(cfg: QKNormConfig, n_heads: int, d_head: int) -> RMSNorm:
    if cfg.over == "head":
        return RMSNorm(d_head, cfg.norm, "batch pos head d_head")
    return RMSNorm(n_heads * d_head, cfg.norm, "batch pos d_heads")


def _norm_operations(cfg: AttentionConfig) -> int:
    """Return the operations of the norms on one token's queries and keys."""
    if cfg.qk_norm is None:
        return 0
    if cfg.qk_norm.over == "head":
        return (cfg.n_heads + cfg.n_kv_heads) * norm(cfg.d_head)
    return norm(cfg.n_heads * cfg.d_head) + norm(cfg.n_kv_heads * cfg.d_head)
