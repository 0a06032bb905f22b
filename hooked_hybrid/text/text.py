"""Encoding and decoding text with a tokenizer of `transformers` or `tokenizers`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.config import HybridConfig

PaddingSide = Literal["left", "right"]
"""The side of a row on which padding is put."""
_PARTIAL = "\N{REPLACEMENT CHARACTER}"  # decoded from bytes that are not a character
_MOST_HELD = 4  # tokens: a character has at most 4 bytes


class Text:
    """A tokenizer and the special tokens of its model.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        cfg: provides the special tokens that the tokenizer does not name.

    Raises:
        ValueError: not a tokenizer, or one that pads or cuts texts itself.

    Examples:
        >>> from hooked_hybrid.text import Text
        >>> words = Text(model.text.tokenizer, model.cfg)
        >>> type(words.tokenizer).__name__
        'CheckpointTokenizer'
    """

    def __init__(self, tokenizer: Any, cfg: HybridConfig) -> None:
        self.tokenizer, self.cfg = as_tokenizer(tokenizer), cfg
        for name in ("padding", "truncation"):  # of `tokenizers`; transformers sets them each time
            if isinstance(getattr(tokenizer, name, None), dict):
                raise ValueError(
                    f"this tokenizer has {name} enabled, and texts are padded and cut by the "
                    f"model: call its no_{name}() first"
                )

    @property
    def bos(self) -> int | None:
        """Beginning-of-sequence token."""
        return self._special("bos_token_id")

    @property
    def eos(self) -> tuple[int, ...]:
        """End-of-sequence tokens."""
        own = getattr(self.tokenizer, "eos_token_id", None)
        return self.cfg.eos_token_ids or (() if own is None else (own,))

    @property
    def prepends_bos(self) -> bool:
        """Whether BOS is prepended to a text by default, as the tokenizer itself does.

        `cfg.default_prepend_bos` overrides this if it is set.
        """
        if self.bos is None or self.cfg.default_prepend_bos is not None:
            return self.bos is not None and bool(self.cfg.default_prepend_bos)
        try:
            before, _, _ = self._parts("a", None)
        except Exception:  # `tokenizers` raises a bare one if there is no unknown token
            before, _, _ = self._parts("", None)
        return before[:1] == [self.bos]

    @property
    def pad(self) -> int:
        """Padding token; if none is named, another token, as padding is masked."""
        pad = self.pad_id
        return pad if pad is not None else (self.bos or 0)

    @property
    def pad_id(self) -> int | None:
        """Padding token, if the tokenizer or the config names one."""
        return self._special("pad_token_id")

    @property
    def shows_padding(self) -> bool:
        """Whether padding can be distinguished from text: its token is neither BOS nor EOS."""
        return self.pad_id is not None and self.pad_id not in (self.bos, *self.eos)

    def encode(
        self,
        text: str,
        prepend_bos: bool | None = None,
        most: int | None = None,
        ends: bool = True,
    ) -> list[int]:
        """Return the tokens of a text.

        Args:
            text: what to encode.
            prepend_bos: None: with the tokenizer's own special tokens; True: also with BOS in
                front; False: only the text's tokens. A text that begins with BOS gets no second
                one.
            most: the largest number of tokens. The text's own tokens are cut, on the tokenizer's
                `truncation_side`; special tokens around it are kept.
            ends: whether to add the tokens that the tokenizer puts after a text.

        Raises:
            ValueError: `prepend_bos=True`, and the model has no BOS.
        """
        before, ids, after = self._parts(text, prepend_bos)
        after = after if ends else []
        if most is not None and len(before) + len(ids) + len(after) > most:
            room = max(most - len(before) - len(after), 0)
            is_left = getattr(self.tokenizer, "truncation_side", None) == "left"
            ids = ids[len(ids) - room :] if is_left else ids[:room]
        return [*before, *ids, *after]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of some tokens."""
        options = {}
        if hasattr(self.tokenizer, "clean_up_tokenization_spaces"):
            options = {"clean_up_tokenization_spaces": False}  # it would remove blanks
        return str(
            self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens, **options)
        )

    def decode_after(
        self, before: Sequence[int], ids: Sequence[int], skip_special_tokens: bool = False
    ) -> str:
        """Return the text that tokens add to the text of the tokens before them.

        A blank that a tokenizer omits at the beginning of a text is kept.
        """
        start = self.decode(before, skip_special_tokens)
        both = self.decode([*before, *ids], skip_special_tokens)
        for known in (start, start.rstrip(_PARTIAL)):  # bytes may have become a character
            if both.startswith(known):
                return both[len(known) :]
        return self.decode(ids, skip_special_tokens)

    def added(self, before: Sequence[int], ids: Sequence[int], stops: Sequence[str] = ()) -> str:
        """Return the text that new tokens add, up to the first of some strings in it.

        If a tokenizer's tokens contain no blanks, none is added before the first.
        """
        text = self.decode_after(before, ids)
        text = text[: min((text.find(s) for s in stops if s in text), default=len(text))]
        return text.removeprefix(" ") if self.joins_words and before else text

    def strings(self, ids: Sequence[int]) -> list[str]:
        """Return each token as decoded within a text, with a blank before it kept.

        If tokens share a character, the last one has it, and those before it are U+FFFD.
        """
        anchor = [] if self.joins_words else self._anchor()
        if not anchor:
            return [self.decode([token]) for token in ids]
        found: list[str] = []
        held: list[int] = []  # tokens of an incomplete character
        shown = ""  # complete text of the first of them
        for token in ids:
            tails = ([*held[start:], token] for start in range(len(held) + 1))
            texts = [self.decode_after(anchor, next(tails))]
            while texts[-1].endswith(_PARTIAL) and (tail := next(tails, None)):
                texts.append(self.decode_after(anchor, tail))  # a character may begin later
            own = texts[-1] if len(texts) > 1 else texts[0][len(shown) :]
            if not own.endswith(_PARTIAL):
                found.append(own.lstrip(_PARTIAL) or own if held else own)
                held, shown = [], ""
            elif begun := texts[0].rstrip(_PARTIAL)[len(shown) :]:
                found.append(begun.lstrip(_PARTIAL) + _PARTIAL)
                held, shown = [token], texts[-1].rstrip(_PARTIAL)
            else:
                found.append(_PARTIAL)
                held = [*held, token][-_MOST_HELD:]
        return found

    @property
    def joins_words(self) -> bool:
        """Whether decoding puts blanks between tokens, as without a decoder."""
        for name in ("backend", "backend_tokenizer"):
            found: Any = getattr(self.tokenizer, name, None)
            if hasattr(found, "decoder"):
                return found.decoder is None
        return getattr(self.tokenizer, "decoder", "") is None

    def rows(
        self, texts: Sequence[str], prepend_bos: bool | None, most: int | None
    ) -> list[list[int]]:
        """Return the tokens of several texts, at most `most` of each.

        Raises:
            ValueError: no text, or texts without a token.
        """
        if not texts:
            raise ValueError("there is no text: give at least one")
        rows = [self.encode(text, prepend_bos, most) for text in texts]
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise ValueError(f"texts {empty} hold no token; give at least one, or prepend BOS")
        return rows

    def _parts(self, text: str, prepend_bos: bool | None) -> tuple[list[int], list[int], list[int]]:
        """Return the special tokens before a text, its own tokens, and those after it."""
        wanted = self.cfg.default_prepend_bos if prepend_bos is None else prepend_bos
        ids = self._ids(text, special=False)
        bos = self.bos
        if wanted is False:
            return [], ids, []
        if prepend_bos and bos is None:
            raise ValueError("prepend_bos=True, but neither tokenizer nor config names a BOS token")
        before, after = self._around(text, ids)
        if wanted and bos is not None and before[:1] != [bos]:
            before = [bos, *before]
        if before[-1:] == [bos] == ids[:1]:
            before = before[:-1]
        return before, ids, after

    def _around(self, text: str, ids: list[int]) -> tuple[list[int], list[int]]:
        """Return the special tokens that the tokenizer puts before and after a text."""
        around = self._ids("", special=True)
        if around in ([], [self.bos]) and self.bos not in self.eos:
            return around, []
        whole = self._ids(text, special=True)
        for at in range(len(around) + 1):
            if whole[at : at + len(ids)] == ids and len(whole) == len(around) + len(ids):
                return whole[:at], whole[at + len(ids) :]
        raise ValueError(
            f"the tokenizer changes a text when it puts special tokens around it ({text[:40]!r}): "
            "pass prepend_bos=False"
        )

    def _ids(self, text: str, special: bool) -> list[int]:
        encoded = self.tokenizer.encode(text, add_special_tokens=special)
        return list(getattr(encoded, "ids", encoded))

    def _anchor(self) -> list[int]:
        """Return tokens of a text after which other tokens can be decoded."""
        try:
            ids = self._ids(".", special=False)
        except Exception:  # `tokenizers` raises a bare one if there is no unknown token
            return []
        text = self.decode(ids)
        return ids if text and not text.endswith(_PARTIAL) else []

    def _special(self, name: str) -> int | None:
        own = getattr(self.tokenizer, name, None)
        return getattr(self.cfg, name) if own is None else own


def as_tokenizer(tokenizer: Any) -> Any:
    """Return a tokenizer that a model can use; for a folder, the one in it.

    Raises:
        ValueError: a name, a folder without a tokenizer, or an object that is not a tokenizer.

    Examples:
        >>> from hooked_hybrid.text import as_tokenizer
        >>> as_tokenizer(model.text.tokenizer) is model.text.tokenizer
        True
    """
    if isinstance(tokenizer, str | os.PathLike):
        from hooked_hybrid.text.tokenizer import read_tokenizer  # imports `tokenizers` and `jinja2`

        found = read_tokenizer(Path(tokenizer)) if Path(tokenizer).is_dir() else None
        if found is None:
            raise ValueError(
                f"tokenizer={str(tokenizer)!r}: no folder that holds tokenizer.json or "
                "tokenizer.model; give one, or the tokenizer itself, such as "
                "transformers.AutoTokenizer.from_pretrained(...)"
            )
        return found
    can = all(callable(getattr(tokenizer, name, None)) for name in ("encode", "decode"))
    if tokenizer is not None and not can:
        raise ValueError(
            f"tokenizer is a {type(tokenizer).__name__}, which cannot encode and decode; give a "
            "Hugging Face tokenizer, a folder that holds one, or None"
        )
    return tokenizer


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, padding_side: PaddingSide
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"]]:
    """Return rows of tokens as one tensor and its mask, 1 at tokens and 0 at padding.

    Raises:
        ValueError: a side that is neither "left" nor "right".

    Examples:
        >>> from hooked_hybrid.text import pad_rows
        >>> tokens, mask = pad_rows([[2, 5, 6], [2, 7]], pad=0, padding_side="left")
        >>> tokens.tolist(), mask.tolist()
        ([[2, 5, 6], [0, 2, 7]], [[1, 1, 1], [0, 1, 1]])
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: give 'left' or 'right'")
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if padding_side == "left" else slice(0, len(row))
        tokens[i, at] = torch.tensor(row, dtype=torch.long)
        mask[i, at] = 1
    return tokens, mask
