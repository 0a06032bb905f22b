"""The models that are measured: ours, and the peers' with the same weights.

The peers run with their defaults: attention and experts as chosen by `transformers`, and Google's
Griffin without gradient checkpointing. All are fp32, except in the case bf16.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from hooked_hybrid import HookedHybrid
from hooked_hybrid.network.state import HybridState

RG_MID: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "lru_width": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "intermediate_size": 2 * 1536,  # transformers halves it
    "attention_window_size": 1024,
}
JAMBA_MID: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 512,
    "intermediate_size": 1792,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 8,
    "attn_layer_offset": 4,
    "mamba_d_state": 16,
    "mamba_expand": 2,
    "mamba_dt_rank": 32,
}
FIRST_WORD = 3
"""Lowest token id drawn: those below are special."""


@dataclass(frozen=True)
class Family:
    """One model in our code and in transformers', and in Google's if it supports it."""

    name: str
    ours: HookedHybrid
    hf: Any
    google: nn.Module | None = field(default=None)


def random_tokens(length: int, d_vocab: int = 8192, seed: int = 0) -> Tensor:
    """Return tokens [1 pos]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST_WORD, d_vocab, (1, length), generator=generator)


@cache
def rg_mid() -> Family:
    """Return RecurrentGemma of 23 million parameters, in three implementations."""
    hf = rg_peer()
    return Family("RG", HookedHybrid.from_hf(hf), hf, _google_griffin(hf))


@cache
def jamba_mid() -> Family:
    """Return Jamba of 76 million parameters, in two implementations."""
    hf = jamba_peer()
    return Family("Jamba", HookedHybrid.from_hf(hf), hf)


def rg_peer() -> Any:
    """Return RG mid in transformers."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM  # noqa: TID251

    return _ready(RecurrentGemmaForCausalLM(RecurrentGemmaConfig(**RG_MID)))


def jamba_peer() -> Any:
    """Return Jamba mid in transformers."""
    from transformers import JambaConfig, JambaForCausalLM  # noqa: TID251

    return _ready(JambaForCausalLM(JambaConfig(**JAMBA_MID)))


def _ready(hf: Any) -> Any:
    """Draw the weights of a transformers model, silence its warnings, and never end a sequence."""
    from transformers.utils import logging  # noqa: TID251

    logging.set_verbosity_error()
    hf.float().eval()
    hf.generation_config.eos_token_id = None
    randomise(hf)
    return hf


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> None:
    """Draw matrices that preserve the size of activations, and decays of 0.02 to 0.999.

    Norms, `A_log` and `D` keep the values of the model's constructor.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("recurrent_param"):
            parameter.copy_(8 * torch.rand(parameter.shape, generator=generator) - 7)
        elif name.endswith("dt_proj.bias"):
            parameter.copy_(4 * torch.rand(parameter.shape, generator=generator) - 5)
        elif parameter.ndim > 1 and not name.endswith("A_log"):
            fan_in = parameter.shape[-1]
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan_in**-0.5)


def _google_griffin(hf: Any) -> nn.Module:
    """Return the same model in Google's code, which counts a window without the query."""
    references: Any = importlib.import_module("tests.references")
    google, cfg = references.google(), hf.config
    kinds = google.TemporalBlockType
    blocks = itertools.islice(itertools.cycle(cfg.block_types), cfg.num_hidden_layers)
    config = google.GriffinConfig(
        vocab_size=cfg.vocab_size,
        width=cfg.hidden_size,
        mlp_expanded_width=cfg.intermediate_size // 2,
        num_heads=cfg.num_attention_heads,
        block_types=tuple(kinds[kind.upper()] for kind in blocks),
        embeddings_scale_by_sqrt_dim=True,
        attention_window_size=cfg.attention_window_size - 1,
        logits_soft_cap=cfg.logits_soft_cap,
        lru_width=cfg.lru_width,
    )
    griffin = google.Griffin(config, gradient_checkpointing=False, dtype=torch.float32).eval()
    references.share_weights_hf_to_google(hf, griffin)
    return griffin


# --- the work of each ------------------------------------------------------------------------


def ours_prefill(model: HookedHybrid, tokens: Tensor) -> tuple[Tensor, HybridState]:
    """Return the last token's logits [d_vocab] and the state."""
    logits, state = model(tokens, logits_to_keep=1, return_state=True)
    return logits[0, -1], state


@cache
def cache_keyword(kind: type[nn.Module]) -> str:
    """Return the keyword of `kind`'s forward for a cache, which changed in 5.24."""
    return "cache" if "cache" in inspect.signature(kind.forward).parameters else "past_key_values"


def hf_cached(hf: Any, tokens: Tensor, past: Any, **options: Any) -> Tensor:
    """Return the logits [b s d_vocab] of a forward with a cache."""
    kind: Any = type(hf)
    return hf(tokens, **{cache_keyword(kind): past}, use_cache=True, **options).logits


def hf_prefill(hf: Any, tokens: Tensor) -> tuple[Tensor, Any]:
    """Return the last token's logits [d_vocab] and the cache."""
    from transformers import DynamicCache  # noqa: TID251

    past = DynamicCache(config=hf.config)
    logits = hf_cached(hf, tokens, past, logits_to_keep=1)
    return logits[0, -1], past


def google_prefill(griffin: nn.Module, tokens: Tensor) -> Any:
    """Return the cache; no logits, as in the prompt mode of Google's sampler."""
    positions = torch.arange(tokens.shape[1])[None]
    return griffin(tokens, positions, return_logits=False)[1]


def google_logits(griffin: nn.Module, tokens: Tensor) -> Tensor:
    """Return the last token's logits [d_vocab]."""
    positions = torch.arange(tokens.shape[1])[None]
    return griffin(tokens, positions, return_cache=False)[0][0, -1]


def ours_steps(model: HookedHybrid, tokens: Tensor, n: int, rows: int = 1) -> Callable[[], Tensor]:
    """Return work that decodes `n` more tokens a row after the prompt and gives the last logits.

    Each call continues where the previous one stopped.
    """
    state = ours_prefill(model, tokens)[1]
    state = state if rows == 1 else state.fork(rows)
    token = tokens[:, :1].expand(rows, 1).contiguous()

    def steps() -> Tensor:
        nonlocal state
        for _ in range(n):
            logits, state = model(token, state=state, return_state=True)
        return logits[0, -1]

    return steps


def hf_steps(hf: Any, tokens: Tensor, n: int) -> Callable[[], Tensor]:
    """Return the same work by transformers, with one row."""
    past = hf_prefill(hf, tokens)[1]
    position, token = tokens.shape[1], tokens[:, :1]

    def steps() -> Tensor:
        nonlocal position
        for _ in range(n):
            at = torch.tensor([[position]])
            logits = hf_cached(hf, token, past, position_ids=at)
            position += 1
        return logits[0, -1]

    return steps


def google_steps(griffin: nn.Module, tokens: Tensor, n: int) -> Callable[[], Tensor]:
    """Return the same work by Google's code, with one row."""
    state = google_prefill(griffin, tokens)
    position, token = torch.tensor([[tokens.shape[1]]]), tokens[:, :1]

    def steps() -> Tensor:
        nonlocal state, position
        for _ in range(n):
            logits, state = griffin(token, position, state)
            position = position + 1
        return logits[0, -1]

    return steps
