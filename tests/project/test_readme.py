"""The README's lines run as they stand."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[2]


def test_the_readmes_first_example_runs_and_its_comments_are_true():
    block = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[0]
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    shapes = re.findall(r"^(\S.*?\])\s+# \[([\d, ]+)\]", block, re.MULTILINE)
    assert len(shapes) == 3
    for expression, shape in shapes:
        assert list(eval(expression, scope).shape) == [int(n) for n in shape.split(",")]
    assert torch.isfinite(scope["logits"]).all()


def test_the_readmes_sweep_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    (block,) = (block for block in blocks if "sweep.niah" in block)
    scope: dict[str, Any] = {}
    exec(compile(block, "README.md", "exec"), scope)
    accuracy = scope["table"].groupby("setting")["accuracy"].mean()
    assert accuracy["whole"] == 1
    assert set(accuracy.index) == {"whole", "no last MLP"}


def test_ci_runs_exactly_the_readmes_test_command():
    readme = (ROOT / "README.md").read_text()
    assert re.search(r"^make test\b", readme, re.MULTILINE)
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    assert commands[-1] == "make test"
