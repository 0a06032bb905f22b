"""Softmax attention over the queries, keys and values of heads: its definition and fast versions.

The layer calls `attend`. `attend_whole` is the definition, with the scores and pattern of all
queries at once; `attend_blocks` computes them for one block of queries and its visible keys at a
time, and calls the hooks on each block; `attend_fused` uses torch's kernel, which stores neither.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint, changed_meanwhile
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.network.attention.fused_gradient import twice_differentiable
from hooked_hybrid.network.finite import is_finite
from hooked_hybrid.network.kernels import fused_attention
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.plan import attention_way
from hooked_hybrid.shapes import KeysValues, Mask, Pattern, Queries

BLOCK = 64
"""Queries of a block on a CPU, so that few masked scores are computed and scores fit the cache."""

HeadQueries = Float[Tensor, "batch_kv group_query d_head"]
HeadKeys = Float[Tensor, "batch_kv key d_head"]


@dataclass(frozen=True)
class Sight:
    """The keys that each query sees: those of its document up to its position, within a window.

    Cached keys come first, then new ones; `key_pos` holds their positions (-1 for no token). The
    last `layout.length` keys have the positions of the queries. `n_keys` is the size of the window,
    the query itself included; None means no window.
    """

    layout: Layout
    key_pos: Int[Tensor, "batch key"]
    n_keys: int | None

    @property
    def n_cached(self) -> int:
        """Number of keys before the first query."""
        return self.key_pos.shape[1] - self.layout.length

    def keys_of(self, start: int, stop: int) -> slice:
        """Return a range of keys that contains every key that queries `start` to `stop` see."""
        first = 0
        if self.n_keys is not None and self.layout.is_plain:
            first = max(0, self.n_cached + start - (self.n_keys - 1))
        return slice(first, self.n_cached + stop)

    def mask(self, start: int, stop: int) -> Mask:
        """Return True where queries `start` to `stop` see a key of `keys_of(start, stop)`.

        The batch axis has length 1 if all rows are alike.
        """
        layout, keys = self.layout, self.keys_of(start, stop)
        q_pos, k_pos = layout.pos[:, start:stop], self.key_pos[:, keys]
        if layout.is_plain:
            q_pos, k_pos = q_pos[:1], k_pos[:1]
        distance = q_pos[:, :, None] - k_pos[:, None, :]
        mask = distance >= 0
        if self.n_keys is not None:
            mask &= distance < self.n_keys
        if layout.is_plain:
            return mask
        mask &= (k_pos >= 0)[:, None, :]
        docs = layout.key_docs(self.n_cached)
        if docs is not None and layout.doc is not None:
            mask &= layout.doc[:, start:stop, None] == docs[:, None, keys]
        return mask

    def sees_all(self, start: int, stop: int) -> bool:
        """Whether each of these queries sees every key of `keys_of(start, stop)`."""
        return self.layout.is_plain and stop - start == 1

    def is_causal(self, start: int, stop: int) -> bool:
        """Whether keys and queries have equal positions, and each query sees all keys up to it."""
        is_first = self.layout.is_plain and self.n_cached == start == 0
        return is_first and (self.n_keys is None or stop <= self.n_keys)

    def hide(self, scores: Pattern, start: int, stop: int) -> Pattern:
        """Set the scores of unseen keys in a block to the lowest finite value, in place.

        If rows are alike, unseen keys lie in two corners of the block: keys after the query, and
        keys that have left its window.
        """
        if self.sees_all(start, stop):
            return scores
        lowest, n = torch.finfo(scores.dtype).min, stop - start
        if not self.layout.is_plain:
            return scores.masked_fill_(~self.mask(start, stop)[:, None], lowest)
        corner = self.layout.once(("corner", n), lambda: _corner(n, scores.device))
        scores[..., -n:].masked_fill_(corner, lowest)
        if self.n_keys is not None and scores.shape[-1] > self.n_keys:
            gone = scores.shape[-1] - self.n_keys  # of the last query; the first sees one more each
            left = self.layout.once(("left", n, gone), lambda: _left(n, gone, scores.device))
            scores[..., :gone].masked_fill_(left, lowest)
        return scores


@dataclass(frozen=True)
class Hooks:
    """The hook points of attention: scores, pattern and z."""

    scores: HookPoint
    pattern: HookPoint
    z: HookPoint

    @property
    def are_inside(self) -> bool:
        """Whether scores or patterns are hooked."""
        return self.scores.is_hooked or self.pattern.is_hooked

    @property
    def take_blocks(self) -> bool:
        """Whether everything attached may be called on blocks of queries."""
        return all(p.takes_pieces for p in (self.scores, self.pattern, self.z))


class _Attached:
    """The hooks attached when attention begins, which are called on every block.

    A hook that removes itself still acts on all queries, as when attention runs whole. A hook that
    is attached meanwhile would be called on some blocks only, or on none.
    """

    def __init__(self, hooks: Hooks) -> None:
        self.handles = {p: tuple(p.fwd_hooks) for p in (hooks.scores, hooks.pattern, hooks.z)}

    def has(self, point: HookPoint) -> bool:
        """Whether anything is attached."""
        return bool(self.handles[point])

    def call(
        self,
        point: HookPoint,
        x: Tensor,
        constrain: Callable[[Tensor], Tensor] | None = None,
        run: Run | None = None,
        later: tuple[HookPoint, ...] = (),
    ) -> Tensor:
        """Return a value after the hooks of its point.

        Raises:
            RuntimeError: one of them attached a hook to a point that comes `later`.
        """
        if not self.handles[point]:
            return x
        x = point.apply_hooks(x, self.handles[point], (), constrain, run)
        for other in later:
            if not {*other.fwd_hooks} <= {*self.handles[other]}:
                raise RuntimeError(changed_meanwhile(other))
        return x


def attend(q: Queries, k: KeysValues, v: KeysValues, sight: Sight, hooks: Hooks) -> Queries:
    """Return z: for each head and query, the sum of the seen values weighted by the pattern.

    Args:
        q: queries, rotated.
        k, v: cached and new keys and values; `n_kv_heads` may divide the query heads.
        sight: the keys that each query may see.
        hooks: the points on scores, pattern and z.
    """
    way = attention_way(hooks.scores, hooks.pattern, hooks.z, q.device)
    if way != "whole" and q.shape[1] > 1 and not is_finite(k, v):
        way = "whole"  # it reads nothing of masked keys, as 0 times NaN is NaN
    if way == "whole":
        return hooks.z(attend_whole(q, k, v, sight, hooks))
    if way == "fused" or (q.shape[1] == 1 and not hooks.are_inside):
        return hooks.z(attend_fused(q, k, v, sight))
    return attend_blocks(q, k, v, sight, hooks)


def attend_whole(q: Queries, k: KeysValues, v: KeysValues, sight: Sight, hooks: Hooks) -> Queries:
    """Return z through the scores and pattern of all queries and keys: the definition."""
    run = sight.layout.run.with_keys(sight.key_pos)
    lowest, n_kv = torch.finfo(q.dtype).min, k.shape[2]
    hidden = _hidden(sight)
    grouped_q = rearrange(q, "b q (kv g) e -> b kv g q e", kv=n_kv)
    grouped_k = rearrange(k, "b k kv e -> b kv 1 k e")
    scores = (grouped_q @ grouped_k.transpose(-1, -2)).flatten(1, 2) * q.shape[-1] ** -0.5
    scores = hooks.scores(
        scores.masked_fill(hidden, lowest), lambda s: s.masked_fill(hidden, lowest), run
    )
    pattern = hooks.pattern(softmax_or_zero(scores), lambda p: p.masked_fill(hidden, 0), run)
    pattern = pattern.unflatten(1, (n_kv, -1))
    if is_finite(v):
        z = pattern @ rearrange(v, "b k kv e -> b kv 1 k e")
    else:
        z = _read_one_by_one(pattern, v, hidden)
    return rearrange(z, "b kv g q e -> b q (kv g) e")


def _read_one_by_one(
    pattern: Float[Tensor, "batch kv group query key"],
    v: KeysValues,
    hidden: Bool[Tensor, "#batch 1 query key"],
) -> Float[Tensor, "batch kv group query d_head"]:
    """Return z where values are not finite: those that a query does not see are 0 for it."""
    found = []
    for t in range(pattern.shape[3]):
        seen = v.masked_fill(hidden[:, 0, t, :, None, None], 0)
        found.append(torch.einsum("bvgk,bkve->bvge", pattern[..., t, :], seen))
    return torch.stack(found, dim=3)


def attend_fused(q: Queries, k: KeysValues, v: KeysValues, sight: Sight) -> Queries:
    """Return z without materialising scores, by torch's kernel."""
    length = q.shape[1]
    if sight.sees_all(0, length):
        keys = sight.keys_of(0, length)
        k, v = k[:, keys], v[:, keys]
        return twice_differentiable(fused_attention.read_all(q, k, v), q, k, v, None)
    block = fused_attention.block_length(length, sight.n_keys, q.is_cuda)
    parts = []
    for start in range(0, length, block):
        stop = min(start + block, length)
        keys = sight.keys_of(start, stop)
        read = q[:, start:stop], k[:, keys], v[:, keys]
        if q.is_cuda and sight.is_causal(start, stop):
            z = fused_attention.read_causal(*read)
            parts.append(twice_differentiable(z, *read, None, is_causal=True))
        else:
            mask = sight.mask(start, stop)
            z = fused_attention.read_masked(*read, mask)
            parts.append(twice_differentiable(z, *read, mask))
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


@torch.no_grad()
def attend_blocks(q: Queries, k: KeysValues, v: KeysValues, sight: Sight, hooks: Hooks) -> Queries:
    """Return z, scores and pattern materialised for a block of queries at a time.

    Hooks are called on each block, with the keys that its queries may see. If scores or patterns
    are hooked, hooks on z are called on each block too, so that hooks can pass values to later
    ones. Watchers that need whole tensors are called at the end, on the joined blocks.
    """
    attached = _Attached(hooks) if hooks.are_inside else None
    by_block = attached is not None and hooks.take_blocks
    whole = None if attached is None or by_block else _Whole(q, sight, hooks, attached)
    z = torch.empty_like(q)
    heads_k, heads_v = (t.transpose(1, 2).flatten(0, 1) for t in (k, v))
    for start in range(0, q.shape[1], BLOCK):
        stop = min(start + BLOCK, q.shape[1])
        keys = sight.keys_of(start, stop)
        queries = rearrange(q[:, start:stop], "b q (kv g) e -> (b kv) (g q) e", kv=k.shape[2])
        scores = _scores(queries, heads_k[:, keys]).view(q.shape[0], q.shape[2], stop - start, -1)
        scores = sight.hide(scores, start, stop)
        if attached is not None and by_block:
            pattern = _hooked_pattern(scores, sight, hooks, attached, start)
        else:
            pattern = _watched_pattern(scores, sight, hooks, start, whole)
        z_block = torch.bmm(pattern.view(*queries.shape[:2], -1), heads_v[:, keys])
        z_block = z_block.view(*scores.shape[:3], -1).transpose(1, 2)
        if attached is not None and by_block:
            z_block = attached.call(hooks.z, z_block, run=sight.layout.run.at(start, stop))
        z[:, start:stop] = z_block
    if whole is not None:
        whole.show()
    return z if by_block else hooks.z(z)


def _scores(queries: HeadQueries, keys: HeadKeys) -> Float[Tensor, "batch_kv group_query key"]:
    """Return scaled scores, the scale inside the product."""
    scale = queries.shape[-1] ** -0.5
    unused = queries.new_empty(())
    return torch.baddbmm(unused, queries, keys.transpose(1, 2), beta=0, alpha=scale)


def _hooked_pattern(
    scores: Pattern, sight: Sight, hooks: Hooks, attached: _Attached, start: int
) -> Pattern:
    """Return the pattern of one block after its hooks."""
    stop = start + scores.shape[2]
    run = sight.layout.run.at(start, stop).with_keys(sight.key_pos[:, sight.keys_of(start, stop)])
    lowest = torch.finfo(scores.dtype).min
    is_edited = not all(h.is_watcher for h in attached.handles[hooks.scores])
    scores = attached.call(
        hooks.scores,
        scores,
        lambda s: s.masked_fill(~sight.mask(start, stop)[:, None], lowest),
        run,
        later=(hooks.pattern, hooks.z),
    )
    pattern = _softmax(scores, sight, is_edited, overwrite=not attached.has(hooks.scores))
    pattern = attached.call(
        hooks.pattern,
        pattern,
        lambda p: p.masked_fill(~sight.mask(start, stop)[:, None], 0),
        run,
        later=(hooks.z,),
    )
    return pattern.contiguous()


def _watched_pattern(
    scores: Pattern, sight: Sight, hooks: Hooks, start: int, whole: _Whole | None
) -> Pattern:
    """Return the pattern of one block, scores and pattern also stored for watchers."""
    if whole is not None:
        whole.put(hooks.scores, scores, start)
    pattern = _softmax(scores, sight, is_edited=False, overwrite=True)
    if whole is not None:
        whole.put(hooks.pattern, pattern, start)
    return pattern


def _softmax(scores: Pattern, sight: Sight, is_edited: bool, overwrite: bool) -> Pattern:
    """Return the pattern; a query that sees nothing exists only at padding or after an edit."""
    if is_edited or not sight.layout.is_plain:
        return softmax_or_zero(scores)
    if scores.dtype in (torch.float32, torch.float64):
        return torch.softmax(scores, dim=-1, out=scores if overwrite else None)
    return scores.softmax(dim=-1, dtype=torch.float32).to(scores.dtype)


class _Whole:
    """Scores and patterns of all queries and keys, joined from blocks, for watchers."""

    def __init__(self, q: Queries, sight: Sight, hooks: Hooks, attached: _Attached) -> None:
        self.sight, self.attached, self.pattern = sight, attached, hooks.pattern
        shape = (q.shape[0], q.shape[2], q.shape[1], sight.key_pos.shape[1])
        empty = {hooks.scores: torch.finfo(q.dtype).min, hooks.pattern: 0.0}
        self.values = {p: q.new_full(shape, x) for p, x in empty.items() if attached.has(p)}

    def put(self, point: HookPoint, block: Pattern, start: int) -> None:
        """Copy a block to its place."""
        if point in self.values:
            stop = start + block.shape[2]
            self.values[point][:, :, start:stop, self.sight.keys_of(start, stop)] = block

    def show(self) -> None:
        """Call the watchers."""
        run = self.sight.layout.run.with_keys(self.sight.key_pos)
        for point, value in self.values.items():
            later = () if point is self.pattern else (self.pattern,)
            self.attached.call(point, value, run=run, later=later)


def softmax_or_zero(scores: Pattern) -> Pattern:
    """Return the softmax over keys in fp32, and zeros in rows whose every score is masked.

    A score at or below the lowest finite value of its dtype counts as masked. So a hook may also
    remove an edge with minus infinity.
    """
    lowest = torch.finfo(scores.dtype).min
    wide = torch.promote_types(scores.dtype, torch.float32)
    pattern = scores.clamp_min(lowest).softmax(dim=-1, dtype=wide).to(scores.dtype)
    return pattern.masked_fill(scores <= lowest, 0)


def _hidden(sight: Sight) -> Bool[Tensor, "#batch 1 query key"]:
    """Return True where a query does not see a key, over all keys."""
    length = sight.layout.length
    keys = sight.keys_of(0, length)
    hidden = ~sight.mask(0, length)[:, None]
    return torch.nn.functional.pad(hidden, (keys.start, 0), value=True)


def _corner(n: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Return True at the keys after each query, for n queries and n keys at the same positions."""
    return torch.ones(n, n, dtype=torch.bool, device=device).triu(1)


def _left(n: int, gone: int, device: torch.device) -> Bool[Tensor, "query key"]:
    """Return True at the first keys of a block that have left each query's window.

    `gone` keys have left the window of the last of n queries, and one fewer for each earlier query.
    """
    query, key = torch.arange(n, device=device), torch.arange(gone, device=device)
    return key < gone - (n - 1 - query[:, None])
