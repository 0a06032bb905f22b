"""Results of the papers, and the same figures from a table, for comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import pandas as pd

WORKSHOP = "Zani, Michalak & Abreu, SLLM workshop 2025"
THESIS = "Michalak, bachelor thesis 2025"
ARTICLE = "Michalak & Abreu, arXiv 2510.19861"

Measure = Literal["k=0", "k=2", "tipping k", "all heads", "15% of heads", "by k", "setting"]


@dataclass(frozen=True)
class Published:
    """One published result.

    `measure` names the corresponding figure of a table; `stage` and `read_twice` select its cells:
    the stage in which heads are zeroed, and whether the context is given twice. "setting" is the
    accuracy of the setting named `setting`.
    """

    what: str
    model: str
    value: str
    source: str
    measure: Measure
    stage: Literal["generation", "both"] = "generation"
    read_twice: bool = False
    setting: str = ""


_2B, _9B, _JAMBA = "RecurrentGemma-2B", "RecurrentGemma-9B", "Jamba-Mini-1.6"
_FIGURE_3_2 = f"{THESIS}, Figure 3.2"
_NO_HEAD = "accuracy without any head (k = 0), generation only"
_TIPPING = "tipping point: smallest k that still retrieves, generation only"
_ALL = "accuracy with all heads"
_CURVE, _CURVE_BOTH = "accuracy by k, generation only", "accuracy by k, prefill and generation"
_TWICE_0 = "Just Read Twice without any head (k = 0), generation only"
_TWICE_2 = "Just Read Twice with two heads (k = 2), generation only"
_FIGURE_4_1 = f"{THESIS}, Figure 4.1"
_2B_BOTH = "falls below 20% almost at once as heads are taken away"
_9B_BOTH = "the same dip, deeper; drops sharply after k = 3"
_JAMBA_BY_K = "100% down to k = 27, declines slowly to k = 6, then drops"
_JAMBA_BOTH = "about 5 points above generation only until k = 6, drops harder after"
_FEW = "accuracy with 15% of the heads, generation only"

PUBLISHED: tuple[Published, ...] = (
    Published(_NO_HEAD, _2B, "0%", _FIGURE_3_2, "k=0"),
    Published(_NO_HEAD, _9B, "0%", _FIGURE_3_2, "k=0"),
    Published(_NO_HEAD, _JAMBA, "about 3% at most", _FIGURE_3_2, "k=0"),
    Published(_TIPPING, _2B, "1 of 10", _FIGURE_3_2, "tipping k"),
    Published(_TIPPING, _9B, "2 of 16", _FIGURE_3_2, "tipping k"),
    Published(_TIPPING, _JAMBA, "4 of 32", _FIGURE_3_2, "tipping k"),
    Published(_ALL, _2B, "50.3%", f"{THESIS}, Table 6.1 (keep, keep)", "all heads"),
    Published(_ALL, _JAMBA, "100%", _FIGURE_3_2, "all heads"),
    Published("accuracy at k = 2", _2B, "about that of all 10", f"{WORKSHOP}, Figure 1", "k=2"),
    Published(_FEW, "see the source", "near perfect", ARTICLE, "15% of heads"),
    Published(_CURVE, _2B, "rises steadily as k falls from 10 to 1", _FIGURE_3_2, "by k"),
    Published(_CURVE, _9B, "dips between k = 16 and k = 3", _FIGURE_3_2, "by k"),
    Published(_CURVE, _JAMBA, _JAMBA_BY_K, _FIGURE_3_2, "by k"),
    Published(_CURVE_BOTH, _2B, _2B_BOTH, _FIGURE_3_2, "by k", "both"),
    Published(_CURVE_BOTH, _9B, _9B_BOTH, _FIGURE_3_2, "by k", "both"),
    Published(_CURVE_BOTH, _JAMBA, _JAMBA_BOTH, _FIGURE_3_2, "by k", "both"),
    Published(_TWICE_0, "all three", "recovers nothing", _FIGURE_4_1, "k=0", read_twice=True),
    Published(_TWICE_2, _2B, "worse than once", _FIGURE_4_1, "k=2", read_twice=True),
    Published(_TWICE_2, _9B, "recovers a little", _FIGURE_4_1, "k=2", read_twice=True),
    Published(_TWICE_2, _JAMBA, "recovers a little", _FIGURE_4_1, "k=2", read_twice=True),
)

_TABLE_6_1 = {
    "keep": (50.3, 3.7, 85.7, 3.7),
    "omit": (63.0, 0.0, 53.0, 0.0),
    "only": (70.6, 0.1, 18.2, 0.1),
    "binary": (0.0, 0.0, 0.0, 0.0),
    "null": (68.8, 0.0, 17.0, 0.0),
}
WEIGHTS: tuple[Published, ...] = tuple(
    Published(
        f"weights on the needle: {prefill} in prefill, {generation} in generation",
        _2B,
        f"{value}%",
        f"{THESIS}, Table 6.1",
        "setting",
        setting=f"{prefill}-{generation}",
    )
    for prefill, values in _TABLE_6_1.items()
    for generation, value in zip(("keep", "omit", "only", "binary"), values, strict=True)
)
READ_TWICE: tuple[Published, ...] = tuple(
    entry for entry in PUBLISHED if entry.read_twice or entry.measure in ("k=0", "k=2")
)

NOT_RUN = "not run"


def ours(entry: Published, table: pd.DataFrame) -> str:
    """Return our figure for a published one as text, or that it was not run.

    The tipping point is the smallest k with at least half of the stage's best accuracy.
    """
    if entry.measure == "setting":
        accuracy = table.loc[table["setting"] == entry.setting, "accuracy"].mean()
        return NOT_RUN if accuracy != accuracy else f"{accuracy:.1%}"
    chosen = table["k"].notna() & (table["stage"] == entry.stage) & table["accuracy"].notna()
    cells = table[chosen & (table["read_twice"].astype(bool) == entry.read_twice)]
    by_k = {int(k): float(a) for k, a in cells.groupby("k")["accuracy"].mean().items()}
    return _MEASURES[entry.measure](by_k) if by_k else NOT_RUN


def _at(k: int) -> Callable[[Mapping[int, float]], str]:
    return lambda by_k: f"{by_k[k]:.1%} at k = {k}" if k in by_k else NOT_RUN


def _all_heads(by_k: Mapping[int, float]) -> str:
    most = max(by_k)
    return f"{by_k[most]:.1%} at k = {most}, the largest run"


def _few_heads(by_k: Mapping[int, float]) -> str:
    most = max(by_k)
    k = ceil(0.15 * most)
    return f"{by_k[k]:.1%} at k = {k} of {most}" if k in by_k and k < most else NOT_RUN


def _tipping(by_k: Mapping[int, float]) -> str:
    best = max(by_k.values())
    if len(by_k) < 2:
        return NOT_RUN
    if best < 0.05:
        return "none: below 5% at every k"
    k = min(k for k, accuracy in by_k.items() if accuracy >= best / 2)
    return f"{k} of {max(by_k)}" + (" or fewer" if k == min(by_k) and k > 0 else "")


_MEASURES: dict[Measure, Callable[[Mapping[int, float]], str]] = {
    "k=0": _at(0),
    "k=2": _at(2),
    "tipping k": _tipping,
    "all heads": _all_heads,
    "15% of heads": _few_heads,
    "by k": lambda _: "see the curves",
}
