"""Stand-ins of mamba-ssm and causal-conv1d: plain torch behind the checks of their kernels.

As in the packages, an autograd function calls a compiled forward and a compiled backward pass, of
which autograd sees nothing: a backward pass that makes a graph gives gradients without one. The
checks are those of csrc/selective_scan/selective_scan.cpp (mamba-ssm 2.3.2) and
csrc/causal_conv1d.cpp (causal-conv1d 1.7).
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor

calls: Counter[str] = Counter()
HALF_OR_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
ALIGNED = 16  # bytes


# --- causal-conv1d --------------------------------------------------------------------------------


def _is_channels_last(x: Tensor) -> bool:
    return x.stride(1) == 1 and x.stride(2) > 1


def _check_convolution(x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor) -> None:
    (batch, channels, _), width = x.shape, weight.shape[1]
    assert x.dtype in HALF_OR_SINGLE and weight.shape == (channels, width) and 2 <= width <= 4
    assert _is_channels_last(x), "states are only supported for the channel last layout"
    assert channels % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0, x.stride()
    assert x.data_ptr() % ALIGNED == 0 and initial.data_ptr() % ALIGNED == 0
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(0) == 1)
    assert initial.dtype == x.dtype and initial.shape == (batch, channels, width - 1)
    assert initial.stride(1) == 1


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, initial: Tensor
    ) -> tuple[Tensor, Tensor]:
        calls["causal-conv1d forward"] += 1
        _check_convolution(x, weight, bias, initial)
        both, length = torch.cat([initial, x], dim=2).float(), x.shape[2]
        taps = weight.float().unbind(1)
        y = sum(both[:, :, i : i + length] * tap[:, None] for i, tap in enumerate(taps))
        if bias is not None:
            y = (y.mT + bias.float()).mT  # no view of a parameter: inference mode would refuse it
        ctx.save_for_backward(x, weight, bias, initial)
        out = torch.empty_like(x)  # channels last, as x
        after = both[:, :, length:].mT.contiguous().mT.to(x.dtype)
        return out.copy_(y), after

    @staticmethod
    def backward(ctx: Any, dout: Tensor, dafter: Tensor) -> tuple[Tensor | None, ...]:
        with torch.no_grad():  # compiled
            calls["causal-conv1d backward"] += 1
            x, weight, bias, initial = ctx.saved_tensors
            assert dout.shape == x.shape and dafter.dtype == x.dtype
            both, length = torch.cat([initial, x], dim=2).float(), x.shape[2]
            dout, by_both, by_weight = dout.float(), torch.zeros_like(both), []
            for i, tap in enumerate(weight.float().unbind(1)):
                here = slice(i, i + length)
                by_both[:, :, here] += dout * tap[:, None]
                by_weight.append((dout * both[:, :, here]).sum((0, 2)))
            by_both[:, :, length:] += dafter.float()
            n = initial.shape[2]
            return (
                by_both[:, :, n:].to(x.dtype),
                torch.stack(by_weight, 1).to(weight.dtype),
                None if bias is None else dout.sum((0, 2)).to(bias.dtype),
                by_both[:, :, :n].to(x.dtype),
            )


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: None = None,
    activation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d.causal_conv1d_fn`, with the initial and final states that are always given."""
    assert seq_idx is None and final_states_out is None and activation is None
    assert initial_states is not None and return_final_states
    given = (x, weight, bias, initial_states)
    if not torch.is_grad_enabled():
        return _Convolution.forward(_Nothing(), *given)
    y, after = _Convolution.apply(*given)
    return y, after


class _Nothing:
    """A context of a function that keeps nothing."""

    def save_for_backward(self, *_: Any) -> None:
        pass


# --- mamba-ssm ------------------------------------------------------------------------------------


def _check_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> None:
    (batch, channels, length), d_state = u.shape, A.shape[1]
    assert u.dtype in HALF_OR_SINGLE and A.dtype == torch.float32
    assert delta.dtype == u.dtype == B.dtype == C.dtype
    assert delta.shape == u.shape and A.shape == (channels, d_state) and d_state <= 256
    assert B.shape == C.shape == (batch, d_state, length)
    for t in (u, delta, B, C):  # the Python half makes them so
        t = t if t.stride(-1) == 1 else t.contiguous()
        assert t.stride(-1) == 1 or length == 1


def _states(u: Tensor, delta: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    """Return decays and states [batch channel pos d_state]."""
    decay = torch.exp(delta[..., None] * A[:, None])
    write = delta[..., None] * B.mT[:, None] * u[..., None]
    h, states = torch.zeros_like(write[:, :, 0]), []
    for a, x in zip(decay.unbind(2), write.unbind(2), strict=True):
        h = a * h + x
        states.append(h)
    return decay, torch.stack(states, dim=2)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor
    ) -> tuple[Tensor, Tensor]:
        calls["mamba-ssm forward"] += 1
        _check_scan(u, delta, A, B, C)
        ctx.save_for_backward(u, delta, A, B, C)
        _, states = _states(u, delta, A, B)
        last = states[:, :, -1].clone()
        ctx.mark_non_differentiable(last)
        return (states * C.mT[:, None]).sum(-1), last

    @staticmethod
    def backward(ctx: Any, dout: Tensor, _: Tensor) -> tuple[Tensor, ...]:
        with torch.no_grad():  # compiled
            calls["mamba-ssm backward"] += 1
            u, delta, A, B, C = ctx.saved_tensors
            decay, states = _states(u, delta, A, B)
            before = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], dim=2)
            totals, g = [], torch.zeros_like(states[:, :, 0])
            for t in reversed(range(u.shape[2])):
                total = dout[:, :, t, None] * C[:, None, :, t] + g
                totals.append(total)
                g = decay[:, :, t] * total
            total = torch.stack(totals[::-1], dim=2)
            by_exponent, Bt = total * before * decay, B.mT[:, None]
            return (
                (total * delta[..., None] * Bt).sum(-1),
                (total * Bt * u[..., None]).sum(-1) + (by_exponent * A[:, None]).sum(-1),
                (by_exponent * delta[..., None]).sum((0, 2)),
                (total * (delta * u)[..., None]).sum(1).mT,
                (states * dout[..., None]).sum(1).mT,
            )


def selective_scan_fn(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: None = None,
    z: None = None,
    delta_bias: None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
) -> Any:
    """`mamba_ssm.ops.selective_scan_interface.selective_scan_fn`; the state has no gradient."""
    assert D is None and z is None and delta_bias is None and not delta_softplus
    y, last = _Scan.apply(u, delta, A, B, C)
    return (y, last) if return_last_state else y
