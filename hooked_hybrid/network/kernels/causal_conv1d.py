"""The causal convolution by the CUDA kernels of causal-conv1d, which are differentiable once."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.hooks import transforms
from hooked_hybrid.network.kernels import importable, need_gradients
from hooked_hybrid.network.kernels.trials import Pair, gradients_of, waves, works
from hooked_hybrid.network.kernels.twice import twice_differentiable

MODULE = "causal_conv1d"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (2, 3, 4)
CHANNELS = 8  # channels and the other axes' strides must be multiples of this
VECTOR = 16  # bytes read at once; addresses must be aligned to it


def usable(u: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Return whether `convolve` accepts these; rows must have no padding and one document each."""
    floats = (u, state, weight, *(() if bias is None else (bias,)))
    return (
        all(t.is_cuda and t.device == u.device and t.dtype == u.dtype for t in floats)
        and u.dtype in DTYPES
        and weight.shape[0] in WIDTHS
        and u.shape[2] % CHANNELS == 0
        and u.numel() > 0
        and not transforms.are_active()
        and importable(MODULE)
        and _works(u, need_gradients(*floats))
    )


def convolve(
    u: Float[Tensor, "batch pos channel"],
    state: Float[Tensor, "batch tap channel"],
    weight: Float[Tensor, "d_conv channel"],
    bias: Float[Tensor, " channel"] | None,
) -> tuple[Float[Tensor, "batch pos channel"], Float[Tensor, "batch tap channel"]]:
    """Return `b + sum_j w_j u_{t-j}` and the last inputs, which later positions need.

    The fast version of `layers.CausalConv1d` for plain rows. It sums in fp32 and rounds once, while
    the definition rounds after every tap, so half-precision results differ by a rounding. First
    derivatives are the package's, second derivatives the definition's.

    Args:
        u: new inputs.
        state: the `d_conv - 1` inputs before them.
        weight: taps, oldest first.
        bias: added to each channel.

    Source: `causal_conv1d_fn` of causal-conv1d 1.7; states need its layout with channels last.
    """
    from causal_conv1d import causal_conv1d_fn

    y, after = causal_conv1d_fn(
        _channels_last(u).transpose(1, 2),
        weight.T,
        bias,
        initial_states=_channels_last(state).transpose(1, 2),
        return_final_states=True,
        activation=None,
    )
    y, after = twice_differentiable(
        (y.transpose(1, 2), after.transpose(1, 2)), _definition, (u, state, weight, bias)
    )
    return y, after


def _definition(
    u: Tensor, state: Tensor, weight: Tensor, bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute the same as `convolve`, tap by tap."""
    inputs = torch.cat([state, u], dim=1)
    y = torch.zeros_like(u) if bias is None else bias.expand_as(u)
    for tap, w in enumerate(weight):
        y = torch.addcmul(y, inputs[:, tap : tap + u.shape[1]], w)
    return y, inputs[:, u.shape[1] :]


def _works(u: Tensor, with_gradients: bool) -> bool:
    name, trial = "causal-conv1d", _trial
    if with_gradients:
        name, trial = "causal-conv1d (with gradients)", _trial_of_gradients
    return works(name, trial, u.device, u.dtype)


def _inputs(device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((2, 5, 16), (2, 3, 16), (4, 16), (16,))
    return [waves(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)]


def _trial(device: torch.device, dtype: torch.dtype) -> Pair:
    inputs = _inputs(device, dtype)
    return convolve(*inputs), _definition(*inputs)


def _trial_of_gradients(device: torch.device, dtype: torch.dtype) -> Pair:
    inputs = [t.requires_grad_() for t in _inputs(device, dtype)]
    return gradients_of((convolve(*inputs), _definition(*inputs)), inputs)


def _channels_last(x: Tensor) -> Tensor:
    """Return `x`, copied unless the kernels can read its memory layout."""
    outer = x.stride()[:2]
    if (
        x.stride(2) == 1
        and all(n > 1 and n % CHANNELS == 0 for n in outer)
        and x.data_ptr() % VECTOR == 0
    ):
        return x
    return x.clone(memory_format=torch.contiguous_format)
