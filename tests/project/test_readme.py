"""The README is short, runs as it stands, and gives figures that were measured."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from hooked_hybrid import HookedHybrid, presets
from tests.page_blocks import ROOT, run_page

README = (ROOT / "README.md").read_text(encoding="utf-8")


def test_it_is_short_and_has_one_title():
    assert len(README.splitlines()) <= 150
    assert len(re.findall(r"^# ", README, re.MULTILINE)) == 1


def test_it_runs_prints_what_it_shows_and_its_shapes_are_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
):
    monkeypatch.chdir(tmp_path)
    scope: dict[str, Any] = {}
    run_page(README, "README.md", scope)
    shapes = re.findall(r"^(\S.*?\])\s+# \[([\d, ]+)\]", README, re.MULTILINE)
    assert len(shapes) == 2
    for expression, shape in shapes:
        assert list(eval(expression, scope).shape) == [int(n) for n in shape.split(",")]
    accuracy = scope["table"].groupby("setting")["accuracy"].mean()
    assert accuracy["whole"] == 1


def models_in_comments(text: str) -> list[str]:
    """Return the expressions that make a model or config in comments of Python blocks."""
    code = "\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL))
    comments = " ".join(re.findall(r"#(.*)", code))
    return re.findall(r"presets\.\w+\([^)]*\)|from_pretrained\([^)]*\)", comments)


def test_a_model_named_in_a_comment_can_be_made():
    assert models_in_comments("```python\nx = 1  # or presets.jamba('MM') too\n```\n") == [
        "presets.jamba('MM')"
    ]
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    for page in pages:
        for expression in models_in_comments(page.read_text(encoding="utf-8")):
            scope = {"presets": presets, "from_pretrained": HookedHybrid.from_pretrained}
            assert eval(expression, scope) is not None, page


def test_figures_of_the_true_shape_are_the_measured_ones():
    path = ROOT / "docs" / "measured" / "true_shape.json"
    measured: dict[str, Any] = json.loads(path.read_text())
    text = " ".join(README.split())
    found = (
        r"loads in ([\d.]+) s, reads (\d+) tokens .*? takes ([\d.]+) s a step, and ([\d.]+) times"
    )
    loads, reads, step, hooked = re.findall(found, text)[0]
    assert f"{measured['seconds_to_load']:.1f}" == loads
    assert f"{measured['prefill_tokens_per_second']:.0f}" == reads
    assert f"{measured['step_seconds']:.2f}" == step
    assert f"{measured['step_top_2_over_plain']:.2f}" == hooked
    assert measured["commit"] in README and measured["date"] in README


def test_ci_runs_exactly_the_readmes_test_command():
    assert re.search(r"^make test\b", README, re.MULTILINE)
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[-1] == "make test"
