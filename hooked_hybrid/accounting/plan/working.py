"""Bytes that each part of a model needs on a device, from the config alone.

Counted are loading, a prefill in pieces without hooks or gradients, and the decoding steps after
it. The peak bytes of a mixer or an MLP for a piece of positions are those that its class states
(`working_bytes`).
"""

from __future__ import annotations

import copy
import math
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.accounting.memory import StateBytes, layer_state_bytes
from hooked_hybrid.accounting.plan.stored import Stored, stored_weights
from hooked_hybrid.config import HybridConfig, MixerConfig
from hooked_hybrid.network.attention.key_room import room_for_steps
from hooked_hybrid.network.block_state import kept_dtype
from hooked_hybrid.network.costs import WIDE, Piece
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.plan import PIECE
from hooked_hybrid.network.weights.products import MANY

if TYPE_CHECKING:
    from hooked_hybrid.network.weights.quantization import Only

OF_TOKEN = 10 * torch.long.itemsize
"""Bytes kept for a token in addition to its values: its id, positions, document and row."""


class Sizes:
    """The memory that the parts of a model need.

    Args:
        cfg: of the model.
        dtype: of weights, keys and activations.
        batch: rows; several may be padded.
        on_cpu: whether the model runs on a CPU; on other devices attention is counted as torch
            computes it without a fused kernel, which is an upper bound.
        quantize, quantize_only: as `from_pretrained` takes them.

    Raises:
        ValueError, ImportError: a part cannot be quantized so; raised when weights are computed.
    """

    def __init__(
        self,
        cfg: HybridConfig,
        dtype: torch.dtype,
        batch: int = 1,
        on_cpu: bool = False,
        quantize: str | Any | None = None,
        quantize_only: Only | None = None,
    ) -> None:
        self.cfg, self.dtype, self.batch, self.on_cpu = cfg, dtype, batch, on_cpu
        self.quantize, self.quantize_only = quantize, quantize_only

    def of_rows(self, batch: int) -> Sizes:
        """Return the same for another number of rows."""
        changed = copy.copy(self)  # with its weights, if already computed
        changed.batch = batch
        return changed

    @cached_property
    def _stored(self) -> dict[str, Stored]:
        return stored_weights(self.cfg, self.dtype, self.quantize, self.quantize_only)

    @cached_property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights of each part; a read-out that is tied has none."""
        return {part: stored.bytes for part, stored in self._stored.items()}

    def loading(self, part: str) -> int:
        """Return the bytes that loading a part needs in addition to its weights.

        On a CPU the largest tensor is in memory twice while it is stacked or transposed; a tensor
        to be quantized is first in memory in its own dtype.
        """
        stored = self._stored[part]
        plain = stored.largest if self.on_cpu else 0
        return plain + (stored.largest + stored.to_quantize if stored.to_quantize else 0)

    def state(self, layer: int, length: int) -> int:
        """Return the bytes of a layer's state after `length` tokens of each row."""
        return self._state(layer, length).total

    def beside_state(self, layer: int, length: int) -> int:
        """Return the bytes of a forward besides a layer's state, while it makes the next one.

        The state before a piece, or a step, stays in memory during the forward. A window's keys are
        the last of a tensor that also contains those of the piece; the first step reserves memory
        for later keys.
        """
        mixers = self.cfg.layers[layer].mixers
        spare = sum(self._spare_keys(cfg, length) for cfg in mixers if mixer_of(cfg).grows)
        return self._state(layer, length).total + spare

    def _spare_keys(self, cfg: MixerConfig, length: int) -> int:
        """Return the bytes of keys that are no longer seen, and of space for later keys."""
        mixer = mixer_of(cfg)
        n_kept = mixer.n_kept(cfg, length)
        gone = min(PIECE, length - n_kept)
        in_view = gone if n_kept >= gone else 0  # otherwise the tensor is freed, see `last_keys`
        spare = in_view + max(in_view, 1 + room_for_steps(n_kept + 1))
        shapes = mixer.state_shapes(cfg)
        a_key = sum(
            math.prod(shapes[name]) * kept_dtype(name, self.dtype).itemsize for name in mixer.grows
        )
        return self.batch * spare * a_key

    def working(self, layer: int, length: int) -> int:
        """Return the peak bytes of a block's own values in a prefill of `length`."""
        piece = self._piece(length)
        of_layer = self.cfg.layers[layer]
        stream = piece.n * self.cfg.d_model
        d_model = self.cfg.d_model
        mixers = [mixer_of(of).working_bytes(of, d_model, piece) for of in of_layer.mixers]
        written = max(0, len(mixers) - 1) * stream * piece.width  # by mixers that ran before
        mixer = max(mixers, default=0) + written
        mlp_cfg = of_layer.mlp
        mlp = 0 if mlp_cfg is None else mlp_of(mlp_cfg).working_bytes(mlp_cfg, d_model, piece)
        stored = self._stored[f"blocks.{layer}"]
        plain = stored.to_multiply + piece.n * stored.d_out * piece.width
        plain += self._widening(stored, piece.n)
        # The stream before and between, the write, and its norm in fp32 and in the narrow dtype.
        own = max(mixer, mlp) + plain + stream * (4 * piece.width + piece.wide)
        # While a norm is computed: the stream in fp32, normalized, weighted, and rounded.
        rounded = piece.wide + piece.width if piece.width < WIDE else 0
        norm = stream * (4 * piece.width + 2 * piece.wide + rounded)
        return max(own, norm) + piece.n * OF_TOKEN

    def ends(self, length: int) -> int:
        """Return the bytes of embedding a piece and of choosing a token, logits of one position."""
        piece = self._piece(length)
        logits = self.batch * self.cfg.d_vocab * (3 * piece.width + 4 * piece.wide)
        read_out = self._stored["embed" if self.cfg.tied_embedding else "unembed"]
        logits += self._widening(read_out, self.batch)
        return max(2 * piece.n * self.cfg.d_model * piece.width, logits)

    def _widening(self, stored: Stored, rows: int) -> int:
        """Return the bytes of the fp32 product that a CPU may compute for a 16-bit one."""
        if not self.on_cpu or self.dtype.itemsize >= WIDE or rows < MANY:
            return 0
        return WIDE * (stored.matrix + rows * stored.sides)

    def streams(self, length: int) -> int:
        """Return the bytes of a whole prompt's residual stream, kept where weights are moved.

        If weights are moved for each forward, each block reads all pieces before the next block,
        and the layers share each piece's rotary tables.
        """
        mixers = [mixer for layer in self.cfg.layers for mixer in layer.mixers]
        rotary = max((mixer_of(mixer).position_width(mixer) for mixer in mixers), default=0)
        width = self.cfg.d_model + 2 * rotary
        return self.batch * length * width * self.dtype.itemsize

    def _state(self, layer: int, length: int) -> StateBytes:
        return layer_state_bytes(self.cfg.layers[layer], length, self.dtype) * self.batch

    def _piece(self, length: int) -> Piece:
        return Piece(
            self.batch, min(length, PIECE), length, self.dtype.itemsize, on_cpu=self.on_cpu
        )
