"""`needle_choice`: needles in generated text as a multiple choice, in lm-eval's own format.

A task that the packaged models can do and that needs no network: the papers' retrieval, in the form
of their language benchmarks.
"""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

from hooked_hybrid.niah.needles import Needle, held_out_needles
from hooked_hybrid.niah.prompt_tokens import HAYSTACK, QUESTION
from hooked_hybrid.niah.prompts import TEMPLATES, Haystack

if TYPE_CHECKING:
    import datasets

N_SENTENCES = 12
"""Sentences of haystack around a needle."""
N_CHOICES = 4


def dataset(seed: int = 0, **_: Any) -> dict[str, datasets.Dataset]:
    """Return the split "test": texts with a question, four answers, and the index of the right one.

    There is one document for each held-out needle, at depths from the beginning to the end in turn.
    The wrong answers are other needles' activities, in the right one's city.
    """
    import datasets

    needles, rng = held_out_needles(), random.Random(seed)
    rows = [_document(needles, i, rng) for i in range(len(needles))]
    return {"test": datasets.Dataset.from_list(rows)}


def _document(needles: list[Needle], index: int, rng: random.Random) -> dict[str, Any]:
    needle = needles[index]
    others = rng.sample([n for n in needles if n.phrases[0] != needle.phrases[0]], N_CHOICES - 1)
    hay = Haystack(rng.randrange(2**32)).texts()
    text = [next(hay).strip() for _ in range(N_SENTENCES)]
    text.insert(index % (N_SENTENCES + 1), needle.sentence)
    choices = [needle.sentence, *(o.sentence.replace(o.city, needle.city) for o in others)]
    rng.shuffle(choices)
    prompt = TEMPLATES["base"].replace(HAYSTACK, " ".join(text)).replace(QUESTION, needle.question)
    return {"text": prompt, "choices": choices, "answer": choices.index(needle.sentence)}
