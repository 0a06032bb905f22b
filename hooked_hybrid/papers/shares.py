"""A number of heads of a published model, as a share of another model's heads."""

from __future__ import annotations

FEW = (0, 1, 2)
"""Heads kept where the context is given twice, compared with all of them: the papers' maps."""
TWICE_AT = ((2, 10), (2, 16), (2, 32))
"""Heads, and of how many, that the papers' claims about a second reading name."""
TOLERANCE = 0.25
"""How far a share of the heads may be from a whole number of them."""


def nearest(k: int, of: int, n_heads: int) -> int:
    """Return the number of `n_heads` heads nearest to `k` of `of`: 1 or more, unless `k` is 0."""
    return 0 if k == 0 else max(1, int(k * n_heads / of + 0.5))


def share(k: int, of: int, n_heads: int) -> int | None:
    """Return the number of `n_heads` heads that is `k` of `of`, None where none is.

    None is within `TOLERANCE` where the share is that far from a whole number, or is none at all.
    """
    exact, found = k * n_heads / of, nearest(k, of, n_heads)
    return found if abs(exact - found) <= TOLERANCE else None


def head_counts(first: int, last: int, of: int, n_heads: int) -> list[int]:
    """Return the numbers of `n_heads` heads that are `first` of `of` or more, `last` or fewer."""
    return [k for k in range(n_heads + 1) if first * n_heads <= k * of <= last * n_heads]


def few_heads(n_heads: int) -> list[int]:
    """Return the heads kept when the context is given twice: `FEW`, and those in claims."""
    asked = (share(k, of, n_heads) for k, of in TWICE_AT)
    return sorted({k for k in (*FEW, *asked) if k is not None and k < n_heads})
