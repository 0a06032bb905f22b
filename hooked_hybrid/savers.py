"""What `run_with_cache` attaches: watchers that put values and gradients into a dict."""

from __future__ import annotations

from collections.abc import MutableMapping

import torch
from torch import Tensor

from hooked_hybrid.hooks import HookPoint, per_position, watcher
from hooked_hybrid.slicing import PosSlice, slice_axis


class Saver:
    """Keeps whole values, as they are; of a slice of positions, a copy."""

    def __init__(
        self,
        cache: MutableMapping[str, Tensor],
        pos_slice: PosSlice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
    ) -> None:
        self.cache, self.pos_slice = cache, pos_slice
        self.device, self.remove_batch_dim = device, remove_batch_dim

    @watcher
    def save(self, value: Tensor, hook: HookPoint) -> None:
        """Keep a value."""
        self.cache[str(hook.name)] = self.kept(self.selected(value, hook), hook)

    @watcher
    def save_grad(self, grad: Tensor, hook: HookPoint) -> None:
        """Keep a gradient."""
        self.cache[f"{hook.name}_grad"] = self.kept(self.selected(grad, hook), hook)

    def selected(self, value: Tensor, hook: HookPoint) -> Tensor:
        """Return the positions asked for: a copy, so that the others do not stay in memory."""
        value = value.detach()
        if self.pos_slice is None:
            return value
        return slice_axis(value, self.pos_slice, hook.pos_dim).clone()

    def kept(self, value: Tensor, hook: HookPoint) -> Tensor:
        """Return a value in the form and at the place that was asked for."""
        if self.remove_batch_dim:
            if value.shape[0] != 1:
                raise ValueError(
                    f"remove_batch_dim needs one row; {hook.name!r} has {value.shape[0]}"
                )
            value = value[0]
        return value if self.device is None else value.to(self.device)

    def finish(self) -> None:
        """Complete the dict after the forward."""


class PieceSaver(Saver):
    """Keeps some positions of values that come in pieces; the others are never put together.

    For forwards without a state whose rows are alike: there, key number i is the one at position i.
    """

    def __init__(
        self,
        cache: MutableMapping[str, Tensor],
        pos_slice: PosSlice,
        device: torch.device | str | None,
        remove_batch_dim: bool,
    ) -> None:
        super().__init__(cache, pos_slice, device, remove_batch_dim)
        self.pieces: dict[HookPoint, list[Tensor]] = {}
        self.indices: dict[HookPoint, list[int]] = {}
        self.n_pos = 0

    @watcher
    @per_position
    def save(self, value: Tensor, hook: HookPoint) -> None:
        """Keep what is asked for of a piece."""
        run, dim = hook.run, hook.pos_dim
        self.n_pos = value.shape[dim] if run.n_pos is None else run.n_pos
        first = run.first
        asked = slice_axis(torch.arange(self.n_pos), self.pos_slice, 0).view(-1)
        here = asked[(asked >= first) & (asked < first + value.shape[dim])].unique()
        pieces = self.pieces.setdefault(hook, [])
        if not len(here) and pieces:
            return
        piece = value.detach().index_select(dim, (here - first).to(value.device))
        pieces.append(self._over_all_keys(piece, hook) if "key" in hook.axes else piece)
        self.indices.setdefault(hook, []).extend(here.tolist())

    def finish(self) -> None:
        """Put pieces together, in the order of positions that was asked for."""
        asked = slice_axis(torch.arange(self.n_pos), self.pos_slice, 0)
        for hook, pieces in self.pieces.items():
            place = {index: i for i, index in enumerate(self.indices[hook])}
            # Fewer logits than positions may have been computed.
            there = [place[i] for i in asked.view(-1).tolist() if i in place]
            if asked.ndim == 0 and not there:
                raise IndexError(f"{hook.name!r} was not computed at position {int(asked)}")
            whole = torch.cat(pieces, dim=hook.pos_dim)
            order = torch.tensor(there, dtype=torch.long, device=whole.device)
            whole = whole.index_select(hook.pos_dim, order)
            whole = whole.squeeze(hook.pos_dim) if asked.ndim == 0 else whole
            self.cache[str(hook.name)] = self.kept(whole, hook)

    def _over_all_keys(self, piece: Tensor, hook: HookPoint) -> Tensor:
        """Return scores or patterns with a column for every key of the forward."""
        key_pos = hook.run.key_pos
        assert key_pos is not None
        is_scores = str(hook.name).endswith("hook_attn_scores")
        fill = torch.finfo(piece.dtype).min if is_scores else 0.0
        whole = piece.new_full((*piece.shape[:3], self.n_pos), fill)
        return whole.index_copy_(3, key_pos[0], piece)
