"""Tiny random models in which nothing is degenerate: no zero bias, no norm of one, many decays."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.presets import configs as presets

D_VOCAB = 61


def griffin_config(pattern: str = "RRAR", **changes: Any) -> HybridConfig:
    """Return a RecurrentGemma in which no two widths are alike."""
    sizes: dict[str, Any] = {"d_model": 24, "d_rnn": 32, "d_head": 8, "d_mlp": 20, "n_keys": 7}
    return presets.griffin(pattern, **{"d_vocab": D_VOCAB, **sizes, **changes})


def jamba_config(pattern: str = "MMAM", **changes: Any) -> HybridConfig:
    """Return a Jamba in which no two widths are alike."""
    sizes: dict[str, Any] = {"d_model": 24, "d_inner": 48, "d_mlp": 20, "d_state": 5, "dt_rank": 3}
    return presets.jamba(pattern, **{"d_vocab": D_VOCAB, **sizes, **changes})


CONFIGS: dict[str, HybridConfig] = {
    "griffin": griffin_config(),
    "griffin-gqa-ends-in-attention": griffin_config("RA", n_kv_heads=2, d_conv=2),
    "jamba": jamba_config(),
    "jamba-dense-ends-in-attention": jamba_config("MA", n_experts=1, tied_embedding=True),
}


def tiny_model(
    name: str = "griffin", seed: int = 0, dtype: torch.dtype = torch.float32
) -> HookedHybrid:
    """Return a random model of `CONFIGS`, in evaluation without gradients to its weights."""
    return random_model(CONFIGS[name], seed, dtype)


def random_model(
    cfg: HybridConfig, seed: int = 0, dtype: torch.dtype = torch.float32
) -> HookedHybrid:
    """Return a model with every parameter drawn, biases and norms included."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = HookedHybrid(cfg)
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 or "bias" in name:
                parameter.data += 0.3 * torch.randn_like(parameter)
            if name.endswith("a_param"):
                parameter.data.uniform_(-7, 1)
    model.requires_grad_(False)
    return model.to(dtype).eval()


def random_tokens(batch: int = 2, n_pos: int = 20, seed: int = 0) -> Tensor:
    """Return token ids that avoid the special ones."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, D_VOCAB, (batch, n_pos), generator=generator)


def layouts(model: HookedHybrid) -> dict[str, tuple[int, ...]]:
    """Return how each parameter lies in memory."""
    return {name: weight.stride() for name, weight in model.named_parameters()}


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest entry of `b`."""
    a, b = a.detach(), b.detach()
    largest, difference = float(b.abs().max()), float((a - b).abs().max())
    return difference / largest if largest else difference
