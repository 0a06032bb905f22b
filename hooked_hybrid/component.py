"""The base of every part of a model: a `torch.nn.Module` that costs no more than its forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module


class Component(nn.Module):
    """A module whose call is its forward, unless torch's own hooks are registered on it.

    A step of decoding calls some hundred modules, and torch's way there costs as much as a small
    operation each time.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `forward(*args, **kwargs)`, by way of torch's own hooks where there are any."""
        if (
            self._forward_hooks
            or self._forward_pre_hooks
            or self._backward_hooks
            or self._backward_pre_hooks
            or torch_module._has_any_global_hook()
        ):
            return _unshared(super().__call__(*_unshared(args), **kwargs))
        return self.forward(*args, **kwargs)


def _unshared(value: Any) -> Any:
    """Return copies of tensors that torch's hooks may have kept: the others may be overwritten."""
    if torch.is_grad_enabled():  # then nothing is
        return value
    if type(value) is tuple:
        return tuple(_unshared(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value
