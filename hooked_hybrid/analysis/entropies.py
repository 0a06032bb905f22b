"""Entropy of each head's attention by position, in bits."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.watching import attention_of, no_totals, watch_patterns
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.shapes import Pattern, Tokens


@dataclass(frozen=True)
class EntropyProfile:
    """Entropy, in bits, of each head's pattern at each position.

    Attributes:
        layers: the attention layers.
        values: the mean over rows; NaN at positions that are padding in all of them.

    Examples:
        >>> profile = analysis.entropy_profile(cache)
        >>> profile.layers, profile.values.shape
        ((2, 5), torch.Size([2, 8, 16]))
    """

    layers: tuple[int, ...]
    values: Float[Tensor, "layer head pos"] = field(repr=False)

    def mean(self) -> HeadScores:
        """Return the mean over positions."""
        return HeadScores(self.layers, self.values.nanmean(-1), "entropy of the pattern (bits)")


def entropy(pattern: Float[Tensor, "*rest key"]) -> Float[Tensor, "*rest"]:
    """Return the entropy, in bits, of each row of a pattern, in fp32 or wider.

    A single key has 0 bits, n equal ones log2 n. (`interventions.negative_entropy`, as the papers'
    code, adds 1e-12 to each weight.)

    Examples:
        >>> analysis.entropy(torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25]]))
        tensor([1., 2.])
    """
    wide = pattern.to(torch.promote_types(pattern.dtype, torch.float32))
    return -(wide * wide.clamp_min(torch.finfo(wide.dtype).tiny).log2()).sum(-1)


def entropy_profile(
    source: HookedHybrid | ActivationCache,
    tokens: Tokens | Int[Tensor, " pos"] | None = None,
    attention_mask: Int[Tensor, "batch pos"] | None = None,
) -> EntropyProfile:
    """Return the entropy of every head's attention at each position.

    Args:
        source: a model, which is run on `tokens`, or a cache of every pattern, of a forward
            or of a generation.
        tokens, attention_mask: for a model, [batch pos] or [pos]; padding does not count.

    Raises:
        ValueError: a model without tokens, or tokens with a cache; no attention, or layers of
            different numbers of heads, which have no common table.
        HookNameError: a cache without a pattern.

    Examples:
        >>> analysis.entropy_profile(model, tokens).values.shape
        torch.Size([2, 8, 16])
    """
    model = source.model if isinstance(source, ActivationCache) else source
    no_totals(model)  # raises for such layers before anything runs
    if isinstance(source, ActivationCache):
        if tokens is not None or attention_mask is not None:
            raise ValueError("a cache has its patterns: leave tokens and attention_mask out")
        kept = {i: source["pattern", i] for i in attention_of(source.model)}
        bits = {i: _counted(p if source.has_batch_dim else p[None]) for i, p in kept.items()}
    else:
        if tokens is None:
            raise ValueError("a model needs tokens to be run on")
        bits = _of_run(source, tokens if tokens.ndim > 1 else tokens[None], attention_mask)
    values = torch.stack([b.nanmean(dim=0) for b in bits.values()])
    return EntropyProfile(tuple(bits), values)


def _of_run(
    model: HookedHybrid, tokens: Tokens, attention_mask: Tensor | None
) -> dict[int, Float[Tensor, "batch head query"]]:
    pieces: dict[int, list[Tensor]] = {i: [] for i in attention_of(model)}

    @per_position
    def keep(pattern: Pattern, hook: HookPoint) -> None:
        pieces[hook.layer()].append(_counted(pattern))

    watch_patterns(model, tokens, keep, attention_mask=attention_mask)
    return {i: torch.cat(mine, dim=2) for i, mine in pieces.items()}


def _counted(pattern: Pattern) -> Float[Tensor, "batch head query"]:
    """Return the entropies, NaN where a query sees nothing: at padding."""
    return entropy(pattern).masked_fill(pattern.sum(-1) == 0, torch.nan).cpu()
