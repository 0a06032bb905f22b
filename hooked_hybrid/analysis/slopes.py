"""Gradients of a metric at hook points, and the effects of patches that they estimate.

The product (donor - value) . gradient is linear in the value. Queries, keys and scores act through
a softmax, which is far from linear when saturated; `through_softmax` computes the softmax of the
patched scores exactly, and is linear from the pattern on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.analysis.metrics import Metric, measure
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.shapes import Logits, Pattern, Tokens

LARGEST_CHANGE = 80.0
"""Largest change of a score: beyond it a softmax is 1 to all digits, and exp may overflow."""
ByQuery = Float[Tensor, "batch head query"]
ByKey = Float[Tensor, "batch head key"]


class Slopes:
    """A run with its values at some hook points, and the gradients of the metric there.

    Raises:
        ValueError: the metric has another shape, or no gradient.
    """

    def __init__(
        self,
        model: HookedHybrid,
        tokens: Tokens,
        metric: Metric,
        names: list[str],
        mask: Tensor | None,
        also: tuple[str, ...] = (),
    ) -> None:
        self.metric = torch.empty(())

        def target(logits: Logits) -> Tensor:
            value = measure(metric, logits)
            if not value.requires_grad:
                raise ValueError("the metric has no gradient: compute it from the logits by torch")
            self.metric = value.detach()
            return value.sum()

        _, self.cache = model.run_with_cache(
            tokens, names_filter=[*names, *also], incl_bwd=True, metric=target, attention_mask=mask
        )

    def slope(self, name: str) -> Tensor:
        """Return the gradient; 0 where the metric does not depend on the value."""
        slope = f"{name}_grad"
        if slope not in self.cache:
            return torch.zeros_like(at_least_fp32(self.cache[name]))
        return at_least_fp32(self.cache[slope])

    def times(self, name: str, donor: Tensor) -> Tensor:
        """Return (donor - value) * gradient."""
        gap = at_least_fp32(donor) - at_least_fp32(self.cache[name])
        return gap * self.slope(name)


def through_softmax(
    model: HookedHybrid,
    tokens: Tokens,
    donor_tokens: Tokens,
    metric: Metric,
    names: list[str],
    mask: Tensor | None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the effect of each patch of queries, keys or scores, linear from the pattern on.

    The effect of a query is that of its whole row of scores. The effect of a key is that of its
    column, with only this score changed in each query's softmax. Key-value heads act on all their
    query heads.

    Args:
        model, tokens, metric: the patched run.
        donor_tokens: of the run that provides the values.
        names: hook points; queries, keys and scores among them are corrected.
        mask: of both runs.

    Yields:
        A name, and the effects with the axes of its hook point, but 1 channel or key.

    Source: Kramár et al. 2024, "AtP*", section 3.1.1 and appendix A.2.1.
    """
    for layer in model.cfg.attention_layers:
        attn = f"blocks.{layer}.attn.hook_"
        by_query = [n for n in names if n in (f"{attn}q", f"{attn}rot_q", f"{attn}attn_scores")]
        by_key = [n for n in names if n in (f"{attn}k", f"{attn}rot_k")]
        if not (by_query or by_key):
            continue
        before = f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"
        scores = f"{attn}attn_scores"
        slopes = Slopes(model, tokens, metric, [f"{attn}pattern"], mask, (scores, before))
        here, slope = slopes.cache[scores].double(), slopes.slope(f"{attn}pattern")
        gradient = slope.double()
        with torch.no_grad():
            _, donor = model.run_with_cache(
                donor_tokens, names_filter=by_query + by_key, attention_mask=mask
            )
            for name in by_query + by_key:
                there = _scores_with(model, slopes.cache[before], name, donor[name], scores, mask)
                if name in by_query:
                    effect = _of_queries(here, there.double(), gradient)
                else:
                    effect = _of_keys(here, there.double(), gradient)
                    effect = effect.unflatten(1, (donor[name].shape[2], -1)).sum(2)
                yield name, _as_at(model.hook_dict[name], effect.to(slope.dtype))


def _scores_with(
    model: HookedHybrid, stream: Tensor, name: str, donor: Tensor, scores: str, mask: Tensor | None
) -> Pattern:
    """Return the scores of a layer with one value replaced by another run's everywhere."""
    put: Callable[..., Any] = lambda value, hook: donor  # noqa: E731, ARG005
    layer = model.hook_dict[name].layer()
    with model.hooks([(name, put)]):
        _, cache = model.run_with_cache(
            stream,
            names_filter=scores,
            start_at_layer=layer,
            stop_at_layer=layer + 1,
            attention_mask=mask,
        )
    return cache[scores]


def _of_queries(here: Pattern, there: Pattern, gradient: Pattern) -> ByQuery:
    """Return the effect of each query's new row of scores."""
    return ((there.softmax(-1) - here.softmax(-1)) * gradient).sum(-1)


def _of_keys(here: Pattern, there: Pattern, gradient: Pattern) -> ByKey:
    """Return the effect of each key's new column of scores, with other columns unchanged.

    With weight p and a score raised by d, the new weights are p e^d / Z at the key and p' / Z at
    the others, Z = 1 + p (e^d - 1).
    """
    p = here.softmax(-1)
    mean = (p * gradient).sum(-1, keepdim=True)
    more = p * torch.expm1((there - here).clamp_max(LARGEST_CHANGE))
    tiny = torch.finfo(p.dtype).tiny
    return (more / (1 + more).clamp_min(tiny) * (gradient - mean)).sum(-2)


def _as_at(point: HookPoint, effect: Float[Tensor, "batch head pos"]) -> Tensor:
    """Return effects with the axes of a hook point, the last one of length 1."""
    if "query" in point.axes:
        return effect[..., None]
    return effect.transpose(1, 2)[..., None]
