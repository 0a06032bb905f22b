"""Ablation: removing the outputs of heads and layers, or replacing them by less informative ones.

A set of heads is `{layer: [heads]}` or pairs `[(layer, head), ...]`, counted from 0; sets that
differ between rows are `{layer: mask [batch head]}`, see `masks_of_rows`. A set has the same effect
in a plain forward, in pieces of a prefill, in cached steps and with padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import cache, partial
from typing import Any, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.places import Places
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import whole_numbers
from hooked_hybrid.interventions.donors import Donor, mask_of, read_kept
from hooked_hybrid.interventions.patching import Cache
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.places import index_of_rows
from hooked_hybrid.interventions.sets_of_heads import Heads, by_layer, flags
from hooked_hybrid.shapes import Resid

Method = Literal["zero", "mean", "resample", "norm"]
DonorMask = Int[Tensor, "donor_batch donor_pos"]
HeadMask = Bool[Tensor, "#row 1 head 1"]
PerHead = Float[Tensor, "row pos head width"]
Edit = Callable[[Tensor, Tensor, HookPoint], Tensor]


@picklable
def ablate_heads(
    heads: Heads,
    method: Method = "zero",
    values: Cache | None = None,
    *,
    seed: int | None = None,
    attention_mask: DonorMask | None = None,
) -> list[HookSpec]:
    """Replace the outputs of these heads at every position by less informative values.

    - "zero": z = 0.
    - "mean": z is the head's mean over all tokens of a reference run, at every position.
    - "resample": z is that of another run at the same position of the document. With a `seed` the
      rows of that run are first permuted in one random cycle, so that each row gets another's:
      with the batch's own cache this shuffles the batch. (A shuffle inside the forward would
      need all rows at the same position, which generation and padding do not guarantee.)
    - "norm": z = 0, and the outputs of the other heads of the layer are scaled, at each position,
      so that the sum over heads, before the output bias, keeps its Euclidean norm (not its
      direction). If no output is left, it stays 0.

    Args:
        heads: `{layer: [heads]}`, pairs (layer, head), or `{layer: mask [batch head]}`.
        method: as above.
        values: "mean" and "resample": z of another run [batch pos head d_head], as an
            `ActivationCache`, a mapping from full names, or from layers; "mean" also takes means
            [head d_head].
        seed: "resample": of the permutation of the rows of `values`; None does not permute them.
        attention_mask: of the run of `values`, if its rows are padded and `values` is not a cache,
            which has its own.

    Returns:
        Hooks on `hook_z` of these layers ("norm": on `hook_result`, after every edit of z).

    Raises:
        ValueError: a layer or head that is not a whole number from 0 on; an unknown method, or
            missing or superfluous arguments; when first run, a head that the layer does not have,
            or a mask or `values` that do not fit the layer or the batch.
        HookNameError: when attached, a layer without attention (`check_heads` lists the others).

    Source: Wang et al. 2022 (IOI) for mean ablation, there at each position of a template; Chan et
    al. 2022 (causal scrubbing) for resampling. "norm" is ours.

    Examples:
        >>> hooks = interventions.ablate_heads({2: [0], 5: [3, 4]}, "mean", cache)
        >>> hooks[0][0]
        ['blocks.2.attn.hook_z', 'blocks.5.attn.hook_z']
        >>> model.run_with_hooks(tokens, fwd_hooks=hooks).shape
        torch.Size([1, 16, 583])
    """
    chosen, edit = by_layer(heads), _edit_of_heads(method, values, seed, attention_mask)
    if values is not None:
        for layer in chosen:  # raise errors now, not in the first run
            _of_layer(values, layer, _point(layer))

    @per_position
    def replace(z: PerHead, hook: HookPoint) -> PerHead:
        return edit(z, _mask(chosen[hook.layer()], z.shape[2], hook), hook)

    return [([_point(layer, method) for layer in chosen], replace)] if chosen else []


def cut_heads(heads: Heads) -> list[HookSpec]:
    """Zero the outputs of these heads: `ablate_heads` with "zero".

    Examples:
        >>> hooks = interventions.cut_heads({2: range(8), 5: range(8)})
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
        >>> (hooked[0, -1].argmax() == answer).item()
        False
    """
    return ablate_heads(heads)


@picklable
def keep_heads(
    heads: Heads,
    method: Method = "zero",
    values: Cache | None = None,
    *,
    seed: int | None = None,
    attention_mask: DonorMask | None = None,
) -> list[HookSpec]:
    """Ablate all other heads, including those of attention layers that are not named.

    Args:
        heads: the set to keep; an empty one ablates all attention (output biases are kept).
        method, values, seed, attention_mask: as in `ablate_heads`.

    Returns:
        Hooks on `hook_z` of every attention layer ("norm": on `hook_result`).

    Raises:
        ValueError, HookNameError: as `ablate_heads`.

    Examples:
        >>> hooks = interventions.keep_heads({2: range(8), 5: [0]})
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, kept = model.run_with_cache(tokens)
        >>> (kept["z", 5][0, -1] != 0).any(-1).sum().item()  # heads of layer 5 that were kept
        1
    """
    chosen, edit = by_layer(heads), _edit_of_heads(method, values, seed, attention_mask)

    @per_position
    def replace_the_others(z: PerHead, hook: HookPoint) -> PerHead:
        return edit(z, ~_mask(chosen[hook.layer()], z.shape[2], hook), hook)

    @per_position
    def replace_all(z: PerHead, hook: HookPoint) -> PerHead | None:
        return None if hook.layer() in chosen else edit(z, ~_mask((), z.shape[2], hook), hook)

    # By name too: a predicate would ignore a named layer without heads.
    leaf = _point(0, method).removeprefix("blocks.0")
    named: list[HookSpec] = [([_point(i, method) for i in chosen], replace_the_others)]
    return [*(named if chosen else []), (lambda name: name.endswith(leaf), replace_all)]


@picklable
def ablate_layers(
    layers: int | Iterable[int],
    kind: Literal["mixer", "mlp"] = "mixer",
    method: Literal["zero", "mean"] = "zero",
    values: Cache | None = None,
    *,
    attention_mask: DonorMask | None = None,
) -> list[HookSpec]:
    """Replace the output of a mixer or an MLP, including the output bias.

    Args:
        layers: `layers_of(cfg, "mamba")`, say.
        kind: "mixer" (attention or recurrence, at `hook_mixer_out`) or "mlp" (`hook_mlp_out`).
        method: "zero", or "mean" over all tokens of a reference run.
        values: "mean": outputs of the layers in another run [batch pos d_model], as an
            `ActivationCache`, a mapping from full names, or from layers; or means [d_model].
        attention_mask: of the run of `values`, where its rows are padded and they are given by
            hand; a cache holds its own.

    Raises:
        ValueError: no layer, or one that is not a whole number from 0 on; an unknown kind or
            method; missing or superfluous arguments; when first run, a mean of another width.
        HookNameError: when attached, a layer that does not exist.

    Examples:
        >>> hooks = interventions.ablate_layers([2, 5])  # both attention layers
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
        >>> (hooked[0, -1].argmax() == answer).item()
        False
    """
    if kind not in ("mixer", "mlp") or method not in ("zero", "mean"):
        raise ValueError(
            f"kind={kind!r}, method={method!r}: give 'mixer' or 'mlp', and 'zero' or 'mean'"
        )
    check_method(method, values, None, attention_mask)
    names = {i: f"blocks.{i}.hook_{kind}_out" for i in whole_numbers(layers, "layers")}
    return replace_writes(names, values, attention_mask)


def replace_writes(
    names: dict[int, str], values: Cache | None, attention_mask: DonorMask | None
) -> list[HookSpec]:
    """Return hooks that replace the values of one point of each layer by zeros or means."""
    means: dict[int, Tensor] = {}
    if values is not None:
        means = {i: _mean(*_of_layer(values, i, n), 1, attention_mask) for i, n in names.items()}

    @per_position
    def replace(out: Resid, hook: HookPoint) -> Resid:
        return _filled(means[hook.layer()], out, hook) if means else torch.zeros_like(out)

    return [(list(names.values()), replace)]


def mean_over_tokens(
    value: Float[Tensor, "batch pos *rest"], attention_mask: Int[Tensor, "batch pos"] | None = None
) -> Float[Tensor, "*rest"]:
    """Return the mean over rows and positions without padding, summed in fp32 or wider.

    Raises:
        ValueError: a mask of another shape.

    Examples:
        >>> interventions.mean_over_tokens(cache["z", 2]).shape
        torch.Size([8, 16])
    """
    wide = value.to(torch.promote_types(value.dtype, torch.float32))
    if attention_mask is None:
        return wide.mean(dim=(0, 1)).to(value.dtype)
    if attention_mask.shape != value.shape[:2]:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, the values are "
            f"{tuple(value.shape)}"
        )
    return wide[attention_mask.to(value.device) > 0].mean(dim=0).to(value.dtype)


def _edit_of_heads(
    method: Method, values: Cache | None, seed: int | None, attention_mask: Tensor | None
) -> Edit:
    """Return a function of z, the heads to replace in it, and the point."""
    check_method(method, values, seed, attention_mask)
    if method == "norm":
        return _restoring_norm
    if values is None:
        return lambda z, mask, hook: z.masked_fill(mask, 0)  # noqa: ARG005
    given = partial(_of_layer, values)

    @cache
    def mean_of(name: str, layer: int) -> Tensor:
        return _mean(*given(layer, name), 2, attention_mask)

    @cache
    def donor_of(name: str, layer: int) -> Donor:
        return _donor(*given(layer, name), seed, attention_mask)

    def edit(z: Tensor, mask: Tensor, hook: HookPoint) -> Tensor:
        where = str(hook.name), hook.layer()
        if method == "mean":
            return torch.where(mask, _filled(mean_of(*where), z, hook), z)
        wanted = mask.any(dim=2)[..., 0] & (hook.run.query_pos >= 0)
        return torch.where(mask, donor_of(*where).at(z, wanted, hook), z)

    return edit


def _restoring_norm(result: PerHead, mask: HeadMask, hook: HookPoint) -> PerHead:  # noqa: ARG001
    """Return the outputs of heads, some set to 0 and the others scaled to the norm of all."""
    left, wide = result.masked_fill(mask, 0), torch.promote_types(result.dtype, torch.float32)
    before, after = (r.sum(dim=2, dtype=wide).norm(dim=-1) for r in (result, left))
    scale = before / after.where(after > 0, 1)
    return (left.to(wide) * scale[..., None, None]).to(result.dtype)


def check_method(
    method: str, values: Cache | None, seed: int | None, attention_mask: Tensor | None
) -> None:
    """Refuse a method that there is not, and arguments that it does not take or that it lacks."""
    takes_values = {"zero": False, "mean": True, "resample": True, "norm": False}
    if method not in takes_values:
        raise ValueError(f"method={method!r}: give one of {', '.join(takes_values)}")
    if takes_values[method] and values is None:
        raise ValueError(f"method={method!r} needs values, those of another run")
    if not takes_values[method] and (values is not None or attention_mask is not None):
        raise ValueError(f"method={method!r} takes no values and no attention_mask")
    if seed is not None and method != "resample":
        raise ValueError(f"method={method!r} takes no seed")


def _mask(mine: tuple[int, ...] | Tensor, n_heads: int, hook: HookPoint) -> HeadMask:
    """Return True at the chosen heads of each row of this forward."""
    if isinstance(mine, Tensor) and mine.shape[-1] != n_heads:
        raise ValueError(
            f"the mask of layer {hook.layer()} is of {mine.shape[-1]} heads; it has {n_heads} heads"
        )
    if not isinstance(mine, Tensor) and max(mine, default=0) >= n_heads:
        raise ValueError(f"head {max(mine)}: layer {hook.layer()} has {n_heads} heads, from 0")
    mask = flags(mine, n_heads).to(hook.run.rows.device)
    if mask.ndim == 2:
        mask = mask[index_of_rows(mask.shape[0], f"the mask of layer {hook.layer()}", hook)]
    return mask.view(-1, 1, n_heads, 1)


def _of_layer(values: Cache, layer: int, name: str) -> tuple[Tensor, Places | None]:
    """Return the value for a layer, with a batch axis and places if it is from a run."""
    key: Any = layer if layer in values else name
    if key not in values:
        raise ValueError(f"values hold nothing for layer {layer}: give it as {name!r} or {layer}")
    return read_kept(values, key)


def _mean(
    value: Tensor, places: Places | None, n_axes: int, attention_mask: Tensor | None
) -> Tensor:
    """Return the mean of a run's values, or the value if it is a mean of `n_axes` already."""
    if value.ndim == n_axes and attention_mask is None:
        return value
    if value.ndim != n_axes + 2:
        raise ValueError(
            f"values of shape {tuple(value.shape)}: give those of a run, {n_axes + 2} axes, or "
            f"their mean over batch and positions, {n_axes}, without attention_mask"
        )
    return mean_over_tokens(value, mask_of(value, attention_mask, places))


def _filled(mean: Tensor, value: Tensor, hook: HookPoint) -> Tensor:
    if mean.shape != value.shape[2:]:
        raise ValueError(
            f"the mean for {hook.name!r} has shape {tuple(mean.shape)}, not "
            f"{tuple(value.shape[2:])}"
        )
    return mean.to(value).expand_as(value)


def _donor(
    value: Tensor, places: Places | None, seed: int | None, attention_mask: Tensor | None
) -> Donor:
    """Return the donor, with permuted rows if there is a seed."""
    if seed is None:
        return Donor.of(value, attention_mask, places)
    if (n := value.shape[0]) < 2:
        raise ValueError(f"seed={seed}: values of one row cannot change places")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    source = torch.empty_like(order).index_copy(0, order, order.roll(1))
    mask = None if attention_mask is None else attention_mask.cpu()[source]
    moved = None if places is None else places.of_rows(source)
    return Donor.of(value[source.to(value.device)], mask, moved)


def _point(layer: int, method: str = "zero") -> str:
    return f"blocks.{layer}.attn.hook_{'result' if method == 'norm' else 'z'}"
