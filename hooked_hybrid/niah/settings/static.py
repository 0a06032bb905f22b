"""Static sparsification: heads chosen before inference, compared with the choice at run time."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from hooked_hybrid.analysis.heads import retrieval_scores
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.analysis.token_circuits import copying_scores
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.head_sets import head_sets, n_sets
from hooked_hybrid.niah.lengths import longest_prompt
from hooked_hybrid.niah.needles import draw_needles, training_cities
from hooked_hybrid.niah.prompts import Haystack, Prompt, grid, shortest_length
from hooked_hybrid.niah.settings.papers import WHOLE, all_but, cut_settings, heads_of
from hooked_hybrid.niah.settings.setting import Setting, top_k_settings

RUN_TIME, BY_LOT, EVERY_SET = "run time, entropy", "by lot", "every set"
USUAL_DRAWS = 5
"""Number of random sets of each size, if there are too many to run all."""
OTHER_SEED = 2000
"""Seed of the prompts on which heads are chosen, which no sweep uses by default."""


def static_settings(
    cfg: HybridConfig,
    rankings: Mapping[str, HeadScores],
    ks: Sequence[int],
    n_draws: int | None = None,
    seed: int = 0,
) -> list[Setting]:
    """Return settings with fixed sets of heads of several sizes, and with heads chosen at run time.

    Other heads are zeroed in both stages. For each k, with L attention layers: the k most peaked
    heads of each layer and token; of each ranking, the k best of each layer ("a layer") and the k x
    L best of all ("overall"); all sets with k heads in each layer ("every set") if there are at
    most `n_draws`, else this many distinct random sets ("by lot"). "overall" is also run with the k
    best of all.

    Args:
        cfg: of the model.
        rankings: scores of the heads, by name; the largest are kept.
        ks: heads kept in each layer.
        n_draws: number of random sets of each size; None for all sets, if there are at most
            `head_sets.EVERY`, else 5.
        seed: of the random sets.

    Raises:
        ValueError: as `check_sizes`, or a ranking of other layers.

    Examples:
        >>> from hooked_hybrid.niah.settings.static import static_settings
        >>> rankings = {"induction": analysis.induction_scores(model, n_tokens=20, batch=2)}
        >>> len(static_settings(model.cfg, rankings, ks=[4], n_draws=2))
        8
    """
    counts, ks = check_sizes(cfg, ks, n_draws), list(dict.fromkeys(ks))
    for name, ranking in rankings.items():
        if list(ranking.layers) != list(counts):
            raise ValueError(f"{name!r} ranks layers {ranking.layers}, heads are in {list(counts)}")
    chosen: list[tuple[str, list[tuple[int, int]]]] = []
    for name, ranking in rankings.items():
        chosen += [(f"{name}, a layer", _best_of_each(ranking, k)) for k in ks]
        if len(counts) > 1:
            sizes = sorted({n for k in ks for n in (k, k * len(counts))})
            chosen += [(f"{name}, overall", ranking.top(n)) for n in sizes]
    rng = random.Random(seed)
    for k in ks:
        sets = head_sets(counts, k, n_draws, rng, USUAL_DRAWS)
        kind = EVERY_SET if len(sets) == n_sets(counts, k) else BY_LOT
        chosen += [(kind, list(heads)) for heads in sets]
    nothing = cut_settings(cfg, ["no heads"], [{i: list(range(n)) for i, n in counts.items()}])
    return [WHOLE, *nothing, *_run_time(ks, len(counts)), *_static(cfg, chosen)]


def check_sizes(cfg: HybridConfig, ks: Sequence[int], n_draws: int | None) -> dict[int, int]:
    """Return the number of heads of each attention layer.

    Raises:
        ValueError: no k, a k below 1 or not below a layer's number of heads, or draws below 0.
    """
    counts = heads_of(cfg)
    most = min(counts.values()) - 1
    if not ks or any(not 0 < k <= most for k in ks) or (n_draws or 0) < 0:
        raise ValueError(
            f"--k {list(ks)}, --draws {n_draws}: give 1 to {most} heads and 0 draws or more"
        )
    return counts


def _best_of_each(ranking: HeadScores, k: int) -> list[tuple[int, int]]:
    """Return the k best heads of each layer."""
    best = ranking.top(ranking.values.numel())
    return [h for layer in ranking.layers for h in [h for h in best if h[0] == layer][:k]]


def _run_time(ks: Sequence[int], n_layers: int) -> list[Setting]:
    """Return the papers' settings without their k, which counts the heads of one layer."""
    made = zip(ks, top_k_settings(ks, ["both"]), strict=True)
    return [
        replace(
            setting,
            name=f"{RUN_TIME} {k * n_layers}",
            spec={"kind": RUN_TIME, "n_heads": k * n_layers, "stage": "both", "ties": "torch"},
        )
        for k, setting in made
    ]


def _static(
    cfg: HybridConfig, chosen: Sequence[tuple[str, list[tuple[int, int]]]]
) -> list[Setting]:
    """Return a setting for each named set of heads to keep."""
    names: list[str] = []
    cuts = []
    for kind, heads in chosen:
        name = f"{kind} {len(heads)}"
        same = sum(other.split(" #")[0] == name for other in names)
        names.append(f"{name} #{same}" if kind in (BY_LOT, EVERY_SET) else name)
        cuts.append(all_but(heads_of(cfg), heads))
    made = cut_settings(cfg, names, cuts)
    return [
        replace(s, spec={**s.spec, "kind": kind, "n_heads": len(heads)})
        for s, (kind, heads) in zip(made, chosen, strict=True)
    ]


def sizes_of(settings: Sequence[Setting]) -> dict[str, tuple[str, int]]:
    """Return the way to choose and the number of heads of each setting of `static_settings`."""
    found: dict[str, Any] = {s.name: (s.spec.get("kind"), s.spec.get("n_heads")) for s in settings}
    return {name: (kind, n) for name, (kind, n) in found.items() if n is not None}


def sets_beside(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Return the sets of heads to compare with each choice of `static_settings`, by name.

    They have equally many heads in each layer, so a choice from all layers has none.
    """
    sizes, sets = sizes_of(settings), (BY_LOT, EVERY_SET)
    return {
        name: [other for other, (way, m) in sizes.items() if way in sets and m == n]
        for name, (kind, n) in sizes.items()
        if kind not in sets and not kind.endswith(", overall")
    }


def rankings_of(model: HookedHybrid, n_needles: int = 8) -> dict[str, HeadScores]:
    """Return the rankings that the command compares: "retrieval" and "copying".

    "retrieval" is the share of copied tokens to which a head attends, on `other_prompts`; "copying"
    is from the eigenvalues of the OV circuits, that is from the weights.

    Raises:
        ValueError: the model does not retrieve any of these needles.
    """
    prompts = other_prompts(model, n_needles)
    return {
        "retrieval": retrieval_scores(model, prompts),
        "copying": copying_scores(model),
    }


def other_prompts(model: HookedHybrid, n_needles: int = 8) -> list[Prompt]:
    """Return prompts that no sweep uses: needles about other cities, in another haystack.

    Each needle is placed at the beginning, middle and end of a prompt of 3/8 of the longest default
    length, so that it is in the attention window up to the last token of the answer.
    """
    needles = draw_needles(random.Random(OTHER_SEED), n_needles, training_cities())
    shortest = max(shortest_length(model, needle) for needle in needles)
    length = max(longest_prompt(model.cfg) * 3 // 8, shortest)
    return grid(model, needles, [length], [0.0, 0.5, 1.0], Haystack(OTHER_SEED))
