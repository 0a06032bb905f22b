"""Scores of an answer: how much of the needle it contains."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

from hooked_hybrid.niah.needles import PAPER, AnyNeedle, KeywordNeedle, holds, plain

Score = Literal["graded", "binary", "released"] | Callable[[str, AnyNeedle], float]
"""One of the scores here by name, or a function of an answer and its needle that gives 0 to 1."""

FULL = 5.0
"""The highest graded score; accuracy is score / 5."""


def graded(output: str, needle: AnyNeedle) -> float:
    """Return the graded score of an answer, 0 to 5.

    What to make +1, the place +0.5, resting in the place +0.5, the weather +1; the answer in
    correct grammar ("is to eat ...") sets 4, the whole needle sets 5. For a needle with keywords,
    each keyword is an equal part of 5, and the whole sentence sets 5. Case, punctuation and blanks
    do not count.

    Source: thesis, Table 2.1, with phrases from the needle.

    Examples:
        >>> from hooked_hybrid.niah import needles, scores
        >>> scores.graded("eat a sandwich and sit in Dolores Park", needles.PAPER)
        2.0
    """
    if holds(output, needle.sentence):
        return FULL
    if isinstance(needle, KeywordNeedle):
        found = sum(holds(output, word) for word in needle.keywords)
        return FULL * found / len(needle.keywords)
    if holds(output, f"is to {needle.answer}"):
        return 4.0
    parts = zip(needle.phrases, (1.0, 0.5, 0.5, 1.0), strict=True)
    return sum((points for phrase, points in parts if holds(output, phrase)), 0.0)


def binary(output: str, needle: AnyNeedle) -> bool:
    """Whether the whole answer is in the output; of a needle with keywords, every keyword.

    Source: Zani et al. 2025, a match of strings.

    Examples:
        >>> from hooked_hybrid.niah import needles, scores
        >>> scores.binary("eat a sandwich", needles.PAPER)
        False
    """
    if isinstance(needle, KeywordNeedle):
        return all(holds(output, word) for word in needle.keywords)
    return holds(output, needle.answer)


def released(output: str, needle: AnyNeedle) -> float:
    """Return the score of the authors' released code, 0 to 5, which counts an echo of the question.

    "best thing to do in san francisco" +1, "eat a sandwich" +1, "dolores park" +0.5, "sit in
    dolores park" +0.5, "on a sunny day" +1, as substrings; the whole needle sets 5. A needle with
    keywords, which their code does not have, gets its graded score.

    Examples:
        >>> from hooked_hybrid.niah import needles, scores
        >>> scores.released(needles.PAPER.sentence, needles.PAPER)
        5.0
    """
    if isinstance(needle, KeywordNeedle):
        return graded(output, needle)
    text, (make, place, rest, weather) = plain(output), needle.phrases
    if plain(needle.sentence) in text:
        return FULL
    echo = f"best thing to do in {needle.city}"
    phrases = (echo, make, place, rest, f"on a {weather}")
    parts = zip(phrases, (1.0, 1.0, 0.5, 0.5, 1.0), strict=True)
    return sum((points for phrase, points in parts if plain(phrase) in text), 0.0)


def scorer(score: Score) -> Callable[[str, AnyNeedle], float]:
    """Return a function of an answer and its needle, from 0 to 1, for one of ours or one's own.

    Args:
        score: "graded", "binary" or "released"; or a function.

    Raises:
        ValueError: another name; when called, a value that is not a number from 0 to 1.
        TypeError: neither a name nor a function.
    """
    if isinstance(score, str):
        accuracy("", PAPER, score)  # is there one of this name?
        return partial(accuracy, score=score)
    if not callable(score):
        raise TypeError(f"score={score!r}: give 'graded', 'binary', 'released' or a function")

    def own(output: str, needle: AnyNeedle) -> float:
        found = float(score(output, needle))
        if not 0 <= found <= 1:
            name = getattr(score, "__qualname__", score)
            raise ValueError(f"score {name} gave {found} for {output!r}: give 0 to 1")
        return found

    return own


def accuracy(output: str, needle: AnyNeedle, score: str = "graded") -> float:
    """Return a score as a fraction, 0 to 1.

    Args:
        output: the model's answer.
        needle: the needle of the prompt.
        score: "graded", "binary" or "released".

    Raises:
        ValueError: another score.

    Examples:
        >>> from hooked_hybrid.niah import needles, scores
        >>> scores.accuracy(needles.PAPER.sentence, needles.PAPER)
        1.0
    """
    if score == "binary":
        return float(binary(output, needle))
    if score not in ("graded", "released"):
        raise ValueError(f"score={score!r}: give 'graded', 'binary' or 'released'")
    return (graded if score == "graded" else released)(output, needle) / FULL
