"""Which tests reach which lines, and what they say of a mutant."""

from __future__ import annotations

import ast
import contextlib
import gc
import importlib
import importlib.machinery
import json
import os
import signal
import sys
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FrameType, FunctionType
from typing import Any

import pytest

from tests.mutation.mutants import Mutant

ROOT = Path(__file__).parents[2]
FAULT = 70
"""Exit status of a process that could not try its mutant."""
MANY_CALLS = 100
"""Calls of a function in one test, after which its lines are taken to be known."""


@dataclass
class Reached:
    """Of each test: how long it took, and the lines it ran of each target."""

    seconds: dict[str, float] = field(default_factory=dict)
    lines: dict[str, dict[str, list[int]]] = field(default_factory=dict)

    def tests_for(self, mutant: Mutant, most_seconds: float) -> list[str]:
        """Return the tests that may notice a mutant, the quickest first.

        Those that reach its line, then others of their files, for tests share what is made once.
        Where none runs the line, which may be run at import, any that reaches the module.
        """
        path = str(mutant.path)
        by_time = sorted(self.seconds, key=lambda test: self.seconds[test])
        of_module = [test for test in by_time if self.lines[test].get(path)]
        reach = [test for test in of_module if mutant.line in self.lines[test][path]] or of_module
        files = {test.split("::")[0] for test in reach}
        beside = [t for t in by_time if t.split("::")[0] in files and t not in set(reach)]
        chosen, total = [], 0.0
        for test in [*reach, *beside]:
            total += self.seconds[test]
            if chosen and total > most_seconds:
                break
            chosen.append(test)
        return chosen


class Baseline:
    """A pytest plugin that notes what each test reaches."""

    def __init__(self, targets: Sequence[Path], out: Path) -> None:
        self.targets, self.out, self.reached = set(map(str, targets)), out, Reached()
        self.now: dict[str, set[int]] = {}
        self.calls: Counter[CodeType] = Counter()
        self.failed: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """Trace one test, with its fixtures."""
        self.now, self.calls, start = {}, Counter(), time.perf_counter()
        sys.settrace(self._call)
        threading.settrace(self._call)
        try:
            return (yield)
        finally:
            sys.settrace(None)
            threading.settrace(None)  # type: ignore[arg-type]
            self.reached.seconds[item.nodeid] = time.perf_counter() - start
            self.reached.lines[item.nodeid] = {p: sorted(lines) for p, lines in self.now.items()}
            if len(self.reached.lines) % 100 == 0:
                self.pytest_sessionfinish()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Note what fails without any mutant, or is skipped: it says nothing."""
        if not report.passed:
            self.failed.append(report.nodeid)

    def pytest_sessionfinish(self) -> None:
        """Write it down."""
        seconds = {t: s for t, s in self.reached.seconds.items() if t not in set(self.failed)}
        self.out.write_text(json.dumps({"seconds": seconds, "lines": self.reached.lines}))

    def _call(self, frame: FrameType, _event: str, _arg: Any) -> Any:
        path = frame.f_code.co_filename
        if path not in self.targets or self.calls[frame.f_code] > MANY_CALLS:
            return None
        self.calls[frame.f_code] += 1
        lines = self.now.setdefault(path, set())

        def line(frame: FrameType, _event: str, _arg: Any) -> Any:
            lines.add(frame.f_lineno)
            return line

        return line(frame, _event, _arg)


class Warm:
    """A pytest plugin that, instead of running the tests, runs some of them on each mutant."""

    def __init__(self, mutants: Sequence[Mutant], run: Callable[[Mutant, Any], None]) -> None:
        self.mutants, self.run = mutants, run
        self.functions: dict[tuple[str, str], list[FunctionType]] = {}

    def pytest_runtestloop(self, session: pytest.Session) -> bool:
        """Fork for each mutant."""
        for thing in gc.get_objects():
            if type(thing) is FunctionType:  # isinstance would ask some what they are
                code = thing.__code__
                self.functions.setdefault((code.co_filename, code.co_qualname), []).append(thing)
        gc.freeze()
        items = {item.nodeid: item for item in session.items}
        for mutant in self.mutants:
            self.run(mutant, lambda tests, m=mutant: self._child(session, items, tests, m))
        return True

    def _child(
        self, session: pytest.Session, items: dict[str, pytest.Item], tests: list[str], m: Mutant
    ) -> int:
        """Change a function in this process and run tests until one fails."""
        if not self._changed(m):
            return FAULT
        chosen = [items[test] for test in tests]
        for item, after in zip(chosen, [*chosen[1:], None], strict=True):
            item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
            if session.testsfailed:
                return 1
        return 0

    def _changed(self, mutant: Mutant) -> bool:
        if mutant.function is None:
            return False
        path = str(mutant.path)
        codes = [*_codes(compile(mutant.tree(), path, "exec"), mutant.function)]
        found = self.functions.get((path, mutant.function), [])
        if len(codes) != 1 or not found:
            return False
        try:
            for function in found:
                function.__code__ = codes[0]
        except ValueError:  # it closes over other names
            return False
        return True


def _codes(code: CodeType, name: str) -> Iterator[CodeType]:
    for inner in code.co_consts:
        if isinstance(inner, CodeType):
            if inner.co_qualname == name:
                yield inner
            yield from _codes(inner, name)


def run_anew(arguments: list[str], mutant: Mutant) -> int:
    """Import everything with the mutant in this process, and run tests until one fails."""
    changed = ast.unparse(mutant.tree()).encode()
    plain = importlib.machinery.SourceFileLoader.get_code

    def get_code(self: Any, name: str) -> Any:
        if self.get_filename(name) == str(mutant.path):
            return self.source_to_code(changed, str(mutant.path))
        return plain(self, name)

    importlib.machinery.SourceFileLoader.get_code = get_code  # type: ignore[method-assign]
    code = int(pytest.main(["-x", *arguments]))
    if code != pytest.ExitCode.USAGE_ERROR:
        return code
    try:  # a mutant that cannot be imported fails every test
        importlib.import_module(".".join(mutant.path.relative_to(ROOT).with_suffix("").parts))
    except Exception:
        return 1
    return FAULT


def in_a_fork(child: Callable[[], int], seconds: float, log: Path | None = None) -> int | None:
    """Return what a function returned in a process of its own, None where it took too long."""
    pid = os.fork()
    if not pid:
        code = FAULT
        try:
            os.setsid()
            out = os.open(log or os.devnull, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(out, stream)
            code = child()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _end(pid)
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    _end(pid)
    os.waitpid(pid, 0)
    return None


def _end(group: int) -> None:
    """End the processes that a test has left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)
