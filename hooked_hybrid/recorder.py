"""Caching a generation: one cache from many forwards, as one long forward would have left it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

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
        self.is_real = torch.ones_like(tokens) if mask is None else mask
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
        n_old, is_real = self._real_keys(hook)
        is_real = is_real.to(pieces[0][0].device)
        n_queries = sum(value.shape[2] for value, _ in pieces)
        first = pieces[0][0]
        is_scores = str(hook.name).endswith("hook_attn_scores")
        fill = torch.finfo(first.dtype).min if is_scores else 0.0
        whole = first.new_full((self.batch, first.shape[1], n_queries, n_old + n_queries), fill)
        done = 0
        for value, run in pieces:
            n, n_cached = value.shape[2], value.shape[3] - value.shape[2]
            # A state keeps the last keys of each row, and those that are padding before the rest.
            order = is_real[:, : n_old + done].argsort(dim=1, stable=True)
            cached = order[run.rows, n_old + done - n_cached :]
            new = torch.arange(n, device=value.device).expand(cached.shape[0], -1) + n_old + done
            column = torch.cat([cached, new], dim=1)[:, None, None].expand_as(value)
            at = (run.rows, slice(None), slice(done, done + n))
            whole[at] = whole[at].scatter(-1, column, value)
            done += n
        return whole

    def _real_keys(self, hook: HookPoint) -> tuple[int, Int[Tensor, "batch key"]]:
        """Return how many keys the first state brings, and which of all keys are tokens."""
        parts = [self.is_real.new_zeros(self.batch, 0)]
        if self.state is not None:
            block = self.state.blocks[hook.layer()]
            assert isinstance(block, AttentionState)
            parts = [(block.pos >= 0).to(self.is_real.device, self.is_real.dtype)]
        n_new = sum(value.shape[2] for value, _ in self.pieces[str(hook.name)])
        more = self.is_real.new_ones(self.batch, n_new - self.is_real.shape[1])
        return parts[0].shape[1], torch.cat([*parts, self.is_real, more], dim=1)
