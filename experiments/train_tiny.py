"""Train a packaged model: needles in ordinary text, read back word by word.

    python -m experiments.train_tiny griffin --seed 0 --out results/tiny-griffin-0 --minutes 40

Length and number of needles rise as accuracy passes 90%, so that the recurrence's state cannot
hold the facts and attention learns to fetch them. Every evaluation also reports accuracy with
attention cut and with the recurrences' memory cut. Stopped runs go on from their last checkpoint.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from experiments.tiny_data import Batch, Maker
from hooked_hybrid import HookedHybrid, HookPoint, HybridConfig, presets
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.niah.words import vocabulary

SPECIAL: dict[str, Any] = {"bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}
LENGTHS = {"griffin": 512, "jamba": 512}
TOKENS_A_STEP = 3072
TEXT_SHARE = 0.5
PASS = 0.9


def config(kind: str) -> HybridConfig:
    """Return the architecture of a packaged model."""
    sizes: dict[str, Any] = {"d_model": 128, "d_vocab": len(vocabulary()), "n_heads": 8, **SPECIAL}
    if kind == "griffin":
        return presets.griffin("RRARRARR", n_keys=256, d_mlp=384, **sizes)
    return presets.jamba(
        "MMAMMMAM", n_kv_heads=8, d_mlp=256, d_inner=128, d_state=4, dt_rank=8, **sizes
    )


def level(step: int, longest: int) -> tuple[int, int, int]:
    """Return (length, needles, questions) of a curriculum level.

    Several questions a sequence make the answers, which are what is learned from, denser.
    """
    return min(256 + 32 * step, longest), min(2 + step, 8), 2


def zero(x: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
    """Return zeros."""
    return torch.zeros_like(x)


def forget(x: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
    """Return log decays of a memory of one token."""
    return torch.full_like(x, -torch.inf)


CUTS: dict[str, list[HookSpec]] = {
    "whole": [],
    "no attention": [(lambda name: name.endswith("attn.hook_z"), zero)],
    "no memory": [
        (lambda name: name.endswith("hook_log_decay"), forget),
    ],
}
CUT_MAMBA: list[HookSpec] = [(lambda name: name.endswith("hook_ssm_decay"), zero)]


def losses(model: HookedHybrid, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Return the loss of answers, of ordinary text (nats a token), and accuracy on contents."""
    logits, targets = model(batch.tokens)[:, :-1], batch.tokens[:, 1:]
    each = cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
    answer, text, content = (
        kind[:, 1:] for kind in (batch.is_answer, batch.is_text, batch.is_content)
    )
    right = (logits.argmax(-1) == targets)[content].float().mean()
    return each[answer].mean(), each[text].mean(), right


@torch.no_grad()
def evaluate(model: HookedHybrid, kind: str, at: tuple[int, int, int]) -> dict[str, float]:
    """Return accuracy on fresh sequences, whole and cut."""
    batch = Maker(seed=10**6).batch(16, at[0], at[1], 1)
    figures: dict[str, float] = {}
    for name, hooks in CUTS.items():
        if name == "no memory" and kind == "jamba":
            hooks = CUT_MAMBA
        with model.hooks(hooks):
            _, text, right = losses(model, batch)
        figures |= {name: float(right), f"text loss, {name}": float(text)}
    return figures


class Run:
    """One training run in a folder: checkpoint, log, model."""

    def __init__(self, kind: str, seed: int, out: Path, rate: float) -> None:
        self.kind, self.seed, self.out, self.rate = kind, seed, out, rate
        out.mkdir(parents=True, exist_ok=True)
        torch.manual_seed(seed)
        self.model = HookedHybrid(config(kind))
        _scale_writes(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.02
        )
        self.step, self.level, self.seconds, self.recent = 0, 0, 0.0, 0.0
        if (out / "checkpoint.pt").exists():
            self._resume()

    def _resume(self) -> None:
        kept = torch.load(self.out / "checkpoint.pt", weights_only=True)
        self.model.load_state_dict(kept["model"])
        self.optimizer.load_state_dict(kept["optimizer"])
        self.step, self.level = kept["step"], kept["level"]
        self.seconds, self.recent = kept["seconds"], kept["recent"]

    def save(self) -> None:
        """Write the checkpoint, whole or not at all."""
        partial = self.out / "checkpoint.partial"
        torch.save(
            {
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "step": self.step,
                "level": self.level,
                "seconds": self.seconds,
                "recent": self.recent,
            },
            partial,
        )
        os.replace(partial, self.out / "checkpoint.pt")

    def note(self, **figures: Any) -> None:
        """Add a line to the log."""
        with (self.out / "log.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")

    def train_step(self, share_done: float) -> dict[str, float]:
        """Take one step; the rate warms up, stays, and falls over the last third."""
        longest = LENGTHS[self.kind]
        maker = Maker(seed=self.seed * 10**7 + self.step)
        # Earlier levels stay in the mix, so that short prompts are not forgotten.
        at = self.level if maker.rng.random() < 0.7 else maker.rng.randint(0, self.level)
        length, n_needles, n_questions = level(at, longest)
        batch = maker.batch(max(TOKENS_A_STEP // length, 1), length, n_needles, n_questions)
        warm = min((self.step + 1) / 100, 1.0)
        fall = (
            1.0 if share_done < 0.67 else 0.5 * (1 + math.cos(math.pi * (share_done - 0.67) / 0.33))
        )
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * warm * max(fall, 0.02)
        answer, text, right = losses(self.model, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (answer + TEXT_SHARE * text).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.step += 1
        if at == self.level:
            self.recent = 0.9 * self.recent + 0.1 * float(right)
        if self.recent > PASS and level(self.level + 1, longest) != level(self.level, longest):
            self.level, self.recent = self.level + 1, 0.0
        return {"answer": float(answer), "text": float(text), "right": float(right)}


def _scale_writes(model: HookedHybrid) -> None:
    """Make each layer's write small at first, so that the residual stream starts calm."""
    scale = (2 * model.cfg.n_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if (
                name.endswith(("o.weight", "linear_out.weight", "out_proj.weight"))
                or ".down" in name
            ):
                parameter.mul_(scale)
        for name, parameter in model.named_parameters():
            if name.endswith("dt_proj.bias"):
                steps = torch.empty_like(parameter).uniform_(math.log(1e-3), math.log(0.1)).exp()
                parameter.copy_(torch.log(torch.expm1(steps)))


def main() -> None:
    """Train until the minutes are over."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kind", choices=list(LENGTHS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=40, help="of training in all")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    run = Run(args.kind, args.seed, args.out, args.rate)
    total = args.minutes * 60
    bar = tqdm(total=int(total), initial=int(run.seconds), unit="s", desc=args.kind)
    while run.seconds < total:
        start = time.perf_counter()
        figures = run.train_step(run.seconds / total)
        run.seconds += time.perf_counter() - start
        bar.n = int(run.seconds)
        bar.set_postfix(
            step=run.step, level=run.level, **{k: f"{v:.3f}" for k, v in figures.items()}
        )
        if run.step % 100 == 0:
            at = level(run.level, LENGTHS[args.kind])
            run.note(
                step=run.step,
                seconds=round(run.seconds, 1),
                level=run.level,
                length=at[0],
                needles=at[1],
                **figures,
                **evaluate(run.model, args.kind, at),
            )
            run.save()
    run.save()
    run.model.bfloat16().save_pretrained(args.out / "model")


if __name__ == "__main__":
    main()
