"""Arguments that differ between the rows of a batch, and their values in one forward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Bool, Int, Shaped
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.hooks.slicing import read_indices, whole_numbers

PerRow = int | Sequence[int] | Int[Tensor, " batch"] | Any
"""A whole number, or one for each row of the batch. (Any: a numpy array.)"""
Spans = (
    Sequence[int]
    | Sequence[Sequence[int]]
    | Sequence[Sequence[Sequence[int]]]
    | Int[Tensor, "batch *span 2"]
    | Any
)
"""One (start, stop); several, for every row; a list for each row; or a tensor or array of these.

Positions are those of the document, from 0, as in `hook.run.key_pos`; `stop` is not included.
Several spans of a row act as one. The nesting of sequences determines their meaning: `(3, 6)` and
`[(3, 6), (9, 12)]` are for every row, `[[(3, 6)], [(2, 5), (9, 12)]]` for two rows. A tensor always
has an entry for each row of the batch, [batch 2] or [batch span 2]; if a row has fewer spans than
others, repeat one.
"""

Bounds = Int[Tensor, "*rows span 2"]


def entries_of_rows(
    values: Shaped[Tensor, "batch ..."], hook: HookPoint, name: str
) -> Shaped[Tensor, "row ..."]:
    """Return the entries of the rows of this forward.

    Args:
        values: an entry for each row of the original batch.
        hook: its run has the rows of this forward.
        name: of the argument, for the error.

    Raises:
        ValueError: another number of entries than the batch has rows.
    """
    rows, n_rows = hook.run.rows, hook.run.n_rows
    if n_rows is None:
        n_rows = max(int(rows.max()) + 1, values.shape[0])
    if values.shape[0] != n_rows:
        raise ValueError(f"{name} has {values.shape[0]} entries, the batch has {n_rows} rows")
    return values.to(rows.device)[rows]


def read_k(k: PerRow) -> Int[Tensor, "*batch"]:
    """Return a number of heads, or one for each row, as a tensor.

    Raises:
        ValueError: not whole, negative, or of another shape.
    """
    return read_per_row(k, "k", "a whole number of heads, 0 or more")


def read_per_row(
    given: Any, name: str, kind: str = "a position, counted from 0"
) -> Int[Tensor, "*batch"]:
    """Return a whole number from 0 on, or one for each row, as a new tensor.

    Args:
        given: an int; or numbers in a sequence, array or tensor [batch].
        name: of the argument, for the error.
        kind: of number, for the error.

    Raises:
        ValueError: fractions, True or False, negative numbers, no number, or several axes.
    """
    try:
        read = read_indices(given, name)
    except TypeError:
        read = slice(0)
    per_row = torch.as_tensor([]) if isinstance(read, slice) else torch.as_tensor(read)
    is_whole = per_row.dtype not in (torch.bool, torch.float32)
    if not is_whole or not per_row.numel() or bool((per_row < 0).any()):
        raise ValueError(f"{name}={given}: give {kind}, or one for each row")
    return per_row.clone()


def k_of_rows(k: Int[Tensor, "*batch"], n_heads: int, hook: HookPoint) -> Int[Tensor, " row"]:
    """Return the number of heads for each row of this forward.

    Raises:
        ValueError: more than the layer has, or numbers for another number of rows.
    """
    if int(k.max()) > n_heads:
        raise ValueError(f"k={int(k.max())}: layer {hook.layer()} has {n_heads} heads")
    if k.ndim:
        return entries_of_rows(k, hook, "k")
    return k.to(hook.run.rows.device).expand(hook.run.rows.shape[0])


def read_spans(spans: Spans) -> Bounds:
    """Return spans as [span 2] if they are for every row, as [batch span 2] if for each.

    Raises:
        ValueError: not whole numbers, not pairs, no span, or not 0 <= start < stop.
    """
    try:
        if hasattr(spans, "dtype"):
            bounds = _of_tensor(torch.as_tensor(spans))
        else:
            bounds = torch.tensor(_nested(spans))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"spans={spans!r}: give (start, stop), several of them, or a list or tensor with an "
            "entry for each row"
        ) from error
    start, stop = bounds.unbind(-1)
    if bool(((start < 0) | (start >= stop)).any()):
        raise ValueError(f"spans={spans!r}: positions count from 0, and start < stop")
    return bounds


def in_spans(bounds: Bounds, hook: HookPoint) -> Bool[Tensor, "batch key"]:
    """Return True at the keys in the spans of their row.

    Raises:
        ValueError: spans for another number of rows; or, in a step of generation, a span that ends
            after the tokens read so far (see `check_spans` for the other stages).
    """
    run = hook.run
    if run.key_pos is None:
        raise ValueError(f"{hook.name!r} has no keys: spans are for scores and patterns")
    if bounds.ndim == 3:
        bounds = entries_of_rows(bounds, hook, "spans")
    else:
        bounds = bounds.to(run.rows.device).expand(run.rows.shape[0], -1, -1)
    if run.stage == "generation":
        _require_read(bounds, run)
    key_pos, (start, stop) = run.key_pos[:, :, None], bounds[:, None].unbind(-1)
    return ((start <= key_pos) & (key_pos < stop)).any(-1)


def check_spans(spans: Spans, lengths: int | Sequence[int] | Int[Tensor, "*rows"]) -> None:
    """Raise an error if a span is invalid or ends after the tokens of its row.

    Call it before a run. A hook raises this error only in generation: a forward or a prefill may
    run in pieces, and a piece before the end of the span is not an error.

    Args:
        spans: as in `manipulate_span`.
        lengths: number of tokens of each row without padding, or one number for all rows.

    Raises:
        ValueError: as above; or lengths for another number of rows.

    Examples:
        >>> interventions.check_spans((7, 9), 16)
        >>> interventions.check_spans((7, 17), 16)
        Traceback (most recent call last):
            ...
        ValueError: a span of row 0 ends at 17, but the row has 16 tokens: positions count ...
    """
    bounds, n_tokens = read_spans(spans), torch.as_tensor(lengths)
    stop = bounds[..., 1].amax(-1)
    if stop.ndim and n_tokens.ndim and stop.shape != n_tokens.shape:
        raise ValueError(f"spans has {len(stop)} entries, lengths {len(n_tokens)}")
    _require_ends(*torch.broadcast_tensors(stop, n_tokens))


def _require_read(bounds: Int[Tensor, "batch span 2"], run: Run) -> None:
    _require_ends(bounds[..., 1].amax(-1), run.query_pos.amax(1) + 1, run.rows)


def _require_ends(stop: Tensor, n_tokens: Tensor, rows: Tensor | None = None) -> None:
    late = (stop > n_tokens).reshape(-1).nonzero()[:, 0].tolist()
    if late:
        row = late[0] if rows is None else int(rows[late[0]])
        raise ValueError(
            f"a span of row {row} ends at {int(stop.reshape(-1)[late[0]])}, but the row has "
            f"{int(n_tokens.reshape(-1)[late[0]])} tokens: positions count from 0, without padding"
        )


def _of_tensor(spans: Tensor) -> Int[Tensor, "batch span 2"]:
    is_whole = not (spans.is_floating_point() or spans.dtype == torch.bool)
    if not is_whole or spans.ndim not in (2, 3) or spans.shape[-1] != 2 or not spans.numel():
        raise ValueError(f"dtype {spans.dtype}, shape {tuple(spans.shape)}")
    return spans.long() if spans.ndim == 3 else spans.long()[:, None]


def _nested(spans: Any) -> list[Any]:
    """Return [span 2] or [batch span 2] as lists, with spans repeated to equal numbers."""
    depth, inner = 0, spans
    while isinstance(inner, Sequence) and depth < 4:
        depth, inner = depth + 1, inner[0] if inner else None
    if depth < 3:
        return _pairs([spans] if depth == 1 else spans)
    rows = [_pairs(row) for row in spans]
    longest = max(map(len, rows))
    return [row + row[:1] * (longest - len(row)) for row in rows]


def _pairs(spans: Sequence[Any]) -> list[tuple[int, ...]]:
    pairs = [whole_numbers(span, "a span") for span in spans]
    if not pairs or any(len(pair) != 2 for pair in pairs):
        raise ValueError("not pairs")
    return pairs


class Handover:
    """Values that a hook passes to a later hook at the same layer, rows and positions.

    Rows and positions are part of the key, as `hook_at` and `on_rows` call one hook several times
    before the next, and as values of a failed run must not be used in another.
    """

    def __init__(self) -> None:
        self._left: dict[tuple[int, ...], Tensor] = {}

    def leave(self, hook: HookPoint, value: Tensor) -> None:
        """Keep a value."""
        self._left[self._key(hook)] = value

    def has(self, hook: HookPoint) -> bool:
        """Whether there is a value for this place."""
        return self._key(hook) in self._left

    def take(self, hook: HookPoint) -> Tensor:
        """Return the value for this place.

        Raises:
            RuntimeError: there is none, or it was already taken, as the hooks of an intervention
                were not called in turn.
        """
        if not self.has(hook):
            raise RuntimeError(
                f"at {hook.name!r} nothing is left by the hook that runs before this one, of the "
                "same intervention. Attach all its hooks, once at a time: to attach an "
                "intervention twice, make it twice"
            )
        return self._left.pop(self._key(hook))

    @staticmethod
    def _key(hook: HookPoint) -> tuple[int, ...]:
        run = hook.run
        first = run.query_pos[:, 0].tolist()
        return (hook.layer(), run.query_pos.shape[1], *run.rows.tolist(), *first)
