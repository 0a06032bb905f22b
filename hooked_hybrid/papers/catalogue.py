"""The written list: every table and figure of the two papers, with claims and predictions.

The predictions were written before this code was run on published weights.
"""

from __future__ import annotations

from collections.abc import Sequence

from hooked_hybrid.papers import sllm2025
from hooked_hybrid.papers.claims import Item, Paper
from hooked_hybrid.papers.controls import CONTROLS
from hooked_hybrid.papers.evidence import MANY
from hooked_hybrid.papers.thesis_heads import BY_K, MAPS, SCORE, TWICE
from hooked_hybrid.papers.thesis_language import GLUE, LANGUAGE, MMLU
from hooked_hybrid.papers.thesis_weights import ALL_MAPS, COMPLEMENT, WEIGHT_TABLE

CATALOGUE: dict[Paper, tuple[Item, ...]] = {
    "sllm2025": sllm2025.ITEMS,
    "thesis2025": (
        SCORE,
        BY_K,
        TWICE,
        LANGUAGE,
        WEIGHT_TABLE,
        COMPLEMENT,
        MAPS,
        GLUE,
        MMLU,
        ALL_MAPS,
    ),
}


def items_of(paper: Paper, only: Sequence[str] = ()) -> list[Item]:
    """Return the tables and figures of a paper, or only those named.

    Case, spaces and dots in names are ignored: "figure-32" is "Figure 3.2".

    Raises:
        ValueError: the paper has no item of a name.
    """
    items = CATALOGUE[paper]
    known = {_plain(item.name): item for item in items}
    if unknown := [name for name in only if _plain(name) not in known]:
        names = ", ".join(item.name for item in items)
        raise ValueError(f"--only {', '.join(unknown)}: {paper} has {names}")
    wanted = {_plain(name) for name in only}
    return [item for item in items if not wanted or _plain(item.name) in wanted]


def runs_of(item: Item) -> list[str]:
    """Return the sweeps that an item needs, with those over every needle and of its controls."""
    many = (MANY[run] for run in item.runs if run in MANY)
    controls = (run for name in item.controls for run in CONTROLS[name].runs)
    return list(dict.fromkeys([*item.runs, *many, *controls]))


def _plain(name: str) -> str:
    return "".join(c for c in name.lower() if c.isalnum())
