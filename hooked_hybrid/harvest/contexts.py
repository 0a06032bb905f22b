"""Documents cut into contexts, and contexts put into shards and batches.

Each context is a row of its own and begins like a text, so that no document sees another and every
hook acts as in a run of that context alone. Rows of similar length run together. Their little
padding is on the right, where no token of a causal model sees it. Contexts packed into full rows
with `segment_ids` would be read at two thirds of that speed (docs/harvest.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from hooked_hybrid.harvest.documents import Documents
from hooked_hybrid.shapes import Tokens

BLOCK = 2**22
"""Tokens processed at a time while planning."""


@dataclass(frozen=True)
class PackedBatch:
    """Contexts that run together.

    `is_kept` is true at positions whose activations are written. For these, in the order of rows
    and positions, `rows` is the row in the shard and `documents` the number of the document.
    """

    tokens: Tokens
    is_token: Bool[Tensor, "batch pos"]
    is_kept: Bool[Tensor, "batch pos"]
    rows: Int[Tensor, " row"]
    documents: Int[Tensor, " row"]


@dataclass(frozen=True)
class Beside:
    """Columns stored with the activations of a shard, for each row.

    `position` counts the document's own tokens, and is -1 for a BOS that was prepended.
    """

    token: Int[Tensor, " row"]
    document: Int[Tensor, " row"]
    position: Int[Tensor, " row"]


class PackingPlan:
    """The context, batch and shard in which each token is read.

    Args:
        documents: the tokens to read.
        context_length: most tokens of a context, BOS included.
        shard_tokens: most rows of a shard; a context is never split, and a shard has at least one.
        batch_tokens: most positions of a forward.
        bos: token prepended to every context; None prepends nothing.
        left_out: tokens that are read, but whose activations are not written.
        seed: of the random order of the contexts; None keeps their order.

    Raises:
        ValueError: nothing would be written.
    """

    def __init__(
        self,
        documents: Documents,
        context_length: int,
        shard_tokens: int,
        batch_tokens: int,
        bos: int | None = None,
        left_out: tuple[int, ...] = (),
        seed: int | None = None,
    ) -> None:
        self.documents, self.bos, self.batch_tokens = documents, bos, batch_tokens
        self.left_out = torch.tensor(left_out, dtype=torch.int32)
        own = context_length - (bos is not None)
        lengths = documents.starts.diff()
        n_contexts = (lengths + own - 1) // own
        self.document = torch.arange(len(lengths)).repeat_interleave(n_contexts)
        first = (n_contexts.cumsum(0) - n_contexts).repeat_interleave(n_contexts)
        self.first = (torch.arange(len(self.document)) - first) * own
        self.length = (lengths[self.document] - self.first).clamp(max=own)
        self.n_kept = self._count_kept()
        order = self.n_kept.nonzero()[:, 0]
        if seed is not None:
            generator = torch.Generator().manual_seed(seed)
            order = order[torch.randperm(len(order), generator=generator)]
        self.order = order
        self.n_tokens = int(self.n_kept.sum())
        if not self.n_tokens:
            raise ValueError("all tokens are special ones: keep them with drop_special=False")
        self.bounds = _bounds(self.n_kept[order].tolist(), shard_tokens)

    @property
    def n_shards(self) -> int:
        """Number of shards."""
        return len(self.bounds) - 1

    def contexts(self, shard: int) -> Int[Tensor, " context"]:
        """Return the contexts of a shard, in the order in which they are written."""
        return self.order[self.bounds[shard] : self.bounds[shard + 1]]

    def n_rows(self, shard: int) -> int:
        """Return the number of tokens whose activations are in a shard."""
        return int(self.n_kept[self.contexts(shard)].sum())

    def beside(self, shard: int) -> Beside:
        """Return the tokens of a shard's rows, with their documents and positions."""
        tokens, documents, positions = [], [], []
        for context in self.contexts(shard).tolist():
            row, kept = self._row(context)
            first = int(self.first[context])
            position = torch.arange(first, first + int(self.length[context]))
            if self.bos is not None:
                position = torch.cat([torch.tensor([-1]), position])
            tokens.append(row[kept])
            positions.append(position[kept])
            documents.append(torch.full_like(positions[-1], int(self.document[context])))
        columns = (torch.cat(column).int() for column in (tokens, documents, positions))
        return Beside(*columns)

    def batches(self, shard: int) -> Iterator[PackedBatch]:
        """Yield the contexts of a shard, the longest first, in batches of as many as fit."""
        contexts = self.contexts(shard)
        n_kept, lengths = self.n_kept[contexts], self.length[contexts] + (self.bos is not None)
        begins = n_kept.cumsum(0) - n_kept
        order = lengths.argsort(descending=True, stable=True).tolist()
        while order:
            n_rows = max(self.batch_tokens // int(lengths[order[0]]), 1)
            chosen, order = order[:n_rows], order[n_rows:]
            pairs = [self._row(context) for context in contexts[chosen].tolist()]
            rows = [begins[i] + torch.arange(int(n_kept[i])) for i in chosen]
            yield PackedBatch(
                pad_sequence([row for row, _ in pairs], batch_first=True),
                pad_sequence([torch.ones_like(kept) for _, kept in pairs], batch_first=True),
                pad_sequence([kept for _, kept in pairs], batch_first=True),
                torch.cat(rows),
                self.document[contexts[chosen]].repeat_interleave(n_kept[chosen]),
            )

    def _row(self, context: int) -> tuple[Int[Tensor, " pos"], Bool[Tensor, " pos"]]:
        """Return the tokens of a context, and a mask of those whose activations are kept."""
        start = int(self.documents.starts[self.document[context]] + self.first[context])
        row = self.documents.tokens[start : start + int(self.length[context])].long()
        if self.bos is not None:
            row = torch.cat([torch.tensor([self.bos]), row])
        return row, ~torch.isin(row, self.left_out)

    def _count_kept(self) -> Int[Tensor, " context"]:
        """Return the number of rows of each context."""
        tokens, found = self.documents.tokens, []
        for start in range(0, len(tokens) if len(self.left_out) else 0, BLOCK):
            is_out = torch.isin(tokens[start : start + BLOCK], self.left_out)
            found.append(is_out.nonzero()[:, 0] + start)
        at = torch.cat(found) if found else torch.empty(0, dtype=torch.long)
        begin = self.documents.starts[self.document] + self.first
        n_out = torch.searchsorted(at, begin + self.length) - torch.searchsorted(at, begin)
        keeps_bos = self.bos is not None and self.bos not in self.left_out
        return self.length - n_out + keeps_bos


def _bounds(n_kept: list[int], shard_tokens: int) -> list[int]:
    """Return the index of the first context of each shard, and the end of the last shard."""
    bounds, room = [0], shard_tokens
    for i, n in enumerate(n_kept):
        if n > room and i > bounds[-1]:
            bounds.append(i)
            room = shard_tokens
        room -= n
    return [*bounds, len(n_kept)]
