"""Sets of heads with which a choice of heads is compared: all, or random ones."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pandas as pd

EVERY = 100
"""By default, up to this many sets of heads are all tried; otherwise random ones are."""
Heads = tuple[tuple[int, int], ...]
"""(layer, head) of each head kept."""


def n_sets(counts: Mapping[int, int], k: int) -> int:
    """Return how many sets there are with `k` heads of each layer."""
    return math.prod(math.comb(n, k) for n in counts.values())


def head_sets(
    counts: Mapping[int, int], k: int, most: int | None, rng: random.Random, usual: int
) -> list[Heads]:
    """Return distinct sets of `k` heads of each layer: all sets, or random ones.

    Args:
        counts: heads of each attention layer.
        k: heads kept in each.
        most: this many sets, or all if there are no more; None for all, if there are at most
            `EVERY`, else `usual`.
        rng: for the random sets.
        usual: number of random sets if `most` is None.
    """
    total = n_sets(counts, k)
    if most is None:
        most = EVERY if total <= EVERY else usual
    if total <= most:
        of_layers = [
            [tuple((layer, head) for head in kept) for kept in itertools.combinations(range(n), k)]
            for layer, n in counts.items()
        ]
        return [tuple(itertools.chain(*parts)) for parts in itertools.product(*of_layers)]
    found: dict[Heads, None] = {}
    while len(found) < most:
        cut = {layer: set(rng.sample(range(n), n - k)) for layer, n in counts.items()}
        kept = [(layer, h) for layer, n in counts.items() for h in range(n) if h not in cut[layer]]
        found[tuple(kept)] = None
    return list(found)


def standings(table: pd.DataFrame, families: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """Return the rank of the accuracy of each choice of heads among sets of its size.

    By the mean over needles inside the attention window. Columns: `setting`, its `accuracy`;
    `n_sets`, and of these `n_below`, `n_equal`, `n_above`; `mean`, `lowest` and `highest` of the
    sets. Equal is within 1e-9. No interval: a rank is among these sets on these prompts.

    Args:
        table: of `niah`.
        families: names of the sets to compare with, by the name of each choice.
    """
    import pandas as pd

    means = table[table["in_window"].astype(bool)].groupby("setting")["accuracy"].mean()
    rows = []
    for name, sets in families.items():
        values, own = means.reindex(list(sets)).dropna(), means.get(name, float("nan"))
        if values.empty or own != own:
            continue
        gaps = values - own
        rows.append(
            {
                "setting": name,
                "accuracy": own,
                "n_sets": len(values),
                "n_below": int((gaps < -1e-9).sum()),
                "n_equal": int((gaps.abs() <= 1e-9).sum()),
                "n_above": int((gaps > 1e-9).sum()),
                "mean": values.mean(),
                "lowest": values.min(),
                "highest": values.max(),
            }
        )
    return pd.DataFrame(rows)


def standing_said(row: Mapping[Any, Any]) -> str:
    """Return a row of `standings` in words: "above 31, equal to 2, below 23 of 56 sets"."""
    parts = (("above", "n_below"), ("equal to", "n_equal"), ("below", "n_above"))
    said = ", ".join(f"{word} {int(row[key])}" for word, key in parts if row[key])
    return f"{said} of {int(row['n_sets'])} sets"
