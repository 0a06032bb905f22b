"""Small windowed Griffins that recall from beyond their window, and the paths by which they do.

Part of `python -m experiments.outside_window`. A sequence has facts (a key and a value) in filler
and ends with a key, whose value the model must give. Facts may be several windows back. Information
that reaches the question passes every boundary between the two, so that restarting layers there
shows which ones carry it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from experiments.recall.score import HELD_OUT
from experiments.recall.task import RecallBatch, Task, draw
from experiments.recall.train import TrainingRecipe, small_config, train
from hooked_hybrid import HookedHybrid
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import (
    knock_out_crossings,
    knock_out_edges,
    knock_out_state_edges,
    limit_window,
)
from hooked_hybrid.outputs.whole_files import replacing

N_KEYS = 16
"""Keys that a query of these models sees, itself included."""
TASK = Task(64, 4, n_keys=32, n_values=16, n_filler=16)
RECIPE = TrainingRecipe(steps=1500, tokens=1536, rate=4e-3, patience=250)
D_MODEL = 48
SEEDS = (0, 1, 2)
N_EVAL = 400
D_CONV = 4
BINS = ("inside", "1 to 2 windows", "beyond 2")
"""Distance of a fact: within the question's window, then in windows."""
GROUPS = ("fact", "near the fact", "near both", "near neither", "near the question", "question")
"""Groups of positions by what they see, or what sees them, in one hop; see `groups`."""


class Case(NamedTuple):
    """Sequences that end with one question, with the position of its fact in each."""

    tokens: Int[Tensor, "batch pos"]
    answers: Int[Tensor, " batch"]
    key: Int[Tensor, " batch"]

    @property
    def question(self) -> int:
        """Position of the question, the last."""
        return self.tokens.shape[1] - 1

    @property
    def distance(self) -> Int[Tensor, " batch"]:
        """Tokens from the fact's value to the question."""
        return self.question - self.key - 1

    @property
    def bin(self) -> list[str]:
        """The distance of each fact, one of `BINS`."""
        return [BINS[min(d // N_KEYS, 2)] for d in self.distance.tolist()]


def case(n: int, task: Task = TASK, seed: int = 0) -> Case:
    """Return new sequences of the task up to their first question."""
    one = replace(task, length=task.room + 4, n_questions=1)
    batch: RecallBatch = draw(one, n, HELD_OUT + seed)
    key = batch.keys.gather(1, batch.asks)[:, 0]
    return Case(batch.tokens[:, : one.length - 1], batch.answers[:, 0], key)


def trained(pattern: str, seed: int, out: Path, recipe: TrainingRecipe = RECIPE) -> HookedHybrid:
    """Return a model trained on the task, or that of a finished training."""
    cfg = small_config(pattern, TASK, d_model=D_MODEL, n_keys=N_KEYS)
    model = train(cfg, TASK, replace(recipe, seed=seed), out / f"{pattern}-{seed}")
    return model.requires_grad_(False)


def without_window(model: HookedHybrid) -> HookedHybrid:
    """Return the model with the same weights and no window."""
    wide = HookedHybrid(model.cfg.with_overrides(n_keys=None)).requires_grad_(False)
    wide.load_state_dict(model.state_dict())
    return wide


def right(
    model: HookedHybrid,
    asked: Case,
    prefill: list[HookSpec] | None = None,
    generation: list[HookSpec] | None = None,
) -> Bool[Tensor, " batch"]:
    """Return whether each question is answered correctly; its token alone is generation."""
    new = model.generate(
        asked.tokens,
        1,
        prefill_hooks=prefill or [],
        generation_hooks=generation or [],
        first_token_stage="generation",
        stop_at_eos=False,
        return_type="output",
        verbose=False,
    ).new_tokens
    return new[:, 0] == asked.answers


def layer_sets(model: HookedHybrid) -> dict[str, list[int]]:
    """Return the sets of layers to cut, by name: each layer, each kind, and runs of recurrences."""
    cfg = model.cfg
    kind = {i: "attention" for i in cfg.attention_layers}
    sets = {f"{kind.get(i, 'recurrence')} {i}": [i] for i in range(cfg.n_layers)}
    runs: dict[int, list[int]] = {}
    for i in cfg.recurrent_layers:
        runs.setdefault(sum(a < i for a in cfg.attention_layers), []).append(i)
    sets |= {f"recurrences {', '.join(map(str, r))}": r for r in runs.values() if len(r) > 1}
    sets["all attention"], sets["all recurrences"] = (
        list(cfg.attention_layers),
        list(cfg.recurrent_layers),
    )
    return sets


def cuts(model: HookedHybrid, asked: Case) -> Iterator[tuple[str, str, list[HookSpec]]]:
    """Yield the name of each cut, its layers, and its hooks for prefill and generation.

    "boundary": nothing passes the middle between fact and question; "control": nothing passes a
    boundary before the fact; "edges": those from the fact's tokens (and the three after, whose
    convolutions read them) to later ones, by which detours stay open.
    """
    cfg, value = model.cfg, asked.key + 1
    pos = torch.arange(asked.question + 1)
    near = (pos >= asked.key[:, None]) & (pos < (value + D_CONV)[:, None])
    later = pos >= (value + D_CONV)[:, None]
    yield "nothing", "none", []
    for name, layers in layer_sets(model).items():
        middle = value + 1 + asked.distance // 2
        yield "boundary", name, knock_out_crossings(cfg, middle, layers=layers)
        yield "control", name, knock_out_crossings(cfg, asked.key, layers=layers)
        attention = [i for i in layers if i in cfg.attention_layers]
        recurrent = [i for i in layers if i in cfg.recurrent_layers]
        hooks = knock_out_edges(later, near, layers=attention) if attention else []
        if recurrent:
            hooks = [*hooks, *knock_out_state_edges(later, near, layers=recurrent)]
        yield "edges", name, hooks


@torch.no_grad()
def scored(model: HookedHybrid, asked: Case) -> pd.DataFrame:
    """Return one row for each sequence and setting: `cut`, `layers`, `bin`, `right` (0 or 1)."""
    found: list[dict[str, Any]] = []

    def add(cut: str, layers: str, answers: Tensor) -> None:
        rows = zip(asked.bin, answers.int().tolist(), strict=True)
        at = {"cut": cut, "layers": layers}
        found.extend({**at, "row": i, "bin": b, "right": r} for i, (b, r) in enumerate(rows))

    for cut, layers, hooks in cuts(model, asked):
        logits = model.run_with_hooks(asked.tokens, fwd_hooks=hooks, logits_to_keep=1)
        add(cut, layers, logits[:, -1].argmax(-1) == asked.answers)
    wide, on = without_window(model), limit_window(N_KEYS)
    for prefill in ("on", "off"):
        for generation in ("on", "off"):
            both = [on if stage == "on" else [] for stage in (prefill, generation)]
            add("window", f"prefill {prefill}, generation {generation}", right(wide, asked, *both))
    return pd.DataFrame(found)


def groups(asked: Case) -> dict[str, Bool[Tensor, "batch pos"]]:
    """Return the positions of each of `GROUPS`.

    "near the fact" are later tokens that see its value in one hop of attention, "near the question"
    those that the question sees; "near both" are both, "near neither" the others between the two.
    """
    pos, value = torch.arange(asked.question + 1), asked.key[:, None] + 1
    is_fact, is_question = (pos >= value - 1) & (pos <= value), pos == asked.question
    between = (pos > value) & ~is_question
    sees, seen = between & (pos < value + N_KEYS), between & (pos > asked.question - N_KEYS)
    masks = (is_fact, sees & ~seen, sees & seen, between & ~sees & ~seen, seen & ~sees)
    return dict(zip(GROUPS, (*masks, is_question.expand_as(between)), strict=True))


@torch.no_grad()
def traced(model: HookedHybrid, asked: Case) -> pd.DataFrame:
    """Return the effect of patching, by depth and group of positions.

    The corrupted run has another value in the question's fact. A row is a sequence, a depth and a
    group: `gain` is the change, by the clean stream at these positions, of the difference of the
    two values' logits; `total` is the change between the runs.
    """
    names = [f"blocks.{i}.hook_resid_pre" for i in range(model.cfg.n_layers)]
    names += [f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"]
    other = TASK.first_value + (asked.answers - TASK.first_value + 1) % TASK.n_values
    corrupted = asked.tokens.scatter(1, asked.key[:, None] + 1, other[:, None])

    def metric(logits: Float[Tensor, "batch _ d_vocab"]) -> Float[Tensor, " batch"]:
        of = logits[:, -1]
        return (of.gather(1, asked.answers[:, None]) - of.gather(1, other[:, None]))[:, 0]

    logits, clean = model.run_with_cache(asked.tokens, names_filter=names)
    floor_logits, corrupt = model.run_with_cache(corrupted, names_filter=names)
    floor = metric(floor_logits)
    total = metric(logits) - floor
    found: list[dict[str, Any]] = []
    for depth, name in enumerate(names):
        for group, mask in groups(asked).items():
            if not bool(mask.any()):
                continue
            stream = torch.where(mask[..., None], clean[name], corrupt[name])
            gain = metric(model(stream, start_at_layer=depth, logits_to_keep=1)) - floor
            rows = enumerate(zip(asked.bin, gain.tolist(), total.tolist(), strict=True))
            at = {"depth": depth, "group": group}
            found += [{**at, "row": i, "bin": b, "gain": g, "total": t} for i, (b, g, t) in rows]
    return pd.DataFrame(found)


def kept(path: Path, make: Callable[[], pd.DataFrame]) -> pd.DataFrame:
    """Return a table from its file, after making it if there is none."""
    if not path.exists():
        with replacing(path) as temporary:
            make().to_csv(temporary, index=False)
    return pd.read_csv(path)


def run(pattern: str, out: Path, n: int = N_EVAL) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return `scored` and `traced` of each seed's model, after training it; both resume."""
    scores: list[pd.DataFrame] = []
    traces: list[pd.DataFrame] = []
    for seed in SEEDS:
        model, asked = trained(pattern, seed, out), case(n)
        for make, tables, end in ((scored, scores, "csv"), (traced, traces, "trace.csv")):
            table = kept(out / f"{pattern}-{seed}.{end}", partial(make, model, asked))
            tables.append(table.assign(seed=seed))
    return pd.concat(scores), pd.concat(traces)


def by_cut(scores: pd.DataFrame) -> pd.DataFrame:
    """Return the accuracy (fraction) of each seed by cut, layers and distance, and their mean."""
    index = ["cut", "layers", "bin"]
    table = scores.pivot_table(index=index, columns="seed", values="right", sort=False)
    table.columns = [f"seed {seed}" for seed in table.columns]
    return table.assign(mean=table.mean(axis=1)).reset_index()
