"""Mutants: each is the code with one small change, and the same lot draws the same ones."""

from __future__ import annotations

import ast
from pathlib import Path

from tests.mutation import TARGETS, TESTS
from tests.mutation.__main__ import table_of
from tests.mutation.mutants import drawn, mutants
from tests.mutation.running import Reached

ROOT = Path(__file__).parents[2]
SOURCE = '''
"""Words."""
from __future__ import annotations
LIMIT: int = 3
def outer(x: list[int], y=True):
    """More words."""
    if not x and y:
        raise ValueError(f"{x} is 0")
    def inner(z):
        return max(z[1:], key=abs)
    return [inner(x) < 2 for i in x if i]
class Kind:
    @property
    def half(self):
        return self.n // 2
'''


def test_every_small_change_of_a_module_is_found_once(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    found = [*mutants(path)]
    assert {(m.kind, m.was, m.function) for m in found} == {
        ("adds +1", "3", None),
        ("adds -1", "3", None),
        ("flips", "True", None),
        ("negates the condition", "if not x and y:", "outer"),
        ("joins by the other of and, or", "not x and y", "outer"),
        ("without not", "not x", "outer"),
        ("drops", "raise ValueError(f'{x} is 0')", "outer"),
        ("returns None", "return max(z[1:], key=abs)", "outer"),
        ("takes min", "max(z[1:], key=abs)", "outer"),
        ("omits key", "max(z[1:], key=abs)", "outer"),
        ("moves the lower end", "1:", "outer"),
        ("adds +1", "1", "outer"),
        ("adds -1", "1", "outer"),
        ("returns None", "return [inner(x) < 2 for i in x if i]", "outer"),
        ("compares by LtE", "inner(x) < 2", "outer"),
        ("adds +1", "2", "outer"),
        ("adds -1", "2", "outer"),
        ("negates the filter", " for i in x if i", "outer"),
        ("returns None", "return self.n // 2", "Kind.half"),
        ("computes by Mult", "self.n // 2", "Kind.half"),
        ("adds +1", "2", "Kind.half"),
        ("adds -1", "2", "Kind.half"),
    }
    texts = {ast.unparse(m.tree()) for m in found}
    assert len(texts) == len(found) and ast.unparse(ast.parse(SOURCE)) not in texts
    assert all(SOURCE.splitlines()[m.line - 1] for m in found)


def test_the_same_lot_draws_the_same_mutants_and_every_target_is_there():
    assert all((ROOT / "hooked_hybrid" / f"{target}.py").is_file() for target in TARGETS)
    for target in ("niah/scores", "accounting/plan/split"):
        path = ROOT / "hooked_hybrid" / f"{target}.py"
        some = drawn(path, 9, seed=0)
        assert some == drawn(path, 9, seed=0) != drawn(path, 9, seed=1)
        assert len({m.name for m in some}) == 9
        compile(some[0].tree(), str(path), "exec")
    assert all((ROOT / "tests" / f"{name}.py").is_file() for name in TESTS)


def test_tests_that_reach_the_line_come_first_and_the_quickest_of_them(tmp_path: Path):
    path = tmp_path / "module.py"
    path.write_text(SOURCE)
    seconds = {"a::1": 3.0, "a::2": 1.0, "a::3": 2.0, "b::1": 1.0, "c::1": 9.0}
    lines = {t: {str(path): [5]} for t in ("a::1", "a::3", "c::1")}
    lines |= {"a::2": {}, "b::1": {str(path): [15]}}
    reached = Reached(seconds, lines)
    outside = next(m for m in mutants(path) if m.line == 4)
    inside = next(m for m in mutants(path) if m.function == "Kind.half")
    assert reached.tests_for(inside, 9) == ["b::1"]
    assert reached.tests_for(outside, 5) == ["b::1", "a::3"]  # any that reaches the module
    assert reached.tests_for(outside, 99) == ["b::1", "a::3", "a::1", "c::1", "a::2"]


def test_the_table_counts_what_became_of_each():
    found = {"niah/scores:1:2.0 a": "killed", "niah/scores:3:4.0 b": "lives"}
    lines = table_of(found | {"placement/x:1:1.0 c": "killed by time"}).splitlines()
    assert [line.split() for line in lines[1:]] == [
        ["niah/scores", "2", "1", "0", "1", "0"],
        ["placement/x", "1", "0", "1", "0", "0"],
        ["all", "3", "1", "1", "1", "0"],
        ["lives", "niah/scores:3:4.0", "b"],
    ]
