"""Kill a command at random instants, resume it, and compare its tables with an undisturbed run's.

    python -m experiments.under_fire.kills --kills 300
    python -m experiments.under_fire.kills --kills 50 -- cached-state --model tiny-griffin --k 4

The command runs in forks of this process, which has loaded model and libraries once, so that each
run is short; it is killed with SIGKILL. Some kills come at any instant of a run, most just after a
transaction's journal appears on the disk, the others just after the writing of a file begins. After
each one a copy of the stores is checked: stored cells must still exist, and a prompt must have all
of its cells or none. At the end of each sweep its tables (without times) and its figures must equal
those of the undisturbed run, byte for byte, and no other file may be left.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import os
import random
import shutil
import signal
import sqlite3
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

import torch

from hooked_hybrid.commands.program import build_app
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.outputs.figures import new_figure
from hooked_hybrid.outputs.folders import LOCK

LENGTHS = [str(n) for length in range(100, 220, 5) for n in ("--lengths", length)]
COMMAND = (
    "niah --model tiny-griffin --k 0 --k 4 --stages generation --depths 0.2 --depths 0.9 "
    "--max-new-tokens 2"
).split() + LENGTHS
"""48 prompts under two settings, in 24 transactions."""
TIMES = {"seconds"}
"""Columns that may differ."""
WAYS = {"at any instant": 4, "in a transaction": 13, "in a file": 3}
"""Ways to choose the instant, and how many of twenty kills are of each."""
LONGEST_LIFE = 600.0
Kept = dict[tuple[str, str], int]
"""Cells by file and prompt."""


@dataclass
class Counts:
    """Counts: kills by way and by phase of the run, and files left behind."""

    ways: Counter[str] = field(default_factory=Counter)
    landed: Counter[str] = field(default_factory=Counter)
    left: Counter[str] = field(default_factory=Counter)
    sweeps: int = 0
    cells: int = 0


class Life:
    """One run of the command, in a fork."""

    def __init__(self, words: list[str], folder: Path) -> None:
        self.folder, self.log = folder, folder.with_suffix(".log")
        self.pid = os.fork()
        if not self.pid:
            _run([*words, "--out", str(folder), "--resume"], self.log)

    def ended(self) -> bool:
        """Return whether it ended by itself; raise an error if it failed."""
        pid, status = os.waitpid(self.pid, os.WNOHANG)
        if pid and status:
            raise SystemExit(f"the run ended with {status}:\n{self.log.read_text()}")
        return bool(pid)

    def kill(self) -> None:
        """Kill it, and wait until it is gone."""
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)


def _run(words: list[str], log: Path) -> None:
    """Run the command and end the process."""
    code = 1
    try:
        sink = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(sink, 1)
        os.dup2(sink, 2)
        sys.argv = ["hooked-hybrid", *words]
        build_app()(words)
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def live(words: list[str], folder: Path, is_time: Callable[[], bool], pause: float) -> bool:
    """Run the command; return whether it was killed, `pause` seconds after `is_time` was true."""
    life, end = Life(words, folder), time.monotonic() + LONGEST_LIFE
    while not life.ended():
        if is_time():
            time.sleep(pause)
            if life.ended():
                return False
            life.kill()
            return True
        if time.monotonic() > end:
            life.kill()
            raise SystemExit(f"the run hangs:\n{life.log.read_text()}")
        time.sleep(0.0005)
    return False


def instant(rng: random.Random, way: str, folder: Path, longest: float) -> tuple[Callable, float]:
    """Return a function that tells when to kill, and the seconds to wait then."""
    if way == "at any instant":
        end = time.monotonic() + rng.uniform(0, longest)
        return lambda: time.monotonic() > end, 0.0
    ending = "-journal" if way == "in a transaction" else ".tmp"
    to_pass, there = rng.randrange(8), set[Path]()

    def is_time() -> bool:
        nonlocal to_pass, there
        now = {*folder.glob(f"*{ending}"), *folder.glob(f"*/.*{ending}")}
        to_pass, there = to_pass - len(now - there), now
        return to_pass < 0

    return is_time, rng.uniform(0, 0.003)


def kept_in(folder: Path, stray: Counter[str] | None = None) -> Kept:
    """Return the cells of each prompt in a folder, from copies of its stores.

    A journal that is left is copied too, and rolled back there, as in the next run.

    Args:
        folder: of a run, killed or not.
        stray: to which the files left by a kill are added.
    """
    found: Kept = {}
    for path in folder.rglob("*.sqlite") if folder.is_dir() else ():
        with tempfile.TemporaryDirectory() as scratch:
            copy = Path(shutil.copy(path, scratch))
            journal = path.with_name(f"{path.name}-journal")
            if journal.exists():
                shutil.copy(journal, scratch)
            connection = sqlite3.connect(copy)
            (said,) = connection.execute("PRAGMA integrity_check").fetchone()
            if said != "ok":
                raise SystemExit(f"{path} is torn: {said}")
            query = "SELECT prompt_id, count(*) FROM cells GROUP BY prompt_id"
            name = str(path.relative_to(folder))
            found |= {(name, prompt): n for prompt, n in connection.execute(query)}
            connection.close()
    for path in folder.glob("**/cells/[!.]*.json"):
        json.loads(path.read_text())
        found[str(path.relative_to(folder)), ""] = 1
    if stray is not None:
        names = [path.name for path in folder.rglob("*")] if folder.is_dir() else []
        stray["a journal"] += any(name.endswith("-journal") for name in names)
        stray["an unfinished file"] += any(name.endswith(".tmp") for name in names)
        stray["a lock file"] += LOCK in names
    return found


def landed(kept: Kept, whole: Kept, folder: Path) -> str:
    """Return the phase of a run when it was killed."""
    if not any(path.is_file() for path in folder.rglob("[!.]*")):
        return "before the first file"
    return "in the sweep" if kept != whole else "in tables and pictures"


def files_of(folder: Path) -> dict[str, bytes | None]:
    """Return the content that must be equal: tables without times, figures, and all names."""
    found: dict[str, bytes | None] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        content = path.read_bytes() if path.suffix in (".csv", ".png", ".pdf") else None
        found[str(path.relative_to(folder))] = (
            _without_times(path.read_text()) if path.suffix == ".csv" else content
        )
    return found


def _without_times(text: str) -> bytes:
    rows = list(csv.reader(io.StringIO(text, newline="")))
    places = [i for i, name in enumerate(rows[0]) if name not in TIMES]
    out = io.StringIO(newline="")
    csv.writer(out).writerows([row[i] for i in places] for row in rows)
    return out.getvalue().encode()


def disturb(words: list[str], n_kills: int, place: Path, counts: Counts, seed: int = 0) -> None:
    """Kill and resume the command until it was killed `n_kills` times; finish each sweep.

    Args:
        words: of the command, without --out and --resume.
        n_kills: number of kills.
        place: an empty folder, for one of each sweep, which is removed once found equal.
        counts: to which the results are added.
        seed: of the instants.

    Raises:
        SystemExit: a cell was lost, doubled or torn, or the results differ.
    """
    rng, begun = random.Random(seed), time.monotonic()
    if live(words, place / "undisturbed", lambda: False, 0):
        raise AssertionError
    longest, whole = time.monotonic() - begun, kept_in(place / "undisturbed")
    wanted, counts.cells = files_of(place / "undisturbed"), sum(whole.values())
    while sum(counts.ways.values()) < n_kills:
        folder, before = place / str(counts.sweeps), Kept()
        while True:
            (way,) = rng.choices(list(WAYS), list(WAYS.values()))
            is_enough = sum(counts.ways.values()) >= n_kills
            when = (lambda: False, 0.0) if is_enough else instant(rng, way, folder, longest)
            if not live(words, folder, *when):
                break
            kept = kept_in(folder, counts.left)
            _compare_kept(before, kept, whole, folder)
            counts.ways[way] += 1
            counts.landed[landed(kept, whole, folder)] += 1
            before = kept
            said = f"\r{sum(counts.ways.values())} kills, {counts.sweeps} sweeps"
            print(said, end="", file=sys.stderr, flush=True)
        found = files_of(folder)
        if different := [n for n in {**found, **wanted} if found.get(n, "") != wanted.get(n, "")]:
            raise SystemExit(f"{folder} differs from the undisturbed run: {different}")
        shutil.rmtree(folder)
        counts.sweeps += 1


def _compare_kept(before: Kept, now: Kept, whole: Kept, folder: Path) -> None:
    if not before.keys() <= now.keys():
        raise SystemExit(f"{folder} has lost {before.keys() - now.keys()}")
    if wrong := {key: n for key, n in now.items() if whole.get(key) != n}:
        raise SystemExit(f"{folder} holds torn or doubled prompts: {wrong}")


def main() -> None:
    """Kill a command and print the counts as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("command", nargs="*", help="after --; the default is a small niah")
    given = parser.parse_args()
    words, begun = given.command or COMMAND, time.monotonic()
    torch.set_num_threads(1)  # no threads before a fork: a thread pool would not survive it
    name = words[words.index("--model") + 1] if "--model" in words else "tiny-griffin"
    model = HookedHybrid.from_pretrained(name)
    HookedHybrid.from_pretrained = lambda *_, **__: model  # type: ignore[method-assign]
    build_app()  # imports every command
    for kind in ("png", "pdf"):  # and the plotting code
        new_figure(1, 1).savefig(io.BytesIO(), format=kind)
    counts = Counts()
    with tempfile.TemporaryDirectory() as place, suppress(KeyboardInterrupt):  # shows the progress
        disturb(words, given.kills, Path(place), counts, given.seed)
    said = {
        "command": " ".join(words),
        "kills": sum(counts.ways.values()),
        "killed": dict(counts.ways),
        "landed": dict(counts.landed),
        "left behind": dict(counts.left),
        "sweeps, each equal to the undisturbed one": counts.sweeps,
        "cells of a sweep": counts.cells,
        "seconds": round(time.monotonic() - begun),
    }
    print(json.dumps(said, indent=1))


if __name__ == "__main__":
    main()
