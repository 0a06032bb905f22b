"""Prompts of needle in a haystack, with exactly the given number of tokens."""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random

from hooked_hybrid.model.text_model import TextModel
from hooked_hybrid.niah.boundaries import NAMES, SENTENCE
from hooked_hybrid.niah.haystacks.haystack import sentences
from hooked_hybrid.niah.needles import PAPER, AnyNeedle, distractors_for, needle_ids
from hooked_hybrid.niah.prompt_tokens import HAYSTACK, LONGEST, QUESTION, Maker, PromptParts
from hooked_hybrid.outputs.foreign import read_text
from hooked_hybrid.runs.identity.values import describe

_ONCE = f"CONTEXT:\n{HAYSTACK}\nQUESTION:\n{QUESTION}"
_TUNED = f"{_ONCE} Output the most relevant sentence in the context, word by word!"
TEMPLATES = {
    "base": f"{_ONCE}\nANSWER: Here is the most relevant sentence in the context:",
    "instruct": _TUNED,
    "chat": _TUNED,
}
"""The thesis's templates; "chat" is a user's message in the chat template of the model."""


@dataclass(frozen=True)
class Prompt:
    """One prompt: its tokens, and the spans of the needle.

    `id` is determined by tokens, needle and settings. `depth` is the requested fraction of the
    haystack before the needle, from 0 at its beginning to 1 at its end (the thesis counts from the
    end). `real_depth` is the actual fraction, and `placed_between` the units around the needle:
    "sentences"; "words" if no sentence ends nearby; "characters" in scripts without blanks. Both
    are None without a needle; with `read_twice` they are those of the first copy. `needle_spans`
    has [start, stop) of every copy of the sentence: two with `read_twice`.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> (prompt,) = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> start, stop = prompt.needle_spans[0]
        >>> model.to_string(prompt.tokens[start : start + 7])
        'The best thing to do in San'
    """

    id: str
    tokens: tuple[int, ...]
    length: int
    depth: float
    needle: AnyNeedle | None
    needle_id: str
    needle_spans: tuple[tuple[int, int], ...]
    template: str
    read_twice: bool
    n_distractors: int
    real_depth: float | None = None
    placed_between: str | None = None

    @property
    def asked(self) -> AnyNeedle:
        """The needle of the question, hidden or not."""
        return PAPER if self.needle is None else self.needle


@dataclass(frozen=True)
class Haystack:
    """Endless text: generated from `seed`, or `documents`, repeated.

    `seed` also selects the random distractors.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> words = prompts.Haystack(documents=("Every bread can cook this guest .",))
        >>> (prompt,) = prompts.grid(model, [needles.PAPER], [96], [0.5], haystack=words)
        >>> prompt.length
        96
    """

    seed: int = 0
    documents: tuple[str, ...] = field(default=(), repr=False)

    @classmethod
    def read(cls, path: str | Path) -> Haystack:
        """Return the haystack of a text file, or of all *.txt in a folder, sorted by name.

        Raises:
            ValueError: it does not exist, is not UTF-8, or contains no text.
        """
        path = Path(path)
        if not path.exists():
            raise ValueError(f"haystack {path}: there is no such file or folder")
        files = [path]
        if path.is_dir():
            found = (file for file in path.rglob("*.txt") if file.is_file())
            files = sorted(found, key=lambda file: file.relative_to(path).parts)
            if not files:
                raise ValueError(f"haystack {path}: the folder holds no *.txt file")
        documents = tuple(text for file in files if (text := _read(file)))
        if not documents:
            raise ValueError(f"haystack {path}: there is no text in it")
        return cls(documents=documents)

    def texts(self) -> Iterator[str]:
        """Yield endless pieces of text, each a sentence or a paragraph.

        A document begins with a blank, so that it can follow a needle.
        """
        if not self.documents:
            for sentence in sentences(Random(self.seed)):
                yield " " + re.sub(r" (?=[.,])", "", sentence)
        while True:
            for document in self.documents:
                yield from re.findall(r".+?(?:\n\s*\n|\Z)", f" {document}\n", re.DOTALL)


def _read(file: Path) -> str:
    try:
        return read_text(file).strip()
    except OSError as error:
        raise ValueError(f"haystack {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"haystack {file} is not UTF-8 ({error})") from error


def build_prompt(
    model: TextModel,
    needle: AnyNeedle | None,
    length: int,
    depth: int | float,
    haystack: Haystack | None = None,
    template: str = "base",
    read_twice: bool = False,
    distractors: int | Sequence[AnyNeedle] = (),
    prepend_bos: bool | None = None,
) -> Prompt:
    """Return one prompt; see `grid`.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> prompts.build_prompt(model, needles.PAPER, length=128, depth=0.25).length
        128
    """
    return grid(
        model, [needle], [length], [depth], haystack, template, read_twice, distractors, prepend_bos
    )[0]


def grid(
    model: TextModel,
    needles: Sequence[AnyNeedle | None],
    lengths: Sequence[int],
    depths: Sequence[int | float],
    haystack: Haystack | None = None,
    template: str = "base",
    read_twice: bool = False,
    distractors: int | Sequence[AnyNeedle] = (),
    prepend_bos: bool | None = None,
) -> list[Prompt]:
    """Return a prompt for every needle, length and depth; depths vary fastest.

    The haystack of a prompt, including distractors, does not depend on depth. The needle is placed
    at the end of a sentence, at the given depth or the nearest before it; at depth 1 it is last. If
    no sentence ends within `prompt_tokens.LONGEST` tokens, it is placed between words, with a
    warning. Ends are found in the text, in any script (see `boundaries`). The haystack ends with a
    whole sentence, whose beginning is cut if necessary.

    Args:
        model: provides the tokenizer, its BOS and its chat template.
        needles: sentences to hide; None uses the paper's question without a needle.
        lengths: total tokens of each prompt, with template, BOS, both copies and distractors.
        depths: fractions of the haystack before the needle, 0 its beginning.
        haystack: the text around them; None is generated text.
        template: a name in `TEMPLATES`; or a text of your own with `{haystack}` and, once after it,
            `{question}`, such as "{haystack} Question: {question} Answer:".
        read_twice: give context and question twice before the answer (Just Read Twice). If the
            number of haystack tokens is odd, the first copy has one more.
        distractors: needles with other questions, distributed over the haystack at ends of
            sentences; or how many random ones for each needle.
        prepend_bos: put BOS in front; None is the tokenizer's default ("chat" has its own).

    Raises:
        ValueError: nothing to build; a depth outside 0 to 1; a length too short for template and
            needle; an unknown template, or "chat" without a chat template; a needle that the
            tokenizer cannot encode; a distractor that answers the needle's question.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96, 128], depths=[0, 0.5, 1])
        >>> [(prompt.length, prompt.depth) for prompt in cells[:3]]
        [(96, 0.0), (96, 0.5), (96, 1.0)]
    """
    if not (needles and lengths and depths):
        raise ValueError("no prompt to build: give at least one needle, length and depth")
    if wrong := [depth for depth in depths if not 0 <= depth <= 1]:
        raise ValueError(f"depths {wrong}: give fractions, 0 (beginning of the haystack) to 1")
    maker = _maker(model, haystack or Haystack(), template, read_twice, prepend_bos)
    names = dict(zip(needles, needle_ids(needles), strict=True))  # repeated needles count once
    seed = 0 if haystack is None else haystack.seed
    parts = {needle: _parts(maker, needle, distractors, seed) for needle in names}
    shortest = max(part.shortest for part in parts.values())
    if wrong := [length for length in lengths if length < shortest]:
        raise ValueError(
            f"lengths {wrong}: template, needle and distractors take {shortest} tokens, the "
            "shortest possible prompt"
        )
    prompts = [
        _prompt(maker, needle, name, parts[needle], length, depth, template, read_twice)
        for needle, name in names.items()
        for length in dict.fromkeys(lengths)
        for depth in dict.fromkeys(map(float, depths))
    ]
    if amid := [p for p in prompts if p.placed_between not in (None, NAMES[SENTENCE])]:
        warnings.warn(
            f"in {len(amid)} of {len(prompts)} prompts the needle stands between "
            f"{' or '.join(sorted({str(p.placed_between) for p in amid}))}: no sentence of the "
            f"haystack ends within {LONGEST} tokens",
            stacklevel=2,
        )
    return prompts


def prompts_identity(prompts: Sequence[Prompt]) -> dict[str, str]:
    """Return the identity of prompts: hashes of their ids, and of their content."""
    return {
        "prompts": hashlib.sha256(" ".join(prompt.id for prompt in prompts).encode()).hexdigest(),
        "prompt_contents": describe(list(prompts))["hash"],
    }


def shortest_length(
    model: TextModel,
    needle: AnyNeedle | None = PAPER,
    template: str = "base",
    read_twice: bool = False,
    distractors: int | Sequence[AnyNeedle] = (),
    prepend_bos: bool | None = None,
    seed: int = 0,
) -> int:
    """Return the tokens of a prompt without haystack; see `grid`, and `seed` of `Haystack`.

    Examples:
        >>> from hooked_hybrid.niah.prompts import shortest_length
        >>> shortest_length(model)
        54
    """
    maker = _maker(model, Haystack(), template, read_twice, prepend_bos)
    return _parts(maker, needle, distractors, seed).shortest


def default_lengths(longest: int, n: int = 10, shortest: int | None = None) -> list[int]:
    """Return `n` lengths in tokens, evenly spaced.

    As in the papers, 250 to 4,096; for another longest, the same fraction, at least 64.

    Raises:
        ValueError: `n` below 1, or `longest` below the shortest.

    Examples:
        >>> from hooked_hybrid.niah.prompts import default_lengths
        >>> default_lengths(512, n=4)
        [64, 213, 363, 512]
    """
    shortest = max(64, round(longest * 250 / 4096)) if shortest is None else shortest
    if n < 1 or longest < shortest:
        raise ValueError(f"n={n} lengths from {shortest} to {longest}: give at least 1, in order")
    return [round(longest - (longest - shortest) * i / max(n - 1, 1)) for i in reversed(range(n))]


def default_depths(n: int = 10) -> list[float]:
    """Return `n` depths from 0 to 1, evenly spaced; a single one is the middle.

    Raises:
        ValueError: `n` below 1.

    Examples:
        >>> from hooked_hybrid.niah.prompts import default_depths
        >>> default_depths(5)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    if n < 1:
        raise ValueError(f"n={n} depths: give at least 1")
    return [i / (n - 1) for i in range(n)] if n > 1 else [0.5]


def _maker(
    model: TextModel,
    haystack: Haystack,
    template: str,
    read_twice: bool,
    prepend_bos: bool | None,
) -> Maker:
    if template not in TEMPLATES and not (HAYSTACK in template or QUESTION in template):
        raise ValueError(
            f"template={template!r}: give one of {', '.join(TEMPLATES)}, or a text with {HAYSTACK} "
            f"and {QUESTION}"
        )
    once, end = _checked_template(template).split(QUESTION)
    once += QUESTION
    text = f"{once}\n{once}{end}" if read_twice else once + end
    return Maker(model.text, haystack.texts(), text, template == "chat", prepend_bos)


def _checked_template(name: str) -> str:
    """Return the text of a template, which has its marks."""
    text = TEMPLATES.get(name, name)
    known = {HAYSTACK, QUESTION}
    if unknown := [mark for mark in re.findall(r"\{\w*\}", text) if mark not in known]:
        raise ValueError(
            f"template {name!r} has {', '.join(unknown)}: give {HAYSTACK} and {QUESTION} alone"
        )
    if text.count(QUESTION) != 1 or HAYSTACK not in text.split(QUESTION)[0]:
        raise ValueError(
            f"template {name!r} has {QUESTION} {text.count(QUESTION)} times and {HAYSTACK} "
            f"{text.count(HAYSTACK)} times: give {HAYSTACK}, and {QUESTION} once after it"
        )
    return text


def _parts(
    maker: Maker, needle: AnyNeedle | None, distractors: int | Sequence[AnyNeedle], seed: int
) -> PromptParts:
    asked = PAPER if needle is None else needle
    if isinstance(distractors, int):
        distractors = distractors_for(asked, distractors, seed)
    if same := [other.sentence for other in distractors if other.question == asked.question]:
        raise ValueError(f"distractors {same} answer the needle's own question, {asked.question!r}")
    hidden = () if needle is None else (needle.sentence,)
    return maker.parts(asked.question, hidden, tuple(other.sentence for other in distractors))


def _prompt(
    maker: Maker,
    needle: AnyNeedle | None,
    needle_id: str,
    parts: PromptParts,
    length: int,
    depth: int | float,
    template: str,
    read_twice: bool,
) -> Prompt:
    tokens, spans, real_depth, kind = maker.tokens(parts, length, depth)
    about = (length, depth, template, read_twice, len(parts.distractors), parts.question)
    said = json.dumps([*about, needle and asdict(needle)])
    return Prompt(
        id=hashlib.sha256(said.encode() + array("q", tokens).tobytes()).hexdigest()[:16],
        tokens=tuple(tokens),
        length=length,
        depth=depth,
        needle=needle,
        needle_id=needle_id,
        needle_spans=tuple(spans),
        template=template,
        read_twice=read_twice,
        n_distractors=len(parts.distractors),
        real_depth=real_depth if spans else None,
        placed_between=NAMES[kind] if spans else None,
    )
