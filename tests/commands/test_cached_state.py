"""`hooked-hybrid cached-state` reports what its sisters report."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from hooked_hybrid.commands import cached_state as command
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.niah.cached_state import CASES

SMALL = "--lengths 96 --depths 0,1 --max-new-tokens 2"


def test_it_leaves_a_report_with_cells_maps_and_its_own_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(command, "CASES", (CASES[0], CASES[3], CASES[-1]))
    out = tmp_path / "r"
    words = f"cached-state --k 2,4 --needle held-out --n-needles 2 {SMALL} --out {out}"
    result = CliRunner().invoke(build_app(), words.split())
    assert result.exit_code == 0, result.output
    page = (out / "report.html").read_text()
    for text in (
        "<h2>What was run</h2>",
        "tiny-griffin",
        "<h2>Accuracy by setting</h2>",
        "95% interval",
        "<h2>Accuracy by case</h2>",
        "<h2>Retrieval maps</h2>",
        "cases that must agree",
        "prompt: all k=2",
    ):
        assert text in page, text
    assert len(re.findall("<img ", page)) == 2
    assert {p.name for p in out.iterdir()} >= {"cells.sqlite", "report.html", "table.csv", "maps"}
    assert len(list((out / "maps").glob("*.png"))) == 5
    with (out / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 5
    shown = " ".join(result.stdout.split())
    assert "no cache: last position k=4" in shown and "report.html" in shown
