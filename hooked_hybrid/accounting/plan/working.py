"""Bytes that each part of a model asks of a device, from the config alone.

What is counted is what loading takes, a prefill without hooks or gradients, in pieces, and the
steps of decoding after it. Values that live at the same time are added up from the components' own
code, one function for each kind of mixer and MLP, of a piece of `n` positions in all rows.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.accounting.memory import OF_MIXER, POSITION, StateBytes
from hooked_hybrid.accounting.plan.stored import Stored, stored_weights
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    MambaConfig,
    MoEConfig,
    RGLRUConfig,
)
from hooked_hybrid.network.attention.attend import BLOCK
from hooked_hybrid.network.attention.key_room import room_for_steps
from hooked_hybrid.network.plan import PIECE
from hooked_hybrid.network.scans.selective_scan import CHUNK, CHUNK_NUMBERS
from hooked_hybrid.network.weights.products import MANY

if TYPE_CHECKING:
    from hooked_hybrid.network.weights.quantized import Only

WIDE = torch.float32.itemsize
OF_MASK = torch.long.itemsize + 3
"""Bytes of a query and a key while it is worked out whether one sees the other: by distance."""

OF_TOKEN = 10 * torch.long.itemsize
"""Bytes of what is known of a token beside its values: its id, positions, document and row."""


@dataclass(frozen=True)
class Piece:
    """What a block is given: rows, positions of a piece, keys seen, on which kind of device."""

    batch: int
    n_pos: int
    n_tokens: int
    """Tokens of each row when the piece has been read."""
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


class Sizes:
    """What the parts of a model take.

    Args:
        cfg: what the model is.
        dtype: of weights, keys and activations.
        batch: rows; several may be padded.
        on_cpu: whether the model runs on a CPU; on other devices attention is counted as torch
            computes it without a fused kernel, which is an upper bound.
        quantize, quantize_only: as `from_pretrained` takes them.

    Raises:
        ValueError, ImportError: what cannot be quantised so; when weights are asked for.
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
        changed = copy.copy(self)  # with its weights, where they are known
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
        """Return the bytes that loading a part takes beside its weights.

        A CPU holds the largest tensor twice while it is stacked or transposed, and what is
        quantised is there in its own dtype before.
        """
        stored = self._stored[part]
        plain = stored.largest if self.on_cpu else 0
        return plain + (stored.largest + stored.to_quantize if stored.to_quantize else 0)

    def state(self, layer: int, length: int) -> int:
        """Return the bytes of a layer's state after `length` tokens of each row."""
        return self._state(layer, length).total

    def beside_state(self, layer: int, length: int) -> int:
        """Return the bytes that stand beside a layer's state while a forward makes the next one.

        The state before a piece, or a step, lives as long as the forward. A window's keys are the
        last ones of a tensor with those of a piece in it; the first step makes room for keys to
        come.
        """
        state, mixer = self._state(layer, length), self.cfg.layers[layer].mixer
        if not isinstance(mixer, AttentionConfig):
            return state.total
        n_kept = length if mixer.n_keys is None else min(length, mixer.n_keys - 1)
        gone = min(PIECE, length - n_kept)
        in_view = gone if n_kept >= gone else 0  # else the tensor is let go, see `last_keys`
        spare = in_view + max(in_view, 1 + room_for_steps(n_kept + 1))
        a_key = mixer.n_kv_heads * mixer.d_head * self.dtype.itemsize * 2 + POSITION
        return state.total + self.batch * spare * a_key

    def working(self, layer: int, length: int) -> int:
        """Return the bytes of a block's own values at their most, in a prefill of `length`."""
        piece = self._piece(length)
        of_layer = self.cfg.layers[layer]
        stream = piece.n * self.cfg.d_model
        mixer = WORKING_OF[type(of_layer.mixer)](of_layer.mixer, self.cfg.d_model, piece)
        mlp = WORKING_OF[type(of_layer.mlp)](of_layer.mlp, self.cfg.d_model, piece)
        stored = self._stored[f"blocks.{layer}"]
        plain = stored.to_multiply + piece.n * stored.d_out * piece.width
        plain += self._widening(stored, piece.n)
        # The stream before and between, what was written, and the norm of it in fp32 and narrow.
        own = max(mixer, mlp) + plain + stream * (4 * piece.width + piece.wide)
        # While a norm is taken: that in fp32, normalised, weighted, and rounded.
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
        """Return the bytes of a product in fp32, which a CPU may take for one in 16 bits."""
        if not self.on_cpu or self.dtype.itemsize >= WIDE or rows < MANY:
            return 0
        return WIDE * (stored.matrix + rows * stored.sides)

    def streams(self, length: int) -> int:
        """Return the bytes of the residual stream of a whole prompt, kept where blocks take turns.

        That is where weights are brought: each block reads all pieces before the next does, and
        layers share what rotates each.
        """
        mixers = [layer.mixer for layer in self.cfg.layers]
        rotary = [m.rotary.d_rotary for m in mixers if isinstance(m, AttentionConfig) and m.rotary]
        width = self.cfg.d_model + 2 * max(rotary, default=0)
        return self.batch * length * width * self.dtype.itemsize

    def _state(self, layer: int, length: int) -> StateBytes:
        mixer = self.cfg.layers[layer].mixer
        return OF_MIXER[type(mixer)](mixer, length, self.dtype) * self.batch

    def _piece(self, length: int) -> Piece:
        return Piece(
            self.batch, min(length, PIECE), length, self.dtype.itemsize, on_cpu=self.on_cpu
        )


def _attention(cfg: AttentionConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of queries, keys and values, scores and patterns of a block of queries."""
    n_keys = _most_keys(cfg, piece, piece.n_pos)
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    rotated = 3 * heads if cfg.rotary else 0
    own = piece.n * (3 * heads + 2 * kv_heads + rotated + d_model) * piece.width
    keys = piece.batch * n_keys * kv_heads
    if cfg.n_keys is not None or piece.may_be_padded:  # there until those to keep are picked
        own += 2 * keys * piece.width
    if piece.on_cpu:
        return own + _blocks_of_scores(cfg, piece, keys)
    scores = piece.batch * cfg.n_heads * piece.n_pos * n_keys
    repeated = 2 * keys * (cfg.n_heads // cfg.n_kv_heads)
    mask = piece.batch * piece.n_pos * n_keys * OF_MASK
    return own + (repeated + 2 * scores) * piece.wide + mask


def _blocks_of_scores(cfg: AttentionConfig, piece: Piece, keys: int) -> int:
    """Return the bytes of scores and patterns on a CPU, of one block of queries after another."""
    n_queries = min(BLOCK, piece.n_pos)
    n_keys = _most_keys(cfg, piece, piece.n_pos if piece.may_be_padded else n_queries)
    is_narrow = piece.width < WIDE  # then products copy what they read, and softmax widens twice
    is_copied = is_narrow or (piece.batch > 1 and cfg.n_kv_heads > 1)
    of_score = 2 * piece.width + (2 * WIDE if is_narrow else 0)  # the block before, and this one
    pairs, mask = piece.batch * n_queries * n_keys, 0
    if piece.may_be_padded:
        of_score += piece.width if is_narrow else 2 * piece.width + 1
        mask = pairs * OF_MASK
    return pairs * cfg.n_heads * of_score + mask + (2 * keys * piece.width if is_copied else 0)


def _most_keys(cfg: AttentionConfig, piece: Piece, n_queries: int) -> int:
    """Return how many keys some queries see together, at most."""
    if cfg.n_keys is None:
        return piece.n_tokens
    return min(piece.n_tokens, cfg.n_keys - 1 + n_queries)


def _rglru(cfg: RGLRUConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of branches, convolution, gates, decay, write, states, what is written."""
    narrow, wide = 8, 4
    written = d_model * piece.width
    return piece.n * (cfg.d_rnn * (narrow * piece.width + wide * piece.wide) + written)


def _mamba(cfg: MambaConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of both branches, the convolution, step sizes, what is read, and chunks."""
    narrow, wide = 3, 4
    a_chunk = piece.batch * min(CHUNK, piece.n_pos) * cfg.d_inner * cfg.d_state
    chunk = 2 * (min(a_chunk, CHUNK_NUMBERS) if piece.on_cpu else a_chunk) * piece.wide
    own = piece.n * (cfg.d_inner * (narrow * piece.width + wide * piece.wide))
    return own + chunk + piece.n * d_model * piece.width


def _gated(cfg: GatedMLPConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of gate and linear branch, the nonlinearity, and what is written."""
    copies = 2 if cfg.act == "silu" or piece.on_cpu else 3
    return piece.n * (copies * cfg.d_mlp + d_model) * piece.width


def _experts(cfg: MoEConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of the experts' inputs and of their values: on a CPU one at a time.

    One expert may be given every token; on a GPU all chosen ones are run together.
    """
    at_once, copies = (1, 2) if piece.on_cpu else (cfg.n_chosen, 3)
    routed = piece.n * cfg.n_experts * (piece.width + piece.wide)
    inputs = piece.n * d_model * piece.width * (cfg.n_chosen + 1)
    return routed + inputs + at_once * piece.n * (copies * cfg.d_mlp + 2 * d_model) * piece.width


WORKING_OF: dict[type, Callable[[Any, int, Piece], int]] = {
    AttentionConfig: _attention,
    RGLRUConfig: _rglru,
    MambaConfig: _mamba,
    GatedMLPConfig: _gated,
    MoEConfig: _experts,
}
"""What a mixer or an MLP holds at its most, by the class of its config."""


__all__ = ["WORKING_OF", "Piece", "Sizes"]
