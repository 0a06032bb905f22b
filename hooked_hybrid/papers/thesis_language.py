"""Of Michalak's thesis (2025): language benchmarks with heads silenced."""

from __future__ import annotations

from hooked_hybrid.papers import language
from hooked_hybrid.papers.checks import POINT
from hooked_hybrid.papers.claims import JAMBA, Claim, Item

_GLUE_GAPS = (
    Claim(
        "GLUE, 0-shot: sparse (k = 5, prefill too) is within 10 points of base.",
        JAMBA,
        "9.1 points below base",
        "Within 10 points, if the chat template is that of the checkpoint.",
        language.gap("glue", "sparse", -10.0, 10.0),
        any_model=True,
    ),
    Claim(
        "GLUE, 0-shot: ablated (k = 0) is within 10 points of base.",
        JAMBA,
        "6.6 points below base",
        "Within 10 points.",
        language.gap("glue", "ablated", -10.0, 10.0),
        any_model=True,
    ),
)
_MMLU_GAPS = (
    Claim(
        "MMLU, 5-shot: sparse (k = 5, prefill too) is some points below base (1 to 11).",
        JAMBA,
        "6.0 points below base",
        "3 to 9 points below.",
        language.gap("mmlu", "sparse", 1.0, 11.0),
        any_model=True,
    ),
    Claim(
        "MMLU, 5-shot: ablated (k = 0) is far below base (30 points or more).",
        JAMBA,
        "about 42 points below base",
        "38 to 46 points below: five examples cannot be read without attention.",
        language.gap("mmlu", "ablated", 30.0, 100.0),
        any_model=True,
    ),
)
LANGUAGE = Item(
    name="Figure 5.1",
    shows="GLUE and MMLU with all heads, with five and with none, of Jamba-Mini.",
    claims=(
        *_GLUE_GAPS,
        Claim(
            "GLUE: sparse is below ablated (by a point or more).",
            JAMBA,
            "2.5 points below",
            "Not sure: the difference is small beside the spread over subtasks.",
            language.gap("glue", "sparse", 100 * POINT, 100.0, under="ablated"),
            any_model=True,
        ),
        *_MMLU_GAPS,
        Claim(
            "MMLU: the ablated model is near chance (within 5 points of choosing by lot).",
            JAMBA,
            "near chance",
            "Near chance.",
            language.near_chance("mmlu", "ablated", 5.0),
            any_model=True,
        ),
    ),
    suites=(
        "glue",
        "mmlu",
    ),
    draw=language.bars_of("glue", "mmlu"),
    rows=language.rows_of("glue", "mmlu"),
)
GLUE = Item(
    name="Figure C.1",
    shows="GLUE by subtask with all heads, with five and with none, of Jamba-Mini.",
    claims=_GLUE_GAPS,
    suites=("glue",),
    draw=language.bars_of("glue"),
    rows=language.rows_of("glue"),
    note="The subtasks' values are not in the text; the claims are those of their mean.",
)
MMLU = Item(
    name="Figure C.2",
    shows="MMLU by subtask with all heads, with five and with none, of Jamba-Mini.",
    claims=_MMLU_GAPS,
    suites=("mmlu",),
    draw=language.bars_of("mmlu"),
    rows=language.rows_of("mmlu"),
    note="The subtasks' values are not in the text; the claims are those of their mean.",
)
