"""From parts of the residual stream to what reads them: norms, and logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks.slicing import PosSlice, is_one, slice_axis
from hooked_hybrid.model.cache_positions import value_at
from hooked_hybrid.model.cached_values import CachedValues
from hooked_hybrid.model.residual.parts import inverse
from hooked_hybrid.model.residual.reading import place_at, require_parts
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.options import refuse_ignored

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

Stack = Float[Tensor, "component *batch_pos d_model"]
Attributions = Float[Tensor, "component *batch_pos_left"]
TokenIds = Int[Tensor, "..."]
TokenChoice = str | int | Sequence[int] | TokenIds


def apply_ln_to_stack(
    cache: CachedValues,
    residual_stack: Stack,
    layer: int | None = None,
    mlp_input: bool = False,
    pos_slice: PosSlice = None,
    batch_slice: PosSlice = None,
    has_batch_dim: bool = True,
    recompute_ln: bool = False,
) -> Float[Tensor, "component *batch_pos_left d_model"]:
    """Return parts as the norm before a layer, or the final one, passes them on.

    Each part is divided by the scale that the run had for the whole stream, and multiplied by
    the norm's weight (by 1 + w in RecurrentGemma's style). Norms here take no mean away. The
    scale being given, this is linear: if parts sum to the stream, results sum to the norm's
    output. TransformerLens leaves the weight out, having folded it into what follows; here it
    is in the norm, and after folding it is 1.

    Args:
        residual_stack: parts at the positions `pos_slice` of the cache, all rows.
        layer: whose norm; None, -1 and the number of layers mean the final one.
        mlp_input: the norm before the layer's MLP, not before its mixer.
        pos_slice: positions that the stack was made with.
        batch_slice: rows to take, of the stack too.
        has_batch_dim: whether the stack has a batch axis.
        recompute_ln: divide each part by its own scale, as if it were the whole stream.

    Returns:
        [component *batch_pos d_model], in fp32 or wider. Positions of a generation that a row
        which had ended did not read are 0.

    Raises:
        HookNameError: the norm's scale is not in the cache.
        ValueError: the stack does not fit the slices, or `pos_slice` with `recompute_ln`.

    Examples:
        >>> parts = cache.decompose_resid()
        >>> cache.apply_ln_to_stack(parts).shape  # as the final norm passes them on
        torch.Size([13, 1, 16, 128])
    """
    if recompute_ln:
        refuse_ignored("recompute_ln=True reads no scale at a position", pos_slice=pos_slice)
    path, norm = place_at(cache, layer, mlp_input).norm(cache.model)
    stack = at_least_fp32(_take_rows(cache, residual_stack, batch_slice, has_batch_dim, dim=1))
    if recompute_ln:
        factor = (stack.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
    else:
        slices = (pos_slice, batch_slice, has_batch_dim)
        factor = inverse(_read_for(cache, stack, f"{path}.hook_scale", *slices))
    return stack * factor * norm.w.to(stack.device)


def logit_attrs(
    cache: CachedValues,
    residual_stack: Stack,
    tokens: TokenChoice,
    incorrect_tokens: TokenChoice | None = None,
    pos_slice: PosSlice = None,
    batch_slice: PosSlice = None,
    has_batch_dim: bool = True,
    *,
    through_soft_cap: Literal["slope", "share"] | None = None,
) -> Attributions:
    """Return what each part adds to the logit of a token, through the final norm.

    The logit is that before the soft cap, `unembed.hook_logits`: attributions of parts that
    sum to the last residual stream sum to it (hooks on `ln_final.hook_normalized` and on the
    logits apart). A cap, `cap * tanh(logit / cap)`, is not linear, and two ways through it are
    exact in a sense each; both measure each token's own logit in the run:

    - "slope" multiplies by the cap's derivative there, 1 - tanh(logit / cap)^2: to first
      order, how the capped logit would move with the part.
    - "share" multiplies by capped / uncapped logit: parts sum to the capped logit. These are
      integrated gradients along the straight line from 0 (Sundararajan et al. 2017).

    Without a cap both change nothing.

    Args:
        residual_stack: parts as the cache's methods stack them, without `apply_ln`.
        tokens: a token for everything (its id or its text), one a row [batch], or one a
            position [batch pos]; without a batch axis, one a position.
        incorrect_tokens: tokens whose logits are taken away.
        pos_slice, batch_slice, has_batch_dim: as in `apply_ln_to_stack`.
        through_soft_cap: see above.

    Returns:
        Attributions in units of logits (nats), in fp32 or wider.

    Raises:
        HookNameError: the cache has no `ln_final.hook_scale` (or, through a cap, no
            `ln_final.hook_normalized`).
        ValueError: tokens, slices or stack do not fit each other.

    Examples:
        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> attrs = cache.logit_attrs(parts, answer)[:, 0, -1]  # at the last position
        >>> labels[attrs.argmax()]  # the part that raises the logit of "Dolores" most
        '4_mlp_out'
    """
    if through_soft_cap not in (None, "slope", "share"):
        raise ValueError(f"through_soft_cap={through_soft_cap!r}: give None, 'slope', 'share'")
    slices = (pos_slice, batch_slice, has_batch_dim)
    capped = through_soft_cap is not None and cache.model.cfg.logits_soft_cap is not None
    read = ["ln_final.hook_scale", *(["ln_final.hook_normalized"] if capped else [])]
    require_parts(cache, "logit_attrs", [], read)
    stack = at_least_fp32(_take_rows(cache, residual_stack, batch_slice, has_batch_dim, dim=1))
    factor = inverse(_read_for(cache, stack, "ln_final.hook_scale", *slices))
    has_batch = has_batch_dim and cache.has_batch_dim and not is_one(batch_slice)
    weight = cache.model.ln_final.w.to(stack.device)

    def direction(which: TokenChoice) -> Tensor:
        to_logit = _read_unembedding(cache, which, stack, has_batch) * weight
        if through_soft_cap is None or cache.model.cfg.logits_soft_cap is None:
            return to_logit
        final = _read_for(cache, stack, "ln_final.hook_normalized", *slices)
        logit = (at_least_fp32(final) * to_logit).sum(-1, keepdim=True)
        return to_logit * _cap_factor(logit, cache.model.cfg.logits_soft_cap, through_soft_cap)

    wanted = direction(tokens)
    if incorrect_tokens is not None:
        wanted = wanted - direction(incorrect_tokens)
    return torch.einsum("k...d,...d->k...", stack, wanted * factor)


def _take_rows(
    cache: CachedValues, x: Tensor, batch_slice: PosSlice, has_batch_dim: bool, dim: int
) -> Tensor:
    """Return the rows asked for of a tensor that may have a batch axis."""
    if batch_slice is not None and not cache.has_batch_dim:
        raise ValueError("this cache has no batch axis any more: leave batch_slice out")
    return slice_axis(x, batch_slice, dim, "rows") if has_batch_dim else x


def _read_for(
    cache: CachedValues,
    stack: Stack,
    name: str,
    pos_slice: PosSlice,
    batch_slice: PosSlice,
    has_batch: bool,
) -> Float[Tensor, "*batch_pos width"]:
    """Return a cached value at the rows and positions of a stack."""
    require_parts(cache, "reading this stack", [], [name])
    value = value_at(cache, name, pos_slice)
    if cache.has_batch_dim and (has_batch or batch_slice is not None):
        value = slice_axis(value, batch_slice, 0, "rows")
    elif cache.has_batch_dim and value.shape[0] == 1:
        value = value[0]
    if value.shape[:-1] != stack.shape[1:-1]:
        raise ValueError(
            f"the stack is [component {' '.join(map(str, stack.shape[1:]))}] and {name!r} is "
            f"{list(value.shape)} there: give the pos_slice that the stack was made with, and "
            "has_batch_dim=False with batch_slice=row for a stack of one row"
        )
    return value.to(stack.device)


def _read_unembedding(
    cache: CachedValues, tokens: TokenChoice, stack: Stack, has_batch: bool
) -> Float[Tensor, "*#batch_pos d_model"]:
    """Return the unembedding of tokens, ready to be multiplied with a stack's parts."""
    ids = ids_at(cache.model, tokens, tuple(stack.shape[1:-1]), has_batch)
    return cache.model.W_U.T[ids.to(cache.model.W_U.device)].to(stack)


def token_ids(model: LanguageModel, tokens: TokenChoice) -> TokenIds:
    """Return the ids of tokens given as a text of one token, an id, or a tensor of ids.

    Raises:
        ValueError: ids that are not integers, or outside the vocabulary.
    """
    ids = torch.as_tensor(model.to_single_token(tokens) if isinstance(tokens, str) else tokens)
    if ids.is_floating_point() or ids.dtype == torch.bool:
        raise ValueError(f"tokens have dtype {ids.dtype}: give integer ids")
    if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < model.cfg.d_vocab:
        raise ValueError(
            f"token ids from {int(ids.min())} to {int(ids.max())}: the vocabulary has "
            f"{model.cfg.d_vocab}"
        )
    return ids


def ids_at(
    model: LanguageModel, tokens: TokenChoice, lead: tuple[int, ...], has_batch: bool
) -> TokenIds:
    """Return the ids of tokens with an axis for each of `lead`, of length 1 where all are alike.

    Raises:
        ValueError: tokens that are neither one for all, nor one a row, nor one for each place.
    """
    ids = token_ids(model, tokens)
    fits = list(dict.fromkeys([(), lead[:1], lead] if has_batch else [(), lead]))
    if tuple(ids.shape) not in fits:
        shapes = " or ".join(map(str, fits))
        raise ValueError(f"tokens have shape {tuple(ids.shape)}; give one of shape {shapes}")
    return ids.view(*ids.shape, *(1,) * (len(lead) - ids.ndim))


def _cap_factor(logit: Tensor, cap: float, way: Literal["slope", "share"]) -> Tensor:
    squashed = torch.tanh(logit / cap)
    if way == "slope":
        return 1 - squashed.square()
    return torch.where(logit == 0, 1.0, cap * squashed / torch.where(logit == 0, 1.0, logit))
