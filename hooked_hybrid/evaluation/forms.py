"""Forms in which a model is evaluated: with all heads, with few, without any, and a control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import keep_top_heads, random_score

HeadChoice = Literal["entropy", "l2", "random"]
Stage = Literal["both", "generation"]
SPARSE_K = 5
"""Heads kept in the thesis's sparse form."""


@dataclass(frozen=True)
class Form:
    """A model with `k` heads kept in each attention layer and position; None keeps all.

    `by` selects the heads: the most peaked ones ("entropy", "l2"), or random ones ("random").
    """

    name: str
    k: int | None = None
    by: HeadChoice = "entropy"

    def hooks(self, cfg: HybridConfig) -> list[HookSpec]:
        """Return the hooks of the form.

        Raises:
            ValueError: another choice of heads, no attention layer, or a `k` that is below 0 or
                above the heads of a layer.
        """
        if self.by not in ("entropy", "l2", "random"):
            raise ValueError(f"score={self.by!r}: give 'entropy', 'l2' or 'random'")
        if self.k is None:
            return []
        counts = [layer.attention.n_heads for layer in cfg.layers if layer.attention is not None]
        if not counts:
            raise ValueError("this model has no attention layer: there are no heads to silence")
        if not 0 <= self.k <= min(counts):
            raise ValueError(
                f"k={self.k}: an attention layer has {min(counts)} heads; give 0 to {min(counts)}"
            )
        return keep_top_heads(self.k, random_score() if self.by == "random" else self.by)


FORMS: dict[str, Form] = {
    "base": Form("base"),
    "sparse": Form("sparse", SPARSE_K),
    "ablated": Form("ablated", 0),
    "random": Form("random", SPARSE_K, "random"),
}
"""The thesis's three forms, and a control: as many heads as the sparse form, at random.
"""


def form_of(k: int) -> Form:
    """Return the form with `k` heads, with the thesis's name if it has one."""
    named = (form for form in FORMS.values() if form.k == k and form.by == "entropy")
    return next(named, Form(f"k={k}", k))


def title(form: Form) -> str:
    """Return a form's name and number of heads."""
    if form.k is None or form.name == f"k={form.k}":
        return form.name
    return f"{form.name} (k={form.k}{', at random' if form.by == 'random' else ''})"
