"""Which of CUDA's attention kernels torch takes: ATen/native/transformers/cuda/sdp_utils.cpp."""

from __future__ import annotations

import torch
from torch import Tensor

HALF = torch.float16, torch.bfloat16


def backend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    is_causal: bool = False,
    gqa: bool = False,
    capability: tuple[int, int] = (9, 0),
    cudnn: bool | None = None,
) -> str:
    """Return "cudnn", "flash", "efficient" or "math", as torch 2.13 chooses.

    Args:
        q, k, v, mask, is_causal, gqa: what `scaled_dot_product_attention` is given.
        capability: of the GPU.
        cudnn: whether its kernel is on; None: as torch's flag says.
    """
    cudnn = torch.backends.cuda.cudnn_sdp_enabled() if cudnn is None else cudnn
    half, d = q.dtype in HALF, q.shape[-1]
    same_heads = q.shape[1] == k.shape[1]
    fits = same_heads or (gqa and q.shape[1] % k.shape[1] == 0)
    tensors = (q, k, v) if mask is None else (q, k, v, mask)
    last = all(t.stride(-1) == 1 or t.shape[-1] == 1 for t in tensors)
    square = not is_causal or q.shape[2] == k.shape[2]
    if cudnn and capability[0] >= 9 and half and fits and last and d % 8 == 0 and d <= 256:
        return "cudnn"
    if capability[0] >= 8 and half and fits and last and mask is None and d <= 256 and square:
        return "flash"
    align = 8 if half else 4
    if q.dtype in (torch.float32, *HALF) and same_heads and last and d % align == 0:
        return "efficient"
    return "math"
