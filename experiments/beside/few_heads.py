"""How few heads retrieve: the best cut, as many others cut, and the best alone."""

from __future__ import annotations

import random
from math import ceil

from experiments.beside.frame import (
    HARMFUL,
    HARMLESS,
    Bench,
    Experiment,
    Finding,
    accuracies,
    both,
    harms,
    named,
    spares,
)
from hooked_hybrid.analysis.heads import retrieval_scores
from hooked_hybrid.interventions import cut_heads, keep_heads
from hooked_hybrid.niah.experiments import WHOLE
from hooked_hybrid.niah.static import other_prompts

SCORED_ON, DRAWS, RETRIEVES = 4, 3, 0.1
"""Needles that heads are scored on; sets by lot; score from which the source counts a head."""


def run(bench: Bench) -> Finding:
    """Rank heads on other prompts, then cut and keep them."""
    ranking = retrieval_scores(bench.model, other_prompts(bench.model, SCORED_ON))
    ranked = ranking.top(ranking.values.numel())
    n_heads, few = len(ranked), ceil(0.05 * len(ranked))
    n_retrieve = int((ranking.values > RETRIEVES).sum())
    rng = random.Random(0)
    settings = [WHOLE]
    for n in sorted({few, 2, 3, 4, 5}):
        settings.append(both(f"cut the best {n}", cut_heads(ranked[:n])))
        for i in range(DRAWS):
            drawn = cut_heads(rng.sample(ranked, n))
            settings.append(both(f"cut {n} by lot #{i}", drawn))
    settings += [both(f"keep the best {n}", keep_heads(ranked[:n])) for n in (few, 2, 4, 5)]
    table = bench.measure(settings)
    best, kept = accuracies(table, "cut the best"), accuracies(table, "keep the best")
    lot = accuracies(table, f"cut {few} by lot")
    enough = [name for name, share in kept.items() if share >= HARMLESS]
    fatal = [int(name.split()[-1]) for name, share in best.items() if share < HARMFUL]
    ours = (
        f"{n_retrieve} of {n_heads} heads have a retrieval score above {RETRIEVES}; without the "
        f"best {few} ({few / n_heads:.0%}) {best.iloc[0]:.0%} of the accuracy is left, without "
        f"{few} by lot {lot.min():.0%} at worst; it falls below half without "
        + (f"the best {min(fatal)} ({min(fatal) / n_heads:.0%})" if fatal else "none of the sets")
        + (f"; {enough[0]!r} leaves {kept[enough[0]]:.0%}" if enough else "; no few are enough")
    )
    base, first = table["accuracy"].iloc[0], named(table, f"cut the best {few}")
    as_many = named(table, f"cut {few} by lot")
    if n_retrieve / n_heads < 0.05 and harms(first, base).all() and spares(as_many, base).all():
        return Finding("shows it", ours, table)
    is_spread = n_retrieve / n_heads > 0.05 and spares(first, base).all()
    return Finding("does not show it" if is_spread else "cannot say", ours, table)


EXPERIMENT = Experiment(
    "fewer than 5% of heads retrieve, masking others by lot is harmless (2404.15574); 2% of heads "
    "recover over 95% of retrieval (2602.11374)",
    "arXiv 2404.15574 and 2602.11374",
    run,
)
