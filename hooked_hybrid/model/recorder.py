"""Caching a generation: one cache from many forwards, equal to that of one long forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.names import CacheFilter
from hooked_hybrid.hooks.places import Places, over_all_columns
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.hooks.savers import fill_of
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.network.state import HybridState

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel


class Recorder:
    """Watchers that keep every piece of a generation and join them at the end.

    Args:
        model: the model to watch.
        names_filter: as in `run_with_cache`.
        tokens: the prompt, rows ending at the right edge.
        state: the state that the prompt continues.
    """

    def __init__(
        self,
        model: LanguageModel,
        names_filter: CacheFilter,
        tokens: Int[Tensor, "batch pos"],
        state: HybridState | None,
    ) -> None:
        self.model, self.state = model, state
        self.names = model.cached_names(names_filter)
        self.batch = tokens.shape[0]
        self.pieces: dict[str, list[tuple[Tensor, Run]]] = {name: [] for name in self.names}

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Watch during a `with` block; pieces of several blocks are joined."""
        handles = [self.model.hook_dict[name].add_hook(self._keep) for name in self.names]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def cache(self) -> ActivationCache:
        """Return the joined pieces, along positions, with each key in its column."""
        points = self.model.hook_dict
        pieces = {name: mine for name, mine in self.pieces.items() if mine}
        whole = {name: self._put_together(points[name], mine) for name, mine in pieces.items()}
        places = {name: self._places(points[name], mine) for name, mine in pieces.items()}
        return ActivationCache(whole, self.model, places=places)

    @watcher
    @per_position
    def _keep(self, value: Tensor, hook: HookPoint) -> None:
        self.pieces[str(hook.name)].append((value.detach(), hook.run))

    def _put_together(self, hook: HookPoint, pieces: list[tuple[Tensor, Run]]) -> Tensor:
        if "key" in hook.axes:
            return self._place_keys(hook, pieces)
        values = [self._all_rows(value, run) for value, run in pieces]
        return torch.cat(values, dim=hook.pos_dim)

    def _all_rows(self, value: Tensor, run: Run, fill: int = 0) -> Tensor:
        """Return a piece with zeros for rows that had ended."""
        if value.shape[0] == self.batch:
            return value
        whole = value.new_full((self.batch, *value.shape[1:]), fill)
        return whole.index_copy(0, run.rows.to(value.device), value)

    def _positions(self, pieces: list[tuple[Tensor, Run]]) -> Int[Tensor, "batch pos"]:
        """Return the position of every query, -1 at padding and after the end of a row."""
        return torch.cat([self._all_rows(run.query_pos, run, -1) for _, run in pieces], dim=1)

    def _places(self, hook: HookPoint, pieces: list[tuple[Tensor, Run]]) -> Places:
        """Return the places of the entries of a joined value."""
        pos = self._positions(pieces)
        if "key" not in hook.axes:
            return Places(pos)
        return Places(pos, torch.cat([self._old_keys(hook, pos), pos], dim=1))

    def _place_keys(self, hook: HookPoint, pieces: list[tuple[Tensor, Run]]) -> Tensor:
        """Return scores or patterns over all keys: those of the state, then this generation's.

        A scan's are NaN between positions of two forwards, where no matrix is computed.
        """
        first, pos = pieces[0][0], self._positions(pieces)
        old, fill = self._old_keys(hook, pos), fill_of(hook, first.dtype)
        is_token = (torch.cat([old, pos], dim=1) >= 0).to(first.device)
        shape = (self.batch, first.shape[1], pos.shape[1], is_token.shape[1])
        whole, done = first.new_full(shape, fill), 0
        for value, run in pieces:
            assert run.key_pos is not None
            stop = done + value.shape[2]
            columns = slice(0, old.shape[1] + stop)
            tokens = is_token[run.rows.to(first.device), columns]
            piece = over_all_columns(value, run.key_pos, tokens, fill)
            if hook.is_whole and done:  # these read earlier positions from the state, by no matrix
                piece[..., :done].masked_fill_(tokens[:, None, None, :done], torch.nan)
            whole[run.rows.to(first.device), :, done:stop, columns] = piece
            done = stop
        return whole

    def _old_keys(self, hook: HookPoint, pos: Tensor) -> Int[Tensor, "batch key"]:
        """Return the positions of the keys in the first state."""
        if self.state is None:
            return pos.new_zeros(self.batch, 0)
        keys: Any = self.state.blocks[hook.layer()]
        return keys.pos.to(pos) if keys.growing else pos.new_zeros(self.batch, 0)
