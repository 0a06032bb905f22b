"""Patching: values of another run in the place of this one's, and attention edges cut.

Rows and positions are matched by what they are, `hook.run.rows` and the position in the document,
never by where they stand in a tensor: so a patch is the same in a plain forward, in pieces of a
long prefill, in cached steps past the window, and with padding.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.cache import ActivationCache
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.hooks import HookPoint, per_position
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.rows import entries_of_rows
from hooked_hybrid.layout import lay_out
from hooked_hybrid.names import NameFilter, Shorthand, matching, resolve
from hooked_hybrid.shapes import Pattern

Names = Shorthand | list[Shorthand] | Callable[[str], bool]
Positions = int | Iterable[int] | Bool[Tensor, "batch _"]
Cache = Mapping[Any, Tensor]


@picklable
def patch(
    cache: Cache,
    names: Names,
    *,
    positions: Positions | None = None,
    rows: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    attention_mask: Int[Tensor, "donor_batch donor_pos"] | None = None,
) -> list[HookSpec]:
    """Replace values by those that another run, the donor, had at the same document positions.

    The donor read its sequences from position 0 on. It has one row, which serves all, or a row for
    each of the batch. In a packed row each document is counted, and patched, from its own start.

    Args:
        cache: the donor: an `ActivationCache`, or a mapping from full names to tensors.
        names: what to replace, as the donor names it: a name or shorthand (`("z", 2)`), a list of
            those, or a predicate on names (which is not asked about gradients).
        positions: in the document, counted from 0, or True at them [batch pos] where rows differ;
            None means every one that is met, and then the donor must have them all.
        rows: of the original batch; None means all.
        heads: on the value's head axis (key-value heads at `hook_k`, `hook_v`); None means all.
        attention_mask: of the donor's run, where its rows are padded.

    Raises:
        HookNameError: the donor, or the model, has no such name.
        ValueError: an index that is no whole number from 0 on; a bad mask; a cache without the
            run's first positions (`pos_slice`). When first run: the
            donor's shape differs in more than batch and positions, or it lacks a position, row or
            head that is asked for; `heads` where there are none.

    Source: activation patching, as `TransformerLens.patching` does it by index.
    """
    values = _named(cache, names)
    donors = {name: Donor.of(value, attention_mask) for name, value in values.items()}
    chosen = read_positions(positions)
    chosen_rows = None if rows is None else whole_numbers(rows, "rows")
    chosen_heads = None if heads is None else whole_numbers(heads, "heads")

    @per_position
    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        donor, run = donors[str(hook.name)], hook.run
        at = is_among(run.query_pos, chosen, hook)
        if chosen_rows is not None:
            at = at & _is_chosen_row(chosen_rows, hook)[:, None]
        shape = [1] * value.ndim
        shape[0], shape[hook.pos_dim] = at.shape
        here = at.view(shape)
        if chosen_heads is not None:
            here = here & _heads_of(value, chosen_heads, hook)
        return torch.where(here, donor.at(value, at, hook), value)

    marked: Any = replace
    if isinstance(chosen, Tensor):  # the scan of a recurrence need not stop anywhere else
        marked.positions = tuple(chosen.any(dim=0).nonzero()[:, 0].tolist())
    elif chosen is not None:
        marked.positions = chosen
    return [(list(donors), marked)]


def freeze(
    cache: Cache,
    names: Names,
    *,
    attention_mask: Int[Tensor, "donor_batch donor_pos"] | None = None,
) -> list[HookSpec]:
    """Hold values at what the donor had, everywhere: `patch` at all positions, rows and heads.

    Freeze the attention patterns, say, while something else is edited: what then changes did not
    go through them. A position that the donor lacks is an error, not left to move: to freeze the
    prompt of a generation, give these as `prefill_hooks`.

    Args:
        cache, names, attention_mask: as in `patch`.

    Raises:
        HookNameError, ValueError: as `patch`.
    """
    return patch(cache, names, attention_mask=attention_mask)


@picklable
def knock_out_edges(
    query_positions: Positions | None,
    key_positions: Positions | None,
    *,
    layers: int | Iterable[int] | None = None,
    heads: int | Iterable[int] | None = None,
    renormalise: bool = True,
) -> list[HookSpec]:
    """Cut attention from each of some queries to each of some keys.

    Args:
        query_positions, key_positions: in the document, counted from 0, or True at them
            [batch pos] where rows differ; None means every one. Single edges are several calls.
        layers: attention layers; None means all.
        heads: in each of these layers; None means all.
        renormalise: True sets scores to minus infinity, so that the softmax shares the weight
            among the keys left; a query that has none left attends to nothing (z = 0, and the
            layer writes its output bias alone). False sets weights to 0 and leaves the others.

    Raises:
        ValueError: an index that is no whole number from 0 on; when first run, a head above those
            of a layer, or a mask with another number of rows than the batch.
        HookNameError: when attached, a layer without attention.

    Source: Geva et al. 2023, "Dissecting recall of factual associations", attention knockout
    (renormalised, as here by default).
    """
    queries, keys = read_positions(query_positions), read_positions(key_positions)
    chosen_heads = None if heads is None else whole_numbers(heads, "heads")
    leaf, nothing = ("attn_scores", -torch.inf) if renormalise else ("pattern", 0.0)

    @per_position
    def cut(value: Pattern, hook: HookPoint) -> Pattern:
        run = hook.run
        assert run.key_pos is not None
        from_query = is_among(run.query_pos, queries, hook)
        to_key = is_among(run.key_pos, keys, hook)
        edges = from_query[:, None, :, None] & to_key[:, None, None, :]
        if chosen_heads is not None:
            edges = edges & _heads_of(value, chosen_heads, hook)
        return value.masked_fill(edges, nothing)

    where: NameFilter = lambda name: name.endswith(f".attn.hook_{leaf}")  # noqa: E731
    if layers is not None:
        where = [f"blocks.{i}.attn.hook_{leaf}" for i in whole_numbers(layers, "layers")]
    return [(where, cut)]


@dataclass(frozen=True)
class Donor:
    """What another run left at one hook point, found by row and position in the document.

    `is_real` says which of its positions are tokens; None means all.
    """

    value: Tensor
    is_real: Bool[Tensor, "donor_batch donor_pos"] | None = None

    @classmethod
    def of(cls, value: Tensor, attention_mask: Tensor | None = None) -> Donor:
        """Return the donor of a value [batch pos ...] or [batch head query key].

        Raises:
            ValueError: the mask is not one.
        """
        if attention_mask is None:
            return cls(value)
        return cls(value, lay_out(attention_mask, None, attention_mask, None).is_real)

    def at(self, value: Tensor, wanted: Bool[Tensor, "batch pos"], hook: HookPoint) -> Tensor:
        """Return what the donor had for the rows and positions of `value`, in its shape.

        Args:
            value: what a hook was given.
            wanted: where the result is used; elsewhere it is arbitrary.
            hook: where.

        Raises:
            ValueError: the donor has another shape or dtype, or lacks a row or position.
        """
        donor, pos = self.value.to(value.device), hook.run.query_pos
        n_pos = self._checked_length(value, hook)
        row = torch.zeros_like(hook.run.rows)
        if donor.shape[0] > 1:
            row = index_of_rows(donor.shape[0], f"the donor of {hook.name!r}", hook)
        start, length = torch.zeros_like(row), torch.full_like(row, n_pos)
        if self.is_real is not None:
            is_real = self.is_real.to(row.device)[row]
            start, length = is_real.int().argmax(dim=1), is_real.sum(dim=1)
        if bool((missing := wanted & (pos >= length[:, None])).any()):
            i, t = missing.nonzero()[0].tolist()
            raise ValueError(
                f"the donor of {hook.name!r} has {int(length[i])} positions for row "
                f"{int(hook.run.rows[i])}, none for position {int(pos[i, t])}; say which to "
                "replace with patch(positions=...)"
            )
        query = (start[:, None] + pos.clamp_min(0)).clamp_max(n_pos - 1)
        if hook.run.key_pos is None or "key" not in hook.axes:
            return donor[row[:, None], query]
        key = (start[:, None] + hook.run.key_pos.clamp_min(0)).clamp_max(n_pos - 1)
        picked = donor[row[:, None], :, query].transpose(1, 2)
        return picked.gather(-1, key[:, None, None].expand(*picked.shape[:3], -1))

    def _checked_length(self, value: Tensor, hook: HookPoint) -> int:
        """Return how many positions there are, all else being as in `value`."""
        mine = self.value
        free = {0} | {hook.axes.index(a) for a in ("pos", "query", "key") if a in hook.axes}
        fits = mine.ndim == value.ndim and mine.dtype == value.dtype
        if not fits or any(mine.shape[i] != n for i, n in enumerate(value.shape) if i not in free):
            raise ValueError(
                f"the donor of {hook.name!r} has shape {tuple(mine.shape)} and {mine.dtype}, the "
                f"value it would replace {tuple(value.shape)} and {value.dtype}: they may differ "
                "in batch and positions only"
            )
        n_pos = mine.shape[hook.pos_dim]
        if "key" in hook.axes and mine.shape[-1] != n_pos:
            raise ValueError(
                f"the donor of {hook.name!r} has {n_pos} queries and {mine.shape[-1]} keys: give "
                "a run from position 0 on, where there are as many"
            )
        if self.is_real is not None and self.is_real.shape != (mine.shape[0], n_pos):
            raise ValueError(
                f"attention_mask has shape {tuple(self.is_real.shape)}, the donor of "
                f"{hook.name!r} has {mine.shape[0]} rows of {n_pos} positions"
            )
        return n_pos


def index_of_rows(n: int, what: str, hook: HookPoint) -> Int[Tensor, " row"]:
    """Return which of `n` entries, one for each row of the original batch, each row here has.

    Raises:
        ValueError: the batch has another number of rows.
    """
    return entries_of_rows(torch.arange(n), hook, what)


def whole_numbers(given: int | Iterable[int], what: str) -> tuple[int, ...]:
    """Return indices as a tuple.

    Raises:
        ValueError: none, or one that is negative, a fraction, or True or False.
    """
    several = tuple(given) if isinstance(given, Iterable) else (given,)
    try:
        found = tuple(operator.index(i) for i in several)
    except TypeError:
        found = ()
    are_flags = any(isinstance(i, bool) or getattr(i, "dtype", 0) == torch.bool for i in several)
    if not found or are_flags or min(found) < 0:
        raise ValueError(f"{what} {several}: give one or more whole numbers, counted from 0")
    return found


def is_among(
    pos: Int[Tensor, "batch n"], chosen: tuple[int, ...] | Tensor | None, hook: HookPoint
) -> Bool[Tensor, "batch n"]:
    """Return True at the tokens that stand at one of the chosen positions."""
    if chosen is None:
        return pos >= 0
    if isinstance(chosen, tuple):
        return torch.isin(pos, torch.tensor(chosen, dtype=pos.dtype, device=pos.device))
    row = index_of_rows(chosen.shape[0], "the mask of positions", hook)
    mask, n = chosen.to(pos.device), chosen.shape[1]
    return mask[row[:, None], pos.clamp(0, n - 1)] & (pos >= 0) & (pos < n)


def read_positions(positions: Positions | None) -> tuple[int, ...] | Tensor | None:
    """Return positions as a tuple, or as they are where rows have their own."""
    if positions is None:
        return None
    if isinstance(positions, Tensor) and positions.dtype == torch.bool:
        if positions.ndim != 2 or not positions.any():
            raise ValueError(f"{positions}: a mask of positions is [batch pos], with one True")
        return positions
    return whole_numbers(positions, "positions")


def _is_chosen_row(chosen: tuple[int, ...], hook: HookPoint) -> Bool[Tensor, " batch"]:
    rows = hook.run.rows
    if hook.run.step == 0 and max(chosen, default=0) > int(rows.max()):
        raise ValueError(f"rows {chosen}: the batch has {int(rows.max()) + 1} rows")
    return torch.isin(rows, torch.tensor(chosen, dtype=rows.dtype, device=rows.device))


def _heads_of(value: Tensor, heads: tuple[int, ...], hook: HookPoint) -> Bool[Tensor, ...]:
    """Return True at the chosen heads, in a shape that broadcasts to `value`."""
    dim = next((hook.axes.index(a) for a in ("head", "kv_head") if a in hook.axes), None)
    if dim is None:
        raise ValueError(f"{hook.name!r} has axes {hook.axes}, none of them heads")
    n_heads = value.shape[dim]
    if max(heads, default=0) >= n_heads:
        raise ValueError(f"heads {heads}: layer {hook.layer()} has {n_heads} here, from 0")
    chosen = torch.zeros(n_heads, dtype=torch.bool, device=value.device)
    chosen[list(heads)] = True
    return chosen.view(*(1,) * dim, -1, *(1,) * (value.ndim - dim - 1))


def _named(cache: Cache, names: Names) -> dict[str, Tensor]:
    """Return what the donor has under these names, by full name and with a batch axis."""
    known = [n for n in cache if isinstance(n, str) and not n.endswith("_grad")]
    n_layers, has_batch = 0, True
    if isinstance(cache, ActivationCache):
        cache.require_first_positions("patching")
        n_layers, has_batch = cache.model.cfg.n_layers, cache.has_batch_dim
    several = names if isinstance(names, list) else [names]
    selector: NameFilter = (
        names if callable(names) else [resolve(key, known, n_layers) for key in several]  # type: ignore[arg-type]
    )
    found = matching(selector, known)
    return {name: cache[name] if has_batch else cache[name][None] for name in found}


__all__ = ["freeze", "knock_out_edges", "patch"]
