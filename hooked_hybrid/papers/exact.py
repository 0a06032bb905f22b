"""Items without weights: the score on its own phrases, parameters and compute from configs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hooked_hybrid.accounting.configs import PUBLISHED
from hooked_hybrid.accounting.flops import flops_table, prefill_flops, recurrence_over_attention
from hooked_hybrid.accounting.parameters import count_parameters
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.scores import FULL, graded
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.papers.claims import Finding
from hooked_hybrid.papers.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONFIG_2B = PUBLISHED["recurrentgemma-2b"]
TABLE_1 = {
    "MLP": 1_534_008_320,
    "recurrent block": 377_994_240,
    "RG-LRU": 23_731_200,
    "attention": 115_363_840,
    "norms": 135_680,
}
"""Parameters of RecurrentGemma-2B by kind of layer; the RG-LRU is inside its block's row."""
TABLE_2_1 = (
    ("eat a sandwich", 1.0),
    ("Dolores Park", 0.5),
    ("sit in Dolores Park", 0.5),
    ("sunny day", 1.0),
    ("is to eat a sandwich and sit in Dolores Park on a sunny day", 4.0),
    (PAPER.sentence, 5.0),
)
"""Phrases and the points that each adds; the last two set the score."""
EXAMPLES = (
    ("Nothing of the kind.", 0.0),
    ("You should eat a sandwich.", 1.0),
    ("Go to Dolores Park.", 0.5),
    ("You can sit in Dolores Park.", 1.0),
    ("Go out on a sunny day!", 1.0),
    ("Sit in Dolores Park on sunny days.", 2.0),
    ("Eat a sandwich and sit in Dolores Park on a sunny day.", 3.0),
    ("The best thing is to eat a sandwich and sit in Dolores Park on a sunny day.", 4.0),
    (PAPER.sentence, 5.0),
    ("What is the best thing to do in San Francisco?", 0.0),
)
"""Answers, and their score by the table's rules: "sit in Dolores Park" contains "Dolores Park"."""
LENGTHS = (256, 512, 1024, 2048, 4096, 8192)
"""Prompt lengths, in tokens, at which compute is compared."""
SUBJECT_SCORE, SUBJECT_CONFIG = "the score", "the published config"


def score_of_examples(evidence: Evidence) -> Finding:  # noqa: ARG001
    """Find whether every example has its score by the thesis's rules."""
    wrong = [text for text, score in EXAMPLES if graded(text, PAPER) != score]
    right = f"{len(EXAMPLES) - len(wrong)} of {len(EXAMPLES)} answers scored as written"
    return Finding(not wrong, right + (f"; not {wrong}" if wrong else ""))


def score_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:  # noqa: ARG001
    """Return every phrase of Table 2.1 and the examples, with the expected score and ours."""
    phrases = [
        ["phrase", text, _adds(text, points), f"{graded(text, PAPER):g}"]
        for text, points in TABLE_2_1
    ]
    answers = [
        ["answer", text, f"{score:g}", f"{graded(text, PAPER):g}"] for text, score in EXAMPLES
    ]
    return ["", "text", "published", "our score of this text"], phrases + answers


def _adds(text: str, points: float) -> str:
    if points >= FULL - 1:
        return f"sets {points:g}"
    inside = " (and the 0.5 of the phrase inside it)" if text.startswith("sit") else ""
    return f"+{points:g}{inside}"


def counts_equal(evidence: Evidence) -> Finding:  # noqa: ARG001
    """Find whether the parameters counted from the published config equal those published."""
    counted = count_parameters(CONFIG_2B)
    wrong = [kind for kind, n in TABLE_1.items() if counted.of(kind) != n]
    said = f"{len(TABLE_1) - len(wrong)} of {len(TABLE_1)} rows equal to the last parameter"
    return Finding(not wrong, said + (f"; not {', '.join(wrong)}" if wrong else ""))


def attention_is_small(evidence: Evidence) -> Finding:
    """Find the share of attention in RecurrentGemma-2B; this model's share is shown too."""
    counted, own = count_parameters(CONFIG_2B), count_parameters(evidence.cfg)
    share = counted.of("attention") / counted.without_embeddings
    mine = own.of("attention") / own.without_embeddings
    note = f"{evidence.name}: {100 * mine:.1f}%"
    return Finding(0.05 <= share <= 0.065, f"{100 * share:.1f}%, embeddings left out", note)


def parameter_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:
    """Return parameters by kind of layer: published, ours of the 2B's config, this model's."""
    counted, own = count_parameters(CONFIG_2B), count_parameters(evidence.cfg)
    kinds = list(dict.fromkeys([*TABLE_1, *(row.kind for row in own.rows)]))
    rows = [
        [
            kind,
            f"{TABLE_1[kind]:,}" if kind in TABLE_1 else "",
            f"{counted.of(kind):,}",
            f"{own.of(kind):,}",
        ]
        for kind in kinds
    ]
    return ["kind of layer", "published", "RecurrentGemma-2B's config", evidence.name], rows


def attention_bends(evidence: Evidence) -> Finding:  # noqa: ARG001
    """Find whether attention's compute grows as a square up to the window and linearly after.

    Measured is the part that grows faster than linearly: operations at twice a length minus twice
    those at the length. For every other kind it is at most a hundredth of the whole.
    """

    def bend(kind: str, length: int) -> float:
        once, double = (
            prefill_flops(CONFIG_2B, n, n_logits=None)[kind].total for n in (length, 2 * length)
        )
        return (double - 2 * once) / once

    window = 2048
    below, above = bend("attention", window // 2), bend("attention", 4 * window)
    kinds = [kind for kind in prefill_flops(CONFIG_2B, window, n_logits=None)]
    others = max(abs(bend(k, n)) for k in kinds if k != "attention" for n in (1024, 4096))
    holds = below > 0.05 and abs(above) < below / 2 and others < 0.01
    ours = (
        f"doubling 1,024 tokens costs {100 * below:.1f}% more than twice, doubling 8,192 "
        f"{100 * above:.1f}%; any other kind {100 * others:.2g}% at most"
    )
    return Finding(holds, ours)


def block_costs_three_times(evidence: Evidence) -> Finding:  # noqa: ARG001
    """Find whether one recurrent block costs more than 3 times an attention block, in prefill."""
    ratios = [recurrence_over_attention(CONFIG_2B, length) for length in LENGTHS]
    blocks, layers = [r.a_layer for r in ratios], [r.all_layers for r in ratios]
    spans = f"{LENGTHS[0]} to {LENGTHS[-1]:,} tokens"
    ours = f"block by block {min(blocks):.2f} to {max(blocks):.2f} times, {spans}"
    note = (
        f"all 18 recurrent blocks over all 8 attention blocks: {min(layers):.2f} to "
        f"{max(layers):.2f} times"
    )
    return Finding(min(blocks) > 3, ours, note)


def compute_rows(evidence: Evidence) -> tuple[list[str], list[list[str]]]:  # noqa: ARG001
    """Return the operations of a prompt by kind of layer, and the ratios of blocks, by length."""
    table = flops_table(CONFIG_2B, LENGTHS)
    prefill = table[table["stage"] == "prefill"].pivot(
        index="kind", columns="length", values="total"
    )
    rows = [
        [str(kind), *(f"{value / 1e9:,.1f}" for value in values)]
        for kind, values in zip(prefill.index, prefill.to_numpy(), strict=True)
    ]
    ratios = [recurrence_over_attention(CONFIG_2B, length) for length in LENGTHS]
    rows.append(["recurrent / attention, all layers", *(f"{r.all_layers:.2f}" for r in ratios)])
    rows.append(["recurrent / attention, a block", *(f"{r.a_layer:.2f}" for r in ratios)])
    return ["GFLOP of a prompt of so many tokens", *(f"{n:,}" for n in LENGTHS)], rows


def compute_figure(evidence: Evidence) -> Figure:  # noqa: ARG001
    """Return Figure 2 of the published config: operations by kind of layer, total and per token."""
    table = flops_table(CONFIG_2B, range(256, 8193, 256), n_logits=None)
    figure = new_figure(10.4, 4.4)
    whole, each = figure.subplots(1, 2)
    for kind, marker in (
        ("MLP", "o"),
        ("recurrent block", "s"),
        ("attention", "^"),
        ("norms", "x"),
    ):
        own = table[(table["stage"] == "prefill") & (table["kind"] == kind)]
        layers = int(own["layers"].iloc[0])
        named = {"marker": marker, "ms": 3, "label": f"{kind} ({layers})"}
        whole.plot(own["length"], own["total"] / 1e12, **named)
        if kind in ("recurrent block", "attention"):
            colour = whole.lines[-1].get_color()
            a_token = own["total"] / own["length"] / layers / 1e6
            each.plot(own["length"], a_token, **{**named, "color": colour})
    whole.set(title="all layers of a kind", ylabel="10^12 floating-point operations")
    each.set(title="one block, by prompt token", ylabel="10^6 floating-point operations")
    each.set_ylim(bottom=0)
    for axes in (whole, each):
        axes.axvline(2048, color="black", linestyle=":", linewidth=1, label="attention window")
        axes.set_xlabel("prompt length (tokens)")
        axes.grid(alpha=0.3)
    legend = whole.get_legend_handles_labels()
    figure.legend(*legend, loc="outside lower center", ncols=5, frameon=False, fontsize=9)
    return figure
