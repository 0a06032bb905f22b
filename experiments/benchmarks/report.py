"""The table of ratios, made from the measurements."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

from experiments.benchmarks.bars import ALONE, FLOORS, Bar, Row, rows
from experiments.benchmarks.cases.transformerlens import HOW
from experiments.benchmarks.figures import Figures, Measurement
from hooked_hybrid.outputs.whole_files import replacing

FILE = "table.md"
HEAD = """# Benchmarks

Each line compares the library with one peer, both measured in one process, round by round, in fp32
(the case bf16 aside).
Seconds are the processor's where one thread works, so that other programs on it do not count.
"x faster" is the peer's time over ours; "x the time" is ours over a floor's, the least that the
work could take. Ratios are medians of the rounds, with the smallest and largest. A bar counts as
held at 0.95 of it. Written by `python -m experiments.benchmarks`.
"""
COLUMNS = "| what | ours | peer | its | ratio | rounds | bar | stretch | |"


def table(figures: Figures) -> str:
    """Return the page."""
    parts = [HEAD, _machine(figures.machine)]
    for case, group in groupby(figures.measurements, key=lambda m: m.case):
        measurements = list(group)
        parts += [f"## {case}", "", COLUMNS, "|" + "---|" * (COLUMNS.count("|") - 1)]
        parts += [_line(row) for m in measurements for row in rows(m)]
        parts += ["", *_notes(measurements)]
    if not figures.of("transformerlens"):
        parts += ["## transformerlens", "", HOW, ""]
    return "\n".join([*parts, _summary(figures)])


def write_table(folder: Path, figures: Figures) -> str:
    """Write the page into a folder and return it."""
    page = table(figures)
    with replacing(folder / FILE) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return page


def _machine(machine: Mapping[str, Any]) -> str:
    lines = ["| machine | |", "|---|---|"]
    for key, value in machine.items():
        lines.append(
            f"| {key} | {value:.1f} |" if isinstance(value, float) else f"| {key} | {value} |"
        )
    return "\n".join([*lines, ""])


def _line(row: Row) -> str:
    bar, unit = row.bar, row.measurement.unit
    cells = [
        row.measurement.what,
        amount(row.ours, unit),
        row.peer or "alone",
        "" if row.theirs is None else amount(row.theirs, unit),
        ratio_text(row, row.ratio),
        f"{ratio_text(row, row.low, short=True)} - {ratio_text(row, row.high, short=True)}",
        "" if bar is None else limit_text(bar, bar.limit),
        "" if bar is None or bar.stretch is None else limit_text(bar, bar.stretch),
        row.verdict and f"**{row.verdict}**" if row.verdict == "missed" else row.verdict,
    ]
    return f"| {' | '.join(cells)} |"


def amount(value: float, unit: str) -> str:
    """Return an amount with three digits or more: 12.3 ms, 4.56 s, 78.9 MB, 1283 MB."""
    if unit != "s":
        return f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"
    for size, name in ((1, "s"), (1e-3, "ms")):
        if value >= size:
            return f"{value / size:.3g} {name}"
    return f"{value * 1e6:.3g} us"


def ratio_text(row: Row, ratio: float, short: bool = False) -> str:
    """Return a ratio in words, or the amount if there is nothing to compare with."""
    if row.peer == ALONE:
        return amount(ratio, row.measurement.unit)
    number = f"{ratio:.2f}" if ratio >= 0.1 else f"{ratio:.4f}"
    if short:
        return number
    return f"{number} x the {_kind(row)}" if row.peer in FLOORS else f"{number} x faster"


def _kind(row: Row) -> str:
    return "time" if row.measurement.unit == "s" else "memory"


def limit_text(bar: Bar, limit: float) -> str:
    """Return a bar as text: at most a multiple of a floor, or at least a factor over a peer."""
    return f"{'≤' if bar.peer in FLOORS else '≥'} {limit:.3g}"


def _notes(measurements: list[Measurement]) -> list[str]:
    by_note: dict[str, list[str]] = {}
    for m in measurements:
        about = f"{len(next(iter(m.values.values())))} rounds, {m.about.get('commit', '?')}"
        text = f"{m.note}; {about}" if m.note else about
        by_note.setdefault(text, []).append(m.what)
    return [*(f"- {', '.join(whats)}: {note}." for note, whats in by_note.items()), ""]


def _summary(figures: Figures) -> str:
    verdicts = [row.verdict for m in figures.measurements for row in rows(m) if row.verdict]
    counts = [f"{verdicts.count(v)} {v}" for v in ("stretch", "held", "missed")]
    return f"Bars: {', '.join(counts)}.\n"
