"""Needles: a sentence to hide, the question about it, and the phrases that count as found."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hooked_hybrid.niah.haystacks import words
from hooked_hybrid.outputs.foreign import one_line, read_json

N_HELD_OUT = 60
_HELD_OUT_SEED = 20251


@dataclass(frozen=True)
class Needle:
    """One sentence to hide in a haystack.

    `phrases` are the parts whose presence a graded score counts, in the order of Table 2.1 of the
    thesis: what to make, the place, resting in the place, and the weather.

    Examples:
        >>> from hooked_hybrid.niah import needles
        >>> needles.PAPER.city, needles.PAPER.phrases[0]
        ('San Francisco', 'eat a sandwich')
    """

    sentence: str
    question: str
    city: str
    phrases: tuple[str, str, str, str]

    @property
    def answer(self) -> str:
        """The answer: "eat a sandwich and sit in Dolores Park on a sunny day"."""
        return f"{self.phrases[0]} and {self.phrases[2]} on a {self.phrases[3]}"


@dataclass(frozen=True)
class KeywordNeedle:
    """A user's sentence to hide, in any form, scored by the keywords in the answer.

    Examples:
        >>> from hooked_hybrid.niah.needles import KeywordNeedle
        >>> needle = KeywordNeedle("He has a red hat .", "What has he ?", ("red hat",))
        >>> needle.keywords
        ('red hat',)
    """

    sentence: str
    question: str
    keywords: tuple[str, ...]

    @property
    def city(self) -> None:
        """Empty, as the sentence has another form."""


AnyNeedle = Needle | KeywordNeedle

PAPER = Needle(
    sentence=(
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day."
    ),
    question="What is the best thing to do in San Francisco?",
    city="San Francisco",
    phrases=("eat a sandwich", "Dolores Park", "sit in Dolores Park", "sunny day"),
)
"""The papers' needle, in which a "to" is missing."""


def draw_needle(rng: random.Random, city: str) -> Needle:
    """Return a needle about a city, without any of the paper's phrases.

    Examples:
        >>> import random
        >>> from hooked_hybrid.niah.needles import draw_needle
        >>> draw_needle(random.Random(0), "Riga").city
        'Riga'
    """
    while True:
        make, thing, rest = (rng.choice(w) for w in (words.MAKE, words.THING, words.REST))
        place, kind = rng.choice(words.PLACE), rng.choice(words.KIND_OF_PLACE)
        weather, time = rng.choice(words.WEATHER), rng.choice(words.TIME)
        phrases = (
            f"{make} a {thing}",
            f"{place} {kind}",
            f"{rest} in {place} {kind}",
            f"{weather} {time}",
        )
        if not set(phrases) & set(PAPER.phrases):
            break
    sentence = f"The best thing to do in {city} is {phrases[0]} and {phrases[2]} on a {phrases[3]}."
    return Needle(sentence, f"What is the best thing to do in {city}?", city, phrases)


def all_cities() -> list[str]:
    """Return every city, including the paper's."""
    return [f"{first} {second}" for first in words.CITY_FIRST for second in words.CITY_SECOND]


def held_out_needles() -> list[Needle]:
    """Return the needles for evaluation, whose cities no training text names.

    Examples:
        >>> from hooked_hybrid.niah.needles import held_out_needles
        >>> len(held_out_needles())
        60
    """
    rng = random.Random(_HELD_OUT_SEED)
    cities = [city for city in all_cities() if city != PAPER.city]
    return [draw_needle(rng, city) for city in rng.sample(cities, N_HELD_OUT)]


def training_cities() -> list[str]:
    """Return the cities for training: neither the paper's nor held-out ones."""
    reserved = {PAPER.city, *(needle.city for needle in held_out_needles())}
    return [city for city in all_cities() if city not in reserved]


def draw_needles(rng: random.Random, n: int, cities: Sequence[str]) -> list[Needle]:
    """Return needles about different cities."""
    return [draw_needle(rng, city) for city in rng.sample(cities, n)]


def plain(text: str) -> str:
    """Return the words of a text in lower case, separated by one blank.

    Punctuation becomes a blank, so that "day." and a word-level decoder's "day ." are equal.
    """
    return " ".join(re.sub(r"[^\w\s]|_", " ", text).lower().split())


def known_needles() -> dict[str, Needle]:
    """Return the needles that have a name: "paper", and "held-out-00" to "held-out-59".

    Examples:
        >>> from hooked_hybrid.niah.needles import known_needles
        >>> list(known_needles())[:2]
        ['paper', 'held-out-00']
    """
    return {"paper": PAPER} | {f"held-out-{i:02}": n for i, n in enumerate(held_out_needles())}


def find_needle(needle_id: str) -> Needle:
    """Return the needle of a name.

    Raises:
        ValueError: there is no needle of this name.

    Examples:
        >>> from hooked_hybrid.niah.needles import PAPER, find_needle
        >>> find_needle("paper") == PAPER
        True
    """
    known = known_needles()
    if needle_id not in known:
        raise ValueError(
            f"no needle is called {needle_id!r}: give 'paper', or 'held-out-00' to "
            f"'held-out-{N_HELD_OUT - 1:02}'"
        )
    return known[needle_id]


def needle_ids(needles: Sequence[AnyNeedle | None]) -> list[str]:
    """Return the name of each: "paper", "held-out-07", "none", or "custom-0", "custom-1", ..."""
    names: dict[AnyNeedle | None, str] = {needle: name for name, needle in known_needles().items()}
    names[None] = "none"
    custom = dict.fromkeys(needle for needle in needles if needle not in names)
    names |= {needle: f"custom-{i}" for i, needle in enumerate(custom)}
    return [names[needle] for needle in needles]


def distractors_for(needle: AnyNeedle, n: int, seed: int = 0) -> list[Needle]:
    """Return fixed needles about other cities, without the phrases of `needle`.

    Raises:
        ValueError: `n` below 0 or above the number of cities.

    Examples:
        >>> from hooked_hybrid.niah.needles import PAPER, distractors_for
        >>> len(distractors_for(PAPER, 3))
        3
    """
    cities = [city for city in training_cities() if city not in needle.question]
    if not 0 <= n <= len(cities):
        raise ValueError(f"{n} distractors: give 0 to {len(cities)}, one a city")
    rng = random.Random(f"{seed} {needle.sentence}")
    taken = set(needle.phrases) if isinstance(needle, Needle) else set()
    found: list[Needle] = []
    for city in rng.sample(cities, n):
        drawn = draw_needle(rng, city)
        while taken & set(drawn.phrases):
            drawn = draw_needle(rng, city)
        found.append(drawn)
    return found


def custom_needle(sentence: str, question: str, keywords: Sequence[str]) -> KeywordNeedle:
    """Return a user's needle.

    Args:
        sentence: the sentence to hide, with its full stop.
        question: the question of the prompt.
        keywords: words or phrases of the sentence, which have equal parts of the score.

    Raises:
        ValueError: an empty text, a keyword given twice, or one that is not in the sentence.

    Examples:
        >>> from hooked_hybrid.niah.needles import custom_needle
        >>> custom_needle("He has a red hat .", "What has he ?", ["red hat"]).keywords
        ('red hat',)
    """
    for name, value in (("sentence", sentence), ("question", question)):
        if not plain(value):
            raise ValueError(f"{name}={value!r}: give a text with at least one word")
    if isinstance(keywords, str) or not keywords:
        raise ValueError(f"keywords={keywords!r}: give a list of at least one word or phrase")
    if bad := [word for word in keywords if not plain(word)]:
        raise ValueError(f"keywords {bad}: give texts with at least one word each")
    if absent := [word for word in keywords if not holds(sentence, word)]:
        raise ValueError(f"keywords {absent} are not in the sentence {sentence!r}")
    if len({plain(word) for word in keywords}) < len(keywords):
        raise ValueError(f"keywords {list(keywords)}: each may stand once")
    return KeywordNeedle(sentence, question, tuple(keywords))


def holds(text: str, phrase: str) -> bool:
    """Whether a text contains a phrase as whole words, the last one in singular or plural.

    So "sunny day" is in "sunny days", as in the thesis, and "a pen" is not in "a pencil".
    Only letters a to z bound words: in other scripts a phrase counts anywhere in the text.
    """
    phrase = re.escape(plain(phrase))
    return re.search(rf"(?<![a-z0-9]){phrase}(?:e?s)?(?![a-z0-9])", plain(text)) is not None


def load_needles(path: str | Path) -> list[KeywordNeedle]:
    """Return the needles of a JSON file: a list of {"sentence", "question", "keywords"}.

    Raises:
        ValueError: the file is missing, is not such a list, or contains an invalid needle; the
            message names it.

    Examples:
        >>> import json
        >>> from pathlib import Path
        >>> from hooked_hybrid.niah.needles import load_needles
        >>> one = {"sentence": "He has a red hat .", "question": "What has he ?"}
        >>> one["keywords"] = ["red hat"]
        >>> n = Path("needles.json").write_text(json.dumps([one]))
        >>> load_needles("needles.json")[0].keywords
        ('red hat',)
    """
    try:
        content = read_json(Path(path), may_be_pipe=True)
    except OSError as error:
        raise ValueError(f"the needles {path} cannot be read: {error.strerror}") from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"the needles {path} are not JSON ({one_line(error)})") from error
    if not isinstance(content, list) or not content:
        raise ValueError(f"{path} holds no needles: give a JSON list of at least one")
    return [_parse(entry, f"{path}, needle {i}") for i, entry in enumerate(content)]


def _parse(entry: Any, place: str) -> KeywordNeedle:
    wanted = {"sentence", "question", "keywords"}
    if not isinstance(entry, dict) or set(entry) != wanted:
        found = sorted(entry) if isinstance(entry, dict) else entry
        raise ValueError(f"{place}: give exactly {sorted(wanted)}; found {one_line(repr(found))}")
    texts, keywords = (entry["sentence"], entry["question"]), entry["keywords"]
    if not (isinstance(keywords, list) and all(isinstance(t, str) for t in (*texts, *keywords))):
        raise ValueError(f"{place}: sentence and question are texts, keywords is a list of texts")
    try:
        return custom_needle(**entry)
    except ValueError as error:
        raise ValueError(f"{place}: {error}") from error
