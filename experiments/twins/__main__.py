"""Train the twins, compare them at each checkpoint, draw figures.

    python -m experiments.twins --out results/twins [--images docs/images]

Twelve models of 33,000 parameters, under a minute of one core each to train and half as long to
compare. A stopped run continues where it was. The figures of the page are stored by

    python -m experiments.pages keep twins results/twins/pages --command "..." --commit ...
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from experiments.twins.compare import table
from experiments.twins.figures import draw_all, summary
from experiments.twins.models import TWINS, TwinsPlan, train_one
from experiments.twins.pages import settings
from hooked_hybrid.outputs.whole_files import replacing


def main() -> None:
    """Train, compare, draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--images", type=Path, help="where figures go in addition to --out")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan = TwinsPlan(seeds=tuple(range(args.seeds)))
    for seed in plan.seeds:
        for name in TWINS:
            train_one(args.out, plan, name, seed)
    found = table(args.out, plan)
    with replacing(args.out / "table.csv") as temporary:
        found.to_csv(temporary, index=False)
    with replacing(args.out / "summary.csv") as temporary:
        summary(found).to_csv(temporary, index=False)
    (args.out / "pages").mkdir(exist_ok=True)
    with replacing(args.out / "pages" / "table.csv") as temporary:
        settings(found).to_csv(temporary, index=False)
    draw_all(found, args.out, args.images)
    print(summary(found).to_string(index=False))


if __name__ == "__main__":
    main()
