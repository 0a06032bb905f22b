"""What the host waits for: in a forward, in a step of decoding, and in one that a graph holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch

from hooked_hybrid import HookedHybrid, HybridConfig, interventions
from hooked_hybrid.model import step_graph
from hooked_hybrid.network.host_waits import AsksNothing
from hooked_hybrid.presets import configs as presets
from tests.models import random_model, random_tokens
from tests.pretended_gpu.device import PretendedGPU
from tests.pretended_gpu.kernels import pretended_kernels
from tests.pretended_gpu.stages import QUIET

SIZES: dict[str, Any] = {"d_model": 32, "d_head": 8, "d_mlp": 32, "d_vocab": 61}
MODELS: dict[str, HybridConfig] = {
    "griffin": presets.griffin("RARA", d_rnn=32, n_keys=64, **SIZES),
    "jamba": presets.jamba("MMAM", d_inner=64, d_state=16, dt_rank=8, **SIZES),
}
"""Sizes that every kernel takes, in bf16 on Hopper."""


def waits_of(on_gpu: Callable[[HookedHybrid], HookedHybrid]) -> dict[str, dict[str, float]]:
    """Return how often the host waits, by model and by what runs."""
    found: dict[str, dict[str, float]] = {}
    for name, cfg in MODELS.items():
        cpu = random_model(cfg, dtype=torch.bfloat16)
        with PretendedGPU() as gpu, pretended_kernels(), torch.no_grad():
            model = on_gpu(cpu)
            tokens = random_tokens(1, 30).to("cuda")
            model(tokens)  # what is made and tried once
            gpu.reset()
            model(tokens)
            mine = {"forward": float(sum(gpu.waits.values()))}
            mine["attention layers"] = len(cfg.attention_layers)
            hooks = {"fwd_hooks": interventions.keep_top_heads(2)}
            mine["step"] = _in_a_step(gpu, model, tokens, {})
            mine["step under keep_top_heads"] = _in_a_step(gpu, model, tokens, hooks)
            mine["step in a graph"] = _in_a_graph(gpu, model, tokens)
            found[name] = mine
    return found


def _in_a_step(gpu: PretendedGPU, model: HookedHybrid, tokens: Any, options: Any) -> float:
    waits = []
    for n in (3, 7):
        gpu.reset()
        model.generate(tokens, n, **options, **QUIET)
        waits.append(sum(gpu.waits.values()))
    return (waits[1] - waits[0]) / 4


def _in_a_graph(gpu: PretendedGPU, model: HookedHybrid, tokens: Any) -> float:
    """Return waits, and work of the host, in the step that a graph would hold; it is checked."""
    seen: list[float] = []

    def record(step: Callable[[], None], _: torch.device) -> Callable[[], None]:
        step()
        with AsksNothing():
            step()
        gpu.reset()
        step()
        seen.append(sum(gpu.waits.values()) + sum(gpu.host_work.values()))
        return step

    with mock.patch.dict(step_graph.CAPTURES, {"cuda": record}):
        model.generate(tokens, 20, **QUIET)
    return seen[0]
