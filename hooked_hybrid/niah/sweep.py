"""The sweep engine: many prompts under many settings, each prefill run once.

A setting is a list of hooks for prefill and one for generation. Settings with the same prefill
hooks (most often none) share one prefill: its state is forked, and all of them are decoded as the
rows of one batch, each row with its own hooks. Settings with prefill hooks are the rows of one
batch in prefill too. Prompts of one length share the run over the tokens they have in common,
except under prefill hooks that are not `per_position`, or depend on the prompt.
Numbers do not depend on where a run was stopped, or on who ran what: the batches are always the
same, all cells of one are kept at once, and the shared runs are cut at the same tokens whatever is
done already. So a sweep may be spread over the workers of a Ray cluster.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.cells import scored, with_places
from hooked_hybrid.niah.extending import Block
from hooked_hybrid.niah.groups import CellRows, FirstToken, Group, groups_of
from hooked_hybrid.niah.lengths import lengths_for
from hooked_hybrid.niah.needles import AnyNeedle, KeywordNeedle, Needle
from hooked_hybrid.niah.prompts import (
    Haystack,
    Prompt,
    default_depths,
    grid,
    prompts_identity,
)
from hooked_hybrid.niah.scores import Score, scorer
from hooked_hybrid.niah.settings.setting import (
    Setting,
    depends_on_prompt,
    hooks_for,
    settings_identity,
)
from hooked_hybrid.niah.settings.setting import (
    top_k_settings as top_k_settings,
)
from hooked_hybrid.niah.store import Store
from hooked_hybrid.options import check_choice, check_count, refuse_ignored
from hooked_hybrid.runs.identity.model import hash_once, model_identity
from hooked_hybrid.runs.identity.values import describe
from hooked_hybrid.runs.work import Item, Job, order_cells, results

if TYPE_CHECKING:
    import pandas

    from hooked_hybrid.runs.ray_workers import RayWorkers

Part = tuple[int, int]
"""A group of prompts, and a part of it."""


def niah(
    model: HookedHybrid,
    prompts: Sequence[Prompt | AnyNeedle | None],
    settings: Mapping[str, Sequence[HookSpec]] | Sequence[Setting],
    *,
    lengths: Sequence[int] | None = None,
    depths: Sequence[int | float] | None = None,
    haystack: Haystack | None = None,
    template: str | None = None,
    score: Score = "graded",
    out: str | PathLike[str] | None = None,
    resume: bool = False,
    max_new_tokens: int = 40,
    first_token_stage: FirstToken = "prefill",
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> pandas.DataFrame:
    """Run every prompt under every setting and score what is generated.

    Args:
        model: with a tokenizer.
        prompts: of `hooked_hybrid.niah.prompts`; or needles, of which prompts are made.
        settings: `Setting`s, or `{name: hooks}` for hooks that act in both stages.
        lengths, depths, haystack, template: of the prompts of needles, see `prompts.grid`; None is
            ten lengths up to twice the window, ten depths from 0 to 1, generated text, "base".
        score: how "accuracy" is computed: "graded" (the graded score / 5), "binary", "released", or
            a function of the output and the needle that returns 0 to 1. The columns "graded",
            "binary" and "released" are there in any case.
        out: folder of the results (`cells.sqlite`); None keeps them in memory.
        resume: continue with the cells in the folder. There may be more settings and prompts than
            before: the finished cells are kept, and only the new ones are run (in batches of their
            own: their `min_margin` is that of one sweep of all up to rounding).
        max_new_tokens: tokens generated at most.
        first_token_stage: see `generate`.
        workers: run the cells there, not in this process; the results are the same.
        verbose: show a progress bar.

    Returns:
        One row a cell; see `hooked_hybrid.niah.store.COLUMNS`. Depth 0 is the beginning of the
        haystack; `min_margin` is the smallest difference of the two largest logits on the way:
        below 1e-4 a rounding may have chosen the token. The order is by length and setting, and
        does not depend on which cells were done first.

    Raises:
        ValueError: `resume` without `out`, no prompts or settings, a prompt or a setting's name
            given twice, options of needles' prompts with prompts, a score that is not from 0 to 1,
            a setting whose hooks never act, or that cannot be sent to workers, or, with `out`,
            known again; or a folder of another experiment: another model, tokenizer, hook, score or
            option, or a setting or prompt that is left out.
        HookNameError: a hook that matches nothing; before any prompt is run.
        FileExistsError: the folder is not empty and `resume` is false.
        OSError: the results cannot be written.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> settings = {"whole": [], "no heads": interventions.keep_top_heads(0)}
        >>> table = sweep.niah(model, cells, settings, verbose=False)
        >>> table[["setting", "accuracy"]].values.tolist()
        [['whole', 1.0], ['no heads', 0.0]]
    """
    check_run(out, resume, max_new_tokens)
    check_choice("first_token_stage", first_token_stage, ("prefill", "generation"))
    chosen, rate = _settings(settings), None if score == "graded" else scorer(score)
    if not prompts:
        raise ValueError("there are no prompts: build some with hooked_hybrid.niah.prompts")
    prompts = _prompts(model, prompts, lengths, depths, haystack, template)
    if len({prompt.id for prompt in prompts}) < len(prompts):
        raise ValueError("a prompt is given twice: give each once")
    _refuse_idle(chosen, max_new_tokens, first_token_stage)
    for setting in chosen:
        for prompt in prompts if depends_on_prompt(setting) else prompts[:1]:
            hooks = (hooks_for(setting.prefill, prompt), hooks_for(setting.generation, prompt))
            model.check_hooks_to_add(tuple(chain(*hooks)))
    if workers is not None:
        workers.check(model, {f"setting {setting.name!r}": setting for setting in chosen})
    make = partial(SweepJob, max_new_tokens=max_new_tokens, first_token_stage=first_token_stage)
    options: dict[str, Any] = {"max_new_tokens": max_new_tokens}
    options["first_token_stage"] = first_token_stage
    if score != "graded":
        options["score"] = score if isinstance(score, str) else describe(score)
    return compute_cells(model, make, prompts, chosen, options, out, resume, workers, verbose, rate)


def compute_cells(
    model: HookedHybrid,
    make: Callable[[Sequence[Prompt], Sequence[Setting]], PromptsJob[Any]],
    prompts: Sequence[Prompt],
    settings: Sequence[Setting],
    options: Mapping[str, Any],
    out: str | PathLike[str] | None,
    resume: bool,
    workers: RayWorkers | None,
    verbose: bool,
    score: Callable[[str, AnyNeedle], float] | None = None,
) -> pandas.DataFrame:
    """Run what a store does not hold yet, keep it there, and return the table of all cells.

    Args:
        model: what runs.
        make: returns the work of some prompts under some settings.
        prompts, settings: every prompt has a cell in every setting.
        options: what else the results depend on, as the store records it.
        out, resume, workers, verbose: as in `niah`.
        score: gives the accuracy of an answer; None leaves the graded one.
    """
    with hash_once():
        experiment: dict[str, Any] = {}
        if out is not None:  # results in memory cannot be continued
            experiment = {
                "identity": model_identity(model),
                "settings": settings_identity(model, settings),
                **prompts_identity(prompts),
                **options,
            }
        store = Store(None if out is None else Path(out), experiment, resume, prompts)
        by_id, by_name = {p.id: p for p in prompts}, {s.name: s for s in settings}
        names = list(by_name)
        with closing(store):
            blocks = store.blocks if out is not None else [Block(tuple(by_id), tuple(names))]
            done = [store.done_of(block) for block in blocks]
            n_done = sum(len(d) * len(b.settings) for d, b in zip(done, blocks, strict=True))
            total = len(prompts) * len(settings)
            bar = tqdm(total=total, initial=n_done, unit="cell", disable=not verbose)
            with bar, torch.no_grad():
                for block, finished in zip(blocks, done, strict=True):
                    chosen = [by_id[i] for i in block.prompts], [by_name[n] for n in block.settings]
                    job = make(*chosen)
                    with closing(results(model, job, job.units(finished), workers)) as found:
                        for _, cells in found:
                            store.add(scored(cells, by_id, score))
                            bar.update(len(cells))
            order = make(prompts, settings).prompt_ids
            return with_places(order_cells(store.table(), order, names), prompts)


def check_run(out: str | PathLike[str] | None, resume: bool, max_new_tokens: int) -> None:
    """Refuse options of a sweep that say nothing, before any work.

    Raises:
        ValueError: `resume` without a folder, or no new token.
    """
    if out is None:
        refuse_ignored("give out=, the folder to continue", resume=resume)
    check_count("max_new_tokens", max_new_tokens)


class PromptsJob(Job[Item, CellRows]):
    """Work whose results are the cells of prompts."""

    @property
    @abstractmethod
    def prompt_ids(self) -> list[str]:
        """The prompts' ids, in the order in which one process runs them."""

    @abstractmethod
    def units(self, done: set[str]) -> list[list[Item]]:
        """Return the items with a prompt that is not done, in units."""


class SweepJob(PromptsJob[Part]):
    """The work of a sweep: an item is a part of a group, its result that part's cells."""

    def __init__(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[Setting],
        max_new_tokens: int,
        first_token_stage: FirstToken,
    ) -> None:
        self.groups = [Group(group, settings) for group in groups_of(prompts)]
        self.max_new_tokens, self.first_token_stage = max_new_tokens, first_token_stage

    @property
    def prompt_ids(self) -> list[str]:
        """The prompts' ids, in the order in which one process runs them."""
        return [p.id for group in self.groups for part in group.parts for p in part]

    def units(self, done: set[str]) -> list[list[Part]]:
        """Return the parts with a prompt that is not done, a unit a group."""
        return [
            [(g, i) for i, part in enumerate(group.parts) if any(p.id not in done for p in part)]
            for g, group in enumerate(self.groups)
        ]

    def __call__(self, model: HookedHybrid, items: Sequence[Part]) -> Iterator[CellRows]:
        """Yield the cells of each of some parts of one group."""
        if items:
            group = self.groups[items[0][0]]
            parts = [i for _, i in items]
            yield from group.cells(model, parts, self.max_new_tokens, self.first_token_stage)

    def cost(self, item: Part) -> float:
        """Return how much a part takes, relative to others: tokens, of settings and prompts."""
        part = self.groups[item[0]].parts[item[1]]
        return float(sum(prompt.length for prompt in part))

    def describe(self, items: Sequence[Part]) -> str:
        """Return which prompts these are."""
        ids = [prompt.id for g, i in items for prompt in self.groups[g].parts[i]]
        return f"prompts {', '.join(ids)}"


def _prompts(
    model: HookedHybrid,
    given: Sequence[Any],
    lengths: Sequence[int] | None,
    depths: Sequence[int | float] | None,
    haystack: Haystack | None,
    template: str | None,
) -> Sequence[Prompt]:
    """Return prompts as they are, or those of needles.

    Raises:
        ValueError: options for needles with prompts, or both among those given.
    """
    if all(isinstance(one, Prompt) for one in given):
        refuse_ignored(
            "prompts are run as they are; give them to hooked_hybrid.niah.prompts.grid, or give "
            "needles here",
            lengths=lengths,
            depths=depths,
            haystack=haystack,
            template=template,
        )
        return given
    if wrong := [one for one in given if not isinstance(one, Needle | KeywordNeedle | None)]:
        raise ValueError(f"{wrong[0]!r} among the prompts: give prompts alone, or needles alone")
    template, haystack = template or "base", haystack or Haystack()
    lengths = lengths or lengths_for(model, given, template, False, 0, haystack.seed)
    return grid(model, given, lengths, depths or default_depths(), haystack, template)


def _settings(settings: Mapping[str, Sequence[HookSpec]] | Sequence[Setting]) -> list[Setting]:
    if isinstance(settings, Mapping):
        chosen = [Setting(name, tuple(hooks), tuple(hooks)) for name, hooks in settings.items()]
    else:
        chosen = list(settings)
    names = [s.name for s in chosen]
    if not names or len(set(names)) != len(names):
        raise ValueError(f"give one or more settings, each with its own name, not {names}")
    return chosen


def _refuse_idle(settings: Sequence[Setting], max_new_tokens: int, first: FirstToken) -> None:
    """Refuse a setting whose hooks would all be idle: its cells would be the unedited model's."""
    if first == "generation" or max_new_tokens > 1:
        return
    for setting in settings:
        if setting.generation and not setting.prefill:
            raise ValueError(
                f"setting {setting.name!r} has hooks for generation only, and prefill chooses the "
                "one new token: give max_new_tokens=2 or more, or first_token_stage='generation'"
            )
