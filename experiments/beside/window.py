"""Small models trained with attention windows of three lengths: their recurrences' memory."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import torch

from experiments.beside.frame import Bench, Experiment, Finding, verdict
from experiments.recall.score import HELD_OUT, answered, score
from experiments.recall.task import Task, draw
from experiments.recall.train import TrainingRecipe, small_config, train
from experiments.train_tiny import cut
from hooked_hybrid.runs.verdicts import FAILS, OPEN, apart

TASK = Task(length=64, n_facts=4)
WINDOWS, SEEDS = (8, 24, 64), (0, 1, 2)
"""Keys that a query sees in training and after it; the last is the whole sequence."""
PATTERN, STEPS, SCORED = "RAR", 1500, 512
LEARNED = 0.9
"""Share of correct answers of the whole model from which it has learned the task."""


def trained(folder: Path, seeds: tuple[int, ...] = SEEDS, steps: int = STEPS) -> pd.DataFrame:
    """Return a row for each window and seed: shares of questions answered correctly, whole and cut.

    "no attention" is the share with the recurrences alone, `far` that of facts further from the
    question than the second window.
    """
    rows = []
    for seed in seeds:
        for window in WINDOWS:
            cfg = small_config(PATTERN, TASK, n_keys=window)
            recipe = TrainingRecipe(steps=steps, patience=steps // 4, seed=seed)
            model = train(cfg, TASK, recipe, folder / f"window-{window}-{seed}")
            batch = draw(TASK, SCORED, HELD_OUT)
            row = {"setting": f"window {window}, seed {seed}", "window": window, "seed": seed}
            for name in ("whole", "no attention", "no memory"):
                right = answered(model, batch, cut(model, name))
                row |= {name: score(right).accuracy, f"{name} half": score(right).half_width}
                if name == "no attention":
                    far = batch.distances > WINDOWS[1]
                    row |= {"far": float(right[far].float().mean())}
            rows.append(row)
    return pd.DataFrame(rows)


def run(bench: Bench) -> Finding:
    """Train every window with every seed, or continue; the bench's model is not used."""
    with torch.enable_grad():
        table = trained(bench.folder)
    table["recall"] = table["no attention"]
    half = table["no attention half"]
    table["recall_low"], table["recall_high"] = table["recall"] - half, table["recall"] + half
    by, whole = table.groupby("window")["recall"], table.groupby("window")["whole"]
    ours = f"without attention, of {TASK.n_facts} facts in {TASK.length} tokens: " + "; ".join(
        f"window {w}: {100 * r.mean():.0f}% (seeds {100 * r.min():.0f} to {100 * r.max():.0f}%; "
        f"whole {100 * whole.mean()[w]:.0f}%)"
        for w, r in by
    )
    low = table.groupby("window")["recall_low"].min()  # intervals too: chance is near
    high = table.groupby("window")["recall_high"].max()
    word = apart(*((low[w], high[w]) for w in (WINDOWS[0], WINDOWS[-1])))
    if word == FAILS and whole.min().min() <= LEARNED:
        word = OPEN  # models that have not learned the task do not count against it
    return Finding(verdict(word), ours, table)


EXPERIMENT = Experiment(
    "shorter attention windows in training give the recurrence the better long-term memory (SWAX: "
    "sliding windows and xLSTM)",
    "arXiv 2509.24552",
    run,
    "recall",
    "questions answered without attention (chance: 0.06)",
)
