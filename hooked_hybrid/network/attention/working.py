"""Bytes of attention's values while a piece of a prompt runs, and inside torch's kernel."""

from __future__ import annotations

import torch

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.network.attention.attend import BLOCK
from hooked_hybrid.network.costs import OF_MASK, WIDE, Piece
from hooked_hybrid.network.kernels.fused_attention import Call, block_length
from hooked_hybrid.network.layout import Layout


def working_bytes(cfg: AttentionConfig, d_model: int, piece: Piece) -> int:
    """Return the bytes of queries, keys and values, scores and patterns of a block of queries.

    Without hooks and gradients.
    """
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


def kernel_bytes(
    cfg: AttentionConfig,
    layout: Layout,
    n_cached: int,
    piece: int,
    dtype: torch.dtype,
    device: torch.device,
) -> int:
    """Return the bytes of masks and unfused scores inside torch's kernel, where that is used."""
    grad, on_gpu = torch.is_grad_enabled(), device.type == "cuda"
    if not (grad or on_gpu):
        return 0
    queries = min(piece, block_length(piece, cfg.n_keys, on_gpu))
    keys = n_cached + (layout.length if grad or cfg.n_keys is None else piece)
    if cfg.n_keys is not None and queries < piece and layout.is_plain:
        keys = min(keys, cfg.n_keys - 1 + queries)
    call = Call(
        rows=layout.pos.shape[0],
        mask_rows=1 if layout.is_plain else layout.pos.shape[0],
        queries=piece if grad else queries,  # the masks of all blocks are kept for gradients
        keys=keys,
        n_heads=cfg.n_heads,
        n_kv_heads=cfg.n_kv_heads,
        d_head=cfg.d_head,
        dtype=dtype,
        on_gpu=on_gpu,
    )
    sees_all_before = layout.is_plain and n_cached == 0 and piece == layout.length
    return call.n_bytes(sees_all_before and (cfg.n_keys is None or piece <= cfg.n_keys))


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
