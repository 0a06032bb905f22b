"""What a run of the tests left out is said at its end."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.parity import test_selective_scan
from tests.skips import lines_of


def report(reason: str, when: str = "call") -> Any:
    return SimpleNamespace(longrepr=("file.py", 3, f"Skipped: {reason}"), when=when)


def test_what_is_missing_is_named_with_how_often_and_the_command_that_has_it():
    gone = "could not import 'torchao.quantization': No module named 'torchao'"
    found = lines_of(
        [
            *[report("/x/reference/scan.py is not there: `make install` puts it there")] * 62,
            report(gone),
            report(gone, "collect"),
            *[report("needs a CUDA GPU"), report("needs two GPUs", "setup")],
            report("transformers 4: names differ"),
            report("on Mondays"),
        ]
    )
    assert found == [
        "NOT RUN: 1 whole file: torchao is not installed: `make test` has it",
        "NOT RUN: 62 tests: mamba-ssm's own scan is not installed: `make test` has it",
        "NOT RUN: 1 test: torchao is not installed: `make test` has it",
        "NOT RUN: 2 tests: there is no GPU for them",
        "NOT RUN: 1 test: for another version of transformers: `make transformers` has it",
        "NOT RUN: 1 test: on Mondays",
    ]
    assert lines_of([]) == []


def test_the_comparisons_with_mamba_ssm_are_among_them(monkeypatch: pytest.MonkeyPatch):
    test_selective_scan.selective_scan_ref.cache_clear()
    monkeypatch.setattr(test_selective_scan, "SOURCE", Path("/nowhere"))
    with pytest.raises(pytest.skip.Exception) as skipped:
        test_selective_scan.selective_scan_ref()
    [line] = lines_of([report(str(skipped.value))])
    assert line == "NOT RUN: 1 test: mamba-ssm's own scan is not installed: `make test` has it"
