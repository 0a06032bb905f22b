"""`harvest`: chosen activations of many documents, streamed to disk in shards."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import chain
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from tqdm.auto import tqdm

from hooked_hybrid.harvest.documents import (
    FILE,
    Document,
    Documents,
    digest_of,
    ids_of,
    write_documents,
)
from hooked_hybrid.harvest.making import make_missing
from hooked_hybrid.harvest.reading import HarvestedActivations
from hooked_hybrid.harvest.recipe import (
    HarvestRecipe,
    encoding_identity,
    is_recorded,
    recipe_identity,
    special_tokens,
)
from hooked_hybrid.harvest.running import Runner, bytes_of_row, hooks_to_keep
from hooked_hybrid.harvest.shards import (
    INDEX,
    begun_in,
    index_of,
    remove_begun,
    shard_name,
    write_json,
)
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.names import CacheFilter
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.options import check_count
from hooked_hybrid.outputs.folders import claim, holds_results
from hooked_hybrid.runs.identity.model import hash_once
from hooked_hybrid.text.padding import may_hold_padding

if TYPE_CHECKING:
    from hooked_hybrid.runs.ray_workers import RayWorkers

Dtype = Literal["float32", "bfloat16", "float16"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def harvest(
    model: HookedHybrid,
    documents: Iterable[Document],
    names_filter: CacheFilter,
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

    The folder gets safetensors shards, in which each hook point's values are [token ...] with
    `token`, `document` and `position`; `index.json`, once all shards are there; the documents as
    tokens; and the recipe. In memory are the activations of one forward and one shard. A run that
    was stopped continues with the missing shards, and a shard has the same bytes whenever and
    wherever it is made, on machines that round alike. A document longer than a context is cut, and
    each part begins like a text; one context never sees another.

    Args:
        model: its forward ends after the last layer that a hook point needs.
        documents: texts, or rows of tokens, such as a tensor [document pos] without padding.
        names_filter: hook points; see `hooks_to_keep`.
        out: folder, new or empty.
        context_length: most tokens that are read together, BOS included.
        batch_size: contexts of a forward; more of shorter contexts, up to the same number of
            tokens.
        dtype: of floating-point values as they are written; None is the model's.
        shard_bytes: approximate size of a shard.
        prepend_bos: whether every context begins with BOS; None follows the model's training for
            texts, and is False for tokens.
        drop_special: leave out the rows of BOS, EOS and padding tokens. They are still read.
        seed: put the contexts in random order, so that a shard is a sample of all documents; None
            keeps their order.
        fwd_hooks: interventions attached during the forwards; the value after them is kept.
        resume: continue the harvest in the folder; `documents` must be given again.
        workers: of a Ray cluster, which must reach `out` under the same path; None for this
            process.
        verbose: show progress bars.

    Raises:
        HookNameError: a hook point or a pattern that matches nothing.
        ValueError: an argument out of range, a padded row of tokens, a value that is not finite,
            or a folder of another harvest; raised before any shard is written where possible.
        FileExistsError: the folder is not empty and `resume` is false.
        OSError: another run writes to the folder, or the disk is too small or becomes full.

    Examples:
        >>> from hooked_hybrid.harvest import harvest
        >>> names = "blocks.*.hook_resid_post"
        >>> data = harvest(model, [text, text], names, "harvested", verbose=False)
        >>> len(data), len(data.names)  # tokens, hook points
        (30, 6)
    """
    names = hooks_to_keep(model, names_filter)
    model.check_hooks_to_add(fwd_hooks)
    _check(model, context_length, batch_size, shard_bytes, seed)
    if workers is not None:
        workers.check(model, {"fwd_hooks": tuple(fwd_hooks)})
    is_text, documents = _peek(documents)
    bos = _bos(model, is_text, prepend_bos)
    if bos is not None and context_length < 2:
        raise ValueError("context_length=1 has no room after BOS: give 2 or more")
    runner = Runner(model, names, _dtype(dtype, model), fwd_hooks)
    folder = Path(out)
    with hash_once(), claim(folder, resume):
        identity = recipe_identity(model, fwd_hooks)
        is_begun = (folder / FILE).exists()
        others = set() if is_begun else begun_in(folder)
        if not is_begun and holds_results(folder, others):
            raise ValueError(f"{folder} holds no harvest: give another folder")
        read = _read(model, documents, is_text, bos, folder, verbose)
        recipe = HarvestRecipe(
            names=names,
            dtype=str(runner.dtype).removeprefix("torch."),
            context_length=context_length,
            batch_size=batch_size,
            shard_tokens=max(1, shard_bytes // bytes_of_row(runner.shapes)),
            bos=bos,
            left_out=special_tokens(model) if drop_special else [],
            seed=seed,
            documents=read.digest,
            encoding=read.encoding,
            **identity,
        )
        plan = recipe.plan(read)
        recipe = recipe.keep(folder, model.cfg)
        remove_begun(folder, others)  # only now is the folder known to be of this harvest
        make_missing(runner, plan, recipe, folder, workers, verbose)
        remove_begun(folder, others)  # of workers that died
        paths = [folder / shard_name(i, plan.n_shards) for i in range(plan.n_shards)]
        write_json(folder / INDEX, index_of(folder, asdict(recipe), paths))
    return HarvestedActivations(folder)


def _read(
    model: HookedHybrid,
    documents: Iterable[Document],
    is_text: bool,
    bos: int | None,
    folder: Path,
    verbose: bool,
) -> Documents:
    """Return the documents as tokens, written to the folder unless they are already there."""
    encoding = encoding_identity(model, is_text, bos)
    counted = iter(tqdm(documents, unit=" documents", desc="tokens", disable=not verbose))
    if (folder / FILE).exists():
        before = Documents.open(folder)
        if not before.is_whole:
            raise ValueError(f"{folder / FILE} is damaged: harvest into another folder")
        if not is_recorded(before.encoding):
            raise ValueError(
                f"{folder} was begun by an older version of this library, which did not record "
                f"enough to identify the tokenizer of its texts: give another folder, nothing is "
                f"overwritten"
            )
        if before.encoding != encoding or before.digest != digest_of(counted):
            raise ValueError(
                f"{folder} holds a harvest of other documents, or of documents that were read with "
                "another tokenizer or another prepend_bos: give another folder, nothing is "
                "overwritten"
            )
        try:
            before.require_possible(model.cfg.d_vocab)
        except ValueError as error:
            raise ValueError(f"{folder / FILE} is damaged ({error})") from error
        return before

    def encode(document: Document) -> Sequence[int]:
        if isinstance(document, str) is not is_text:
            raise ValueError("texts and rows of tokens are mixed: give documents of one kind")
        if isinstance(document, str):
            ids = model.text.encode(document, prepend_bos=False)
        else:
            ids = ids_of(document)
            _refuse_padding(model, ids)
        return ids[1:] if bos is not None and ids[:1] == [bos] else ids

    write_documents(counted, encode, encoding, model.cfg.d_vocab, folder)
    return Documents.open(folder)


def _refuse_padding(model: HookedHybrid, ids: Sequence[int]) -> None:
    """Raise an error for a row that begins or ends with padding: it would be read as text."""
    if model.tokenizer is None or not ids:
        return
    padded = may_hold_padding(torch.tensor([ids]), model.text)
    if padded is not None and bool(padded):
        raise ValueError(
            f"it begins or ends with the padding token {model.text.pad_id}, and documents are read "
            "without padding: give texts, or each row cut to its tokens (row[mask.bool()])"
        )


def _check(
    model: HookedHybrid, context_length: int, batch_size: int, shard_bytes: int, seed: int | None
) -> None:
    if seed is not None:
        check_count("seed", seed, -(2**63), 2**63 - 1, of="64 bits")
    for name, value in (
        ("context_length", context_length),
        ("batch_size", batch_size),
        ("shard_bytes", shard_bytes),
    ):
        check_count(name, value)
    longest = model.cfg.n_ctx
    if longest is not None and context_length > longest:
        raise ValueError(
            f"context_length={context_length}: the model was made for {longest} tokens at most"
        )


def _peek(documents: Iterable[Document]) -> tuple[bool, Iterable[Document]]:
    """Return whether the first document is a text, and all of them."""
    if isinstance(documents, str):
        raise ValueError("documents is one text: give a list, or read_texts(file)")
    stream = iter(documents)
    for first in stream:
        return isinstance(first, str), chain([first], stream)
    raise ValueError("there are no documents")


def _bos(model: HookedHybrid, is_text: bool, prepend_bos: bool | None) -> int | None:
    """Return the token that is prepended to each context, or None."""
    wanted = (is_text and model.text.prepends_bos) if prepend_bos is None else prepend_bos
    bos = model.cfg.bos_token_id if model.tokenizer is None else model.text.bos
    if wanted and bos is None:
        raise ValueError("prepend_bos=True, but neither tokenizer nor config names a BOS token")
    return bos if wanted else None


def _dtype(dtype: torch.dtype | Dtype | None, model: HookedHybrid) -> torch.dtype:
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype or model.dtype
    if found is None or found not in DTYPES.values():
        raise ValueError(f"dtype={dtype or found}: give 'float32', 'bfloat16' or 'float16'")
    return found
