"""Ablation of the mixers of one kind, and the layers that have them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.slicing import whole_numbers
from hooked_hybrid.interventions.ablation import (
    DonorMask,
    ablate_layers,
    check_method,
    replace_writes,
)
from hooked_hybrid.interventions.patching import Cache
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.network.mixers import MIXERS, mixer_of


@picklable
def ablate_mixers(
    cfg: HybridConfig,
    kind: str,
    layers: int | Iterable[int] | None = None,
    method: Literal["zero", "mean"] = "zero",
    values: Cache | None = None,
    *,
    attention_mask: DonorMask | None = None,
) -> list[HookSpec]:
    """Replace the output of the mixers of one kind, but not of mixers beside them.

    In a layer with one mixer this is `ablate_layers`, at `hook_mixer_out`; in a layer with several
    it is at the hook on that mixer's own write (`hook_attn_out`, `hook_ssm_out`).

    Args:
        cfg: of the model.
        kind: "attention", "recurrence" for recurrences of every kind, or as in `layers_of`.
        layers: those of the kind to replace; None means all.
        method, values, attention_mask: as in `ablate_layers`.

    Raises:
        ValueError: an unknown kind, a layer without it, or as in `ablate_layers`.

    Examples:
        >>> hooks = interventions.ablate_mixers(model.cfg, "rglru", layers=[0, 1])
        >>> hooks[0][0]
        ['blocks.0.hook_mixer_out', 'blocks.1.hook_mixer_out']
    """
    there = _points_of_mixers(cfg, kind)
    chosen = tuple(there) if layers is None else whole_numbers(layers, "layers")
    if missing := [i for i in chosen if i not in there] or not there:
        raise ValueError(f"kind={kind!r}: layers {missing} have none; {tuple(there)} have")
    alone = [i for i in chosen if there[i].endswith("hook_mixer_out")]
    hooks: list[HookSpec] = []
    if alone:
        hooks += ablate_layers(alone, "mixer", method, values, attention_mask=attention_mask)
    check_method(method, values, None, attention_mask)
    names = {i: there[i] for i in chosen if i not in alone}
    return [*hooks, *(replace_writes(names, values, attention_mask) if names else [])]


def _points_of_mixers(cfg: HybridConfig, kind: str) -> dict[int, str]:
    """Return the hook point on the write of the mixer of a kind, by layer."""
    is_known = kind == "recurrence" or kind in [mixer.kind for mixer in MIXERS.values()]
    if not is_known:
        layers_of(cfg, kind)  # which says what there is
    found = {}
    for i, layer in enumerate(cfg.layers):
        for of in layer.mixers:
            if of.is_recurrence if kind == "recurrence" else mixer_of(of).kind == kind:
                leaf = mixer_of(of).write_hook if len(layer.mixers) > 1 else "hook_mixer_out"
                found[i] = f"blocks.{i}.{leaf}"
    return found


def layers_of(cfg: HybridConfig, kind: str) -> tuple[int, ...]:
    """Return the indices of the layers that have a mixer of a kind; there may be none.

    Args:
        cfg: of the model.
        kind: "attention", "rglru", "mamba", or the `kind` of another class of mixers.

    Raises:
        ValueError: an unknown kind.

    Examples:
        >>> interventions.layers_of(model.cfg, "attention")
        (2, 5)
        >>> interventions.layers_of(jamba.cfg, "mamba")
        (0, 1, 3)
    """
    kinds = [mixer.kind for mixer in MIXERS.values()]
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: give one of {', '.join(kinds)}")
    return tuple(
        i
        for i, layer in enumerate(cfg.layers)
        if any(mixer_of(mixer).kind == kind for mixer in layer.mixers)
    )
