"""Reading parts of the residual stream off a cache, or saying what it would have had to hold."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.model.cache_positions import value_at
from hooked_hybrid.model.cached_values import CachedValues
from hooked_hybrid.model.memory import WORTH_CHECKING, available_bytes
from hooked_hybrid.model.residual import parts as parts_of
from hooked_hybrid.model.residual.parts import Parts, inverse
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.written import Way

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

Onto = Float[Tensor, " d_model"] | Float[Tensor, "d_model output"]


class ReadPoint(NamedTuple):
    """Where the stream is read: by a layer's mixer, by its MLP, or by the final norm."""

    layer: int
    mlp_input: bool

    def norm(self, model: LanguageModel) -> tuple[str, RMSNorm]:
        """Return the norm that reads the stream here, with its path.

        Raises:
            ValueError: the stream is read without one.
        """
        if self.layer == model.cfg.n_layers:
            return "ln_final", model.ln_final
        block = model.blocks[self.layer]
        name = "ln2" if self.mlp_input or not block.mixers else "ln1"
        norm = getattr(block, name)
        if norm is None:
            raise ValueError(
                f"layer {self.layer} reads the stream without a norm: leave out apply_ln"
            )
        return f"blocks.{self.layer}.{name}", norm


def place_at(cache: CachedValues, layer: int | None, mlp_input: bool) -> ReadPoint:
    """Return where the stream is read.

    Raises:
        ValueError: there is no such layer, or nothing there that reads the stream so.
    """
    n_layers = cache.model.cfg.n_layers
    place = ReadPoint(n_layers if layer is None or layer == -1 else layer, mlp_input)
    if not 0 <= place.layer <= n_layers:
        raise ValueError(f"layer={layer}: give 0 to {n_layers}, or None or -1 for all layers")
    if mlp_input and place.layer == n_layers:
        raise ValueError(f"mlp_input means a layer's own: give layer=0 to {n_layers - 1}")
    if mlp_input and cache.model.cfg.layers[place.layer].mlp is None:
        raise ValueError(f"mlp_input: layer {place.layer} has no MLP")
    return place


def mixer_parts_before(
    cache: CachedValues, place: ReadPoint, recurrent: Literal["none", "layer", "block"]
) -> list[Parts]:
    """Return the parts of each mixer up to a place: heads, and those of recurrences."""
    if recurrent not in ("none", "layer", "block"):
        raise ValueError(f"recurrent={recurrent!r}: give 'none', 'layer' or 'block'")
    parts, model = [], cache.model
    for i in range(place.layer + place.mlp_input):
        mixers = model.blocks[i].mixers
        for mixer, whole in zip(mixers, parts_of.mixers(model, i), strict=True):
            if not mixer.cfg.is_recurrence or recurrent == "block":
                parts.append(parts_of.mixer_parts(model, i, mixer.path))
            elif recurrent == "layer":
                parts.append(whole)
    return parts


def stack_parts(
    cache: CachedValues,
    purpose: str,
    parts: Sequence[Parts],
    place: ReadPoint,
    pos_slice: PosSlice,
    apply_ln: bool,
    *,
    incl_remainder: bool = False,
    incl_bias: bool = False,
    onto: Onto | None = None,
) -> tuple[Float[Tensor, "component ..."], list[str]]:
    """Return parts and what is left besides them, after the norm at a place if asked for."""
    path, norm = place.norm(cache.model) if apply_ln else ("", None)
    whole = [parts_of.stream(cache.model, *place)] if incl_remainder else []
    scale_name = [f"{path}.hook_scale"] if apply_ln else []
    require_parts(cache, purpose, [*parts, *whole], scale_name)
    if not parts and not whole:
        raise ValueError(f"{purpose}: no such part before layer {place.layer}")
    labels = [label for part in parts for label in part.labels]
    if norm is not None and onto is not None:
        onto = at_least_fp32(onto)
        onto = torch.einsum("d...,d->d...", onto, norm.w.to(onto))
    n_more = bool(parts) * incl_remainder + incl_bias
    stack = write_parts(cache, parts or whole, pos_slice, onto, n_more)
    if incl_remainder:
        labels.append("remainder")
        if parts:
            known = at_least_fp32(stack[:-1]).sum(0)
            stack[-1] = read_parts(cache, whole[0], pos_slice, onto)[0] - known
    if incl_bias:
        labels.append("bias")
        stack[-1] = _read_bias(cache, parts, pos_slice, onto, stack)
    if norm is not None:
        factor = inverse(value_at(cache, scale_name[0], pos_slice))
        stack = at_least_fp32(stack)
        if onto is None:
            stack = _scaled(_scaled(stack, factor), norm.w.to(stack.device))
        else:
            stack = _scaled(stack, factor[..., 0] if onto.ndim == 1 else factor)
    return stack, labels


def _read_bias(
    cache: CachedValues,
    parts: Sequence[Parts],
    pos_slice: PosSlice,
    onto: Onto | None,
    stack: Tensor,
) -> Float[Tensor, ...]:
    """Return what layers wrote besides their parts: biases, and edits of what they wrote."""
    rest, done = at_least_fp32(torch.zeros_like(stack[0])), 0
    for part in parts:
        mine = stack[done : done + len(part.labels)]
        done += len(part.labels)
        if part.written is not None and _find_way(cache, part.written) is not None:
            whole = read_parts(cache, part.written, pos_slice, onto)[0]
            rest = rest + (at_least_fp32(whole) - mine.sum(0, dtype=rest.dtype))
        elif isinstance(part.bias, Parts):
            require_parts(cache, "an output bias", [part.bias])
            rest = rest + read_parts(cache, part.bias, pos_slice, onto)[0]
        elif part.bias is not None:
            bias = part.bias.to(rest)
            rest = rest + (bias if onto is None else bias @ onto.to(bias))
    return rest


def require_parts(
    cache: CachedValues, purpose: str, parts: Sequence[Parts], names: Sequence[str] = ()
) -> None:
    """Refuse a cache that holds too little, with a filter that would have kept enough."""
    wanted = [name for part in parts for name in (_find_way(cache, part) or part.ways[-1]).names]
    wanted += names
    missing = [name for name in dict.fromkeys(wanted) if name not in cache.cache_dict]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        leaves = tuple(sorted({name.rsplit(".", 1)[-1] for name in wanted}))
        ends = repr(leaves if len(leaves) > 1 else leaves[0])
        raise HookNameError(
            f"{purpose} needs {missing[0]!r}{more}, which this cache does not hold: keep them "
            f"with names_filter=lambda name: name.endswith({ends})"
        )


def _find_way(cache: CachedValues, part: Parts) -> Way | None:
    """Return the first way to a part for which the cache holds everything."""
    return next((w for w in part.ways if all(n in cache.cache_dict for n in w.names)), None)


def read_parts(
    cache: CachedValues, part: Parts, pos_slice: PosSlice, onto: Onto | None
) -> Float[Tensor, "part ..."]:
    """Return the parts of a write, or what they are along directions."""
    way = _find_way(cache, part)
    assert way is not None  # `require_parts` found it
    values = way.values(*(value_at(cache, name, pos_slice) for name in way.names))
    weight = None if way.weight is None else way.weight().to(values.device)
    if onto is not None:
        values = at_least_fp32(values)
        onto = onto.to(values)
        if weight is None:
            return (values @ onto).movedim(-1 if onto.ndim == 1 else -2, 0)
        weight = weight.to(values) @ onto
        if onto.ndim == 1:
            return torch.einsum("...pc,pc->p...", values, weight)
    if weight is None:
        return values.movedim(-2, 0)
    return torch.einsum("...pc,pcd->p...d", values, weight)


def write_parts(
    cache: CachedValues,
    parts: Iterable[Parts],
    pos_slice: PosSlice,
    onto: Onto | None,
    n_more: int = 0,
) -> Float[Tensor, "component ..."]:
    """Return parts one after another, with room for `n_more` after them."""
    parts, done = list(parts), 0
    n = sum(len(part.labels) for part in parts) + n_more
    _require_room(cache, parts, n, pos_slice, onto)
    stack: Tensor | None = None
    for part in parts:
        piece = read_parts(cache, part, pos_slice, onto)
        if stack is None:
            stack = piece.new_empty(n, *piece.shape[1:])
        stack[done : done + len(part.labels)] = piece
        done += len(part.labels)
    assert stack is not None  # callers give one part or more
    return stack


def _require_room(
    cache: CachedValues, parts: Sequence[Parts], n: int, pos_slice: PosSlice, onto: Onto | None
) -> None:
    """Refuse a stack that would not fit, with the largest of the pieces it is made from."""
    way = _find_way(cache, parts[0])
    assert way is not None  # `require_parts` found it
    value, axes = (
        value_at(cache, way.names[0], pos_slice),
        cache.model.hook_dict[way.names[0]].axes,
    )
    lead = value.shape[: value.ndim - len(axes) + 2]
    width = [cache.model.cfg.d_model] if onto is None else list(onto.shape[1:])
    numbers = lead.numel() * torch.Size(width).numel()
    largest = max(len(part.labels) for part in parts)
    require_room(
        (n + largest) * numbers * value.element_size(),
        value.device,
        f"a stack of {n} parts of shape {(*lead, *width)}",
        "give pos_slice, or project_output_onto if there is one, or split less",
    )


def _scaled(
    stack: Float[Tensor, "component ..."], factor: Float[Tensor, ...]
) -> Float[Tensor, "component ..."]:
    """Return a stack times a factor, in its own memory if nothing else needs it."""
    return stack * factor if stack.requires_grad or factor.requires_grad else stack.mul_(factor)


def require_room(needed: int, device: torch.device, what: str, remedy: str) -> None:
    """Refuse a tensor of this many bytes if it would not fit.

    Raises:
        MemoryError: says what it would need, what there is, and what to do instead.
    """
    if needed >= WORTH_CHECKING and needed > (free := available_bytes(device)):
        raise MemoryError(
            f"{what} needs {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB are free: {remedy}"
        )
