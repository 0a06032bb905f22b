"""Metrics of patching: a number for the logits, and its scale between two runs."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.shapes import Logits

Metric = Callable[[Logits], Tensor]
"""From logits [batch pos d_vocab] to a number [], or to one for each row [batch]."""


def measure(metric: Metric, logits: Logits) -> Float[Tensor, "*batch"]:
    """Return the metric of some logits.

    Raises:
        ValueError: it is neither a number nor one for each row.
    """
    value = metric(logits)
    if not isinstance(value, Tensor) or value.shape not in ((), logits.shape[:1]):
        shown = tuple(value.shape) if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the metric gave {shown}: return a tensor [] or [batch], here [{logits.shape[0]}]"
        )
    return value


def normalised(metric: Metric, clean_logits: Logits, corrupted_logits: Logits) -> Metric:
    """Return the metric on a scale where the corrupted run is 0 and the clean run is 1.

    Args:
        metric: of the logits; with a value for each row, each is scaled for its row.
        clean_logits, corrupted_logits: of the two runs.

    Raises:
        ValueError: the two runs have the same value, in some row.

    Examples:
        >>> other = model(riga)
        >>> scaled = analysis.normalised(metric, logits, other)
        >>> scaled(logits).item(), scaled(other).item()
        (1.0, 0.0)
    """
    with torch.no_grad():
        low, high = measure(metric, corrupted_logits), measure(metric, clean_logits)
    if bool((low == high).any()):
        raise ValueError(
            f"the clean run has a metric of {high.tolist()}, the corrupted one of {low.tolist()}: "
            "there is no scale between equal values"
        )
    return lambda logits: (metric(logits) - low) / (high - low)
