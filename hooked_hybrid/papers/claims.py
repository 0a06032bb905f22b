"""Claims of the papers, findings on them, and the words of verdicts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.papers.evidence import Untested
from hooked_hybrid.presets.packaged import packaged_models

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from hooked_hybrid.papers.evidence import Evidence

Paper = Literal["sllm2025", "thesis2025"]
TITLES: dict[Paper, str] = {
    "sllm2025": "Zani, Michalak & Abreu, SLLM workshop 2025",
    "thesis2025": "Michalak, bachelor thesis 2025",
}
RG_2B, RG_9B, JAMBA = "RecurrentGemma-2B", "RecurrentGemma-9B", "Jamba-Mini-1.6"
ALL = "all three models"
_KIND = {RG_2B: "rglru", RG_9B: "rglru", JAMBA: "mamba"}
"""The kind of recurrence of each model."""
_SHAPE = {RG_2B: (26, 2560), RG_9B: (38, 4096), JAMBA: (32, 4096)}
"""Layers and width of the published models."""
_HUB = {
    "google/recurrentgemma-2b": RG_2B,
    "google/recurrentgemma-9b": RG_9B,
    "ai21labs/AI21-Jamba-Mini-1.6": JAMBA,
}
"""Hub ids of the published checkpoints; no other checkpoint is called by a model's name."""
TOO_LITTLE = "run with --quick: too little to conclude from"


class Verdict(Enum):
    """The result of a run for a claim: one of three."""

    SHOWN = "shows it"
    NOT_SHOWN = "does not show it"
    UNTESTED = "untested on real weights"


class Finding(NamedTuple):
    """The result of a check: whether the claim holds, our value as text, and a note.

    `holds` is None if nothing could be tested; then `ours` is the reason. A claim holds only if the
    95% bound is on the claimed side.
    """

    holds: bool | None
    ours: str
    note: str = ""


Check = Callable[["Evidence"], Finding]


@dataclass(frozen=True)
class Claim:
    """One sentence of the papers that a table of ours can test.

    Args:
        text: the claim.
        about: the model that the claim is about, one of the three, or `ALL`.
        published: the value, as published.
        prediction: what is expected of the published weights run with this code, and why; written
            before anyone ran them.
        check: turns our tables into a finding.
        any_model: whether models with other recurrences are tested too.
        subject: of the check, if it is not the model: a published config, a score.
    """

    text: str
    about: str
    published: str
    prediction: str
    check: Check
    any_model: bool = False
    subject: str = ""


@dataclass(frozen=True)
class Item:
    """One table or figure of a paper.

    Args:
        name: as the paper calls it.
        shows: what is in it, in a sentence.
        claims: our reading of it.
        runs: sweeps in `papers.runs.RUNS` that it needs.
        suites: benchmarks of `evaluation.benchmarks` that it needs.
        draw: makes our figure, or None if nothing could be run; None if ours is a table.
        rows: makes our table, a heading and rows; None for the accuracies of the picture's cells.
        controls: names in `papers.controls.CONTROLS` of the controls of the claims.
        note: on the comparison.
    """

    name: str
    shows: str
    claims: tuple[Claim, ...]
    runs: tuple[str, ...] = ()
    suites: tuple[str, ...] = ()
    draw: Callable[[Evidence], Figure | None] | None = None
    rows: Callable[[Evidence], tuple[list[str], list[list[str]]]] | None = None
    controls: tuple[str, ...] = ()
    note: str = ""


def shape_of(cfg: HybridConfig) -> str | None:
    """Return the published model that has this shape: its recurrence, layers and width."""
    mixers = {mixer_of(of).kind for layer in cfg.layers for of in layer.mixers}
    for published, shape in _SHAPE.items():
        if shape == (cfg.n_layers, cfg.d_model) and _KIND[published] in mixers:
            return published
    return None


def subject_of(name: str, cfg: HybridConfig) -> str:
    """Return a model's name in verdicts: a published model's own name only for that checkpoint.

    It is recognized by its hub id. Shape does not identify weights: another checkpoint, a folder or
    a finetuned one, is "a model of RecurrentGemma-2B's shape".
    """
    if name in packaged_models():
        return "the packaged model"
    published = shape_of(cfg)
    if published is None:
        return "this model"
    is_theirs = _HUB.get(name) == published and not Path(name).exists()
    return published if is_theirs else f"a model of {published}'s shape"


def applies(claim: Claim, cfg: HybridConfig) -> bool:
    """Whether a claim can be tested on a model.

    A model with a published model's shape is tested on that model's claims only; any other on those
    about models with its kind of recurrence, and those about any model.
    """
    if claim.about == ALL or claim.subject:
        return True
    if published := shape_of(cfg):
        return claim.about == published
    kinds = {mixer_of(of).kind for layer in cfg.layers for of in layer.mixers}
    return claim.any_model or _KIND[claim.about] in kinds


def run_check(check: Check, evidence: Evidence) -> Finding:
    """Return the finding of a check; untested, with the reason, if its runs are missing."""
    try:
        return check(evidence)
    except Untested as reason:
        return Finding(None, str(reason))


def judge(claim: Claim, evidence: Evidence) -> tuple[Verdict, Finding]:
    """Return the verdict on a claim, and its finding.

    With as few prompts as `recipe.QUICK`'s, only claims that need no prompts are judged.
    """
    if not applies(claim, evidence.cfg):
        return Verdict.UNTESTED, Finding(None, f"a claim about {claim.about} alone")
    finding = run_check(claim.check, evidence)
    if evidence.recipe.is_quick and not claim.subject:
        return Verdict.UNTESTED, Finding(None, finding.ours, TOO_LITTLE)
    if finding.holds is None:
        return Verdict.UNTESTED, finding
    return (Verdict.SHOWN if finding.holds else Verdict.NOT_SHOWN), finding


def together(verdicts: Sequence[Verdict]) -> Verdict:
    """Return the verdict on an item: shown if every tested claim is."""
    tested = [v for v in verdicts if v is not Verdict.UNTESTED]
    if not tested:
        return Verdict.UNTESTED
    return Verdict.SHOWN if set(tested) == {Verdict.SHOWN} else Verdict.NOT_SHOWN


def show_verdict(verdict: Verdict, subject: str) -> str:
    """Return a verdict in words: "the packaged model shows it"."""
    return verdict.value if verdict is Verdict.UNTESTED else f"{subject} {verdict.value}"
