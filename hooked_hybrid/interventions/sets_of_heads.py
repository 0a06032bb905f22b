"""Sets of heads: by layer, as pairs, or as masks that differ between rows of a batch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from jaxtyping import Bool
from torch import Tensor

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.slicing import whole_numbers

Heads = Mapping[int, Iterable[int] | Bool[Tensor, "..."]] | Iterable[tuple[int, int]]
HeadSets = dict[int, tuple[int, ...] | Tensor]


def check_heads(cfg: HybridConfig, heads: Heads) -> None:
    """Refuse heads that a model does not have, before anything runs.

    Raises:
        ValueError: a layer without heads, a head that its layer does not have, or a mask of another
            width; the message lists the layers with heads.

    Examples:
        >>> interventions.check_heads(model.cfg, {2: [0, 7]})
        >>> interventions.check_heads(model.cfg, {3: [0]})
        Traceback (most recent call last):
            ...
        ValueError: layer 3 has no heads; heads are in layers 2 (8 heads), 5 (8 heads)
    """
    n_heads = _n_heads(cfg)
    has = "heads are in layers " + ", ".join(f"{i} ({n} heads)" for i, n in n_heads.items())
    for layer, mine in by_layer(heads).items():
        if layer not in n_heads:
            raise ValueError(f"layer {layer} has no heads; {has if n_heads else 'no layer has'}")
        if isinstance(mine, Tensor) and mine.shape[-1] != n_heads[layer]:
            raise ValueError(f"the mask of layer {layer} is of {mine.shape[-1]} heads; {has}")
        if not isinstance(mine, Tensor) and max(mine, default=0) >= n_heads[layer]:
            raise ValueError(f"head {max(mine)} of layer {layer}, counted from 0; {has}")


def masks_of_rows(
    cfg: HybridConfig, heads_of_rows: Sequence[Heads]
) -> dict[int, Bool[Tensor, "batch _"]]:
    """Return a set of heads for each row of a batch, as masks of every attention layer.

    Args:
        cfg: of the model.
        heads_of_rows: the set of each row of the original batch, in order; sets may be empty.

    Raises:
        ValueError: no row, a set that is itself a mask for rows, or as `check_heads`.

    Examples:
        >>> masks = interventions.masks_of_rows(model.cfg, [{2: [0]}, {5: [1, 2]}])
        >>> masks[5].sum(1)
        tensor([0, 2])
    """
    sets = [by_layer(heads) for heads in heads_of_rows]
    if not sets or any(isinstance(m, Tensor) and m.ndim > 1 for s in sets for m in s.values()):
        raise ValueError("heads_of_rows: give a set of heads for each row, by number")
    for heads in sets:
        check_heads(cfg, heads)
    return {
        layer: torch.stack([flags(heads.get(layer, ()), n) for heads in sets])
        for layer, n in _n_heads(cfg).items()
    }


def by_layer(heads: Heads) -> HeadSets:
    """Return a set of heads by layer, as numbers or as masks [head] or [batch head]."""
    if not isinstance(heads, Mapping):
        pairs = [tuple(pair) for pair in heads]
        if any(len(pair) != 2 for pair in pairs):
            raise ValueError(f"heads {pairs}: give {{layer: [heads]}} or pairs (layer, head)")
        heads = {layer: [h for i, h in pairs if i == layer] for layer, _ in pairs}
    chosen: HeadSets = {}
    for key, given in heads.items():
        (layer,) = whole_numbers(key, "layer")
        if isinstance(given, Tensor) and given.dtype == torch.bool:
            if given.ndim not in (1, 2):
                raise ValueError(f"a mask of heads is [batch head], not {tuple(given.shape)}")
            chosen[layer] = given
        else:
            mine = tuple(given)
            chosen[layer] = whole_numbers(mine, f"heads of layer {layer}") if mine else ()
    return chosen


def flags(mine: tuple[int, ...] | Tensor, n_heads: int) -> Bool[Tensor, "*batch head"]:
    """Return the chosen heads of a layer as a mask; a mask is returned as it is."""
    return mine if isinstance(mine, Tensor) else torch.tensor([h in mine for h in range(n_heads)])


def _n_heads(cfg: HybridConfig) -> dict[int, int]:
    layers = enumerate(cfg.layers)
    return {i: of.attention.n_heads for i, of in layers if of.attention is not None}
