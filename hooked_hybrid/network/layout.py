"""The position and the document of each token of a forward, and its padding.

Mixers use a `Layout`, not masks or segment ids. Padding may be on the left or the right of a row,
several documents may be packed into a row, and a row may continue from a state.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.hooks.run import Run, Stage
from hooked_hybrid.network.state import HybridState

T = TypeVar("T")


@dataclass(frozen=True)
class Layout:
    """Positions of one forward, or of a piece of one.

    `pos` counts from 0 in each document and is -1 at padding. `doc` numbers the documents of a
    row; `state_doc` is the last document of the state. `doc` is None if each row is one document
    that continues the state's. `segment` is the id of the last document in each row.
    `n_before` counts the tokens before this piece if rows are alike and unpadded, else None.
    """

    pos: Int[Tensor, "batch pos"]
    doc: Int[Tensor, "batch pos"] | None
    state_doc: Int[Tensor, " batch"] | None
    segment: Int[Tensor, " batch"]
    next_pos: Int[Tensor, " batch"]
    has_padding: bool
    n_before: int | None
    run: Run
    memo: dict[Any, Any] = dataclasses.field(default_factory=dict, compare=False, repr=False)

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """Return the result of `make`, computed once for this layout and shared by its layers."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    @property
    def is_plain(self) -> bool:
        """Whether rows are alike: no padding, one document, the same number of tokens before."""
        return self.n_before is not None

    @property
    def length(self) -> int:
        """Number of positions."""
        return self.pos.shape[1]

    @property
    def is_real(self) -> Bool[Tensor, "batch pos"]:
        """True at tokens, False at padding."""
        return self.pos >= 0

    @property
    def is_start(self) -> Bool[Tensor, "batch pos"]:
        """True at the first token of each document."""
        return self.pos == 0

    @property
    def resets(self) -> Bool[Tensor, "batch pos"] | None:
        """True where a recurrence must forget: at starts of documents that are preceded by tokens.

        None if every document begins its row, and so begins from a state of zero.
        """
        return None if self.doc is None else self.is_start

    def on(self, device: torch.device) -> Layout:
        """Return the layout on another device, made once for all layers there."""
        if self.pos.device == device:
            return self

        def make() -> Layout:
            moved: dict[str, Any] = {
                name: value.to(device)
                for name, value in vars(self).items()
                if isinstance(value, Tensor)
            }
            return dataclasses.replace(self, **moved, run=self.run.on(device), memo={})

        return self.once(("on", device), make)

    def piece(self, start: int, stop: int) -> Layout:
        """Return the layout of positions `start` to `stop`, to be run from the state at `start`."""
        whole = self.length
        stop = min(stop, whole)
        if (start, stop) == (0, whole):
            return self
        doc = self.doc
        return dataclasses.replace(
            self,
            pos=self.pos[:, start:stop],
            doc=None if doc is None else doc[:, start:stop],
            state_doc=self.state_doc if doc is None or start == 0 else doc[:, start - 1],
            n_before=None if self.n_before is None else self.n_before + start,
            run=self.run.at(start, stop),
            memo={},
        )

    def fill_starts(self, x: Tensor, value: float) -> Tensor:
        """Return `x` [batch pos ...], a tensor of the caller's own, with a value at the starts."""
        if not self.is_plain or transforms.is_followed():
            return x.masked_fill(self.is_start.view(*self.pos.shape, *(1,) * (x.ndim - 2)), value)
        if self.n_before == 0:
            x[:, 0] = value
        return x

    def zero_padding(self, x: Tensor) -> Tensor:
        """Return `x` [batch pos ...] with zeros at padding."""
        if not self.has_padding:
            return x
        return x.masked_fill(~self.is_real.view(*self.pos.shape, *(1,) * (x.ndim - 2)), 0)

    def detach_padding(self, x: Tensor) -> Tensor:
        """Return `x` [batch pos ...] without a gradient at padding, where it may be NaN.

        For values that are mixed across positions: otherwise the gradient at padding, 0 times a
            value that may not be finite, would reach tokens.
        """
        if not self.has_padding or not torch.is_grad_enabled():
            return x
        is_real = self.is_real.view(*self.pos.shape, *(1,) * (x.ndim - 2))
        return torch.where(is_real, x, x.detach())

    def last_real(self, x: Tensor, is_real: Bool[Tensor, "batch n"] | None, n: int) -> Tensor:
        """Return the last `n` real entries of each row of `x` [batch n ...], padding first."""
        if not self.has_padding or is_real is None:
            last = x[:, max(x.shape[1] - n, 0) :]
            return last if 2 * n >= x.shape[1] else last.clone()  # a view would keep all of x
        order = is_real.int().argsort(dim=1, stable=True)[:, max(x.shape[1] - n, 0) :]
        index = order.view(*order.shape, *(1,) * (x.ndim - 2)).expand(-1, -1, *x.shape[2:])
        return x.gather(1, index)

    def key_docs(self, n_cached: int) -> Int[Tensor, "batch key"] | None:
        """Return the document of each key, cached ones first, or None if there is only one."""
        if self.doc is None:
            return None
        return torch.cat([self._state_docs().expand(-1, n_cached), self.doc], dim=1)

    def _state_docs(self) -> Int[Tensor, "batch 1"]:
        if self.state_doc is None:
            return self.pos.new_zeros(self.pos.shape[0], 1)
        return self.state_doc[:, None]

    @property
    def last_doc(self) -> Int[Tensor, "batch 1"] | None:
        """The last document of each row; right padding belongs to the document before it."""
        return None if self.doc is None else self.doc[:, -1:]


def lay_out(
    x: Tensor,
    state: HybridState | None,
    attention_mask: Tensor | None,
    segment_ids: Tensor | None,
    stage: Stage = "forward",
    step: int = 0,
    rows: Tensor | None = None,
    allow_empty_rows: bool = False,
    n_rows: int | None = None,
) -> Layout:
    """Return the layout of new positions, one row after another.

    Args:
        x: tokens or residual stream [batch pos ...]: its shape and device.
        state: what the rows continue from.
        attention_mask: 1 at tokens, 0 at padding [batch pos]; zeros on one or both sides only.
        segment_ids: id of each token's document [batch pos], 0 at padding. A document continues
            from the state if its id is that of the state's last document.
        stage, step, rows, n_rows: for `hook.run`.
        allow_empty_rows: whether a row may be all padding.

    Raises:
        ValueError: a mask of another shape, with other values, with holes, or with an empty row;
            or both a mask and segment ids.
    """
    (batch, n_pos), device = x.shape[:2], x.device
    if attention_mask is not None and segment_ids is not None:
        raise ValueError("give attention_mask or segment_ids, not both: id 0 is padding already")
    if state is None:
        start = torch.zeros(batch, dtype=torch.long, device=device)
        segment = torch.ones_like(start)
    else:
        start, segment = state.next_pos.to(device), state.segment.to(device)
    n_rows = batch if rows is None else n_rows
    rows = torch.arange(batch, device=device) if rows is None else rows.to(device)
    ids = segment_ids if segment_ids is not None else attention_mask
    if ids is None:
        pos = start[:, None] + torch.arange(n_pos, device=device)
        n_before = 0 if state is None else state.n_seen
        run = Run(stage, step, pos, rows, n_rows=n_rows)
        return Layout(pos, None, None, segment, start + n_pos, False, n_before, run)

    name = "attention_mask" if segment_ids is None else "segment_ids"
    ids = _checked_ids(ids, name, (batch, n_pos), allow_empty_rows).to(device)
    is_real = ids > 0
    rank = is_real.cumsum(1) - 1
    has_padding = not bool(transforms.plain_rows(is_real).all())
    if segment_ids is None:
        pos, doc = start[:, None] + rank, None
        next_pos = start + rank[:, -1] + 1
        if not has_padding:  # a mask of ones has no effect
            return lay_out(x, state, None, None, stage, step, rows, n_rows=n_rows)
    else:
        before = torch.cat([segment[:, None], ids[:, :-1]], dim=1)
        before = torch.where(before > 0, before, segment[:, None])  # after padding on the left
        begins = is_real & ((ids != before) | ((start[:, None] + rank) == 0))
        doc = begins.long().cumsum(1)
        first = torch.where(begins, rank, -1).cummax(1).values
        pos = torch.where(doc > 0, rank - first, start[:, None] + rank)
        next_pos = pos.gather(1, _last_real_index(is_real))[:, 0] + 1
        segment = ids.gather(1, _last_real_index(is_real))[:, 0]
    pos = pos.masked_fill(~is_real, -1)
    run = Run(stage, step, pos, rows, n_rows=n_rows)
    return Layout(pos, doc, None, segment, next_pos, has_padding, None, run)


def _last_real_index(is_real: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch 1"]:
    index = torch.arange(is_real.shape[1], device=is_real.device)
    return torch.where(is_real, index, 0).amax(dim=1, keepdim=True)


def _checked_ids(ids: Tensor, name: str, shape: tuple[int, int], allow_empty_rows: bool) -> Tensor:
    """Return the ids as integers, after refusing values that would be misread."""
    ids = ids if isinstance(ids, Tensor) else torch.as_tensor(ids, device="cpu")
    if tuple(ids.shape) != shape:
        raise ValueError(
            f"{name} has shape {tuple(ids.shape)}; give one entry for each new token, {shape}"
        )
    values = transforms.plain_rows(ids)
    if ids.is_floating_point() and not bool((values == values.round()).all()):
        raise ValueError(f"{name} holds fractions; give integers")
    low, high = int(values.min()), int(values.max())
    if low < 0 or (name == "attention_mask" and high > 1):
        allowed = "0 and 1" if name == "attention_mask" else "0 (padding) and positive ids"
        raise ValueError(f"{name} holds values from {low} to {high}; give {allowed}")
    is_real = (values > 0).int()
    empty = (is_real.sum(1) == 0).nonzero()[:, 0].tolist()
    if empty and not allow_empty_rows:
        raise ValueError(f"{name} leaves rows {empty} without a token")
    runs = (is_real.diff(dim=1, prepend=is_real.new_zeros(len(is_real), 1)) == 1).sum(1)
    holes = (runs > 1).nonzero()[:, 0].tolist()
    if holes:
        raise ValueError(
            f"{name} has zeros between tokens in rows {holes}; padding may stand on the left or on "
            "the right of a row only"
        )
    return ids.long()
