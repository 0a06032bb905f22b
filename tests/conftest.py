"""Every test runs on one core and without a network."""

import os
from collections.abc import Iterator

import pytest
import torch
from jaxtyping import config

from tests.skips import lines_of

os.environ["HF_HUB_OFFLINE"] = "1"
torch.set_num_threads(1)


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> Iterator[None]:
    """Say at the very end what was skipped, and which command runs it."""
    yield
    for line in lines_of(terminalreporter.stats.get("skipped", ())):
        terminalreporter.write_line(line, yellow=True, bold=True)


@pytest.fixture
def unchecked() -> Iterator[None]:
    """Turn the run-time type checks off, to meet the library as its users do."""
    config.update("jaxtyping_disable", True)
    yield
    config.update("jaxtyping_disable", False)


@pytest.fixture
def plainly(unchecked: None) -> Iterator[None]:
    """Meet the library as its users do: without type checks, and mostly without gradients."""
    with torch.no_grad():
        yield
