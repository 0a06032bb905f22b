"""torch's fused attention, called in the form that the kernels of each device accept.

On CUDA torch chooses one of these for each call, by dtype, capability and form. It does not warn
when it uses `math`, which keeps the scores of all queries and keys in memory:

==========  ==============  ===================================================  ==============
kernel      capability      takes                                                called with
==========  ==============  ===================================================  ==============
flash       8.0 and above   bf16, fp16; no mask; d_head up to 256                yes
efficient   5.0 and above   fp32, bf16, fp16; a mask; as many key heads as       yes
                            query heads; rows of d_head of whole 16 bytes
math        all             everything, fp64 too                                 what is left
cuDNN       8.0 and above   bf16, fp16; a mask                                   never
==========  ==============  ===================================================  ==============

cuDNN, which torch prefers on 9.0, takes about 50 ms to plan each new shape, and each decoding step
has a new shape; and with a mask its gradients are NaN at some lengths in torch 2.11 to 2.13
(pytorch#196678). Flash and efficient refuse a mask with fewer key heads than query heads. So with a
mask, the heads of a group are passed as queries of their key head; if queries see all keys before
them, the key heads are repeated and no mask is passed.

A CPU has a flash kernel that accepts everything, and is called in its fastest form.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor
from torch.backends import cuda
from torch.nn.functional import scaled_dot_product_attention

from hooked_hybrid.shapes import KeysValues, Mask, Queries

BLOCK = 1024
"""Queries of one call for a long sequence with a window."""
VECTOR = 16
"""The efficient kernel reads rows of d_head in units of this many bytes."""


def block_length(length: int, n_keys: int | None, on_gpu: bool) -> int:
    """Return how many queries to pass to one call.

    Args:
        length: of the sequence.
        n_keys: the window.
        on_gpu: whether on a GPU; on a CPU the gradients of the whole sequence are computed at once.
    """
    if n_keys is None or (torch.is_grad_enabled() and not on_gpu):
        return length
    return BLOCK


def read_all(q: Queries, k: KeysValues, v: KeysValues) -> Queries:
    """Return z of one query a row, which sees every key; its heads are passed as queries."""
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[-1])
    return _attention(grouped, k.transpose(1, 2), v.transpose(1, 2)).reshape(q.shape)


def read_causal(q: Queries, k: KeysValues, v: KeysValues) -> Queries:
    """Return z of as many queries as keys, each of which sees the keys up to it; without a mask."""
    group = q.shape[2] // k.shape[2]
    heads = (t.transpose(1, 2) for t in (q, _repeated(k, group), _repeated(v, group)))
    return _attention(*heads, is_causal=True).transpose(1, 2)


def read_masked(q: Queries, k: KeysValues, v: KeysValues, mask: Mask) -> Queries:
    """Return z of queries that see the keys at which a mask is True."""
    n_kv, group = k.shape[2], q.shape[2] // k.shape[2]
    heads_k, heads_v = (t.transpose(1, 2) for t in (k, v))
    if not q.is_cuda:
        is_grouped = group != 1
        z = _attention(
            q.transpose(1, 2), heads_k, heads_v, attn_mask=mask[:, None], enable_gqa=is_grouped
        )
        return z.transpose(1, 2)
    queries = rearrange(q, "b q (kv g) e -> b kv (g q) e", kv=n_kv)
    z = _attention(queries, heads_k, heads_v, attn_mask=mask.repeat(1, group, 1)[:, None])
    return rearrange(z, "b kv (g q) e -> b q (kv g) e", g=group)


def _attention(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """Return torch's attention, on CUDA without cuDNN; the user's choice of other kernels holds."""
    if not q.is_cuda or not cuda.cudnn_sdp_enabled():
        return scaled_dot_product_attention(q, k, v, **options)
    cuda.enable_cudnn_sdp(False)
    try:
        return scaled_dot_product_attention(q, k, v, **options)
    finally:
        cuda.enable_cudnn_sdp(True)


def _repeated(x: KeysValues, group: int) -> Tensor:
    """Return keys or values repeated for each query head."""
    if group == 1:
        return x
    return x[:, :, :, None].expand(-1, -1, -1, group, -1).flatten(2, 3)


@dataclass(frozen=True)
class Call:
    """The sizes of one call."""

    rows: int
    mask_rows: int
    queries: int
    keys: int
    n_heads: int
    n_kv_heads: int
    d_head: int
    dtype: torch.dtype
    on_gpu: bool

    @property
    def is_unfused(self) -> bool:
        """Whether torch keeps all scores in memory."""
        is_read = self.dtype != torch.float64 and self.d_head * self.dtype.itemsize % VECTOR == 0
        return self.on_gpu and not is_read

    def n_bytes(self, is_causal: bool) -> int:
        """Return the bytes of masks, as booleans and as numbers, and of scores and patterns."""
        width, pairs = self.dtype.itemsize, self.queries * self.keys
        scores = 0
        if self.is_unfused:
            scores = 2 * self.rows * self.n_heads * pairs * max(width, 4)
        if is_causal and self.on_gpu:
            return scores
        group = self.n_heads // self.n_kv_heads if self.on_gpu else 1
        return scores + self.mask_rows * group * pairs * (1 + width)
