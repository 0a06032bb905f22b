"""The measurements, in one JSON file that is written atomically."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from hooked_hybrid.outputs.whole_files import replacing

FILE = "figures.json"
OURS = "hooked_hybrid"


@dataclass(frozen=True)
class Measurement:
    """One measurement, of this library and its peers.

    Attributes:
        case: name of the benchmark it belongs to.
        what: unique in the case.
        values: one a round, by implementation; `OURS` is this library.
        unit: of the values: "s" for seconds, "MB" for megabytes.
        length: tokens of the prompt, for the plot; None if there is none.
        note: a remark for readers.
        about: date, commit and versions; the harness fills it in.
    """

    case: str
    what: str
    values: Mapping[str, Sequence[float]]
    unit: str = "s"
    length: int | None = None
    note: str = ""
    about: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Figures:
    """Everything in the file: the machine, and all measurements."""

    machine: Mapping[str, Any] = field(default_factory=dict)
    measurements: tuple[Measurement, ...] = ()

    def with_one(self, new: Measurement) -> Figures:
        """Return the figures with a measurement added or replaced."""
        old = self.measurements
        at = [i for i, m in enumerate(old) if (m.case, m.what) == (new.case, new.what)]
        if at:
            return Figures(self.machine, (*old[: at[0]], new, *old[at[0] + 1 :]))
        return Figures(self.machine, (*old, new))

    def with_only(self, case: str, whats: Iterable[str]) -> Figures:
        """Return the figures without the measurements that a case no longer makes."""
        wanted = set(whats)
        kept = tuple(m for m in self.measurements if m.case != case or m.what in wanted)
        return Figures(self.machine, kept)

    def of(self, case: str) -> list[Measurement]:
        """Return the measurements of one case."""
        return [m for m in self.measurements if m.case == case]


def read_figures(folder: Path) -> Figures:
    """Return the figures in a folder; empty if there is no file."""
    path = folder / FILE
    if not path.exists():
        return Figures()
    held = json.loads(path.read_text(encoding="utf-8"))
    return Figures(held["machine"], tuple(Measurement(**m) for m in held["measurements"]))


def write_figures(folder: Path, figures: Figures) -> None:
    """Replace the file of a folder."""
    with replacing(folder / FILE) as temporary:
        temporary.write_text(json.dumps(asdict(figures), indent=1) + "\n", encoding="utf-8")
