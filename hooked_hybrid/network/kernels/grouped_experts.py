"""The experts of a mixture as three grouped products, without waiting for their sizes."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from hooked_hybrid.config import Activation
from hooked_hybrid.network.elementwise import activate
from hooked_hybrid.network.kernels.trials import Pair, waves, works
from hooked_hybrid.shapes import Resid

WITHOUT_SYNC = (9, 10)  # major capabilities; elsewhere torch loops over experts on the host
MAX_EXPERTS = 1023
ALIGNMENT = 16  # bytes, of rows and of the tensors' addresses


def usable(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> bool:
    """Return whether `run_experts` is fast on these: bf16, on Hopper or Blackwell, aligned."""
    tensors = (x, gate, up, down)
    return (
        x.is_cuda
        and all(t.device == x.device and t.dtype == torch.bfloat16 for t in tensors)
        and hasattr(functional, "grouped_mm")
        and torch.version.hip is None
        and torch.cuda.get_device_capability(x.device)[0] in WITHOUT_SYNC
        and x.numel() > 0
        and gate.shape[0] <= MAX_EXPERTS
        and all(_is_aligned(t) for t in (gate, up, down))
        and works("grouped_mm", _trial, x.device, x.dtype)
    )


def run_experts(
    x: Resid,
    weights: Float[Tensor, "batch pos n_chosen"],
    indices: Int[Tensor, "batch pos n_chosen"],
    gate: Float[Tensor, "expert d_mlp d_model"],
    up: Float[Tensor, "expert d_mlp d_model"],
    down: Float[Tensor, "expert d_model d_mlp"],
    act: Activation,
) -> Resid:
    """Return the weighted sum of the chosen experts' outputs, as `MoE._run_sorted` does.

    If `usable`, nothing is read back from the GPU, so a CUDA graph can capture it. It runs
    wherever `grouped_mm` does. The sum over a token's experts is computed as in `MoE._run_hooked`:
    always in the same order, and rounded once.

    Args:
        x: the experts' input.
        weights: shares of the chosen experts.
        indices: the chosen experts, 0 to n_experts - 1.
        gate, up, down: the experts' matrices, as `MoE` stores them.
        act: the nonlinearity of the gate.
    """
    n_experts, n_chosen = gate.shape[0], indices.shape[2]
    expert_of_row, slots = indices.flatten().sort(stable=True)
    experts = torch.arange(n_experts, device=indices.device, dtype=indices.dtype)
    ends = torch.searchsorted(expert_of_row, experts, right=True, out_int32=True)

    rows = x.flatten(0, 1).index_select(0, slots // n_chosen)
    post = activate(_grouped(rows, gate, ends), act) * _grouped(rows, up, ends)
    written = _grouped(post, down, ends)

    row_of_slot = torch.empty_like(slots)
    row_of_slot.scatter_(0, slots, torch.arange(len(slots), device=slots.device))
    out = written.index_select(0, row_of_slot).view(*indices.shape, x.shape[-1])
    return (out * weights[..., None]).sum(dim=2)


def _grouped(
    rows: Float[Tensor, "row d_in"],
    weight: Float[Tensor, "expert d_out d_in"],
    ends: Int[Tensor, " expert"],
) -> Float[Tensor, "row d_out"]:
    """Return each row times its expert's matrix; `ends[e]` is the end of the rows of expert e."""
    return functional.grouped_mm(rows, weight.mT, offs=ends)


def _is_aligned(weight: Tensor) -> bool:
    """Return whether rows of `weight` [expert d_out d_in], and of its output, are aligned."""
    in_row = ALIGNMENT // weight.element_size()
    return (
        (weight.is_contiguous() or weight.mT.is_contiguous())
        and weight.data_ptr() % ALIGNMENT == 0
        and all(n % in_row == 0 for n in weight.shape[1:])
    )


@torch.no_grad()
def _trial(device: torch.device, dtype: torch.dtype) -> Pair:
    """Return the outputs of three experts, by grouped products and by one product each."""
    shapes = ((2, 5, 16), (2, 5, 2), (3, 32, 16), (3, 32, 16), (3, 16, 32))
    x, shares, gate, up, down = (
        waves(*shape, seed=i).to(device, dtype) for i, shape in enumerate(shapes)
    )
    indices = torch.arange(20, device=device).view(2, 5, 2) % 3
    found = run_experts(x, shares, indices, gate, up, down, "silu")
    post = activate(torch.einsum("bsd,emd->bsem", x, gate), "silu")
    written = torch.einsum("bsem,edm->bsed", post * torch.einsum("bsd,emd->bsem", x, up), down)
    chosen = written.gather(2, indices[..., None].expand(*indices.shape, x.shape[-1]))
    return (found,), ((chosen * shares[..., None]).sum(2),)
