"""`harvest`: chosen activations of many documents, streamed to disk in shards."""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from hooked_hybrid.harvest.contexts import Plan
from hooked_hybrid.harvest.documents import (
    FILE,
    Document,
    Documents,
    digest_of,
    ids_of,
    write_documents,
)
from hooked_hybrid.harvest.reading import HarvestedActivations
from hooked_hybrid.harvest.recipe import (
    Recipe,
    encoding_identity,
    interventions_identity,
    model_identity,
    special_tokens,
)
from hooked_hybrid.harvest.running import Runner, ShardMaker, bytes_of_row, hooks_to_keep
from hooked_hybrid.harvest.shards import (
    INDEX,
    Header,
    index_of,
    read_header,
    remove_begun,
    shard_name,
    write_json,
)
from hooked_hybrid.hooked_root import HookSpec
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.names import NameFilter
from hooked_hybrid.niah.work import Job
from hooked_hybrid.results_folder import claimed, holds_results

if TYPE_CHECKING:
    from hooked_hybrid.niah.ray_workers import RayWorkers

Dtype = Literal["float32", "bfloat16", "float16"]


def harvest(
    model: HookedHybrid,
    documents: Iterable[Document],
    names_filter: NameFilter,
    out: str | PathLike[str],
    *,
    context_length: int = 512,
    batch_size: int = 8,
    dtype: torch.dtype | Dtype | None = None,
    shard_bytes: int = 2**29,
    prepend_bos: bool | None = None,
    drop_special: bool = True,
    seed: int | None = None,
    fwd_hooks: Sequence[HookSpec] = (),
    resume: bool = False,
    workers: RayWorkers | None = None,
    verbose: bool = True,
) -> HarvestedActivations:
    """Write the activations of every token of some documents to shards, and return them.

    The folder gets safetensors shards, in which each hook point's values are [token ...] beside
    `token`, `document` and `position`; `index.json`, once all shards are there; the documents as
    tokens; and the recipe. No more is held than a forward's activations and one shard. A run that
    was stopped goes on with the shards that are missing, and a shard has the same bytes whenever
    and wherever it is made, on machines that round alike. A document longer than a context is cut,
    and each part begins as a text does; one context never sees another.

    Args:
        model: its forward ends after the last layer that a hook point needs.
        documents: texts, or rows of tokens, such as a tensor [document pos] without padding.
        names_filter: hook points, by name, pattern of the shell or predicate; several at once.
        out: folder, new or empty.
        context_length: tokens that are read together at most, BOS included.
        batch_size: contexts of a forward; of shorter ones, as many as have so many tokens.
        dtype: of floating-point values as they are written; None is the model's.
        shard_bytes: size of a shard, about.
        prepend_bos: whether every context begins with BOS; None is as the model was trained for
            texts, and no for tokens.
        drop_special: leave out the rows of BOS, EOS and padding tokens. They are read nevertheless.
        seed: put the contexts in random order, so that a shard is a sample of all documents; None
            keeps their order.
        fwd_hooks: interventions that act meanwhile; what is kept is the value after them.
        resume: go on with what the folder holds; `documents` must be given again.
        workers: of a Ray cluster, which must see `out` under the same path; None for this process.
        verbose: show progress bars.

    Raises:
        HookNameError: a hook point or a pattern that matches nothing.
        ValueError: an argument out of range, a value that is not finite, or a folder of another
            harvest; before any shard is written where it can be seen.
        FileExistsError: the folder is not empty and `resume` is false.
        OSError: another run writes there, the shards would not fit on the disk, or it fills.
    """
    names = hooks_to_keep(model, names_filter)
    model.check_hooks_to_add(fwd_hooks)
    _check(model, context_length, batch_size, shard_bytes)
    first, documents = _peeked(documents)
    bos = _bos(model, isinstance(first, str), prepend_bos)
    if bos is not None and context_length < 2:
        raise ValueError("context_length=1 has no room beside BOS: give 2 or more")
    runner = Runner(model, names, _dtype(dtype, model), fwd_hooks)
    shapes, folder = runner.shapes, Path(out)
    with claimed(folder, resume):
        remove_begun(folder)
        if holds_results(folder) and not (folder / FILE).exists():
            raise ValueError(f"{folder} holds no harvest: give another folder")
        read = _read(model, documents, isinstance(first, str), bos, folder, verbose)
        recipe = Recipe(
            names=names,
            dtype=str(runner.dtype).removeprefix("torch."),
            context_length=context_length,
            batch_size=batch_size,
            shard_tokens=max(1, shard_bytes // bytes_of_row(shapes)),
            bos=bos,
            left_out=special_tokens(model) if drop_special else [],
            seed=seed,
            documents=read.digest,
            encoding=read.encoding,
            model=model_identity(model),
            interventions=interventions_identity(fwd_hooks),
        )
        plan = recipe.plan(read)
        recipe.keep(folder)
        _make(runner, plan, recipe, folder, workers, verbose)
        remove_begun(folder)  # of workers that died
        paths = [folder / shard_name(i, plan.n_shards) for i in range(plan.n_shards)]
        write_json(folder / INDEX, index_of(folder, asdict(recipe), paths))
    return HarvestedActivations(folder)


@dataclass(frozen=True)
class HarvestJob(Job[int, Header]):
    """Shards by their numbers, made by a worker that sees the folder."""

    folder: Path
    recipe: Recipe
    interventions: tuple[HookSpec, ...]

    def __call__(self, model: HookedHybrid, items: Sequence[int]) -> Iterator[Header]:
        """Write each shard and yield its header."""
        dtype = getattr(torch, self.recipe.dtype)
        runner = Runner(model, self.recipe.names, dtype, self.interventions)
        plan = self.recipe.plan(Documents.open(self.folder))
        maker = ShardMaker(runner, plan, self.folder, self.recipe.hash)
        for shard in items:
            yield maker.make(shard)

    def describe(self, items: Sequence[int]) -> str:
        """Return which shards these are."""
        return f"shards {', '.join(map(str, items))}"


def _make(
    runner: Runner, plan: Plan, recipe: Recipe, folder: Path, workers: RayWorkers | None, show: bool
) -> None:
    """Make the shards that are missing."""
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
        for shard, header in workers.results(runner.model, job, [missing]):
            if not _is_there(folder, shard, plan, recipe):
                raise OSError(
                    f"a worker wrote {shard_name(shard, plan.n_shards)}, which is not in {folder} "
                    "here: give a folder that all machines of the cluster share"
                )
            bar.update(header.n_tokens)


def _is_there(folder: Path, shard: int, plan: Plan, recipe: Recipe) -> bool:
    """Whether a whole shard of this recipe is in the folder; a damaged one is made again."""
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


def _read(
    model: HookedHybrid,
    documents: Iterable[Document],
    is_text: bool,
    bos: int | None,
    folder: Path,
    verbose: bool,
) -> Documents:
    """Return the documents as tokens, written to the folder where they are not there yet."""
    encoding = encoding_identity(model, is_text, bos)
    counted = iter(tqdm(documents, unit=" documents", desc="tokens", disable=not verbose))
    if (folder / FILE).exists():
        before = Documents.open(folder)
        if before.encoding != encoding or before.digest != digest_of(counted):
            raise ValueError(
                f"{folder} holds a harvest of other documents, or of documents that were read with "
                "another tokenizer or another prepend_bos: give another folder, nothing is "
                "overwritten"
            )
        return before

    def encode(document: Document) -> Sequence[int]:
        if isinstance(document, str) is not is_text:
            raise ValueError("texts and rows of tokens are mixed: give documents of one kind")
        if isinstance(document, str):
            ids = model.text.encode(document, prepend_bos=False)
        else:
            ids = ids_of(document)
        return ids[1:] if bos is not None and ids[:1] == [bos] else ids

    write_documents(counted, encode, encoding, model.cfg.d_vocab, folder)
    return Documents.open(folder)


def _check(model: HookedHybrid, context_length: int, batch_size: int, shard_bytes: int) -> None:
    for name, value in (
        ("context_length", context_length),
        ("batch_size", batch_size),
        ("shard_bytes", shard_bytes),
    ):
        if value < 1:
            raise ValueError(f"{name}={value}: give 1 or more")
    longest = model.cfg.n_ctx
    if longest is not None and context_length > longest:
        raise ValueError(
            f"context_length={context_length}: the model was made for {longest} tokens at most"
        )


def _check_disk(folder: Path, n_tokens: int, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"{n_tokens:,} tokens take {needed / 1e9:.3g} GB, and {free / 1e9:.3g} GB are free in "
            f"{folder}: harvest fewer hook points or documents, write bfloat16, or give a folder "
            "on a larger disk"
        )


def _peeked(documents: Iterable[Document]) -> tuple[Document, Iterable[Document]]:
    """Return the first document, and all of them."""
    if isinstance(documents, str):
        raise ValueError("documents is one text: give a list, or read_texts(file)")
    stream = iter(documents)
    for first in stream:
        return first, chain([first], stream)
    raise ValueError("there are no documents")


def _bos(model: HookedHybrid, is_text: bool, prepend_bos: bool | None) -> int | None:
    """Return what is put in front of each context."""
    wanted = (is_text and model.text.prepends_bos) if prepend_bos is None else prepend_bos
    bos = model.cfg.bos_token_id if model.tokenizer is None else model.text.bos
    if wanted and bos is None:
        raise ValueError("prepend_bos=True, but neither tokenizer nor config names a BOS token")
    return bos if wanted else None


def _dtype(dtype: torch.dtype | Dtype | None, model: HookedHybrid) -> torch.dtype:
    found = getattr(torch, dtype) if isinstance(dtype, str) else dtype or model.dtype
    if found not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"dtype={dtype}: give 'float32', 'bfloat16' or 'float16'")
    return found


__all__ = ["HarvestJob", "harvest"]
