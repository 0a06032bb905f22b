"""Words of a page outside its tables, and which of their figures something holds."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

from experiments.pages.results import DOCS
from experiments.pages.writing import BLOCK, FIGURE

PLAIN = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
TABLE = re.compile(r"^\|.*$", re.MULTILINE)
LINK = re.compile(r"!?\[([^\]]*)\]\([^)]*\)")
NUMBER = re.compile(r"(?<![\w.\-/])[+-]?\d(?:[\d,]*\d)?(?:\.\d+)?(?:e-\d+)?(?![\w/]|\.\d)%?")
NAMES = re.compile(
    r"`[^`]*`"  # code
    r"|\b(?:[Ll]ayers?|[Ss]eeds?|[Tt]ables?|[Ff]igures?|[Ss]ections?|steps?|recurrences|k =|torch"
    r"|torchao) \d[\d.]*\b(?:(?:, | and | or | to | ?/ ?)\d[\d.]*\b(?! ?%))*"  # what is numbered
    r"|^\d+\. "  # an item
    r"|\b(?:19|20)\d\d\b|\b95%"  # a year; the one level of the intervals
)
ONCE = re.compile(r"\(Measured once, at commit [0-9a-f]{7} of \d{4}-\d\d-\d\d; not run since\.\)")


class Open(NamedTuple):
    """A figure that nothing holds, and the words around it."""

    figure: str
    around: str


class Words:
    """The words of a page outside blocks, tables and code, a blank between any two.

    `sentence in words` notes that a test holds the figures of this sentence.
    """

    def __init__(self, text: str) -> None:
        """Take the text of a page."""
        for pattern in (PLAIN, BLOCK, TABLE):
            text = pattern.sub("\n\n", text)
        text = LINK.sub(r"\1", text).replace("**", "")
        parts = (" ".join(part.split()) for part in re.split(r"\n\s*\n|\n(?=- )", text))
        self.paragraphs = [_without_marks(part) for part in parts]
        self.text = " ".join(words for words, _ in self.paragraphs)
        self.held: list[str] = []

    def __contains__(self, sentence: str) -> bool:
        """Return whether the page says this."""
        if found := sentence in self.text:
            self.held.append(sentence)
        return found

    def open_figures(self, known: list[str]) -> list[Open]:
        """Return the figures that nothing holds: no mark, no sentence of a test, none known.

        A paragraph that says with which commit it was measured once holds its own.
        """
        found = []
        for words, marked in self.paragraphs:
            if ONCE.search(words):
                continue
            covered = [*marked, *(m.span() for m in NAMES.finditer(words))]
            for phrase in {*self.held, *known}:
                covered += [m.span() for m in re.finditer(re.escape(phrase), words)]
            for m in NUMBER.finditer(words):
                if not any(a <= m.start() and m.end() <= b for a, b in covered):
                    found.append(Open(m[0], words[max(0, m.start() - 50) : m.end() + 30]))
        return found


def _without_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """Return a paragraph without marks, and where the figures stand that had one."""
    words, spans, end = "", [], 0
    for m in FIGURE.finditer(text):
        words += text[end : m.start()]
        figure = m[0].partition("<!--")[0]
        spans.append((len(words), len(words) + len(figure)))
        words, end = words + figure, m.end()
    return words + text[end:], spans


def page(name: str) -> Words:
    """Return the words of a page in `docs/`."""
    return Words(path_of(name).read_text(encoding="utf-8"))


def path_of(name: str) -> Path:
    """Return the path of a page."""
    return DOCS / f"{name}.md"
