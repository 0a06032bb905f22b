"""Settings of a sweep: the hooks in prefill and in generation, for one prompt or a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import keep_top_heads, on_rows
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.runs.identity.model import identify, known_of

Hooks = tuple[HookSpec, ...] | Callable[[Prompt], Sequence[HookSpec]]
"""Hooks of a setting, or a function that makes them for a prompt."""


@dataclass(frozen=True)
class PerRow:
    """Hooks with one argument for each row; settings with the same `make` run as one set of hooks.

    `make` is called with a tensor [batch] of the arguments and returns hooks for the whole batch,
    which replace the setting's `generation`, and its `prefill` if it has one.

    Examples:
        >>> from hooked_hybrid.niah.settings import PerRow, Setting
        >>> setting = Setting("k=2", per_row=PerRow(interventions.keep_top_heads, 2))
        >>> setting.per_row.argument
        2
    """

    make: Callable[[Tensor], list[HookSpec]]
    argument: int


@dataclass(frozen=True)
class Setting:
    """One way to run every prompt.

    Hooks must treat rows alike: batches of a sweep contain rows of other settings, so a hook for
    certain rows (`patch(rows=...)`, an argument for each row) would act on wrong rows.

    Args:
        name: unique in a sweep.
        prefill: hooks of the prefill stage, or a function that returns them for a prompt.
        generation: hooks of the generation stage, or such a function.
        spec: a description of the setting in JSON-able values, stored with the results.
        per_row: a form of these hooks for many settings at a time.

    Examples:
        >>> from hooked_hybrid.niah.settings import Setting
        >>> hooks = tuple(interventions.ablate_layers(5, "mlp"))
        >>> Setting("no last MLP", prefill=hooks, generation=hooks).name
        'no last MLP'
    """

    name: str
    prefill: Hooks = ()
    generation: Hooks = ()
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

    Examples:
        >>> from hooked_hybrid.niah.settings import top_k_settings
        >>> [setting.name for setting in top_k_settings([0, 8])]
        ['generation k=0', 'generation k=8', 'both k=0', 'both k=8']
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


def depends_on_prompt(setting: Setting) -> bool:
    """Whether its hooks are made for each prompt.

    Examples:
        >>> from hooked_hybrid.niah.settings import Setting, depends_on_prompt
        >>> on_needle = lambda prompt: interventions.manipulate_span("omit", prompt.needle_spans[0])
        >>> depends_on_prompt(Setting("omit", generation=on_needle))
        True
        >>> depends_on_prompt(Setting("whole"))
        False
    """
    return callable(setting.prefill) or callable(setting.generation)


def hooks_for(hooks: Hooks, prompt: Prompt) -> tuple[HookSpec, ...]:
    """Return the hooks, made for the prompt if they depend on it.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> from hooked_hybrid.niah.settings import hooks_for
        >>> on_needle = lambda prompt: interventions.manipulate_span("omit", prompt.needle_spans[0])
        >>> (prompt,) = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> len(hooks_for(on_needle, prompt))
        1
    """
    return tuple(hooks(prompt)) if callable(hooks) else tuple(hooks)


def hooks_of_rows(
    rows: Sequence[tuple[Setting, Prompt]], stage: Literal["prefill", "generation"]
) -> list[HookSpec]:
    """Return hooks of a stage for a batch in which row i is a prompt with a setting.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> from hooked_hybrid.niah.settings import hooks_of_rows, top_k_settings
        >>> (prompt,) = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> rows = [(setting, prompt) for setting in top_k_settings([0, 2], ["generation"])]
        >>> len(hooks_of_rows(rows, "generation"))
        2
    """
    alone: dict[Any, tuple[tuple[HookSpec, ...], list[int]]] = {}
    together: dict[Any, list[int]] = {}
    arguments = torch.zeros(len(rows), dtype=torch.long)
    for row, (setting, prompt) in enumerate(rows):
        hooks: Hooks = getattr(setting, stage)
        if setting.per_row is not None and hooks:
            together.setdefault(setting.per_row.make, []).append(row)
            arguments[row] = setting.per_row.argument
        else:
            key = (id(hooks), prompt.id if callable(hooks) else None)
            alone.setdefault(key, (hooks_for(hooks, prompt), []))[1].append(row)
    found: list[HookSpec] = []
    made = [(make(_only(arguments, mine)), mine) for make, mine in together.items()]
    for own, mine in (*alone.values(), *made):
        is_all = len(mine) == len(rows)
        found += own if is_all else [(where, on_rows(fn, mine)) for where, fn in own]
    return found


def _only(arguments: Tensor, rows: list[int]) -> Tensor:
    """Return the arguments of some rows, and 0 for rows of other makers."""
    own = torch.zeros_like(arguments)
    own[rows] = arguments[rows]
    return own


def settings_identity(model: HookedHybrid, settings: Sequence[Setting]) -> dict[str, Any]:
    """Return the identity of settings, by name: "spec", and the identity of their hooks.

    Raises:
        UntoldError: hooks with content that cannot be identified.

    Examples:
        >>> from hooked_hybrid.niah.settings import settings_identity, top_k_settings
        >>> list(settings_identity(model, top_k_settings([0, 8])))
        ['generation k=0', 'generation k=8', 'both k=0', 'both k=8']
    """
    known = known_of(model)
    return {
        s.name: {
            "spec": dict(s.spec),
            "hooks": identify(f"setting {s.name!r}", (s.prefill, s.generation, s.per_row), known),
        }
        for s in settings
    }
