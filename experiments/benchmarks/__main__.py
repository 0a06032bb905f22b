"""Measure the library against `transformers` and `recurrentgemma`, on this machine.

    python -m experiments.benchmarks [--only rg-prefill decode] [--rounds 5] [--quick]
    python -m experiments.benchmarks --render

Needs the `test` extra. The folder gets `figures.json` (every round of every measurement),
`table.md` and `tokens_per_second.png`. A stopped run keeps its figures; `--only` replaces the
figures of the named cases only.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from experiments.benchmarks.cases import CASES
from experiments.benchmarks.harness import render, run
from experiments.benchmarks.options import Options
from hooked_hybrid.presets.packaged import packaged_models


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    found = argparse.ArgumentParser(
        "experiments.benchmarks", description=(__doc__ or "").split("\n")[0]
    )
    found.add_argument(
        "--only",
        nargs="+",
        default=[],
        choices=list(CASES),
        metavar="NAME",
        help=f"cases to run: {', '.join(CASES)}",
    )
    found.add_argument("--rounds", type=int, help="rounds to keep; each case has its own number")
    found.add_argument("--quick", action="store_true", help="one round of small sizes: a rehearsal")
    found.add_argument("--out", type=Path, default=Path("results/benchmarks"))
    found.add_argument("--threads", type=int, default=1)
    found.add_argument(
        "--model",
        nargs="+",
        default=["mid"],
        choices=["mid", *packaged_models()],
        help="of niah-sweep",
    )
    found.add_argument("--render", action="store_true", help="table and picture of what is there")
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, or only make table and figure again; print the table."""
    args = parser().parse_args(arguments)
    failed = []
    if not args.render:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that cases start
        torch.set_num_threads(args.threads)
        with tempfile.TemporaryDirectory() as scratch:
            options = Options(Path(scratch), args.rounds, args.quick, tuple(args.model))
            failed = run(args.out, options, args.only)
    try:
        print(render(args.out))
    except ValueError as error:
        sys.exit(str(error))
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
