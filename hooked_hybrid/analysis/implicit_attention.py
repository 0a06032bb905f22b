"""The effective attention of a recurrence: the weight of each earlier input in each output.

With decays and gates fixed at the values of a run, a recurrent layer is linear in its inputs: for
each channel, a lower triangular matrix over positions:

    scan     matrix[t, s] = read_t . (decay_{s+1} ... decay_t gain_s), plus skip if s = t
             hook_ssm_y = matrix @ x + offset       x: hook_conv (RG-LRU), hook_ssm_input (Mamba)
    block    matrix[t, s] = gate_t sum_j scan[t, s + j] act_{s + j} tap_j
             hook_gated = matrix @ hook_in_proj + offset

(`linear_form` has the terms; tap_j is the convolution's weight j positions back, act = sigmoid of
`hook_conv` in Mamba, as silu(c) = sigmoid(c) c, and 1 in the RG-LRU.) The offset is the part that
does not depend on this run's inputs: from the state that it continued, the convolution's bias, and
hooks' edits of `hook_ssm_write` or of the convolution's output. `hook_mixer_out` is
`hook_gated @ W_out` plus a bias, which mixes channels.

Source: Ali, Zimerman & Wolf 2024, "The Hidden Attention of Mamba Models", for the scan; Zimerman,
Ali & Wolf 2024, "Explaining Modern Gated-Linear RNNs via a Unified Implicit Attention Formulation",
for the block. The offset is ours: it makes the products equal to the layer's outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.analysis.effective_rows import (
    QUERIES,
    Through,
    blocks_of_rows,
    convolve,
    inputs_of,
    taps_of,
)
from hooked_hybrid.analysis.forms.base import PerChannel
from hooked_hybrid.analysis.linear_form import Recurrence
from hooked_hybrid.hooks.slicing import indices_on, read_indices
from hooked_hybrid.model.cache import ActivationCache
from hooked_hybrid.model.memory import WORTH_CHECKING, available_bytes
from hooked_hybrid.network.elementwise import at_least_fp32

Summary = Literal["channel", "gate_block", "layer"] | int
Measure = Literal["mean", "norm"]
Indices = int | Iterable[int] | None
EffectiveAttention = Float[Tensor, "batch group query key"]

SCRATCH = 2**26
"""Bytes of temporaries to stay near, by working on some channels at a time."""


def effective_attention(
    cache: ActivationCache,
    layer: int,
    *,
    through: Through = "scan",
    summary: Summary = "channel",
    measure: Measure = "mean",
    which: Indices = None,
    queries: Indices = None,
    keys: Indices = None,
    max_bytes: int | None = None,
    check: bool = True,
    **run: Any,
) -> EffectiveAttention:
    """Return the weight of each key's input in a recurrent layer's output at each query.

    For each channel the result is exact: multiplied by the inputs, plus `effective_offset`, it is
    the layer's output (see the module).

    Args:
        cache: of a run, with the layer's hook points, which `run_with_cache` keeps by default;
            without a batch axis it counts as one row.
        layer: index of the block; a negative one counts from the last.
        through: "scan", from the recurrence's input to `hook_ssm_y`; "block", from
            `hook_in_proj` to `hook_gated`, with convolution, silu and gate.
        summary: "channel", a matrix with signs for each channel; "gate_block" (RG-LRU), a number of
            groups of neighbouring channels, or "layer", one group: summarised by `measure`.
        measure: of a group: "mean", the mean of absolute values over its channels; "norm", the
            Euclidean norm over channels of the key's contribution to the query (matrix times
            input), which includes the size of the inputs. Both are 0 or more.
        which: indices of channels, or of groups; None means all.
        queries, keys: indices along the position axis; None means all.
        max_bytes: the most bytes to use; None means the free memory.
        check: first compare the recurrence with the cached output, which takes a scan.
        run: `attention_mask`, `segment_ids` or `state`, where the run had one.

    Returns:
        [batch group query key], with the groups of `which`. Zero above the diagonal, across
        documents and at padding.

    Raises:
        ValueError: the layer has no recurrence; an invalid argument; the cache is inconsistent
            (see `Recurrence.check`).
        HookNameError: the cache lacks a point of the layer.
        MemoryError: the result would not fit; raised before any computation.

    Source: see the module. "norm" is that of Kobayashi et al. 2020, "Attention is not only a
    weight", in the channels of `hook_ssm_y` or `hook_gated` instead of the residual stream.

    Examples:
        >>> analysis.effective_attention(cache, 0, summary="layer").shape
        torch.Size([1, 1, 16, 16])
    """
    _check_choice(through=through, measure=measure)
    r = Recurrence(cache, layer, **run)
    size = _group_size(r, summary)
    if measure == "norm" and summary == "channel":
        raise ValueError("measure='norm' is over the channels of a group: give another summary")
    y = r["ssm_y"]
    groups = _indices(which, r.n_channels // size, "which").to(y.device)
    at_q, at_k = (_indices(i, r.layout.length, "positions").to(y.device) for i in (queries, keys))
    out_shape = (y.shape[0], len(groups), len(at_q), len(at_k))
    out_bytes = torch.Size(out_shape).numel() * at_least_fp32(y[:0]).itemsize
    _require_memory(out_bytes, out_shape, max_bytes, y.device)
    out = at_least_fp32(y.new_zeros(out_shape))
    stop = int(at_q.max()) + 1
    with torch.no_grad():
        for first, part in _parts(r, groups, size):
            terms = r.terms(part)
            if check:
                r.check(part, terms)
            x = inputs_of(r, part, terms, through).mT[:, :, None] if measure == "norm" else None
            for start, rows in blocks_of_rows(r, part, terms, through, stop):
                here = ((at_q >= start) & (at_q < start + rows.shape[2])).nonzero()[:, 0]
                there = (at_k < rows.shape[3]).nonzero()[:, 0]
                rows = rows[:, :, at_q[here] - start][..., at_k[there]]
                rows = rows if x is None else (rows * x[..., at_k[there]]).square_()
                rows = rows if summary == "channel" else rows.abs_()
                _add(out, rows, first, size, here, there)
    if measure == "norm":
        return out.sqrt_()
    return out if size == 1 else out.div_(size)


def effective_pattern(
    cache: ActivationCache, layer: int, *, keys: Indices = None, **options: Any
) -> EffectiveAttention:
    """Return absolute effective attention with rows that sum to 1, comparable to a pattern.

    Args:
        cache, layer, options: as `effective_attention`.
        keys: those to return, after the division by the sum over all keys.

    Returns:
        [batch group query key]; a row that reads nothing (padding) is zero. Signs are lost.

    Raises:
        ValueError, HookNameError, MemoryError: as `effective_attention`.

    Source: Ali, Zimerman & Wolf 2024 take absolute values for their pictures; the sum to 1 is ours.

    Examples:
        >>> pattern = analysis.effective_pattern(cache, 0, summary="layer")
        >>> torch.allclose(pattern.sum(-1), torch.ones(1, 1, 16), atol=1e-4)
        True
    """
    whole = effective_attention(cache, layer, **options).abs_()
    total = whole.sum(-1, keepdim=True)
    whole /= total.masked_fill_(total == 0, 1)
    if keys is None:
        return whole
    return whole[..., _indices(keys, whole.shape[-1], "positions").to(whole.device)]


def effective_offset(
    cache: ActivationCache, layer: int, *, through: Through = "scan", **run: Any
) -> PerChannel:
    """Return the part of the layer's output that is not effective attention times inputs.

    It comes from a continued state, the convolution's bias (through "block"), and edits of writes
    and of the convolution's output. For the scan of an unedited run without a state it is only
    rounding.

    Args:
        cache, layer, through, run: as `effective_attention`.

    Returns:
        [batch pos channel], to be added at `hook_ssm_y` or `hook_gated`.

    Raises:
        ValueError, HookNameError: as `effective_attention`.

    Examples:
        >>> analysis.effective_offset(cache, 0).shape
        torch.Size([1, 16, 128])
    """
    _check_choice(through=through)
    r = Recurrence(cache, layer, **run)
    pieces = []
    with torch.no_grad():
        for _, part in _parts(r, torch.arange(r.n_channels, device=r["ssm_y"].device), 1):
            terms = r.terms(part)
            x, gate = inputs_of(r, part, terms, through), None
            if through == "block":
                x, gate = convolve(x, taps_of(r, part)), at_least_fp32(r.form.gate(r, part))
            rest = terms.outputs(terms.write - terms.gain * x[..., None], terms.x - x, terms.h0)
            pieces.append(rest if gate is None else rest * gate)
    return torch.cat(pieces, dim=-1)


# --- inside ---------------------------------------------------------------------------------------


def _check_choice(through: str, measure: str = "mean") -> None:
    if through not in ("scan", "block"):
        raise ValueError(f"through={through!r}: give 'scan' or 'block'")
    if measure not in ("mean", "norm"):
        raise ValueError(f"measure={measure!r}: give 'mean' or 'norm'")


def _group_size(r: Recurrence, summary: Summary) -> int:
    """Return the channels in each group."""
    if summary == "channel":
        return 1
    if summary == "layer":
        return r.n_channels
    if summary == "gate_block":
        groups = r.mixer.channel_groups(r.cfg)
        if groups is None:
            raise ValueError(
                f"layer {r.layer} has no gate blocks: give a number of groups of its "
                f"{r.n_channels} channels, or 'layer'"
            )
        return r.n_channels // groups
    if isinstance(summary, bool) or not isinstance(summary, int) or summary < 1:
        raise ValueError(
            f"summary={summary!r}: give 'channel', 'gate_block', 'layer' or a number of groups"
        )
    if r.n_channels % summary:
        raise ValueError(f"summary={summary}: {r.n_channels} channels make no groups of one size")
    return r.n_channels // summary


def _indices(given: Indices, n: int, what: str) -> Int[Tensor, " index"]:
    """Return indices below `n`."""
    if given is None:
        return torch.arange(n)
    try:
        read = read_indices(given, what)
        if isinstance(read, int):
            read = torch.tensor([read])
        if isinstance(read, Tensor) and read.dtype != torch.bool and bool((read < 0).any()):
            raise IndexError(f"{what} {given}: counted from 0")
        return indices_on(read, n, what)
    except (IndexError, TypeError) as error:
        raise ValueError(f"{error}; there are {n}, from 0") from error


def _require_memory(
    needed: int, shape: tuple[int, ...], max_bytes: int | None, device: torch.device
) -> None:
    """Refuse a result that would not fit, with its temporaries, in memory."""
    needed += SCRATCH
    if max_bytes is None and needed < WORTH_CHECKING:
        return
    limit = available_bytes(device) if max_bytes is None else max_bytes
    if needed > limit:
        raise MemoryError(
            f"effective attention of shape {shape} needs about {needed:,} bytes, and {limit:,} are "
            "allowed: ask for fewer with which=, queries= or keys=, or for a summary in groups"
        )


def _parts(
    r: Recurrence, groups: Int[Tensor, " group"], size: int
) -> Iterator[tuple[int, Int[Tensor, " channel"]]]:
    """Yield groups of channels that fit the memory, with the number of channels before."""
    n_rows, n_pos = r.layout.pos.shape
    rows, terms = QUERIES * (n_pos + QUERIES * r.n_states), n_pos * r.n_states
    per_channel = n_rows * (rows * 16 + terms * 48)
    channels = (groups[:, None] * size + torch.arange(size, device=groups.device)).flatten()
    done = 0
    for part in channels.split(max(1, SCRATCH // per_channel)):
        yield done, part
        done += len(part)


def _add(
    out: EffectiveAttention,
    rows: Float[Tensor, "batch channel some_queries some_keys"],
    first: int,
    size: int,
    at_q: Int[Tensor, " some_queries"],
    at_k: Int[Tensor, " some_keys"],
) -> None:
    """Add each channel's rows to those of its group; `first` is the number of channels before."""
    group = torch.arange(first, first + rows.shape[1], device=rows.device) // size
    low, n = int(group[0]), int(group[-1] - group[0]) + 1
    here = rows
    if size > 1:
        here = rows.new_zeros(rows.shape[0], n, *rows.shape[2:]).index_add_(1, group - low, rows)
    out[:, low : low + n, at_q[:, None], at_k] += here
