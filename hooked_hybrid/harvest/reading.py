"""Reading a harvest: its index, its shards, and batches of its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import count
from os import PathLike
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from hooked_hybrid.harvest.index_file import read_index
from hooked_hybrid.harvest.shards import (
    AGAIN,
    BESIDE,
    INDEX,
    check_shard,
    index_of,
    read_header,
    short_hash,
)
from hooked_hybrid.hooks.names import Shorthand, fit, is_pattern, resolve
from hooked_hybrid.options import check_count, refuse_ignored
from hooked_hybrid.outputs.foreign import require_plain_file, require_safetensors

BLOCK = 256
"""Adjacent tokens that are read together."""
MOST_OPEN = 64
"""Shards that stay open."""


class HarvestedActivations:
    """The activations that `harvest` wrote to a folder.

    `len` is the number of tokens. `index` is `index.json`: `hooks` has dtype, shape, mean norm and
    mean squared norm of each hook point, `recipe` the arguments of the harvest.

    Args:
        folder: of a finished harvest.

    Raises:
        ValueError: there is none, or it is not finished, of a newer version, or damaged. Here only
            the index and the sizes of files are checked; `verify` reads all values.

    Examples:
        >>> from hooked_hybrid.harvest import HarvestedActivations, harvest
        >>> data = harvest(model, [text], ["hook_embed"], "one_text", verbose=False)
        >>> len(HarvestedActivations("one_text")), data.names, data.shape("hook_embed")
        (15, ['hook_embed'], (128,))
    """

    def __init__(self, folder: str | PathLike[str]) -> None:
        self.folder = Path(folder)
        self.index = read_index(self.folder)
        self.paths = [self.folder / shard["file"] for shard in self.index["shards"]]
        for path, shard in zip(self.paths, self.index["shards"], strict=True):
            n_bytes = require_plain_file(path) if path.exists() else 0
            if n_bytes != shard["bytes"]:
                raise ValueError(
                    f"{path} has {n_bytes} bytes, and {shard['bytes']} in {INDEX}: {AGAIN}"
                )
        header, n_tokens = read_header(self.paths[0]), self.index["shards"][0]["tokens"]
        if (header.recipe, header.n_tokens) != (short_hash(self.index["recipe"]), n_tokens):
            raise ValueError(
                f"{self.folder / INDEX} does not belong to the shards in its folder: {AGAIN}"
            )

    def __len__(self) -> int:
        return int(self.index["tokens"])

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({str(self.folder)!r}: {len(self):,} tokens, "
            f"{len(self.paths)} shards, {', '.join(self.names)})"
        )

    @property
    def names(self) -> list[str]:
        """The hook points."""
        return list(self.index["hooks"])

    def shape(self, name: Shorthand) -> tuple[int, ...]:
        """Return the shape of one token's value at a hook point.

        Examples:
            >>> from hooked_hybrid.harvest import harvest
            >>> harvest(model, [text], "hook_embed", "shapes", verbose=False).shape("hook_embed")
            (128,)
        """
        return tuple(self.index["hooks"][self.resolve(name)]["shape"])

    def mean_norm(self, name: Shorthand) -> float:
        """Return the mean L2 norm of a hook point's values.

        Raises:
            ValueError: they are integers.

        Examples:
            >>> from hooked_hybrid.harvest import harvest
            >>> data = harvest(model, [text], "hook_embed", "norms", verbose=False)
            >>> data.mean_norm("hook_embed") > 0
            True
        """
        found = self.index["hooks"][self.resolve(name)]["mean_norm"]
        if found is None:
            raise ValueError(f"{name} holds integers, which have no norm")
        return float(found)

    def load(self, shard: int, name: Shorthand) -> Tensor:
        """Return one tensor of a shard, [token ...], as a memory map, loaded as it is read.

        Args:
            shard: its number, from 0.
            name: a hook point, or one of "token", "document" and "position".

        Raises:
            ValueError: there are fewer shards.

        Examples:
            >>> from hooked_hybrid.harvest import harvest
            >>> data = harvest(model, [text], "hook_embed", "loaded", verbose=False)
            >>> data.load(0, "hook_embed").shape
            torch.Size([15, 128])
        """
        check_count("shard", shard, 0, len(self.paths) - 1, of="the shards")
        with self.opened(shard) as file:
            return file.get_tensor(self.resolve(name))

    def opened(self, shard: int) -> Any:
        """Return a shard's file, opened.

        Raises:
            ValueError: its number of tokens or its header differs from the index.
        """
        path, n_tokens = self.paths[shard], self.index["shards"][shard]["tokens"]
        require_safetensors(path)
        try:
            file = safe_open(path, "pt")
            found = file.get_slice("token").get_shape()
        except SafetensorError as error:
            raise ValueError(f"{path} is not a whole shard of a harvest ({error})") from error
        if found != [n_tokens]:
            raise ValueError(f"{path} has {found} tokens, and {n_tokens} in {INDEX}: {AGAIN}")
        return file

    def batches(
        self,
        name: Shorthand | list[Shorthand],
        batch_size: int,
        *,
        seed: int | None = 0,
        epochs: int | None = 1,
        pool_tokens: int = 2**16,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> ActivationBatches:
        """Return batches to iterate over, or to give a `DataLoader` with `batch_size=None`.

        Args:
            name: a hook point, for tensors [token d] (what follows the token axis is flattened); or
                a pattern ("blocks.*.hook_resid_post"), or a list of hook points, patterns and of
                "token", "document", "position", for dicts of tensors [token ...] as they are.
            batch_size: tokens of a batch.
            seed: of the order, which differs in each epoch; None keeps that of the documents.
            epochs: number of passes over all tokens; None repeats without end.
            pool_tokens: tokens in memory from which batches are drawn.
            drop_last: leave out a last batch that is not full.
            dtype: of floating-point values; None is that of the files.

        Raises:
            ValueError: an argument out of range, an integer dtype, or a dtype with integer values
                only.

        Examples:
            >>> from hooked_hybrid.harvest import harvest
            >>> data = harvest(model, [text] * 8, "hook_embed", "to_train", verbose=False)
            >>> [batch.shape for batch in data.batches("hook_embed", 64)]
            [torch.Size([64, 128]), torch.Size([56, 128])]
        """
        return ActivationBatches(
            self, name, batch_size, seed, epochs, pool_tokens, drop_last, dtype
        )

    def is_floating(self, name: Shorthand) -> bool:
        """Whether a hook point's values, or a column's, are floating-point numbers."""
        full = self.resolve(name)
        return full not in BESIDE and "float" in self.index["hooks"][full]["dtype"]

    def verify(self) -> None:
        """Compare every tensor with its stored hash, and the index with the shards.

        Raises:
            ValueError: one differs.

        Examples:
            >>> from hooked_hybrid.harvest import harvest
            >>> harvest(model, [text], "hook_embed", "verified", verbose=False).verify()
        """
        for path in self.paths:
            check_shard(path, self.index["hooks"])
        if index_of(self.folder, self.index["recipe"], self.paths) != self.index:
            raise ValueError(f"{self.folder / INDEX} does not fit the shards: {AGAIN}")

    def resolve(self, name: Shorthand) -> str:
        """Return the full name of a hook point or a column.

        Args:
            name: a full name, a shorthand, or a pattern that fits one of the names.

        Raises:
            HookNameError: it was not harvested (the message lists the nearest names), or several
                names fit a pattern.
        """
        if isinstance(name, str) and name in BESIDE:
            return name
        layers = [int(n.split(".")[1]) for n in self.names if n.startswith("blocks.")]
        return resolve(name, self.names, max(layers, default=0) + 1)

    def resolve_all(self, names: Shorthand | list[Shorthand]) -> list[str]:
        """Return the full names of one or several names or patterns, each once.

        Raises:
            HookNameError: as `resolve`.
        """
        found: list[str] = []
        for name in names if isinstance(names, list) else [names]:
            found += fit(str(name), self.names) if is_pattern(name) else [self.resolve(name)]
        return list(dict.fromkeys(found))


class ActivationBatches(IterableDataset[Any]):
    """Batches of a harvest; see `HarvestedActivations.batches`.

    Blocks of adjacent tokens of all shards are read in random order into a pool, from which batches
    are drawn until half of it is left. In a `DataLoader`, each worker reads its own shards, and no
    token is read twice in an epoch. Each iteration begins with the first epoch.

    Examples:
        >>> from hooked_hybrid.harvest import ActivationBatches, harvest
        >>> name = "blocks.5.hook_resid_post"
        >>> data = harvest(model, [text] * 8, name, "for_batches", verbose=False)
        >>> batches = ActivationBatches(data, name, batch_size=32)
        >>> next(iter(batches)).shape
        torch.Size([32, 128])
    """

    def __init__(
        self,
        harvest: HarvestedActivations,
        name: Shorthand | list[Shorthand],
        batch_size: int,
        seed: int | None = 0,
        epochs: int | None = 1,
        pool_tokens: int = 2**16,
        drop_last: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_count("batch_size", batch_size)
        if epochs is not None:
            check_count("epochs", epochs)
        check_count("pool_tokens", pool_tokens)
        if pool_tokens < batch_size:
            raise ValueError(
                f"pool_tokens={pool_tokens}: give {batch_size}, the size of a batch, or more"
            )
        self.harvest, self.batch_size, self.seed, self.epochs = harvest, batch_size, seed, epochs
        self.pool_tokens, self.drop_last, self.dtype = pool_tokens, drop_last, dtype
        self.is_single = not (isinstance(name, list) or is_pattern(name))
        if name == []:
            raise ValueError("name is an empty list: give one hook point or more")
        self.names = harvest.resolve_all(name)
        if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
            raise ValueError(f"dtype={dtype}: give a dtype of floating-point values, torch.float32")
        if not any(harvest.is_floating(one) for one in self.names):
            refuse_ignored("these are whole numbers, which stay as they are", dtype=dtype)

    def __iter__(self) -> Iterator[Any]:
        for epoch in count() if self.epochs is None else range(self.epochs):
            is_empty = True
            for batch in self._epoch(epoch):
                is_empty = False
                yield batch
            if is_empty:  # a worker without a shard must not repeat an empty epoch without end
                return

    def _epoch(self, epoch: int) -> Iterator[Any]:
        worker = get_worker_info()
        of, n = (0, 1) if worker is None else (worker.id, worker.num_workers)
        generator = None
        if self.seed is not None:
            # Each worker and epoch has its own random stream, whatever their number.
            stream = Random(f"{self.seed} {epoch} {of}")
            generator = torch.Generator().manual_seed(stream.getrandbits(63))
        pool: dict[str, Tensor] = {}
        blocks = self._blocks(range(of, len(self.harvest.paths), n), generator)
        opened = lru_cache(MOST_OPEN)(self.harvest.opened)
        while True:
            is_last = not self._fill(pool, blocks, opened, generator)
            n_pool = len(pool[self.names[0]]) if pool else 0
            n_left = 0 if is_last or generator is None else n_pool // 2
            at = 0
            while n_pool - at >= max(self.batch_size, n_left + 1):
                yield self._batch(pool, at, at + self.batch_size)
                at += self.batch_size
            if is_last:
                if at < n_pool and not self.drop_last:
                    yield self._batch(pool, at, n_pool)
                return
            pool = {name: value[at:].clone() for name, value in pool.items()}

    def _blocks(
        self, shards: Sequence[int], generator: torch.Generator | None
    ) -> Iterator[tuple[int, int]]:
        """Yield every block of some shards, as the shard and the block's first token in it."""
        sizes = [self.harvest.index["shards"][shard]["tokens"] for shard in shards]
        if not sizes:
            return
        starts = [torch.arange(0, size, BLOCK) for size in sizes]
        of = torch.tensor(shards).repeat_interleave(torch.tensor([len(s) for s in starts]))
        start = torch.cat(starts)
        n = len(start)
        order = torch.arange(n) if generator is None else torch.randperm(n, generator=generator)
        for i in order:
            yield int(of[i]), int(start[i])

    def _fill(
        self,
        pool: dict[str, Tensor],
        blocks: Iterator[tuple[int, int]],
        opened: Callable[[int], Any],
        generator: torch.Generator | None,
    ) -> bool:
        """Add blocks to the pool until it is full, and shuffle it; False if none are left."""
        parts = {name: [pool[name]] if pool else [] for name in self.names}
        n_held, is_full = (len(pool[self.names[0]]) if pool else 0), False
        for shard, start in blocks:
            file = opened(shard)
            for name in self.names:
                parts[name].append(file.get_slice(name)[start : start + BLOCK])
            n_held += len(parts[self.names[0]][-1])
            if is_full := n_held >= self.pool_tokens:
                break
        if not n_held:
            return False
        order = None if generator is None else torch.randperm(n_held, generator=generator)
        for name, found in parts.items():
            whole = torch.cat(found)
            pool[name] = whole if order is None else whole[order]
        return is_full

    def _batch(self, pool: dict[str, Tensor], start: int, stop: int) -> Any:
        """Return a copy of some rows of the pool."""
        batch = {}
        for name, value in pool.items():
            part = value[start:stop].clone()
            if self.dtype is not None and part.is_floating_point():
                part = part.to(self.dtype)
            batch[name] = part
        return batch[self.names[0]].flatten(1) if self.is_single else batch
