"""Running benchmarks one after another; each figure is stored as soon as it is measured."""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch

from experiments.benchmarks import machine
from experiments.benchmarks.bars import rows
from experiments.benchmarks.cases import CASES, Case
from experiments.benchmarks.cases.transformerlens import NotInstalledError
from experiments.benchmarks.figures import Figures, Measurement, read_figures, write_figures
from experiments.benchmarks.options import Options
from experiments.benchmarks.plot import write_plot
from experiments.benchmarks.report import ratio_text, write_table


def run(
    out: Path, options: Options, only: Sequence[str] = (), cases: Mapping[str, Case] = CASES
) -> list[str]:
    """Run the named cases, or all, into a folder; figures of other cases are kept.

    Returns:
        The names of the cases that failed; their errors are printed on the standard error.

    Raises:
        ValueError: a name that is not a case.
    """
    if unknown := [name for name in only if name not in cases]:
        raise ValueError(f"no case {', '.join(unknown)}: there are {', '.join(cases)}")
    old = read_figures(out)
    speeds = {} if options.quick else machine.speeds()
    about = {**old.machine, **machine.described(), **speeds}
    write_figures(out, replace(old, machine=about))
    failed = []
    for name in only or cases:
        start = time.perf_counter()
        try:
            run_case(out, name, options, cases)
        except NotInstalledError as error:
            print(error, file=sys.stderr, flush=True)
        except Exception:  # the other cases still run
            traceback.print_exc()
            failed.append(name)
        print(f"{name}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
    return failed


def run_case(out: Path, name: str, options: Options, cases: Mapping[str, Case] = CASES) -> None:
    """Run one case and store each of its figures at once; drop those it no longer measures."""
    done = []
    with torch.no_grad():
        for measured in cases[name](options):
            figures = read_figures(out).with_one(replace(measured, about=machine.provenance()))
            write_figures(out, in_order(figures, cases))
            done.append(measured.what)
            say(measured)
    write_figures(out, read_figures(out).with_only(name, done))


def in_order(figures: Figures, cases: Mapping[str, Case]) -> Figures:
    """Return the figures by case, in the order of the cases; unknown ones last."""
    order = list(cases)

    def place(m: Measurement) -> int:
        return order.index(m.case) if m.case in order else len(order)

    return Figures(figures.machine, tuple(sorted(figures.measurements, key=place)))


def render(out: Path) -> str:
    """Make table and figure from the figures in a folder, and return the table.

    Raises:
        ValueError: the folder has no figures.
    """
    figures = read_figures(out)
    if not figures.measurements:
        raise ValueError(f"{out} contains no figures: run the benchmarks first")
    write_plot(out, figures)
    return write_table(out, figures)


def say(measured: Measurement) -> None:
    """Print a measurement on the standard error."""
    for row in rows(measured):
        verdict = f"  {row.verdict}" if row.verdict else ""
        text = f"{measured.case}, {measured.what}: {ratio_text(row, row.ratio)}"
        print(f"{text} {row.peer}{verdict}", file=sys.stderr, flush=True)
