"""The forms in which torch's fused attention is asked on a GPU give what the definition gives.

Here a CPU's kernel answers, in the form that a GPU would be given; which of CUDA's kernels would
answer is given by the rules that torch chooses by (ATen/native/transformers/cuda/sdp_utils.cpp).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid.network.attention import attend
from hooked_hybrid.network.attention.attend import Sight, attend_fused, attend_whole
from hooked_hybrid.network.kernels import fused_attention
from hooked_hybrid.network.kernels.fused_attention import Call, block_length
from tests.loops import looped
from tests.models import random_model, random_tokens, relative
from tests.network.test_attend import (
    FP64_PARITY,
    HEADS,
    LAYOUTS,
    WINDOWS,
    case,
    griffin_config,
    no_hooks,
    queries_keys_values,
)
from tests.pretended_gpu.backends import backend

layouts = pytest.mark.parametrize("layout", LAYOUTS)
windows = looped("window", WINDOWS)


@pytest.fixture
def calls(monkeypatch) -> list[dict[str, Any]]:
    """Give attention the form of a GPU, and return what torch's kernel is then asked."""
    asked: list[dict[str, Any]] = []
    real: Callable[..., Tensor] = torch.nn.functional.scaled_dot_product_attention

    def noting(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        asked.append({"q": q, "k": k, "v": v, **options})
        return real(q, k, v, **options)

    monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", noting)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    yield asked
    assert torch.backends.cuda.cudnn_sdp_enabled()


def taken(call: dict[str, Any], dtype: torch.dtype, capability: tuple[int, int] = (9, 0)) -> str:
    """Return which of CUDA's kernels would answer a call in this dtype."""
    q, k, v = (call[name].to(dtype) for name in "qkv")
    mask = call.get("attn_mask")
    is_causal, gqa = call.get("is_causal", False), call.get("enable_gqa", False)
    return backend(q, k, v, mask, is_causal, gqa, capability, cudnn=False)


def derivatives(z: Tensor, leaves: list[Tensor], real: Tensor) -> list[Tensor]:
    """Return z, its first derivatives and second ones, at real tokens."""
    first = torch.autograd.grad(z[real].sin().sum(), leaves, create_graph=True)
    of_these = sum((g * g.detach().cos()).sum() + g.square().sum() for g in first)
    return [z[real], *first, *torch.autograd.grad(of_these, leaves)]


@layouts
@windows
@looped("heads", HEADS)
def test_values_and_derivatives_are_the_definitions(calls, monkeypatch, layout, window, heads):
    calls.clear()
    monkeypatch.setattr(fused_attention, "BLOCK", 5)
    where = case(layout, 13, 3, *WINDOWS[window])
    inputs = queries_keys_values(where.sight, heads, torch.float64)
    leaves, real = [t.requires_grad_() for t in inputs], where.sight.layout.is_real
    found = derivatives(attend_fused(*leaves, where.sight), leaves, real)
    expected = derivatives(attend_whole(*leaves, where.sight, no_hooks()), leaves, real)
    for a, b in zip(found, expected, strict=True):
        assert relative(a, b) < 10 * FP64_PARITY
    assert calls and not any(call.get("enable_gqa") for call in calls)


@layouts
@windows
@looped("heads", HEADS)
@looped("length", [1, 13])
def test_no_call_is_answered_by_cudnn_or_unfused(calls, layout, window, heads, length):
    """In half precision and in fp32, on A100 and on Hopper: fp64 alone is not fused on CUDA."""
    calls.clear()
    where = case(layout, length, 3, *WINDOWS[window])
    with torch.no_grad():
        attend_fused(*queries_keys_values(where.sight, heads), where.sight)
    for call in calls:
        for capability in ((8, 0), (9, 0)):
            assert taken(call, torch.float64, capability) == "math"
            assert taken(call, torch.float32, capability) == "efficient"
            is_masked = call.get("attn_mask") is not None
            wanted = "efficient" if is_masked else "flash"
            assert taken(call, torch.bfloat16, capability) == wanted


@pytest.mark.parametrize("heads", HEADS)
def test_the_first_piece_of_rows_without_padding_is_given_no_mask(calls, heads):
    def masks(*where: Any) -> list[bool]:
        calls.clear()
        sight: Sight = case(*where).sight
        with torch.no_grad():
            attend_fused(*queries_keys_values(sight, heads), sight)
        return [call.get("attn_mask") is not None for call in calls]

    assert masks("plain", 13, 2, None, 0) == masks("plain", 13, 2, 13, 0) == [False]
    assert masks("plain", 13, 2, 40, 0) == [False]
    assert masks("plain", 13, 2, 12, 0) == [True]  # its window is shorter
    assert masks("plain", 13, 2, None, 5) == [True]  # keys before it
    assert masks("left", 13, 2, None, 0) == masks("packed", 13, 2, None, 0) == [True]
    assert masks("plain", 1, 2, None, 5) == [False]  # a step sees all


def test_a_long_sequence_with_a_window_is_cut_with_gradients_too(calls, monkeypatch):
    monkeypatch.setattr(fused_attention, "BLOCK", 4)
    where = case("plain", 13, 1, 5, 0)
    inputs = queries_keys_values(where.sight, "GQA", torch.float64)
    attend_fused(*(t.requires_grad_() for t in inputs), where.sight)
    assert [call["k"].shape[2] for call in calls] == [4, 8, 8, 5]
    assert [call.get("is_causal", False) for call in calls] == [True, False, False, False]


def test_kernels_that_a_user_has_put_off_stay_off(calls):
    where = case("left", 5, 2, None, 0)
    inputs = queries_keys_values(where.sight, "GQA")
    torch.backends.cuda.enable_cudnn_sdp(False)
    torch.backends.cuda.enable_flash_sdp(False)
    try:
        attend_fused(*inputs, where.sight)
        assert not torch.backends.cuda.flash_sdp_enabled()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)
        torch.backends.cuda.enable_flash_sdp(True)


def test_the_options_of_fused_attention_on_a_cpu_are_as_before(monkeypatch):
    asked = []
    real = torch.nn.functional.scaled_dot_product_attention

    def noting(*tensors: Tensor, **options: Any) -> Tensor:
        asked.append(options)
        return real(*tensors, **options)

    monkeypatch.setattr(fused_attention, "scaled_dot_product_attention", noting)
    model = random_model(griffin_config("RA", n_kv_heads=1))
    tokens = random_tokens(1, 5)
    residual = model(tokens, stop_at_layer=0).requires_grad_()
    model(residual, start_at_layer=0).sum().backward()
    assert [{*options} for options in asked] == [{"attn_mask", "enable_gqa"}]
    with torch.no_grad():
        model.generate(tokens, 3, verbose=False)
    assert asked[1:] == [{}, {}]  # a step: no mask, the heads of a group as queries


# --- what is kept in memory -----------------------------------------------------------------------


def call(**changes: Any) -> Call:
    sizes: dict[str, Any] = {"rows": 2, "mask_rows": 1, "queries": 30, "keys": 50, "n_heads": 8}
    sizes |= {"n_kv_heads": 2, "d_head": 64, "dtype": torch.float32, "on_gpu": True}
    return Call(**{**sizes, **changes})


def test_bytes_of_a_call_by_hand():
    pairs = 30 * 50
    assert call().n_bytes(is_causal=False) == 4 * pairs * (1 + 4)  # one mask for each of a group
    assert call().n_bytes(is_causal=True) == 0
    assert call(mask_rows=2, dtype=torch.bfloat16).n_bytes(False) == 2 * 4 * pairs * (1 + 2)
    assert call(on_gpu=False).n_bytes(False) == call(on_gpu=False).n_bytes(True) == pairs * 5
    scores = 2 * 2 * 8 * pairs  # scores and patterns of both rows and all heads
    assert call(dtype=torch.float64).n_bytes(True) == scores * 8
    assert call(dtype=torch.bfloat16, d_head=20).n_bytes(True) == scores * 4
    assert not call(on_gpu=False, dtype=torch.float64).is_unfused and not call().is_unfused


@looped("dtype", [torch.float32, torch.bfloat16, torch.float64])
@looped("d_head", [4, 8, 12, 64, 128, 256])
@looped("window", ["window", "no window", "window, some keys cached"])
def test_what_counts_as_unfused_is_what_torch_has_no_kernel_for(calls, dtype, d_head, window):
    calls.clear()
    sight = case("plain", 13, 1, *WINDOWS[window]).sight
    with torch.no_grad():
        attend_fused(*queries_keys_values(sight, "GQA", d_head=d_head), sight)
    is_unfused = call(dtype=dtype, d_head=d_head).is_unfused
    for each in calls:
        if each.get("attn_mask") is not None:
            assert (taken(each, dtype) == "math") == is_unfused
        elif is_unfused:  # flash may still take it: counted all the same
            assert taken(each, dtype) in ("math", "flash")


def test_blocks_of_each_device():
    with torch.no_grad():
        assert block_length(5000, 2048, True) == block_length(5000, 2048, False) == 1024
        assert block_length(5000, None, True) == 5000
    with torch.enable_grad():
        assert block_length(5000, 2048, True) == 1024
        assert block_length(5000, 2048, False) == 5000
    assert attend.BLOCK == 64
