"""Choosing a token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """Greedy, or drawn at a temperature from the most likely tokens.

    Raises:
        ValueError: a temperature that is not positive, `top_k` below 1, `top_p` outside (0, 1].
    """

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(
                f"temperature={self.temperature}: give a positive number, or do_sample=False for "
                "the most likely token"
            )
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k}: give 1 or more")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: give a share above 0 and up to 1")

    def choose(
        self, logits: Float[Tensor, "batch d_vocab"]
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return one token a row, its log-probability (nats, under the model itself), the margin.

        The margin is the difference of the two largest logits: how far the choice of the most
        likely token is from another.
        """
        logits = logits.float()
        if self.do_sample:
            probabilities = self._kept(logits / self.temperature).softmax(-1)
            chosen = torch.multinomial(probabilities, 1, generator=self.generator)[:, 0]
        else:
            chosen = logits.argmax(-1)
        best = logits.topk(min(2, logits.shape[-1])).values
        return (
            chosen,
            logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0],
            best[:, 0] - best[:, -1],
        )

    def _kept(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        """Return logits with minus infinity at tokens that top-k and top-p leave out."""
        if self.top_k is not None and self.top_k < logits.shape[-1]:
            least = logits.topk(self.top_k).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            # A token stays while those before it hold less than top_p; the first always stays.
            probabilities = ordered.softmax(-1)
            outside = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(outside.gather(1, order.argsort()), -torch.inf)
        return logits
