"""A number for each attention head of a model, in any of its layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.network.finite import require_numbers


@dataclass(frozen=True)
class HeadScores:
    """A score of every head, larger meaning more.

    Attributes:
        layers: the attention layers, in order.
        values: the score of each head in these layers.
        name: what was measured, with its unit, for tables and figures.

    Examples:
        >>> scores = analysis.induction_scores(model, n_tokens=20, batch=2)
        >>> scores.layers, scores.values.shape
        ((2, 5), torch.Size([2, 8]))
        >>> len(scores.top(3))
        3
    """

    layers: tuple[int, ...]
    values: Float[Tensor, "layer head"]
    name: str = ""

    def __post_init__(self) -> None:
        if len(self.layers) != self.values.shape[0]:
            raise ValueError(f"{len(self.layers)} layers for scores of {self.values.shape[0]}")

    @classmethod
    def of(cls, by_layer: Mapping[int, Float[Tensor, " head"]], name: str = "") -> HeadScores:
        """Return the scores of heads given by layer.

        Raises:
            ValueError: no layer, or layers with different numbers of heads.

        Examples:
            >>> scores = analysis.HeadScores.of({2: torch.rand(8), 5: torch.rand(8)}, "random")
            >>> scores.layers, scores.name
            ((2, 5), 'random')
        """
        widths = {v.shape[0] for v in by_layer.values()}
        if len(widths) != 1:
            heads = ", ".join(f"layer {i} has {v.shape[0]}" for i, v in sorted(by_layer.items()))
            raise ValueError(f"need layers of one number of heads: {heads or 'there is no layer'}")
        layers = tuple(sorted(by_layer))
        return cls(layers, torch.stack([by_layer[layer] for layer in layers]), name)

    def __getitem__(self, head: tuple[int, int]) -> float:
        """Return the score of (layer, head), the layer counted in the whole model."""
        layer, index = head
        if layer not in self.layers:
            raise KeyError(f"layer {layer} has no attention; those that have: {self.layers}")
        return float(self.values[self.layers.index(layer), index])

    def top(self, n: int) -> list[tuple[int, int]]:
        """Return the `n` heads with the largest scores, the largest first; ties: the lower head.

        Raises:
            ValueError: a score that is NaN; the message gives its index.

        Examples:
            >>> scores = analysis.HeadScores((2, 5), torch.tensor([[0.1, 0.9], [0.5, 0.3]]))
            >>> scores.top(2)
            [(2, 1), (5, 0)]
            >>> interventions.keep_heads(scores.top(2))[0][0]
            ['blocks.2.attn.hook_z', 'blocks.5.attn.hook_z']
        """
        require_numbers(self.values, f"{self.name or 'scores'} of layers {self.layers}")
        n_heads = self.values.shape[1]
        order = self.values.flatten().argsort(descending=True, stable=True)[:n].tolist()
        return [(self.layers[i // n_heads], i % n_heads) for i in order]

    def labels(self) -> list[str]:
        """Return "L5H0" and so on, in the order of `values.flatten()`.

        Examples:
            >>> analysis.HeadScores((2, 5), torch.rand(2, 2)).labels()
            ['L2H0', 'L2H1', 'L5H0', 'L5H1']
        """
        return [f"L{layer}H{h}" for layer in self.layers for h in range(self.values.shape[1])]
