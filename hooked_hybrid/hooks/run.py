"""`Run`: the stage, positions and rows of a forward, as a hook reads them from `hook.run`."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

Stage = Literal["forward", "prefill", "generation"]
"""The stage of a run: a plain forward, or the two of generation."""


@dataclass(frozen=True)
class Run:
    """The stage, positions and rows that a hook is being called for: `hook.run`.

    `query_pos` and `key_pos` are positions within the document (-1 at padding), for exactly the
    positions of the tensor the hook was given; `key_pos` is set at attention's score and pattern
    points only. `step` is 0 in a forward and in prefill, then 1, 2, ... in generation. `rows` are
    indices into the original batch of `n_rows` (None if a caller gave `rows` alone). The tensor
    begins at index `first` of the forward's `n_pos` positions (None: it holds all of them).

    Examples:
        >>> runs = []
        >>> hook = ("blocks.0.hook_resid_pre", lambda value, hook: runs.append(hook.run))
        >>> out = model.generate(tokens, 2, fwd_hooks=[hook], verbose=False)
        >>> [(run.stage, run.step, run.query_pos.shape[1]) for run in runs]
        [('prefill', 0, 16), ('generation', 1, 1)]
    """

    stage: Stage
    step: int
    query_pos: Int[Tensor, "batch query"]
    rows: Int[Tensor, " batch"]
    key_pos: Int[Tensor, "batch key"] | None = None
    n_rows: int | None = None
    first: int = 0
    n_pos: int | None = None

    def at(self, start: int, stop: int) -> Run:
        """Return the run of a piece of the positions."""
        n_pos = self.query_pos.shape[1] if self.n_pos is None else self.n_pos
        return replace(
            self,
            query_pos=self.query_pos[:, start:stop],
            first=self.first + start,
            n_pos=n_pos,
        )

    def of_rows(self, index: Int[Tensor, " row"]) -> Run:
        """Return the run of some rows of this forward."""
        key_pos = None if self.key_pos is None else self.key_pos[index]
        return replace(
            self, query_pos=self.query_pos[index], rows=self.rows[index], key_pos=key_pos
        )

    def on(self, device: torch.device) -> Run:
        """Return the run with its tensors on another device."""
        key_pos = None if self.key_pos is None else self.key_pos.to(device)
        return replace(
            self,
            query_pos=self.query_pos.to(device),
            rows=self.rows.to(device),
            key_pos=key_pos,
        )

    def with_keys(self, key_pos: Int[Tensor, "batch key"]) -> Run:
        """Return the run with key positions, for attention's score and pattern points."""
        return replace(self, key_pos=key_pos)


class RunHolder(threading.local):
    """The current `Run` of each thread, shared by all hook points of one model.

    Examples:
        >>> from hooked_hybrid.hooks import RunHolder
        >>> RunHolder().run is None  # no forward is running
        True
    """

    run: Run | None = None

    @contextmanager
    def holding(self, run: Run) -> Iterator[None]:
        """Hold a run for the length of a `with` block, and the outer one again afterwards."""
        outer, self.run = self.run, run
        try:
            yield
        finally:
            self.run = outer

    def __reduce__(self) -> tuple[type[RunHolder], tuple[()]]:
        """Copy and pickle without the run, which is not a part of the model."""
        return RunHolder, ()
