"""Text to tokens and back."""

from hooked_hybrid.text.text import (
    PaddingSide,
    Text,
    as_tokenizer,
    pad_rows,
)

__all__ = [
    "PaddingSide",
    "Text",
    "as_tokenizer",
    "pad_rows",
]
