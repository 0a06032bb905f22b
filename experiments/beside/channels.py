"""Cutting a small share of recurrent channels, chosen in three ways, and as many at random."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from experiments.beside.frame import (
    Bench,
    Experiment,
    Finding,
    accuracies,
    both,
    harms,
    named,
    spares,
)
from hooked_hybrid.analysis.answers import Copied, copies
from hooked_hybrid.analysis.channels import GroupScores, channel_scores
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.papers import WHOLE
from hooked_hybrid.niah.settings.static import other_prompts

GROUPS, SCORED_ON, DRAWS = 16, 2, 3
"""Number of groups of adjacent channels in a layer; of needles for scores; of random sets."""
SHARES = (0.05, 0.1, 0.2)
GATES = ("hook_ssm_dt", "hook_input_gate")
"""Leaves of the gates that admit a token to the state."""


def cut_channels(groups: Sequence[tuple[int, int]], n_groups: int = GROUPS) -> list[HookSpec]:
    """Zero the inputs of the output projection from groups of recurrent channels.

    Args:
        groups: (layer, group).
        n_groups: equal groups of adjacent channels in a layer.
    """
    by_layer: dict[int, list[int]] = {}
    for layer, group in groups:
        by_layer.setdefault(layer, []).append(group)

    @per_position
    def silence(gated: Tensor, hook: HookPoint) -> Tensor:
        of_channel = torch.arange(gated.shape[-1], device=gated.device) * n_groups
        group = of_channel // gated.shape[-1]
        mine = torch.isin(group, torch.tensor(by_layer[hook.layer()], device=gated.device))
        return gated.masked_fill(mine, 0)

    return [([f"blocks.{layer}.mixer.hook_gated" for layer in by_layer], silence)]


def boundary_scores(model: HookedHybrid, tokens: Tensor) -> GroupScores:
    """Return how much larger each group's gate is at BOS than elsewhere, the source's probe."""
    layers = model.cfg.recurrent_layers
    points = [(i, f"blocks.{i}.mixer.{gate}") for i in layers for gate in GATES]
    names = {i: point for i, point in points if point in model.hook_dict}
    _, cache = model.run_with_cache(tokens, names_filter=list(names.values()), return_type=None)
    found = []
    for layer in layers:
        gate = cache[names[layer]].float().mean(0)
        more = gate[0] - gate[1:].mean(0)
        found.append(more.view(GROUPS, -1).mean(1))
    return GroupScores(tuple(layers), torch.stack(found), "gate at BOS above its mean")


def direct_scores(model: HookedHybrid, prompts: Sequence[Prompt]) -> GroupScores:
    """Return the total log-probability (nats) of copied tokens lost without each group."""
    layers = model.cfg.recurrent_layers
    lost = torch.zeros(len(layers), GROUPS)
    for copied in copies(model, prompts, verbose=False):
        whole = _said(model, copied, [])
        for i, layer in enumerate(layers):
            for group in range(GROUPS):
                lost[i, group] += whole - _said(model, copied, cut_channels([(layer, group)]))
    return GroupScores(tuple(layers), lost, "log-probability of copied tokens lost")


def _said(model: HookedHybrid, copied: Copied, hooks: list[HookSpec]) -> float:
    new = copied.tokens[:, copied.n_prompt :, None]
    logits = model.run_with_hooks(
        copied.tokens[:, :-1], fwd_hooks=hooks, logits_to_keep=new.shape[1]
    )
    return float(logits.log_softmax(-1).gather(2, new)[..., 0][copied.is_copy].sum())


@torch.no_grad()
def run(bench: Bench) -> Finding:
    """Cut the best groups of each ranking, and as many others."""
    model, prompts = bench.model, other_prompts(bench.model, SCORED_ON)
    tokens = torch.tensor([prompt.tokens for prompt in prompts])
    rankings = {
        "needle in the state": channel_scores(model, prompts, GROUPS, verbose=False),
        "gate at BOS": boundary_scores(model, tokens),
        "direct harm": direct_scores(model, prompts),
    }
    every = [(i, g) for i in model.cfg.recurrent_layers for g in range(GROUPS)]
    rng, settings = random.Random(0), [WHOLE]
    for share in SHARES:
        n = round(share * len(every))
        best = {name: ranking.top(n) for name, ranking in rankings.items()}
        others = [g for g in every if not any(g in chosen for chosen in best.values())]
        sets = [*best.items(), *((f"by lot #{i}", rng.sample(others, n)) for i in range(DRAWS))]
        settings += [both(f"{share:.0%} {name}", cut_channels(chosen)) for name, chosen in sets]
    table = bench.measure(settings)
    first = accuracies(table, f"{SHARES[0]:.0%}")
    lot = first[first.index.str.contains("by lot")]
    ranked = first.drop(lot.index)
    more = table.set_index("setting")["more"]
    ours = f"{SHARES[0]:.0%} of the groups cut: " + "; ".join(
        f"{name[3:]} leaves {share:.0%} ({more[name]:+.2f} nats of text)"
        for name, share in [*ranked.items(), (lot.idxmin(), lot.min())]
    )
    base, cut = table["accuracy"].iloc[0], named(table, f"{SHARES[0]:.0%}")
    is_lot = cut["setting"].str.contains("by lot")
    if harms(cut[~is_lot], base).any() and spares(cut[is_lot], base).all():
        return Finding("shows it", ours, table)
    harmless = spares(cut[~is_lot], base).all()
    return Finding("does not show it" if harmless else "cannot say", ours, table)


EXPERIMENT = Experiment(
    "cutting about 5% of Mamba heads, those whose gate opens at the beginning of the text, takes "
    "RULER NIAH from 1.00 to 0.00 at 1,024 tokens; as many others leave it (Mamba-1 and Mamba-2 "
    "of 2.7B to 2.8B, which have no attention)",
    "arXiv 2606.00930",
    run,
)
