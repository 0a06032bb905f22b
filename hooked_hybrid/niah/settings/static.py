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
"""Sets of each size at random if all of them are too many."""
OTHER_SEED = 2000
"""Of needles and haystack of the prompts that heads are chosen on; no sweep has it by default."""


def static_settings(
    cfg: HybridConfig,
    rankings: Mapping[str, HeadScores],
    ks: Sequence[int],
    n_draws: int | None = None,
    seed: int = 0,
) -> list[Setting]:
    """Return fixed sets of heads of several sizes, and as many heads chosen at run time.

    Everything is silenced in both stages. For each k, of L attention layers: the k most peaked
    heads of each layer and token; of each ranking, the k best of each layer ("a layer") and the
    k x L best of all ("overall"); every set with k heads in each layer ("every set") if there
    are no more than `n_draws`, else this many at random, no two alike ("by lot"). "overall" is also
    there with the k best of all.

    Args:
        cfg: of the model.
        rankings: scores of its heads, by name; the largest are kept.
        ks: heads kept in each layer.
        n_draws: sets of each size that nothing chose; None for every one of up to
            `head_sets.EVERY`, or 5 of more.
        seed: of these.

    Raises:
        ValueError: as `check_sizes`, or a ranking of other layers.
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
    """Return how many heads each attention layer has.

    Raises:
        ValueError: no k, one that is none or all of a layer's heads or more, or draws below 0.
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
    """Return the papers' settings, without their k: it counts the heads of one layer."""
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
    """Return a setting for each named set of heads that are kept."""
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
    """Return what each setting of `static_settings` is by name: how it chooses, and heads kept."""
    found: dict[str, Any] = {s.name: (s.spec.get("kind"), s.spec.get("n_heads")) for s in settings}
    return {name: (kind, n) for name, (kind, n) in found.items() if n is not None}


def sets_beside(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Return the sets of heads that each choice of `static_settings` stands among, by name.

    Those with as many heads in each layer: a choice from all layers has none.
    """
    sizes, sets = sizes_of(settings), (BY_LOT, EVERY_SET)
    return {
        name: [other for other, (way, m) in sizes.items() if way in sets and m == n]
        for name, (kind, n) in sizes.items()
        if kind not in sets and not kind.endswith(", overall")
    }


def rankings_of(model: HookedHybrid, n_needles: int = 8) -> dict[str, HeadScores]:
    """Return the rankings that the command compares: "retrieval" and "copying".

    "retrieval" is the share of copied tokens that a head looks at, on `other_prompts`; "copying"
    the eigenvalues of the OV circuits, from the weights alone.

    Raises:
        ValueError: the model retrieves none of these needles.
    """
    prompts = other_prompts(model, n_needles)
    return {
        "retrieval": retrieval_scores(model, prompts),
        "copying": copying_scores(model),
    }


def other_prompts(model: HookedHybrid, n_needles: int = 8) -> list[Prompt]:
    """Return prompts that no sweep has: needles about other cities, in another haystack.

    Each needle stands in the beginning, middle and end of a prompt of 3/8 of the longest default
    one, so that it is in the attention window to the last token of the answer.
    """
    needles = draw_needles(random.Random(OTHER_SEED), n_needles, training_cities())
    shortest = max(shortest_length(model, needle) for needle in needles)
    length = max(longest_prompt(model.cfg) * 3 // 8, shortest)
    return grid(model, needles, [length], [0.0, 0.5, 1.0], Haystack(OTHER_SEED))
