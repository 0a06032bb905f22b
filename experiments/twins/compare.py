"""Recall of a twin, its paths, and the content of its recurrences: a table for each checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from tqdm import tqdm

from experiments.recall.score import HELD_OUT, answered, score, scores
from experiments.recall.task import RecallBatch, Task, draw
from experiments.twins.models import TWINS, TwinsPlan, folder, load
from experiments.twins.probe import facts_of, read_presence, read_values, states_at_ask
from hooked_hybrid import HookedHybrid
from hooked_hybrid.analysis import memory_horizon
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import knock_out_crossings
from hooked_hybrid.outputs.whole_files import replacing

N_ANSWERED, N_PROBED, N_WATCHED = 256, 3072, 64
"""Number of sequences for answers, for probes of states, and for decays."""
SHUFFLE = 1
BIN = 8
"""Width in tokens of a bin of distances."""
FACTS = (1, 2, 4, 6, 8)

Row = dict[str, Any]


def compared(model: HookedHybrid, task: Task) -> list[Row]:
    """Return figures of a model: `measure`, `at` (its argument), `value`, and `control` if any."""
    batch = draw(task, N_ANSWERED, HELD_OUT)
    rows: list[Row] = [
        _row("accuracy", name, found.accuracy)
        for name, found in scores(model, task, N_ANSWERED).items()
    ]
    rows += crossings(model, task, batch)
    rows += by_distance(model, batch)
    rows += by_facts(model, task)
    rows += kept(model, task)
    rows += horizons(model, batch)
    return rows


def _share(right: Tensor) -> float:
    return float(right.float().mean())


def _row(measure: str, at: Any, value: float, control: float = float("nan")) -> Row:
    return {"measure": measure, "at": str(at), "value": float(value), "control": float(control)}


def crossings(model: HookedHybrid, task: Task, batch: RecallBatch) -> list[Row]:
    """Return accuracy with layers restarted at ASK, so that they carry no fact to a question.

    The control restarts them before the first fact: the same edit, at a place no fact has to pass.
    """
    cfg = model.cfg
    sets: dict[str, tuple[int, ...]] = {str(i): (i,) for i in range(cfg.n_layers)}
    sets |= {"attention": cfg.attention_layers, "recurrences": cfg.recurrent_layers}
    before = batch.keys.min(dim=1).values

    def accuracy(hooks: list[HookSpec]) -> float:
        return score(answered(model, batch, hooks)).accuracy

    return [
        _row(
            "crossing",
            name,
            accuracy(knock_out_crossings(cfg, 1 + task.room, layers=layers)),
            accuracy(knock_out_crossings(cfg, before, layers=layers)),
        )
        for name, layers in sets.items()
        if layers
    ]


def by_distance(model: HookedHybrid, batch: RecallBatch) -> list[Row]:
    """Return accuracy by tokens from value to question, in bins named by their middle."""
    right, bins = answered(model, batch), batch.distances // BIN
    return [
        _row("distance", BIN * b + BIN // 2, _share(right[bins == b]))
        for b in bins.unique().tolist()
    ]


def by_facts(model: HookedHybrid, task: Task) -> list[Row]:
    """Return accuracy on one question, by the number of facts before it."""
    rows = []
    for n in FACTS:
        batch = draw(replace(task, n_facts=n, n_questions=1), 2 * N_ANSWERED, HELD_OUT + n)
        rows.append(_row("facts", n, score(answered(model, batch)).accuracy))
    return rows


def kept(model: HookedHybrid, task: Task) -> list[Row]:
    """Return the accuracy of probes on each recurrence's state after ASK, and on all together."""
    if not model.cfg.recurrent_layers:
        return []
    batch = draw(task, N_PROBED, HELD_OUT + 100)
    states, facts, rows = states_at_ask(model, task, batch), facts_of(task, batch), []
    for name, x in [*states.items(), ("all", torch.cat(list(states.values()), dim=1))]:
        true, mixed = (read_values(x, facts, task, s) for s in (None, SHUFFLE))
        there, chance = (read_presence(x, facts, task, s) for s in (None, SHUFFLE))
        rows.append(_row("value", name, _share(true.right), _share(mixed.right)))
        rows.append(_row("value of another", name, _share(true.other), _share(mixed.other)))
        rows.append(_row("presence", name, _share(there), _share(chance)))
        bins = true.distances // BIN
        for b in bins.unique().tolist():
            figures = (_share(read.right[bins == b]) for read in (true, mixed))
            rows.append(_row(f"value by distance, {name}", BIN * b + BIN // 2, *figures))
    return rows


@torch.no_grad()
def horizons(model: HookedHybrid, batch: RecallBatch) -> list[Row]:
    """Return the tokens after which each channel retains less than 1% of a write, by layer."""
    layers = model.cfg.recurrent_layers
    if not layers:
        return []
    tokens = batch.tokens[:N_WATCHED]
    _, cache = model.run_with_cache(tokens, names_filter=lambda name: ".mixer." in name)
    return [
        _row("horizon", layer, tokens_left)
        for layer in layers
        for tokens_left in memory_horizon(cache, layer).flatten().tolist()
    ]


def cells(out: Path, plan: TwinsPlan) -> Iterator[tuple[str, int, int]]:
    """Yield the twin, seed and step of each stored model."""
    for seed in plan.seeds:
        for name in TWINS:
            for step in plan.kept:
                if (folder(out, name, seed) / f"step-{step}.pt").exists():
                    yield name, seed, step


def table(out: Path, plan: TwinsPlan) -> pd.DataFrame:
    """Return the figures of all stored models: `twin`, `seed`, `step` and those of `compared`.

    Each model is compared once, and its figures are stored in its folder.
    """
    parts = []
    for name, seed, step in tqdm(list(cells(out, plan)), desc="compare", unit="model"):
        path = folder(out, name, seed) / f"figures-{step}.csv"
        if not path.exists():
            rows = compared(load(out, plan, name, seed, step), plan.task)
            with replacing(path) as temporary:
                pd.DataFrame(rows).to_csv(temporary, index=False)
        found = pd.read_csv(path, dtype={"at": str})
        parts.append(found.assign(twin=name, seed=seed, step=step))
    if not parts:
        raise ValueError(f"{out} contains no model of this plan: train some first")
    return pd.concat(parts, ignore_index=True)
