"""Interventions on recurrences: editing or holding states, and cutting edges between positions.

To set the state of another run at some positions, use `patch(cache, ("ssm_state", layer),
positions=...)`; to continue a prompt with another's state, `state.replace(other, kinds="ssm")`.
"""

from __future__ import annotations

from functools import partial

from jaxtyping import Int
from torch import Tensor

from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.marks import HookFn, per_position, watcher
from hooked_hybrid.hooks.names import NameFilter
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.hooks.slicing import Indices, whole_numbers
from hooked_hybrid.interventions.pickling import picklable
from hooked_hybrid.interventions.places import Positions, read_positions
from hooked_hybrid.interventions.rows import PerRow, entries_of_rows, read_per_row
from hooked_hybrid.interventions.state_edges import Cut, Edges, is_chosen, owner_of
from hooked_hybrid.interventions.where import hook_at
from hooked_hybrid.network.mixers import MIXERS
from hooked_hybrid.network.part import NotSupported


@picklable
def edit_state(
    fn: HookFn, positions: Positions | None = None, *, layers: Indices | None = None
) -> list[HookSpec]:
    """Apply a hook to the states of recurrences; an edit at a position changes all later ones.

    Args:
        fn: a hook, called with the state after one position, [batch 1 d_rnn] or
            [batch 1 d_inner d_state].
        positions: in the document, counted from 0, or a mask, as in `hook_at`; None means all.
            Between given positions the scan stays fast.
        layers: with a recurrence; None means all that have one.

    Returns:
        Hooks on `hook_ssm_state`.

    Raises:
        ValueError: a position or layer that is not a whole number from 0 on.
        HookNameError: when attached, a layer without a recurrence.

    Examples:
        >>> hooks = interventions.edit_state(lambda state, hook: 0 * state, [9], layers=[0])
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, edited = model.run_with_cache(tokens)
        >>> edited["ssm_state", 0][0, 9].abs().max().item()
        0.0
    """
    # A new hook: `fn` keeps its signature and its marks.
    edit = per_position(partial(fn)) if positions is None else hook_at(fn, positions)
    return [*_checked(layers), (_points(("hook_ssm_state",), layers), edit)]


@picklable
def freeze_state(
    start: PerRow,
    stop: PerRow | None = None,
    *,
    layers: Indices | None = None,
    channels: Indices | None = None,
) -> list[HookSpec]:
    """Hold the state of recurrences constant over some positions: no decay and no write.

    Outputs are still computed from the held state, with each position's read-out and gate (and D x
    in Mamba). A state held from position 0 on is zero.

    Args:
        start: first held position, in the document, counted from 0; one for all rows or for each.
        stop: first position after `start` that is not held; None holds the state to the end.
        layers: with a recurrence; None means all that have one.
        channels: the held channels; None means all.

    Returns:
        Hooks: a log decay of 0 and an input gate of 0 in the RG-LRU (`hook_log_decay`,
        `hook_input_gate`), a step of 0 in Mamba (`hook_ssm_dt`), for other kinds the values that
        the class states as `holds`. Attach them after others that edit these points.

    Raises:
        ValueError: positions or indices that are not whole numbers from 0 on; `stop` before
            `start`; when first run, a channel that a layer does not have, or positions for another
            number of rows.
        HookNameError: when attached, a layer without a recurrence.
        NotSupported: when run, a recurrence does not state how it is held.

    Examples:
        >>> hooks = interventions.freeze_state(4, 8, layers=[0])
        >>> with model.hooks(fwd_hooks=hooks):
        ...     _, held = model.run_with_cache(tokens)
        >>> torch.equal(held["ssm_state", 0][:, 7], held["ssm_state", 0][:, 3])
        True
    """
    first, last = read_per_row(start, "start"), None if stop is None else read_per_row(stop, "stop")
    if isinstance(start, int) and isinstance(stop, int) and stop < start:
        raise ValueError(f"start={start}, stop={stop}: nothing lies between them")
    chosen = None if channels is None else whole_numbers(channels, "channels")

    @per_position
    def hold(value: Tensor, hook: HookPoint) -> Tensor:
        pos = hook.run.query_pos
        here = pos >= _of_rows(first, "start", hook)
        if last is not None:
            here = here & (pos < _of_rows(last, "stop", hook))
        held = owner_of(hook).holds.get(str(hook.name).rpartition(".")[2])
        if held is None:  # a point by which another kind is held
            return value
        here = here.view(*here.shape, *(1,) * (value.ndim - 2))
        return value.masked_fill(here & is_chosen(chosen, value, hook), held)

    return [*_checked(layers), (_points(_stated("holds"), layers), hold)]


@picklable
def knock_out_state_edges(
    query_positions: Positions | None,
    key_positions: Positions | None,
    *,
    layers: Indices | None = None,
    channels: Indices | None = None,
) -> list[HookSpec]:
    """Cut recurrences from each of some queries to each of some keys.

    The keys' writes to the state are removed from the layer's output at the queries, and from
    nothing else: the state itself and outputs at other positions do not change. This equals setting
    these entries of the layer's effective attention (through "scan") to 0, including D x on the
    diagonal of Mamba. A recurrence is linear in its writes, so the part to subtract is a second
    scan, of the keys' writes only.

    The convolution mixes the last `d_conv` tokens into a write. To cut all writes of a token, also
    name the `d_conv - 1` positions after it as keys. Its effects on later decays and gates remain.

    The hooks follow the state from call to call, in pieces of a prefill and steps of generation,
    and check at each call that the state is the one they followed. They make Mamba compute decays,
    writes and states of each position [batch pos d_inner d_state], in pieces if other hooks allow.

    Args:
        query_positions, key_positions: in the document, counted from 0, or a mask that is True at
            them: [pos], or [batch pos] if rows differ; None means all. For single edges, call this
            several times.
        layers: with a recurrence; None means all that have one.
        channels: in each of these layers; None means all.

    Returns:
        A hook on `hook_ssm_y`, and watchers before it. Attach them in this order, after hooks that
        edit decays or writes of these layers and before hooks that edit `hook_ssm_y`.

    Raises:
        ValueError: an index that is not a whole number from 0 on; when run, a channel that a layer
            does not have, a mask with another number of rows than the batch, a state after a key
            that was computed without these hooks or edited (`hook_ssm_state`), hooks in another
            order, or an edge that is cut twice.
        HookNameError: when attached, a layer without a recurrence.

    Source: attention knockout (Geva et al. 2023) for recurrences, as in Endy et al. 2025, "Mamba
    Knockout for Unraveling Factual Information Flow", who zero entries of the effective attention;
    here without the matrix.

    Examples:
        >>> hooks = interventions.knock_out_state_edges([15], [6, 7], layers=[0])
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
        >>> torch.equal(hooked[:, :15], model(tokens)[:, :15])
        True
    """
    chosen = None if channels is None else whole_numbers(channels, "channels")
    queries = read_positions(query_positions, "query_positions")
    keys = read_positions(key_positions, "key_positions")
    cut = Cut(Edges(queries, keys, chosen))
    return [
        *_checked(layers),
        (_points(_stated("scan_hooks"), layers), cut.watch),
        (_points(("hook_ssm_y",), layers), cut.subtract),
    ]


@watcher
@per_position
def _look(value: Tensor, hook: HookPoint) -> None:
    """Do nothing: it is attached by name, so that a layer without a recurrence is an error."""


def _checked(layers: Indices | None) -> list[HookSpec]:
    if layers is None:
        return []
    return [([f"blocks.{i}.mixer.hook_ssm_y" for i in whole_numbers(layers, "layers")], _look)]


def _stated(fact: str) -> tuple[str, ...]:
    """Return the hook points in a fact of recurrences, of all kinds.

    If a kind does not state it, the output point is included, where a hook can read its kind's
    facts.
    """
    leaves: list[str] = []
    for mixer in MIXERS.values():
        try:
            leaves += [] if mixer.grows else [*getattr(mixer, fact)]
        except NotSupported:
            leaves.append("hook_ssm_y")
    return tuple(dict.fromkeys(leaves))


def _points(leaves: tuple[str, ...], layers: Indices | None) -> NameFilter:
    """Return a predicate on the points of recurrences, in some layers or in all."""
    chosen = None if layers is None else {str(i) for i in whole_numbers(layers, "layers")}

    def selects(name: str) -> bool:
        parts = name.split(".")
        is_there = len(parts) == 4 and parts[2] == "mixer" and parts[3] in leaves
        return is_there and (chosen is None or parts[1] in chosen)

    return selects


def _of_rows(bound: Int[Tensor, "*batch"], what: str, hook: HookPoint) -> Tensor:
    """Return the positions of the rows of this forward, as a column."""
    if bound.ndim == 0:
        return bound.to(hook.run.rows.device)
    return entries_of_rows(bound, hook, what)[:, None]
