"""Numbers of heads of a published model, as a share of another model's heads."""

from __future__ import annotations

FEW = (0, 1, 2)
"""Heads kept in the papers' maps with the context given twice, compared with all heads.
"""
TWICE_AT = ((2, 10), (2, 16), (2, 32))
"""Heads, and of how many, in the papers' claims about a second reading."""
TOLERANCE = 0.25
"""Largest distance of a share of the heads from a whole number."""


def nearest(k: int, of: int, n_heads: int) -> int:
    """Return the number of `n_heads` heads nearest to `k` of `of`: 1 or more, unless `k` is 0."""
    return 0 if k == 0 else max(1, int(k * n_heads / of + 0.5))


def share(k: int, of: int, n_heads: int) -> int | None:
    """Return the number of `n_heads` heads that is the share `k / of`, or None.

    It is None if the share is more than `TOLERANCE` from a whole number, or is that of 0 heads.
    """
    exact, found = k * n_heads / of, nearest(k, of, n_heads)
    return found if abs(exact - found) <= TOLERANCE else None


def head_counts(first: int, last: int, of: int, n_heads: int) -> list[int]:
    """Return the numbers of `n_heads` heads with a share from `first / of` to `last / of`."""
    return [k for k in range(n_heads + 1) if first * n_heads <= k * of <= last * n_heads]


def few_heads(n_heads: int) -> list[int]:
    """Return the numbers of heads kept with the context given twice: `FEW`, and those in claims."""
    asked = (share(k, of, n_heads) for k, of in TWICE_AT)
    return sorted({k for k in (*FEW, *asked) if k is not None and k < n_heads})
