"""How much a circuit from token to token keeps tokens apart: scores of its diagonal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.network.weights.factored import FactoredMatrix

Kind = Literal["eigenvalues", "rank", "top1"]

ENTRIES_AT_ONCE = 2**24
"""Entries of a circuit from token to token that are made at a time."""


def centre(circuit: FactoredMatrix) -> FactoredMatrix:
    """Return a circuit whose rows and columns have their means taken out.

    A softmax ignores what is the same for all keys of a query, or for all logits; what is the same
    for all queries, or for all tokens attended to, does not tell tokens apart. One large direction
    that all tokens share would otherwise decide the eigenvalues.
    """
    A, B = circuit.A, circuit.B
    return FactoredMatrix(A - A.mean(-2, keepdim=True), B - B.mean(-1, keepdim=True))


def eigenvalue_score(circuit: FactoredMatrix) -> Float[Tensor, "*matrix"]:
    """Return the sum of the eigenvalues over the sum of their absolute values; 0 where all are 0.

    1 where all are positive, as of a matrix that maps directions to themselves. A ValueError where
    rows and columns differ in number.
    """
    eigenvalues = circuit.eigenvalues
    total = eigenvalues.abs().sum(-1)
    return torch.where(total > 0, eigenvalues.real.sum(-1) / total, 0)


def rank_score(circuit: FactoredMatrix) -> Float[Tensor, "*matrix"]:
    """Return the mean fraction of a row's other entries that lie below the diagonal's.

    Ties count half; 1 where each diagonal entry is the largest of its row.
    """
    others = max(circuit.rdim - 1, 1)

    def below(rows: Tensor, own: Tensor) -> Tensor:
        lower, equal = (rows < own).sum(-1), (rows == own).sum(-1) - 1
        return (lower + equal / 2) / others

    return _mean_over_rows(circuit, below)


def top1_score(circuit: FactoredMatrix) -> Float[Tensor, "*matrix"]:
    """Return the fraction of rows whose diagonal entry is larger than every other."""
    return _mean_over_rows(circuit, lambda rows, own: ((rows >= own).sum(-1) == 1).to(rows.dtype))


def _mean_over_rows(
    circuit: FactoredMatrix, of_rows: Callable[[Tensor, Tensor], Tensor]
) -> Float[Tensor, "*matrix"]:
    """Return the mean over rows of a function of (rows, their diagonal entries), some at a time."""
    total = torch.zeros(circuit.shape[:-2], dtype=circuit.A.dtype, device=circuit.A.device)
    n = circuit.ldim
    step = max(1, ENTRIES_AT_ONCE // (max(1, total.numel()) * circuit.rdim))
    for start in range(0, n, step):
        rows = circuit[..., start : start + step, :].AB
        index = torch.arange(start, start + rows.shape[-2], device=rows.device)
        own = rows.gather(-1, index.expand(rows.shape[:-1])[..., None])
        total += of_rows(rows, own).sum(-1)
    return total / n


SCORES: dict[str, Callable[[FactoredMatrix], Tensor]] = {
    "eigenvalues": eigenvalue_score,
    "rank": rank_score,
    "top1": top1_score,
}


def score_of(kind: Kind, centred: bool = True) -> Callable[[FactoredMatrix], Tensor]:
    """Return the function that scores a circuit; a ValueError names the kinds."""
    if kind not in SCORES:
        raise ValueError(f"kind={kind!r}: give one of {sorted(SCORES)}")
    score = SCORES[kind]
    return (lambda circuit: score(centre(circuit))) if centred else score
