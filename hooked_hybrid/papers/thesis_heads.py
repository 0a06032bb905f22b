"""Of Michalak's thesis (2025): the score, accuracy by heads kept, and the second reading."""

from __future__ import annotations

from hooked_hybrid.papers import exact, figures
from hooked_hybrid.papers.checks import (
    above,
    as_good,
    at_most,
    below,
    both_hold,
    cells_at,
    tips_at,
    without_heads,
)
from hooked_hybrid.papers.claims import ALL, JAMBA, RG_2B, RG_9B, Claim, Item
from hooked_hybrid.papers.evidence import Evidence
from hooked_hybrid.papers.needle_checks import empty_maps
from hooked_hybrid.papers.shares import FEW, few_heads

_NO_HEAD = (
    "RecurrentGemma 0 to 2% with Google's convention for the first token; Jamba 0 to 5%, for there "
    "the first new token still comes from the unhurt prefill."
)
_TIES = "In bfloat16 a tenth of the choices of heads are ties, so a step of one k may differ."
_BOTH = (
    "The same in order; the size is less sure, for scores computed in bfloat16 differ between "
    "programs in every one of some thousand prompt tokens."
)


SCORE = Item(
    name="Table 2.1",
    shows="The graded score: which phrases of the needle count how much.",
    claims=(
        Claim(
            "Each phrase adds its points once, the whole answer sets 4 and the needle 5.",
            ALL,
            "+1.0, +0.5, +0.5, +1.0; 4.0; 5.0",
            "A definition, the same for every model. The authors' released code gives a point for "
            "an echo of the question too (`niah.scores.released`); this page does not.",
            exact.score_of_examples,
            subject=exact.SUBJECT_SCORE,
        ),
    ),
    rows=exact.score_rows,
)
BY_K = Item(
    name="Figure 3.2",
    shows="Accuracy by heads kept, silenced in generation alone and in prefill too; three models.",
    claims=(
        Claim(
            "Without any head nothing is retrieved (generation only): at most 5%.",
            ALL,
            "0% (2B, 9B), about 3% at most (Jamba)",
            _NO_HEAD,
            without_heads(),
        ),
        Claim(
            "Retrieval tips at k = 1 of 10 heads, generation only.",
            RG_2B,
            "1 of 10",
            f"1, or 2. {_TIES}",
            tips_at(1, 10),
        ),
        Claim(
            "Retrieval tips at k = 2 of 16 heads, generation only.",
            RG_9B,
            "2 of 16",
            f"2, or 1 to 3. {_TIES}",
            tips_at(2, 16),
        ),
        Claim(
            "Retrieval tips at k = 4 of 32 heads, generation only.",
            JAMBA,
            "4 of 32",
            f"4, or 3 to 6. {_TIES}",
            tips_at(4, 32),
        ),
        Claim(
            "In generation only, accuracy rises as k falls from 10 to 1.",
            RG_2B,
            "rises steadily",
            "Rises, from about a half: the published 50% with all heads is a failure of the whole "
            "model that fewer heads lessen.",
            above(cells_at(1, 10), cells_at(10, 10), what="k = 1 against 10 of 10: "),
        ),
        Claim(
            "With prefill too, accuracy is below 20% almost at once (at k = 8 and 6 of 10).",
            RG_2B,
            "below 20% almost at once",
            _BOTH,
            below([8, 6], 10, "both", 0.2),
        ),
        Claim(
            "In generation only, accuracy dips between k = 16 and 3 of 16 (mean of 5 to 12 below "
            "both ends).",
            RG_9B,
            "dips",
            "Dips, by less than where prefill is sparsified as well.",
            both_hold(
                above(cells_at(16, 16), cells_at(range(5, 13), 16), what="16 against 5 to 12: "),
                above(cells_at(3, 16), cells_at(range(5, 13), 16), what="3 against 5 to 12: "),
            ),
        ),
        Claim(
            "The dip is deeper with prefill too (mean of k = 5 to 12 of 16, where that dips).",
            RG_9B,
            "deeper",
            _BOTH,
            both_hold(
                above(cells_at(3, 16, "both"), cells_at(range(5, 13), 16, "both")),
                above(cells_at(range(5, 13), 16), cells_at(range(5, 13), 16, "both")),
            ),
        ),
        Claim(
            "27 of 32 heads do as well as all (at most 5 points less), 6 retrieve less than 27, 3 "
            "less than 6; generation only.",
            JAMBA,
            "100% down to k = 27, declines slowly to k = 6, then drops",
            "Holds.",
            both_hold(
                as_good(27, 32, lacking=0.05),
                above(cells_at(27, 32), cells_at(6, 32), what="27 against 6: "),
                above(cells_at(6, 32), cells_at(3, 32), what="6 against 3: "),
            ),
        ),
        Claim(
            "With prefill too, accuracy is above generation only from k = 6 to 26 of 32.",
            JAMBA,
            "about 5 points above",
            f"Some points above. {_BOTH}",
            above(cells_at(range(6, 27), 32, "both"), cells_at(range(6, 27), 32)),
        ),
        Claim(
            "Below k = 6 of 32 it drops harder with prefill too (mean of k = 2 to 5).",
            JAMBA,
            "drops harder",
            _BOTH,
            above(cells_at(range(2, 6), 32), cells_at(range(2, 6), 32, "both")),
        ),
    ),
    runs=("top-k",),
    draw=figures.curves,
    controls=("text", "layers", "heads"),
)
TWICE = Item(
    name="Figure 4.1",
    shows="Just Read Twice: context and question once more before the answer, at few heads.",
    claims=(
        Claim(
            "Without any head a second reading recovers nothing (at most 5%).",
            ALL,
            "recovers nothing",
            _NO_HEAD,
            without_heads("top-k-twice"),
        ),
        Claim(
            "At k = 2 of 16 a second reading recovers a little, generation only.",
            RG_9B,
            "a little",
            "Recovers some where the second copy of the needle is inside the window.",
            above(cells_at(2, 16, run="top-k-twice"), cells_at(2, 16)),
        ),
        Claim(
            "At k = 2 of 32 a second reading recovers a little, generation only.",
            JAMBA,
            "a little",
            "Recovers a little: below the tipping point a second copy gives the few heads left "
            "another chance.",
            above(cells_at(2, 32, run="top-k-twice"), cells_at(2, 32)),
        ),
        Claim(
            "At k = 2 of 10 a second reading makes it worse, generation only.",
            RG_2B,
            "worse",
            "Worse at equal length of the prompt in all, by an amount that depends on whether "
            "prompts of equal length or of equal context are compared; here of equal length.",
            above(cells_at(2, 10), cells_at(2, 10, run="top-k-twice")),
        ),
    ),
    runs=("top-k", "top-k-twice"),
    draw=figures.once_and_twice,
    rows=figures.rows_of_k(lambda e: [*few_heads(e.n_heads), e.n_heads], ("top-k", "top-k-twice")),
    controls=("text",),
    note="A prompt's length counts both copies, so that the context of a prompt read twice is half "
    "as long.",
)


def _first_maps(evidence: Evidence) -> list[str]:
    return [evidence.k_setting(0)]


MAPS = Item(
    name="Figures B.1 to B.3",
    shows="Retrieval maps at k = 0, 1 and 2, context once and twice, of each of the three models.",
    claims=(
        Claim(
            "At k = 0 no length and depth retrieves, context once or twice (at most 20% each).",
            ALL,
            "empty maps",
            _NO_HEAD,
            both_hold(
                empty_maps("top-k", _first_maps, what="once: "),
                empty_maps("top-k-twice", _first_maps, what="twice: "),
            ),
        ),
        Claim(
            "One head of ten retrieves already about as well as all (at most 10 points less).",
            RG_2B,
            "k = 1 retrieves",
            "Holds.",
            as_good(1, 10),
        ),
        Claim(
            "Two heads of sixteen retrieve and one does not (k = 2 above k = 1 by 10 points).",
            RG_9B,
            "k = 2 retrieves, k = 1 less",
            f"Holds. {_TIES}",
            above(cells_at(2, 16), cells_at(1, 16), by=0.1),
        ),
        Claim(
            "Two heads of thirty-two retrieve less than half of the score.",
            JAMBA,
            "below the tipping point of 4",
            "Holds.",
            at_most("top-k", lambda e: [e.k_setting(e.scaled(2, 32))], 0.5),
        ),
    ),
    runs=("top-k", "top-k-twice"),
    draw=figures.maps_once_and_twice(FEW),
    rows=figures.rows_of_k(lambda _: FEW, ("top-k", "top-k-twice"), ("generation",)),
    controls=("text",),
    note="The figures carry no numbers in the text; the claims are our reading of them.",
)
