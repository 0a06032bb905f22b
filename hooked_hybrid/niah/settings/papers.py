"""The papers' experiments and their controls, as settings of a sweep."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import (
    ablate_layers,
    ablate_mixers,
    attention_to,
    cut_heads,
    follow_span,
    keep_top_heads,
    layers_of,
    manipulate_span,
    random_score,
    reversed_score,
)
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.niah.head_sets import head_sets, n_sets
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.setting import Hooks, PerRow, Setting

PREFILL_MODES = ("keep", "omit", "only", "binary", "null")
GENERATION_MODES = ("keep", "omit", "only", "binary")
FOLLOW_MODES: dict[str, dict[str, Any]] = {
    f"follow {token}{name}": {"token": token, **options}
    for token in ("next", "last")
    for name, options in {
        "": {},
        ", mean": {"weight": "mean"},
        ", rest": {"weight": "sum", "outside": "keep"},
    }.items()
}
"""Manipulations that follow the generated token, with their options for `follow_span`."""
USUAL_DRAWS = 20
"""Number of random sets of heads, and of layers, if there are too many to run all."""
WHOLE = Setting("whole", spec={"kind": "whole"})


def weight_matrix(
    prefill: Sequence[str] = PREFILL_MODES, generation: Sequence[str] = GENERATION_MODES
) -> list[Setting]:
    """Return every pair of manipulations of the weights on the needle: "prefill-generation".

    - keep: nothing changes.
    - omit: weights on the needle are 0.
    - only: weights on everything but the needle are 0.
    - binary: as only, and each weight on the needle is their mean.
    - null: every weight is 0.

    See `manipulate_span`. Settings with the same prefill share its run. Source: Michalak 2025,
    Table 6.1; there as here weights are not renormalised. (The thesis names them
    "generation-prefill".)

    `FOLLOW_MODES`, which are ours, may also be used in generation.

    Raises:
        ValueError: an unknown mode (when the sweep checks its hooks).

    Examples:
        >>> from hooked_hybrid.niah.settings.papers import weight_matrix
        >>> [setting.name for setting in weight_matrix(["keep"], ["keep", "omit"])]
        ['keep-keep', 'keep-omit']
    """
    before, after = ({mode: _on_needle(mode) for mode in modes} for modes in (prefill, generation))
    return [
        Setting(
            f"{p}-{g}",
            before[p],
            after[g],
            {
                "kind": "weights",
                "prefill": p,
                "generation": g,
                "stage": "generation" if p == "keep" else "both",
            },
        )
        for p in prefill
        for g in generation
    ]


def layer_settings(cfg: HybridConfig) -> list[Setting]:
    """Return settings for the whole model, and for each kind of layer and each mixer zeroed.

    Examples:
        >>> from hooked_hybrid.niah.settings.papers import layer_settings
        >>> [setting.name for setting in layer_settings(model.cfg)][:4]
        ['whole', 'no attention', 'no RG-LRU', 'no MLP']
    """
    settings = [WHOLE]
    for mixer in MIXERS.values():
        if layers := layers_of(cfg, mixer.kind):
            settings.append(_without(cfg, f"no {mixer.title}", mixer.kind, layers))
    if cfg.mlp_layers:
        settings.append(_silenced("no MLP", cfg.mlp_layers, ablate_layers(cfg.mlp_layers, "mlp")))
    for mixer in MIXERS.values():
        for layer in layers_of(cfg, mixer.kind):
            settings.append(_without(cfg, f"no {mixer.title} {layer}", mixer.kind, [layer]))
    return settings


def head_settings(cfg: HybridConfig) -> list[Setting]:
    """Return settings for the whole model, and for each single attention head zeroed.

    Examples:
        >>> from hooked_hybrid.niah.settings.papers import head_settings
        >>> settings = head_settings(model.cfg)
        >>> len(settings), settings[1].name
        (17, 'no head 2.0')
    """
    heads = [(layer, head) for layer, n in heads_of(cfg).items() for head in range(n)]
    sets = [{layer: [head]} for layer, head in heads]
    names = [f"no head {layer}.{head}" for layer, head in heads]
    return [WHOLE, *cut_settings(cfg, names, sets)]


def cut_settings(
    cfg: HybridConfig, names: Sequence[str], sets: Sequence[dict[int, list[int]]]
) -> list[Setting]:
    """Return a setting for each set of heads, zeroed in both stages; they run as one batch."""
    masks = {
        layer: torch.tensor([[h in cut.get(layer, ()) for h in range(n)] for cut in sets])
        for layer, n in heads_of(cfg).items()
    }

    def make(index: Tensor) -> list[HookSpec]:
        return cut_heads({layer: mask[index] for layer, mask in masks.items()})

    settings = []
    for i, (name, heads) in enumerate(zip(names, sets, strict=True)):
        hooks = tuple(cut_heads(heads))
        spec = {"kind": "cut heads", "heads": {str(k): v for k, v in heads.items()}}
        settings.append(Setting(name, hooks, hooks, {**spec, "stage": "both"}, PerRow(make, i)))
    return settings


def control_settings(
    cfg: HybridConfig, ks: Sequence[int], n_draws: int | None = None, seed: int = 0
) -> list[Setting]:
    """Return the controls of a claim about the most peaked heads.

    For each k, in both stages: the k most peaked heads of each token; equally many by reversed
    score,
    by attention to the needle, at random at each token, and fixed sets of heads: all sets ("every
    k=4 #0") if there are at most `n_draws`, else this many random ones ("drawn k=4 #0"). Also, sets
    of recurrent layers zeroed, as many layers as there are attention layers: all such sets, or
    `n_draws`. `n_draws` of None is `head_sets.EVERY` for heads if that covers all sets, else 20.

    Raises:
        ValueError: a k out of range, or fewer than one draw.

    Examples:
        >>> from hooked_hybrid.niah.settings.papers import control_settings
        >>> len(control_settings(model.cfg, ks=[4], n_draws=2))
        10
    """
    counts = heads_of(cfg)
    if (n_draws is not None and n_draws < 1) or any(not 0 < k < min(counts.values()) for k in ks):
        raise ValueError(
            f"--k {list(ks)}, --draws {n_draws}: give 1 to {min(counts.values()) - 1} heads and "
            "1 draw or more"
        )
    rng = random.Random(seed)
    settings = [WHOLE, _without(cfg, "no attention", "attention", cfg.attention_layers)]
    for k in ks:
        settings += [
            _kept(f"peaked k={k}", k, lambda k, _: keep_top_heads(k)),
            _kept(f"reversed k={k}", k, lambda k, _: keep_top_heads(k, reversed_score("entropy"))),
            _kept(f"by lot k={k}", k, lambda k, _: keep_top_heads(k, random_score(seed))),
            _kept(f"needle k={k}", k, _to_needle),
        ]
        kept = head_sets(counts, k, n_draws, rng, USUAL_DRAWS)
        word = "every" if len(kept) == n_sets(counts, k) else "drawn"
        settings += cut_settings(
            cfg,
            [f"{word} k={k} #{i}" for i in range(len(kept))],
            [all_but(counts, heads) for heads in kept],
        )
    recurrent = list(cfg.recurrent_layers)
    n_layers = min(len(cfg.attention_layers), len(recurrent))
    for layers in _sets_of(recurrent, n_layers, n_draws or USUAL_DRAWS, rng):
        name = f"no recurrence {'+'.join(map(str, layers))}"
        settings.append(_without(cfg, name, "recurrence", layers))
    return settings


def sets_beside(settings: Sequence[Setting]) -> dict[str, list[str]]:
    """Return the sets of heads to compare with each choice of `control_settings`, by name."""
    found: dict[str, list[str]] = {}
    names = [setting.name for setting in settings]
    for name in names:
        way, _, k = name.partition(" k=")
        if k.isdigit() and way not in ("every", "drawn"):
            same = tuple(f"{word} k={k} #" for word in ("every", "drawn"))
            found[name] = [other for other in names if other.startswith(same)]
    return found


def all_but(counts: Mapping[int, int], kept: Collection[tuple[int, int]]) -> dict[int, list[int]]:
    """Return the heads of each layer that are not kept."""
    return {i: [h for h in range(n) if (i, h) not in kept] for i, n in counts.items()}


def _sets_of(
    layers: Sequence[int], size: int, most: int, rng: random.Random
) -> list[tuple[int, ...]]:
    """Return every set of this many layers, or `most` random ones."""
    if math.comb(len(layers), size) <= most:
        return list(itertools.combinations(layers, size))
    found: set[tuple[int, ...]] = set()
    while len(found) < most:
        found.add(tuple(sorted(rng.sample(layers, size))))
    return sorted(found)


def _on_needle(mode: str) -> Hooks:
    """Return hooks that depend on the place of the needle, the same object for every prompt."""
    if mode == "keep":
        return ()
    if mode in FOLLOW_MODES:
        options = FOLLOW_MODES[mode]
        # The last token of the prompt writes the first of the answer.
        return lambda prompt: follow_span(list(_spans(prompt)), prompt.length - 1, **options)
    return lambda prompt: manipulate_span(mode, list(_spans(prompt)))  # type: ignore[arg-type]


def _to_needle(k: int, prompt: Prompt) -> list[HookSpec]:
    return keep_top_heads(k, attention_to(list(_spans(prompt))))


def _spans(prompt: Prompt) -> tuple[tuple[int, int], ...]:
    if not prompt.needle_spans:
        raise ValueError(f"prompt {prompt.id} holds no needle, so that it has no tokens to act on")
    return prompt.needle_spans


def _kept(name: str, k: int, make: Callable[[int, Prompt], list[HookSpec]]) -> Setting:
    hooks: Any = (
        (lambda prompt: make(k, prompt)) if make is _to_needle else tuple(make(k, None))  # type: ignore[arg-type]
    )
    return Setting(name, hooks, hooks, {"kind": name.split(" k=")[0], "stage": "both"})


def _without(cfg: HybridConfig, name: str, kind: str, layers: Sequence[int]) -> Setting:
    """Return the setting in which the mixers of a kind write nothing in some layers."""
    return _silenced(name, layers, ablate_mixers(cfg, kind, layers))


def _silenced(name: str, layers: Sequence[int], hooks: Sequence[HookSpec]) -> Setting:
    spec = {"kind": name, "layers": list(layers), "stage": "both"}
    return Setting(name, tuple(hooks), tuple(hooks), spec)


def heads_of(cfg: HybridConfig) -> dict[int, int]:
    """Return how many heads each attention layer has; none at all is an error."""
    layers = enumerate(cfg.layers)
    found = {i: of.attention.n_heads for i, of in layers if of.attention is not None}
    if not found:
        raise ValueError("this model has no attention layer: there are no heads to silence")
    return found
