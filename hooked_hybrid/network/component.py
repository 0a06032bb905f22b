"""The base class of all parts of a model: a `torch.nn.Module` with cheap calls."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from hooked_hybrid.hooks import transforms
from hooked_hybrid.network.weights.layout import laid_out
from hooked_hybrid.network.weights.plain import is_quantized


class Component(nn.Module):
    """A module whose call runs `forward` directly, unless torch's own hooks are registered on it.

    A decoding step calls a hundred or more modules, and each call by `nn.Module.__call__` costs as
    much as a small operation.
    """

    matrices: tuple[str, ...] = ()
    """Weights [... d_out d_in] whose memory layout `weights.layout.laid_out` chooses."""

    def _apply(self, fn: Any, recurse: bool = True) -> Component:
        """Convert or move parameters, and lay matrices out for their new dtype."""
        super()._apply(fn, recurse)
        for name in self.matrices:
            weight = self._parameters.get(name)
            if weight is not None and not is_quantized(weight):
                weight.data = laid_out(weight.data)
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        """Put weights into a state dict, transposed ones as contiguous copies.

        Formats such as safetensors need contiguous tensors. The copies are read-only: a write would
        not reach the model, so torch raises.
        """
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in () if keep_vars else self.matrices:
            weight = destination.get(prefix + name)
            if weight is None or is_quantized(weight) or weight.is_contiguous():
                continue
            with torch.inference_mode():
                destination[prefix + name] = weight.contiguous()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *args: Any
    ) -> None:
        """Copy weights from a state dict; with `assign`, use its tensors, laid out."""
        for name in self.matrices if local_metadata.get("assign_to_params_buffers") else ():
            weight = state_dict.get(prefix + name)
            if isinstance(weight, Tensor) and not is_quantized(weight):
                taken = laid_out(weight.detach())
                state_dict[prefix + name] = taken.clone() if taken.is_inference() else taken
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *args)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return `forward(*args, **kwargs)`, with torch's own hooks if there are any."""
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
    """Return copies of tensors that torch's hooks may have kept; others may be overwritten."""
    if transforms.is_followed():  # then nothing is overwritten
        return value
    if type(value) is tuple:
        return tuple(_unshared(part) for part in value)
    return value.clone() if isinstance(value, Tensor) else value
