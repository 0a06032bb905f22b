"""Training sequences of the packaged models: needles in ordinary text, several questions each."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_hybrid.niah.haystacks.haystack import sentences
from hooked_hybrid.niah.haystacks.word_tokenizer import BOS, EOS
from hooked_hybrid.niah.haystacks.words import SPECIAL, vocabulary
from hooked_hybrid.niah.needles import Needle, draw_needles, training_cities

ASK = "\nQUESTION:\n{question}\nANSWER: Here is the most relevant sentence in the context:"
ASK_TUNED = (
    "\nQUESTION:\n{question} Output the most relevant sentence in the context, word by word!"
)
TEMPLATE, TEXT, ANSWER, CONTENT, DRILL = range(5)
"""Kinds of tokens; contents are the drawn words of an answer, without its frame."""

DRILL_WORDS = random.Random(0).sample(
    range(len(SPECIAL), len(vocabulary())), len(vocabulary()) - len(SPECIAL)
)
_FRAME = frozenset(". a and in on".split())


@dataclass(frozen=True)
class Size:
    """The size of a sequence: tokens, most needles, most questions.

    `drills` is the share of rows that are drills instead, `words` the vocabulary these draw from.
    """

    length: int
    needles: int
    questions: int
    drills: float = 0.0
    words: int = len(vocabulary())


@dataclass(frozen=True)
class TokenBatch:
    """Tokens [batch pos], and the kind of each."""

    tokens: Tensor
    kinds: Tensor


class Maker:
    """A maker of batches, which its seed determines.

    Args:
        seed: of this stream.
        echo: share of lines that repeat an earlier one, every word of which can be copied.
    """

    def __init__(self, seed: int, echo: float = 0.0) -> None:
        self.rng = random.Random(seed)
        self.echo = echo
        self.ids_of = {word: i for i, word in enumerate(vocabulary())}
        self.cities = training_cities()

    def ids(self, text: str) -> list[int]:
        """Return the tokens of a text, as `word_tokenizer` does, but faster."""
        return [self.ids_of[word] for word in re.findall(r"\n|\w+|[^\w\s]", text)]

    def batch(self, rows: int, size: Size) -> TokenBatch:
        """Return `rows` sequences of exactly `size.length` tokens.

        Raises:
            ValueError: needles and questions do not fit.
        """
        made = [self._row(size) for _ in range(rows)]
        tokens, kinds = (torch.tensor(part) for part in zip(*made, strict=True))
        return TokenBatch(tokens, kinds)

    def _row(self, size: Size) -> tuple[list[int], list[int]]:
        """Return tokens and the kind of each."""
        if self.rng.random() < size.drills:
            return self._drill(size)
        # Mostly the most needles, so that no state could contain them all.
        full = self.rng.random() < 0.7
        n_needles = size.needles if full else self.rng.randint(1, size.needles)
        needles = draw_needles(self.rng, n_needles, self.cities)
        asked = self.rng.sample(needles, min(size.questions, n_needles))
        ends = [self._question(needle) for needle in asked]
        n_end = sum(len(ids) for ids, _ in ends)
        start = [BOS, *self.ids("CONTEXT:\n")]
        text = self._context(needles, size.length - n_end - len(start))
        tokens, kinds = [*start, *text], [TEMPLATE] * len(start) + [TEXT] * len(text)
        for ids, kind in ends:
            tokens += ids
            kinds += kind
        return tokens, kinds

    def _drill(self, size: Size) -> tuple[list[int], list[int]]:
        """Return a few motifs of random words, again and again in random order.

        After its first occurrence, a motif can be copied from its second word on. That a row has
        few words is learned first, without copying.
        """
        motifs = [
            self.rng.choices(DRILL_WORDS[: size.words], k=self.rng.randint(3, 10))
            for _ in range(self.rng.randint(2, max(2, size.length // 24)))
        ]
        tokens, kinds, seen = [BOS], [TEMPLATE], set()
        while len(tokens) < size.length:
            which = self.rng.randrange(len(motifs))
            tokens += motifs[which]
            kinds += [TEMPLATE, *[DRILL if which in seen else TEMPLATE] * (len(motifs[which]) - 1)]
            seen.add(which)
        return tokens[: size.length], kinds[: size.length]

    def _question(self, needle: Needle) -> tuple[list[int], list[int]]:
        template = ASK if self.rng.random() < 0.75 else ASK_TUNED
        question = self.ids(template.format(question=needle.question))
        frame, content = needle.sentence.split(" is ")
        kinds = [ANSWER] * len(self.ids(f"{frame} is"))
        kinds += [ANSWER if w in _FRAME else CONTENT for w in re.findall(r"\w+|\.", content)]
        answer = [*self.ids(needle.sentence), EOS]
        return [*question, *answer], [TEMPLATE] * len(question) + [*kinds, ANSWER]

    def _context(self, needles: list[Needle], length: int) -> list[int]:
        hidden = [self.ids(needle.sentence) for needle in needles]
        room = length - sum(map(len, hidden))
        if room < 0:
            raise ValueError(f"{len(needles)} needles do not fit into {length} tokens")
        lines: list[list[int]] = []
        text, n_words = sentences(self.rng), 0
        while n_words < room:
            is_echo = bool(lines) and self.rng.random() < self.echo
            lines.append(list(self.rng.choice(lines)) if is_echo else self.ids(next(text)))
            n_words += len(lines[-1])
        if n_words > room:
            lines[-1] = lines[-1][n_words - room :]
        for needle in hidden:
            lines.insert(self.rng.randint(0, len(lines)), needle)
        return [token for line in lines for token in line]
