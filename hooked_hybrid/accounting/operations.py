"""Operations of one layer for one token, and of attention for one query and key, as formulas.

A matrix product of [m k] and [k n] is 2 m k n operations, as `torch.utils.flop_counter` counts.
Everything else is one operation for each sum, product, quotient, maximum, root, exponential,
logarithm and hyperbolic tangent of two numbers or one, as the equations in `mixers` and `mlps` have
them; what depends on the weights or on the position alone (`-8 softplus(a_param)`, `-exp(A_log)`,
`1 + w`, cosines and sines) is not counted, nor are comparisons with a mask, look-ups and casts.

=============  ==========================================================  =====================
function       equation                                                    operations
=============  ==========================================================  =====================
sigmoid        1 / (1 + exp(-x))                                           4
silu           x / (1 + exp(-x))                                           4
gelu           x (1 + tanh(c (x + 0.044715 x^3))) / 2                      9
softplus       log(1 + exp(x))                                             3
softmax        exp(x - max) / sum, maximum and sum among them              5 a number
RMSNorm        x / sqrt(mean(x^2) + eps) w                                 4 a channel and 3
rotation       x cos + swap(x) sin                                         3 a rotated channel
convolution    sum of d_conv taps and a bias                               2 d_conv a channel
=============  ==========================================================  =====================
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hooked_hybrid.config import (
    Activation,
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    MambaConfig,
    MoEConfig,
    RGLRUConfig,
)

ACTIVATION: dict[Activation, int] = {"gelu_tanh": 9, "silu": 4}
SIGMOID, SILU, SOFTPLUS, SOFTMAX = 4, 4, 3, 5


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of three sorts."""

    products: int = 0
    """Of matrix products, the read-out C h of a selective scan among them."""
    scan: int = 0
    """Of the recurrence h_t = a_t h_{t-1} + x_t itself."""
    elementwise: int = 0
    """Of everything else: biases, nonlinearities, norms, convolutions, gates, residual sums."""

    @property
    def total(self) -> int:
        """All three."""
        return self.products + self.scan + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        """Return the sum of each sort."""
        return Flops(
            self.products + other.products,
            self.scan + other.scan,
            self.elementwise + other.elementwise,
        )

    def __mul__(self, n: int) -> Flops:
        """Return `n` times as many."""
        return Flops(self.products * n, self.scan * n, self.elementwise * n)


def norm(width: int) -> int:
    """Return the operations of an RMSNorm for one token."""
    return 4 * width + 3


def attention(cfg: AttentionConfig, d_model: int) -> Flops:
    """Return projections, biases and rotations of one token; see `attention_pair` for the rest."""
    d_q, d_kv = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    biases = (d_q + 2 * d_kv) * cfg.qkv_bias + d_model * cfg.out_bias
    rotated = (cfg.n_heads + cfg.n_kv_heads) * (cfg.rotary.d_rotary if cfg.rotary else 0)
    return Flops(
        products=2 * d_model * (2 * d_q + 2 * d_kv), elementwise=biases + 3 * rotated + d_model
    )


def attention_pair(cfg: AttentionConfig) -> Flops:
    """Return what a query and a key it sees cost: score, scale, softmax and weighted value."""
    return Flops(products=4 * cfg.n_heads * cfg.d_head, elementwise=cfg.n_heads * (1 + SOFTMAX))


def rglru(cfg: RGLRUConfig, d_model: int) -> Flops:
    """Return Griffin's recurrent block for one token.

    Of a channel: the gate branch's bias and gelu, the other branch's bias, the convolution, two
    gates, log a = r log_a_at_1 and a, sqrt(1 - exp(2 log a)) i u, and h times the gate branch.
    """
    d = cfg.d_rnn
    gates, decay, write = 2 * (1 + SIGMOID), 2, 4 + 2
    a_channel = 1 + ACTIVATION["gelu_tanh"] + 1 + 2 * cfg.d_conv + gates + decay + write + 1
    return Flops(
        products=3 * 2 * d_model * d + 2 * 2 * d * (d // cfg.n_gate_blocks),
        scan=2 * d,
        elementwise=d * a_channel + d_model + d_model,
    )


def mamba(cfg: MambaConfig, d_model: int) -> Flops:
    """Return the Mamba block with Jamba's norms for one token.

    Of a channel: the convolution and its silu, the bias of the step size and softplus, delta u,
    D u and its sum, the silu of the gate and the product with it. Of each of its states:
    exp(delta A), the write, h, and C h, which is a matrix product here.
    """
    d, n, rank = cfg.d_inner, cfg.d_state, cfg.dt_rank
    taps = 2 * cfg.d_conv - (not cfg.conv_bias)
    a_channel = taps + SILU + 1 + SOFTPLUS + 1 + 2 + SILU + 1
    biases = (2 * d + d_model) * cfg.proj_bias
    norms = norm(rank) + 2 * norm(n)
    return Flops(
        products=2 * (d_model * 2 * d + d * (rank + 2 * n) + rank * d + d * d_model) + 2 * d * n,
        scan=2 * d * n,
        elementwise=d * a_channel + 3 * d * n + norms + biases + d_model,
    )


def gated_mlp(cfg: GatedMLPConfig, d_model: int) -> Flops:
    """Return a gated MLP for one token."""
    biases = (2 * cfg.d_mlp + d_model) * cfg.bias
    return Flops(
        products=3 * 2 * d_model * cfg.d_mlp,
        elementwise=(ACTIVATION[cfg.act] + 1) * cfg.d_mlp + biases + d_model,
    )


def experts(cfg: MoEConfig, d_model: int) -> Flops:
    """Return the chosen experts of one token, their shares and their sum."""
    one = Flops(
        products=3 * 2 * d_model * cfg.d_mlp,
        elementwise=(ACTIVATION[cfg.act] + 1) * cfg.d_mlp + 2 * d_model,
    )
    return one * cfg.n_chosen + Flops(elementwise=d_model)


def router(cfg: MoEConfig, d_model: int) -> Flops:
    """Return the scores of all experts, their softmax and the largest for one token."""
    return Flops(
        products=2 * d_model * cfg.n_experts,
        elementwise=(SOFTMAX + cfg.n_chosen) * cfg.n_experts,
    )


def read_out(cfg: HybridConfig) -> Flops:
    """Return the logits of one token, with their soft cap."""
    capped = 3 * cfg.d_vocab if cfg.logits_soft_cap is not None else 0
    return Flops(products=2 * cfg.d_model * cfg.d_vocab, elementwise=capped)


OF_LAYER: dict[type, dict[str, Callable[[Any, int], Flops]]] = {
    AttentionConfig: {"attention": attention},
    RGLRUConfig: {"recurrent block": rglru},
    MambaConfig: {"Mamba block": mamba},
    GatedMLPConfig: {"MLP": gated_mlp},
    MoEConfig: {"router": router, "experts": experts},
}
"""Kinds of layer that a config makes, as `parameters.KINDS` names them, and what each costs."""

OF_PAIR: dict[type, Callable[[Any], Flops]] = {AttentionConfig: attention_pair}
"""What a mixer costs for each query and key, where it compares them."""

__all__ = ["OF_LAYER", "OF_PAIR", "Flops", "norm", "read_out"]
