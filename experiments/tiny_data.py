"""Training sequences of the packaged models: needles in ordinary text, several questions each."""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_hybrid.niah.haystack import sentences
from hooked_hybrid.niah.needles import Needle, draw_needles, training_cities
from hooked_hybrid.niah.word_tokenizer import BOS, EOS, PAD, word_tokenizer

ASK = "\nQUESTION:\n{question}\nANSWER: Here is the most relevant sentence in the context:"
ASK_TUNED = (
    "\nQUESTION:\n{question} Output the most relevant sentence in the context, word by word!"
)

ECHO = 0.4
"""Share of lines that repeat an earlier one: every word of theirs teaches to look back and copy."""


@dataclass(frozen=True)
class Batch:
    """Tokens [batch pos], and which of them are answers, their contents, and ordinary text."""

    tokens: Tensor
    is_answer: Tensor
    is_content: Tensor
    is_text: Tensor


class Maker:
    """Draws batches of one length; the same seed draws the same ones.

    Args:
        seed: of this stream.
    """

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)
        self.tokenizer = word_tokenizer()
        self.cities = training_cities()

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def batch(self, size: int, length: int, n_needles: int, n_questions: int) -> Batch:
        """Return `size` sequences of exactly `length` tokens.

        Raises:
            ValueError: needles and questions do not fit.
        """
        rows = [self._row(length, n_needles, n_questions) for _ in range(size)]
        tokens, kinds = (torch.tensor(part) for part in zip(*rows, strict=True))
        return Batch(tokens, kinds >= 2, kinds == 3, kinds == 1)

    def _row(self, length: int, n_needles: int, n_questions: int) -> tuple[list[int], list[int]]:
        """Return tokens and the kind of each: 0 template, 1 text, 2 answer, 3 its contents."""
        needles = draw_needles(self.rng, n_needles, self.cities)
        asked = self.rng.choices(needles, k=n_questions)
        ends: list[tuple[list[int], list[int]]] = [self._question(needle) for needle in asked]
        n_end = sum(len(ids) for ids, _ in ends)
        start = [BOS, *self.ids("CONTEXT:\n")]
        text = self._context(needles, length - n_end - len(start))
        tokens, kinds = [*start, *text], [0] * len(start) + [1] * len(text)
        for ids, kind in ends:
            tokens += ids
            kinds += kind
        return tokens, kinds

    def _question(self, needle: Needle) -> tuple[list[int], list[int]]:
        template = ASK if self.rng.random() < 0.75 else ASK_TUNED
        question = self.ids(template.format(question=needle.question))
        answer = [*self.ids(needle.sentence), EOS]
        fixed = len(self.ids(needle.sentence.split(" is ")[0])) + 1
        kinds = [2] * fixed + [3] * (len(answer) - fixed - 2) + [2, 2]
        return [*question, *answer], [0] * len(question) + kinds

    def _context(self, needles: list[Needle], length: int) -> list[int]:
        hidden = [self.ids(needle.sentence) for needle in needles]
        room = length - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"{len(needles)} needles do not fit into {length} tokens")
        lines: list[list[int]] = []
        text = sentences(self.rng)
        while sum(map(len, lines)) < room:
            is_echo = bool(lines) and self.rng.random() < ECHO
            lines.append(list(self.rng.choice(lines)) if is_echo else self.ids(next(text)))
        surplus = sum(map(len, lines)) - room
        if surplus:
            lines[-1] = lines[-1][surplus:]
        for needle in hidden:
            lines.insert(self.rng.randint(0, len(lines)), needle)
        return [token for line in lines for token in line]


__all__ = ["EOS", "PAD", "Batch", "Maker"]
