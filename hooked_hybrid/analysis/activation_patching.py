"""Activation patching in sweeps: one clean value at a time in a corrupted run.

`generic_activation_patch` makes one run for each selected hook point, position and head; the other
functions are its common uses. An error names values missing from the caches: large ones, such as
Mamba's states, are cached only when named.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm.auto import tqdm

from hooked_hybrid.analysis.metrics import Metric, measure
from hooked_hybrid.analysis.patch_grid import PatchGrid
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.names import NameFilter, Shorthand, matching, names_in_layers
from hooked_hybrid.hooks.slicing import Indices, whole_numbers
from hooked_hybrid.interventions.patching import patch
from hooked_hybrid.interventions.places import Positions, at_positions, read_positions
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.model.text_model import check_batch
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.shapes import Logits, Tokens

Axis = Literal["pos", "head"]
Cache = Mapping[Any, Tensor]


@torch.no_grad()
def generic_activation_patch(
    model: HookedHybrid,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: Metric,
    names: NameFilter,
    axes: Sequence[Axis] = (),
    *,
    positions: Positions | None = None,
    heads: Indices | None = None,
    attention_mask: Tensor | None = None,
    clean_attention_mask: Tensor | None = None,
    difference: bool = True,
    verbose: bool = True,
) -> PatchGrid:
    """Return the metric of corrupted runs, each with one clean value patched in.

    Values are matched by their position in the document. Each run starts at the layer of its patch.

    Args:
        model: any hybrid.
        corrupted_tokens: the tokens to run.
        clean_cache: of the clean run, with the values of `names`; equally many rows, or one for
            all.
        metric: of the logits; [] or [batch].
        names: hook points in any spelling ("blocks.2.attn.hook_z", ("z", 2),
            "blocks.*.attn.hook_z"), or a predicate; each is a cell, or several with `axes`.
        axes: also sweep over "pos", over "head" (key-value heads at keys and values), or both, in
            this order.
        positions: in the document: those to sweep over, or to patch together; the latter may be a
            mask [batch pos] if rows differ. None means all.
        heads: the same.
        attention_mask, clean_attention_mask: of the two runs, if rows are padded. A clean cache
            has its own; for other mappings the clean mask defaults to the corrupted one.
        difference: subtract the metric of the corrupted run.
        verbose: show a progress bar.

    Raises:
        HookNameError: a name that does not exist.
        ValueError: a value that the cache lacks; heads that a hook point does not have; hook points
            with different numbers of heads; an unknown axis.

    Source: Meng et al. 2022 (denoising); `generic_activation_patch` of TransformerLens's
    `patching`. Unlike there, the metric may return one value for each row, and cells are
    differences from the corrupted run unless `difference=False`.

    Examples:
        >>> grid = analysis.generic_activation_patch(
        ...     model, riga, cache, metric, "blocks.*.hook_attn_out", positions=[15], verbose=False
        ... )
        >>> grid.labels
        (('blocks.2.hook_attn_out', 'blocks.5.hook_attn_out'),)
    """
    cells = PatchedRuns(model, corrupted_tokens, clean_cache, names, attention_mask)
    labels = [_labels(cells, axis, positions, heads) for axis in _checked_axes(axes)]
    donor_mask = clean_attention_mask
    if donor_mask is None and not getattr(clean_cache, "places", None):
        donor_mask = cells.mask
    found = []
    bar = tqdm(
        itertools.product(cells.names, *labels),
        "activation patching",
        total=len(cells.names) * torch.Size(map(len, labels)).numel(),
        unit="run",
        disable=not verbose,
    )
    for name, *index in bar:
        at = {"pos": positions, "head": heads} | dict(zip(axes, index, strict=True))
        hooks = patch(
            clean_cache, name, positions=at["pos"], heads=at["head"], attention_mask=donor_mask
        )
        found.append(measure(metric, cells.run(name, hooks)))
    values = torch.stack(found).unflatten(0, [len(cells.names), *map(len, labels)])
    if difference:
        values = values - measure(metric, cells.corrupted)
    rows = [tuple(range(len(cells.tokens)))] * (values.ndim - 1 - len(axes))
    names_of_axes = ("name", *axes, *["batch"] * len(rows))
    return PatchGrid(values, names_of_axes, (tuple(cells.names), *labels, *rows))


def patch_layers(
    model: HookedHybrid,
    corrupted_tokens: Tokens,
    clean_cache: Cache,
    metric: Metric,
    leaf: Shorthand,
    axes: Sequence[Axis] = ("pos",),
    **options: Any,
) -> PatchGrid:
    """Return `generic_activation_patch` of one hook of every layer that has it, by layer.

    Args:
        model, corrupted_tokens, clean_cache, metric, axes, options: as there.
        leaf: what follows `hook_`: "resid_pre", "q", "ssm_state", "gated", ...; or names of at most
            one point in each layer, in any spelling: ("q", 2), "blocks.*.attn.hook_q".

    Raises:
        ValueError, HookNameError: as there; also a leaf that no layer has, and names of several
            points in a layer.

    Examples:
        >>> grid = analysis.patch_layers(
        ...     model, riga, cache, metric, "gated", positions=[7, 15], verbose=False
        ... )
        >>> grid.labels
        ((0, 1, 3, 4), (7, 15))
    """
    names = names_in_layers(leaf, model.hook_dict)
    grid = generic_activation_patch(
        model, corrupted_tokens, clean_cache, metric, names, axes, **options
    )
    layers = tuple(model.hook_dict[name].layer() for name in grid.labels[0])
    return PatchGrid(grid.values, ("layer", *grid.axes[1:]), (layers, *grid.labels[1:]))


def patch_resid_pre(
    model: HookedHybrid, tokens: Tokens, clean_cache: Cache, metric: Metric, **options: Any
) -> PatchGrid:
    """Return the effect of the clean stream before each layer, [layer pos]; see `patch_layers`.

    Examples:
        >>> how = {"positions": [7, 8], "verbose": False}
        >>> grid = analysis.patch_resid_pre(model, riga, cache, metric, **how)
        >>> grid.values[0].argmax().item()  # before layer 0, the word that differs counts
        0
    """
    return patch_layers(model, tokens, clean_cache, metric, "resid_pre", **options)


def patch_mixer_out(
    model: HookedHybrid, tokens: Tokens, clean_cache: Cache, metric: Metric, **options: Any
) -> PatchGrid:
    """Return the effect of each clean mixer output, [layer pos]; see `patch_layers`.

    Examples:
        >>> how = {"positions": [7], "verbose": False}
        >>> analysis.patch_mixer_out(model, riga, cache, metric, **how).values.shape
        torch.Size([6, 1])
    """
    return patch_layers(model, tokens, clean_cache, metric, "mixer_out", **options)


def patch_mlp_out(
    model: HookedHybrid, tokens: Tokens, clean_cache: Cache, metric: Metric, **options: Any
) -> PatchGrid:
    """Return the effect of each clean MLP output, [layer pos]; see `patch_layers`.

    Examples:
        >>> how = {"positions": [7], "verbose": False}
        >>> analysis.patch_mlp_out(model, riga, cache, metric, **how).values.shape
        torch.Size([6, 1])
    """
    return patch_layers(model, tokens, clean_cache, metric, "mlp_out", **options)


def patch_heads(
    model: HookedHybrid,
    tokens: Tokens,
    clean_cache: Cache,
    metric: Metric,
    leaf: Shorthand = "z",
    by_position: bool = False,
    **options: Any,
) -> PatchGrid:
    """Return the effect of each clean head, [layer head] of the attention layers, or by position.

    Args:
        model, tokens, clean_cache, metric, options: as in `patch_layers`.
        leaf: "z", "q", "k", "v", "pattern", ..., or names as in `patch_layers`.
        by_position: patch each position separately, [layer head pos].

    Raises:
        ValueError, HookNameError: as `patch_layers`.

    Examples:
        >>> analysis.patch_heads(model, riga, cache, metric, verbose=False).values.shape
        torch.Size([2, 8])
    """
    axes: tuple[Axis, ...] = ("head", "pos") if by_position else ("head",)
    return patch_layers(model, tokens, clean_cache, metric, leaf, axes, **options)


def patch_states(
    model: HookedHybrid, tokens: Tokens, clean_cache: Cache, metric: Metric, **options: Any
) -> PatchGrid:
    """Return the effect of each recurrent layer's clean state, [layer pos]; see `patch_layers`.

    The state is replaced at one position and then continued with the corrupted run's decays and
    writes: the effect at position t is that of everything in the state about positions up to t.
    Cache the states with `names_filter=lambda name: name.endswith("hook_ssm_state")`.

    Examples:
        >>> grid = analysis.patch_states(model, riga, cache, metric, positions=[7], verbose=False)
        >>> grid.labels
        ((0, 1, 3, 4), (7,))
    """
    return patch_layers(model, tokens, clean_cache, metric, "ssm_state", **options)


# --- inside -------------------------------------------------------------------------------------


class PatchedRuns:
    """The corrupted run, and runs that start at the first layer that a patch changes."""

    def __init__(
        self,
        model: HookedHybrid,
        tokens: Tokens,
        cache: Cache,
        names: NameFilter,
        mask: Tensor | None,
    ) -> None:
        self.model = model
        self.tokens, self.mask = check_batch(model, tokens, mask)
        self.names = matching(names, model.hook_dict)
        if missing := [name for name in self.names if name not in cache]:
            raise ValueError(
                f"the clean cache lacks {', '.join(missing[:3])} ({len(missing)} in all): make it "
                "with run_with_cache(clean_tokens, names_filter=...)"
            )
        self.n_pos = int(lay_out(self.tokens, None, self.mask, None).pos.max()) + 1
        self.corrupted, self.streams = model.run_with_cache(
            self.tokens,
            names_filter=lambda name: name.endswith(("hook_embed", "hook_resid_post")),
            attention_mask=self.mask,
        )

    def run(self, name: str, hooks: list[HookSpec]) -> Logits:
        """Return the logits of the corrupted run with hooks on one point."""
        layer = self._first_layer(name)
        with self.model.hooks(hooks):
            if layer is None:
                return self.model(self.tokens, attention_mask=self.mask)
            before = f"blocks.{layer - 1}.hook_resid_post" if layer else "hook_embed"
            stream = self.streams[before]
            return self.model(stream, start_at_layer=layer, attention_mask=self.mask)

    def n_heads(self) -> int:
        """Return the common number of heads of the points."""
        numbers = {}
        for name in self.names:
            point = self.model.hook_dict[name]
            axis = next((a for a in ("head", "kv_head") if a in point.axes), None)
            if axis is None:
                raise ValueError(f"{name!r} has axes {point.axes}, none of them heads")
            cfg = self.model.blocks[point.layer()].attn.cfg
            numbers[name] = cfg.n_heads if axis == "head" else cfg.n_kv_heads
        if len(set(numbers.values())) > 1:
            raise ValueError(f"numbers of heads differ, {numbers}: give heads=, or fewer names")
        return next(iter(numbers.values()))

    def _first_layer(self, name: str) -> int | None:
        """Return the layer of a point; None before the first, the last one after it."""
        if name.startswith("blocks."):
            return self.model.hook_dict[name].layer()
        return None if name == "hook_embed" else len(self.model.blocks) - 1


def _checked_axes(axes: Sequence[Axis]) -> Sequence[Axis]:
    if set(axes) - {"pos", "head"} or len(set(axes)) < len(axes):
        raise ValueError(f"axes {tuple(axes)}: give 'pos', 'head', both or none")
    return axes


def _labels(
    cells: PatchedRuns,
    axis: Axis,
    positions: Positions | None,
    heads: Indices | None,
) -> tuple[int, ...]:
    """Return the entries of an axis that is swept over."""
    if axis == "head":
        return tuple(range(cells.n_heads())) if heads is None else whole_numbers(heads, "heads")
    every = torch.arange(cells.n_pos)[None]
    chosen = read_positions(positions)
    if isinstance(chosen, tuple):
        return chosen
    if isinstance(chosen, Tensor) and chosen.ndim > 1:
        raise ValueError("positions that are swept over are the same in every row: give [pos]")
    return tuple(every[at_positions(every, chosen)].tolist())
