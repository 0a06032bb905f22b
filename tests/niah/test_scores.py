"""Scores of answers: the thesis's Table 2.1 row by row, the match of strings, the released code."""

from __future__ import annotations

from random import Random

import pytest

from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer
from hooked_hybrid.niah.needles import (
    PAPER,
    Needle,
    custom_needle,
    draw_needle,
    held_out_needles,
    training_cities,
)
from hooked_hybrid.niah.scores import accuracy, binary, graded, released

ANSWER = "eat a sandwich and sit in Dolores Park on a sunny day"

# answer, graded, binary, released
TABLE: list[tuple[str, float, bool, float]] = [
    ("", 0, False, 0),
    ("I do not know.", 0, False, 0),
    ("eat a sandwich", 1, False, 1),
    ("Dolores Park", 0.5, False, 0.5),
    ("sit in Dolores Park", 1, False, 1),
    ("sunny day", 1, False, 0),
    ("on a sunny day", 1, False, 1),
    ("Walk to Dolores Park and eat a sandwich.", 1.5, False, 1.5),
    ("eat a sandwich in Dolores Park on a sunny day", 2.5, False, 2.5),
    ("eat a sandwich and sit in Dolores Park", 2, False, 2),
    ("eat a sandwich and sit in Dolores Park on sunny days", 3, False, 2),
    (ANSWER, 3, True, 3),
    ("eat a sandwich and sit in Dolores Park on a sunny day .", 3, True, 3),
    (f"is {ANSWER}", 3, True, 3),
    (f"is to {ANSWER}", 4, True, 3),
    (f"It is to {ANSWER}.", 4, True, 3),
    (f"The best thing to do in San Francisco is to {ANSWER}.", 4, True, 4),
    (PAPER.sentence, 5, True, 5),
    (PAPER.sentence.upper(), 5, True, 5),
    (PAPER.sentence.replace(" ", " \n "), 5, True, 5),
    (PAPER.sentence.replace(".", " ."), 5, True, 5),
    (f'"{PAPER.sentence}" That is all.', 5, True, 5),
    (PAPER.question, 0, False, 1),
    ("The best thing to do in San Francisco is to leave.", 0, False, 1),
    ("The best thing to do in San Diego is sit in Alder Park.", 0, False, 0),
    ("beat a sandwich , sunny daylight , sit in Dolores Parking", 0, False, 2),
]


@pytest.mark.parametrize(("output", "points", "whole", "theirs"), TABLE)
def test_each_answer_gets_the_points_of_the_table(
    output: str, points: float, whole: bool, theirs: float
):
    assert graded(output, PAPER) == points
    assert binary(output, PAPER) is whole
    assert released(output, PAPER) == theirs


def test_only_the_released_score_pays_for_an_echo_of_the_question():
    for needle in (PAPER, *held_out_needles()):
        assert graded(needle.question, needle) == 0 and not binary(needle.question, needle)
        assert released(needle.question, needle) == 1


def test_every_needle_is_scored_as_the_papers_is():
    rng, cities = Random(0), training_cities()
    drawn = [draw_needle(rng, rng.choice(cities)) for _ in range(50)]
    for needle in (*held_out_needles(), *drawn):
        make, place, rest, weather = needle.phrases
        rows = {
            make: (1, 1),
            place: (0.5, 0.5),
            rest: (1, 1),
            weather: (1, 0),
            needle.answer: (3, 3),
            f"is to {needle.answer}": (4, 3),
            needle.sentence: (5, 5),
            PAPER.sentence: (0, 0),
        }
        for output, (points, theirs) in rows.items():
            if output == PAPER.sentence and any(word in output for word in needle.phrases):
                continue
            assert (graded(output, needle), released(output, needle)) == (points, theirs)
        assert binary(needle.answer, needle) and not binary(f"{make} and {rest}", needle)


def test_a_word_level_decoders_blanks_do_not_count():
    tokenizer = word_tokenizer()
    for needle in (PAPER, *held_out_needles()):
        back = tokenizer.decode(tokenizer.encode(needle.sentence).ids)
        assert " ." in back and graded(back, needle) == released(back, needle) == 5


def test_a_word_is_not_found_inside_a_longer_one():
    needle = draw_needle(Random(0), "Port Diego")
    pen = Needle(needle.sentence, needle.question, needle.city, ("buy a pen", *needle.phrases[1:]))
    assert graded("buy a pen", pen) == graded("Buy a pen!", pen) == graded("buy a pens", pen) == 1
    assert graded("buy a pencil", pen) == 0


def test_keywords_are_equal_parts_and_the_whole_sentence_sets_five():
    needle = custom_needle(
        "The code of the blue vault is 7 4 1 9.", "What is the code?", ["blue vault", "7 4", "1 9"]
    )
    assert graded("", needle) == 0 and not binary("", needle)
    assert graded("It opens the Blue Vault.", needle) == pytest.approx(5 / 3)
    assert graded("blue vault: 7, 4", needle) == pytest.approx(10 / 3)
    assert graded("1 9 and 7 4 of the blue vault", needle) == 5
    assert binary("1 9 and 7 4 of the blue vault", needle) and not binary("7 4 1 9", needle)
    assert graded(needle.sentence, needle) == 5
    assert released("blue vault", needle) == graded("blue vault", needle)


def test_keywords_of_scripts_without_blanks_are_found():
    needle = custom_needle("最好的事是在公园里吃三明治。", "最好的事是什么?", ["公园", "三明治"])
    assert graded("在公园里。", needle) == 2.5 and graded(needle.sentence, needle) == 5


def test_accuracy_is_the_score_as_a_fraction():
    assert accuracy(ANSWER, PAPER) == accuracy(ANSWER, PAPER, "graded") == 0.6
    assert accuracy(ANSWER, PAPER, "binary") == 1 and accuracy("", PAPER, "binary") == 0
    assert accuracy(PAPER.question, PAPER, "released") == 0.2
    with pytest.raises(ValueError, match="'graded', 'binary' or 'released'"):
        accuracy(ANSWER, PAPER, "judge")
