"""The positions in a cache: which it has, where padding is, and reading values without it.

Padding may be on the left or on the right of a row, so that index -1 is not each row's last
token. `attention_mask` says where tokens are; `last_token`, `mean_over_pos` and `unpadded` read a
value without padding. Positions are those of the document, counted from 0.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks.names import Shorthand
from hooked_hybrid.hooks.places import (
    last_index,
    names_single_positions,
    refuse_padding,
    take_per_row,
)
from hooked_hybrid.hooks.slicing import LAST, PosSlice, indices_on, slice_axis
from hooked_hybrid.model.cached_values import CachedValues


def positions(cache: CachedValues, name: Shorthand | None = None) -> Int[Tensor, "*batch pos"]:
    """Return the position in its document of each entry, -1 at padding.

    Args:
        cache: the cache.
        name: of which value; None means the one with the most positions.

    Raises:
        HookNameError: no such value.
        ValueError: no value has positions, or the cache was made by hand without a mask.

    Examples:
        >>> cache.positions()[0, :4]
        tensor([0, 1, 2, 3])
    """
    if name is not None:
        full = cache.full_name(name)
        pos = cache.pos_of(full)
    else:
        known = [cache.places[n].pos for n in cache if n in cache.places]
        if not known:
            known = [cache.pos_of(n) for n in cache if cache.dim_of_pos(n) is not None][:1]
        if not known:
            raise ValueError("no value of this cache has positions")
        full, pos = next(iter(cache)), max(known, key=lambda p: p.shape[1])
    pos = pos.to(cache.cache_dict[full].device, copy=True)
    return pos if cache.has_batch_dim else pos[0]


def has_padding(cache: CachedValues) -> bool:
    """Return whether any entry of any value is at padding, as far as known."""
    seen = {id(p.pos): p.pos for p in cache.places.values()}
    return any(bool((pos < 0).any()) for pos in seen.values())


def last_token(cache: CachedValues, name: Shorthand) -> Float[Tensor, ...]:
    """Return a value at each row's last token, without the axis of positions.

    Scores and patterns keep their keys [batch head key].

    Raises:
        HookNameError: no such value.
        IndexError: a row's last token was not kept.
        ValueError: the value has no positions.

    Examples:
        >>> cache.last_token(("resid_post", 5)).shape
        torch.Size([1, 128])
    """
    full = cache.full_name(name)
    value, dim = cache.batched(full)
    index = last_index(cache.pos_of(full), full)
    return cache.unbatched(take_per_row(value, index, dim).squeeze(dim))


def mean_over_pos(cache: CachedValues, name: Shorthand) -> Float[Tensor, ...]:
    """Return the mean of a value over each row's tokens, summed in fp32 or wider.

    Raises:
        HookNameError: no such value.
        ValueError: the value has no positions, or a row no token among them.

    Examples:
        >>> cache.mean_over_pos(("resid_post", 5)).shape
        torch.Size([1, 128])
    """
    full = cache.full_name(name)
    value, dim = cache.batched(full)
    is_real = (cache.pos_of(full) >= 0).to(value.device)
    n = is_real.sum(1)
    if bool((n == 0).any()):
        raise ValueError(f"{full!r} holds no token of row {int((n == 0).nonzero()[0])}")
    shape = [1] * value.ndim
    shape[0], shape[dim] = is_real.shape
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    total = wide.masked_fill(~is_real.view(shape), 0).sum(dim)
    return cache.unbatched((total / n.view(-1, *(1,) * (total.ndim - 1))).to(value.dtype))


def unpadded(cache: CachedValues, name: Shorthand) -> list[Tensor]:
    """Return a value of each row at its tokens alone: copies of different lengths.

    Scores and patterns lose the keys at padding too.

    Raises:
        HookNameError: no such value.
        ValueError: the value has no positions.

    Examples:
        >>> _, cache = model.run_with_cache(model.to_tokens(["a sandwich", "Dolores Park ."]))
        >>> [value.shape[0] for value in cache.unpadded("embed")]
        [3, 4]
    """
    full = cache.full_name(name)
    value, dim = cache.batched(full)
    pos, keys = cache.pos_of(full), cache.key_pos_of(full)
    rows = []
    for row, own in enumerate(value):
        here = (pos[row] >= 0).nonzero()[:, 0].to(own.device)
        own = own.index_select(dim - 1, here)
        if keys is not None:
            own = own.index_select(-1, (keys[row] >= 0).nonzero()[:, 0].to(own.device))
        rows.append(own)
    return rows


def value_at(cache: CachedValues, name: str, pos_slice: PosSlice) -> Tensor:
    """Return the value of a full name at some positions.

    Raises:
        IndexError: a position, or a row's last token, that was not kept.
        ValueError: the value has no positions, or a single position is padding in some row.
    """
    if pos_slice is None:
        return cache.cache_dict[name]
    value, dim = cache.batched(name)
    pos = cache.pos_of(name)
    if isinstance(pos_slice, str) and pos_slice == LAST:
        return cache.unbatched(take_per_row(value, last_index(pos, name), dim).squeeze(dim))
    found = slice_axis(value, pos_slice, dim)
    if names_single_positions(pos_slice):
        index = indices_on(pos_slice, pos.shape[1], "positions", tuple_is_slice=True)
        refuse_padding(pos.index_select(1, index.to(pos.device)), pos_slice, name)
    return cache.unbatched(found)


def require_first_positions(cache: CachedValues, purpose: str) -> None:
    """Refuse a cache whose values are not those of the run's first positions, all of them.

    Raises:
        ValueError: it was made with another `pos_slice`, so that an index means another place.
    """
    kept = cache.pos_slice
    if isinstance(kept, tuple):
        kept = slice(*kept)
    if isinstance(kept, slice):
        kept = None if kept.start in (None, 0) and kept.step in (None, 1) else kept
    if kept is not None:
        raise ValueError(
            f"{purpose} needs values from the run's first position on, and this cache was made "
            f"with pos_slice={cache.pos_slice}: make it without, or with slice(n)"
        )
