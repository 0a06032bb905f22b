"""Second derivatives of torch's fused attention, whose kernels have only first ones."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from hooked_hybrid.shapes import KeysValues, Mask, Queries


def twice_differentiable(
    z: Queries,
    q: Queries,
    k: KeysValues,
    v: KeysValues,
    mask: Mask | None,
    is_causal: bool = False,
) -> Queries:
    """Return `z`, which torch's kernel computed from q, k and v, with a differentiable gradient.

    An ordinary backward pass uses the kernel's. With `create_graph` the same gradient is computed
    by the definition of attention, whose operations can be differentiated again.

    Args:
        z: with the kernel's graph.
        q, k, v: its inputs; query heads are a multiple of key heads.
        mask: True where a query sees a key; None where each sees all.
        is_causal: whether there are as many keys as queries, and each query sees the keys up to it.
    """
    return _Fused.apply(z, q, k, v, mask, is_causal) if z.requires_grad else z


class _Fused(torch.autograd.Function):
    """The identity on z. Its gradient goes to the kernel, or directly to q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        is_causal: bool,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.is_causal = is_causal
        return z.detach()  # no view: a hook may edit it in place

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if not torch.is_grad_enabled():
            return grad, None, None, None, None, None
        q, k, v, mask = ctx.saved_tensors
        if ctx.is_causal:
            n = q.shape[1]
            mask = torch.ones(1, n, n, dtype=torch.bool, device=q.device).tril()
        return (None, *_gradients(grad, q, k, v, mask), None, None)


def _gradients(
    grad: Queries, q: Queries, k: KeysValues, v: KeysValues, mask: Mask | None
) -> tuple[Queries, KeysValues, KeysValues]:
    """Return the gradients with respect to q, k and v, given that with respect to z."""
    n_kv = k.shape[2]
    q, grad = (rearrange(t, "b q (kv g) e -> b kv g q e", kv=n_kv) for t in (q, grad))
    k, v = (rearrange(t, "b k kv e -> b kv 1 k e") for t in (k, v))
    pattern = _pattern(q, k, mask)
    by_pattern = grad @ v.mT
    by_scores = pattern * (by_pattern - (pattern * by_pattern).sum(-1, keepdim=True))
    by_scores = by_scores * q.shape[-1] ** -0.5
    by_k, by_v = (t.sum(2) for t in (by_scores.mT @ q, pattern.mT @ grad))
    return (
        rearrange(by_scores @ k, "b kv g q e -> b q (kv g) e"),
        rearrange(by_k, "b kv k e -> b k kv e"),
        rearrange(by_v, "b kv k e -> b k kv e"),
    )


def _pattern(q: Tensor, k: Tensor, mask: Mask | None) -> Tensor:
    """Return the pattern [batch kv_head group query key], zeros where a query sees no key."""
    scores = (q @ k.mT).to(torch.promote_types(q.dtype, torch.float32)) * q.shape[-1] ** -0.5
    if mask is None:
        return scores.softmax(-1).to(q.dtype)
    hidden = ~mask[:, None, None]
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(hidden, 0).to(q.dtype)
