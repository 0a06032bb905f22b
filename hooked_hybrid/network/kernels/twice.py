"""Second derivatives, by the definition, of kernels that have only first ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid.network.weights.products import in_own_dtype

Outputs = tuple[Tensor, ...]
Definition = Callable[..., Outputs]


def twice_differentiable(
    outputs: Outputs, definition: Definition, inputs: Sequence[Tensor | None]
) -> Outputs:
    """Return `outputs`, which a kernel computed, with differentiable gradients.

    An ordinary backward pass is the kernel's. With `create_graph` the same gradients are computed
    by
    the definition, whose operations can be differentiated again: autograd treats a compiled
    backward pass as a constant, so second derivatives through it would be silently wrong.

    Args:
        outputs: of the kernel, with its graph.
        definition: computes the same from `inputs`, in plain torch.
        inputs: the kernel's inputs.
    """
    if not any(t.requires_grad for t in outputs):
        return outputs
    return tuple(_Twice.apply(definition, len(outputs), *outputs, *inputs))


class _Twice(torch.autograd.Function):
    """The identity on outputs. Its gradient goes to the kernel, or directly to the inputs."""

    @staticmethod
    def forward(ctx: Any, definition: Definition, n: int, *tensors: Tensor | None) -> Outputs:
        ctx.definition, ctx.n = definition, n
        ctx.save_for_backward(*tensors[n:])
        ctx.set_materialize_grads(False)
        given = [t for t in tensors[:n] if t is not None]
        outputs = tuple(t.detach() for t in given)  # no views: a hook may edit them in place
        ctx.mark_non_differentiable(
            *(t for t, before in zip(outputs, given, strict=True) if not before.requires_grad)
        )
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return (None, None, *grads, *(None for _ in inputs))
        nothing = (None for _ in grads)
        return (None, None, *nothing, *_gradients(ctx.definition, inputs, grads))


def _gradients(
    definition: Definition, inputs: Sequence[Tensor | None], grads: Sequence[Tensor | None]
) -> list[Tensor | None]:
    """Return gradients of the inputs, with a graph."""
    # New views, as one input may depend on another, and that path is not the kernel's.
    here = [None if t is None else t.view_as(t) for t in inputs]
    wanted = [t for t in here if t is not None and t.requires_grad]
    given = next(g for g in grads if g is not None)
    with in_own_dtype(given.device):
        pairs = [(y, g) for y, g in zip(definition(*here), grads, strict=True) if g is not None]
        found = iter(
            torch.autograd.grad(
                [y for y, _ in pairs],
                wanted,
                [g for _, g in pairs],
                create_graph=True,
                allow_unused=True,
            )
        )
    return [next(found) if t is not None and t.requires_grad else None for t in here]
