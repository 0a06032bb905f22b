"""The code blocks of a page, and how each is run or, where a page says that it is not, checked.

A `python` block runs in one namespace with the blocks before it, and what it prints must be the
`text` block after it. A `sh` block holds commands; the program's own run in this process, and the
lines of a `text` block after it must be among what they print. A block below a line that begins
with *Not run by the tests* is not run: it compiles, and what it names exists.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import inspect
import io
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from typer.main import get_command
from typer.testing import CliRunner

from hooked_hybrid.commands.program import build_app

ROOT = Path(__file__).parent.parent
NOT_RUN = "*Not run by the tests"
LANGUAGES = ("python", "sh", "text", "json")


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its line on the page, and whether it is run."""

    language: str
    text: str
    line: int
    runs: bool


def blocks_of(text: str) -> list[Block]:
    """Return the fenced blocks of a page."""
    found, lines = [], text.splitlines()
    starts = [i for i, line in enumerate(lines) if line.startswith("```")]
    assert len(starts) % 2 == 0, "a fence is not closed"
    for start, stop in zip(starts[::2], starts[1::2], strict=True):
        before = next((line for line in reversed(lines[:start]) if line.strip()), "")
        body = "\n".join(lines[start + 1 : stop]) + "\n"
        block = Block(lines[start][3:], body, start + 2, not before.startswith(NOT_RUN))
        assert block.language in LANGUAGES, f"line {start + 1}: a block of {block.language!r}"
        found.append(block)
    return found


def run_page(text: str, name: str, scope: dict[str, Any] | None = None) -> list[str]:
    """Run a page's blocks from the top, in the working directory; return what was printed.

    Args:
        text, name: of the page.
        scope: gets the names that the blocks define.
    """
    scope = {} if scope is None else scope
    scope["__name__"] = "__main__"
    blocks, printed = blocks_of(text), []
    for block, following in zip(blocks, [*blocks[1:], None], strict=True):
        shown = following.text.strip("\n") if following and following.language == "text" else ""
        if block.language not in ("python", "sh"):
            continue
        if not block.runs:
            check_block(block, scope)
        elif block.language == "python":
            out = run_python(block, scope, name)
            assert out == shown, f"{name}, line {block.line}: printed\n{out}\nand shows\n{shown}"
            printed.append(out)
        else:
            out = "\n".join(run_command(line) for line in commands_of(block))
            lines = [line.strip() for line in out.splitlines()]
            gone = [s for s in shown.splitlines() if s.strip() not in (*lines, "...")]
            assert not gone, f"{name}, line {block.line}: {gone} not among\n{out}"
            printed.append(out)
    return printed


def run_python(block: Block, scope: dict[str, Any], name: str) -> str:
    """Run a block, and return what it printed."""
    source = "\n" * (block.line - 1) + block.text  # so that an error names the page's line
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, name, "exec"), scope)
    return "\n".join(line.rstrip() for line in out.getvalue().strip("\n").splitlines())


def commands_of(block: Block) -> Iterator[str]:
    """Yield the commands of a block, a continued one as one line, without comments."""
    for line in block.text.replace("\\\n", " ").splitlines():
        if words := shlex.split(line, comments=True):
            yield shlex.join(words)


def run_command(line: str) -> str:
    """Run one of the program's commands, or check that any other is there."""
    words = shlex.split(line)
    if words[0] != "hooked-hybrid":
        check_command(words)
        return ""
    result = CliRunner().invoke(build_app(), words[1:], env={"COLUMNS": "200"})
    assert result.exit_code == 0, f"{line}: {result.output}"
    return result.output


def check_block(block: Block, scope: dict[str, Any]) -> None:
    """Check a block that is not run: its commands parse, or what its code names exists."""
    if block.language == "sh":
        for line in commands_of(block):
            check_command(shlex.split(line))
    else:
        check_names(block.text, scope)


def check_command(words: list[str]) -> None:
    """Check that a command is there, and that it has the options and values that it is given."""
    if words[0] == "hooked-hybrid":
        commands = getattr(get_command(build_app()), "commands", {})
        assert words[1] in commands, words
        commands[words[1]].make_context(words[1], words[2:])
    elif words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert words[1] in targets, words
    elif words[:2] == ["python", "-m"]:
        assert find_spec(words[2]), words
    elif words[:2] == ["pip", "install"]:
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        wanted = re.findall(r"\[([\w,]+)\]", " ".join(words[2:]))
        assert {extra for group in wanted for extra in group.split(",")} <= set(extras), words
    else:
        assert words[0] in ("git", "cd", "ray", "python"), (
            f"{words}: a command the test cannot read"
        )


def check_names(source: str, scope: dict[str, Any]) -> None:
    """Check that code compiles, and that modules, attributes and keywords it names exist."""
    tree = ast.parse(source)
    known: dict[str, Any] = dict(scope)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and _is_installed(node.module):
            for alias in node.names:
                known[alias.asname or alias.name] = _member(node.module, alias.name)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if _is_installed(alias.name):
                    known[alias.asname or alias.name] = importlib.import_module(alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            known[node.targets[0].id] = _made(node.value, known)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = _value(node.value, known)
            assert owner is None or hasattr(owner, node.attr), f"{ast.unparse(node)} does not exist"
        if isinstance(node, ast.Call) and callable(called := _value(node.func, known)):
            _check_keywords(node, called)


def _check_keywords(node: ast.Call, called: Any) -> None:
    try:
        parameters = inspect.signature(called).parameters
    except ValueError:  # of C code
        return
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    unknown = [k.arg for k in node.keywords if k.arg and k.arg not in parameters]
    assert not unknown, f"{ast.unparse(node.func)} has no {unknown}"


def _is_installed(module: str) -> bool:
    return find_spec(module.partition(".")[0]) is not None


def _member(module: str, name: str) -> Any:
    parent = importlib.import_module(module)
    if not hasattr(parent, name):
        assert find_spec(f"{module}.{name}"), f"{module} has no {name}"
        importlib.import_module(f"{module}.{name}")
    return getattr(parent, name)


def _made(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return the class of what a call makes, where it is a class or one of its constructors."""
    if not isinstance(node, ast.Call):
        return None
    func = node.func
    if isinstance(func, ast.Attribute) and func.attr.startswith("from_"):
        func = func.value
    made = _value(func, known)
    return made if isinstance(made, type) else None


def _value(node: ast.expr, known: dict[str, Any]) -> Any:
    """Return the value that a name or a chain of attributes has, or None."""
    if isinstance(node, ast.Name):
        return known.get(node.id)
    if isinstance(node, ast.Attribute):
        return getattr(_value(node.value, known), node.attr, None)
    return None
