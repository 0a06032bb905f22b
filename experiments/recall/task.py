"""Key-value recall: facts among filler, then questions; the same seed gives the same sequences.

A sequence is `BOS filler.. KEY VALUE filler.. KEY VALUE filler.. ASK KEY VALUE KEY VALUE`: facts
are at random places, each question repeats the key of a different fact, and the model must give its
value. Source: multi-query associative recall (Arora et al. 2023, arXiv 2312.04927); here with
filler between facts, and all questions at the end.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

BOS, ASK, N_SPECIAL = 0, 1, 2


@dataclass(frozen=True)
class Task:
    """The length and content of a sequence.

    Args:
        length: tokens in all.
        n_facts: number of pairs of key and value.
        n_questions: number of questions at the end; None for one on each fact, at most 8.
        n_keys, n_values, n_filler: words of each sort.

    Raises:
        ValueError: more facts than keys or questions than facts, or no room for them.
    """

    length: int
    n_facts: int
    n_questions: int | None = None
    n_keys: int = 32
    n_values: int = 16
    n_filler: int = 16

    def __post_init__(self) -> None:
        if not 1 <= self.n_facts <= self.n_keys or not 1 <= self.asked <= self.n_facts:
            raise ValueError(
                f"n_facts={self.n_facts}, n_questions={self.asked}: give 1 to {self.n_keys} facts "
                "and at most as many questions"
            )
        if self.room < 2 * self.n_facts:
            raise ValueError(
                f"length={self.length} has no room for {self.n_facts} facts and {self.asked} "
                f"questions: give at least {2 + 2 * self.n_facts + 2 * self.asked}"
            )

    @property
    def asked(self) -> int:
        """Number of questions at the end of a sequence."""
        return min(self.n_facts, 8) if self.n_questions is None else self.n_questions

    @property
    def room(self) -> int:
        """Tokens between BOS and ASK."""
        return self.length - 2 - 2 * self.asked

    @property
    def d_vocab(self) -> int:
        """Tokens of the vocabulary."""
        return N_SPECIAL + self.n_keys + self.n_values + self.n_filler

    @property
    def first_value(self) -> int:
        """The token id of value 0; the other values follow."""
        return N_SPECIAL + self.n_keys


@dataclass(frozen=True)
class RecallBatch:
    """Sequences, with the positions of their facts and questions.

    `keys` contains the positions of the facts' keys (the value is one further), in the order of the
    sequence; `questions` those of the questions' keys; `asks` the index of each question's fact.
    """

    tokens: Int[Tensor, "batch pos"]
    keys: Int[Tensor, "batch fact"]
    questions: Int[Tensor, " question"]
    asks: Int[Tensor, "batch question"]

    @property
    def answers(self) -> Int[Tensor, "batch question"]:
        """The answers to the questions, as token ids."""
        return self.tokens[:, self.questions + 1]

    @property
    def distances(self) -> Int[Tensor, "batch question"]:
        """Tokens from the value of a fact to the question's key."""
        return self.questions - (self.keys + 1).gather(1, self.asks)


def draw(task: Task, batch: int, seed: int) -> RecallBatch:
    """Return a batch of the task, which the seed determines."""
    rng = torch.Generator().manual_seed(seed)
    filler = task.first_value + task.n_values
    tokens = torch.randint(filler, filler + task.n_filler, (batch, task.length), generator=rng)
    tokens[:, 0], tokens[:, 1 + task.room] = BOS, ASK
    keys = 1 + _places(task, batch, rng)
    names = N_SPECIAL + _some(batch, task.n_keys, task.n_facts, rng)
    values = task.first_value + torch.randint(task.n_values, (batch, task.n_facts), generator=rng)
    tokens.scatter_(1, keys, names).scatter_(1, keys + 1, values)
    asks = _some(batch, task.n_facts, task.asked, rng)
    questions = torch.arange(2 + task.room, task.length, 2)
    tokens[:, questions] = names.gather(1, asks)
    tokens[:, questions + 1] = values.gather(1, asks)
    return RecallBatch(tokens, keys, questions, asks)


@dataclass(frozen=True)
class Drill:
    """Sequences of pairs only, with each fact many times; `asked` marks repeated keys."""

    tokens: Int[Tensor, "batch two_pairs"]
    asked: Bool[Tensor, "batch pair"]


def drill(task: Task, batch: int, n_pairs: int, seed: int) -> Drill:
    """Return `KEY VALUE KEY VALUE ..`, the facts of a sequence in random order, repeated.

    It teaches a model to bind values to keys within some hundred steps; from `draw` alone, with one
    question a fact, small models only learn that the answer is some value of the sequence.
    """
    rng = torch.Generator().manual_seed(seed)
    names = N_SPECIAL + _some(batch, task.n_keys, task.n_facts, rng)
    values = task.first_value + torch.randint(task.n_values, (batch, task.n_facts), generator=rng)
    which = torch.randint(task.n_facts, (batch, n_pairs), generator=rng)
    tokens = torch.stack([names.gather(1, which), values.gather(1, which)], dim=-1).flatten(1)
    same = which[:, :, None] == which[:, None, :]
    return Drill(tokens, same.tril(-1).any(dim=-1))


def _places(task: Task, batch: int, rng: torch.Generator) -> Int[Tensor, "batch fact"]:
    """Return the positions of pairs without overlap; every arrangement is equally likely."""
    free = task.room - task.n_facts  # as if each pair took one token
    first, _ = _some(batch, free, task.n_facts, rng).sort(dim=1)
    return first + torch.arange(task.n_facts)


def _some(batch: int, n: int, chosen: int, rng: torch.Generator) -> Int[Tensor, "batch chosen"]:
    """Return different numbers below n for each row, in random order."""
    return torch.rand(batch, n, generator=rng).argsort(dim=1)[:, :chosen]
