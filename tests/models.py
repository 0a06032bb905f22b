"""Tiny random models in which nothing is degenerate: no zero bias, no norm of one, many decays."""

from __future__ import annotations

import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    LayerConfig,
    MixerConfig,
    NormConfig,
    RGLRUConfig,
    RotaryConfig,
)

D_VOCAB = 61


def griffin_config(
    pattern: str = "RRAR",
    n_keys: int | None = 7,
    n_heads: int = 4,
    n_kv_heads: int = 1,
    d_head: int = 8,
    d_model: int = 24,
    d_rnn: int = 32,
    d_conv: int = 4,
) -> HybridConfig:
    """Return a RecurrentGemma: `pattern` has an R for each recurrent layer, an A for attention."""
    mixers: dict[str, MixerConfig] = {
        "R": RGLRUConfig(d_rnn=d_rnn, n_gate_blocks=n_heads, d_conv=d_conv),
        "A": AttentionConfig(
            n_heads=n_heads,
            n_kv_heads=n_kv_heads,
            d_head=d_head,
            n_keys=n_keys,
            rotary=RotaryConfig(d_rotary=d_head // 2),
            out_bias=True,
        ),
    }
    mlp = GatedMLPConfig(d_mlp=20, act="gelu_tanh", bias=True)
    return HybridConfig(
        d_model=d_model,
        d_vocab=D_VOCAB,
        layers=tuple(LayerConfig(mixers[kind], mlp) for kind in pattern),
        norm=NormConfig(style="one_plus_weight"),
        scale_embedding=True,
        tied_embedding=True,
        logits_soft_cap=30.0,
        bos_token_id=2,
        eos_token_id=1,
        pad_token_id=0,
    )


CONFIGS: dict[str, HybridConfig] = {
    "griffin": griffin_config(),
    "griffin-gqa-ends-in-attention": griffin_config("RA", n_kv_heads=2, d_conv=2),
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


def relative(a: Tensor, b: Tensor) -> float:
    """Return the largest difference over the largest entry of `b`."""
    a, b = a.detach(), b.detach()
    largest, difference = float(b.abs().max()), float((a - b).abs().max())
    return difference / largest if largest else difference
