"""Targets (bars) of the benchmarks, and verdicts on them."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from experiments.benchmarks.figures import OURS, Measurement

Verdict = Literal["stretch", "held", "missed", ""]

HF = "transformers"
GOOGLE = "recurrentgemma"
GEMM = "GEMM floor"
READ = "weights floor"
PLAIN = "plain forward"
STEP = "decode step"
COPY = "read and copy"
WEIGHTS = "weights and largest tensor"
SHORT = "at 512 tokens"
SDPA = "SDPA, full mask"
ALONE = ""
"""The peer of an amount that is not compared."""

FLOORS = {GEMM, READ, PLAIN, STEP, COPY, WEIGHTS, SHORT, ALONE}
"""Peers for which ours over theirs is shown (smaller is better), else theirs over ours."""

SLACK = 0.95
"""The share of a bar that must be reached for it to count as held."""


@dataclass(frozen=True)
class Bar:
    """The target of a ratio to `peer`, and a stretch target.

    Against a floor both are upper limits.
    """

    peer: str
    limit: float
    stretch: float | None = None


def _bars() -> dict[tuple[str, str], list[Bar]]:
    over, floor = (lambda *x: Bar(HF, *x)), (lambda *x: Bar(GEMM, *x))
    bars = {
        ("rg-prefill", "512 tokens"): [over(1.15, 1.25), Bar(GOOGLE, 1.2, 1.25)],
        ("rg-prefill", "4096 tokens"): [over(1.5, 1.65), Bar(GOOGLE, 3.3, 3.7), floor(1.3, 1.2)],
        ("jamba-prefill", "2048 tokens"): [over(1.6, 2.0), floor(1.5)],
        ("decode", "RG, one row"): [over(1.6, 1.9), Bar(GOOGLE, 1.6, 1.9)],
        ("decode", "RG, a row of 11"): [over(5, 7)],
        ("scan", "4096 x 512"): [over(10, 13)],
        ("scan", "4096 x 2560"): [over(3.2, 4.4)],
        ("mamba-scan", "8192 positions"): [over(12, 16)],
        ("mamba-scan", "scratch at 4096"): [Bar(ALONE, 16)],
        ("attention", "4096 tokens, window 1024"): [Bar(SDPA, 3, 3.5)],
        ("idle-hooks", "all idle points of a step"): [Bar(STEP, 0.01)],
        ("run-with-cache", "everything, warm"): [Bar(PLAIN, 1.15)],
        ("run-with-cache", "everything, first time"): [Bar(PLAIN, 1.35)],
        ("niah-sweep", "mid, 512 tokens, a cell"): [over(6)],
        ("niah-sweep", "mid, 4096 tokens, a cell"): [over(12, 20)],
        ("state-edit", "one position of 4096"): [Bar(PLAIN, 1.3, 1.1)],
        ("top-k", "2 of 4 heads, prefill of 4096"): [Bar(PLAIN, 1.3, 1.15)],
    }
    for n in (8192, 16384):
        bars["rg-prefill", f"{n} tokens, each"] = [Bar(SHORT, 1 / 0.9)]
    for n in (1024, 2048, 4096):
        bars["mamba-scan", f"{n} positions"] = [over(7, 8)]
        bars["memory", f"prefill of {n}"] = [Bar(ALONE, 100)]
    bars["memory", "prefill of 16384"] = [Bar(ALONE, 100)]
    for size in ("100 MB", "1 GB"):
        bars["loading", f"{size}, seconds"] = [Bar(COPY, 1.2, 1.05)]
        bars["loading", f"{size}, peak"] = [Bar(WEIGHTS, 1.0)]
    return bars


BARS = _bars()
"""By case and what; a comparison without one has no bar."""


@dataclass(frozen=True)
class Row:
    """One line of the table: ours against one peer, over all rounds."""

    measurement: Measurement
    peer: str
    ours: float
    theirs: float | None
    ratio: float
    low: float
    high: float
    bar: Bar | None

    @property
    def verdict(self) -> Verdict:
        """The verdict on the bar."""
        return "" if self.bar is None else verdict(self.ratio, self.bar)


def verdict(ratio: float, bar: Bar) -> Verdict:
    """Return "stretch", "held" or "missed"; only the bar has a tolerance."""
    is_most = bar.peer in FLOORS
    if bar.stretch is not None and (ratio <= bar.stretch if is_most else ratio >= bar.stretch):
        return "stretch"
    held = ratio <= bar.limit / SLACK if is_most else ratio >= SLACK * bar.limit
    return "held" if held else "missed"


def ratios(ours: Sequence[float], theirs: Sequence[float], peer: str) -> list[float]:
    """Return the ratio of each round: ours over theirs against a floor, else theirs over ours."""
    pairs = list(zip(ours, theirs, strict=True))
    return [a / b for a, b in pairs] if peer in FLOORS else [b / a for a, b in pairs]


def rows(measurement: Measurement) -> Iterator[Row]:
    """Yield a line for each peer of a measurement, or one for ours alone."""
    bars = {bar.peer: bar for bar in BARS.get((measurement.case, measurement.what), [])}
    ours = measurement.values[OURS]
    median = statistics.median(ours)
    peers = [name for name in measurement.values if name != OURS]
    if not peers or ALONE in bars:
        yield Row(measurement, ALONE, median, None, median, min(ours), max(ours), bars.get(ALONE))
    for peer in peers:
        theirs = measurement.values[peer]
        each = ratios(ours, theirs, peer)
        ratio, bar = statistics.median(each), bars.get(peer)
        their_median = statistics.median(theirs)
        yield Row(measurement, peer, median, their_median, ratio, min(each), max(each), bar)
