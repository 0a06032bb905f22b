"""The ends of sentences, words and characters in a text, and the tokens at which they are."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

NONE, CHARACTER, WORD, SENTENCE = range(4)
"""The kind of boundary in a text, from none (within a character) to the end of a sentence."""
NAMES = {CHARACTER: "characters", WORD: "words", SENTENCE: "sentences"}
"""The units between which a needle is placed, by the kind of boundary."""

_STOPS = (
    "0021 003F 0589 061D-061F 06D4 0700-0702 07F9 0837 0839 083D-083E 0964-0965 104A-104B 1362 "
    "1367-1368 166E 1735-1736 17D4-17D5 1803 1809 1944-1945 1AA8-1AAB 1B4E-1B4F 1B5A-1B5B "
    "1B5E-1B5F 1B7D-1B7F 1C3B-1C3C 1C7E-1C7F 203C-203D 2047-2049 2CF9-2CFB 2E2E 2E3C 2E53-2E54 "
    "2E60-2E61 3002 A4FF A60E-A60F A6F3 A6F7 A876-A877 A8CE-A8CF A92F A9C8-A9C9 AA5D-AA5F "
    "AAF0-AAF1 ABEB FE12 FE15-FE16 FE56-FE57 FF01 FF1F FF61 10A56-10A57 10F55-10F59 10F86-10F89 "
    "11047-11048 110BE-110C1 11141-11143 111C5-111C6 111CD 111DE-111DF 11238-11239 1123B-1123C "
    "112A9 113D4-113D5 1144B-1144C 115C2-115C3 115C9-115D7 11641-11642 1173C-1173E 11944 11946 "
    "11A42-11A43 11A9B-11A9C 11C41-11C42 11EF7-11EF8 11F43-11F44 16A6E-16A6F 16AF5 16B37-16B38 "
    "16B44 16D6E-16D6F 16E98 1BC9F 1DA88"
)
"""Unicode's Sentence_Terminal (version 17) without full stops, which may also end a word."""
FULL_STOPS = ".\u2024\ufe52\uff0e"
BREAKS = "\n\r\u0085\u2028\u2029"
_QUOTES = "\"'"
_MOST_LOST = 12
"""Most consecutive tokens that do not decode to their text."""
_REFERENCE = re.compile(r"\[[^\[\]\n]{1,12}\]")


def _all_of(ranges: str) -> frozenset[str]:
    found: set[str] = set()
    for part in ranges.split():
        first, _, last = part.partition("-")
        found |= set(map(chr, range(int(first, 16), int(last or first, 16) + 1)))
    return frozenset(found)


TERMINALS = _all_of(_STOPS) | set(FULL_STOPS)
_TERMINAL = re.compile(f"[{re.escape(''.join(sorted(TERMINALS)))}]+")


def sentence_ends(text: str) -> set[int]:
    """Return the indices of characters after which a sentence ends.

    A sentence ends after a terminal mark of any script, including closing quotation marks, brackets
    and references ("[1]") after it, and at each line break. A full stop does not end a sentence
    before a digit ("3.14"), between letters ("example.org"), or if the next word is in lower case
    ("e.g. this").

    Source: Unicode Standard Annex 29, sentence boundaries (SB4 to SB11), with references added.
    """
    ends = {i + 1 for i, character in enumerate(text) if character in BREAKS}
    for found in _TERMINAL.finditer(text):
        end = _close(text, found.end())
        is_full_stop = text[found.end() - 1] in FULL_STOPS
        if not (is_full_stop and _goes_on(text, found.start(), found.end(), end)):
            ends.add(end)
    return ends


def _close(text: str, at: int) -> int:
    """Return the end of the closing marks of a sentence."""
    while at < len(text):
        reference = _REFERENCE.match(text, at)
        if reference is not None:
            at = reference.end()
        elif text[at] in _QUOTES or unicodedata.category(text[at]) in ("Pe", "Pf"):
            at += 1
        else:
            break
    return at


def _goes_on(text: str, start: int, stop: int, end: int) -> bool:
    """Whether a sentence continues after marks [start, stop) and closing marks up to `end`."""
    if end == stop < len(text):
        before, after = text[start - 1 : start], text[stop]
        if after.isdecimal() or (before.isalpha() and _is_cased(after)):
            return True
    for character in text[end:]:
        if character in BREAKS or character in TERMINALS:
            return False
        if character.isalpha():
            return character.islower()
    return False


def _is_cased(character: str) -> bool:
    return character.islower() or character.isupper()


def token_ends(tokenizer: Any, text: str, tokens: Sequence[int], decode: Any) -> list[int] | None:
    """Return the index of the character at which each token of a text ends, None if unknown.

    It is -1 for a token that ends within a character, which later tokens complete.

    Args:
        tokenizer: the tokenizer of the tokens, from `tokenizers` or `transformers`.
        text: a text.
        tokens: its tokens, without special ones.
        decode: decodes tokens to text.
    """
    spans = _spans(tokenizer, text)
    if spans is None or spans[0] != list(tokens):
        return _align(text, tokens, decode)
    ends, offsets = [], spans[1]
    for i, (_, stop) in enumerate(offsets):
        goes_on = i + 1 < len(offsets) and offsets[i + 1][0] < stop
        ends.append(-1 if goes_on else stop)
    return ends


def _spans(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]] | None:
    """Return tokens and their offsets in the text, for tokenizers that provide these."""
    own = getattr(tokenizer, "backend", None)  # of one that was read from a checkpoint
    backend: Any = own if hasattr(own, "encode_batch") else tokenizer  # transformers' is a word
    encoded = backend.encode(text, add_special_tokens=False)
    if hasattr(encoded, "offsets"):
        return list(encoded.ids), list(encoded.offsets)
    if not getattr(tokenizer, "is_fast", False):
        return None
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return list(found["input_ids"]), [tuple(pair) for pair in found["offset_mapping"]]


def _align(text: str, tokens: Sequence[int], decode: Any) -> list[int] | None:
    """Return the same from decoded tokens, None if a decoded token is not in the text."""
    ends, at, waiting = [], 0, []
    for token in tokens:
        waiting.append(token)
        piece = decode(waiting).strip()
        start = at
        while start < len(text) and text[start].isspace():
            start += 1
        if text.startswith(piece, start) and "\ufffd" not in piece:
            at, waiting = (start + len(piece) if piece else at), []
            ends.append(at)
        elif (place := _find_again(text, at, decode([token]))) is not None:
            at, waiting = place, []
            ends.append(at)
        elif len(waiting) > _MOST_LOST:
            return None
        else:
            ends.append(-1)
    return ends


def _find_again(text: str, at: int, piece: str) -> int | None:
    """Return the end of a token after some that do not decode to their text."""
    piece = piece.strip()
    if not piece or "\ufffd" in piece:
        return None
    start = text.find(piece, at, at + _MOST_LOST * 8)
    return None if start < 0 else start + len(piece)


def kinds_of(text: str, ends: Sequence[int], starts_at: int = 0) -> list[int]:
    """Return the boundary after each token: `SENTENCE`, `WORD`, `CHARACTER` or `NONE`.

    A token of blanks adds no boundary to that of the token before it, as a needle begins with its
    own blank.

    Args:
        text: a text.
        ends: the result of `token_ends`.
        starts_at: characters before the first token's.
    """
    sentences, kinds, start = sentence_ends(text), [], starts_at
    for end in ends:
        if end < 0 or end <= start:
            kinds.append(NONE)
            continue
        piece = text[start:end]
        last = start + len(piece.rstrip(" "))
        if last == start:
            kinds.append(NONE)
        elif last in sentences:
            kinds.append(SENTENCE)
        elif end == len(text) or text[end].isspace() or last < end:
            kinds.append(WORD)
        else:
            kinds.append(CHARACTER)
        start = end
    return kinds
