"""Attention in a window alone, from queries, keys and values, with a hook on its patterns."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from experiments.benchmarks.bars import SDPA
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved
from hooked_hybrid import HookPoint
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.network.attention.attend import Hooks, Sight, attend
from hooked_hybrid.network.layout import lay_out

N_HEADS, D_HEAD = 4, 128


def attention(options: Options) -> Iterator[Measurement]:
    """Measure one layer's heads against torch's kernel with a full mask, as transformers uses it.

    Only ours has a hook: the kernel computes no pattern.
    """
    length, window = options.size(4096, 128), options.size(1024, 32)
    q = torch.randn(1, length, N_HEADS, D_HEAD)
    k, v = torch.randn(2, 1, length, 1, D_HEAD)
    works = {OURS: ours(q, k, v, window), SDPA: full_mask(q, k, v, window)}
    what = f"{length} tokens, window {window}"
    values = interleaved(works, options.n_rounds(7), f"attention {what}", check_equal)
    note = f"{N_HEADS} heads of {D_HEAD} that share keys; ours with a watcher of its pattern"
    yield Measurement("attention", what, values, note=note)


def ours(q: Tensor, k: Tensor, v: Tensor, window: int) -> Work:
    """Return our attention from queries, keys and values [1 pos head d_head]."""
    layout = lay_out(q, None, None, None)
    sight = Sight(layout, layout.pos, window)
    points = {field.name: HookPoint() for field in fields(Hooks)}
    hooks = Hooks(**points)
    seen = 0

    @per_position
    def watch(pattern: Tensor, hook: HookPoint) -> None:  # noqa: ARG001
        nonlocal seen
        seen += pattern.numel()

    hooks.pattern.add_hook(watch)

    def run() -> Tensor:
        return attend(q, k, v, sight, hooks)

    run()
    if not seen:
        raise RuntimeError("the watcher of the pattern was not called")
    return run


def full_mask(q: Tensor, k: Tensor, v: Tensor, window: int) -> Work:
    """Return torch's kernel on all keys, those outside the window masked."""
    heads_q, heads_k, heads_v = (t.transpose(1, 2) for t in (q, k, v))
    distance = torch.arange(q.shape[1])[:, None] - torch.arange(q.shape[1])
    mask = ((distance >= 0) & (distance < window))[None, None]

    def run() -> Tensor:
        z = scaled_dot_product_attention(heads_q, heads_k, heads_v, attn_mask=mask, enable_gqa=True)
        return z.transpose(1, 2)

    return run
