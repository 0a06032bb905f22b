"""Softmax attention with every score, pattern and head output hookable.

MHA, MQA and GQA; an optional window of `n_keys` keys, the query itself included; optional partial
rotary positions. Position t of a row reads the keys of its own document at t and before it.

    q, k, v = x W_Q, x W_K, x W_V                    per head
    scores  = rot(q) . rot(k) / sqrt(d_head)         masked outside what t may see
    pattern = softmax(scores)                        fp32, then the model's dtype
    z       = pattern v;    out = sum_heads z W_O + b_O
"""

from __future__ import annotations

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.factored_matrix import FactoredMatrix
from hooked_hybrid.hooks import HookPoint
from hooked_hybrid.layers import Linear, rotate
from hooked_hybrid.layout import Layout
from hooked_hybrid.mixers.base import Mixer
from hooked_hybrid.shapes import KeysValues, Mask, Pattern, Queries, Resid
from hooked_hybrid.state import AttentionState

NewKeysValues = Float[Tensor, "batch pos kv_head d_head"]


class Attention(Mixer[AttentionState]):
    """Multi-head attention over what the state remembers and the new positions."""

    path = "attn"

    def __init__(self, cfg: AttentionConfig, d_model: int) -> None:
        super().__init__(cfg, d_model)
        self.cfg: AttentionConfig = cfg
        d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
        self.q = Linear(d_model, d_q, bias=cfg.qkv_bias)
        self.k = Linear(d_model, d_kv, bias=cfg.qkv_bias)
        self.v = Linear(d_model, d_kv, bias=cfg.qkv_bias)
        self.o = Linear(d_q, d_model, bias=cfg.out_bias)

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
        """Return what the heads write, and the keys and values that later positions may see."""
        q = self.hook_q(self._project(self.q, self.hook_q_input, x, self.cfg.n_heads))
        k = self.hook_k(self._project(self.k, self.hook_k_input, x, self.cfg.n_kv_heads))
        v = self.hook_v(self._project(self.v, self.hook_v_input, x, self.cfg.n_kv_heads))
        if self.cfg.rotary:
            pos = layout.pos.clamp_min(0)
            q = self.hook_rot_q(rotate(q, pos, self.cfg.rotary))
            k = self.hook_rot_k(rotate(k, pos, self.cfg.rotary))
        k, v, key_pos = self._with_cached(k, v, layout.pos, state)
        mask = self._visible(key_pos, layout)
        if self.hook_attn_scores.is_hooked or self.hook_pattern.is_hooked:
            z = self._attend_hooked(q, k, v, mask, key_pos, layout)
        else:
            z = self._attend_fused(q, k, v, mask)
        return self._write(self.hook_z(z)), self._remember(k, v, key_pos, layout)

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of this layer's state, without batch and keys."""
        heads = (self.cfg.n_kv_heads, self.cfg.d_head)
        return {"k": heads, "v": heads, "pos": ()}

    # --- weights as circuits --------------------------------------------------------------------

    @property
    def W_Q(self) -> Float[Tensor, "head d_model d_head"]:
        """Query weights of each head: `q = x @ W_Q`."""
        return rearrange(self.q.weight, "(h e) d -> h d e", h=self.cfg.n_heads)

    @property
    def W_K(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Key weights of each key-value head."""
        return rearrange(self.k.weight, "(h e) d -> h d e", h=self.cfg.n_kv_heads)

    @property
    def W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        """Value weights of each key-value head."""
        return rearrange(self.v.weight, "(h e) d -> h d e", h=self.cfg.n_kv_heads)

    @property
    def W_O(self) -> Float[Tensor, "head d_head d_model"]:
        """Output weights of each head: what it writes is `z @ W_O`."""
        return rearrange(self.o.weight, "d (h e) -> h e d", h=self.cfg.n_heads)

    @property
    def b_O(self) -> Float[Tensor, " d_model"] | None:
        """Output bias, shared by the heads; None where the model has none."""
        return self.o.bias

    @property
    def QK(self) -> FactoredMatrix:
        """`W_Q W_K^T` [head d_model d_model] per query head, before rotation and scaling."""
        return FactoredMatrix(self.W_Q, self._per_query_head(self.W_K).transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """`W_V W_O` [head d_model d_model] per query head."""
        return FactoredMatrix(self._per_query_head(self.W_V), self.W_O)

    # --- the parts of the forward ---------------------------------------------------------------

    def _project(
        self, linear: Linear, hook_input: HookPoint, x: Resid, n_heads: int
    ) -> Float[Tensor, "batch pos n_heads d_head"]:
        """Return `x W` split into heads; hooked, each head reads its own copy of `x`."""
        if not hook_input.is_hooked:
            return linear(x).unflatten(-1, (n_heads, self.cfg.d_head))
        copies = hook_input(x[:, :, None].repeat(1, 1, n_heads, 1))
        weight = rearrange(linear.weight, "(h e) d -> h e d", h=n_heads)
        out = torch.einsum("bshd,hed->bshe", copies, weight)
        return out if linear.bias is None else out + linear.bias.view(n_heads, -1)

    @staticmethod
    def _with_cached(
        k: NewKeysValues,
        v: NewKeysValues,
        pos: Int[Tensor, "batch pos"],
        state: AttentionState | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        if state is None:
            return k, v, pos
        return (
            torch.cat([state.k, k], dim=1),
            torch.cat([state.v, v], dim=1),
            torch.cat([state.pos, pos], dim=1),
        )

    def _visible(self, key_pos: Int[Tensor, "batch key"], layout: Layout) -> Mask:
        """Return True where the query may see the key; one row for all where rows are alike."""
        q_pos, k_pos = (layout.pos[:1], key_pos[:1]) if layout.is_plain else (layout.pos, key_pos)
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        mask = distance >= 0
        if self.cfg.n_keys is not None:
            mask &= distance < self.cfg.n_keys
        if layout.is_plain:
            return mask
        mask &= (k_pos >= 0)[:, None, :]
        docs = layout.key_docs(key_pos.shape[1] - layout.length)
        if docs is not None and layout.doc is not None:
            mask &= layout.doc[:, :, None] == docs[:, None, :]
        return mask

    def _attend_fused(self, q: Queries, k: KeysValues, v: KeysValues, mask: Mask) -> Queries:
        """Return z without materialising scores; the fast twin of `_attend_hooked`."""
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        grouped = self.cfg.n_heads != self.cfg.n_kv_heads
        z = scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None], enable_gqa=grouped)
        return z.transpose(1, 2)

    def _attend_hooked(
        self,
        q: Queries,
        k: KeysValues,
        v: KeysValues,
        mask: Mask,
        key_pos: Int[Tensor, "batch key"],
        layout: Layout,
    ) -> Queries:
        """Return z through scores and pattern, with their hooks: the definition of attention."""
        run = layout.run.with_keys(key_pos)
        lowest = torch.finfo(q.dtype).min
        hidden = ~mask[:, None]
        grouped_q = rearrange(q, "b q (kv g) e -> b kv g q e", kv=self.cfg.n_kv_heads)
        grouped_k = rearrange(k, "b k kv e -> b kv 1 k e")
        scores = (grouped_q @ grouped_k.transpose(-1, -2)).flatten(1, 2) * self.cfg.d_head**-0.5
        scores = self.hook_attn_scores(
            scores.masked_fill(hidden, lowest), lambda s: s.masked_fill(hidden, lowest), run
        )
        pattern = self.hook_pattern(
            softmax_or_zero(scores), lambda p: p.masked_fill(hidden, 0), run
        )
        grouped_p = pattern.unflatten(1, (self.cfg.n_kv_heads, -1))
        grouped_v = rearrange(v, "b k kv e -> b kv 1 k e")
        return rearrange(grouped_p @ grouped_v, "b kv g q e -> b q (kv g) e")

    def _write(self, z: Queries) -> Resid:
        if not self.hook_result.is_hooked:
            return self.o(z.flatten(-2))
        result = self.hook_result(torch.einsum("bshe,hed->bshd", z, self.W_O)).sum(dim=2)
        return result if self.b_O is None else result + self.b_O

    def _remember(
        self, k: KeysValues, v: KeysValues, key_pos: Int[Tensor, "batch key"], layout: Layout
    ) -> AttentionState:
        """Return the keys that a later token of each row's last document may see."""
        docs = layout.key_docs(key_pos.shape[1] - layout.length)
        if docs is not None and layout.last_doc is not None:
            key_pos = key_pos.masked_fill(docs != layout.last_doc, -1)
        n = key_pos.shape[1] if self.cfg.n_keys is None else self.cfg.n_keys - 1
        is_real = key_pos >= 0
        kept = (layout.last_real(t, is_real, n) for t in (k, v, key_pos))
        return AttentionState(*kept)

    def _per_query_head(self, W: Float[Tensor, "kv_head m n"]) -> Float[Tensor, "head m n"]:
        return W.repeat_interleave(self.cfg.n_heads // self.cfg.n_kv_heads, dim=0)


def softmax_or_zero(scores: Pattern) -> Pattern:
    """Return the softmax over keys in fp32, and zeros in rows whose every score is masked.

    A score at or below the lowest finite value of its dtype counts as masked, so that a hook may
    knock an edge out with minus infinity too.
    """
    lowest = torch.finfo(scores.dtype).min
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.clamp_min(lowest).softmax(dim=-1, dtype=wide).to(scores.dtype)
    return pattern.masked_fill(scores <= lowest, 0)
