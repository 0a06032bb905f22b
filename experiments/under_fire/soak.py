# ruff: noqa: ARG005  (hooks share one signature)
"""A soak test: thousands of generations with caching between, and the growth of memory.

Source: none; the bound is the project's own. Run `python -m experiments.under_fire.soak --rounds
2000 --out soak.json`; a packaged model a line.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from experiments.under_fire.memory import private_bytes
from hooked_hybrid import HookedHybrid
from hooked_hybrid.presets.packaged import packaged_models

PROMPTS = ("the pass key is 7, remember it", "one two three", "a", "the grass is green. " * 3)
POINT = "blocks.1.hook_resid_mid"
SHARE = 0.01
"""Largest growth, as a share of the memory after the warm-up."""


def soak(name: str, rounds: int, warm_up: int) -> dict[str, Any]:
    """Run rounds of every kind of generation and cache on a packaged model.

    Returns:
        Memory [bytes] and live tensors after the warm-up and at the end, with the share that the
        memory grew by, and that share at each quarter of the rounds.
    """
    model = HookedHybrid.from_pretrained(name)
    for i in range(warm_up):
        _round(model, i)
    first, grown = _left(), []
    for i in tqdm(range(rounds), desc=name, disable=None):
        _round(model, i)
        if (i + 1) % -(-rounds // 4) == 0:
            grown.append(round(_left()[0] / first[0] - 1, 6))
    last = _left()
    return {
        "model": name,
        "rounds": rounds,
        "memory after warm-up [bytes]": first[0],
        "memory at the end [bytes]": last[0],
        "growth": last[0] / first[0] - 1,
        "growth by quarters": grown,
        "tensors after warm-up": first[1],
        "tensors at the end": last[1],
    }


def _round(model: HookedHybrid, i: int) -> None:
    """Generate once, with settings that vary by round, and run with a cache."""
    prompt = PROMPTS[i % len(PROMPTS)]
    state = None
    if i % 3 == 2:
        _, state = model(prompt, return_state=True)
    seen: list[float] = []
    out = model.generate(
        [prompt, "the"] if i % 3 == 0 else prompt,
        max_new_tokens=3,
        fwd_hooks=[(POINT, lambda value, hook: seen.append(float(value.sum())))],
        generation_hooks=[(POINT, lambda value, hook: value * 0.5)] if i % 2 else (),
        state=state,
        names_filter=True if i % 4 == 0 else None,
        return_type="output",
        verbose=False,
    )
    _, cache = model.run_with_cache(prompt, incl_bwd=i % 10 == 0)
    assert seen and len(cache) and out.new_tokens.shape[1] <= 3


def _left() -> tuple[int, int]:
    """Return memory [bytes] after returning free memory to the system, and live tensors.

    Memory mapped from files is not counted: a hundred MB of pages of torch's own files count as
    this process's or as shared, as other programs start and end.
    """
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    memory = private_bytes(os.getpid())
    return memory, sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def main(arguments: list[str] | None = None) -> int:
    """Soak each packaged model, and return 1 if memory grew or tensors were left."""
    parser = argparse.ArgumentParser(prog="python -m experiments.under_fire.soak")
    parser.add_argument("--rounds", type=int, default=2000, help="generations, after the warm-up")
    parser.add_argument("--warm-up", type=int, default=200)
    parser.add_argument("--out", type=Path, help="JSON file")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)
    results = [soak(name, args.rounds, args.warm_up) for name in packaged_models()]
    text = json.dumps(results, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    return int(
        any(
            r["growth"] > SHARE or r["tensors at the end"] != r["tensors after warm-up"]
            for r in results
        )
    )


if __name__ == "__main__":
    sys.exit(main())
