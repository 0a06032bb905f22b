"""Recall against the share of attention layers: untested, as it needs other models."""

from __future__ import annotations

import pandas as pd

from experiments.beside.frame import Bench, Experiment, Finding


def run(bench: Bench) -> Finding:  # noqa: ARG001
    """Return an untested finding: two packaged models of different sizes are no comparison."""
    return Finding(
        "cannot say",
        "untested: it needs models that differ in the share of attention alone",
        pd.DataFrame({"setting": [], "accuracy": []}),
    )


EXPERIMENT = Experiment(
    "of 72 hybrids, recall rises with the share of attention; 3 to 6 recurrent layers an attention "
    "layer are recommended",
    "arXiv 2507.06457",
    run,
)
