"""Marks of the pages, and the text between them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from experiments.pages.figures import Figure, figure_of
from experiments.pages.results import DOCS, kept
from experiments.pages.tables import KINDS

BLOCK = re.compile(
    r"<!-- measured: (?P<what>[^|\n]+?) \| (?P<command>[^|\n]+?) \| (?P<commit>[^|\n]+?) -->\n"
    r"(?P<body>.*?)<!-- end -->",
    re.DOTALL,
)
FIGURE = re.compile(
    r"(?P<value>[+-]?\d[\d,]*(?:\.\d+)?)(?P<percent>%?)(?P<interval> \[[^\]\n]*\])?"
    r"<!--=(?P<key>[^>\n]+?)-->"
)

ELSEWHERE = "elsewhere"


def said(figure: Figure, form: re.Match[str]) -> str:
    """Return a figure in the form that it has on the page."""
    old, factor = form["value"].replace(",", ""), 100 if figure.is_share else 1
    digits = len(old.partition(".")[2])
    sign = "+" if old[0] in "+-" else ""
    text = f"{factor * figure.value:{sign}.{digits}f}{form['percent']}"
    if not form["interval"]:
        return text
    inner = form["interval"].strip(" []").split(",")[-1].strip()
    digits, sign = len(inner.partition(".")[2]), "+" if inner[0] in "+-" else ""
    ends = (f"{factor * end:{sign}.{digits}f}" for end in (figure.low, figure.high))
    return f"{text} [{', '.join(ends)}]"


def written(text: str) -> str:
    """Return a page with every block and figure updated from the stored results.

    Raises:
        ValueError: a mark names an unknown kind, results or setting.
    """

    def shown(found: re.Match[str]) -> str:
        kind, *names = found["what"].split()
        if kind == ELSEWHERE:
            return found[0]
        if kind not in KINDS or len(names) != 1:
            raise ValueError(f"{found['what']!r}: give one of {', '.join(KINDS)}, and a name")
        results = kept(names[0])
        mark = f"<!-- measured: {kind} {names[0]} | {results.command} | {results.commit} -->"
        return f"{mark}\n{KINDS[kind](names[0])}\n<!-- end -->"

    def figure(found: re.Match[str]) -> str:
        return f"{said(figure_of(found['key']), found)}<!--={found['key']}-->"

    return FIGURE.sub(figure, BLOCK.sub(shown, text))


def filled(text: str, what: str, body: str, command: str, commit: str) -> str:
    """Return a page with a block that another program writes: its body, command and commit.

    Raises:
        ValueError: the page has no such block, or several.
    """
    found = [m for m in BLOCK.finditer(text) if m["what"] == f"{ELSEWHERE} {what}"]
    if len(found) != 1:
        raise ValueError(f"the page has {len(found)} blocks {ELSEWHERE} {what!r}: give it one")
    (own,) = found
    new = block(what, body, command, commit)
    return f"{text[: own.start()]}{new}{text[own.end() :]}"


def block(what: str, body: str, command: str, commit: str) -> str:
    """Return a block that another program writes, with its marks."""
    mark = f"<!-- measured: {ELSEWHERE} {what} | {command} | {commit} -->"
    return f"{mark}\n{body}\n<!-- end -->"


def pages() -> Iterator[Path]:
    """Yield every page with a mark."""
    for path in sorted(DOCS.glob("*.md")):
        if "<!-- measured:" in (text := path.read_text(encoding="utf-8")) or "<!--=" in text:
            yield path
