"""Units of the costs that mixers and MLPs state: operations of a token, bytes of a piece.

A matrix product of [m k] and [k n] is 2 m k n operations, as `torch.utils.flop_counter` counts.
Every other sum, product, quotient, maximum, root, exponential, logarithm and hyperbolic tangent in
the equations of `mixers` and `mlps` is one operation for each number. Values that depend only on
weights or positions (`-8 softplus(a_param)`, `-exp(A_log)`, `1 + w`, cosines and sines) are not
counted, nor are comparisons with a mask, look-ups and casts.

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

from dataclasses import dataclass

import torch

from hooked_hybrid.config import Activation

ACTIVATION: dict[Activation, int] = {"gelu_tanh": 9, "silu": 4}
SIGMOID, SILU, SOFTPLUS, SOFTMAX = 4, 4, 3, 5

WIDE = torch.float32.itemsize
OF_MASK = torch.long.itemsize + 3
"""Bytes for each pair of query and key while the mask is computed from their distance."""


@dataclass(frozen=True)
class Flops:
    """Floating-point operations of three kinds.

    Examples:
        >>> from hooked_hybrid.accounting import prefill_flops
        >>> attention = prefill_flops(model.cfg, 128)["attention"]
        >>> attention.products, attention.scan
        (27328512, 0)
    """

    products: int = 0
    """Of matrix products, including the read-out C h of a selective scan."""
    scan: int = 0
    """Of the recurrence h_t = a_t h_{t-1} + x_t itself."""
    elementwise: int = 0
    """Of everything else: biases, nonlinearities, norms, convolutions, gates, residual sums."""

    @property
    def total(self) -> int:
        """All three."""
        return self.products + self.scan + self.elementwise

    def __add__(self, other: Flops) -> Flops:
        """Return the sum of each kind."""
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


@dataclass(frozen=True)
class Piece:
    """The input of a block: rows, positions of a piece, tokens read so far, kind of device."""

    batch: int
    n_pos: int
    n_tokens: int
    """Tokens of each row up to the end of the piece."""
    width: int
    """Bytes of a number in the model's dtype."""
    on_cpu: bool

    @property
    def may_be_padded(self) -> bool:
        """Whether rows may be of different lengths."""
        return self.batch > 1

    @property
    def n(self) -> int:
        """Positions of all rows."""
        return self.batch * self.n_pos

    @property
    def wide(self) -> int:
        """Bytes of a number that is kept in fp32 or wider."""
        return max(self.width, WIDE)
