"""How far back layers reach: a window of keys, and a boundary that nothing crosses."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from hooked_hybrid.config import AttentionConfig, HybridConfig, MixerConfig
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.names import NameFilter
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import whole_numbers
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.rows import PerRow, entries_of_rows, read_per_row
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.shapes import Pattern


@picklable
def limit_window(n_keys: int, *, layers: int | Iterable[int] | None = None) -> list[HookSpec]:
    """Hide all but the last `n_keys` keys from each query, as a window of the architecture does.

    A hook can hide a key but not bring one back: to have a window in one stage alone, load the
    model without any and give these as `prefill_hooks` or `generation_hooks`:

        model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None)
        model.generate(tokens, generation_hooks=limit_window(256))  # prefill sees everything

    With them in both stages that model is the one whose config has the window, up to rounding.

    Args:
        n_keys: keys a query may still see, itself included; where the model's own window is
            narrower, that one holds.
        layers: attention layers; None means all.

    Returns:
        A hook on `hook_attn_scores` [batch head query key]: scores of keys further back are minus
        infinity.

    Raises:
        ValueError: `n_keys` below 1 or a fraction; a layer that is not a whole number from 0 on.
        HookNameError: when attached, a layer without attention.
    """
    try:
        is_window = not isinstance(n_keys, bool) and operator.index(n_keys) >= 1
    except TypeError:
        is_window = False
    if not is_window:
        raise ValueError(
            f"n_keys={n_keys!r}: give a whole number from 1, as a token sees at least itself"
        )

    @per_position
    def hide(scores: Pattern, hook: HookPoint) -> Pattern:
        run = hook.run
        assert run.key_pos is not None
        gone = run.query_pos[:, :, None] - run.key_pos[:, None, :] >= n_keys
        return scores.masked_fill(gone[:, None], -torch.inf)

    where: NameFilter = lambda name: name.endswith(".attn.hook_attn_scores")  # noqa: E731
    if layers is not None:
        where = [f"blocks.{i}.attn.hook_attn_scores" for i in whole_numbers(layers, "layers")]
    return [(where, hide)]


@picklable
def knock_out_crossings(
    cfg: HybridConfig,
    boundary: PerRow,
    *,
    layers: int | Iterable[int] | None = None,
) -> list[HookSpec]:
    """Let layers begin anew at a boundary: nothing before it reaches a later token through them.

    In attention all edges across the boundary are cut (the keys left share the weight); a
    recurrence forgets its state there, and its convolution reads nothing of the tokens before. In
    every layer, the tokens from the boundary on give the logits that they give as a sequence of
    their own. In some layers, what is known of earlier tokens later has come through the others,
    by whatever detours: unlike edges cut from one token, a boundary has no way around it.

    The price is paid by the `d_conv - 1` tokens before the boundary, whose convolutions read
    nothing of them either: put it where these do not matter.

    Args:
        cfg: of the model, for the lengths of its convolutions.
        boundary: first position after it, in the document, counted from 0; one for all rows or one
            for each row of the batch.
        layers: that begin anew; None means all.

    Returns:
        Hooks: on `hook_attn_scores` of attention; of a recurrence on `hook_in_proj`, and on
        `hook_log_decay` (RG-LRU) or `hook_ssm_decay` (Mamba).

    Raises:
        ValueError: a boundary that is not a whole number from 0 on; a layer that the model does not
            have; when run, boundaries for another number of rows.
    """
    first = read_per_row(boundary, "boundary")
    chosen = tuple(range(cfg.n_layers)) if layers is None else whole_numbers(layers, "layers")
    if max(chosen) >= cfg.n_layers:
        raise ValueError(f"layers {chosen}: the model has {cfg.n_layers}, from 0")

    @per_position
    def cut_edges(scores: Pattern, hook: HookPoint) -> Pattern:
        run, at = hook.run, _of_rows(first, hook)
        assert run.key_pos is not None
        crosses = (run.query_pos >= at)[:, :, None] & (run.key_pos < at)[:, None, :]
        return scores.masked_fill(crosses[:, None], -torch.inf)

    hooks: list[HookSpec] = []
    for layer in chosen:
        for mixer in cfg.layers[layer].mixers:
            if isinstance(mixer, AttentionConfig):
                hooks.append((f"blocks.{layer}.attn.hook_attn_scores", cut_edges))
            else:
                hooks += _recurrence_begins(layer, mixer, first)
    return hooks


def _recurrence_begins(
    layer: int, cfg: MixerConfig, first: Int[Tensor, "*batch"]
) -> list[HookSpec]:
    """Return hooks that part a recurrence and its convolution at a position."""
    mixer = mixer_of(cfg)
    path, n_taps, forgets = f"blocks.{layer}.{mixer.path}", mixer.n_taps(cfg), dict(mixer.forgets)

    @per_position
    def hide_from_convolution(x: Tensor, hook: HookPoint) -> Tensor:
        before = _of_rows(first, hook) - hook.run.query_pos
        return x.masked_fill(((before > 0) & (before < n_taps))[..., None], 0)

    @per_position
    def forget(decay: Tensor, hook: HookPoint) -> Tensor:
        here: Bool[Tensor, "batch pos"] = hook.run.query_pos == _of_rows(first, hook)
        nothing = forgets[str(hook.name).rpartition(".")[2]]
        return decay.masked_fill(here.view(*here.shape, *(1,) * (decay.ndim - 2)), nothing)

    hooks: list[HookSpec] = [([f"{path}.{leaf}" for leaf in forgets], forget)]
    if n_taps > 1:
        hooks.insert(0, (f"{path}.hook_in_proj", hide_from_convolution))
    return hooks


def _of_rows(first: Int[Tensor, "*batch"], hook: HookPoint) -> Int[Tensor, "#batch 1"]:
    """Return the boundary of each row of this forward, as a column."""
    if first.ndim == 0:
        return first.view(1, 1).to(hook.run.rows.device)
    return entries_of_rows(first, hook, "boundary")[:, None]
