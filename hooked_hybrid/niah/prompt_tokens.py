"""The tokens of a prompt, assembled to a given length from pieces that are encoded once."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from hooked_hybrid.niah.boundaries import CHARACTER, NONE, SENTENCE, WORD, kinds_of, token_ends
from hooked_hybrid.text.text import Text

HAYSTACK, QUESTION = "{haystack}", "{question}"
_SEARCH = 1024  # tokens beyond the haystack to search for the end of its last sentence

LONGEST = 256
"""After this many tokens without the end of a sentence, the end of a word is used."""

Tokens = list[int]


class NeedlePlace(NamedTuple):
    """The place of a needle in a haystack: the token after it, and the kind of boundary."""

    at: int
    kind: int


class Haystack(NamedTuple):
    """Tokens of text, the boundary after each (see `boundaries`), whether it ends a sentence."""

    tokens: Tokens
    kinds: list[int]
    is_closed: bool


@dataclass(frozen=True)
class PromptParts:
    """The tokens of a needle's prompts: template around each haystack, sentence, distractors."""

    question: str
    template: list[Tokens]
    sentence: Tokens
    distractors: list[Tokens]

    @property
    def copies(self) -> int:
        """Number of copies of the haystack in the prompt."""
        return len(self.template) - 1

    @property
    def n_hidden(self) -> int:
        """Tokens of needle and distractors, in one haystack."""
        return len(self.sentence) + sum(map(len, self.distractors))

    @property
    def shortest(self) -> int:
        """Tokens of a prompt without haystack."""
        return sum(map(len, self.template)) + self.copies * self.n_hidden


@dataclass(frozen=True)
class Filler:
    """A haystack with distractors, and the boundary before each token, `NONE` in distractors."""

    tokens: Tokens
    before: list[int]
    is_closed: bool

    def place(self, depth: float) -> NeedlePlace:
        """Return the place at a depth, or the nearest before it; depth 1 is the end.

        It is at the end of a sentence; if none ends within `LONGEST` tokens, at the end of a word;
        if no word does (in scripts without blanks), at the end of a character.
        """
        n = len(self.tokens)
        if depth == 1 or not n:
            return NeedlePlace(n, SENTENCE)
        asked = int(n * depth)
        for kind in (SENTENCE, WORD, CHARACTER):
            last = next((p for p in range(asked, 0, -1) if self.before[p] >= kind), 0)
            end = n if self.is_closed else last + LONGEST + 1
            after = next((p for p in range(asked + 1, n) if self.before[p] >= kind), end)
            if after - last <= LONGEST:
                break
        return NeedlePlace(last, SENTENCE if last == 0 else kind)


class Maker:
    """Builds prompts of one template and haystack.

    Args:
        text: the tokenizer.
        haystack: an endless sequence of pieces of text.
        template: text with `{question}` and, once or more, `{haystack}`.
        is_chat: whether the template is a user's message in the tokenizer's chat template.
        prepend_bos: None is the tokenizer's default; a chat template has its own BOS.

    Raises:
        ValueError: no chat template, or one that changes the message.
    """

    def __init__(
        self,
        text: Text,
        haystack: Iterator[str],
        template: str,
        is_chat: bool,
        prepend_bos: bool | None,
    ) -> None:
        self.text, self.haystack = text, haystack
        self.template = _as_chat(text, template) if is_chat else template
        trained = text.prepends_bos and not is_chat
        self.prepend_bos = trained if prepend_bos is None else prepend_bos
        self._stream: Tokens = []
        self._kinds: list[int] = []
        self._fillers: dict[tuple[int, tuple[tuple[int, ...], ...]], Filler] = {}

    def parts(
        self, question: str, needle: Sequence[str], distractors: Sequence[str]
    ) -> PromptParts:
        """Return the tokens of a question's prompts; `needle` is one sentence, or none.

        Raises:
            ValueError: the tokenizer cannot encode a word of them.
        """
        for sentence in (*needle, question, *distractors):
            if lost := [word for word in sentence.split() if not self._is_held(word)]:
                raise ValueError(f"the tokenizer cannot hold {lost} of {sentence!r}")
        first, *others = self.template.replace(QUESTION, question).split(HAYSTACK)
        template = [self.text.encode(first, self.prepend_bos), *map(self._read_on, others)]
        sentences = [self._read_on(f" {sentence}") for sentence in (*needle, *distractors)]
        hidden = sentences[0] if needle else []
        return PromptParts(question, template, hidden, sentences[len(needle) :])

    def tokens(
        self, parts: PromptParts, length: int, depth: float
    ) -> tuple[Tokens, list[tuple[int, int]], float, int]:
        """Return a prompt of exactly `length` tokens, and [start, stop) of each needle in it.

        Also the share of the first haystack before the needle, and the boundary there.

        Raises:
            ValueError: the tokenizer makes no tokens of the haystack.
        """
        room, spare = divmod(length - parts.shortest, parts.copies)
        tokens = list(parts.template[0])
        spans: list[tuple[int, int]] = []
        found: list[tuple[float, int]] = []
        for copy, after in enumerate(parts.template[1:]):
            filler = self._filler(room + (copy < spare), parts.distractors)
            at, kind = filler.place(depth)
            found.append((at / len(filler.tokens) if filler.tokens else depth, kind))
            start = len(tokens) + at
            if parts.sentence:
                spans.append((start, start + len(parts.sentence)))
            tokens += [*filler.tokens[:at], *parts.sentence, *filler.tokens[at:], *after]
        return tokens, spans, *found[0]

    def _read_on(self, text: str) -> Tokens:
        """Return the tokens of a text within a document, without marks of its beginning."""
        return self._read_on_from(text)[0]

    def _read_on_from(self, text: str) -> tuple[Tokens, str, int]:
        """Return the tokens, the text that was encoded, and the number of its other tokens."""
        before, both = (self.text.encode(t, prepend_bos=False) for t in (".", f".{text}"))
        n = len(before)
        if both[:n] == before:
            return both[n:], f".{text}", n
        return self.text.encode(text, prepend_bos=False), text, 0

    def _piece(self, text: str) -> tuple[Tokens, list[int]]:
        """Return the tokens of a piece of haystack, and the boundary after each."""
        tokens, encoded, n = self._read_on_from(text)
        whole = [*self.text.encode(".", prepend_bos=False), *tokens] if n else tokens
        ends = token_ends(self.text.tokenizer, encoded, whole, self.text.decode)
        if ends is not None:
            return tokens, kinds_of(encoded, ends[n:], len(encoded) - len(text))
        marks = [self.text.decode([t]).rstrip(" ").endswith((".", "!", "?", "\n")) for t in tokens]
        return tokens, [SENTENCE if is_end else CHARACTER for is_end in marks]

    def _is_held(self, word: str) -> bool:
        try:
            back = self.text.decode(self.text.encode(word, prepend_bos=False))
        except Exception:  # `tokenizers` raises a bare one if there is no unknown token
            return False
        return _letters(back) == _letters(word)

    def _filler(self, n: int, distractors: list[Tokens]) -> Filler:
        """Return `n` tokens of haystack, with the distractors distributed over it."""
        key = (n, tuple(map(tuple, distractors)))
        if key not in self._fillers:
            self._fillers[key] = self._spread(self._trimmed(n), distractors)
        return self._fillers[key]

    def _trimmed(self, n: int) -> Haystack:
        """Return `n` tokens that end with a sentence, whose beginning is cut if necessary."""
        self._reach(n + _SEARCH)
        stop = next((p for p in range(n, n + _SEARCH + 1) if self._ends(p)), None)
        if stop is None:
            return Haystack(self._stream[:n], self._kinds[:n], is_closed=False)
        whole = max((p for p in range(1, n) if self._ends(p)), default=0)
        tokens, kinds = (
            part[:whole] + part[stop - (n - whole) : stop] for part in (self._stream, self._kinds)
        )
        return Haystack(tokens, kinds, is_closed=stop - whole <= LONGEST)

    def _spread(self, haystack: Haystack, distractors: list[Tokens]) -> Filler:
        """Insert distractors evenly, at ends of sentences or, without these, between words."""
        n = len(haystack.tokens)
        for kind in (SENTENCE, WORD, CHARACTER):
            free = [p for p in range(1, n) if haystack.kinds[p - 1] >= kind]
            if free or (haystack.is_closed and n <= LONGEST):
                break
        places: list[int] = []
        for i in range(len(distractors)):
            target = n * (i + 1) // (len(distractors) + 1)
            places.append(max((p for p in free if p <= target), default=min(free, default=0)))
            free = [p for p in free if p != places[-1]]
        tokens: Tokens = []
        before, start = [SENTENCE], 0  # the boundary before the next token
        for place, distractor in sorted(zip(places, distractors, strict=True), key=lambda x: x[0]):
            tokens += haystack.tokens[start:place] + distractor
            before += haystack.kinds[start:place] + [NONE] * len(distractor)
            before[len(tokens) - len(distractor)] = NONE
            start = place
        before += haystack.kinds[start:]
        return Filler(tokens + haystack.tokens[start:], before, haystack.is_closed)

    def _reach(self, n: int) -> None:
        """Encode haystack until there are `n` tokens."""
        n_empty = 0
        while len(self._stream) < n:
            tokens, kinds = self._piece(next(self.haystack))
            n_empty = 0 if tokens else n_empty + 1
            if n_empty > _SEARCH:
                raise ValueError("the tokenizer makes no tokens of the haystack's text")
            self._stream += tokens
            self._kinds += kinds

    def _ends(self, n: int) -> bool:
        return n == 0 or self._kinds[n - 1] == SENTENCE


def _as_chat(text: Text, message: str) -> str:
    """Return the text of a conversation in which the user says `message`."""
    template = getattr(text.tokenizer, "apply_chat_template", None)
    if template is None:
        raise ValueError("this tokenizer has no chat template: use 'base' or 'instruct'")
    said = [{"role": "user", "content": message}]
    chat = str(template(said, add_generation_prompt=True, tokenize=False))
    if message.strip() not in chat or chat.count(HAYSTACK) != message.count(HAYSTACK):
        raise ValueError("the chat template changes what the user says: use 'base' or 'instruct'")
    return chat


def _letters(text: str) -> str:
    """Return a text without differences that tokenizers may normalise: case, blanks, forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
