"""The mutants of a module: its syntax tree with one small change."""

from __future__ import annotations

import ast
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

Change = Callable[[ast.AST], ast.AST]

COMPARED: dict[type[ast.cmpop], type[ast.cmpop]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is,
}  # fmt: skip
COMPUTED: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.RShift: ast.LShift, ast.LShift: ast.RShift, ast.BitXor: ast.BitOr,
}  # fmt: skip
NAMES = {
    "min": "max", "any": "all", "amin": "amax", "minimum": "maximum", "argmin": "argmax",
    "floor": "ceil", "clamp_min": "clamp_max",
}  # fmt: skip
NAMES |= {b: a for a, b in NAMES.items()}

OF_NO_RESULT = ("strict", "stacklevel", "encoding", "desc", "unit", "leave", "frozen", "repr")
"""Options that no result depends on: checks of what cannot be, places and words of messages."""


@dataclass(frozen=True)
class Mutant:
    """One change of one module.

    Attributes:
        path: of the module.
        node: number of the changed node, in the order of `ast.walk`.
        change: number of the change, of those that the node has.
        line: where it is.
        function: qualified name of the outermost function it is in the body of, None outside.
        kind: what is done.
        was: the code that is changed.
        source: of the whole module, for files may change while mutants are tried.
    """

    path: Path
    node: int
    change: int
    line: int
    function: str | None
    kind: str
    was: str
    source: str = field(repr=False)

    @property
    def name(self) -> str:
        """What tells it from the others of its module."""
        return f"{self.path.stem}:{self.line}:{self.node}.{self.change} {self.kind}: {self.was}"

    def tree(self) -> ast.Module:
        """Return the whole module with the change."""
        tree = ast.parse(self.source)
        for i, node in enumerate(ast.walk(tree)):
            if i == self.node:
                _replace(tree, node, changes(node)[self.change][1](copy.deepcopy(node)))
                return ast.fix_missing_locations(tree)
        raise AssertionError(self.name)


def drawn(path: Path, n: int, seed: int) -> list[Mutant]:
    """Return `n` mutants of a module at random, or all if there are fewer, in order of lines.

    The kinds of change take turns, so that those there are most of do not fill the sample.
    """
    by_kind: dict[str, list[Mutant]] = {}
    for mutant in mutants(path):
        by_kind.setdefault(mutant.kind.split(" ")[0], []).append(mutant)
    random = Random(f"{seed} {path.name} {path.parent.name}")
    for found in by_kind.values():
        random.shuffle(found)
    taken: list[Mutant] = []
    while len(taken) < n and any(by_kind.values()):
        kinds = [kind for kind, found in by_kind.items() if found]
        random.shuffle(kinds)
        taken += [by_kind[kind].pop() for kind in kinds[: n - len(taken)]]
    return sorted(taken, key=lambda mutant: (mutant.line, mutant.node, mutant.change))


def mutants(path: Path) -> Iterator[Mutant]:
    """Yield every mutant of a module."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    functions, passed = _functions(tree), _passed_over(tree)
    for i, node in enumerate(ast.walk(tree)):
        if node in passed:
            continue
        for j, (kind, _) in enumerate(changes(node)):
            was = ast.unparse(node).split("\n")[0][:90]
            line = next(n.lineno for n in ast.walk(node) if hasattr(n, "lineno"))
            yield Mutant(path, i, j, line, functions.get(node), kind, was, source)


def changes(node: ast.AST) -> list[tuple[str, Change]]:
    """Return what may be changed at a node: a name for it, and the node that takes its place."""
    match node:
        case ast.Compare():
            return [
                (f"compares by {COMPARED[type(op)].__name__}", _compared(i))
                for i, op in enumerate(node.ops)
            ]
        case ast.BoolOp():
            return [("joins by the other of and, or", _joined)]
        case ast.UnaryOp(op=ast.Not()):
            return [("without not", lambda n: n.operand)]  # type: ignore[attr-defined]
        case ast.BinOp(left=left, right=right, op=op) if type(op) in COMPUTED:
            is_text = _is_text(left) or _is_text(right)
            return [] if is_text else [(f"computes by {COMPUTED[type(op)].__name__}", _computed)]
        case ast.AugAssign():
            return [("computes in place by another", _computed), ("drops", _nothing)]
        case ast.Constant(value=bool()):
            return [("flips", lambda n: ast.Constant(not n.value))]  # type: ignore[attr-defined]
        case ast.Constant(value=int() | float()):
            return [(f"adds {by:+}", _added(by)) for by in (1, -1)]
        case ast.Return(value=ast.expr()):
            return [("returns None", lambda _: ast.Return(ast.Constant(None)))]
        case ast.Expr(value=ast.Call()) | ast.Raise():
            return [("drops", _nothing)]
        case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
            return [("drops", _nothing)]
        case ast.If() | ast.IfExp():
            return [("negates the condition", _negated)]
        case ast.comprehension(ifs=[_, *_]):
            return [("negates the filter", _unfiltered)]
        case ast.Call():
            return [*_other_names(node), *_without_options(node)]
        case ast.Slice():
            return [
                (f"moves the {end} end", _moved(end))
                for end in ("lower", "upper")
                if getattr(node, end) is not None
            ]
        case ast.Break():
            return [("goes on", lambda _: ast.Continue())]
        case ast.Continue():
            return [("breaks", lambda _: ast.Break())]
    return []


def _compared(i: int) -> Change:
    def change(node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.Compare)
        node.ops[i] = COMPARED[type(node.ops[i])]()
        return node

    return change


def _joined(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BoolOp)
    node.op = ast.Or() if isinstance(node.op, ast.And) else ast.And()
    return node


def _computed(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.BinOp | ast.AugAssign)
    node.op = COMPUTED[type(node.op)]()
    return node


def _added(by: int) -> Change:
    return lambda node: ast.Constant(node.value + by)  # type: ignore[attr-defined]


def _nothing(_: ast.AST) -> ast.AST:
    return ast.Pass()


def _negated(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.If | ast.IfExp)
    node.test = ast.UnaryOp(ast.Not(), node.test)
    return node


def _unfiltered(node: ast.AST) -> ast.AST:
    assert isinstance(node, ast.comprehension)
    node.ifs[0] = ast.UnaryOp(ast.Not(), node.ifs[0])
    return node


def _other_names(node: ast.Call) -> list[tuple[str, Change]]:
    called = node.func
    name = getattr(called, "id", getattr(called, "attr", ""))
    if name not in NAMES:
        return []

    def change(node: ast.AST) -> ast.AST:
        assert isinstance(node, ast.Call)
        field = "id" if isinstance(node.func, ast.Name) else "attr"
        setattr(node.func, field, NAMES[name])
        return node

    return [(f"takes {NAMES[name]}", change)]


def _without_options(node: ast.Call) -> list[tuple[str, Change]]:
    def without(i: int) -> Change:
        def change(node: ast.AST) -> ast.AST:
            assert isinstance(node, ast.Call)
            del node.keywords[i]
            return node

        return change

    return [
        (f"omits {option.arg or '**'}", without(i))
        for i, option in enumerate(node.keywords)
        if option.arg not in OF_NO_RESULT
    ]


def _moved(end: str) -> Change:
    def change(node: ast.AST) -> ast.AST:
        setattr(node, end, ast.BinOp(getattr(node, end), ast.Add(), ast.Constant(1)))
        return node

    return change


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str)
    )


def _replace(tree: ast.AST, old: ast.AST, new: ast.AST) -> None:
    for parent in ast.walk(tree):
        for name, value in ast.iter_fields(parent):
            if value is old:
                setattr(parent, name, new)
                return
            if isinstance(value, list) and any(each is old for each in value):
                value[[each is old for each in value].index(True)] = new
                return


def _functions(tree: ast.Module) -> dict[ast.AST, str]:
    """Return, for each node in the body of a function, the name of the outermost one."""
    found: dict[ast.AST, str] = {}

    def enter(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef):
                inside = (n for statement in child.body for n in ast.walk(statement))
                found.update(dict.fromkeys(inside, prefix + child.name))
            elif isinstance(child, ast.ClassDef):
                enter(child, f"{prefix}{child.name}.")

    enter(tree, "")
    return found


def _passed_over(tree: ast.Module) -> set[ast.AST]:
    """Return nodes that are not part of what is computed: annotations, messages, imports."""
    over: set[ast.AST] = set()

    def leave_out(*nodes: ast.AST | None) -> None:
        over.update(n for node in nodes if node is not None for n in ast.walk(node))

    for node in ast.walk(tree):
        match node:
            case ast.AnnAssign():
                leave_out(node.annotation)
            case ast.arg():
                leave_out(node.annotation)
            case ast.FunctionDef():
                leave_out(node.returns, *node.decorator_list)
            case ast.ClassDef():
                leave_out(*node.decorator_list, *node.bases)
            case ast.Raise():
                leave_out(node.exc, node.cause)
            case ast.JoinedStr():
                leave_out(node)
            case ast.keyword(arg=str(name)) if name in OF_NO_RESULT:
                leave_out(node)
            case ast.If(test=ast.Name(id="TYPE_CHECKING")):
                leave_out(node)
            case ast.Call(func=ast.Name(id="TypeVar" | "cast")):
                leave_out(node)
            case ast.Assign(targets=[ast.Name(id="__all__" | "__hash__")]):
                leave_out(node)
    return over
