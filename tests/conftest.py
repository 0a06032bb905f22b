"""Every test runs on one core and without a network."""

import os
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import checking
from tests.loops import CHECKED_ONE_IN
from tests.skips import lines_of

checking.put_off()
os.environ["HF_HUB_OFFLINE"] = "1"
# Processes that tests start would each compile all sources again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end what was skipped, and which command runs it."""
    yield
    for line in lines_of(terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line, yellow=True, bold=True)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the cases that run with checks: of each test the first, the ninth and so on."""
    seen: Counter[str] = Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        if seen[test] % CHECKED_ONE_IN == 0:
            item.add_marker("checked")
        seen[test] += 1


@pytest.fixture(autouse=True)
def checks(request: pytest.FixtureRequest) -> Iterator[None]:
    """Check types and shapes of every call at run time in marked tests, and in no others.

    The checks cost more than the tests themselves: 2.3 times over the whole suite.
    """
    checking.turn(on=request.node.get_closest_marker("checked") is not None)
    yield
    checking.turn(on=True)


@pytest.fixture
def unchecked(checks: None) -> None:
    """Turn the run-time type checks off, to run the library as its users do."""
    checking.turn(on=False)


@pytest.fixture
def plainly(unchecked: None) -> Iterator[None]:
    """Run the library as its users do: without type checks, and mostly without gradients."""
    with torch.no_grad():
        yield


@pytest.fixture
def few_maps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw the maps of a sweep's first two settings, and copy the files for the others.

    For tests that look at no map: a picture takes longer than the cells that it shows.
    """
    from hooked_hybrid.niah.report import report

    draw, save, last = report.retrieval_map, report.save_figure, list[Path]()

    def drawn(cells: Any, setting: str, *options: Any) -> Any:
        return draw(cells, setting, *options) if setting in cells["setting"].unique()[:2] else None

    def saved(figure: Any, base: Path) -> list[Path]:
        if figure is not None:
            last[:] = save(figure, base)
            return [*last]
        return [shutil.copy(p, base.with_name(f"{base.name}{p.suffix}")) for p in last]

    monkeypatch.setattr(report, "retrieval_map", drawn)
    monkeypatch.setattr(report, "save_figure", saved)
