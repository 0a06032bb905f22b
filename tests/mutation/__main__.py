"""`python -m tests.mutation`: draw mutants, run tests on each, say which live."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.mutation import TARGETS, TESTS
from tests.mutation.mutants import Mutant, drawn
from tests.mutation.running import FAULT, ROOT, Baseline, Reached, Warm, in_a_fork, run_anew

OPTIONS = ["-q", "-s", "-p", "no:cacheprovider", "-o", "tmp_path_retention_policy=none"]
OPTIONS += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
OPTIONS += ["--basetemp", tempfile.mkdtemp(prefix="mutation-")]
TO_WARM = "torch pandas scipy.stats transformers tokenizers matplotlib.pyplot beartype typer"
LONGER = 8
"""Times as many seconds of tests for a mutant that lives after those of `--seconds`."""
KILLED, LIVES, NOT_REACHED = "killed", "lives", "no test reaches it"
ENDS = {0: LIVES, FAULT: "not tried", None: "killed by time"}
"""By the exit status; None ran for too long, and any other says that tests fail."""


class Run:
    """The mutants of one call, and what became of each."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.reached = Reached()
        self.found: dict[str, str] = {}
        if args.out.is_file():
            self.found = json.loads(args.out.read_text())

    def mutants(self) -> list[Mutant]:
        """Return those of this part that nothing is known of, or that lived and are tried again."""
        chosen = [target for target in TARGETS if target in (self.args.only or TARGETS)]
        paths = [ROOT / "hooked_hybrid" / f"{target}.py" for target in chosen]
        every = [m for path in paths for m in drawn(path, self.args.each, self.args.seed)]
        part, parts = map(int, self.args.part.split("/"))
        known = {KILLED, ENDS[None], *([] if self.args.again else [LIVES, NOT_REACHED])}
        return [m for m in every[part::parts] if self.found.get(key_of(m)) not in known]

    def look(self) -> None:
        """Run all tests once, to record which lines each reaches, unless that is recorded."""
        paths = [ROOT / "hooked_hybrid" / f"{target}.py" for target in TARGETS]
        files = [f"tests/{name}.py" for name in TESTS]
        where = self.args.reached
        newest = max(path.stat().st_mtime for path in [*paths, *(ROOT / file for file in files)])
        if not where.is_file() or where.stat().st_mtime < newest:
            plugin = Baseline(paths, where)
            log = where.with_suffix(".log")
            in_a_fork(lambda: int(pytest.main([*OPTIONS, *files], [plugin])), 3600, log)
        self.reached = Reached(**json.loads(where.read_text()))

    def run(self) -> None:
        """Try each mutant, those that live in a process of their own too."""
        mutants = self.mutants()
        for mutant in mutants:
            if not self._tests(mutant):
                self.say(mutant, NOT_REACHED)
        mutants = [m for m in mutants if self._tests(m)]
        files = sorted({test.split("::")[0] for test in self.reached.seconds})
        inside = [m for m in mutants if m.function is not None]
        in_a_fork(
            lambda: int(pytest.main([*OPTIONS, *files], [Warm(inside, self._warm)])),
            24 * 3600,
            self.args.out.with_suffix(".log"),
        )
        if self.args.out.is_file():
            self.found = json.loads(self.args.out.read_text())
        for mutant in mutants:
            if self.found.get(key_of(mutant)) not in (KILLED, ENDS[None]):
                tests = self._tests(mutant, LONGER)
                self._try(mutant, lambda t=tests, m=mutant: run_anew([*OPTIONS, *t], m), tests, 40)

    def _warm(self, mutant: Mutant, child: Callable[[list[str]], int]) -> None:
        tests = self._tests(mutant)
        self._try(mutant, lambda: child(tests), tests, 5)

    def _try(self, mutant: Mutant, child: Callable[[], int], tests: list[str], more: float) -> None:
        start = time.monotonic()
        expected = sum(self.reached.seconds[test] for test in tests)
        log = self.args.out.with_suffix(".last.log")
        end = in_a_fork(child, self.args.patience * (more + 2 * expected), log)
        self.say(mutant, ENDS.get(end, KILLED), time.monotonic() - start, len(tests))

    def _tests(self, mutant: Mutant, times: float = 1) -> list[str]:
        return self.reached.tests_for(mutant, times * self.args.seconds)

    def say(self, mutant: Mutant, end: str, seconds: float = 0.0, n_tests: int = 0) -> None:
        """Note and print what became of a mutant."""
        self.found[key_of(mutant)] = end
        self.args.out.write_text(json.dumps(self.found, indent=1))
        line = f"{end:18} {seconds:6.1f} s {n_tests:4} tests  {key_of(mutant)}\n"
        with self.args.out.with_suffix(".txt").open("a") as file:
            file.write(line)


def key_of(mutant: Mutant) -> str:
    """Return what a mutant is called."""
    return f"{mutant.path.parent.name}/{mutant.name}"


def table_of(found: dict[str, str]) -> str:
    """Return how many were tried, killed and left, by module; then those that live."""
    counts: dict[str, Counter[str]] = {}
    for key, end in found.items():
        counts.setdefault(key.split(":")[0], Counter())[end] += 1
    rows = [f"{'module':28} tried killed by time lives not reached"]
    for name, count in [*sorted(counts.items()), ("all", sum(counts.values(), Counter()))]:
        ends = (count[end] for end in (KILLED, ENDS[None], LIVES, NOT_REACHED))
        rows.append("{:28} {:5} {:6} {:7} {:5} {:11}".format(name, count.total(), *ends))
    return "\n".join([*rows, *(f"{v}  {k}" for k, v in found.items() if not v.startswith(KILLED))])


def main() -> None:
    """Read the options and run."""
    parser = argparse.ArgumentParser("python -m tests.mutation", description=__doc__)
    parser.add_argument("--each", type=int, default=18, help="mutants of each module")
    parser.add_argument("--seed", type=int, default=0, help="of the lot")
    parser.add_argument("--only", nargs="*", help="modules, as in TARGETS")
    parser.add_argument("--part", default="0/1", help="which of how many parts, from 0")
    parser.add_argument("--seconds", type=float, default=60, help="of tests for a mutant, at most")
    parser.add_argument("--patience", type=float, default=2, help="times what tests should take")
    parser.add_argument("--again", action="store_true", help="try once more those that live")
    results = ROOT / "results" / "mutants"
    parser.add_argument("--out", type=Path, default=results / "found.json")
    parser.add_argument("--reached", type=Path, default=results / "reached.json")
    args = parser.parse_args()
    for path in (args.out, args.reached):
        path.parent.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    for name in TO_WARM.split():
        importlib.import_module(name)
    run = Run(args)
    run.look()
    run.run()
    os.write(1, f"{table_of(run.found)}\n".encode())


if __name__ == "__main__":
    main()
