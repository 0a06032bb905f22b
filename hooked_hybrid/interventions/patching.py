"""Patching: replacing values by those of another run, and cutting attention edges.

Rows and positions are matched by `hook.run.rows` and the position in the document, never by index
in a tensor. So a patch has the same effect in a plain forward, in pieces of a long prefill, in
cached steps past the window, and with padding.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.names import HookNameError, NameFilter, matching
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import Indices, whole_numbers
from hooked_hybrid.interventions.donors import Donor, read_kept
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.places import (
    Positions,
    is_among,
    is_of_rows,
    marks_of,
    read_positions,
    read_rows,
)
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.shapes import Pattern

Cache = Mapping[Any, Tensor]


@picklable
def patch(
    cache: Cache,
    names: NameFilter,
    *,
    positions: Positions | None = None,
    rows: Indices | None = None,
    heads: Indices | None = None,
    attention_mask: Int[Tensor, "donor_batch donor_pos"] | None = None,
) -> list[HookSpec]:
    """Replace values by those of another run, the donor, at the same document positions.

    The donor is read by the positions in its cache, whatever its padding, `pos_slice` or state.
    (A donor made by hand begins at position 0.) It has one row, used for all, or one for each row
    of the batch. In a packed row, positions count from the start of each document, and each is
    patched; a donor must not be packed.

    Args:
        cache: the donor: an `ActivationCache`, or a mapping from full names to tensors.
        names: the values to replace, by names in the donor: a name, a shorthand (`("z", 2)`), a
            pattern (`"blocks.*.attn.hook_z"`), a list of those, or a predicate on names. Patterns
            and predicates select no gradients.
        positions: in the document, counted from 0, or a mask that is True at them: [pos], or
            [batch pos] if rows differ; None means every position of the run, all of which the
            donor must then have.
        rows: of the original batch, or a mask [batch]; None means all.
        heads: on the value's head axis (key-value heads at `hook_k`, `hook_v`); None means all.
        attention_mask: of the donor's run, if its rows are padded and it is made by hand.

    Raises:
        HookNameError: the donor, or the model, has no such name.
        ValueError: an index that is not a whole number from 0 on; an invalid mask, or one of
            another run; a packed donor. When first run: the donor's shape differs in other axes
            than batch and positions, or it lacks a selected position, row or head; `heads` for a
            value without heads.

    Source: activation patching, as `TransformerLens.patching` does it by index.

    Examples:
        >>> _, donor = model.run_with_cache(model.to_tokens(text.replace("Dolores", "Riga")))
        >>> hooks = interventions.patch(donor, ("resid_pre", 0), positions=[7])
        >>> model.generate(text, 1, prefill_hooks=hooks, verbose=False).split()[-1]
        'Riga'
    """
    donors = {
        name: Donor.of(value, attention_mask, places)
        for name, (value, places) in _named(cache, names).items()
    }
    chosen = read_positions(positions)
    chosen_rows = read_rows(rows)
    chosen_heads = None if heads is None else whole_numbers(heads, "heads")

    @per_position
    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        donor, run = donors[str(hook.name)], hook.run
        at = is_among(run.query_pos, chosen, hook)
        if chosen_rows is not None:
            at = at & is_of_rows(chosen_rows, hook)[:, None]
        shape = [1] * value.ndim
        shape[0], shape[hook.pos_dim] = at.shape
        here = at.view(shape)
        if chosen_heads is not None:
            here = here & _heads_of(value, chosen_heads, hook)
        return torch.where(here, donor.at(value, at, hook), value)

    marked: Any = replace
    if chosen is not None:  # a recurrent scan needs to stop only there
        marked.positions = marks_of(chosen)
    return [(list(donors), marked)]


def freeze(
    cache: Cache,
    names: NameFilter,
    *,
    attention_mask: Int[Tensor, "donor_batch donor_pos"] | None = None,
) -> list[HookSpec]:
    """Keep values at those of the donor: `patch` at all positions, rows and heads.

    For example, freeze the attention patterns while something else is edited: the remaining effect
    does not go through them. A position that the donor lacks is an error. To freeze the prompt of a
    generation, pass these as `prefill_hooks`.

    Args:
        cache, names, attention_mask: as in `patch`.

    Raises:
        HookNameError, ValueError: as `patch`.

    Examples:
        >>> hooks = interventions.freeze(cache, "blocks.*.attn.hook_pattern")
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, frozen = model.run_with_cache(tokens.flip(1))
        >>> torch.equal(frozen["pattern", 5], cache["pattern", 5])
        True
    """
    return patch(cache, names, attention_mask=attention_mask)


@picklable
def knock_out_edges(
    query_positions: Positions | None,
    key_positions: Positions | None,
    *,
    layers: int | Iterable[int] | None = None,
    heads: Indices | None = None,
    renormalise: bool = True,
) -> list[HookSpec]:
    """Cut attention from each of some queries to each of some keys.

    Args:
        query_positions, key_positions: as `positions` of `patch`; None means every one. Single
            edges are several calls.
        layers: attention layers; None means all.
        heads: in each of these layers; None means all.
        renormalise: True sets scores to minus infinity, so that the softmax distributes the weight
            among the remaining keys; a query without remaining keys attends to nothing (z = 0, and
            the layer's output is its bias). False sets weights to 0 and does not change the others.

    Raises:
        ValueError: an index that is not a whole number from 0 on; when first run, a head that a
            layer does not have, or a mask with another number of rows than the batch.
        HookNameError: when attached, a layer without attention.

    Source: Geva et al. 2023, "Dissecting recall of factual associations", attention knockout
    (renormalised, as here by default).

    Examples:
        >>> hooks = interventions.knock_out_edges([15], [7], heads=[0], layers=[5])
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, cut = model.run_with_cache(tokens)
        >>> cut["pattern", 5][0, 0, 15, 7].item()
        0.0
    """
    queries = read_positions(query_positions, "query_positions")
    keys = read_positions(key_positions, "key_positions")
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


def _named(cache: Cache, names: NameFilter) -> dict[str, tuple[Tensor, Places | None]]:
    """Return the donor's values by full name, with a batch axis and places."""
    known = [n for n in cache if isinstance(n, str) and not n.endswith("_grad")]
    try:
        found = matching(names, known, getattr(cache, "n_layers", 0))
    except HookNameError:
        if isinstance(cache, ActivationCache):
            cache.names_of(names)  # its errors say how to keep a value
        raise
    return {name: read_kept(cache, name) for name in found}
