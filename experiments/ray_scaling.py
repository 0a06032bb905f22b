"""Cells a second with workers: one process against 1 and 2 workers of one thread each.

    python -m experiments.ray_scaling [--model tiny-griffin] [--rounds 5] [--workers 1 2]

Ray runs on this machine alone. Rounds are interleaved, so that a slow minute affects all; Ray's
start and the models' loading are printed separately. The cells must be equal.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from functools import partial
from statistics import median
from typing import Any

import pandas as pd
import torch

from experiments.benchmarks.timing import interleaved
from hooked_hybrid import HookedHybrid
from hooked_hybrid.niah.lengths import longest_prompt
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import default_depths, default_lengths, grid
from hooked_hybrid.niah.settings.papers import heads_of
from hooked_hybrid.niah.sweep import niah, top_k_settings
from hooked_hybrid.runs.ray_calls import connect
from hooked_hybrid.runs.ray_workers import RayWorkers


def _check(tables: dict[str, pd.DataFrame]) -> None:
    """Raise an error if two ways gave different cells."""
    first, *others = (table.drop(columns="seconds") for table in tables.values())
    if not all(first.equals(other) for other in others):
        raise ValueError("workers and one process do not give the same cells")


def main() -> None:
    """Measure, and print a readable line and one of JSON for each way."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-griffin")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--lengths", type=int, default=6, help="prompt lengths, of 10 depths each")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = partial(HookedHybrid.from_pretrained, args.model, dtype=torch.float32)
    model = load()
    lengths = default_lengths(longest_prompt(model.cfg), args.lengths)
    prompts = grid(model, [PAPER], lengths, default_depths())
    settings = top_k_settings(range(min(heads_of(model.cfg).values()) + 1))
    n_cells = len(prompts) * len(settings)

    def sweep(workers: RayWorkers | None) -> Any:
        return niah(model, prompts, settings, workers=workers, verbose=False)

    os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: a process here has 0
    began = time.perf_counter()
    connect("local", sum(args.workers))
    print(f"Ray started in {time.perf_counter() - began:.1f} s; {os.cpu_count()} cores here")
    with ExitStack() as stack:
        works: dict[str, Any] = {"one process": partial(sweep, None)}
        for n in args.workers:
            workers = stack.enter_context(RayWorkers("local", n, load=load))
            began = time.perf_counter()
            niah(model, prompts[:n], settings[:1], workers=workers, verbose=False)
            print(f"{n} workers ready in {time.perf_counter() - began:.1f} s")
            works[f"{n} workers"] = partial(sweep, workers)
        wall = time.perf_counter  # the workers are other processes
        seconds = interleaved(works, args.rounds, "ray-scaling", _check, read=wall)
    alone = median(seconds["one process"])
    for name, them in seconds.items():
        rates = sorted(n_cells / s for s in them)
        print(
            f"{name:>12}: {median(rates):6.1f} cells a second ({rates[0]:.1f} to {rates[-1]:.1f}),"
            f" {alone / median(them):.2f} x one process"
        )
        print(json.dumps({"way": name, "cells": n_cells, "seconds": them}))


if __name__ == "__main__":
    main()
