"""Bytes that each part of a model asks of a device, from the config alone.

What is counted is a prefill without hooks or gradients, in pieces, and the steps of decoding after
it. Values that live at the same time are added up from the components' own code, one function for
each kind of mixer and MLP, of a piece of `n` positions in all rows.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from hooked_hybrid.accounting.memory import OF_MIXER, StateBytes
from hooked_hybrid.attend import BLOCK
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    MambaConfig,
    MoEConfig,
    RGLRUConfig,
)
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.placement.places import part_of, parts_of
from hooked_hybrid.plan import PIECE
from hooked_hybrid.selective_scan import CHUNK, CHUNK_NUMBERS

WIDE = torch.float32.itemsize
STEP_ROOM = 8
"""A step of decoding makes room for an eighth more keys, see `key_room`."""


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
        batch: rows.
        on_cpu: whether the model runs on a CPU; on other devices attention is counted as torch
            computes it without a fused kernel, which is an upper bound.
    """

    def __init__(
        self, cfg: HybridConfig, dtype: torch.dtype, batch: int = 1, on_cpu: bool = False
    ) -> None:
        self.cfg, self.dtype, self.batch, self.on_cpu = cfg, dtype, batch, on_cpu

    @property
    def weights(self) -> dict[str, int]:
        """Bytes of the weights of each part; a read-out that is tied has none."""
        return _weights(self.cfg, self.dtype)

    def state(self, layer: int, length: int) -> int:
        """Return the bytes of a layer's state after `length` tokens of each row."""
        return self._state(layer, length).total

    def beside_state(self, layer: int, length: int) -> int:
        """Return the bytes that stand beside a layer's state while a forward makes the next one.

        The state before a piece, or a step, lives as long as the forward; the first step also
        makes room for keys to come.
        """
        state = self._state(layer, length)
        mixer = self.cfg.layers[layer].mixer
        grows = isinstance(mixer, AttentionConfig)
        return state.total + (state.of_attention // STEP_ROOM if grows else 0)

    def working(self, layer: int, length: int) -> int:
        """Return the bytes of a block's own values at their most, in a prefill of `length`."""
        piece = self._piece(length)
        of_layer = self.cfg.layers[layer]
        stream = piece.n * self.cfg.d_model
        mixer = WORKING_OF[type(of_layer.mixer)](of_layer.mixer, self.cfg.d_model, piece)
        mlp = WORKING_OF[type(of_layer.mlp)](of_layer.mlp, self.cfg.d_model, piece)
        # The stream before and between, what was written, and the norm of it in fp32 and narrow.
        return max(mixer, mlp) + stream * (4 * piece.width + piece.wide)

    def ends(self, length: int) -> int:
        """Return the bytes of embedding a piece and of choosing a token, logits of one position."""
        piece = self._piece(length)
        logits = self.batch * self.cfg.d_vocab * (3 * piece.width + 4 * piece.wide)
        return max(2 * piece.n * self.cfg.d_model * piece.width, logits)

    def streams(self, length: int) -> int:
        """Return the bytes of the residual stream of a whole prompt, kept where blocks take turns.

        That is where weights are brought: each block reads all pieces before the next does.
        """
        return self.batch * length * self.cfg.d_model * self.dtype.itemsize

    def _state(self, layer: int, length: int) -> StateBytes:
        mixer = self.cfg.layers[layer].mixer
        return OF_MIXER[type(mixer)](mixer, length, self.dtype) * self.batch

    def _piece(self, length: int) -> Piece:
        return Piece(
            self.batch, min(length, PIECE), length, self.dtype.itemsize, on_cpu=self.on_cpu
        )


@lru_cache(maxsize=8)
def _weights(cfg: HybridConfig, dtype: torch.dtype) -> dict[str, int]:
    sizes = dict.fromkeys(parts_of(cfg), 0)
    for name, parameter in HookedHybrid.meta(cfg, dtype).named_parameters():
        sizes[part_of(name)] += parameter.nbytes
    return sizes


def _attention(cfg: AttentionConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of queries, keys and values, scores and patterns of a block of queries."""
    n_keys = piece.n_tokens
    if cfg.n_keys is not None:
        n_keys = min(n_keys, cfg.n_keys - 1 + piece.n_pos)
    heads, kv_heads = cfg.n_heads * cfg.d_head, cfg.n_kv_heads * cfg.d_head
    rotated = 3 * heads if cfg.rotary else 0
    own = piece.n * (3 * heads + 2 * kv_heads + rotated + d_model) * piece.width
    keys = piece.batch * n_keys * kv_heads
    if piece.on_cpu:
        scores = piece.batch * cfg.n_heads * min(BLOCK, piece.n_pos) * n_keys
        is_narrow = piece.width < WIDE  # then products copy what they read, and softmax widens
        is_copied = is_narrow or (piece.batch > 1 and cfg.n_kv_heads > 1)
        of_score = 3 * piece.width + WIDE if is_narrow else 2 * piece.width
        return own + (2 * keys * piece.width if is_copied else 0) + scores * of_score
    scores = piece.batch * cfg.n_heads * piece.n_pos * n_keys
    repeated = 2 * keys * (cfg.n_heads // cfg.n_kv_heads)
    return own + (repeated + 2 * scores) * piece.wide + piece.batch * piece.n_pos * n_keys


def _rglru(cfg: RGLRUConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of both branches, the convolution, two gates, decay, write and states."""
    narrow, wide = 8, 4
    return piece.n * (cfg.d_rnn * (narrow * piece.width + wide * piece.wide) + d_model)


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
    at_once = 1 if piece.on_cpu else cfg.n_chosen
    routed = piece.n * cfg.n_experts * (piece.width + piece.wide)
    inputs = piece.n * d_model * piece.width * (cfg.n_chosen + 1)
    return routed + inputs + at_once * piece.n * (2 * cfg.d_mlp + 2 * d_model) * piece.width


WORKING_OF: dict[type, Callable[[Any, int, Piece], int]] = {
    AttentionConfig: _attention,
    RGLRUConfig: _rglru,
    MambaConfig: _mamba,
    GatedMLPConfig: _gated,
    MoEConfig: _experts,
}
"""What a mixer or an MLP holds at its most, by the class of its config."""


__all__ = ["WORKING_OF", "Piece", "Sizes"]
