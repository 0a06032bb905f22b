"""Memory of recurrences in tokens, for comparison with attention windows.

A token's write to channel c is multiplied by a decay a_t at each later token. After k tokens, a
fraction of it remains, the product of k decays:

    half-life   ln 2 / mean(-ln a): tokens after which half remains, at the channel's mean rate
    horizon     first k after which less than a fraction eps remains, from each position on;
                the median over positions

Both are infinite if the decay is 1. In Mamba each state of a channel has its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from hooked_hybrid.analysis.forms import DecayRange, form_of
from hooked_hybrid.analysis.forms.base import PerState
from hooked_hybrid.analysis.linear_form import Recurrence
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.mixers import mixer_of

Tokens = Float[Tensor, "channel *d_state"]
SCRATCH = 2**26
"""Approximate bytes of temporaries; channels are processed in groups of this size."""
FORGOTTEN = -1e6
"""Log decay in place of minus infinity in comparisons of sums."""


@dataclass(frozen=True)
class Reach:
    """The memory of one layer in tokens; a row of a table (`pandas.DataFrame(rows)`).

    Attributes:
        layer: index of the block.
        kind: "attention", "rglru" or "mamba".
        tokens: keys that attention sees, including the query; for a recurrence, the median horizon
            over channels (and states).
        longest: the longest horizon of a channel (and state).
        half_life: the median half-life; None for attention.

    Examples:
        >>> reach = analysis.how_far(cache)[2]
        >>> reach.layer, reach.kind, reach.tokens
        (2, 'attention', 256.0)
    """

    layer: int
    kind: str
    tokens: float
    longest: float
    half_life: float | None


def half_life(cache: ActivationCache, layer: int, **run: Any) -> Tokens:
    """Return the tokens after which half of a write remains, from the mean log decay in a run.

    Args:
        cache: of a run, with the layer's hook points.
        layer: index of the block; a negative one counts from the last.
        run: `attention_mask`, `segment_ids` or `state`, if the run had one.

    Returns:
        [channel] for the RG-LRU, [channel d_state] for Mamba; infinite where every decay is 1.

    Raises:
        ValueError: the layer has no recurrence; the cache has no two consecutive tokens; a hook
            set a decay above 1 or below 0.
        HookNameError: the cache lacks a point of the layer.

    Examples:
        >>> analysis.half_life(cache, 0).shape
        torch.Size([128])
    """
    r = Recurrence(cache, layer, **run)
    return _by_channel(r, lambda log_a, at: tokens_until(0.5, _mean(log_a, at)))


def memory_horizon(cache: ActivationCache, layer: int, eps: float = 0.01, **run: Any) -> Tokens:
    """Return the median number of tokens after which less than a fraction of a write remains.

    It is counted from each token along the following decays in its document. If the document ends
    too early, the channel's mean rate is used for the rest.

    Args:
        cache, layer, run: as in `half_life`.
        eps: the fraction, between 0 and 1.

    Returns:
        [channel] for the RG-LRU, [channel d_state] for Mamba: whole numbers from 1 on, or infinite.

    Raises:
        ValueError: as `half_life`; or eps not between 0 and 1.
        HookNameError: the cache lacks a point of the layer.

    Examples:
        >>> analysis.memory_horizon(cache, 0, eps=0.5).shape
        torch.Size([128])
    """
    _check_eps(eps)
    r = Recurrence(cache, layer, **run)
    return _by_channel(r, lambda log_a, at: _horizons(r, log_a, at, math.log(eps)))


def tokens_until(eps: float, log_decay: Tensor) -> Tensor:
    """Return ln(eps) / log_decay: tokens after which a fraction eps remains, infinite at 0."""
    return torch.where(log_decay == 0, torch.inf, math.log(eps) / log_decay)


def decay_range(model: HookedHybrid, layer: int) -> DecayRange:
    """Return the range of decays that the weights of a recurrence allow, for any input.

    The RG-LRU's recurrence gate r lies in (0, 1), so that a = exp(-8 r softplus(a_param)) lies
    between its value at r = 1 and 1. Mamba's a = exp(-dt exp(A_log)) has dt = softplus(W d + b)
    with a normalised d, |d / weight| <= sqrt(dt_rank), which bounds W d by Cauchy and Schwarz.

    Args:
        model: the model with the weights.
        layer: index of the block.

    Returns:
        Each [channel] for the RG-LRU, [channel d_state] for Mamba, in fp32 or wider.

    Raises:
        ValueError: the layer has no recurrence.

    Examples:
        >>> analysis.decay_range(model, 0).slowest.shape
        torch.Size([128])
    """
    recurrent = model.cfg.recurrent_layers
    index = layer + model.cfg.n_layers if layer < 0 else layer
    if index not in recurrent:
        raise ValueError(f"layer {layer} has no recurrence; those that have: {recurrent}")
    mixer = model.blocks[index].recurrence
    with torch.no_grad():
        return form_of(mixer.cfg).decay_range(mixer)


def how_far(cache: ActivationCache, eps: float = 0.01, **run: Any) -> list[Reach]:
    """Return how far back each mixer reads, in tokens: windows of attention, horizons of the rest.

    Args:
        cache: of a run, with the hook points of every recurrence.
        eps: fraction of a write below which it counts as forgotten.
        run: as in `half_life`.

    Returns:
        A row for each mixer, in the order of the layers. What a stack of layers passes on reaches
        further than each.

    Raises:
        ValueError, HookNameError: as `memory_horizon`.

    Examples:
        >>> len(analysis.how_far(cache)) == model.cfg.n_layers
        True
    """
    rows = []
    layers = enumerate(cache.model.cfg.layers)
    for layer, cfg in ((layer, cfg) for layer, of in layers for cfg in of.mixers):
        mixer = mixer_of(cfg)
        kind = mixer.kind
        if mixer.grows:
            n_keys = mixer.window(cfg)
            window = math.inf if n_keys is None else float(n_keys)
            rows.append(Reach(layer, kind, window, window, None))
            continue
        horizon, half = memory_horizon(cache, layer, eps, **run), half_life(cache, layer, **run)
        median, longest = float(horizon.median()), float(horizon.max())
        rows.append(Reach(layer, kind, median, longest, float(half.median())))
    return rows


# --- inside ---------------------------------------------------------------------------------------


def _check_eps(eps: float) -> None:
    if not 0 < eps < 1:
        raise ValueError(f"eps={eps}: give a fraction between 0 and 1")


def _by_channel(
    r: Recurrence, of: Callable[[PerState, Bool[Tensor, "batch pos"]], Tensor]
) -> Tokens:
    """Return the result of a function of log decays, and of where they act, for every channel."""
    at = r.layout.pos > 0
    if (moves := r.form.moves(r)) is not None:
        at = at & moves
    if not bool(at.any()):
        raise ValueError("no token of this cache follows another in its document: nothing decays")
    every = torch.arange(r.n_channels, device=at.device)
    parts = []
    for channels in every.split(max(1, SCRATCH // (at.numel() * r.n_states * 64))):
        log_a = r.log_decay(channels).detach()
        used = log_a.masked_select(at[..., None, None])
        if bool((used > 0).any()) or bool(used.isnan().any()):
            raise ValueError(
                f"layer {r.layer} has decays above 1 or below 0, which a hook must have set: what "
                "is left of a write then has no half-life"
            )
        parts.append(of(log_a, at))
    tokens = torch.cat(parts)
    return tokens if r.form.has_states else tokens[:, 0]


def _mean(log_a: PerState, at: Bool[Tensor, "batch pos"]) -> Float[Tensor, "channel n"]:
    """Return the mean over the positions at which something decays."""
    return log_a.masked_fill(~at[..., None, None], 0).sum((0, 1)) / at.sum()


def _horizons(
    r: Recurrence, log_a: PerState, at: Bool[Tensor, "batch pos"], log_eps: float
) -> Float[Tensor, "channel n"]:
    """Return the median over tokens of the steps until the sum of log decays is below `log_eps`."""
    rate = _mean(log_a, at).clamp_min(FORGOTTEN)
    log_a = log_a.masked_fill(~at[..., None, None], 0).clamp_min(FORGOTTEN)
    # The loss since the beginning of the row, [batch channel n pos], never decreases along a row.
    lost = -log_a.cumsum(1).permute(0, 2, 3, 1).contiguous()
    index = torch.arange(lost.shape[-1], device=lost.device)
    end = _document_ends(r).expand(lost.shape[0], -1)[:, None, None].expand(lost.shape)
    found = torch.searchsorted(lost, lost - log_eps, right=True)
    missing = (lost - log_eps - lost.gather(-1, end)).clamp_min(0)  # still to lose after the end
    beyond = (missing / rate[..., None].abs()).floor() + 1
    steps = torch.where(found <= end, (found - index).double(), (end - index) + beyond)
    real = r.layout.is_real.nonzero(as_tuple=True)
    return steps.permute(0, 3, 1, 2)[real].median(dim=0).values


def _document_ends(r: Recurrence) -> Tensor:
    """Return the index of the last token of each position's document [batch pos]."""
    pos, n = r.layout.pos, r.layout.length
    index = torch.arange(n, device=pos.device).expand_as(pos)
    following = torch.cat([pos[:, 1:], pos.new_full((pos.shape[0], 1), -1)], dim=1)
    is_last = r.layout.is_real & (following <= 0)
    ends = torch.where(is_last, index, n - 1)
    return ends.flip(1).cummin(1).values.flip(1)
