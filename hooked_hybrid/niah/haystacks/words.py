"""The words of the packaged models, used in needles, haystacks and templates."""

from __future__ import annotations

CITY_FIRST = """
San Port New East West Saint Fort Lake Mount Old Grand Little Cape Glen North South
""".split()
CITY_SECOND = """
Francisco Diego Haven Orleans Albans Moritz Bern Lugano Perth Cairo Lima Oslo Riga Tampa Boston
Denver Austin Dover Salem Verona Parma Siena Lucca Turin Genoa Malaga Toledo Porto Braga Ghent
Lille Nantes Bonn Kiel Basel Zurich Vienna Linz Graz Krakow
""".split()
MAKE = """
eat make buy find paint carry sell bake draw fix hide taste borrow fold rent collect
""".split()
THING = """
sandwich pear kite basket lantern book candle cake map hat flute drum pie boat shirt bicycle pot
chair clock coat ring rope ball blanket bottle box brush bucket button camera carpet coin comb cup
desk doll door fan feather flag fork guitar hammer jar key knife ladder lamp mask mirror needle pen
pencil piano pillow plate puzzle radio scarf spoon
""".split()
REST = """
sit walk sing sleep dance read run wait talk swim sketch whistle laugh picnic rest dream
""".split()
PLACE = """
Dolores Marina Alder Birch Cedar Elm Maple Willow Rose Lily Daisy Violet Clover Holly Ivy Laurel
Juniper Hazel Aspen Poplar Linden Sage Basil Fern Heather Iris Jasmine Myrtle Olive Poppy Raven
Falcon Heron Robin Sparrow Swallow Eagle Dove Crane Finch Otter Badger Fox Deer Bear Wolf Lynx Hare
Salmon Trout Pike Perch Amber Coral Opal Pearl Ruby Jade Onyx Topaz
""".split()
KIND_OF_PLACE = "Park Street Garden Square Hall Bridge Market Harbor Meadow Tower".split()
WEATHER = """
sunny rainy windy cold warm quiet foggy bright snowy stormy cloudy mild busy calm dry golden
""".split()
TIME = "day morning evening night afternoon weekend".split()

TOPICS: tuple[tuple[str, str, str], ...] = (
    (
        "startup founder company investor product market customer partner office idea deal plan",
        "build launch fund grow sell change",
        "small early rich risky young ambitious",
    ),
    (
        "program language compiler function bug editor hacker library machine syntax error",
        "write compile read test delete rewrite",
        "fast ugly elegant short broken clever",
    ),
    (
        "painter canvas color light museum portrait line shadow studio picture frame master",
        "paint study copy admire finish hang",
        "dark bright famous unfinished large old",
    ),
    (
        "teacher school student lesson exam college class essay grade library subject answer",
        "learn teach solve forget repeat explain",
        "boring hard easy important strict curious",
    ),
    (
        "river mountain forest stone valley bird tree cloud lake field path storm",
        "cross climb follow watch reach leave",
        "high wide deep green silent distant",
    ),
    (
        "city road station train crowd shop window tower bus traffic corner bridge",
        "visit enter cross leave find miss",
        "noisy narrow modern empty crowded long",
    ),
    (
        "kitchen bread soup table salt dinner oven cook knife recipe guest meal",
        "cook serve cut share taste burn",
        "hot fresh sweet simple heavy spicy",
    ),
    (
        "king army war treaty castle border soldier enemy law court rebel crown",
        "attack defend sign break rule betray",
        "cruel loyal weak powerful ancient secret",
    ),
    (
        "doctor patient fever medicine nurse hospital bed wound habit sleep pain cure",
        "treat heal examine catch avoid measure",
        "sick tired strong rare healthy careful",
    ),
    (
        "song drum concert singer note melody stage band record listener voice string",
        "play hear sing record perform tune",
        "loud soft slow popular sad perfect",
    ),
    (
        "ship captain sea island harbor wave sailor anchor wind coast chart deck",
        "sail steer find board load repair",
        "wooden lost rough calm heavy foreign",
    ),
    (
        "scientist theory experiment star planet number proof telescope law paper result question",
        "prove observe doubt publish predict discover",
        "strange exact tiny huge false obvious",
    ),
)
"""Nouns, verbs and adjectives of each topic."""
DETERMINERS = "the a this every one another".split()
PREPOSITIONS = "near behind without before after about under with".split()
ADVERBS = "often slowly rarely usually quickly never always perhaps suddenly again".split()
CONJUNCTIONS = "and but because while so".split()
AUXILIARY = ["can"]

SPECIAL = ["<pad>", "<eos>", "<bos>", "<unk>"]
TEMPLATE_WORDS = """
CONTEXT QUESTION ANSWER Here is the most relevant sentence in the context Output word by What best
thing to do The and on a in
""".split()
PUNCTUATION = [":", ".", "?", ",", "!", "\n"]


def vocabulary() -> list[str]:
    """Return every word of the packaged models, special tokens first, each once."""
    topics = [word for topic in TOPICS for words in topic for word in words.split()]
    groups = (
        SPECIAL, PUNCTUATION, TEMPLATE_WORDS, CITY_FIRST, CITY_SECOND, MAKE, THING, REST, PLACE,
        KIND_OF_PLACE, WEATHER, TIME, DETERMINERS, PREPOSITIONS, ADVERBS, CONJUNCTIONS, AUXILIARY,
        topics,
    )  # fmt: skip
    capitalised = [word.capitalize() for word in (*DETERMINERS, *ADVERBS)]
    return list(dict.fromkeys([word for group in groups for word in group] + capitalised))
