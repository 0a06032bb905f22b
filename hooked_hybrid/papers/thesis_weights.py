"""Of Michalak's thesis (2025): attention weights on the needle, changed by stage."""

from __future__ import annotations

from hooked_hybrid.niah.report.published import WEIGHTS
from hooked_hybrid.papers import figures
from hooked_hybrid.papers.checks import above, at_most, both_hold, cells_of
from hooked_hybrid.papers.claims import RG_2B, Claim, Item
from hooked_hybrid.papers.evidence import Evidence
from hooked_hybrid.papers.needle_checks import (
    complement,
    empty_maps,
    left_beyond_window,
    setting_values,
)

PUBLISHED_WEIGHTS = {entry.setting: entry.value for entry in WEIGHTS}
"""Table 6.1, accuracies of RecurrentGemma-2B by "prefill-generation"."""
_PREFILLS = ("keep", "omit", "only", "binary", "null")
_MODES = (
    "The program behind these numbers is not public; this code follows the thesis's description "
    "(no renormalisation, needle tokens found anew in each prompt), so that the order of cells is "
    "surer than their size."
)


def _ending(modes: tuple[str, ...]) -> list[str]:
    return [f"{prefill}-{mode}" for prefill in _PREFILLS for mode in modes]


def _table_6_1(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    return setting_values(evidence.tables["weights"], PUBLISHED_WEIGHTS)


def _binary(evidence: Evidence) -> list[str]:  # noqa: ARG001
    return [*_ending(("binary",)), *(f"binary-{mode}" for mode in ("keep", "only"))]


WEIGHT_TABLE = Item(
    name="Table 6.1",
    shows="Accuracy by what is done to the attention weights on the needle, in prefill and in "
    "generation (prefill-generation).",
    claims=(
        Claim(
            "Omitting the needle's weights in generation ends retrieval, whatever prefill did (at "
            "most 5%).",
            RG_2B,
            "3.7, 0.0, 0.1, 0.0, 0.0%",
            f"0 to 6%, the most with prefill kept (needles beyond the window). {_MODES}",
            at_most("weights", lambda _: _ending(("omit",)), 0.05),
            any_model=True,
        ),
        Claim(
            "Binary weights on the needle end retrieval, in either stage (at most 5%), where only-"
            "weights do not (keep-only above keep-binary by 10 points or more).",
            RG_2B,
            "3.7, 0.0, 0.1, 0.0, 0.0% in generation, 0.0% in prefill; keep-only 85.7%",
            f"0 to 6%. {_MODES}",
            both_hold(
                at_most("weights", _binary, 0.05),
                above(
                    cells_of("keep-only"), cells_of("keep-binary"), by=0.1, what="only, binary: "
                ),
            ),
            any_model=True,
        ),
        Claim(
            "Attending to nothing but the needle in generation helps (keep-only above keep-keep).",
            RG_2B,
            "85.7% against 50.3%",
            f"Above, by 15 points or more. {_MODES}",
            above(cells_of("keep-only"), cells_of("keep-keep")),
            any_model=True,
        ),
        Claim(
            "Prefill without the needle's weights, with these alone, or without any, costs nothing "
            "where generation keeps all (at most 5 points).",
            RG_2B,
            "63.0, 70.6 and 68.8% against 50.3%",
            f"Costs nothing, and helps by 5 to 25 points. {_MODES}",
            both_hold(
                *(
                    above(
                        cells_of(f"{prefill}-keep"),
                        cells_of("keep-keep"),
                        by=-0.05,
                        what=f"{prefill}-keep ",
                    )
                    for prefill in ("omit", "only", "null")
                )
            ),
            any_model=True,
        ),
        Claim(
            "Some stage must see the context: with the needle alone in both, or no prefill "
            "attention, only-generation retrieves far less than keep-only (10 points or more).",
            RG_2B,
            "18.2 and 17.0% against 85.7%",
            f"Far less. {_MODES}",
            both_hold(
                *(
                    above(
                        cells_of("keep-only"),
                        cells_of(f"{prefill}-only"),
                        by=0.1,
                        what=f"against {prefill}-only ",
                    )
                    for prefill in ("only", "null")
                )
            ),
            any_model=True,
        ),
    ),
    runs=("weights",),
    draw=figures.matrix,
    rows=_table_6_1,
    controls=("elsewhere",),
)
COMPLEMENT = Item(
    name="Figure 6.2",
    shows="Maps with the needle omitted in prefill alone and in generation alone, beside neither.",
    claims=(
        Claim(
            "With the needle omitted in generation (keep-omit), what is still retrieved has its "
            "needle beyond the window (more than 5% there, at most 5% inside).",
            RG_2B,
            "3.7%, all beyond the window",
            "A few percent, beyond the window alone. The thesis says that prefill has no window; "
            "the code it ran has one in both stages, as this one, so the needle has to be relayed.",
            left_beyond_window("keep-omit"),
            any_model=True,
        ),
        Claim(
            "Where the whole model retrieves, just one of the two omissions does (neither and both "
            "at most 5%).",
            RG_2B,
            "the maps complement each other (63.0% and 3.7%, keep-keep 50.3%)",
            "Holds roughly; the published means do not add up, for omitting in prefill helps.",
            complement("omit-keep", "keep-omit", "keep-keep"),
            any_model=True,
        ),
    ),
    runs=("weights",),
    draw=figures.maps_of_weights(("keep-keep", "omit-keep", "keep-omit")),
    controls=("elsewhere",),
    note="Names here are prefill-generation; the thesis writes generation-prefill.",
)


ALL_MAPS = Item(
    name="Figure D.1",
    shows="Retrieval maps of all weight manipulations, laid out as Table 6.1.",
    claims=(
        Claim(
            "Where Table 6.1 says 0.1% or less, no length and depth retrieves (at most 20%).",
            RG_2B,
            "0.0 to 0.1% in ten cells",
            f"Empty maps. {_MODES}",
            empty_maps(
                "weights",
                lambda _: [
                    name for name, value in PUBLISHED_WEIGHTS.items() if float(value[:-1]) <= 0.1
                ],
            ),
            any_model=True,
        ),
    ),
    runs=("weights",),
    draw=figures.maps_of_weights(),
    controls=("elsewhere",),
)
