"""Disabling one head at a time, and labelling gather and aggregate heads by their patterns.

A gather head attends from a segment's last token (here of the needle's sentence) to the segment; an
aggregate head attends from the answer to such last tokens.
"""

from __future__ import annotations

import pandas as pd
import torch

from experiments.beside.frame import Bench, Experiment, Finding, harms, spares
from hooked_hybrid.analysis.watching import no_totals
from hooked_hybrid.niah.settings.papers import head_settings

LABEL = 0.5
"""Share of a head's weight from which it has a label."""


def is_pattern(name: str) -> bool:
    """Whether a hook is on attention's weights."""
    return name.endswith(".attn.hook_pattern")


def roles(bench: Bench) -> pd.DataFrame:
    """Return the mean weight of every head on four places, for prompts with their answer.

    "gather": from the needle's last token to the rest of its sentence; "before": from there to as
    many tokens before the sentence, a control. "aggregate": from where tokens of the answer are
    chosen, all but the last, to the needle's last token; "copy": from there to the token of the
    needle that is to be written.
    """
    kinds = ("gather", "before", "aggregate", "copy")
    totals = {kind: no_totals(bench.model) for kind in kinds}
    prompts = bench.prompts()
    for prompt in prompts:
        (start, stop), last = prompt.needle_spans[0], prompt.length - 1
        tokens = torch.tensor([[*prompt.tokens, *prompt.tokens[start : stop - 1]]])
        _, cache = bench.model.run_with_cache(tokens, names_filter=is_pattern, return_type=None)
        n, end = stop - 1 - start, stop - 1
        answer = torch.arange(n)
        for layer in bench.model.cfg.attention_layers:
            mine = cache["pattern", layer][0]
            totals["gather"][layer] += mine[:, end, start:end].sum(-1)
            totals["before"][layer] += mine[:, end, max(0, start - n) : start].sum(-1)
            totals["aggregate"][layer] += mine[:, last + answer, end].mean(-1)
            totals["copy"][layer] += mine[:, last + answer, start + answer].mean(-1)
    heads = [(layer, h) for layer, t in totals["copy"].items() for h in range(len(t))]
    rows = {k: [float(totals[k][i][h]) / len(prompts) for i, h in heads] for k in kinds}
    return pd.DataFrame({"setting": [f"no head {i}.{h}" for i, h in heads], **rows})


def run(bench: Bench) -> Finding:
    """Disable every head alone, and label it."""
    table = bench.measure(head_settings(bench.model.cfg)).merge(roles(bench), how="left")
    heads = table.iloc[1:]
    worst = heads.loc[heads["accuracy"].idxmin()]
    base = table["accuracy"].iloc[0]
    falls, holds = harms(heads, base).any(), spares(heads, base).all()
    is_gather = (heads["gather"] >= LABEL) & (heads["gather"] >= 2 * heads["before"])
    labels = {
        "gather": int(is_gather.sum()),
        "aggregate": int((heads["aggregate"] >= LABEL).sum()),
        "copy": int((heads["copy"] >= LABEL).sum()),
    }
    ours = (
        f"without its most needed head ({worst['setting'].split()[-1]}) retrieval goes from "
        f"{100 * base:.1f} to {100 * worst['accuracy']:.1f}% and text loss by "
        f"{worst['more']:+.3f} nats; of {len(heads)} heads "
        + ", ".join(f"{n} {kind}" for kind, n in labels.items())
        + f" (largest weights {heads['gather'].max():.2f}, {heads['aggregate'].max():.2f}, "
        f"{heads['copy'].max():.2f})"
    )
    if falls:
        return Finding("shows it", ours, table)
    return Finding("does not show it" if holds else "cannot say", ours, table)


EXPERIMENT = Experiment(
    "disabling a single gather or aggregate head takes MMLU from 66 to 25% (a pruned "
    "Llama-3.1-8B); in hybrids, attention takes the part of the aggregate heads",
    "arXiv 2504.18574",
    run,
)
