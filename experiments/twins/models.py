"""Three models of equal size, trained on the same batches: with both mixers and with each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from experiments.recall.task import Task
from experiments.recall.train import Training, TrainingRecipe, small_config, train
from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.network.mixers.rglru import DECAY_STRENGTH

TASK = Task(length=48, n_facts=4, n_keys=16, n_values=16)
LONG = "long-start hybrid"
TWINS = {"hybrid": "RAR", LONG: "RAR", "attention-free": "RRR", "attention-only": "AAA"}
"""Layers of each: R an RG-LRU, A global attention. The second hybrid is a control: it begins with
decays near 1."""
START = (0.9, 0.999)
"""Bounds of the initial decays, gates open, of the long-start hybrid: Griffin's own."""
SIZES = {"d_model": 32, "d_rnn": 64}
D_MLP = 32
"""Width of the hybrid's MLPs; that of its twins makes them equally large."""
TOLERANCE = 0.01
"""Largest relative difference of the twins' number of parameters from the hybrid's."""
DRILLS = 200
"""Steps of drills before the task, equal for all."""
STEPS = 800
KEPT = (0, 100, 200, 300, 400, STEPS)
"""Steps at which a model is stored, and later compared."""


class Alike(Training):
    """A training whose level depends on the step alone, so that twins see the same batches."""

    def _rise(self) -> None:
        if self.level < 0 and self.step == DRILLS:
            self.level, self.recent, self.since = len(self.levels) - 1, 0.0, self.step


class LongStart(Alike):
    """A training whose RG-LRUs begin with a memory of hundreds of tokens instead of a few."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.step:
            return
        rng = torch.Generator().manual_seed(self.recipe.seed)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if name.endswith("a_param"):
                    decays = torch.empty_like(parameter).uniform_(*START, generator=rng)
                    parameter.copy_(torch.log(torch.expm1(-decays.log() / DECAY_STRENGTH)))


RUN_TYPES: dict[str, type[Training]] = {LONG: LongStart}


@dataclass(frozen=True)
class TwinsPlan:
    """The trainings: a task, seeds, steps, and steps at which models are stored."""

    task: Task = TASK
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = STEPS
    kept: tuple[int, ...] = KEPT
    tokens: int = 1024
    rate: float = 5e-3

    def recipe(self, seed: int) -> TrainingRecipe:
        """Return the recipe of the models of one seed."""
        return TrainingRecipe(steps=self.steps, tokens=self.tokens, rate=self.rate, seed=seed)


def n_parameters(cfg: HybridConfig) -> int:
    """Return the parameters of a config, counted without allocating them."""
    return sum(p.numel() for p in HookedHybrid.meta(cfg).parameters())


@cache
def configs(task: Task) -> dict[str, HybridConfig]:
    """Return the config of each twin, with as many parameters as the hybrid.

    Raises:
        ValueError: no width of the MLP makes a twin equal within `TOLERANCE`.
    """
    hybrid = small_config(TWINS["hybrid"], task, d_mlp=D_MLP, **SIZES)
    wanted = n_parameters(hybrid)
    made = {}
    for name, pattern in TWINS.items():
        one, two = (
            n_parameters(small_config(pattern, task, d_mlp=n, **SIZES)) for n in (D_MLP, D_MLP + 1)
        )
        d_mlp = max(1, D_MLP + round((wanted - one) / (two - one)))
        made[name] = small_config(pattern, task, d_mlp=d_mlp, **SIZES)
        got = n_parameters(made[name])
        if abs(got - wanted) > TOLERANCE * wanted:
            raise ValueError(f"{name}: {got} parameters, the hybrid has {wanted}: give other sizes")
    return made


def folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of a model's training."""
    return out / f"{name.replace(' ', '-')}-{seed}"


def train_one(out: Path, plan: TwinsPlan, name: str, seed: int) -> None:
    """Train a twin, or continue its training."""
    where, cfg = folder(out, name, seed), configs(plan.task)[name]
    if not all((where / f"step-{step}.pt").exists() for step in plan.kept):
        train(
            cfg,
            plan.task,
            plan.recipe(seed),
            where,
            keep=plan.kept,
            run_type=RUN_TYPES.get(name, Alike),
        )


def load(out: Path, plan: TwinsPlan, name: str, seed: int, step: int) -> HookedHybrid:
    """Return a twin at a step."""
    model = HookedHybrid(configs(plan.task)[name]).requires_grad_(False)
    path = folder(out, name, seed) / f"step-{step}.pt"
    model.load_state_dict(torch.load(path, weights_only=True))
    return model.eval()
