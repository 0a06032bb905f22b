"""Tables of `docs/next_questions.md` from finished folders, and a control that runs here.

    python -m experiments.next_questions FOLDER [FOLDER ...] [--control tiny-griffin]

A folder is one that `hooked-hybrid cached-state` or `hooked-hybrid weights --follow` wrote. The
control makes the weights follow ordinary text instead of the needle.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from experiments.findings import accuracy
from hooked_hybrid import HookedHybrid
from hooked_hybrid.intervals import SHARE, mean_interval
from hooked_hybrid.interventions import follow_span
from hooked_hybrid.niah.experiments import FOLLOW_MODES
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import Haystack, grid
from hooked_hybrid.niah.statistics import scored

LENGTH, N_NEEDLES = 160, 8


def table_of(folder: Path) -> str:
    """Return accuracies in percent with intervals, needles inside the window: [kind, k or stage].

    Settings are "prefill-generation" or "case k=K"; what stands before is a row, after it a column.
    """
    cells = scored(pd.read_csv(folder / "table.csv"))
    cells = cells[cells["in_window"].astype(bool)]
    split = cells["setting"].str.extract(r"^(?:(?P<case>.+) k=(?P<k>\d+)|(?P<a>\w+)-(?P<b>.+))$")
    row = split["case"].fillna(split["a"]).fillna(cells["setting"])
    column = split["k"].radd("k = ").fillna(split["b"]).fillna("")
    rows, columns = row.unique(), [c for c in column.unique() if c]
    lines = [f"| | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name in rows:
        mine = [cells[(row == name) & column.isin([c, ""])] for c in columns]
        lines.append(f"| {name} | {' | '.join(accuracy(part) for part in mine)} |")
    n, needles = cells["prompt_id"].nunique(), cells["needle_id"].nunique()
    return f"{folder.name}: {n} prompts of {needles} needles.\n\n" + "\n".join(lines) + "\n"


@torch.no_grad()
def control(name: str) -> str:
    """Return how much of a stretch of ordinary text is written when the weights follow it.

    The stretch is as long as the needle and ends where the needle begins, each in a haystack of its
    own; hooks act in generation, as in the matrix. Beside it, how much of it is written without.
    """
    model = HookedHybrid.from_pretrained(name).requires_grad_(False)
    needles = [PAPER, *held_out_needles()][:N_NEEDLES]
    prompts = [
        grid(model, [needle], [LENGTH], [0.6], Haystack(seed))[0]
        for seed, needle in enumerate(needles)
    ]
    rows = []
    for prompt in prompts:
        start, stop = prompt.needle_spans[0]
        begin = start - (stop - start)
        tokens = torch.tensor([prompt.tokens])
        stretch = tokens[0, begin:start]
        for mode, options in {"no hooks": None, **FOLLOW_MODES}.items():
            hooks = []
            if options is not None:
                hooks = follow_span((begin, start), prompt.length - 1, **options)
            out = model.generate(
                tokens, len(stretch), generation_hooks=hooks, stop_at_eos=False,
                return_type="output", verbose=False,
            )  # fmt: skip
            same = (out.new_tokens[0] == stretch).float().mean()
            rows.append((mode, prompt.needle_id, float(same)))
    table = pd.DataFrame(rows, columns=["mode", "needle_id", "same"])
    lines = ["| in generation | share of the stretch written |", "|---|---|"]
    for mode, part in table.groupby("mode", sort=False):
        low, high = mean_interval(part["same"], part["needle_id"], SHARE)
        mean = part["same"].mean()
        lines.append(f"| {mode} | {100 * mean:.1f} [{100 * low:.1f}, {100 * high:.1f}] |")
    return f"{name}: {len(prompts)} prompts.\n\n" + "\n".join(lines) + "\n"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folders", type=Path, nargs="*")
    parser.add_argument("--control", action="append", default=[], help="tiny-griffin")
    args = parser.parse_args()
    torch.set_num_threads(1)
    for folder in args.folders:
        print(table_of(folder))
    for name in args.control:
        print(control(name))


if __name__ == "__main__":
    main()
