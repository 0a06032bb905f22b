"""Linear probes of a state: the value of a key, and the presence of values.

A probe is ridge regression of one-hot targets on standardized states. Its penalty is chosen on
separate sequences, and its accuracy is measured on further ones. The control is the same probe
fitted to targets of other sequences: it can learn only how often each value occurs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import one_hot

from experiments.recall.task import N_SPECIAL, RecallBatch, Task
from hooked_hybrid import HookedHybrid

PENALTIES = (1e-3, 1e-2, 1e-1, 1.0)
"""Ridge penalties tried, times the number of sequences fitted to."""
SHARES = (0.6, 0.2)
"""Shares of the sequences to fit on, and to choose the penalty on; the rest is for scoring."""

States = Float[Tensor, "batch feature"]


class Facts(NamedTuple):
    """The key and value of each fact of a sequence, from 0, and the distance of the value."""

    keys: Int[Tensor, "batch fact"]
    values: Int[Tensor, "batch fact"]
    distances: Int[Tensor, "batch fact"]


class Read(NamedTuple):
    """A probe's results on the facts of the sequences for scoring.

    `right` is whether the probe gives the value of the key, `other` the share of the sequence's
    other facts that have the value it gives. For a state with values but not their keys both are
    equal. `distances` are those of the facts, in tokens.
    """

    right: Bool[Tensor, " fact"]
    other: Float[Tensor, " fact"]
    distances: Int[Tensor, " fact"]


def facts_of(task: Task, batch: RecallBatch) -> Facts:
    """Return the facts of a batch; distances are to ASK, in tokens."""
    keys = batch.tokens.gather(1, batch.keys) - N_SPECIAL
    values = batch.tokens.gather(1, batch.keys + 1) - task.first_value
    return Facts(keys, values, 1 + task.room - (batch.keys + 1))


@torch.no_grad()
def states_at_ask(model: HookedHybrid, task: Task, batch: RecallBatch) -> dict[int, States]:
    """Return the state of each recurrence after ASK, before any question, by layer."""
    until = batch.tokens[:, : 2 + task.room]
    _, state = model(until, return_type=None, return_state=True)
    return {i: state.blocks[i].ssm.flatten(1) for i in model.cfg.recurrent_layers}


def read_values(states: States, facts: Facts, task: Task, shuffle: int | None = None) -> Read:
    """Return the values that a probe for each key reads from the state.

    Args:
        states, facts: of the same sequences.
        task: whose keys and values they are.
        shuffle: seed to fit to the values of other sequences with; None for the true ones.
    """
    right, other, distances = [], [], []
    for key in range(task.n_keys):
        row, fact = (facts.keys == key).nonzero(as_tuple=True)
        target = facts.values[row, fact]
        guess, scored = fitted(states[row], _one_hot(target, task, shuffle), target)
        row, fact = row[scored], fact[scored]
        is_given = facts.values[row] == guess[:, None]
        right.append(mine := is_given[torch.arange(len(row)), fact])
        other.append((is_given.sum(1) - mine.long()) / max(1, task.n_facts - 1))
        distances.append(facts.distances[row, fact])
    return Read(torch.cat(right), torch.cat(other), torch.cat(distances))


def read_presence(
    states: States, facts: Facts, task: Task, shuffle: int | None = None
) -> Bool[Tensor, " row"]:
    """Return whether the value that a probe ranks first was in the sequence, with any key."""
    there = one_hot(facts.values, task.n_values).amax(1)
    shown = there if shuffle is None else there[_order(len(there), shuffle)]
    guess, scored = fitted(states, shown.float(), there)
    return there[scored].gather(1, guess[:, None])[:, 0].bool()


def fitted(
    states: States, shown: Float[Tensor, "batch value"], truth: Int[Tensor, "batch ..."]
) -> tuple[Int[Tensor, " row"], Int[Tensor, " row"]]:
    """Return the predictions of the probe with the best penalty for the last sequences, and which.

    Args:
        states, shown: inputs and targets of the fit, on the first rows.
        truth: by which the penalty is chosen, on the next: classes, or 1 at several of them. For a
            control that is favorable, as it should be.

    Raises:
        ValueError: fewer than ten sequences.
    """
    n = len(states)
    if n < 10:
        raise ValueError(f"{n} sequences to fit a probe to: give ten or more for each key")
    first, second = int(SHARES[0] * n), int(sum(SHARES) * n)
    x = states.double()
    x = (x - x[:first].mean(0)) / x[:first].std(0).clamp_min(1e-9)
    y = shown.double()
    offset = y[:first].mean(0)
    gram, moment = x[:first].T @ x[:first], x[:first].T @ (y[:first] - offset)
    best, guesses = -1.0, torch.zeros(0)
    for penalty in PENALTIES:
        ridge = penalty * first * torch.eye(x.shape[1], dtype=x.dtype)
        ranked = (x[first:] @ torch.linalg.solve(gram + ridge, moment) + offset).argmax(-1)
        held = truth[first:second]
        mine = ranked[: second - first]
        right = mine == held if held.ndim == 1 else held.gather(1, mine[:, None]) == 1
        if (score := float(right.double().mean())) > best:
            best, guesses = score, ranked[second - first :]
    return guesses, torch.arange(second, n)


def _one_hot(target: Tensor, task: Task, shuffle: int | None) -> Tensor:
    order = slice(None) if shuffle is None else _order(len(target), shuffle)
    return one_hot(target[order], task.n_values).float()


def _order(n: int, seed: int) -> Tensor:
    return torch.randperm(n, generator=torch.Generator().manual_seed(seed))
