"""Choosing a token from logits: the most likely one, or a sample that depends only on its row.

A sample is a function of the seed, the row and the step. One number is taken from the generator for
a whole call. With the row it gives a stream of uniform numbers; each selects the first token at
which the running sum of the probabilities passes it. So the tokens of a row do not depend on the
number of other rows, or on when they end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.options import check_count, check_number, refuse_ignored

GREEDY = "give do_sample=True to draw tokens; without it the most likely one is taken"
BITS = 52
"""Bits of a uniform number: as a float64 below 1 holds, so that no product rounds up to the sum."""


class NoChoiceError(ValueError):
    """The logits of some rows, given by index, allow no choice."""

    def __init__(self, rows: list[int]) -> None:
        super().__init__(f"rows {rows}: the logits are NaN or infinite, so no token can be chosen")
        self.rows = rows


@dataclass(frozen=True)
class Sampling:
    """Greedy choice, or sampling at a temperature from the most likely tokens.

    Args:
        do_sample: sample; otherwise the most likely token is chosen.
        temperature: divides the logits; None is 1. If it is too small to divide by, the sample is
            from the most likely tokens, its limit. 0 is allowed only with `do_sample=False`.
        top_k: sample from this many of the most likely tokens.
        top_p: sample from the smallest set of most likely tokens with this probability or more.
        generator: gives the seed of the samples, on any device; None uses torch's global one.
        d_vocab: size of the vocabulary.

    Raises:
        ValueError: a temperature that is not positive and finite, `top_k` below 1 or above the
            vocabulary, `top_p` outside (0, 1], or any of them without `do_sample`.
    """

    do_sample: bool = False
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None
    d_vocab: int | None = None

    def __post_init__(self) -> None:
        if not self.do_sample:
            refuse_ignored(
                GREEDY,
                temperature=self.temperature or None,  # 0 is the most likely token
                top_k=self.top_k,
                top_p=self.top_p,
                generator=self.generator,
            )
        if self.do_sample and self.temperature is not None:
            check_number(
                "temperature",
                self.temperature,
                above=0.0,
                rather="do_sample=False for the most likely token",
            )
        if self.top_k is not None:
            check_count("top_k", self.top_k, 1, self.d_vocab, "the vocabulary")
        if self.top_p is not None:
            check_number("top_p", self.top_p, above=0.0, up_to=1.0)

    def draws(self) -> Draws | None:
        """Return the random numbers of one call of `generate`, or None if none are needed."""
        if not self.do_sample:
            return None
        device = "cpu" if self.generator is None else self.generator.device
        limits = (-(2**63), 2**63 - 1)
        return Draws(
            int(torch.randint(*limits, (), generator=self.generator, device=device).item())
        )

    def choose(
        self,
        logits: Float[Tensor, "batch d_vocab"],
        uniform: Float[Tensor, " batch"] | None = None,
    ) -> tuple[Int[Tensor, " batch"], Float[Tensor, " batch"], Float[Tensor, " batch"]]:
        """Return one token a row, its log-probability (nats, under the model itself), the margin.

        The margin is the difference of the two largest logits: the distance of the most
        likely token from the next one.

        Args:
            logits: of the next token.
            uniform: for sampling, a number from 0 to below 1 for each row.

        Raises:
            NoChoiceError: a row with a NaN, with nothing above minus infinity, or, for sampling,
                with an infinite logit.
        """
        logits = logits.float()
        best = logits.topk(min(2, logits.shape[-1])).values  # a NaN counts as the largest
        is_some = best[:, 0] > -torch.inf  # False for NaN
        if uniform is not None:
            is_some &= best[:, 0] < torch.inf
        if not bool(is_some.all()):
            raise NoChoiceError((~is_some).nonzero()[:, 0].tolist())
        chosen = logits.argmax(-1) if uniform is None else _at(uniform, self.probabilities(logits))
        return (
            chosen,
            logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0],
            best[:, 0] - best[:, -1],
        )

    def probabilities(
        self, logits: Float[Tensor, "batch d_vocab"]
    ) -> Float[Tensor, "batch d_vocab"]:
        """Return the probabilities to sample from, at the temperature; 0 for excluded tokens."""
        wide = logits.to(torch.float32 if logits.device.type == "mps" else torch.float64)
        temperature = 1.0 if self.temperature is None else self.temperature
        least = torch.finfo(wide.dtype).tiny  # below it a device may divide by zero
        # The largest becomes 0 first, so that an overflow gives minus infinity, never NaN.
        scaled = (wide - wide.amax(-1, keepdim=True)) / max(temperature, least)
        return self._kept(scaled).softmax(-1)

    def _kept(self, logits: Float[Tensor, "batch d_vocab"]) -> Float[Tensor, "batch d_vocab"]:
        """Return logits with minus infinity at tokens that top-k and top-p exclude."""
        if self.top_k is not None:
            least = logits.topk(min(self.top_k, logits.shape[-1])).values[:, -1:]
            logits = logits.masked_fill(logits < least, -torch.inf)
        if self.top_p is not None:
            ordered, order = logits.sort(descending=True)
            # A token stays while those before it hold less than top_p; the first always stays.
            probabilities = ordered.softmax(-1)
            outside = probabilities.cumsum(-1) - probabilities >= self.top_p
            logits = logits.masked_fill(outside.gather(1, order.argsort()), -torch.inf)
        return logits


class Draws:
    """Uniform numbers of a seed, a row and a step.

    Args:
        seed: any 64-bit integer.
    """

    AHEAD = 256
    """Number of steps whose random numbers are made at once."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._made: tuple[int, int, Tensor] | None = None

    def at(self, step: int, n_rows: int, device: torch.device) -> Float[Tensor, " row"]:
        """Return the numbers of one step, from 0 to below 1, for rows 0 to `n_rows` - 1."""
        start = step - step % self.AHEAD
        if self._made is None or self._made[:2] != (start, n_rows):
            steps = torch.arange(start, start + self.AHEAD)
            table = uniforms(self.seed, torch.arange(n_rows), steps)
            wide = torch.float32 if device.type == "mps" else torch.float64
            self._made = (start, n_rows, table.to(wide).to(device))
        return self._made[2][step - start]


def uniforms(
    seed: int, rows: Int[Tensor, " row"], steps: Int[Tensor, " step"]
) -> Float[Tensor, "step row"]:
    """Return a number in [0, 1) for each step of each row: SplitMix64, a stream for each row.

    A row's stream starts at the number at the row's index in the seed's stream.
    """
    starts = splitmix64(torch.tensor(seed), rows)
    bits = splitmix64(starts[None, :], steps[:, None])
    return _shifted(bits, 64 - BITS).double() / 2**BITS


def splitmix64(seed: Int[Tensor, ...], index: Int[Tensor, ...]) -> Int[Tensor, ...]:
    """Return the 64-bit number at an index of the stream of a seed, as signed integers.

    Source: G. Steele, D. Lea, C. Flood, "Fast Splittable Pseudorandom Number Generators", 2014.
    """
    x = seed + (index + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, n: int) -> Tensor:
    """Return 64-bit numbers shifted to the right, with zeros from the left."""
    return (x >> n) & ((1 << (64 - n)) - 1)


def _signed(x: int) -> int:
    return x - 2**64 if x >= 2**63 else x


def _at(
    uniform: Float[Tensor, " batch"], probabilities: Float[Tensor, "batch d_vocab"]
) -> Int[Tensor, " batch"]:
    """Return the first possible token at which the running sum passes the uniform share."""
    sums = probabilities.cumsum(-1)
    passed = (sums > uniform[:, None] * sums[:, -1:]) & (probabilities > 0)
    chosen = passed.int().argmax(-1)
    # If a device adds in another order, the last sum may not be the largest.
    return torch.where(passed.any(-1), chosen, probabilities.argmax(-1))
