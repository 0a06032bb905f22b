"""Recognising the padding of a batch without a mask."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.text.text import Text

_REMEDY = (
    "pass attention_mask=: to_tokens(..., return_mask=True) gives it, and "
    "torch.ones_like(tokens) takes every token as text"
)


def may_hold_padding(tokens: Int[Tensor, "batch pos"], text: Text) -> Bool[Tensor, ""] | None:
    """Return whether rows begin or end like padded ones, as a tensor on the tokens' device.

    None without a padding token, or with one token a row, as in decoding. A padding token that is
    also BOS or EOS may occur once at an end of a text; but if all rows begin with BOS, some after
    padding, that token is padding.
    """
    pad, n_pos = text.pad_id, tokens.shape[1]
    if pad is None or n_pos < 2:
        return None
    if text.shows_padding:
        return tokens[:, :: n_pos - 1].eq(pad).any()  # the first and the last of each row
    at_the_end = tokens[:, -2:] if pad in text.eos else tokens[:, -1:]
    found = (tokens[:, :2].eq(pad).all(1) | at_the_end.eq(pad).all(1)).any()
    if text.bos is None or pad == text.bos:
        return found
    whole = tokens[:, 0].eq(text.bos)  # the longest row of a batch has no padding
    moved = tokens[:, 0].eq(pad) & tokens[:, 1].eq(text.bos)
    return found | (whole.any() & moved.any() & (whole | moved).all())


def mask_of(tokens: Int[Tensor, "batch pos"], text: Text) -> Int[Tensor, "batch pos"]:
    """Return the mask of padded rows: 0 at the padding tokens at the beginning or end of a row.

    Raises:
        ValueError: padding that cannot be distinguished from text: its token is also BOS or EOS, or
            a row has it at both ends, or only padding.
    """
    if not text.shows_padding:
        raise ValueError(
            f"rows begin or end with token {text.pad_id}, which pads and is BOS or EOS too: "
            f"{_REMEDY}"
        )
    is_pad = tokens.eq(text.pad)
    leads = is_pad.long().cumprod(1).bool()
    trails = is_pad.long().flip(1).cumprod(1).flip(1).bool()
    if empty := is_pad.all(1).nonzero()[:, 0].tolist():
        raise ValueError(f"rows {empty} hold nothing but padding (token {text.pad_id}): {_REMEDY}")
    if both := (leads.any(1) & trails.any(1)).nonzero()[:, 0].tolist():
        raise ValueError(
            f"rows {both} begin and end with the padding token {text.pad_id}: {_REMEDY}"
        )
    return torch.where(leads | trails, 0, 1)


def refuse_unequal_ends(tokens: Int[Tensor, "batch pos"], text: Text) -> None:
    """Refuse prompts if only some of them end with a padding token that is also EOS.

    New tokens would follow the padding of the shorter ones.

    Raises:
        ValueError: names the rows and the remedy.
    """
    if text.pad_id is None or text.pad_id not in text.eos or tokens.shape[1] < 2:
        return
    ends = tokens[:, -1].eq(text.pad_id)
    if bool(ends.any() & ~ends.all()):
        raise ValueError(
            f"rows {ends.nonzero()[:, 0].tolist()} end with token {text.pad_id}, which pads and is "
            f"EOS too, and others do not, so that it may be padding: {_REMEDY}"
        )
