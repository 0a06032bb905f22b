"""Needles: a sentence to hide, the question that asks for it, and what counts as found."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from hooked_hybrid.niah import words

N_HELD_OUT = 60
_HELD_OUT_SEED = 20251


@dataclass(frozen=True)
class Needle:
    """One sentence to hide in a haystack.

    `phrases` are the parts whose presence a graded score counts, in the order of Table 2.1 of the
    thesis: what to make, the place, resting in the place, and the weather.
    """

    sentence: str
    question: str
    city: str
    phrases: tuple[str, str, str, str]


PAPER = Needle(
    sentence=(
        "The best thing to do in San Francisco is eat a sandwich and sit in Dolores Park on a "
        "sunny day."
    ),
    question="What is the best thing to do in San Francisco?",
    city="San Francisco",
    phrases=("eat a sandwich", "Dolores Park", "sit in Dolores Park", "sunny day"),
)
"""The papers' needle; the missing "to" is theirs."""


def draw_needle(rng: random.Random, city: str) -> Needle:
    """Return a needle about a city, none of whose phrases is the paper's."""
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
    """Return every city there is, the paper's included."""
    return [f"{first} {second}" for first in words.CITY_FIRST for second in words.CITY_SECOND]


def held_out_needles() -> list[Needle]:
    """Return the needles that evaluation uses: no training text names their cities."""
    rng = random.Random(_HELD_OUT_SEED)
    cities = [city for city in all_cities() if city != PAPER.city]
    return [draw_needle(rng, city) for city in rng.sample(cities, N_HELD_OUT)]


def training_cities() -> list[str]:
    """Return the cities of training: neither the paper's nor a held-out one."""
    reserved = {PAPER.city, *(needle.city for needle in held_out_needles())}
    return [city for city in all_cities() if city not in reserved]


def draw_needles(rng: random.Random, n: int, cities: Sequence[str]) -> list[Needle]:
    """Return needles about different cities."""
    return [draw_needle(rng, city) for city in rng.sample(cities, n)]
