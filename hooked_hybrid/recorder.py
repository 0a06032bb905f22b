"""Caching a generation: one cache from many forwards, as one long forward would have left it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.cache import ActivationCache
from hooked_hybrid.hooks import HookPoint, Run, per_position, watcher
from hooked_hybrid.names import NameFilter
from hooked_hybrid.state import AttentionState, HybridState

if TYPE_CHECKING:
    from hooked_hybrid.model import HookedHybrid


class Recorder:
    """Watchers that keep every piece of a generation and put them together at the end.

    Args:
        model: what is watched.
        names_filter: True for every point but the large ones, or as in `run_with_cache`.
        tokens: the prompt, rows ending at the right edge.
        mask: its padding.
        state: what the prompt continues from.
    """

    def __init__(
        self,
        model: HookedHybrid,
        names_filter: NameFilter | Literal[True],
        tokens: Int[Tensor, "batch pos"],
        mask: Int[Tensor, "batch pos"] | None,
        state: HybridState | None,
    ) -> None:
        self.model, self.state = model, state
        self.names = model._cached_names(None if names_filter is True else names_filter)
        self.batch = tokens.shape[0]
        n_padding = tokens.new_zeros(self.batch) if mask is None else (mask == 0).sum(1)
        start = tokens.new_zeros(self.batch) if state is None else state.next_pos
        self.offset = n_padding - start
        """Added to a position, gives its index among the tokens of this generation."""
        self.pieces: dict[str, list[tuple[Tensor, Run]]] = {name: [] for name in self.names}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch for the length of a `with` block; pieces add up over several."""
        handles = [self.model.hook_dict[name].add_hook(self._keep) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def cache(self) -> ActivationCache:
        """Return the pieces put together: along positions, and keys where they belong."""
        whole = {
            name: self._put_together(self.model.hook_dict[name], pieces)
            for name, pieces in self.pieces.items()
            if pieces
        }
        return ActivationCache(whole, self.model)

    @watcher
    @per_position
    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        self.pieces[str(hook.name)].append((value.detach(), hook.run))

    def _put_together(self, hook: HookPoint, pieces: list[tuple[Tensor, Run]]) -> Tensor:
        if "key" in hook.axes:
            return self._place_keys(hook, pieces)
        values = [self._all_rows(value, run) for value, run in pieces]
        return torch.cat(values, dim=hook.pos_dim)

    def _all_rows(self, value: Tensor, run: Run) -> Tensor:
        """Return a piece with zeros for rows that had ended."""
        if value.shape[0] == self.batch:
            return value
        whole = value.new_zeros(self.batch, *value.shape[1:])
        return whole.index_copy(0, run.rows, value)

    def _place_keys(self, hook: HookPoint, pieces: list[tuple[Tensor, Run]]) -> Tensor:
        """Return scores or patterns over all keys: those of the state, then this generation's."""
        n_cached = 0
        if self.state is not None:
            block: Any = self.state.blocks[hook.layer()]
            n_cached = block.k.shape[1] if isinstance(block, AttentionState) else 0
        n_queries = sum(value.shape[2] for value, _ in pieces)
        n_keys = n_cached + n_queries
        first = pieces[0][0]
        is_scores = str(hook.name).endswith("hook_attn_scores")
        fill = torch.finfo(first.dtype).min if is_scores else 0.0
        # One more column than there are keys takes the places that hold none.
        whole = first.new_full((self.batch, first.shape[1], n_queries, n_keys + 1), fill)
        done = 0
        for value, run in pieces:
            assert run.key_pos is not None
            column = run.key_pos + self.offset[run.rows, None] + n_cached
            column = torch.where(run.key_pos >= 0, column, n_keys)
            index = column[:, None, None].expand_as(value)
            n = value.shape[2]
            whole[run.rows, :, done : done + n] = whole[run.rows, :, done : done + n].scatter(
                -1, index, value
            )
            done += n
        return whole[..., :n_keys]
