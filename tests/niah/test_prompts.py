"""Prompts: exact lengths, the needle where it is said to be, clear errors."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import regex
from tokenizers import Tokenizer, normalizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.decoders import Metaspace as MetaspaceDecoder
from tokenizers.models import BPE, Unigram, WordLevel
from tokenizers.pre_tokenizers import ByteLevel, Metaspace, Whitespace
from transformers import PreTrainedTokenizerFast  # noqa: TID251

from hooked_hybrid import HookedHybrid
from hooked_hybrid.niah.boundaries import (
    NONE,
    SENTENCE,
    TERMINALS,
    WORD,
    sentence_ends,
    token_ends,
)
from hooked_hybrid.niah.haystacks import haystack as generated
from hooked_hybrid.niah.haystacks.word_tokenizer import BOS, word_tokenizer
from hooked_hybrid.niah.haystacks.words import vocabulary
from hooked_hybrid.niah.needles import (
    PAPER,
    Needle,
    custom_needle,
    distractors_for,
    draw_needle,
    find_needle,
    held_out_needles,
    known_needles,
    load_needles,
    needle_ids,
    training_cities,
)
from hooked_hybrid.niah.prompt_tokens import Filler, Maker
from hooked_hybrid.niah.prompt_tokens import Haystack as Stretch
from hooked_hybrid.niah.prompts import (
    TEMPLATES,
    Haystack,
    Prompt,
    build_prompt,
    default_depths,
    default_lengths,
    grid,
    shortest_length,
)
from hooked_hybrid.text.tokenizer import CheckpointTokenizer
from tests.models import griffin_config, random_model

DEPTHS = [0.0, 0.2, 0.5, 0.77, 0.999, 1.0]
CHAT = (
    "{{ bos_token }}{% for m in messages %}QUESTION : {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}ANSWER :{% endif %}"
)


def model_with(tokenizer: Any) -> HookedHybrid:
    model = random_model(griffin_config("RA", d_vocab=len(vocabulary())))
    model.tokenizer = tokenizer
    return model


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return model_with(word_tokenizer())


def chat_tokenizer(template: str = CHAT) -> CheckpointTokenizer:
    words = word_tokenizer()
    return CheckpointTokenizer(
        backend=words,
        settings={"bos_token": "<bos>"},
        chat_template=template,
        files={},
    )


def bytes_tokenizer() -> Tokenizer:
    """Return a token a byte, blanks tokens of their own."""
    alphabet = sorted(ByteLevel.alphabet())
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    return tokenizer


def llama_like_tokenizer() -> Tokenizer:
    """Return a tokenizer that marks the beginning of every text with a blank."""
    words = [f"▁{word}" for word in " ".join(SENTENCES).replace(".", "").split()]
    letters = "\n.:?!,▁" + "".join(map(chr, [*range(65, 91), *range(97, 123)]))
    pieces = dict.fromkeys(["<unk>", *letters, *words])
    scored = [(piece, -1.0 if piece in words else -5.0) for piece in pieces]
    tokenizer = Tokenizer(Unigram(scored, unk_id=0))
    tokenizer.pre_tokenizer = Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = MetaspaceDecoder(prepend_scheme="always")
    return tokenizer


def llama_tokenizer() -> Tokenizer:
    """Return a tokenizer that puts a blank in front of every text, also of one that has a blank."""
    tokenizer = llama_like_tokenizer()
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return tokenizer


SENTENCES = [PAPER.sentence, "Startup founders work late.", "Nobody sleeps."]
OTHERS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": bytes_tokenizer,
    "llama-like": llama_like_tokenizer,
    "llama": llama_tokenizer,
}


def tight(text: str) -> str:
    """Return a text without the blanks that word-level decoders add."""
    return "".join(text.split())


def text_at(model: HookedHybrid, prompt: Prompt, span: tuple[int, int]) -> str:
    return model.text.decode(prompt.tokens[slice(*span)])


def without_needle(prompt: Prompt) -> tuple[int, ...]:
    hidden = {i for span in prompt.needle_spans for i in range(*span)}
    return tuple(token for i, token in enumerate(prompt.tokens) if i not in hidden)


@pytest.mark.parametrize(
    ("template", "read_twice", "distractors"),
    list(product(["base", "instruct"], [False, True], [0, 3])),
)
def test_every_prompt_has_exactly_its_length_and_the_needle_at_its_spans(
    model: HookedHybrid, template: str, read_twice: bool, distractors: int
):
    needles = [PAPER, held_out_needles()[7], None]
    options = (template, read_twice, distractors)
    shortest = max(shortest_length(model, needle, *options) for needle in needles)
    lengths = [shortest, shortest + 1, shortest + 7, 290, 301]
    prompts = grid(model, needles, lengths, DEPTHS, None, *options)
    assert len(prompts) == len(needles) * len(lengths) * len(DEPTHS)
    for prompt in prompts:
        assert prompt.length == len(prompt.tokens) and prompt.length in lengths
        assert prompt.tokens[0] == BOS and BOS not in prompt.tokens[1:]
        assert len(prompt.needle_spans) == (1 + read_twice) * (prompt.needle is not None)
        for span in prompt.needle_spans:
            assert tight(text_at(model, prompt, span)) == tight(prompt.asked.sentence)
        assert prompt.n_distractors == distractors


@pytest.mark.parametrize("template", ["base", "instruct"])
def test_a_prompt_reads_as_the_template_says(model: HookedHybrid, template: str):
    prompt = build_prompt(model, PAPER, 100, 0.0, template=template)
    text = tight(model.text.decode(prompt.tokens).removeprefix("<bos>"))
    before, after = tight(TEMPLATES[template].replace("{question}", PAPER.question)).split(
        "{haystack}"
    )
    assert text.startswith(before + tight(PAPER.sentence)) and text.endswith("." + after)


def test_templates_are_those_of_the_thesis():
    assert TEMPLATES["base"] == (
        "CONTEXT:\n{haystack}\nQUESTION:\n{question}\n"
        "ANSWER: Here is the most relevant sentence in the context:"
    )
    assert TEMPLATES["instruct"] == TEMPLATES["chat"]
    assert TEMPLATES["instruct"] == (
        "CONTEXT:\n{haystack}\nQUESTION:\n{question} Output the most relevant sentence in the "
        "context, word by word!"
    )


def test_read_twice_repeats_context_and_question_before_the_answer(model: HookedHybrid):
    prompt = build_prompt(model, PAPER, 181, 0.5, read_twice=True)
    text = tight(model.text.decode(prompt.tokens).removeprefix("<bos>"))
    once, answer = text.rsplit("ANSWER:", 1)
    assert once[: len(once) // 2] == once[len(once) // 2 :]
    assert once.count("CONTEXT:") == once.count("QUESTION:") == 2
    assert "ANSWER" not in once and answer.startswith("Hereisthe")


def test_an_odd_room_gives_the_first_copy_the_token_left_over(model: HookedHybrid):
    prompt = build_prompt(model, PAPER, 182, 1.0, read_twice=True)
    (_, first), (_, second) = prompt.needle_spans
    start = model.text.encode("CONTEXT:\n", prepend_bos=True)
    again = model.text.encode(f"\nQUESTION:\n{PAPER.question}\nCONTEXT:\n", prepend_bos=False)
    assert first - len(start) == second - first - len(again) + 1


@pytest.mark.parametrize("distractors", [0, 2])
def test_the_needle_moves_through_a_haystack_that_stays(model: HookedHybrid, distractors: int):
    for length in (180, 240, 301):
        prompts = grid(model, [PAPER], [length], default_depths(10), distractors=distractors)
        starts = [prompt.needle_spans[0][0] for prompt in prompts]
        assert starts == sorted(starts) and len(set(starts)) > 3
        assert len({without_needle(prompt) for prompt in prompts}) == 1
        assert len({prompt.id for prompt in prompts}) == len(prompts)


def test_a_length_must_hold_the_longest_of_the_needles(model: HookedHybrid):
    short, long = (shortest_length(model, needle) for needle in (None, PAPER))
    assert short < long and all(len(p.id) == 16 for p in grid(model, [PAPER], [long], [0.5]))
    said = rf"lengths \[{long - 1}\]: .* take {long} tokens"
    with pytest.raises(ValueError, match=said):
        grid(model, [PAPER, None], [long - 1, long], [0.5])


def test_a_prompt_without_needle_has_the_same_haystack_longer_and_the_papers_question(
    model: HookedHybrid,
):
    prompt = build_prompt(model, None, 150, 0.5)
    text = model.text.decode(prompt.tokens)
    assert text.count("San Francisco") == 1 and "Dolores" not in text
    assert prompt.needle_spans == () and prompt.needle_id == "none" and prompt.asked == PAPER
    hidden = build_prompt(model, PAPER, 150, 1.0)
    assert prompt.tokens[:80] == hidden.tokens[:80]


def test_the_needle_stands_between_sentences_at_or_just_before_its_depth(model: HookedHybrid):
    stop = model.to_single_token(".")
    for depth in (0.0, 0.13, 0.5, 0.9, 1.0):
        prompt = build_prompt(model, PAPER, 400, depth)
        start = prompt.needle_spans[0][0]
        haystack = 400 - shortest_length(model)
        at = start - len(model.text.encode("CONTEXT:\n", prepend_bos=True))
        assert at <= depth * haystack and (at == 0 or prompt.tokens[start - 1] == stop)
        between = without_needle(prompt)[start : int(start + depth * haystack - at)]
        assert stop not in between[:-1]


def test_the_real_depth_is_that_of_the_tokens_before_the_needle(model: HookedHybrid):
    start = len(model.text.encode("CONTEXT:\n", prepend_bos=True))
    for depth in DEPTHS:
        prompt = build_prompt(model, PAPER, 400, depth, distractors=1)
        room = 400 - shortest_length(model)  # distractors are haystack here
        before = prompt.needle_spans[0][0] - start
        assert prompt.real_depth == pytest.approx(before / room) and prompt.depth == depth
        assert prompt.real_depth <= depth and prompt.placed_between == "sentences"
    nothing = build_prompt(model, None, 400, 0.5)
    assert nothing.real_depth is None and nothing.placed_between is None


PLAIN = "the old man can see the river and the sea "


@pytest.mark.parametrize("name", ["words", *OTHERS])
@pytest.mark.parametrize(
    "text",
    [
        PLAIN * 100,
        'the old man said "I can see the river." ' * 60,
        "The old man can see the sea (and the river.) " * 60,
        "The old man can see the river.[1] " * 60,
        "the old man can see the river; " * 80,
        "वह नदी और समुद्र देख सकता है। " * 60,
        "老人は川と海を見ることができる。" * 60,
        "老人は言った「川が見える。」" * 60,
        "老人は川と海を見ることができる" * 60,
    ],
)
def test_needles_stand_at_the_asked_depth_in_any_text(name: str, text: str):
    model = model_with(word_tokenizer() if name == "words" else OTHERS[name]())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of words, where no sentence ends: next test
        shortest = shortest_length(model, prepend_bos=False)
        prompts = grid(
            model, [PAPER], [shortest + 300], [0.25, 0.5, 0.95],
            Haystack(documents=(text,)), prepend_bos=False,
        )  # fmt: skip
    for prompt in prompts:
        start = prompt.needle_spans[0][0]
        before = start - len(model.text.encode("CONTEXT:\n", prepend_bos=False))
        assert prompt.real_depth == pytest.approx(before / 300, abs=0.01)
        assert prompt.depth - 0.31 <= prompt.real_depth <= prompt.depth
        decoded = model.text.decode(prompt.tokens)
        if name == "bytes":  # others do not hold these scripts
            at = decoded.index(PAPER.sentence)
            assert "\ufffd" not in decoded[max(0, at - 3) : at + len(PAPER.sentence) + 2]
    assert len({prompt.needle_spans for prompt in prompts}) == 3


def test_without_any_end_of_sentence_the_needle_is_between_words_with_a_warning(
    model: HookedHybrid,
):
    haystack = Haystack(documents=(PLAIN * 100,))
    with pytest.warns(UserWarning, match="in 2 of 4 prompts the needle stands between words"):
        prompts = grid(model, [PAPER], [300], [0.0, 0.25, 0.95, 1.0], haystack)
    kinds = [prompt.placed_between for prompt in prompts]
    assert kinds == ["sentences", "words", "words", "sentences"]  # first and last are whole ends
    real = [prompt.real_depth for prompt in prompts]
    assert real == pytest.approx([0, 0.25, 0.95, 1], abs=0.01)
    with pytest.warns(UserWarning, match="between characters"):
        letters = grid(
            model_with(bytes_tokenizer()), [PAPER], [600], [0.5],
            Haystack(documents=("老人は川と海を見ることができる" * 60,)), prepend_bos=False,
        )  # fmt: skip
    assert letters[0].placed_between == "characters"


def test_prompts_of_generated_text_are_what_they_were(model: HookedHybrid):
    found = []
    for seed, twice, n in product((0, 1000), (False, True), (0, 2)):
        needles = [PAPER, find_needle("held-out-03")]
        prompts = grid(
            model, needles, [200, 512], [0.0, 0.33, 0.67, 1.0], Haystack(seed), "base", twice, n
        )
        found += [(p.id, p.tokens, p.needle_spans) for p in prompts]
    digest = hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]
    assert digest == "3ce7dc082a9870fa"  # of the code before ends were found in the text


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ('He said "go." Then he left.', ['He said "go."', " Then he left."]),
        ("See (it.) Now.[12] Then!?", ["See (it.)", " Now.[12]", " Then!?"]),
        (
            "Pi is 3.14. See example.org, e.g. this. Ok",
            ["Pi is 3.14.", " See example.org, e.g. this."],
        ),
        ("हम हैं। तुम हो॥", ["हम हैं।", " तुम हो॥"]),
        ("夜です。雨「よい。」次\uff01", ["夜です。", "雨「よい。」", "次\uff01"]),
        ("هل؟ نعم\u06d4 لا", ["هل؟", " نعم\u06d4"]),
        ("line one\nline two\n", ["line one\n", "line two\n"]),
        ("one; two: three", []),
    ],
)
def test_sentences_end_where_unicode_says(text: str, sentences: list[str]):
    ends = sorted(sentence_ends(text))
    assert [text[a:b] for a, b in pairwise([0, *ends])] == sentences


def test_places_of_tokens_are_found_with_and_without_a_tokenizer_that_tells_them():
    text = "The old man can see the river. Zyx can see the sea."
    words = word_tokenizer()
    encoded = words.encode(text, add_special_tokens=False)
    assert token_ends(words, text, encoded.ids, words.decode) == [b for _, b in encoded.offsets]
    assert token_ends(chat_tokenizer(), text, encoded.ids, words.decode) == [
        b for _, b in encoded.offsets
    ]
    fast = PreTrainedTokenizerFast(tokenizer_object=words)  # whose own `encode` tells no places
    assert token_ends(fast, text, encoded.ids, words.decode) == [b for _, b in encoded.offsets]
    silent = SimpleNamespace(encode=lambda *_, **__: encoded.ids)
    found = token_ends(silent, text, encoded.ids, words.decode)
    known = [i for i, token in enumerate(encoded.tokens) if token != "<unk>"]
    assert found is not None and 5 < len(known) < len(encoded.ids)
    assert [found[i] for i in known] == [encoded.offsets[i][1] for i in known]
    by_byte = bytes_tokenizer().encode("é.").ids
    assert token_ends(bytes_tokenizer(), "é.", by_byte, bytes_tokenizer().decode) == [-1, 1, 2]
    of_bytes = bytes_tokenizer()
    silent = SimpleNamespace(encode=lambda text, **_: of_bytes.encode(text).ids)
    by_byte = silent.encode("a  é.")
    assert token_ends(silent, "a  é.", by_byte, of_bytes.decode) == [1, 1, 1, -1, 4, 5]


def test_a_tokenizer_of_transformers_gives_the_prompts_of_its_own_backend():
    marks = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=word_tokenizer(), **marks)
    ours, theirs = (
        grid(model_with(each), [PAPER], [150], [0.0, 0.6, 1.0], distractors=1, prepend_bos=False)
        for each in (word_tokenizer(), fast)
    )
    assert ours == theirs


def test_terminal_marks_are_unicodes():
    every = "".join(map(chr, range(0x110000)))
    marks = regex.findall(r"\p{Sentence_Terminal}", every)
    assert set(marks) == TERMINALS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{context}\n{question}", r"has \{context\}: give \{haystack\} and \{question\} alone"),
        ("{haystack}\n{question} {answer}", r"has \{answer\}"),
        ("{haystack}", r"\{question\} 0 times and \{haystack\} 1 times"),
        ("{question}", r"\{question\} 1 times and \{haystack\} 0 times"),
        ("{question} {haystack}", r"\{question\} once after it"),
    ],
)
def test_a_template_without_its_places_or_with_others_is_refused(
    model: HookedHybrid, monkeypatch: pytest.MonkeyPatch, text: str, message: str
):
    monkeypatch.setitem(TEMPLATES, "own", text)
    with pytest.raises(ValueError, match=message):
        build_prompt(model, PAPER, 200, 0.5, template="own")


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("read_twice", [False, True])
def test_other_tokenizers_give_exact_lengths_whole_needles_and_single_blanks(
    name: str, read_twice: bool, tmp_path: Path
):
    model = model_with(OTHERS[name]())
    (tmp_path / "a.txt").write_text(" ".join(SENTENCES[1:] * 3))
    shortest = shortest_length(model, PAPER, "base", read_twice, prepend_bos=False)
    prompts = grid(
        model, [PAPER], [shortest, 2 * shortest, 2 * shortest + 41], DEPTHS,
        Haystack.read(tmp_path), "base", read_twice, prepend_bos=False,
    )  # fmt: skip
    for prompt in prompts:
        assert len(prompt.tokens) == prompt.length
        for span in prompt.needle_spans:
            assert text_at(model, prompt, span).strip() == PAPER.sentence
        text = model.text.decode(prompt.tokens)
        assert "  " not in text and ".S" not in text and ".The" not in text
        assert "\nQUESTION:\nWhat" in text and "\n QUESTION" not in text
    assert len({len(prompt.needle_spans) for prompt in prompts}) == 1


def test_bos_is_put_in_front_as_asked_and_counted(model: HookedHybrid):
    with_bos, without = (
        build_prompt(model, PAPER, 100, 0.5, prepend_bos=prepend) for prepend in (True, False)
    )
    assert with_bos.tokens[0] == BOS and BOS not in without.tokens
    assert len(with_bos.tokens) == len(without.tokens) == 100
    assert with_bos.id != without.id


@pytest.mark.parametrize("read_twice", [False, True])
def test_chat_is_the_instruction_in_the_models_own_chat_template(read_twice: bool):
    model = model_with(chat_tokenizer())
    for length, depth in product((160, 161), DEPTHS):
        prompt = build_prompt(
            model, PAPER, length, depth, template="chat", read_twice=read_twice, distractors=1
        )
        assert len(prompt.tokens) == length and prompt.tokens.count(BOS) == 1
        for span in prompt.needle_spans:
            assert tight(text_at(model, prompt, span)) == tight(PAPER.sentence)
    plain = build_prompt(model, PAPER, 100, 0.5, template="instruct", prepend_bos=False)
    said = {"role": "user", "content": model.text.decode(plain.tokens)}
    as_chat = model.apply_chat_template([said])[0].tolist()
    prompt = build_prompt(model, PAPER, len(as_chat), 0.5, template="chat")
    assert list(prompt.tokens) == as_chat


def test_distractors_stand_whole_at_ends_of_sentences_away_from_the_needle(model: HookedHybrid):
    others = distractors_for(PAPER, 3)
    starts: list[list[int]] = []
    for depth in default_depths(6):
        prompt = build_prompt(model, PAPER, 300, depth, distractors=others)
        assert prompt == build_prompt(model, PAPER, 300, depth, distractors=3)
        rest = without_needle(prompt)
        found = []
        for other in others:
            ids = model.text.encode(other.sentence, prepend_bos=False)
            at = [i for i in range(300) if list(rest[i : i + len(ids)]) == ids]
            assert len(at) == 1 and model.text.decode([rest[at[0] - 1]]) in (".", "\n")
            found.append(at[0])
        starts.append(found)
        if 0 < depth < 1:
            start = prompt.needle_spans[0][0]
            assert all(start not in (at, at + 22) for at in found)
    assert starts[0] == sorted(starts[0]) and all(found == starts[0] for found in starts)
    assert all(b - a > 22 for a, b in pairwise(starts[0]))


def filler_of(lengths: list[int], distractors: list[list[int]]) -> Filler:
    """Return a haystack of sentences of so many tokens, each 0, with distractors spread over it."""
    kinds = [kind for n in lengths for kind in [WORD] * (n - 1) + [SENTENCE]]
    maker = Maker(model_with(word_tokenizer()).text, iter(()), "{haystack}{question}", False, None)
    return maker._spread(Stretch([0] * len(kinds), kinds, is_closed=True), distractors)


@pytest.mark.parametrize(
    ("lengths", "n", "starts"),
    [
        ([5] * 6, 1, [15]),  # 30 tokens: one in the middle
        ([5] * 6, 2, [10, 20]),  # two at the thirds
        ([7] * 3, 2, [7, 14]),
        ([7] * 3, 1, [7]),  # the last end before 10
        ([12, 4, 4], 1, [12]),  # none ends before 10: the first end, never the very start
        ([12, 4, 4], 2, [12, 16]),  # the first end is taken
    ],
)
def test_distractors_stand_where_a_sentence_ends_at_even_shares(
    lengths: list[int], n: int, starts: list[int]
):
    filler = filler_of(lengths, [[7, 7, 7], [8, 8, 8]][:n])
    wanted = [0] * sum(lengths)
    for start, other in reversed([*zip(starts, [7, 8], strict=False)]):
        wanted[start:start] = [other] * 3
    assert filler.tokens == wanted
    for i, start in enumerate(starts):
        at = start + 3 * i
        assert filler.before[at : at + 4] == [NONE] * 4  # no needle next to a distractor
    assert filler.before.count(SENTENCE) == 1 + len(lengths) - n


@pytest.mark.parametrize(
    ("lengths", "n", "tokens", "is_closed"),
    [
        ([5, 7, 9], 0, [], True),
        ([5, 7, 9], 5, range(5), True),
        ([5, 7, 9], 10, [*range(5), *range(7, 12)], True),  # the second without its first two
        ([5, 7, 9], 12, range(12), True),
        ([5, 7, 9], 13, [*range(12), 20], True),
        ([256, 9], 100, range(156, 256), True),  # as long as a sentence may be
        ([257, 9], 100, range(157, 257), False),
        ([9, 247, 9], 100, [*range(9), *range(165, 256)], True),
        ([1023, 9], 5, range(1018, 1023), False),
        ([1029, 9], 5, range(1024, 1029), False),  # the last that is looked for
        ([1030, 9], 5, range(5), False),  # no end near: the text as it begins
    ],
)
def test_a_haystack_ends_with_the_end_of_a_sentence(
    lengths: list[int], n: int, tokens: Any, is_closed: bool
):
    maker = Maker(model_with(word_tokenizer()).text, iter(()), "{haystack}{question}", False, None)
    many = lengths * (3000 // sum(lengths) + 1)
    maker._kinds = [kind for m in many for kind in [WORD] * (m - 1) + [SENTENCE]]
    maker._stream = [*range(sum(many))]
    found = maker._trimmed(n)
    assert found.tokens == [*tokens] and found.is_closed == is_closed
    assert found.kinds == [maker._kinds[token] for token in tokens]


@pytest.mark.parametrize(
    ("ends", "depth", "at"),
    [
        ([4, 5, 6], 0.5, 5),  # just there
        ([4, 6], 0.5, 4),  # the nearest before, not after
        ([4, 6], 0.6, 6),
        ([4, 6], 0.59, 4),
        ([1], 0.1, 1),
        ([1], 0.09, 0),
        ([9], 0.999, 9),
        ([9], 1.0, 10),
    ],
)
def test_a_needle_is_placed_at_the_last_end_up_to_its_depth(ends: list[int], depth: float, at: int):
    before = [SENTENCE if i in (0, *ends) else WORD for i in range(10)]
    assert Filler([0] * 10, before, True).place(depth) == (at, SENTENCE)


def test_drawn_distractors_are_of_other_cities_and_share_no_phrase_with_the_needle():
    for needle in (PAPER, *held_out_needles()[:5]):
        others = distractors_for(needle, 8)
        assert others == distractors_for(needle, 8)
        assert len({other.city for other in others} | {needle.city}) == 9
        assert not any(set(other.phrases) & set(needle.phrases) for other in others)
    custom = custom_needle("A cat sat.", "What is the best thing to do in Port Diego?", ["cat"])
    everywhere = {other.city for other in distractors_for(custom, len(training_cities()) - 1)}
    assert everywhere == set(training_cities()) - {"Port Diego"}


def test_prompt_ids_are_stable_and_tell_every_setting_apart(model: HookedHybrid):
    def ids(**changes: Any) -> str:
        options: dict[str, Any] = {"needle": PAPER, "length": 200, "depth": 0.5} | changes
        return build_prompt(model, **options).id

    changed: list[dict[str, Any]] = [
        {}, {"length": 201}, {"depth": 0.50001}, {"template": "instruct"}, {"read_twice": True},
        {"distractors": 1}, {"needle": None}, {"needle": find_needle("held-out-03")},
        {"haystack": Haystack(seed=1)}, {"needle": replace(PAPER, sentence="The best thing is .")},
    ]  # fmt: skip
    assert len({ids(**change) for change in changed}) == len(changed)
    assert ids() == ids() and len(ids()) == 16


def test_what_is_given_twice_is_built_once(model: HookedHybrid):
    prompts = grid(model, [PAPER, None, PAPER], [100, 100], [0.5, 0.5])
    assert [prompt.needle_id for prompt in prompts] == ["paper", "none"]


def test_default_grids_are_those_of_the_papers():
    lengths = default_lengths(4096)
    assert (lengths[0], lengths[5], lengths[-1]) == (250, 2387, 4096) and len(lengths) == 10
    assert {round(b - a, -1) for a, b in pairwise(lengths)} == {430}
    assert default_lengths(512)[0] == 64 and default_lengths(512, shortest=90)[0] == 90
    assert default_lengths(512, 1) == [512] and default_lengths(300, 3, 100) == [100, 200, 300]
    assert default_depths() == [i / 9 for i in range(10)] and default_depths(1) == [0.5]
    for wrong in (lambda: default_lengths(50), lambda: default_lengths(512, 0)):
        with pytest.raises(ValueError, match="at least 1"):
            wrong()
    with pytest.raises(ValueError, match="at least 1"):
        default_depths(0)


# Haystacks


def test_generated_text_is_seeded_endless_and_what_the_models_were_trained_on():
    texts, again, lines = Haystack().texts(), Haystack().texts(), generated.sentences(Random(0))
    tokenizer = word_tokenizer()
    for _ in range(300):
        text = next(texts)
        assert text == next(again) and " ." not in text and " ," not in text
        assert tokenizer.encode(text).ids == tokenizer.encode(next(lines)).ids
    assert next(Haystack(seed=1).texts()) != next(Haystack(seed=0).texts())


def test_a_folder_is_read_in_order_of_names_and_repeated(tmp_path: Path, model: HookedHybrid):
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a.txt").write_text("Third one.")
    (tmp_path / "b.txt").write_text("Second one.\n\n\nAnother paragraph.\n")
    (tmp_path / "a.txt").write_text("First one.\n")
    (tmp_path / "empty.txt").write_text(" \n")
    (tmp_path / "notes.md").write_text("Not read.")
    texts = Haystack.read(tmp_path).texts()
    found = [next(texts) for _ in range(5)]
    names = sorted(["a.txt", "b.txt", "b"])
    assert names == ["a.txt", "b", "b.txt"]  # so the folder b comes before b.txt
    assert found == [
        " First one.\n", " Third one.\n", " Second one.\n\n\n", "Another paragraph.\n",
        " First one.\n",
    ]  # fmt: skip
    prompts = grid(model, [PAPER], [2000], [0.0, 0.4, 1.0], Haystack.read(tmp_path))
    assert all(len(prompt.tokens) == 2000 for prompt in prompts)


def test_a_single_file_is_a_haystack(tmp_path: Path):
    (tmp_path / "essay").write_text("Über die Brücke.", encoding="utf-8")
    assert next(Haystack.read(tmp_path / "essay").texts()) == " Über die Brücke.\n"


def test_a_haystack_without_text_is_refused(tmp_path: Path):
    (tmp_path / "none").mkdir()
    (tmp_path / "blank").mkdir()
    (tmp_path / "blank" / "a.txt").write_text(" \n ")
    (tmp_path / "latin.txt").write_bytes("Brücke".encode("latin-1"))
    for name, message in {
        "missing": "no such file or folder",
        "none": r"holds no \*.txt file",
        "blank": "there is no text",
        "blank/a.txt": "there is no text",
        "latin.txt": "not UTF-8",
    }.items():
        with pytest.raises(ValueError, match=message):
            Haystack.read(tmp_path / name)


# Bad input


def test_too_short_a_prompt_is_refused_with_the_shortest_possible(model: HookedHybrid):
    for options in ({}, {"read_twice": True}, {"distractors": 2}, {"needle": None}):
        wanted: dict[str, Any] = {"needle": PAPER, **options}
        shortest = shortest_length(model, **wanted)
        assert build_prompt(model, length=shortest, depth=0.5, **wanted).length == shortest
        with pytest.raises(ValueError, match=f"take {shortest} tokens"):
            build_prompt(model, length=shortest - 1, depth=0.5, **wanted)


@pytest.mark.parametrize("depth", [-0.1, 1.01, 50.0, float("nan")])
def test_a_depth_that_is_no_fraction_is_refused(model: HookedHybrid, depth: float):
    with pytest.raises(ValueError, match="0 \\(beginning"):
        build_prompt(model, PAPER, 100, depth)


@pytest.mark.parametrize(
    "said",
    ["m.content | replace('relevant', 'fitting')", "m.content ~ m.content", "m.content | upper"],
)
def test_a_chat_template_that_changes_or_repeats_the_message_is_refused(said: str):
    model = model_with(chat_tokenizer(CHAT.replace("m.content", said)))
    with pytest.raises(ValueError, match="the chat template changes what the user says"):
        build_prompt(model, PAPER, 300, 0.5, template="chat")


def test_an_unknown_template_and_a_missing_chat_template_are_refused(model: HookedHybrid):
    with pytest.raises(ValueError, match="give one of base, instruct, chat"):
        build_prompt(model, PAPER, 100, 0.5, template="bass")
    with pytest.raises(ValueError, match="no chat template"):
        build_prompt(model, PAPER, 100, 0.5, template="chat")
    with pytest.raises(ValueError, match="changes what the user says"):
        build_prompt(
            model_with(chat_tokenizer("{{ messages[0].content | upper }}")),
            PAPER, 100, 0.5, template="chat",
        )  # fmt: skip


@pytest.mark.parametrize("unk", ["<unk>", None])
def test_words_the_tokenizer_cannot_hold_are_named(unk: str | None):
    ids = {word: i for i, word in enumerate(vocabulary())}
    tokenizer = Tokenizer(WordLevel(ids, **({"unk_token": unk} if unk else {"unk_token": "?!"})))
    tokenizer.pre_tokenizer = Whitespace()
    needle = custom_needle("The zebra can eat a banana.", "What can the zebra eat?", ["banana"])
    with pytest.raises(ValueError, match=r"cannot hold \['zebra', 'banana\.'\]"):
        build_prompt(model_with(tokenizer), needle, 100, 0.5)


def test_a_question_and_a_distractor_must_be_held_too(model: HookedHybrid):
    needle = custom_needle("The bread can taste sweet.", "Which zebra?", ["bread"])
    with pytest.raises(ValueError, match=r"\['Which', 'zebra\?'\]"):
        build_prompt(model, needle, 100, 0.5)
    zebra = custom_needle("The zebra can eat.", "What can the bread do?", ["zebra"])
    with pytest.raises(ValueError, match="zebra"):
        build_prompt(model, PAPER, 200, 0.5, distractors=[zebra])


def test_a_tokenizer_that_drops_the_haystack_is_refused(tmp_path: Path):
    tokenizer = Tokenizer(BPE({letter: i for i, letter in enumerate("abc.")}, []))
    (tmp_path / "a.txt").write_text("XYZ\n\n" * 10)
    needle = custom_needle("a.", "b", ["a"])
    with pytest.raises(ValueError, match="no tokens of the haystack"):
        build_prompt(model_with(tokenizer), needle, 100, 0.5, Haystack.read(tmp_path / "a.txt"))


def test_a_distractor_with_the_needles_question_is_refused(model: HookedHybrid):
    other = replace(PAPER, sentence="The best thing to do in San Francisco is sleep.")
    for needle in (PAPER, None):
        with pytest.raises(ValueError, match="own question"):
            build_prompt(model, needle, 200, 0.5, distractors=[other])
    with pytest.raises(ValueError, match="distractors: give 0 to"):
        build_prompt(model, PAPER, 200, 0.5, distractors=-1)


def test_an_empty_grid_is_refused(model: HookedHybrid):
    for needles, lengths, depths in (
        ([], [100], [0.5]),
        ([PAPER], [], [0.5]),
        ([PAPER], [100], []),
    ):
        with pytest.raises(ValueError, match="at least one needle, length and depth"):
            grid(model, needles, lengths, depths)


# Needles


def test_needles_have_ids(model: HookedHybrid):
    mine = custom_needle("This bread can taste sweet.", "What is the best bread?", ["sweet"])
    other = draw_needle(Random(0), "Port Diego")
    held_out = held_out_needles()
    needles: list[Any] = [mine, PAPER, None, held_out[7], other, mine]
    names = ["custom-0", "paper", "none", "held-out-07", "custom-1", "custom-0"]
    assert needle_ids(needles) == names
    assert list(known_needles()) == ["paper", *(f"held-out-{i:02}" for i in range(60))]
    assert find_needle("held-out-07") == held_out[7] and find_needle("paper") == PAPER
    with pytest.raises(ValueError, match="'held-out-00' to 'held-out-59'"):
        find_needle("held-out-60")
    assert build_prompt(model, held_out[7], 100, 0.5).needle_id == "held-out-07"


def test_held_out_cities_are_different_and_never_trained_on():
    cities = [needle.city for needle in held_out_needles()]
    assert len(set(cities)) == len(cities) >= 50
    assert not {PAPER.city, *cities} & set(training_cities())


def test_the_papers_phrases_are_never_drawn_and_each_of_its_words_is():
    rng, cities, words = Random(0), training_cities(), set[str]()
    for _ in range(20_000):
        needle = draw_needle(rng, rng.choice(cities))
        text = f"{needle.sentence} {needle.question}"
        assert not any(phrase in text for phrase in (*PAPER.phrases, PAPER.city))
        words.update(text.replace(".", "").replace("?", "").split())
    assert set(PAPER.sentence.rstrip(".").split()) <= words


def test_every_held_out_needle_and_the_papers_are_held_by_the_words(model: HookedHybrid):
    for needle in known_needles().values():
        assert isinstance(needle, Needle) and needle.answer in needle.sentence
        assert shortest_length(model, needle) == shortest_length(model, PAPER)


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


GOOD = {"sentence": "A cat sat.", "question": "Who sat?", "keywords": ["cat"]}


def test_a_users_needles_are_read_from_json(tmp_path: Path):
    (needle,) = load_needles(write(tmp_path / "n.json", [GOOD]))
    assert needle == custom_needle("A cat sat.", "Who sat?", ["cat"])
    assert needle.keywords == ("cat",) and needle.city is None


def test_keywords_are_a_list_not_a_text():
    with pytest.raises(ValueError, match="keywords='cat': give a list"):
        custom_needle("A cat sat.", "Who sat?", "cat")


def test_unusable_files_of_needles_are_refused_with_the_place(tmp_path: Path):
    path = tmp_path / "n.json"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        load_needles(path)
    path.write_bytes(b"\xff\xfe[")
    with pytest.raises(ValueError, match="are not JSON"):
        load_needles(path)
    path.write_text("[")
    with pytest.raises(ValueError, match="are not JSON"):
        load_needles(path)
    for content in ([], {}, GOOD):
        with pytest.raises(ValueError, match="holds no needles"):
            load_needles(write(path, content))
    bad: dict[str, Any] = {
        "sentence=' '": {**GOOD, "sentence": " "},
        "question are texts": {**GOOD, "question": 3},
        "keywords is a list": {**GOOD, "keywords": "cat"},
        "keywords=\\[\\]: give a list": {**GOOD, "keywords": []},
        "is a list of texts": {**GOOD, "keywords": ["cat", 3]},
        "keywords \\['.'\\]: give texts": {**GOOD, "keywords": ["."]},
        "\\['dog'\\] are not in the sentence": {**GOOD, "keywords": ["cat", "dog"]},
        "each may stand once": {**GOOD, "keywords": ["cat", "Cat."]},
        "found \\['sentence'\\]": {"sentence": "A cat sat."},
        "found 'text'": "text",
        "exactly": {**GOOD, "city": "Lima"},
    }
    for message, entry in bad.items():
        with pytest.raises(ValueError, match=f"needle 1: .*{message}"):
            load_needles(write(path, [GOOD, entry]))
