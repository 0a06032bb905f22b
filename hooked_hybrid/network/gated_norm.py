"""The norm of Mamba-2's output: each group of channels is divided by its own scale."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import nn

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.network.component import Component
from hooked_hybrid.network.elementwise import at_least_fp32, inverse_rms
from hooked_hybrid.shapes import Inner


class GroupRMSNorm(Component):
    """`x / hook_scale * weight`, in fp32, where each of `n_groups` has a scale of its own."""

    def __init__(self, width: int, n_groups: int, eps: float) -> None:
        super().__init__()
        self.n_groups, self.eps = n_groups, eps
        self.weight = nn.Parameter(torch.empty(width))
        self.hook_scale = HookPoint("batch pos group")
        self.hook_normalized = HookPoint("batch pos d_inner")

    def reset_parameters(self) -> None:
        """Set the weight so that it has no effect."""
        nn.init.ones_(self.weight)

    def forward(self, x: Inner) -> Float[torch.Tensor, "batch pos d_inner"]:
        """Return the normalised and weighted values in fp32 or wider."""
        groups = at_least_fp32(x).unflatten(-1, (self.n_groups, -1))
        inverse = inverse_rms(groups, self.eps)
        if self.hook_scale.is_hooked:
            inverse = self.hook_scale(inverse[..., 0].reciprocal()).reciprocal()[..., None]
        normalized = self.hook_normalized((groups * inverse).flatten(-2))
        return normalized * at_least_fp32(self.weight)
