"""A sweep that tests whether the cached state carries the effect of heads zeroed in prefill.

All tokens of a prompt except the last are its prefill; every new token is chosen in a step of one
token (Google's sampler, `first_token_stage="generation"`). So the only result of prefill is a
state, through which alone it affects later steps. Hooks that act per position have the same effect
in one forward over everything as in prefill and steps. So two pairs of cases must agree: "no cache:
everywhere" and "prompt and steps: all"; "no cache: last position" and "steps: carry nothing".
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import groupby
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.cached_state.ways import CASES, WAYS, Answer, Case, way_of
from hooked_hybrid.niah.cells import cell_of
from hooked_hybrid.niah.groups import MOST_ROWS, CellRows, shortest_window
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.niah.sweep import PromptsJob, check_run, compute_cells

if TYPE_CHECKING:
    import pandas

    from hooked_hybrid.runs.ray_workers import RayWorkers


def cached_state(
    model: HookedHybrid,
    prompts: Sequence[Prompt],
    ks: Sequence[int],
    cases: Sequence[Case] = CASES,
    *,
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    max_new_tokens: int = 40,
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> pandas.DataFrame:
    """Run every prompt in every case, with the `k` most peaked heads of each layer kept.

    Args:
        model: with a tokenizer.
        prompts: of `hooked_hybrid.niah.prompts`.
        ks: heads kept in each attention layer where heads are zeroed.
        cases: where heads are zeroed, and the parts of the state that keep the effect.
        out, resume, max_new_tokens, workers, verbose: as in `hooked_hybrid.niah.sweep.niah`.

    Returns:
        One row for each prompt, case and k, as in `niah`; the settings are named "CASE k=K". A
        case without zeroed heads is one setting, without a k.

    Raises:
        ValueError: no prompts, cases or ks, or one given twice; a k that a layer does not have; a
            folder of another experiment.
        FileExistsError: the folder is not empty and `resume` is false.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> from hooked_hybrid.niah.cached_state import CASES, cached_state
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> table = cached_state(model, cells, ks=[0], cases=CASES[:2], verbose=False)
        >>> table["setting"].tolist()
        ['whole model', 'prompt: keys and values k=0']
    """
    check_run(out, resume, max_new_tokens)
    settings = settings_of(cases, ks)
    if not prompts or len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError("give at least one prompt, and each once")

    def make(some: Sequence[Prompt], chosen: Sequence[Setting]) -> CachedStateJob:
        cases = {setting.name: settings[setting.name] for setting in chosen}
        return CachedStateJob(some, cases, max_new_tokens)

    options = {"max_new_tokens": max_new_tokens}
    chosen = [setting for _, _, setting in settings.values()]
    return compute_cells(model, make, prompts, chosen, options, out, resume, workers, verbose)


class CachedStateJob(PromptsJob[int]):
    """The work of `cached_state`: an item is a few prompts, its result their cells."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: dict[str, tuple[Case, int | None, Setting]],
        max_new_tokens: int,
    ) -> None:
        self.parts = list(_parts(prompts, len(settings)))
        self.settings, self.max_new_tokens = settings, max_new_tokens

    @property
    def prompt_ids(self) -> list[str]:
        """The prompts' ids, in the order in which one process runs them."""
        return [prompt.id for part in self.parts for prompt in part]

    def units(self, done: set[str]) -> list[list[int]]:
        """Return each part with an unfinished prompt as a unit, as parts share no computation."""
        return [[i] for i, part in enumerate(self.parts) if any(p.id not in done for p in part)]

    def __call__(self, model: HookedHybrid, items: Sequence[int]) -> Iterator[CellRows]:
        """Yield the cells of each part."""
        window = shortest_window(model)
        for part in (self.parts[i] for i in items):
            start = time.perf_counter()
            answers = _answers(model, part, self.settings, self.max_new_tokens)
            seconds = (time.perf_counter() - start) / len(answers)
            yield [
                cell_of(p, self.settings[name][2], *answers[p.id, name], seconds, window)
                for p in part
                for name in self.settings
            ]

    def cost(self, item: int) -> float:
        """Return the tokens of a part's prompts."""
        return float(sum(prompt.length for prompt in self.parts[item]))

    def describe(self, items: Sequence[int]) -> str:
        """Return which prompts these are."""
        return f"prompts {', '.join(p.id for i in items for p in self.parts[i])}"


def settings_of(
    cases: Sequence[Case], ks: Sequence[int]
) -> dict[str, tuple[Case, int | None, Setting]]:
    """Return each case with each k (None if it needs none), by its name in the results.

    Raises:
        ValueError: no case or k, or one given twice.

    Examples:
        >>> from hooked_hybrid.niah.cached_state import CASES, settings_of
        >>> list(settings_of(CASES[:2], ks=[0, 4]))
        ['whole model', 'prompt: keys and values k=0', 'prompt: keys and values k=4']
    """
    found: dict[str, tuple[Case, int | None, Setting]] = {}
    for case in cases:
        is_damaged = case.damaged or case.steps is not None or case.recomputed
        for k in ks if is_damaged else [None]:
            name = case.name if k is None else f"{case.name} k={k}"
            spec: dict[str, Any] = {"kind": "cached state", "stage": case.name, "kept": k}
            spec |= {"damaged": case.damaged, "steps": case.steps, "recomputed": case.recomputed}
            if name in found:
                raise ValueError(f"{name!r} is asked for twice: give each case and k once")
            found[name] = (case, k, Setting(name, spec=spec))
    if not cases or not ks:
        raise ValueError("give at least one case, and one number of heads to keep")
    return found


def _parts(prompts: Sequence[Prompt], n_settings: int) -> Iterator[list[Prompt]]:
    """Yield a few prompts of one length at a time."""
    n = max(1, 2 * MOST_ROWS // n_settings)
    for _, group in groupby(sorted(prompts, key=lambda p: p.length), key=lambda p: p.length):
        same = list(group)
        yield from (same[i : i + n] for i in range(0, len(same), n))


def _answers(
    model: HookedHybrid,
    prompts: Sequence[Prompt],
    settings: dict[str, tuple[Case, int | None, Setting]],
    max_new_tokens: int,
) -> dict[tuple[str, str], Answer]:
    """Return the answer to each prompt (all of one length) in each setting."""
    tokens = torch.tensor([prompt.tokens for prompt in prompts], device=model.device)
    found: dict[tuple[str, str], Answer] = {}
    for way in WAYS:
        mine = [(name, c, k) for name, (c, k, _) in settings.items() if way_of(c) == way]
        rows = [(i, name) for i in range(len(prompts)) for name, _, _ in mine]
        if not rows:
            continue
        of_prompt = torch.tensor([i for i, _ in rows], device=model.device)
        cases = [(case, k) for _ in prompts for _, case, k in mine]
        answers = WAYS[way](model, tokens, of_prompt, cases, max_new_tokens)
        found |= {(prompts[i].id, name): a for (i, name), a in zip(rows, answers, strict=True)}
    return found
