"""How few heads retrieve: cutting the best or as many others, keeping only the best, other sets."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import combinations
from math import ceil

import pandas as pd

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
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.interventions import cut_heads, keep_heads
from hooked_hybrid.niah.settings.papers import WHOLE, cut_settings, heads_of
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.niah.settings.static import other_prompts

WHOLLY = (4, 5)
"""Sizes of the sets within a layer that are all cut, and all kept."""
SCORED_ON, DRAWS, RETRIEVES = 4, 3, 0.1
"""Number of needles for scores; of random sets; score from which the source counts a head."""


def every_set(cfg: HybridConfig, ranked: Sequence[tuple[int, int]]) -> tuple[int, list[Setting]]:
    """Return the layer with most of the best heads, and settings with each of its sets cut or kept.

    The rank of the best heads among these sets shows whether a score finds heads, or only a layer.
    """
    best = [layer for layer, _ in ranked[: max(WHOLLY)]]
    layer = max(set(best), key=best.count)
    heads = range(heads_of(cfg)[layer])
    others = {i: list(range(n)) for i, n in heads_of(cfg).items() if i != layer}
    names: list[str] = []
    cuts: list[dict[int, list[int]]] = []
    for n in WHOLLY:
        for chosen in combinations(heads, n):
            said = "+".join(map(str, chosen))
            names += [f"cut {n} of layer {layer}: {said}", f"keep {n} of layer {layer}: {said}"]
            kept = [head for head in heads if head not in chosen]
            cuts += [{layer: list(chosen)}, {layer: kept, **others}]
    return layer, cut_settings(cfg, names, cuts)


def _among(table: pd.DataFrame, word: str, n: int) -> str:
    """Return the rank of the best `n` among all sets of `n` in their layer, in words."""
    rows = named(table, f"{word} {n} of layer")["accuracy"]
    (best,) = named(table, f"{word} the best {n}")["accuracy"]
    worse = int((rows < best - 1e-9).sum()) if word == "keep" else int((rows > best + 1e-9).sum())
    as_good = int(((rows - best).abs() <= 1e-9).sum())
    return (
        f"every set of {n} {'kept alone' if word == 'keep' else word}: {len(rows)} sets leave "
        f"{100 * rows.min():.1f} to {100 * rows.max():.1f}%, {100 * rows.mean():.1f}% on average, "
        f"{worse} of them show less by it than the best do, {as_good} as much"
    )


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
    layer, sets = every_set(bench.model.cfg, ranked)
    table = bench.measure([*settings, *sets])
    best, kept = accuracies(table, "cut the best"), accuracies(table, "keep the best")
    lot = accuracies(table, f"cut {few} by lot")
    enough = [name for name, share in kept.items() if share >= HARMLESS]
    fatal = [int(name.split()[-1]) for name, share in best.items() if share < HARMFUL]
    ours = (
        f"{n_retrieve} of {n_heads} heads have a retrieval score above {RETRIEVES}; without the "
        f"best {few} ({few / n_heads:.0%}) {best.iloc[0]:.0%} of the accuracy is left, without "
        f"{few} at random {lot.min():.0%} at worst; it falls below half without "
        + (f"the best {min(fatal)} ({min(fatal) / n_heads:.0%})" if fatal else "none of the sets")
        + (f"; {enough[0]!r} leaves {kept[enough[0]]:.0%}" if enough else "; no few are enough")
        + f"; of layer {layer}, "
        + "; ".join(_among(table, word, n) for n in WHOLLY for word in ("cut", "keep"))
    )
    base, first = table["accuracy"].iloc[0], named(table, f"cut the best {few}")
    as_many = named(table, f"cut {few} by lot")
    if n_retrieve / n_heads < 0.05 and harms(first, base).all() and spares(as_many, base).all():
        return Finding("shows it", ours, table)
    is_spread = n_retrieve / n_heads > 0.05 and spares(first, base).all()
    return Finding("does not show it" if is_spread else "cannot say", ours, table)


EXPERIMENT = Experiment(
    "fewer than 5% of heads retrieve, masking others at random is harmless (2404.15574); 2% of "
    "heads recover over 95% of retrieval (2602.11374)",
    "arXiv 2404.15574 and 2602.11374",
    run,
    undrawn=" of layer ",
)
