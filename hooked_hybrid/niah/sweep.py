"""The sweep engine: many prompts under many settings, each prefill run once.

A setting is a list of hooks for prefill and one for generation. Settings with the same prefill
hooks (most often none) share one prefill: its state is forked, and all of them are decoded as the
rows of one batch, each row with its own hooks. Settings with prefill hooks are the rows of one
batch in prefill too. Prompts of one length share the run over the tokens they have in common,
except under prefill hooks that are not `per_position`, or depend on the prompt.
Numbers do not depend on where a run was stopped: the batches are always the same, all cells of one
are kept at once, and the shared runs are cut at the same tokens whatever is done already.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain, groupby, islice
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from tqdm.auto import tqdm

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.hooks import is_per_position
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.cells import cell_of
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings import (
    Setting,
    depends_on_prompt,
    described,
    hooks_for,
    hooks_of_rows,
    top_k_settings,
)
from hooked_hybrid.niah.store import Store
from hooked_hybrid.state import HybridState

if TYPE_CHECKING:
    import pandas

FirstToken = Literal["prefill", "generation"]
MOST_ROWS = 32
"""Cells that are decoded as one batch, at most; so are few settings of several prompts."""


def niah(
    model: HookedHybrid,
    prompts: Sequence[Prompt],
    settings: Mapping[str, Sequence[HookSpec]] | Sequence[Setting],
    *,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    max_new_tokens: int = 40,
    first_token_stage: FirstToken = "prefill",
    verbose: bool = True,
) -> pandas.DataFrame:
    """Run every prompt under every setting and score what is generated.

    Args:
        model: with a tokenizer.
        prompts: of `hooked_hybrid.niah.prompts`.
        settings: `Setting`s, or `{name: hooks}` for hooks that act in both stages.
        out: folder of the results (`cells.sqlite`); None keeps them in memory.
        resume: go on with what the folder holds.
        max_new_tokens: tokens generated at most.
        first_token_stage: see `generate`.
        verbose: show a progress bar.

    Returns:
        One row a cell; see `hooked_hybrid.niah.store.COLUMNS`. Depth 0 is the beginning of the
        haystack; `min_margin` is the smallest difference of the two largest logits on the way:
        below 1e-4 a rounding may have chosen the token.

    Raises:
        ValueError: no prompts or settings, a prompt or a setting's name given twice, or a folder of
            another experiment.
        HookNameError: a hook that matches nothing; before any prompt is run.
        FileExistsError: the folder is not empty and `resume` is false.
        OSError: the results cannot be written.
    """
    chosen = _settings(settings)
    if not prompts:
        raise ValueError("there are no prompts: build some with hooked_hybrid.niah.prompts")
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError("a prompt is given twice: give each once")
    for setting in chosen:
        for prompt in prompts if depends_on_prompt(setting) else prompts[:1]:
            hooks = (hooks_for(setting.prefill, prompt), hooks_for(setting.generation, prompt))
            model.check_hooks_to_add(tuple(chain(*hooks)))
    experiment = {
        "model": fingerprint(model),
        "settings": {s.name: dict(s.spec) for s in chosen},
        "prompts": hashlib.sha256(" ".join(p.id for p in prompts).encode()).hexdigest(),
        "max_new_tokens": max_new_tokens,
        "first_token_stage": first_token_stage,
        "dtype": str(model.dtype),
    }
    store = Store(None if out is None else Path(out), experiment, resume)
    try:
        done = store.done()
        total = len(prompts) * len(chosen)
        bar = tqdm(total=total, initial=len(done) * len(chosen), unit="cell", disable=not verbose)
        with bar, torch.no_grad():
            for group in _groups(prompts):
                todo = [p for p in group if p.id not in done]
                runner = _Group(model, group, chosen, max_new_tokens, first_token_stage)
                for cells in runner.cells({p.id for p in todo}):
                    store.add(cells)
                    bar.update(len(cells))
        return store.table()
    finally:
        store.close()


def fingerprint(model: HookedHybrid) -> str:
    """Return a short hash of the config and of samples of every weight."""
    digest = hashlib.sha256(repr((model.cfg.layers, model.cfg.d_model, model.cfg.norm)).encode())
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(flat.numel() // 64, 1)].float().cpu()
        digest.update(name.encode() + sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def shortest_window(model: HookedHybrid) -> int | None:
    """Return how many keys the last prompt token sees in every attention layer; None for all."""
    mixers = [layer.mixer for layer in model.cfg.layers if isinstance(layer.mixer, AttentionConfig)]
    windows = [mixer.n_keys for mixer in mixers if mixer.n_keys is not None]
    return min(windows, default=None)


def _settings(settings: Mapping[str, Sequence[HookSpec]] | Sequence[Setting]) -> list[Setting]:
    if isinstance(settings, Mapping):
        chosen = [
            Setting(name, tuple(hooks), tuple(hooks), {"hooks": described(tuple(hooks))})
            for name, hooks in settings.items()
        ]
    else:
        chosen = list(settings)
    names = [s.name for s in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"give one or more settings, each with its own name, not {names}")
    return chosen


def _groups(prompts: Sequence[Prompt]) -> Iterator[list[Prompt]]:
    """Yield prompts of one length together: these may share a prefix."""
    ordered = sorted(prompts, key=lambda p: p.length)
    for _, group in groupby(ordered, key=lambda p: p.length):
        yield list(group)


@dataclass(frozen=True)
class _Batch:
    """Settings that run together: a row for each prefill, then a row for each setting."""

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
    """Whether what two prompts begin with may be run once."""
    is_whole: bool
    """Whether a prompt is run in one piece, as its hooks may look at all of it."""


def _batches(settings: Sequence[Setting], prompt: Prompt) -> list[_Batch]:
    """Put together what has a plain prefill, a hooked one, and one that depends on the prompt."""
    kinds: dict[tuple[bool, bool, bool], list[Setting]] = {}
    for setting in settings:
        hooks = hooks_for(setting.prefill, prompt)
        is_whole = not all(is_per_position(fn) for _, fn in hooks)
        shares = not callable(setting.prefill) and not is_whole
        kinds.setdefault((bool(hooks), shares, is_whole), []).append(setting)
    return [
        _Batch(tuple(same[start : start + MOST_ROWS]), shares, is_whole)
        for (_, shares, is_whole), same in kinds.items()
        for start in range(0, len(same), MOST_ROWS)
    ]


class _Group:
    """The prompts of one length, under all settings."""

    def __init__(
        self,
        model: HookedHybrid,
        prompts: Sequence[Prompt],
        settings: Sequence[Setting],
        max_new_tokens: int,
        first_token_stage: FirstToken,
    ) -> None:
        self.model, self.prompts, self.settings = model, prompts, settings
        self.max_new_tokens, self.first_token_stage = max_new_tokens, first_token_stage

    def cells(self, wanted: set[str]) -> Iterator[list[dict[str, Any]]]:
        """Yield the cells of a few prompts at a time, if any of these is wanted.

        Which prompts go together does not depend on what is wanted.
        """
        batches = _batches(self.settings, self.prompts[0])
        n_together = max(1, MOST_ROWS // max(len(batch.settings) for batch in batches))
        ordered = list(self._in_order(self.prompts))
        parts = [ordered[i : i + n_together] for i in range(0, len(ordered), n_together)]
        parts = [part for part in parts if any(p.id in wanted for p in part)]
        taken = {prompt.id for part in parts for prompt in part}
        prefilled = [self._prefilled(self.prompts, batch, taken) for batch in batches]
        for part in parts:
            start = time.perf_counter()
            found: dict[tuple[str, str], tuple[str, int, float]] = {}
            for batch, run in zip(batches, prefilled, strict=True):
                found |= self._decode(batch, list(islice(run, len(part))))
            n_cells, window = len(part) * len(self.settings), shortest_window(self.model)
            seconds = (time.perf_counter() - start) / n_cells
            yield [
                cell_of(prompt, s, *found[prompt.id, s.name], seconds, window)
                for prompt in part
                for s in self.settings
            ]

    def _prefilled(
        self, prompts: Sequence[Prompt], batch: _Batch, wanted: set[str]
    ) -> Iterator[tuple[Prompt, HybridState | None]]:
        """Yield each wanted prompt with the state after all its tokens but the last."""
        if batch.shares_prompts:
            yield from self._share(prompts, batch, None, 0, wanted)
            return
        for prompt in self._in_order(prompts):
            if prompt.id in wanted:
                last = 0 if batch.is_whole else prompt.length - 1
                yield prompt, self._run(prompt, batch, None, 0, last)

    def _share(
        self,
        prompts: Sequence[Prompt],
        batch: _Batch,
        state: HybridState | None,
        start: int,
        wanted: set[str],
    ) -> Iterator[tuple[Prompt, HybridState | None]]:
        """Yield prompts that begin alike; what they begin with is run once."""
        if not any(p.id in wanted for p in prompts):
            return
        if len(prompts) == 1:
            (prompt,) = prompts
            yield prompt, self._run(prompt, batch, state, start, prompt.length - 1)
            return
        shared = min(_common_prefix(prompts), prompts[0].length - 1)
        state = self._run(prompts[0], batch, state, start, shared)
        if shared == prompts[0].length - 1:  # alike up to the last token
            yield from ((prompt, state) for prompt in prompts if prompt.id in wanted)
            return
        for part in _parted(prompts, shared):
            yield from self._share(part, batch, state, shared, wanted)

    def _in_order(self, prompts: Sequence[Prompt]) -> Iterator[Prompt]:
        """Yield prompts in the order in which `_share` does."""
        shared = min(_common_prefix(prompts), prompts[0].length - 1)
        if len(prompts) == 1 or shared == prompts[0].length - 1:
            yield from prompts
            return
        for part in _parted(prompts, shared):
            yield from self._in_order(part)

    def _run(
        self, prompt: Prompt, batch: _Batch, state: HybridState | None, start: int, stop: int
    ) -> HybridState | None:
        """Return the state after tokens `start` to `stop`, run as prefill."""
        if start >= stop:
            return state
        tokens = torch.tensor([prompt.tokens[start:stop]]).expand(len(batch.prefills), -1)
        rows = [(setting, prompt) for setting in batch.prefills]
        with self.model.hooks(hooks_of_rows(rows, "prefill")):
            _, state = self.model(
                tokens, return_type=None, state=state, return_state=True, stage="prefill"
            )
        return state

    def _decode(
        self, batch: _Batch, prefilled: Sequence[tuple[Prompt, HybridState | None]]
    ) -> dict[tuple[str, str], tuple[str, int, float]]:
        """Return output, new tokens and smallest margin of each prompt and setting."""
        prompts, states = zip(*prefilled, strict=True)
        rows = [(setting, prompt) for prompt in prompts for setting in batch.settings]
        of_settings = torch.tensor(batch.row_of)
        forked = [state[of_settings] for state in states if state is not None]
        out = self.model.generate(
            torch.tensor([p.tokens if batch.is_whole else p.tokens[-1:] for _, p in rows]),
            self.max_new_tokens,
            prefill_hooks=hooks_of_rows(rows, "prefill"),
            generation_hooks=hooks_of_rows(rows, "generation"),
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


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Return how many tokens all prompts begin with."""
    low, high = min(p.tokens for p in prompts), max(p.tokens for p in prompts)
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))


def _parted(prompts: Sequence[Prompt], at: int) -> list[list[Prompt]]:
    """Return prompts by their token at a place, in the order in which these come up."""
    parts: dict[int, list[Prompt]] = {}
    for prompt in prompts:
        parts.setdefault(prompt.tokens[at], []).append(prompt)
    return list(parts.values())


__all__ = ["FirstToken", "Setting", "fingerprint", "niah", "shortest_window", "top_k_settings"]
