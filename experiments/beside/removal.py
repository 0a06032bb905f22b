"""Removing all recurrences, or all attention: the factor on the perplexity of text."""

from __future__ import annotations

import numpy as np

from experiments.beside.frame import Bench, Experiment, Finding, verdict
from hooked_hybrid.niah.settings.papers import layer_settings
from hooked_hybrid.runs.verdicts import all_of, apart, judge

NEEDED = 1.5
"""Factor on perplexity from which a kind of layer counts as needed for text."""


def run(bench: Bench) -> Finding:
    """Silence each kind of mixer, and each layer alone."""
    settings = [s for s in layer_settings(bench.model.cfg) if s.name != "no MLP"]
    table = bench.measure(settings)
    for end in ("", "_low", "_high"):
        table[f"ratio{end}"] = np.exp(table[f"more{end}"])
    of = table.set_index("setting")
    (recurrence,) = [n for n in of.index[1:] if not n[-1].isdigit() and n != "no attention"]
    said = {
        name: f"{of.loc[name, 'ratio']:.2f} times [{of.loc[name, 'ratio_low']:.2f}, "
        f"{of.loc[name, 'ratio_high']:.2f}], retrieval {of.loc[name, 'accuracy']:.0%}"
        for name in (recurrence, "no attention")
    }
    ours = "; ".join(f"{name}: perplexity {words}" for name, words in said.items())
    ends = [tuple(of.loc[n, ["ratio_low", "ratio_high"]]) for n in (recurrence, "no attention")]
    word = all_of([apart(*ends), judge("above", *ends[1], NEEDED)])
    return Finding(verdict(word), ours, table)


EXPERIMENT = Experiment(
    "removing the recurrence multiplies perplexity by more than 35,000, removing attention by "
    "about 82 (Qwen3.5-0.8B, Falcon-H1-0.5B): both are needed, the recurrence most",
    "arXiv 2603.22473",
    run,
    "ratio",
    "perplexity of text, in multiples of the whole model's",
)
