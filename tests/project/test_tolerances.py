"""Bounds on the difference of two computations are named in `tests/tolerances.py`, and used."""

from __future__ import annotations

import re
from pathlib import Path

from tests import tolerances

TESTS = Path(__file__).parents[1]
SOURCES = {path: path.read_text(encoding="utf-8") for path in TESTS.rglob("*.py")}
LITERAL = re.compile(r"\brelative\((?:[^\n]*?)\) < (?:\d+\.?\d*e-?\d+|0?\.\d+|\d\*\*-\d+)")


def test_no_difference_is_bounded_by_a_number_without_a_name():
    found = {
        f"{path.relative_to(TESTS)}: {match[0]}"
        for path, text in SOURCES.items()
        for match in LITERAL.finditer(text)
        if path.name != Path(__file__).name
    }
    assert not found


def test_the_pattern_sees_a_number_without_a_name():
    assert LITERAL.search("assert relative(a, b[0]) < 1e-5")
    assert LITERAL.search("assert relative(f(a), b) < 0.1")
    assert not LITERAL.search("assert relative(a, b) < FP32_PARITY")


def test_every_tolerance_is_used_and_has_its_reason():
    text = (TESTS / "tolerances.py").read_text(encoding="utf-8")
    names = [name for name in vars(tolerances) if name.isupper()]
    assert len(names) == len(re.findall(r'^[A-Z]\w+ = .*\n"""', text, re.MULTILINE)) > 5
    others = "\n".join(text for path, text in SOURCES.items() if path.name != "tolerances.py")
    assert not [name for name in names if not re.search(rf"\b{name}\b", others)]
