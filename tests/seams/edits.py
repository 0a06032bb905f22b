"""Edits that depend on a token's own row and position alone, so that every cut must agree."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.interventions import per_position

EXACT = ("hook_log_decay", "hook_ssm_decay", "hook_ssm_dt")
"""Points with a sign to keep: an edit only shrinks them, as it does everywhere else."""


@dataclass(frozen=True)
class Edit:
    """A factor between 0.7 and 1 for every number of a value, by row, position and channel.

    Args:
        name: the hook point.
        starts: first edited position of each row, counted in its document.
        stops: first position of each row that is not edited any more.
        is_row: the row that a run of one row stands for; None where rows are the batch's own.
    """

    name: str
    starts: tuple[int, ...]
    stops: tuple[int, ...]
    is_row: int | None = None

    def of_row(self, row: int) -> Edit:
        """Return the edit as a run of this row alone must make it."""
        return Edit(self.name, self.starts, self.stops, row)

    def __call__(self, value: Tensor, hook: HookPoint) -> Tensor:
        run = hook.run
        pos, rows = run.query_pos, run.rows
        if self.is_row is not None:
            rows = torch.full_like(rows, self.is_row)
        starts, stops = (torch.tensor(t)[rows][:, None] for t in (self.starts, self.stops))
        is_edited = (pos >= starts) & (pos < stops)
        angle = 0.7 * pos + 1.3 * rows[:, None]
        if "key" in hook.axes:
            assert run.key_pos is not None
            angle = angle[:, None, :, None] + 0.4 * run.key_pos[:, None, None, :]
            is_edited = is_edited[:, None, :, None]
        else:
            more = (1,) * (value.ndim - 2)
            angle = angle.view(*pos.shape, *more) + 0.9 * torch.arange(value.shape[-1])
            is_edited = is_edited.view(*pos.shape, *more)
        factor = 1 - 0.3 * torch.sin(angle) ** 2
        return value * torch.where(is_edited, factor, torch.ones(())).to(value.dtype)


def hooks_of(edits: list[Edit], marked: list[bool], row: int | None = None) -> list[Any]:
    """Return edits as hooks, marked `per_position` or not; with `row`, for that row alone."""
    hooks = []
    for edit, is_marked in zip(edits, marked, strict=True):
        own = edit if row is None else edit.of_row(row)

        def fn(value: Tensor, hook: HookPoint, own: Edit = own) -> Tensor:
            return own(value, hook)

        hooks.append((edit.name, per_position(fn) if is_marked else fn))
    return hooks


def editable(model: HookedHybrid) -> list[str]:
    """Return the points whose values are numbers with a position each."""
    return [
        name
        for name, point in model.hook_dict.items()
        if not point.is_integer and {"pos", "query"} & set(point.axes)
    ]


def draw_edits(
    random: Random, model: HookedHybrid, starts: tuple[int, ...], stops: tuple[int, ...]
) -> tuple[list[Edit], list[bool]]:
    """Draw up to three edits of one stretch of positions, and which are marked."""
    names = random.sample(editable(model), random.choice([0, 1, 1, 2, 3]))
    return [Edit(name, starts, stops) for name in names], [random.random() < 0.5 for _ in names]
