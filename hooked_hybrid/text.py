"""Text in and out, with any Hugging Face tokenizer: of `transformers` or of `tokenizers`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.config import HybridConfig

PaddingSide = Literal["left", "right"]


class Text:
    """A tokenizer and the special tokens of the model it serves.

    Args:
        tokenizer: a `transformers` tokenizer or a `tokenizers.Tokenizer`.
        cfg: gives the special tokens the tokenizer does not name.
    """

    def __init__(self, tokenizer: Any, cfg: HybridConfig) -> None:
        self.tokenizer, self.cfg = tokenizer, cfg

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
        """Whether a text gets BOS in front unless told: as the model was trained."""
        adds_bos = getattr(self.tokenizer, "adds_bos", None)
        return self.bos is not None and (
            self.cfg.default_prepend_bos if adds_bos is None else adds_bos
        )

    @property
    def pad(self) -> int:
        """Padding token; any token serves, as padding is masked out."""
        pad = self._special("pad_token_id")
        return pad if pad is not None else (self.bos or 0)

    def encode(self, text: str, prepend_bos: bool) -> list[int]:
        """Return the tokens of a text, with BOS in front where asked and not there already.

        Raises:
            ValueError: BOS is asked for and the model has none.
        """
        encoded = self.tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = list(getattr(encoded, "ids", encoded))
        if not prepend_bos:
            return ids
        if self.bos is None:
            raise ValueError("prepend_bos=True, but neither tokenizer nor config names a BOS token")
        return ids if ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of some tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=skip_special_tokens))

    def batch(
        self, texts: Sequence[str], prepend_bos: bool, padding_side: PaddingSide
    ) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
        """Return padded tokens and their mask, None where no row is padded."""
        if not texts:
            raise ValueError("there is no text: give at least one")
        rows = [self.encode(text, prepend_bos) for text in texts]
        if empty := [i for i, row in enumerate(rows) if not row]:
            raise ValueError(f"texts {empty} hold no token; give at least one, or prepend BOS")
        return pad_rows(rows, self.pad, padding_side)

    def _special(self, name: str) -> int | None:
        own = getattr(self.tokenizer, name, None)
        return getattr(self.cfg, name) if own is None else own


def pad_rows(
    rows: Sequence[Sequence[int]], pad: int, padding_side: PaddingSide
) -> tuple[Int[Tensor, "batch pos"], Int[Tensor, "batch pos"] | None]:
    """Return rows of tokens as one tensor and its mask, None where no row is padded.

    Raises:
        ValueError: a side that is neither "left" nor "right".
    """
    if padding_side not in ("left", "right"):
        raise ValueError(f"padding_side={padding_side!r}: give 'left' or 'right'")
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        at = slice(width - len(row), None) if padding_side == "left" else slice(0, len(row))
        tokens[i, at] = torch.tensor(row)
        mask[i, at] = 1
    return tokens, None if bool(mask.all()) else mask
