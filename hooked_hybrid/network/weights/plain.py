"""Weights as plain numbers, whether stored plain or quantised (see `quantized`)."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

Stored = Tensor | nn.ParameterList
"""A weight as stored in a module: a tensor, or a list of the quantised matrices of a stack."""


def is_quantized(weight: Stored) -> bool:
    """Return whether a weight, or any matrix of a stack, is one of torchao's tensors."""
    if isinstance(weight, nn.ParameterList):
        return any(is_quantized(w) for w in weight)
    return type(weight).__module__.startswith("torchao.")


def as_matrix(weight: Stored) -> Tensor:
    """Return a weight as plain numbers; a quantised one is dequantised.

    It is dequantised at each call, to the dtype that the weight had before.
    """
    if isinstance(weight, nn.ParameterList):
        return torch.stack([as_matrix(w) for w in weight])
    if not is_quantized(weight):
        return weight
    read = getattr(weight, "get_original_weight", None) or weight.dequantize
    return read()


def stored_bytes(weights: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; a quantised one counts its integers and scales.

    For a whole model: `stored_bytes(model.parameters())`. A tensor on the meta device counts the
    bytes it would take.
    """
    return sum(sum(part.nbytes for part in _parts(w)) for w in weights)


def set_weight(model: nn.Module, name: str, weight: nn.Parameter | nn.ParameterList) -> None:
    """Put a weight where the model has the parameter of this name."""
    path, _, leaf = name.rpartition(".")
    module = model.get_submodule(path)
    if isinstance(weight, nn.ParameterList) or leaf not in module._parameters:
        delattr(module, leaf)  # torch puts no list where a parameter was
    setattr(module, leaf, weight)


def exact_copy(weight: Tensor) -> nn.Parameter:
    """Return a copy of a quantised weight, number for number.

    `clone` may differ: torchao's NF4 quantises the values again.
    """
    names, context = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    parts = {name: getattr(weight, name).clone() for name in names}
    copied = type(weight).__tensor_unflatten__(  # type: ignore[attr-defined]
        parts, context, weight.size(), weight.stride()
    )
    return nn.Parameter(copied, requires_grad=False)


def _parts(weight: Tensor) -> list[Tensor]:
    if not is_quantized(weight):
        return [weight]
    names, _ = weight.__tensor_flatten__()  # type: ignore[attr-defined]
    return [getattr(weight, name) for name in names]
