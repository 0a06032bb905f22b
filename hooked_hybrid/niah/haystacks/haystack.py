"""Generated text in which to hide a needle, with topics that persist over several lines."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hooked_hybrid.niah.haystacks import words


def sentences(rng: random.Random) -> Iterator[str]:
    """Yield endless sentences; each topic lasts for some of them."""
    while True:
        topic = rng.choice(words.TOPICS)
        for _ in range(rng.randint(3, 7)):
            yield _sentence(rng, topic)


def _sentence(rng: random.Random, topic: tuple[str, str, str]) -> str:
    text = _clause(rng, topic)
    form = rng.random()
    if form < 0.25:
        text = f"{rng.choice(words.ADVERBS)} , {text}"
    elif form < 0.5:
        text = f"{text} {rng.choice(words.CONJUNCTIONS)} {_clause(rng, topic)}"
    return f"{text[0].upper()}{text[1:]} ."


def _clause(rng: random.Random, topic: tuple[str, str, str]) -> str:
    _, verbs, _ = topic
    verb = _often_the_first(rng, verbs)
    text = f"{_noun(rng, topic)} can {verb} {_noun(rng, topic)}"
    if rng.random() < 0.3:
        text += f" {rng.choice(words.PREPOSITIONS)} {_noun(rng, topic)}"
    return text


def _noun(rng: random.Random, topic: tuple[str, str, str]) -> str:
    nouns, _, adjectives = topic
    middle = f"{_often_the_first(rng, adjectives)} " if rng.random() < 0.4 else ""
    return f"{rng.choice(words.DETERMINERS)} {middle}{_often_the_first(rng, nouns)}"


def _often_the_first(rng: random.Random, choices: str) -> str:
    """Return a word with probability proportional to 1 / rank."""
    options = choices.split()
    return rng.choices(options, [1 / rank for rank in range(1, len(options) + 1)])[0]
