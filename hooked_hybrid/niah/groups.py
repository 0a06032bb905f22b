"""Prompts of one length under all settings of a sweep, with shared and batched computation.

The common prefixes of prompts form a tree, in which each branch is run once. Neighbouring leaves
are decoded together, a few prompts at a time, which are called a part. The parts and the tree
depend on the whole group only, so a part's numbers do not depend on what else is run, or in which
process.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from typing import Any, Literal

import torch

from hooked_hybrid.hooks.marks import is_per_position
from hooked_hybrid.model.generate import stages_of
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.mixers import windows_of
from hooked_hybrid.network.state import HybridState
from hooked_hybrid.niah.cells import cell_of
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.setting import Setting, hooks_for, hooks_of_rows

FirstToken = Literal["prefill", "generation"]
CellRows = list[dict[str, Any]]
"""Rows of `hooked_hybrid.niah.store.COLUMNS`."""
MOST_ROWS = 32
"""Most cells that are decoded as one batch, possibly of several prompts."""


def groups_of(prompts: Sequence[Prompt]) -> list[list[Prompt]]:
    """Return prompts grouped by length, shortest first, as these may share a prefix."""
    ordered = sorted(prompts, key=lambda p: p.length)
    return [list(group) for _, group in groupby(ordered, key=lambda p: p.length)]


def shortest_window(model: HookedHybrid) -> int | None:
    """Return how many keys the last prompt token sees in every attention layer; None for all."""
    return min(windows_of(model.cfg), default=None)


@dataclass(frozen=True)
class SettingBatch:
    """Settings that run together: a row for each prefill, then for each setting."""

    settings: tuple[Setting, ...]

    @cached_property
    def prefills(self) -> list[Setting]:
        """One setting of each prefill."""
        found: list[Setting] = []
        for setting in self.settings:
            if all(setting.prefill != other.prefill for other in found):
                found.append(setting)
        return found

    @cached_property
    def row_of(self) -> list[int]:
        """The prefill's row of each setting."""
        known = [setting.prefill for setting in self.prefills]
        return [known.index(setting.prefill) for setting in self.settings]

    shares_prompts: bool
    """Whether a common prefix of two prompts may be run once."""
    is_whole: bool
    """Whether a prompt is run in one piece, as its hooks may read all of it."""


def batches_of(settings: Sequence[Setting], prompts: Sequence[Prompt]) -> list[SettingBatch]:
    """Group settings with a plain prefill, a hooked one, and one that depends on the prompt.

    Hooks that depend on the prompt are made for every prompt.
    """
    kinds: dict[tuple[bool, bool, bool], list[Setting]] = {}
    for setting in settings:
        asked = prompts if callable(setting.prefill) else prompts[:1]
        hooks = [hook for prompt in asked for hook in hooks_for(setting.prefill, prompt)]
        is_whole = not all(is_per_position(fn) for _, fn in hooks)
        shares = not callable(setting.prefill) and not is_whole
        kinds.setdefault((bool(hooks), shares, is_whole), []).append(setting)
    return [
        SettingBatch(tuple(same[start : start + MOST_ROWS]), shares, is_whole)
        for (_, shares, is_whole), same in kinds.items()
        for start in range(0, len(same), MOST_ROWS)
    ]


class Group:
    """The prompts of one length, under all settings."""

    def __init__(self, prompts: Sequence[Prompt], settings: Sequence[Setting]) -> None:
        self.prompts, self.settings = prompts, settings

    @cached_property
    def batches(self) -> list[SettingBatch]:
        """The batches of settings."""
        return batches_of(self.settings, self.prompts)

    @cached_property
    def parts(self) -> list[list[Prompt]]:
        """A few prompts each, in the order of the tree, in which neighbours share most."""
        n_together = max(1, MOST_ROWS // max(len(batch.settings) for batch in self.batches))
        ordered = list(in_order(self.prompts))
        return [ordered[i : i + n_together] for i in range(0, len(ordered), n_together)]

    def cells(
        self,
        model: HookedHybrid,
        wanted: Sequence[int],
        max_new_tokens: int,
        first_token_stage: FirstToken,
    ) -> Iterator[CellRows]:
        """Yield the cells of each wanted part; `wanted` are indices into `parts`, ascending."""
        parts, window = [self.parts[i] for i in wanted], shortest_window(model)
        taken = {prompt.id for part in parts for prompt in part}
        run = _GroupRun(model, max_new_tokens, first_token_stage)
        prefilled = [run.prefilled(self.prompts, batch, taken) for batch in self.batches]
        for part in parts:
            start = time.perf_counter()
            found: dict[tuple[str, str], tuple[str, int, float]] = {}
            for batch, states in zip(self.batches, prefilled, strict=True):
                found |= run.decode(batch, list(islice(states, len(part))))
            seconds = (time.perf_counter() - start) / (len(part) * len(self.settings))
            yield [
                cell_of(prompt, s, *found[prompt.id, s.name], seconds, window)
                for prompt in part
                for s in self.settings
            ]


@dataclass(frozen=True)
class _GroupRun:
    """How a model runs a group."""

    model: HookedHybrid
    max_new_tokens: int
    first_token_stage: FirstToken

    def prefilled(
        self, prompts: Sequence[Prompt], batch: SettingBatch, wanted: set[str]
    ) -> Iterator[tuple[Prompt, HybridState | None]]:
        """Yield each wanted prompt with the state after all its tokens but the last."""
        if batch.shares_prompts:
            yield from self._share(prompts, batch, None, 0, wanted)
            return
        for prompt in in_order(prompts):
            if prompt.id in wanted:
                last = 0 if batch.is_whole else prompt.length - 1
                yield prompt, self.run(prompt, batch, None, 0, last)

    def _share(
        self,
        prompts: Sequence[Prompt],
        batch: SettingBatch,
        state: HybridState | None,
        start: int,
        wanted: set[str],
    ) -> Iterator[tuple[Prompt, HybridState | None]]:
        """Yield prompts with a common prefix, which is run once."""
        if not any(p.id in wanted for p in prompts):
            return
        if len(prompts) == 1:
            (prompt,) = prompts
            yield prompt, self.run(prompt, batch, state, start, prompt.length - 1)
            return
        shared = min(common_prefix(prompts), prompts[0].length - 1)
        state = self.run(prompts[0], batch, state, start, shared)
        if shared == prompts[0].length - 1:  # equal up to the last token
            yield from ((prompt, state) for prompt in prompts if prompt.id in wanted)
            return
        for part in _parted(prompts, shared):
            yield from self._share(part, batch, state, shared, wanted)

    def run(
        self, prompt: Prompt, batch: SettingBatch, state: HybridState | None, start: int, stop: int
    ) -> HybridState | None:
        """Return the state after tokens `start` to `stop`, run as prefill."""
        if start >= stop:
            return state
        tokens = torch.tensor([prompt.tokens[start:stop]]).expand(len(batch.prefills), -1)
        rows = [(setting, prompt) for setting in batch.prefills]
        with self.model.hooks(hooks_of_rows(rows, "prefill")):
            _, state = self.model(
                tokens,
                return_type=None,
                attention_mask=torch.ones_like(tokens),
                state=state,
                return_state=True,
                stage="prefill",
            )
        return state

    def decode(
        self, batch: SettingBatch, prefilled: Sequence[tuple[Prompt, HybridState | None]]
    ) -> dict[tuple[str, str], tuple[str, int, float]]:
        """Return output, new tokens and smallest margin of each prompt and setting."""
        prompts, states = zip(*prefilled, strict=True)
        rows = [(setting, prompt) for prompt in prompts for setting in batch.settings]
        of_settings = torch.tensor(batch.row_of)
        forked = [state[of_settings] for state in states if state is not None]
        read = torch.tensor([p.tokens if batch.is_whole else p.tokens[-1:] for _, p in rows])
        prefills, generates = stages_of(read.shape[1], self.max_new_tokens, self.first_token_stage)
        out = self.model.generate(
            read,
            self.max_new_tokens,
            attention_mask=torch.ones_like(read),
            prefill_hooks=hooks_of_rows(rows, "prefill") if prefills else (),
            generation_hooks=hooks_of_rows(rows, "generation") if generates else (),
            first_token_stage=self.first_token_stage,
            state=HybridState.cat(forked) if forked else None,
            return_type="output",
            verbose=False,
        )
        margins = out.margins.amin(dim=1).tolist()
        n_new = torch.isfinite(out.margins).sum(1).tolist()
        return {
            (prompt.id, setting.name): (out.text[i], n_new[i], margins[i])
            for i, (setting, prompt) in enumerate(rows)
        }


def in_order(prompts: Sequence[Prompt]) -> Iterator[Prompt]:
    """Yield prompts of one length in the order of their tree."""
    shared = min(common_prefix(prompts), prompts[0].length - 1)
    if len(prompts) == 1 or shared == prompts[0].length - 1:
        yield from prompts
        return
    for part in _parted(prompts, shared):
        yield from in_order(part)


def common_prefix(prompts: Sequence[Prompt]) -> int:
    """Return the length of the common prefix of all prompts."""
    low, high = min(p.tokens for p in prompts), max(p.tokens for p in prompts)
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))


def _parted(prompts: Sequence[Prompt], at: int) -> list[list[Prompt]]:
    """Return prompts grouped by their token at an index, in order of first occurrence."""
    parts: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        parts.setdefault(prompt.tokens[at], []).append(prompt)
    return list(parts.values())
