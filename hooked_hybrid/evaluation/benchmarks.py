"""The language benchmarks of the papers, as data: their runs and results."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from hooked_hybrid.niah.report.published import THESIS


@dataclass(frozen=True)
class Gap:
    """Distance of a form below the base form, in points of the benchmark's score (0 to 100)."""

    points: float
    is_rounded: bool = False

    def __str__(self) -> str:
        return f"about {self.points:.0f}" if self.is_rounded else f"{self.points:.1f}"


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a paper.

    Args:
        name: in the paper.
        figure: of the paper: over all, and by subtask.
        tasks: lm-eval's names.
        num_fewshot: examples before each question.
        chat: whether prompts are conversations in the model's chat template.
        multiturn: whether each example is a separate turn.
        forms: names in `forms.FORMS`, the base first.
        stage: the stages with zeroed heads; log-likelihoods are scored in prefill.
        mean: how the subtasks are averaged: "documents" gives each question the same weight, as
            lm-eval does where its group is configured so; "tasks" gives it to each task.
        model: the paper's.
        gaps: base minus form, by form.
        source: the paper.
    """

    name: str
    figure: str
    tasks: tuple[str, ...]
    num_fewshot: int
    mean: Literal["documents", "tasks"]
    gaps: Mapping[str, Gap]
    chat: bool = True
    multiturn: bool = True
    forms: tuple[str, ...] = ("base", "sparse", "ablated")
    stage: Literal["both", "generation"] = "both"
    model: str = "Jamba-Mini-1.6"
    source: str = THESIS


BENCHMARKS: dict[str, Benchmark] = {
    "glue": Benchmark(
        name="GLUE",
        figure="Figures 5.1 and C.1",
        tasks=("glue",),
        num_fewshot=0,
        mean="tasks",
        gaps={"sparse": Gap(9.1), "ablated": Gap(6.6)},
    ),
    "mmlu": Benchmark(
        name="MMLU",
        figure="Figures 5.1 and C.2",
        tasks=("mmlu",),
        num_fewshot=5,
        mean="documents",
        gaps={"sparse": Gap(6.0), "ablated": Gap(42.0, is_rounded=True)},
    ),
}
"""By the name for `--tasks`. The thesis does not state how it averaged the tasks of GLUE, whose
scores are accuracies except CoLA's correlation; here each has the same weight.
"""
