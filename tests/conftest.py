"""Every test runs on one core and without a network."""

import os
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from tests import checking
from tests.loops import CHECKED_ONE_IN
from tests.skips import lines_of

checking.put_off()
os.environ["HF_HUB_OFFLINE"] = "1"
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
