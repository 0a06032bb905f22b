"""The sweep engine: many prompts under many settings, each prefill run once.

A setting is a list of hooks for prefill and one for generation. Settings with the same prefill
hooks (most often none) share one prefill: its state is forked, and all of them are decoded as the
rows of one batch, each row with its own hooks. Prompts of one length share the run over the tokens
they have in common. Numbers do not depend on where a run was stopped: the batch is always all the
settings of one prompt, and the shared runs are cut at the same tokens whatever is done already.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.interventions import keep_top_heads, on_rows
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.scores import binary, graded, released
from hooked_hybrid.niah.store import Store
from hooked_hybrid.state import HybridState

if TYPE_CHECKING:
    import pandas

FirstToken = Literal["prefill", "generation"]


@dataclass(frozen=True)
class PerRow:
    """Hooks that take one argument a row: settings that share `make` run as one set of hooks.

    `make` is given a tensor [batch] of the arguments and returns hooks for the whole batch.
    """

    make: Callable[[Tensor], list[HookSpec]]
    argument: int


@dataclass(frozen=True)
class Setting:
    """One way to run every prompt.

    Args:
        name: unique in a sweep.
        prefill: hooks of the prefill stage.
        generation: hooks of the generation stage.
        spec: what the setting is, in JSON-able values; it tells settings of one name apart.
        per_row: another form of `generation`, for many settings at a time.
    """

    name: str
    prefill: tuple[HookSpec, ...] = ()
    generation: tuple[HookSpec, ...] = ()
    spec: Mapping[str, Any] = field(default_factory=dict)
    per_row: PerRow | None = None


def top_k_settings(
    ks: Sequence[int],
    stages: Sequence[str] = ("generation", "both"),
    score: Literal["entropy", "l2"] = "entropy",
    ties: Literal["torch", "lowest"] = "torch",
    score_dtype: torch.dtype | None = None,
) -> list[Setting]:
    """Return one setting for each stage and k: keep the k most peaked heads.

    Args:
        ks: heads kept.
        stages: "generation" (steps of one token only) and "both" (prefill too).
        score, ties, score_dtype: of `interventions.keep_top_heads`.

    Raises:
        ValueError: another stage, or a k below 0.
    """
    if unknown := set(stages) - {"generation", "both"}:
        raise ValueError(f"stages {sorted(unknown)}: give 'generation' and 'both'")

    def make(k: Tensor) -> list[HookSpec]:
        return keep_top_heads(k, score, ties, score_dtype)

    settings = []
    for stage in stages:
        for k in ks:
            hooks = tuple(keep_top_heads(k, score, ties, score_dtype))
            spec = {"kind": "top-k", "k": k, "stage": stage, "score": score, "ties": ties}
            spec["score_dtype"] = str(score_dtype)
            prefill = hooks if stage == "both" else ()
            settings.append(Setting(f"{stage} k={k}", prefill, hooks, spec, PerRow(make, k)))
    return settings


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
        ValueError: no prompts or settings, settings of one name, or a folder of another experiment.
        HookNameError: a hook that matches nothing; before any prompt is run.
        FileExistsError: the folder is not empty and `resume` is false.
        OSError: the results cannot be written.
    """
    chosen = _settings(settings)
    if not prompts:
        raise ValueError("there are no prompts: build some with hooked_hybrid.niah.prompts")
    for setting in chosen:
        model.check_hooks_to_add((*setting.prefill, *setting.generation))
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
        chosen = [Setting(n, tuple(h), tuple(h), {"hooks": n}) for n, h in settings.items()]
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
        """Yield the cells of each wanted prompt, all of a prompt at once."""
        plain = [s for s in self.settings if not s.prefill]
        for prompt, state in self._prefilled(self.prompts, None, 0, wanted):
            start = time.perf_counter()
            found = self._decode(prompt, plain, state) if plain else {}
            for setting in self.settings:
                if setting.prefill:
                    found |= self._decode(prompt, [setting], self._prefill(prompt, setting))
            seconds = (time.perf_counter() - start) / len(self.settings)
            yield [self._cell(prompt, s, *found[s.name], seconds) for s in self.settings]

    def _prefilled(
        self, prompts: Sequence[Prompt], state: HybridState | None, start: int, wanted: set[str]
    ) -> Iterator[tuple[Prompt, HybridState | None]]:
        """Yield each wanted prompt with the state after all its tokens but the last.

        What several prompts begin with is run once, up to the token where they part.
        """
        if not any(p.id in wanted for p in prompts):
            return
        if len(prompts) == 1:
            (prompt,) = prompts
            yield prompt, self._run(prompt, state, start, prompt.length - 1)
            return
        shared = min(_common_prefix(prompts), prompts[0].length - 1)
        state = self._run(prompts[0], state, start, shared)
        if shared == prompts[0].length - 1:  # alike up to the last token
            yield from ((prompt, state) for prompt in prompts if prompt.id in wanted)
            return
        parts: dict[int, list[Prompt]] = {}
        for prompt in prompts:
            parts.setdefault(prompt.tokens[shared], []).append(prompt)
        for part in parts.values():
            yield from self._prefilled(part, state, shared, wanted)

    def _run(
        self, prompt: Prompt, state: HybridState | None, start: int, stop: int
    ) -> HybridState | None:
        """Return the state after tokens `start` to `stop`, run as prefill."""
        if start >= stop:
            return state
        tokens = torch.tensor([prompt.tokens[start:stop]])
        _, state = self.model(
            tokens, return_type=None, state=state, return_state=True, stage="prefill"
        )
        return state

    def _prefill(self, prompt: Prompt, setting: Setting) -> HybridState | None:
        with self.model.hooks(setting.prefill):
            return self._run(prompt, None, 0, prompt.length - 1)

    def _decode(
        self, prompt: Prompt, settings: Sequence[Setting], state: HybridState | None
    ) -> dict[str, tuple[str, int, float]]:
        """Return output, new tokens and smallest margin of each setting, decoded as one batch."""
        n = len(settings)
        out = self.model.generate(
            torch.tensor([prompt.tokens[-1:]]).expand(n, 1),
            self.max_new_tokens,
            prefill_hooks=settings[0].prefill,
            generation_hooks=_batched(settings),
            first_token_stage=self.first_token_stage,
            state=None if state is None else state.fork(n),
            return_type="output",
            verbose=False,
        )
        margins = out.margins.amin(dim=1).tolist()
        n_new = torch.isfinite(out.margins).sum(1).tolist()
        return {s.name: (out.text[i], n_new[i], margins[i]) for i, s in enumerate(settings)}

    def _cell(
        self,
        prompt: Prompt,
        setting: Setting,
        output: str,
        n_new: int,
        margin: float,
        seconds: float,
    ) -> dict[str, Any]:
        needle, spans = prompt.needle, prompt.needle_spans
        window = shortest_window(self.model)
        seen = window is None or (bool(spans) and spans[-1][0] >= prompt.length - window)
        score = graded(output, needle) if needle else None
        return {
            "prompt_id": prompt.id,
            "setting": setting.name,
            "stage": setting.spec.get("stage", "both" if setting.prefill else "generation"),
            "k": setting.spec.get("k"),
            "needle_id": prompt.needle_id,
            "city": needle.city if needle else None,
            "template": prompt.template,
            "read_twice": prompt.read_twice,
            "n_distractors": prompt.n_distractors,
            "length": prompt.length,
            "depth": prompt.depth,
            "needle_start": spans[0][0] if spans else None,
            "needle_stop": spans[0][1] if spans else None,
            "in_window": seen if needle else None,
            "output": output,
            "graded": score,
            "accuracy": None if score is None else score / 5,
            "binary": binary(output, needle) if needle else None,
            "released": released(output, needle) if needle else None,
            "n_new_tokens": n_new,
            "min_margin": margin,
            "seconds": seconds,
        }


def _common_prefix(prompts: Sequence[Prompt]) -> int:
    """Return how many tokens all prompts begin with."""
    low, high = min(p.tokens for p in prompts), max(p.tokens for p in prompts)
    for i, (a, b) in enumerate(zip(low, high, strict=False)):
        if a != b:
            return i
    return min(len(low), len(high))


def _batched(settings: Sequence[Setting]) -> list[HookSpec]:
    """Return hooks for one batch in which row i runs under setting i."""
    if len(settings) == 1:
        return list(settings[0].generation)
    hooks: list[HookSpec] = []
    together: dict[Any, list[int]] = {}
    for row, setting in enumerate(settings):
        if setting.per_row is not None:
            together.setdefault(setting.per_row.make, []).append(row)
        else:
            hooks += [(where, on_rows(fn, row)) for where, fn in setting.generation]
    for make, rows in together.items():
        arguments = torch.zeros(len(settings), dtype=torch.long)
        for row in rows:
            per_row = settings[row].per_row
            assert per_row is not None
            arguments[row] = per_row.argument
        made = make(arguments)
        is_all = len(rows) == len(settings)
        hooks += made if is_all else [(where, on_rows(fn, rows)) for where, fn in made]
    return hooks
