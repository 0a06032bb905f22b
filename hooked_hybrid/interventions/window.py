"""Limiting how far back layers read: a window of keys, and a boundary."""

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
    """Mask all keys except the last `n_keys` of each query, like a window of the architecture.

    A hook can mask a key but not restore one. For a window in only one stage, load the model
    without a window and pass these as `prefill_hooks` or `generation_hooks`:

        model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None)
        model.generate(tokens, generation_hooks=limit_window(256))  # prefill sees everything

    In both stages, the result is that of a config with this window, up to rounding.

    Args:
        n_keys: keys that a query may see, itself included; a narrower window of the model is not
            widened.
        layers: attention layers; None means all.

    Returns:
        A hook on `hook_attn_scores` [batch head query key]: scores of earlier keys are minus
        infinity.

    Raises:
        ValueError: `n_keys` below 1 or a fraction; a layer that is not a whole number from 0 on.
        HookNameError: when attached, a layer without attention.

    Examples:
        >>> hooks = interventions.limit_window(8)
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, narrow = model.run_with_cache(tokens)
        >>> (narrow["pattern", 2][0, 0, 15] > 0).sum().item()
        8
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
    """Restart layers at a boundary: through them, no earlier token affects a later one.

    In attention all edges across the boundary are cut (the remaining keys share the weight); a
    recurrence forgets its state there, and its convolution reads no earlier token. If all layers
    are restarted, the tokens from the boundary on have the logits of a separate sequence. If only
    some are, information on earlier tokens can reach later ones only through the other layers.
    Unlike edges cut from one token, a boundary cannot be bypassed within a layer.

    A side effect: the convolution inputs of the last `d_conv - 1` tokens before the boundary are 0
    for these tokens themselves, too. Choose a boundary where this does not matter.

    Args:
        cfg: of the model, for the lengths of its convolutions.
        boundary: first position after it, in the document, counted from 0; one for all rows or one
            for each row of the batch.
        layers: the layers to restart; None means all.

    Returns:
        Hooks: on `hook_attn_scores` of attention; of a recurrence on `hook_in_proj`, and on
        `hook_log_decay` (RG-LRU) or `hook_ssm_decay` (Mamba).

    Raises:
        ValueError: a boundary that is not a whole number from 0 on; a layer that the model does not
            have; when run, boundaries for another number of rows.

    Examples:
        >>> hooks = interventions.knock_out_crossings(model.cfg, 10)
        >>> restarted = model.run_with_hooks(tokens, fwd_hooks=hooks)[:, 10:]
        >>> alone = model(tokens[:, 10:])
        >>> torch.allclose(restarted, alone, atol=1e-3)
        True
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
    """Return hooks that cut a recurrence and its convolution at a position."""
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
