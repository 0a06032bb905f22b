"""Making one shard: the forwards, and the rows that their hooks record."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.harvest.contexts import PackedBatch, PackingPlan
from hooked_hybrid.harvest.shards import Header, shard_name, write_shard
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import is_per_position, watcher
from hooked_hybrid.hooks.names import CacheFilter, HookNameError, is_pattern, listed, matching
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid


def hooks_to_keep(model: HookedHybrid, names_filter: CacheFilter) -> list[str]:
    """Return the hook points to harvest, in the order of the model.

    Args:
        model: whose hook points.
        names_filter: names in any spelling ("blocks.*.hook_resid_post", ("resid_post", 2)), one or
            several, a predicate, or True for every point that is not large. Of patterns, predicates
            and True, only points with a row for each token count.

    Raises:
        HookNameError: a name or a pattern that matches nothing.
        ValueError: a named point without a row for each token: scores and patterns.
    """
    has_rows = [n for n, point in model.hook_dict.items() if point.axes[:2] == ("batch", "pos")]
    if callable(names_filter):
        return matching(names_filter, has_rows)
    if names_filter is None:
        raise ValueError(
            "names_filter=None: give the hook points to keep, such as 'blocks.*.hook_z'"
        )
    if names_filter is True:
        return [name for name in has_rows if not model.hook_dict[name].is_large]
    found: set[str] = set()
    for name in listed(names_filter):
        try:
            found |= set(matching(name, has_rows if is_pattern(name) else model.hook_dict))
        except HookNameError as error:
            if not is_pattern(name):
                raise
            said = str(error).replace("no hook point", "no hook point with a row for each token")
            raise HookNameError(said) from None
    if wrong := [name for name in found if name not in has_rows]:
        axes = " ".join(model.hook_dict[wrong[0]].axes)
        raise ValueError(f"{wrong[0]} has axes [{axes}], no row for each token: name other points")
    return matching(sorted(found), has_rows)


class Runner:
    """Forwards that end after the last layer needed, and keep the values of some hook points.

    Args:
        model: to run.
        names: hook points to keep.
        dtype: in which floating-point values are written.
        interventions: hooks attached during the forwards; the value after them is kept.
    """

    def __init__(
        self,
        model: HookedHybrid,
        names: Sequence[str],
        dtype: torch.dtype,
        interventions: Sequence[HookSpec] = (),
    ) -> None:
        self.model, self.names, self.dtype = model, list(names), dtype
        self.interventions = list(interventions)
        layers = [_layers_before(model.hook_dict[name], model.cfg.n_layers) for name in names]
        self.n_layers = max(layers)
        self.logits_to_keep = None if "unembed.hook_logits" in names else 1

    @cached_property
    def shapes(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Return each point's shape after the token axis, and the dtype in which it is written.

        Runs the model on one token, without the interventions.
        """
        found = {}

        @watcher
        def look(value: Tensor, hook: HookPoint) -> None:
            found[str(hook.name)] = (tuple(value.shape[2:]), self._written(value.dtype))

        token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
        with torch.no_grad(), self.model.hooks([(self.names, look)]):
            self._forward(token, torch.ones_like(token))
        return {name: found[name] for name in self.names}

    def run(self, batch: PackedBatch, into: Mapping[str, Tensor]) -> None:
        """Run a batch and copy its rows into the tensors of the shard.

        Args:
            batch: contexts that run together.
            into: tensors of the whole shard by hook name, [token ...].

        Raises:
            ValueError: a value is not finite, as computed or in the dtype in which it is written.
        """
        device = self.model.device
        source = batch.is_kept.flatten().nonzero()[:, 0]

        @watcher
        def keep(value: Tensor, hook: HookPoint) -> None:
            rows = value.detach().flatten(0, 1).index_select(0, source.to(value.device))
            written = rows.to(self._written(value.dtype))
            if written.is_floating_point() and not bool(written.isfinite().all()):
                raise ValueError(_not_finite(str(hook.name), rows, written, batch.documents))
            into[str(hook.name)].index_copy_(0, batch.rows, written.cpu())

        read = torch.ones_like(batch.is_token) if self._ignores_padding() else batch.is_token
        mask = read.long().to(device)
        with torch.no_grad(), self.model.hooks([*self.interventions, (self.names, keep)]):
            self._forward(batch.tokens.to(device), mask)

    def _forward(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch pos"]) -> None:
        if self.n_layers <= self.model.cfg.n_layers:
            self.model(tokens, None, attention_mask=mask, stop_at_layer=self.n_layers)
        else:
            self.model(tokens, attention_mask=mask, logits_to_keep=self.logits_to_keep)

    def _ignores_padding(self) -> bool:
        """Whether all hooks act on each position separately: then right padding has no effect."""
        attached = [handle.hook for handle in self.model.attached()]
        return all(is_per_position(fn) for fn in (*attached, *(fn for _, fn in self.interventions)))

    def _written(self, dtype: torch.dtype) -> torch.dtype:
        return self.dtype if dtype.is_floating_point else dtype


class ShardMaker:
    """Makes any shard of a harvest by its number, in this or another process.

    Args:
        runner, plan: the forwards, and their contexts.
        folder: of the harvest.
        recipe: its hash, for the shards' headers.
    """

    def __init__(self, runner: Runner, plan: PackingPlan, folder: Path, recipe: str) -> None:
        self.runner, self.plan, self.folder, self.recipe = runner, plan, folder, recipe
        self.shapes = runner.shapes

    def make(self, shard: int, done: Callable[[int], Any] = lambda _: None) -> Header:
        """Write a shard and return its header; the same number gives the same bytes.

        Args:
            shard: its number.
            done: called after each batch with its number of rows.

        Raises:
            ValueError: a value that is not finite.
            OSError: the disk is full, or the file cannot be written.
        """
        n_rows = self.plan.n_rows(shard)
        tensors = {
            name: torch.empty(n_rows, *shape, dtype=dtype)
            for name, (shape, dtype) in self.shapes.items()
        }
        for batch in self.plan.batches(shard):
            self.runner.run(batch, tensors)
            done(len(batch.rows))
        path = self.folder / shard_name(shard, self.plan.n_shards)
        return write_shard(path, tensors, asdict(self.plan.beside(shard)), self.recipe, shard)


def _layers_before(point: HookPoint, n_layers: int) -> int:
    """Return how many blocks must run for a point; `n_layers + 1` if the read-out must run."""
    name = str(point.name)
    if name.startswith("blocks."):
        return point.layer() + 1
    return 0 if name == "hook_embed" else n_layers + 1


def _not_finite(name: str, rows: Tensor, written: Tensor, documents: Tensor) -> str:
    first = int(written.flatten(1).isfinite().all(1).logical_not().nonzero()[0])
    where = f"{name} has values in document {int(documents[first])}"
    if not bool(rows.isfinite().all()):
        return f"{where} that are not finite: check the model and the interventions"
    return (
        f"{where} up to {float(rows.abs().max()):.3g}, too large for {written.dtype}: write "
        "float32 or bfloat16"
    )


def bytes_of_row(shapes: Mapping[str, tuple[tuple[int, ...], torch.dtype]]) -> int:
    """Return the bytes of one token in a shard, with its columns."""
    beside = 3 * torch.int32.itemsize
    return beside + sum(torch.Size(s).numel() * dtype.itemsize for s, dtype in shapes.values())
