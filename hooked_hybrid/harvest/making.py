"""Making the missing shards of a harvest, in this process or by the workers of a Ray cluster."""

from __future__ import annotations

import os
import shutil
import socket
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from tqdm.auto import tqdm

from hooked_hybrid.harvest.contexts import PackingPlan
from hooked_hybrid.harvest.documents import Documents
from hooked_hybrid.harvest.recipe import HarvestRecipe
from hooked_hybrid.harvest.running import Runner, ShardMaker, bytes_of_row
from hooked_hybrid.harvest.shards import Header, read_header, shard_name
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.runs.work import Job

if TYPE_CHECKING:
    from hooked_hybrid.runs.ray_workers import RayWorkers

SEEN_WITHIN = 60
"""Seconds after which a worker's shard must be visible here: a shared disk may show files late."""


@dataclass(frozen=True)
class HarvestJob(Job[int, Header]):
    """Shards by their numbers, made by a worker that can reach the folder."""

    folder: Path
    recipe: HarvestRecipe
    interventions: tuple[HookSpec, ...]

    def __call__(self, model: HookedHybrid, items: Sequence[int]) -> Iterator[Header]:
        """Write each shard and yield its header.

        Raises:
            OSError: the folder does not exist on this machine, or a shard cannot be written.
            ValueError: the folder contains another harvest, or a value is not finite.
        """
        dtype = getattr(torch, self.recipe.dtype)
        runner = Runner(model, self.recipe.names, dtype, self.interventions)
        maker = ShardMaker(
            runner, self.recipe.plan(self._documents()), self.folder, self.recipe.hash
        )
        for shard in items:
            yield maker.make(shard)

    def describe(self, items: Sequence[int]) -> str:
        """Return the numbers of the shards as text."""
        return f"shards {', '.join(map(str, items))}"

    def _documents(self) -> Documents:
        who = f"a worker on {socket.gethostname()}"
        remedy = f"{self.folder}: give a folder that all machines of the cluster share"
        try:
            found = Documents.open(self.folder)
        except OSError as error:
            raise OSError(f"{who} does not see the harvest in {remedy}") from error
        if found.digest != self.recipe.documents:
            raise ValueError(f"{who} sees another harvest in {remedy}")
        return found


def make_missing(
    runner: Runner,
    plan: PackingPlan,
    recipe: HarvestRecipe,
    folder: Path,
    workers: RayWorkers | None,
    show: bool,
) -> None:
    """Make the shards that are missing, or damaged.

    Raises:
        ValueError: a shard of another harvest is in the folder, or a value is not finite.
        OSError: the shards do not fit on the disk, or are not visible to this process.
    """
    missing = [i for i in range(plan.n_shards) if not _is_there(folder, i, plan, recipe)]
    n_missing = sum(plan.n_rows(i) for i in missing)
    _check_disk(folder, n_missing, n_missing * bytes_of_row(runner.shapes))
    bar = tqdm(
        total=plan.n_tokens,
        initial=plan.n_tokens - n_missing,
        unit=" tokens",
        unit_scale=True,
        desc="harvest",
        disable=not show,
    )
    with bar:
        if workers is None:
            maker = ShardMaker(runner, plan, folder, recipe.hash)
            for shard in missing:
                maker.make(shard, bar.update)
            return
        job = HarvestJob(folder.resolve(), recipe, tuple(runner.interventions))
        with closing(workers.results(runner.model, job, [missing])) as made:
            for shard, header in made:
                _wait_for(folder / shard_name(shard, plan.n_shards))
                bar.update(header.n_tokens)


def _is_there(folder: Path, shard: int, plan: PackingPlan, recipe: HarvestRecipe) -> bool:
    """Whether a shard of this recipe is in the folder; an incomplete one is made again."""
    path = folder / shard_name(shard, plan.n_shards)
    if not path.exists():
        return False
    try:
        header = read_header(path)
    except ValueError as error:
        warnings.warn(f"{error}: it is made again", stacklevel=2)
        return False
    if (header.recipe, header.shard) != (recipe.hash, shard):
        raise ValueError(f"{path} is of another harvest: give another folder")
    return True


def _wait_for(path: Path) -> None:
    """Wait until a file that a worker wrote is visible here.

    Raises:
        OSError: it is not visible in time.
    """
    until = time.monotonic() + SEEN_WITHIN
    while not path.exists():
        if time.monotonic() > until:
            raise OSError(
                f"a worker wrote {path.name}, which is not in {path.parent} here: give a folder "
                "that all machines of the cluster share"
            )
        time.sleep(0.1)
        os.listdir(path.parent)  # makes a network file system read the folder anew


def _check_disk(folder: Path, n_tokens: int, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{n_tokens:,} tokens take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in "
            f"{folder}: harvest fewer hook points or documents, write bfloat16, or give a folder "
            "on a larger disk"
        )
