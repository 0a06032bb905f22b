"""Train a small model on key-value recall: about a minute on one core.

    python -m experiments.recall.train MAM --facts 4 --length 64 --seed 0 --out results/recall-0

Drills first, until 90% are right; then the task at growing lengths up to its own. A stopped run
continues from its last checkpoint, and ends as if it had not been stopped.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Collection
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.recall.task import Task, draw, drill
from experiments.train_tiny import cut, start_calm
from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.presets import configs as presets

PASS = 0.9
SHORTEST = 32
DRILL_PAIRS = 16
EVERY = 100
"""Steps from one line of the log, and checkpoint, to the next."""


@dataclass(frozen=True)
class TrainingRecipe:
    """How a model is trained.

    Args:
        steps: number of steps.
        tokens: of a step.
        rate: learning rate after 100 steps of warming up; it falls over the last third.
        patience: steps after which the next level begins in any case.
        head_start: first steps, in which attention writes zeros, so that the recurrences learn
            alone.
        drills: whether drills come first; without them, small models may not learn to bind.
        seed: of weights and sequences. Sequences depend on seed and step alone, not on the model.
    """

    steps: int = 1000
    tokens: int = 2048
    rate: float = 5e-3
    patience: int = 250
    head_start: int = 0
    drills: bool = True
    seed: int = 0


def small_config(pattern: str, task: Task, *, d_model: int = 32, **sizes: Any) -> HybridConfig:
    """Return a small model's config: with Jamba's layers if there is an M, Griffin's otherwise.

    Args:
        pattern: a letter a layer: M Mamba, R RG-LRU, A attention (global with M; with R, or
            alone, of `n_keys` keys, all by default).
        task: whose vocabulary it has.
        d_model: width of the residual stream, and of the MLP unless `d_mlp` is given.
        **sizes: other arguments of `presets.jamba` or `presets.griffin`.
    """
    common: dict[str, Any] = {
        "d_model": d_model,
        "d_vocab": task.d_vocab,
        "n_heads": 4,
        "n_kv_heads": 4,
        "d_mlp": d_model,
    }
    if "M" in pattern:
        jamba = {"n_experts": 1, "n_chosen": 1, "dt_rank": 4, "d_state": 8}
        return presets.jamba(pattern, **{**common, **jamba, **sizes})
    return presets.griffin(pattern, **{**common, "n_keys": None, **sizes})


def levels_of(task: Task) -> list[Task]:
    """Return the task at half its length, a quarter and so on, the shortest first, itself last."""
    shortest = max(SHORTEST, 2 + 3 * task.n_facts + 2 * task.asked)
    lengths = [task.length]
    while lengths[0] // 2 >= shortest:
        lengths.insert(0, lengths[0] // 2)
    return [replace(task, length=length) for length in lengths]


class Training:
    """A training run in a folder: checkpoint, log, and models kept at some steps."""

    def __init__(
        self,
        cfg: HybridConfig,
        task: Task,
        recipe: TrainingRecipe,
        out: Path,
        keep: Collection[int] = (),
    ) -> None:
        self.task, self.recipe, self.out, self.keep = task, recipe, out, frozenset(keep)
        self.levels = levels_of(task)
        torch.manual_seed(recipe.seed)
        self.model = HookedHybrid(cfg)
        start_calm(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        self.step, self.level = 0, -1 if recipe.drills else 0
        self.since, self.recent = 0, 0.0
        out.mkdir(parents=True, exist_ok=True)
        self._check_recipe(cfg)
        if (out / "checkpoint.pt").exists():
            self._resume()

    def _check_recipe(self, cfg: HybridConfig) -> None:
        """Record the training; raise an error if the folder contains another one."""
        mine = {"config": str(cfg), "task": asdict(self.task), "recipe": asdict(self.recipe)}
        kept = self.out / "recipe.json"
        if kept.exists() and json.loads(kept.read_text()) != mine:
            raise ValueError(
                f"{self.out} contains a training of another recipe: give another folder"
            )
        with replacing(kept) as temporary:
            temporary.write_text(json.dumps(mine, indent=2))

    def _resume(self) -> None:
        found = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(found["model"])
        self.optimizer.load_state_dict(found["optimizer"])
        for name in ("step", "level", "since", "recent"):
            setattr(self, name, found[name])
        log = self.out / "log.jsonl"  # without steps after the checkpoint: they are repeated
        lines = log.read_text().splitlines(keepends=True)
        log.write_text("".join(line for line in lines if json.loads(line)["step"] <= self.step))

    def save(self) -> None:
        """Write the checkpoint atomically."""
        kept = {name: getattr(self, name) for name in ("step", "level", "since", "recent")}
        kept |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        _write(self.out / "checkpoint.pt", kept)

    def rate(self) -> float:
        """Return the learning rate of this step."""
        warm = min((self.step + 1) / 100, 1.0)
        fall = min(3 * (1 - self.step / self.recipe.steps), 1.0)
        return self.recipe.rate * warm * max(fall, 0.02)

    def answers(self) -> tuple[Tensor, Tensor]:
        """Return the logits [answer d_vocab] of this step's questions, and the answers [answer]."""
        seed = self.recipe.seed * 10**7 + self.step
        if self.level < 0:
            rows = max(self.recipe.tokens // (2 * DRILL_PAIRS), 1)
            found = drill(self.task, rows, DRILL_PAIRS, seed)
            logits = self.model(found.tokens)[:, ::2]
            return logits[found.asked], found.tokens[:, 1::2][found.asked]
        task = self.levels[self.level]
        batch = draw(task, max(self.recipe.tokens // task.length, 1), seed)
        logits = self.model(batch.tokens)[:, batch.questions]
        return logits.flatten(0, 1), batch.answers.flatten()

    def take_step(self) -> float:
        """Take one step; return the loss in nats an answer."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        alone = self.step < self.recipe.head_start
        with self.model.hooks(cut(self.model, "no attention") if alone else []):
            logits, answers = self.answers()
        loss = cross_entropy(logits, answers)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        right = float((logits.argmax(-1) == answers).float().mean())
        self.recent = 0.95 * self.recent + 0.05 * right
        self.step += 1
        self._rise()
        return float(loss.detach())

    def _rise(self) -> None:
        """Go to the next level once this one is passed, or its patience is over."""
        waited = self.step - self.since >= self.recipe.patience
        if (self.recent > PASS or waited) and self.level + 1 < len(self.levels):
            self.level, self.recent, self.since = self.level + 1, 0.0, self.step


def train(
    cfg: HybridConfig,
    task: Task,
    recipe: TrainingRecipe,
    out: Path,
    keep: Collection[int] = (),
    report: Callable[[HookedHybrid], dict[str, float]] | None = None,
    run_type: type[Training] = Training,
) -> HookedHybrid:
    """Train a model, or continue a stopped training; return it at its last step.

    Args:
        cfg, task, recipe: what is trained, on what, how.
        out: folder of the checkpoint, of `log.jsonl`, and of the models kept, `step-N.pt`.
        keep: steps at which the model is kept.
        report: more figures for each line of the log.
        run_type: class of the training; another class may change levels by another rule.

    Raises:
        ValueError: `out` contains a training of another recipe.
    """
    run = run_type(cfg, task, recipe, out, keep)
    with tqdm(total=recipe.steps, initial=run.step, unit="step", desc=out.name) as bar:
        while run.step < recipe.steps:
            if run.step in run.keep:
                _write(out / f"step-{run.step}.pt", run.model.state_dict())
            loss = run.take_step()
            bar.update()
            if run.step % EVERY == 0 or run.step == recipe.steps:
                found = {"step": run.step, "level": run.level, "loss": round(loss, 4)}
                found |= {"recent": round(run.recent, 4), **(report(run.model) if report else {})}
                with (out / "log.jsonl").open("a") as file:
                    file.write(json.dumps(found) + "\n")
                bar.set_postfix(level=run.level, right=round(run.recent, 3))
                run.save()
    if recipe.steps in run.keep:
        _write(out / f"step-{recipe.steps}.pt", run.model.state_dict())
    return run.model


def _write(path: Path, what: Any) -> None:
    with replacing(path) as temporary:
        torch.save(what, temporary)


def main() -> None:
    """Train one model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("pattern", help="a letter a layer: M or R, and A")
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--facts", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=TrainingRecipe.steps)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    task = Task(args.length, args.facts)
    recipe = TrainingRecipe(steps=args.steps, seed=args.seed)
    train(small_config(args.pattern, task), task, recipe, args.out)


if __name__ == "__main__":
    main()
