"""Recurrent channels that carry the needle: what is lost when they do not read it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.analysis.answers import Copied, HasNeedle, copies
from hooked_hybrid.hooks.marks import per_position
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.finite import require_numbers

UNGROUPED = 8
"""Groups of a recurrence that has no gate blocks of its own."""


@dataclass(frozen=True)
class GroupScores:
    """A score of every group of neighbouring channels of every recurrent layer.

    Attributes:
        layers: the recurrent layers, in order.
        values: the score of each group of each of them.
        name: what was measured, with its unit.

    Examples:
        >>> scores = analysis.GroupScores((0, 3), torch.tensor([[0.0, 0.2], [0.7, 0.1]]))
        >>> scores.top(1), scores.labels()[0]
        ([(3, 0)], 'L0G0')
    """

    layers: tuple[int, ...]
    values: Float[Tensor, "layer group"]
    name: str = ""

    def __getitem__(self, group: tuple[int, int]) -> float:
        """Return the score of (layer, group), the layer counted in the whole model."""
        layer, index = group
        if layer not in self.layers:
            raise KeyError(f"layer {layer} is not a recurrence; those that are: {self.layers}")
        return float(self.values[self.layers.index(layer), index])

    def top(self, n: int) -> list[tuple[int, int]]:
        """Return the `n` groups with the largest scores, the largest first; ties: the lower.

        Raises:
            ValueError: a score that is NaN.

        Examples:
            >>> analysis.GroupScores((0, 3), torch.tensor([[0.0, 0.2], [0.7, 0.1]])).top(1)
            [(3, 0)]
        """
        require_numbers(self.values, f"{self.name or 'scores'} of layers {self.layers}")
        width = self.values.shape[1]
        order = self.values.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [(self.layers[i // width], i % width) for i in order]

    def labels(self) -> list[str]:
        """Return "L1G2" and so on, in the order of `values.flatten()`.

        Examples:
            >>> analysis.GroupScores((0, 3), torch.rand(2, 2)).labels()
            ['L0G0', 'L0G1', 'L3G0', 'L3G1']
        """
        return [f"L{layer}G{g}" for layer in self.layers for g in range(self.values.shape[1])]


def channel_scores(
    model: HookedHybrid,
    prompts: Sequence[HasNeedle],
    n_groups: int | None = None,
    *,
    max_new_tokens: int = 40,
    min_recall: float = 0.5,
    batch_size: int = 8,
    verbose: bool = True,
) -> GroupScores:
    """Return how much each group of recurrent channels carries the needle, in nats a copied token.

    The model answers every prompt. Then, for each group alone, nothing is written to its state at
    the needle's tokens (`hook_ssm_write` is 0 there), and the answer is read again: the score is by
    how much the log-probability of the copied tokens falls. A group that the model needs for
    language in general hardly scores, as it goes on writing everywhere else.

    Args:
        model: that answers, greedily.
        prompts: tokens, and spans of the needle.
        n_groups: groups of neighbouring channels in each layer; None means the gate blocks of a
            layer that has them, else 8.
        max_new_tokens, min_recall, batch_size, verbose: as in `retrieval_scores`.

    Raises:
        ValueError: no recurrent layer, one whose channels do not divide into this many groups,
            layers of different numbers of groups, or as `retrieval_scores`.

    Source: ours. It sees what the state carries, not what a convolution or a skip (`D x`) does.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> analysis.channel_scores(model, cells, n_groups=2, verbose=False).values.shape
        torch.Size([4, 2])
    """
    groups = _groups(model, n_groups)
    n = next(iter(groups.values()))
    lost = torch.zeros(len(groups), n, dtype=torch.float64)
    n_copied = 0
    for copied in copies(model, prompts, max_new_tokens, min_recall, batch_size, verbose):
        n_copied += int(copied.is_copy.sum())
        whole = _log_probability(model, copied)
        for i, layer in enumerate(groups):
            for group in range(n):
                silence = _unread(copied, group, n)
                name = f"blocks.{layer}.{model.blocks[layer].recurrence.path}.hook_ssm_write"
                with model.hooks([(name, silence)]):
                    lost[i, group] += whole - _log_probability(model, copied)
    return GroupScores(
        tuple(groups),
        (lost / n_copied).float(),
        f"log-probability lost (nats a copied token, of {n_copied})",
    )


def _groups(model: HookedHybrid, n_groups: int | None) -> dict[int, int]:
    """Return the number of groups of each recurrent layer."""
    found = {}
    for layer in model.cfg.recurrent_layers:
        mixer = model.blocks[layer].recurrence
        (width, *_) = mixer.state_shapes(mixer.cfg)["ssm"]
        n = (mixer.channel_groups(mixer.cfg) or UNGROUPED) if n_groups is None else n_groups
        if n < 1 or width % n:
            raise ValueError(f"n_groups={n}: layer {layer} has {width} channels; give a divisor")
        found[layer] = n
    if len(set(found.values())) != 1:
        has = f"layers have groups {found}" if found else "this model has no recurrent layer"
        raise ValueError(f"{has}: give n_groups, for a model with recurrent layers")
    return found


def _unread(copied: Copied, group: int, n_groups: int) -> Callable[[Tensor, HookPoint], Tensor]:
    """Return a hook after which a group of channels has written nothing at the needle."""
    n_new = copied.tokens.shape[1] - copied.n_prompt
    at = torch.nn.functional.pad(copied.in_needle, (0, n_new))

    @per_position
    def silence(write: Tensor, hook: HookPoint) -> Tensor:
        here = at[hook.run.rows[:, None], hook.run.query_pos]
        e = torch.arange(write.shape[2], device=write.device)
        mine = e // (write.shape[2] // n_groups) == group
        where = (here[..., None] & mine).view(*write.shape[:3], *(1,) * (write.ndim - 3))
        return write.masked_fill(where, 0)

    return silence


def _log_probability(model: HookedHybrid, copied: Copied) -> float:
    """Return the sum of the log-probabilities, in nats, of the copied tokens."""
    n_new = copied.tokens.shape[1] - copied.n_prompt
    with torch.no_grad():
        read = copied.tokens[:, :-1]
        logits = model(read, attention_mask=torch.ones_like(read), logits_to_keep=n_new)
    new = copied.tokens[:, copied.n_prompt :, None]
    chosen = at_least_fp32(logits).log_softmax(-1).gather(2, new)[..., 0]
    return float(chosen.double()[copied.is_copy].sum())
