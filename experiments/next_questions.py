"""The control of `docs/next_questions.md`: weights that follow ordinary text.

    python -m experiments.next_questions --control tiny-griffin [--page docs/next_questions.md]

The weights follow a stretch of the haystack instead of the needle. (The page's other tables are of
`hooked-hybrid cached-state` and `hooked-hybrid weights --follow`, see `experiments.pages`.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch

from experiments.benchmarks.machine import commit_and_day
from experiments.pages.writing import filled
from hooked_hybrid import HookedHybrid
from hooked_hybrid.interventions import follow_span
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import Haystack, grid
from hooked_hybrid.niah.settings.papers import FOLLOW_MODES
from hooked_hybrid.outputs.folders import replacing
from hooked_hybrid.runs.intervals import SHARE, mean_interval

LENGTH, N_NEEDLES = 160, 8


@torch.no_grad()
def control(name: str) -> str:
    """Return a table of the share of a stretch of text that is written when the weights follow it.

    The stretch is as long as the needle and ends where the needle begins, each in its own haystack;
    hooks act in generation, as in the matrix. One row is without hooks.
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
    """Print the table, or write it into a page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--control", action="append", required=True, help="tiny-griffin")
    parser.add_argument("--page", type=Path, help="that has a block for them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tables = "\n".join(control(name) for name in args.control).rstrip()
    print(tables)
    if args.page is not None:
        ran = " ".join(f"--control {name}" for name in args.control)
        command = f"python -m experiments.next_questions {ran} --page {args.page}"
        text = args.page.read_text(encoding="utf-8")
        new = filled(text, "control", tables, command, commit_and_day())
        with replacing(args.page) as temporary:
            temporary.write_text(new, encoding="utf-8")


if __name__ == "__main__":
    main()
