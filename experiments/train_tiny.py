"""Train a packaged model: needles in ordinary text, read back word by word.

    python -m experiments.train_tiny griffin --seed 0 --out results/tiny-griffin-0

Drills come first: they teach attention to find and copy. Then length and number of needles rise as
accuracy passes 90%, so that the recurrence's state cannot contain the facts and attention keeps
copying them. Every evaluation also reports accuracy with attention cut and with the recurrences'
memory cut. A stopped run continues from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from experiments.tiny_data import ANSWER, CONTENT, DRILL, TEXT, Maker, Size, TokenBatch
from hooked_hybrid import HookedHybrid, HookPoint, HybridConfig
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import HookFn
from hooked_hybrid.network.mixers.rglru import DECAY_STRENGTH
from hooked_hybrid.niah.haystacks.words import vocabulary
from hooked_hybrid.presets import configs as presets

SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
LEVELS = [
    *(Size(64, 0, 0, drills=1.0, words=words) for words in (64, 128, 256, 580)),
    *(
        Size(128 + 32 * i, needles=2 + i // 2, questions=1 + i // 3, drills=0.3 / (1 + i))
        for i in range(13)
    ),
]
"""First drills, over more and more words; then needles, from 2 in 128 tokens to 8 in 512."""

FIRST_NEEDLES = next(i for i, size in enumerate(LEVELS) if size.needles)
PASS = 0.9
PATIENCE = 150
"""Steps at a level of needles after which the next one begins in any case: beyond the attention
window accuracy may never reach the limit.
"""
WEIGHTS = {TEXT: 0.5, ANSWER: 0.3, CONTENT: 1.0, DRILL: 1.0}
"""Weights of the loss; answers are mostly frame, which is learned at once."""

EVERY = 100
COUNTERS = ("step", "level", "since", "seconds", "recent")
HORIZON = 2
"""Number of batches drawn ahead of the one in use, each at the level of that time."""


def config(kind: str, d_model: int) -> HybridConfig:
    """Return the architecture of a packaged model."""
    sizes: dict[str, Any] = {"d_model": d_model, "d_vocab": len(vocabulary()), "n_heads": 8}
    if kind == "griffin":
        return presets.griffin("RRARRA", n_keys=256, d_mlp=2 * d_model, **sizes, **SPECIAL)
    cfg = presets.jamba(
        "MMAM", n_kv_heads=8, d_mlp=192, d_inner=128, d_state=4, dt_rank=8, **sizes, **SPECIAL
    )
    return replace(cfg, n_ctx=LEVELS[-1].length)


def zero(x: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
    """Return zeros."""
    return torch.zeros_like(x)


def forget(x: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
    """Return log decays of a memory of one token."""
    return torch.full_like(x, -torch.inf)


CUTS: dict[str, list[tuple[Callable[[str], bool], HookFn]]] = {
    "whole": [],
    "no attention": [(lambda name: name.endswith("attn.hook_z"), zero)],
    "no memory": [
        (lambda name: name.endswith("hook_log_decay"), forget),
        (lambda name: name.endswith("hook_ssm_decay"), zero),
    ],
}


def losses(model: HookedHybrid, batch: TokenBatch) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
    """Return the mean loss of each kind of token in nats, and the accuracy on each."""
    logits, targets, kinds = model(batch.tokens)[:, :-1], batch.tokens[:, 1:], batch.kinds[:, 1:]
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    right = logits.argmax(-1) == targets
    # Sums, not selections: a selection waits for the device.
    of = {kind: (kinds == kind, (kinds == kind).sum().clamp(min=1)) for kind in WEIGHTS}
    means = {kind: (each * mask).sum() / n for kind, (mask, n) in of.items()}
    return means, {kind: (right & mask).sum() / n for kind, (mask, n) in of.items()}


def cut(model: HookedHybrid, name: str) -> list[HookSpec]:
    """Return the hooks of a cut for whose points this model has layers."""
    return [(pick, fn) for pick, fn in CUTS[name] if any(pick(point) for point in model.hook_dict)]


@torch.no_grad()
def evaluate(model: HookedHybrid, size: Size, device: str) -> dict[str, float]:
    """Return accuracy on contents and the loss of text (nats a token), whole and cut."""
    size = replace(size, questions=min(size.questions, 1), drills=max(size.drills, 0.2))
    batch = _to(Maker(seed=10**6).batch(8192 // size.length, size), device)
    figures: dict[str, float] = {}
    for name in CUTS:
        with model.hooks(cut(model, name)):
            means, right = losses(model, batch)
        figures |= {name: round(float(right[CONTENT]), 4)}
        figures |= {f"drill, {name}": round(float(right[DRILL]), 4)}
        figures |= {f"text, {name}": round(float(means[TEXT]), 4)}
    return figures


def _to(batch: TokenBatch, device: str) -> TokenBatch:
    return TokenBatch(batch.tokens.to(device), batch.kinds.to(device))


class Batches(Dataset[TokenBatch]):
    """The batch of a step and a level, which the seed determines."""

    def __init__(self, seed: int, tokens: int, echo: float) -> None:
        self.seed, self.tokens, self.echo = seed, tokens, echo

    def __getitem__(self, at: tuple[int, int]) -> TokenBatch:
        """Return the batch of (step, level)."""
        step, level = at
        size = LEVELS[level]
        maker = Maker(self.seed * 10**7 + step, self.echo)
        return maker.batch(max(self.tokens // size.length, 1), size)


class Run(Sampler[tuple[int, int]]):
    """One training run in a folder: checkpoint, log, model; and the order of its batches."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.out = args, Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(args.seed)
        self.model = HookedHybrid(config(args.kind, args.d_model))
        start_calm(self.model)
        self.model.to(args.device)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=args.rate, betas=(0.9, 0.98), weight_decay=0.02
        )
        self.step, self.level, self.since = 0, 0, 0
        self.seconds, self.recent = 0.0, 0.0
        if (self.out / "checkpoint.pt").exists():
            self._resume()

    def _resume(self) -> None:
        kept = torch.load(self.out / "checkpoint.pt", weights_only=True)
        for name in ("model", "optimizer"):
            getattr(self, name).load_state_dict(kept[name])
        for name in COUNTERS:
            setattr(self, name, kept[name])

    def save(self) -> None:
        """Write the checkpoint atomically."""
        partial = self.out / "checkpoint.partial"
        kept = {name: getattr(self, name) for name in COUNTERS}
        kept |= {name: getattr(self, name).state_dict() for name in ("model", "optimizer")}
        torch.save(kept, partial)
        os.replace(partial, self.out / "checkpoint.pt")

    def note(self, **figures: Any) -> None:
        """Add a line to the log."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Yield (step, level); earlier levels stay in the mix, so that none is forgotten."""
        step = self.step
        while True:
            rng = random.Random(self.args.seed * 10**7 + step)
            drilling = not LEVELS[self.level].needles
            is_now = drilling or rng.random() < 0.6
            yield step, self.level if is_now else rng.randint(FIRST_NEEDLES, self.level)
            step += 1

    def rate(self) -> float:
        """Return the learning rate: it warms up, stays, and falls over the last two fifths."""
        warm = min((self.step + 1) / 200, 1.0)
        share_done = self.step / self.args.steps
        fall = 0.5 * (1 + math.cos(math.pi * max(share_done - 0.6, 0) / 0.4))
        return self.args.rate * warm * max(fall, 0.02)

    def train_step(self, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Take one step; return the loss and the accuracy on contents."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        means, right = losses(self.model, batch)
        loss = torch.stack([WEIGHTS[kind] * mean for kind, mean in means.items()]).sum()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        return loss.detach(), right[CONTENT if LEVELS[self.level].needles else DRILL]

    def rise(self, length: int, right: Tensor) -> None:
        """Go to the next level once this one's accuracy is reached, or its patience is over."""
        if length == LEVELS[self.level].length:
            self.recent = 0.8 * self.recent + 0.2 * float(right)
        waited = bool(LEVELS[self.level].needles) and self.step - self.since >= PATIENCE
        if (self.recent > PASS or waited) and self.level + 1 < len(LEVELS):
            self.level, self.recent, self.since = self.level + 1, 0.0, self.step

    def report(self) -> dict[str, float]:
        """Evaluate at this level; write the figures to the log."""
        size = LEVELS[self.level]
        found = evaluate(self.model, size, self.args.device)
        at = {"step": self.step, "seconds": round(self.seconds, 1), "level": self.level}
        self.note(**at, length=size.length, needles=size.needles, **found)
        return found


def start_calm(model: HookedHybrid) -> None:
    """Make each layer's write small, so that the stream starts small; spread Mamba's dt."""
    scale = (2 * model.cfg.n_layers) ** -0.5
    writes = ("o.weight", "linear_out.weight", "out_proj.weight", "down", "down.weight")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(writes):
                parameter.mul_(scale)
            if name.endswith("dt_proj.bias"):
                steps = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)).exp()
                parameter.copy_(torch.log(torch.expm1(steps)))
            if name.endswith("a_param"):
                # Griffin's decays of 0.9 and more mix the last words, by which attention finds its
                # place.
                rates = -torch.empty_like(parameter).uniform_(0.01, 0.97).log() / DECAY_STRENGTH
                parameter.copy_(torch.log(torch.expm1(rates)))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=["griffin", "jamba"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=2500, help="in all")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--d-model", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=2048, help="in a step")
    parser.add_argument("--echo", type=float, default=0.2, help="share of repeated lines")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=0, help="processes that draw batches")
    return parser.parse_args()


def train(run: Run) -> None:
    """Train until all steps are done."""
    args = run.args
    ahead = HORIZON if args.workers else None
    batches = Batches(args.seed, args.tokens, args.echo)
    loader = DataLoader(
        batches, batch_size=None, sampler=run, num_workers=args.workers, prefetch_factor=ahead
    )
    last = time.perf_counter()
    with tqdm(total=args.steps, initial=run.step, unit="step", desc=args.kind) as bar:
        for batch in loader:
            if run.step >= args.steps:
                break
            loss, right = run.train_step(_to(batch, args.device))
            if run.step % 4 == 0:  # not every step: reading it waits for the device
                run.rise(batch.tokens.shape[1], right)
            now = time.perf_counter()
            run.seconds, last = run.seconds + now - last, now
            bar.update()
            if run.step % EVERY == 0 or run.step == args.steps:
                found = run.report()
                bar.set_postfix(level=run.level, loss=float(loss), right=found["whole"])
                run.save()


def main() -> None:
    """Train, and write the checkpoint in bf16."""
    args = parse()
    torch.set_num_threads(args.threads)
    torch.set_float32_matmul_precision("high")  # of a GPU; a CPU has no such mode
    if (args.out / "model").exists():
        raise SystemExit(f"{args.out} contains a finished run: give another folder")
    recipe = {name: value for name, value in vars(args).items() if name != "out"}
    kept = args.out / "recipe.json"
    if kept.exists() and json.loads(kept.read_text()) != recipe:
        raise SystemExit(
            f"{args.out} contains a run of another recipe, {kept}: give another folder"
        )
    run = Run(args)
    kept.write_text(json.dumps(recipe, indent=2))
    train(run)
    run.model.cpu().bfloat16().save_pretrained(run.out / "model")


if __name__ == "__main__":
    main()
