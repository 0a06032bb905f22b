"""How well attribution patching agrees with patching, by kind of hook: docs/attribution_ranks.md.

    python -m experiments.attribution_ranks docs/attribution_ranks.md [--cells 40]

Each packaged model reads a prompt with a needle, and one with another needle about the same city,
up to where the two answers differ. The metric is the difference of the two words' logits.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from experiments.benchmarks.machine import commit_and_day
from experiments.pages.writing import block
from hooked_hybrid import HookedHybrid
from hooked_hybrid.analysis import Agreement, compare_with_patching
from hooked_hybrid.niah.needles import PAPER, draw_needle
from hooked_hybrid.niah.prompts import build_prompt
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.presets.packaged import packaged_models

LENGTH, DEPTH = 128, 0.5
COMMAND = "python -m experiments.attribution_ranks docs/attribution_ranks.md"
MENDED = ("q", "k", "rot_q", "rot_k", "attn_scores")
HEAD = f"""# Attribution patching against true patching

Of each kind of hook point, half the cells have the largest attributions, half are drawn at random;
a cell is a position, or a position of one head, of one layer. Spearman's correlation is of what the
metric changes by, by gradient and truly; "error" is their mean distance over the mean effect. One
prompt of {LENGTH} tokens a model, float64: differences below about 0.1 are noise. Written by
`python -m experiments.attribution_ranks`.
"""


def swapped_needle(model: HookedHybrid) -> tuple[Tensor, Tensor, Callable[[Tensor], Tensor]]:
    """Return two prompts [1 pos] up to where their answers differ, and the metric of the two words.

    Raises:
        ValueError: no needle of as many tokens was drawn.
    """
    paper = build_prompt(model, PAPER, LENGTH, DEPTH)
    drawn = (draw_needle(random.Random(seed), PAPER.city) for seed in range(100))
    others = (build_prompt(model, needle, LENGTH, DEPTH) for needle in drawn)
    other = next((o for o in others if o.needle_spans == paper.needle_spans), None)
    if other is None:
        raise ValueError("no drawn needle has as many tokens as the paper's")
    pair = torch.tensor([paper.tokens, other.tokens])
    start, parts = paper.needle_spans[0][0], int((pair[0] != pair[1]).nonzero()[0])
    right, wrong = (int(token) for token in pair[:, parts])
    clean, corrupted = torch.cat([pair, pair[:, start:parts]], dim=1)[:, None]
    return clean, corrupted, lambda logits: logits[:, -1, right] - logits[:, -1, wrong]


def compared(name: str, n_cells: int) -> tuple[Agreement, Agreement]:
    """Return the comparison of a packaged model, without and with the exact softmax."""
    model = HookedHybrid.from_pretrained(name, dtype=torch.float64).requires_grad_(False)
    clean, corrupted, metric = swapped_needle(model)
    names = [n for n, p in model.hook_dict.items() if not (p.is_integer or n.endswith("_input"))]
    mended = [n for n in names if n.rsplit("hook_", 1)[1] in MENDED]
    both = clean, corrupted, metric
    plain = compare_with_patching(model, *both, names, n_cells=n_cells)
    return plain, compare_with_patching(model, *both, mended, n_cells=n_cells, qk_fix=True)


def main() -> None:
    """Compare on each packaged model and write the page."""
    parser = argparse.ArgumentParser("experiments.attribution_ranks", description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--cells", type=int, default=40, help="of each kind")
    args = parser.parse_args()
    page = [HEAD]
    for name in packaged_models():
        plain, mended = compared(name, args.cells)
        blocks = {name: plain, f"{name}-exact": mended}
        marks = [
            block(what, f"{table}", COMMAND, commit_and_day()) for what, table in blocks.items()
        ]
        page += [f"## {name}\n", f"{marks[0]}\n"]
        page += ["With the softmax taken exactly (`qk_fix`):\n", f"{marks[1]}\n"]
    with replacing(args.out) as temporary:
        temporary.write_text("\n".join(page), encoding="utf-8")
    print("\n".join(page))


if __name__ == "__main__":
    main()
