"""Lower bounds of time: a model's matrix products in prefill, its weights read in decoding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from experiments.benchmarks.timing import timed
from hooked_hybrid import HookedHybrid
from hooked_hybrid.config import MoEConfig
from hooked_hybrid.network.layers import BlockDiagonalLinear, Linear
from hooked_hybrid.network.part import Part

PIECE = 512
"""Rows of one product: as fast as thousands, and small enough for the caches."""


class Product(NamedTuple):
    """Rows times a matrix [d_in d_out], or `blocks` of them that share the rows' channels."""

    rows: int
    d_in: int
    d_out: int
    blocks: int = 1


def products(model: HookedHybrid, tokens: Tensor, unembed: bool = False) -> list[Product]:
    """Return the products of the linear layers for a prompt; maps with one input are one product.

    Only chosen experts count. Attention's own products are left out; the unembedding is included
    only with `unembed`.
    """
    n_pos, d_model = tokens.shape[1], model.cfg.d_model
    found: list[Product] = []
    for name, part in model.named_modules():
        if not isinstance(part, Part):
            continue
        if isinstance(part.cfg, MoEConfig):
            found.append(Product(n_pos, d_model, part.cfg.n_experts))
            for rows in _expert_rows(model, tokens, name):
                found.append(Product(rows, d_model, 2 * part.cfg.d_mlp))
                found.append(Product(rows, part.cfg.d_mlp, d_model))
        else:
            found += _products_of(part, n_pos)
    return [*found, Product(n_pos, d_model, model.cfg.d_vocab)] if unembed else found


def _products_of(part: Part, n_pos: int) -> Iterator[Product]:
    """Yield the products of a mixer or MLP; inner maps of equal input width share their input."""
    weights = dict(part.named_parameters())
    yield Product(
        n_pos, weights[part.reads[0]].shape[-1], sum(weights[n].shape[0] for n in part.reads)
    )
    inner: dict[tuple[int, int], int] = {}
    for name, layer in part.named_modules():
        if f"{name}.weight" in (*part.reads, *part.writes):
            continue
        if isinstance(layer, Linear | BlockDiagonalLinear):
            *stack, d_out, d_in = layer.weight.shape
            blocks = stack[0] if stack else 1
            inner[blocks, d_in] = inner.get((blocks, d_in), 0) + d_out
    yield from (Product(n_pos, d_in, d_out, blocks) for (blocks, d_in), d_out in inner.items())
    for name in part.writes:
        d_out, d_in = weights[name].shape
        yield Product(n_pos, d_in, d_out)


def gemm_floor(wanted: Sequence[Product]) -> Callable[[], None]:
    """Return work that computes the products, `PIECE` rows at a time, into preallocated memory."""
    biggest = max(p.d_in * p.blocks for p in wanted), max(p.d_out * p.blocks for p in wanted)
    a, out = torch.randn(PIECE * biggest[0]), torch.empty(PIECE * biggest[1])
    weights = [torch.randn(p.blocks, p.d_in, p.d_out) for p in wanted]

    def run() -> None:
        for p, weight in zip(wanted, weights, strict=True):
            for rows in pieces(p.rows):
                x = a[: p.blocks * rows * p.d_in].view(p.blocks, rows, p.d_in)
                y = out[: p.blocks * rows * p.d_out].view(p.blocks, rows, p.d_out)
                if p.blocks == 1:
                    torch.mm(x[0], weight[0], out=y[0])
                else:
                    torch.bmm(x, weight, out=y)

    return run


def pieces(n: int) -> Iterator[int]:
    """Yield `n` in pieces."""
    for start in range(0, n, PIECE):
        yield min(PIECE, n - start)


def _expert_rows(model: HookedHybrid, tokens: Tensor, mlp: str) -> list[int]:
    """Return the number of tokens of each chosen expert, for the experts at `mlp`."""
    name = f"{mlp}.hook_expert_indices"
    _, cache = model.run_with_cache(tokens, return_type=None, names_filter=name)
    return [n for n in cache[name].flatten().bincount().tolist() if n]


def read_floor(wanted: Sequence[Product]) -> Callable[[], None]:
    """Return work that multiplies one row by every matrix, each in its fastest layout."""
    shapes = [(p.d_in, p.d_out) for p in wanted for _ in range(p.blocks)]
    best = {shape: _fastest(*shape) for shape in dict.fromkeys(shapes)}
    memory = torch.ones(sum(d_in * d_out for d_in, d_out in shapes))
    works, start = [], 0
    for d_in, d_out in shapes:
        weight = memory[start : start + d_in * d_out]
        works.append(best[d_in, d_out](weight, d_in))
        start += d_in * d_out

    return partial(_all, works)


def _by_rows(weight: Tensor, d_in: int) -> Callable[[], Tensor]:
    return partial(linear, torch.ones(1, d_in), weight.view(-1, d_in))


def _by_columns(weight: Tensor, d_in: int) -> Callable[[], Tensor]:
    return partial(torch.mm, torch.ones(1, d_in), weight.view(d_in, -1))


def _by_two_rows(weight: Tensor, d_in: int) -> Callable[[], Tensor]:
    return partial(torch.mm, weight.view(-1, d_in), torch.ones(2, d_in).T)


Layout = Callable[[Tensor, int], Callable[[], Tensor]]
LAYOUTS: tuple[Layout, ...] = (_by_rows, _by_columns, _by_two_rows)


def _fastest(d_in: int, d_out: int) -> Layout:
    """Return the layout in which a matrix of this shape is read fastest, from memory."""
    size = d_in * d_out
    memory = torch.ones(max(2, 2**24 // size), size)  # more than fits in the caches
    times = {}
    for layout in LAYOUTS:
        works = [layout(weight, d_in) for weight in memory[:512]]
        times[layout] = min(timed(partial(_all, works))[1] for _ in range(3))
    return min(times, key=times.__getitem__)


def _all(works: Sequence[Callable[[], Tensor]]) -> None:
    for work in works:
        work()
