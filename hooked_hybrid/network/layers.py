"""The modules that all layers are built from: projections, norms, embedding, convolution."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig, NormConfig, RotaryConfig
from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.network.component import Component
from hooked_hybrid.network.elementwise import at_least_fp32, inverse_rms
from hooked_hybrid.network.kernels import causal_conv1d
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.plan import may_overwrite
from hooked_hybrid.network.weights.layout import empty_weight
from hooked_hybrid.network.weights.plain import as_matrix
from hooked_hybrid.network.weights.products import linear
from hooked_hybrid.shapes import Logits, Resid, Tokens

INIT_STD = 0.02


def draw_normal(weight: Tensor, std: float) -> None:
    """Draw a weight from N(0, std^2), with the same values for every memory layout."""
    with torch.no_grad():
        weight.copy_(
            torch.empty(weight.shape, dtype=weight.dtype, device=weight.device).normal_(0, std)
        )


class Linear(Component):
    """`(x @ weight^T + bias) * scale`, which is `x @ W + b` with both scaled."""

    matrices = ("weight",)

    def __init__(self, d_in: int, d_out: int, bias: bool, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(empty_weight(d_out, d_in))
        self.bias = nn.Parameter(torch.empty(d_out)) if bias else None
        self.scale = scale

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1 / d_in); the bias is zero."""
        draw_normal(self.weight, std=self.weight.shape[1] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    @property
    def W(self) -> Float[Tensor, "d_in d_out"]:
        """The matrix as used: `x @ W`."""
        W = as_matrix(self.weight).T
        return W if self.scale == 1 else W * self.scale

    @property
    def b(self) -> Float[Tensor, " d_out"] | None:
        """The bias as used, or None."""
        return self.bias if self.bias is None or self.scale == 1 else self.bias * self.scale

    def forward(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_out"]:
        """Return `x @ W + b`; the scale is applied to the sum, as the references do."""
        out = linear(x, self.weight, self.bias)
        return out if self.scale == 1 else out * self.scale


class BlockDiagonalLinear(Component):
    """A linear map that keeps blocks of channels apart: `W` is [gate_block, in, out]."""

    def __init__(self, n_blocks: int, width: int) -> None:
        super().__init__()
        d_block = width // n_blocks
        self.weight = nn.Parameter(torch.empty(n_blocks, d_block, d_block))
        self.bias = nn.Parameter(torch.empty(n_blocks, d_block))

    def reset_parameters(self) -> None:
        """Draw the weight from N(0, 1 / d_block); the bias is zero."""
        nn.init.normal_(self.weight, std=self.weight.shape[1] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, x: Float[Tensor, "batch pos d_rnn"]) -> Float[Tensor, "batch pos d_rnn"]:
        """Return each block of channels times its own matrix."""
        n_blocks, d_block = self.bias.shape
        if x.shape[0] * x.shape[1] == 1:
            bias = self.bias.view(n_blocks, 1, d_block)
            return torch.baddbmm(bias, x.view(n_blocks, 1, d_block), self.weight).view(x.shape)
        blocks = x.reshape(-1, n_blocks, d_block).transpose(0, 1)
        out = torch.baddbmm(self.bias[:, None], blocks, self.weight)
        return out.transpose(0, 1).reshape(x.shape)


class RMSNorm(Component):
    """Root-mean-square norm, `x / hook_scale * weight`.

    The sum of squares is taken in fp32. Style "one_plus_weight" (RecurrentGemma in transformers)
    multiplies by `1 + weight` in fp32 and rounds once, afterwards; style "weight" (Llama, Jamba)
    rounds before the product. Google's code uses the model's dtype throughout: its result is equal
    in fp32, and differs by a rounding in bf16.
    """

    def __init__(self, width: int, cfg: NormConfig, axes: str = "batch pos d_model") -> None:
        super().__init__()
        self.eps = cfg.eps
        self.adds_one = cfg.style == "one_plus_weight"
        self.weight = nn.Parameter(torch.empty(width))
        self.hook_scale = HookPoint(f"{axes.rpartition(' ')[0]} 1")
        self.hook_normalized = HookPoint(axes)

    def reset_parameters(self) -> None:
        """Set the weight so that it has no effect."""
        nn.init.constant_(self.weight, 0.0 if self.adds_one else 1.0)

    @property
    def is_hooked(self) -> bool:
        """Whether anything is attached to its points."""
        return self.hook_scale.is_hooked or self.hook_normalized.is_hooked

    @property
    def w(self) -> Float[Tensor, " width"]:
        """The factor that multiplies the normalised values, fp32 where one is added to it."""
        return 1 + at_least_fp32(self.weight) if self.adds_one else self.weight

    def forward(self, x: Float[Tensor, "... width"]) -> Float[Tensor, "... width"]:
        """Return the normalised and weighted values in the dtype of `x`."""
        wide = at_least_fp32(x)
        inverse = inverse_rms(wide, self.eps)
        if self.hook_scale.is_hooked:
            inverse = self.hook_scale(inverse.reciprocal()).reciprocal()
        normalized = wide * inverse
        if not self.adds_one:
            normalized = normalized.to(x.dtype)
        normalized = self.hook_normalized(normalized)
        if self.adds_one:  # n + n w
            weight = at_least_fp32(self.weight)
            out = torch.addcmul(normalized, normalized, weight)
            return out if out.dtype == x.dtype else out.to(x.dtype)
        return normalized * self.weight


class InnerNorm(Component):
    """A root-mean-square norm inside a mixer; the mixer has the hook point of its result."""

    def __init__(self, width: int, eps: float, has_weight: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width)) if has_weight else None

    def reset_parameters(self) -> None:
        """Set the weight so that it has no effect."""
        if self.weight is not None:
            nn.init.ones_(self.weight)

    def forward(self, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos width"]:
        """Return the normalised values, rounded to the dtype of `x`, times the weight if any."""
        wide = at_least_fp32(x)
        normalized = (wide * inverse_rms(wide, self.eps)).to(x.dtype)
        return normalized if self.weight is None else normalized * self.weight


class Embed(Component):
    """Rows of `W_E`, times `embedding_scale`, or sqrt(d_model) rounded to bfloat16.

    The rounding is part of the published models in every dtype: sqrt(2560) = 50.596 is 50.5.
    """

    def __init__(self, cfg: HybridConfig) -> None:
        super().__init__()
        tied = cfg.tied_embedding
        shape = (cfg.d_vocab, cfg.d_model)
        self.W_E = nn.Parameter(empty_weight(*shape) if tied else torch.empty(shape))
        self.matrices = ("W_E",) if tied else ()
        root = torch.tensor(cfg.d_model**0.5, device="cpu").bfloat16().item()
        scale = root if cfg.scale_embedding else cfg.embedding_scale
        self.scale = None if scale == 1 else scale

    def reset_parameters(self) -> None:
        """Draw embeddings so that the residual stream starts with entries of order one."""
        draw_normal(self.W_E, std=1.0 if self.scale is None else 1 / self.scale)

    def forward(self, tokens: Tokens) -> Resid:
        """Return the embedding of each token."""
        # With the vocabulary contiguous, it is faster to read one channel of all tokens at a time.
        along_vocab = self.W_E.stride(0) == 1 and not transforms.is_followed()
        x = _columns(self.W_E.T, tokens) if along_vocab else self.W_E[tokens]
        return x if self.scale is None else x * self.scale


class Unembed(Component):
    """`soft_cap(x @ weight^T * scale)`; `weight` is None if the embedding is used for it."""

    matrices = ("weight",)

    def __init__(self, cfg: HybridConfig) -> None:
        super().__init__()
        self.soft_cap, self.scale = cfg.logits_soft_cap, cfg.logits_scale
        self.weight = (
            None if cfg.tied_embedding else nn.Parameter(empty_weight(cfg.d_vocab, cfg.d_model))
        )
        self.hook_logits = HookPoint("batch pos d_vocab")

    def reset_parameters(self) -> None:
        """Draw an untied unembedding from N(0, 1 / d_model)."""
        if self.weight is not None:
            draw_normal(self.weight, std=self.weight.shape[1] ** -0.5)

    def forward(self, x: Resid, W_E: Float[Tensor, "d_vocab d_model"], run: Run) -> Logits:
        """Return logits, `cap * tanh(logits / cap)` under a cap; `run` is of these positions."""
        weight = W_E if self.weight is None else self.weight
        is_ours = may_overwrite(self.hook_logits)
        logits = linear(x, weight)
        if self.scale != 1:
            logits = logits * self.scale
        logits = self.hook_logits(logits, run=run)
        if self.soft_cap is None:
            return logits
        if is_ours:
            return logits.div_(self.soft_cap).tanh_().mul_(self.soft_cap)
        return self.soft_cap * torch.tanh(logits / self.soft_cap)


class CausalConv1d(Component):
    """Depthwise convolution over the last `d_conv` positions; the last tap is the current one."""

    def __init__(self, d_conv: int, channels: int, bias: bool = True) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(d_conv, channels))
        self.bias = nn.Parameter(torch.empty(channels)) if bias else None

    def reset_parameters(self) -> None:
        """Draw taps from N(0, 1 / d_conv); the bias is zero."""
        nn.init.normal_(self.weight, std=self.weight.shape[0] ** -0.5)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def initial_state(
        self, u: Float[Tensor, "batch pos channel"]
    ) -> Float[Tensor, "batch tap channel"]:
        """Return the zeros that precede a sequence."""
        return u.new_zeros(u.shape[0], self.weight.shape[0] - 1, u.shape[2])

    def forward(
        self,
        u: Float[Tensor, "batch pos channel"],
        state: Float[Tensor, "batch tap channel"],
        layout: Layout,
    ) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch tap channel"]]:
        """Return `b + sum_j w_j u_{t-j}` and the inputs that later positions need.

        Inputs of other documents and at padding are not read.
        """
        n_past = state.shape[1]
        if layout.doc is None and not layout.has_padding:
            if u.is_cuda and causal_conv1d.usable(u, state, self.weight, self.bias):
                return causal_conv1d.convolve(u, state, self.weight, self.bias)
            inputs = torch.cat([state, u], dim=1)
            if u.shape[1] == 1:
                return self._one(inputs), inputs[:, 1:]
            return self._taps(inputs, None), layout.last_real(inputs, None, n_past)
        is_real = torch.cat([layout.is_real.new_ones(u.shape[0], n_past), layout.is_real], dim=1)
        docs = layout.key_docs(n_past)
        after = layout.last_real(torch.cat([state, u], dim=1), is_real, n_past)
        if docs is not None and layout.last_doc is not None:
            other = layout.last_real(docs, is_real, n_past) != layout.last_doc
            after = after.masked_fill(other[..., None], 0)
        if not layout.has_padding:
            return self._taps(torch.cat([state, u], dim=1), docs), after
        # Left padding in a continued row must not come between its tokens and the state.
        order = (~layout.is_real).int().argsort(dim=1, stable=True)
        packed = u.gather(1, order[..., None].expand_as(u))
        if docs is not None:
            docs = torch.cat([docs[:, :n_past], docs[:, n_past:].gather(1, order)], dim=1)
        y = self._taps(torch.cat([state, packed], dim=1), docs)
        return y.gather(1, order.argsort(dim=1)[..., None].expand_as(y)), after

    def _one(self, inputs: Float[Tensor, "batch tap channel"]) -> Float[Tensor, "batch 1 channel"]:
        """Return the last position alone."""
        y = (inputs * self.weight).sum(1, keepdim=True)
        return y if self.bias is None else y + self.bias

    def _taps(
        self,
        inputs: Float[Tensor, "batch n channel"],
        docs: Int[Tensor, "batch n"] | None,
    ) -> Float[Tensor, "batch pos channel"]:
        n_taps = self.weight.shape[0]
        n_pos = inputs.shape[1] - (n_taps - 1)
        bias = inputs.new_zeros(()) if self.bias is None else self.bias
        # Oldest tap first, with fused products: bit for bit the result of conv1d on a CPU.
        y = bias.expand(inputs.shape[0], n_pos, inputs.shape[2])
        for tap in range(n_taps):
            x = inputs[:, tap : tap + n_pos]
            if docs is not None:
                same = docs[:, tap : tap + n_pos] == docs[:, n_taps - 1 :]
                x = x.masked_fill(~same[..., None], 0)
            out = y if tap and may_overwrite() else None
            y = torch.addcmul(y, x, self.weight[tap], out=out)
        return y


def _columns(W: Float[Tensor, "d_model d_vocab"], tokens: Tokens) -> Resid:
    return W.index_select(1, tokens.flatten()).T.contiguous().unflatten(0, tokens.shape)


class Rotation(NamedTuple):
    """Rotates channels x at some positions: `x cos + swap(x) sin`, with signed sines."""

    cos: Float[Tensor, "batch pos 1 d_rotary"]
    sin: Float[Tensor, "batch pos 1 d_rotary"]


def rotation(layout: Layout, cfg: RotaryConfig, dtype: torch.dtype) -> Rotation:
    """Return the rotation at each position, computed once for all layers of a forward.

    Angles are in fp32, their cosines and sines in `dtype`; padding has position 0.
    """

    def make() -> Rotation:
        half = cfg.d_rotary // 2
        exponent = torch.arange(half, device=layout.pos.device, dtype=torch.float32) / half
        angle = layout.pos.clamp_min(0)[:, :, None, None].float() * cfg.theta**-exponent
        cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
        return Rotation(torch.cat([cos, cos], dim=-1), torch.cat([-sin, sin], dim=-1))

    return layout.once((cfg, dtype), make)


def rotate(
    x: Float[Tensor, "batch pos n d_head"], layout: Layout, cfg: RotaryConfig
) -> Float[Tensor, "batch pos n d_head"]:
    """Return `x` with its first `d_rotary` channels rotated by position.

    Channel i is paired with channel i + d_rotary / 2. Source: RoFormer (Su et al. 2021), in the
    layout of GPT-NeoX.
    """
    cos, sin = rotation(layout, cfg, x.dtype)
    turned, rest = x[..., : cfg.d_rotary], x[..., cfg.d_rotary :]
    swapped = turned.unflatten(-1, (2, -1)).flip(-2).flatten(-2)
    return torch.cat([torch.addcmul(turned * cos, swapped, sin), rest], dim=-1)
