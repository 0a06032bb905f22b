"""The bytes of the weights of each part of a model, plain or quantised, from the config."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.places import part_of, parts_of

if TYPE_CHECKING:
    from hooked_hybrid.network.weights.quantization import Only

NF4_CHUNK = 2**20
"""Values that torchao compares with all 16 levels at a time."""


@dataclass
class Stored:
    """Bytes of the weights of a part."""

    bytes: int = 0
    largest: int = 0
    """Bytes of the largest tensor before it is quantized."""
    to_multiply: int = 0
    """Most bytes of the dequantized matrix in a product with a quantized one."""
    to_quantize: int = 0
    """Peak bytes of quantizing one of its matrices, in addition to the matrix."""
    d_out: int = 0
    """Outputs of a quantized matrix for a token, of which there is a second copy."""
    matrix: int = 0
    """Values of the largest plain matrix."""
    sides: int = 0
    """Most values of a token's input and output at a plain matrix."""

    def add_plain(self, weight: nn.Parameter) -> None:
        """Count a tensor that is not quantized; a stack matrix by matrix."""
        self._add(weight, weight.nbytes)
        if weight.ndim > 1:
            d_out, d_in = weight.shape[-2:]
            self.matrix, self.sides = max(self.matrix, d_out * d_in), max(self.sides, d_out + d_in)

    def add_quantized(self, weight: nn.Parameter, n_bytes: int, scheme: str | Any) -> None:
        """Count a tensor that is quantized; a stack matrix by matrix.

        As torchao 0.18 does it, alike on every device; other schemes are assumed to need as much as
        NF4.
        """
        self._add(weight, n_bytes)
        (d_out, d_in), width = weight.shape[-2:], weight.dtype.itemsize
        n = d_out * d_in
        # NF4: two 64-bit indices for two weights, then their levels, scaled, and put together.
        by_level = torch.long.itemsize + 3 * width
        to_multiply, compared = n * by_level, 2 * 16 * width * min(n, NF4_CHUNK)
        if scheme == "int8":
            to_multiply, compared = n * width, 0
        self.to_multiply = max(self.to_multiply, to_multiply)
        self.to_quantize = max(self.to_quantize, n * (by_level + width) + compared)
        self.d_out = max(self.d_out, d_out)

    def _add(self, weight: nn.Parameter, n_bytes: int) -> None:
        self.bytes += n_bytes
        self.largest = max(self.largest, weight.nbytes)


def stored_weights(
    cfg: HybridConfig, dtype: torch.dtype, quantize: str | Any | None, only: Only | None
) -> dict[str, Stored]:
    """Return the bytes of the weights of each part.

    Raises:
        ValueError, ImportError: a part cannot be quantized so, see `quantized.Quantizer`.
    """
    model, found = Network.meta(cfg, dtype), {part: Stored() for part in parts_of(cfg)}
    quantizer = None
    if quantize is not None:
        from hooked_hybrid.network.weights.quantized import Quantizer

        quantizer = Quantizer(model, quantize, only)
    for name, weight in model.named_parameters():
        part = found[part_of(name)]
        if quantizer is None or name not in quantizer.names:
            part.add_plain(weight)
            continue
        shape = tuple(weight.shape[-2:])
        n_matrices = weight.numel() // (shape[0] * shape[1])
        part.add_quantized(weight, n_matrices * quantizer.bytes_of[shape], quantize)
    return found
