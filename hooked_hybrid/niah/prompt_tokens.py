"""The tokens of one prompt: pieces are encoded once, kept, and put together to a stated length."""

from __future__ import annotations

import unicodedata
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hooked_hybrid.text import Text

HAYSTACK, QUESTION = "{haystack}", "{question}"
_SEARCH = 1024  # tokens beyond the haystack in which the end of its last sentence is looked for

Tokens = list[int]


@dataclass(frozen=True)
class Parts:
    """Tokens of a needle's prompts: template around each haystack, sentence, distractors."""

    question: str
    template: list[Tokens]
    sentence: Tokens
    distractors: list[Tokens]

    @property
    def copies(self) -> int:
        """How often the haystack stands in the prompt."""
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
    """A haystack with its distractors, and where a needle may stand: 0 and ends of sentences."""

    tokens: Tokens
    cuts: list[int]

    def place(self, depth: float) -> int:
        """Return the place at a depth, or the nearest before it; depth 1 is the very end."""
        n = len(self.tokens)
        return n if depth == 1 else self.cuts[bisect_right(self.cuts, int(n * depth)) - 1]


class Maker:
    """Builds prompts of one template and haystack.

    Args:
        text: the tokenizer.
        haystack: pieces of text without end.
        template: text with `{question}` and, once or more, `{haystack}`.
        is_chat: whether the template is a user's message, for the tokenizer's chat template.
        prepend_bos: None does as the model was trained; a chat template brings its own BOS.

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
        self._ends_sentence: dict[int, bool] = {}
        self._fillers: dict[tuple[int, tuple[tuple[int, ...], ...]], Filler] = {}

    def parts(self, question: str, needle: Sequence[str], distractors: Sequence[str]) -> Parts:
        """Return the tokens of a question's prompts; `needle` is one sentence, or none.

        Raises:
            ValueError: the tokenizer cannot hold a word of them.
        """
        for sentence in (*needle, question, *distractors):
            if lost := [word for word in sentence.split() if not self._is_held(word)]:
                raise ValueError(f"the tokenizer cannot hold {lost} of {sentence!r}")
        first, *others = self.template.replace(QUESTION, question).split(HAYSTACK)
        template = [self.text.encode(first, self.prepend_bos), *map(self._read_on, others)]
        sentences = [self._read_on(f" {sentence}") for sentence in (*needle, *distractors)]
        hidden = sentences[0] if needle else []
        return Parts(question, template, hidden, sentences[len(needle) :])

    def tokens(
        self, parts: Parts, length: int, depth: float
    ) -> tuple[Tokens, list[tuple[int, int]]]:
        """Return a prompt of exactly `length` tokens, and [start, stop) of each needle in it.

        Raises:
            ValueError: the tokenizer makes no tokens of the haystack.
        """
        room, spare = divmod(length - parts.shortest, parts.copies)
        tokens = list(parts.template[0])
        spans: list[tuple[int, int]] = []
        for copy, after in enumerate(parts.template[1:]):
            filler = self._filler(room + (copy < spare), parts.distractors)
            at = filler.place(depth)
            start = len(tokens) + at
            if parts.sentence:
                spans.append((start, start + len(parts.sentence)))
            tokens += [*filler.tokens[:at], *parts.sentence, *filler.tokens[at:], *after]
        return tokens, spans

    def _read_on(self, text: str) -> Tokens:
        """Return the tokens of a text as it reads after a sentence: no mark of a new document."""
        before, both = (self.text.encode(t, prepend_bos=False) for t in (".", f".{text}"))
        n = len(before)
        return both[n:] if both[:n] == before else self.text.encode(text, prepend_bos=False)

    def _is_held(self, word: str) -> bool:
        try:
            back = self.text.decode(self.text.encode(word, prepend_bos=False))
        except Exception:  # `tokenizers` raises a bare one where there is no unknown token
            return False
        return _letters(back) == _letters(word)

    def _filler(self, n: int, distractors: list[Tokens]) -> Filler:
        """Return `n` tokens of haystack with the distractors spread over it."""
        key = (n, tuple(map(tuple, distractors)))
        if key not in self._fillers:
            self._fillers[key] = self._spread(self._trimmed(n), distractors)
        return self._fillers[key]

    def _trimmed(self, n: int) -> Tokens:
        """Return `n` tokens that end with a sentence: its beginning is left out where need be."""
        self._reach(n + _SEARCH)
        stop = next((p for p in range(n, n + _SEARCH + 1) if self._ends(p)), None)
        if stop is None:
            return self._stream[:n]
        whole = max((p for p in range(1, n) if self._ends(p)), default=0)
        return self._stream[:whole] + self._stream[stop - (n - whole) : stop]

    def _spread(self, haystack: Tokens, distractors: list[Tokens]) -> Filler:
        """Put distractors at ends of sentences, evenly; the needle stands at others, or first."""
        n = len(haystack)
        free = [p for p in range(1, n) if self._ends_a_sentence(haystack[p - 1])]
        places: list[int] = []
        for i in range(len(distractors)):
            target = n * (i + 1) // (len(distractors) + 1)
            places.append(max((p for p in free if p <= target), default=min(free, default=0)))
            free = [p for p in free if p != places[-1]]
        tokens: Tokens = []
        cuts, start = [0], 0
        for place, distractor in sorted(zip(places, distractors, strict=True), key=lambda x: x[0]):
            cuts += [len(tokens) + p - start for p in free if start < p < place]
            tokens += haystack[start:place] + distractor
            start = place
        cuts += [len(tokens) + p - start for p in free if p > start]
        return Filler(tokens + haystack[start:], cuts)

    def _reach(self, n: int) -> None:
        """Encode haystack until there are `n` tokens."""
        n_empty = 0
        while len(self._stream) < n:
            tokens = self._read_on(next(self.haystack))
            n_empty = 0 if tokens else n_empty + 1
            if n_empty > _SEARCH:
                raise ValueError("the tokenizer makes no tokens of the haystack's text")
            self._stream += tokens

    def _ends(self, n: int) -> bool:
        return n == 0 or self._ends_a_sentence(self._stream[n - 1])

    def _ends_a_sentence(self, token: int) -> bool:
        if token not in self._ends_sentence:
            piece = self.text.decode([token])
            self._ends_sentence[token] = piece.rstrip(" ").endswith((".", "!", "?", "\n"))
        return self._ends_sentence[token]


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
    """Return a text without what tokenizers may normalise: case, blanks, compatible forms."""
    return "".join(unicodedata.normalize("NFKC", text).casefold().split())
