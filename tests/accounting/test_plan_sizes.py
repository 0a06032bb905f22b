"""What a plan counts is what is measured, or more: weights, state, activations, and loading."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.accounting.plan import Machine
from hooked_hybrid.accounting.plan.planner import Planner
from hooked_hybrid.accounting.plan.split import Usage
from hooked_hybrid.accounting.plan.working import Sizes
from hooked_hybrid.network.weights import products
from hooked_hybrid.network.weights.plain import stored_bytes
from hooked_hybrid.presets import configs as presets
from tests.models import CONFIGS, random_tokens, tiny_model

GRIFFIN = presets.griffin("RRA", d_model=128, d_vocab=300, n_heads=4, n_keys=400)
JAMBA = presets.jamba("MAM", d_model=128, d_vocab=300, n_heads=4, n_kv_heads=2, n_experts=4)
VIEWS = presets.griffin("A" * 12, d_model=32, d_head=64, d_vocab=99, n_heads=1, n_keys=600)
"""Its states are the last keys of tensors with almost twice as many."""
HEADS = presets.griffin("A", d_model=64, d_vocab=99, n_heads=8, n_keys=600)
SCORES = presets.jamba("MA", d_model=32, d_vocab=300, n_heads=4, n_kv_heads=4, n_experts=8)
"""Long rows of it are mostly scores."""
STREAM = presets.griffin("RR", d_model=1024, d_rnn=8, d_mlp=8, d_vocab=99, n_heads=1)
"""Its own values are few compared with its residual stream."""
MATRICES = presets.griffin("RR", d_model=256, d_rnn=64, d_mlp=2048, d_vocab=99, n_heads=4)
"""Short rows of it are mostly weights in fp32, where a CPU multiplies in that alone."""
LARGE = presets.jamba("MA", d_model=256, d_vocab=300, n_heads=4, n_kv_heads=2, n_experts=4)


def planned(cfg: HybridConfig, length: int, *sizes: Any) -> Usage:
    """Return what one CPU would hold of a model."""
    planner = Planner(Sizes(cfg, *sizes), Machine((), 2**40), length)
    return planner.usage(range(cfg.n_layers), range(0), is_first=True)


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_the_planned_state_is_the_state(name: str):
    sizes = Sizes(CONFIGS[name], torch.float32, batch=2, on_cpu=True)
    _, state = tiny_model(name)(random_tokens(n_pos=11), return_state=True)
    for i, block in enumerate(state.blocks):
        assert sizes.state(i, 11) == sum(t.nbytes for t in vars(block).values())


@pytest.mark.parametrize(
    ("cfg", "dtype", "batch", "length", "most"),
    [
        (GRIFFIN, torch.float32, 1, 1100, 2),
        (GRIFFIN, torch.bfloat16, 1, 1100, 2),
        (HEADS, torch.float32, 5, 700, 2),
        (VIEWS, torch.float32, 5, 9, 2),  # a step makes room for 64 more keys
        (JAMBA, torch.float32, 2, 700, 2),
        (JAMBA, torch.float32, 1, 40, 2),
        (SCORES, torch.bfloat16, 1, 1700, 2),
        (VIEWS, torch.float32, 1, 1536, 2),
        (STREAM, torch.float32, 1, 500, 2),
        (STREAM, torch.bfloat16, 1, 500, 2),
        (MATRICES, torch.bfloat16, 1, 20, 2),
    ],
)
def test_the_planned_activations_hold_and_are_not_much_too_large(
    cfg: HybridConfig,
    dtype: torch.dtype,
    batch: int,
    length: int,
    most: float,
    monkeypatch: pytest.MonkeyPatch,
):
    """Rows of a batch are padded, but for the last."""
    slow = frozenset({torch.bfloat16, torch.float16})  # which is planned for
    monkeypatch.setattr(products, "_slow_dtypes", lambda: slow)
    model = HookedHybrid(cfg, dtype=dtype).requires_grad_(False)
    tokens = torch.randint(3, 98, (batch, length))
    mask = torch.ones_like(tokens)
    mask[:-1, : length // 5] = 0
    usage = planned(cfg, length, dtype, batch, True)
    measured = peak_bytes(
        lambda: model.generate(
            tokens, 3, attention_mask=mask, verbose=False, stop_at_eos=False, eos_token_id=()
        )
    )
    assert measured <= usage.state + usage.working <= most * measured


@pytest.mark.parametrize(
    ("scheme", "dtype"),
    [(None, torch.float32), ("int8", torch.bfloat16), ("nf4", torch.bfloat16)],
)
def test_what_is_planned_for_loading_and_running_holds(
    scheme: str | None, dtype: torch.dtype, tmp_path: Path
):
    if scheme is not None:
        pytest.importorskip("torchao.quantization")
    HookedHybrid(LARGE).to(dtype).save_pretrained(tmp_path / "large")
    found: list[HookedHybrid] = []

    def load() -> None:
        found.append(HookedHybrid.from_pretrained(tmp_path / "large", dtype, quantize=scheme))

    load()  # imports, and what they leave
    found.clear()
    mapped = sum(path.stat().st_size for path in (tmp_path / "large").glob("*.safetensors"))
    loading = peak_bytes(load) - mapped  # the file's pages are not the process's
    usage = planned(LARGE, 20, dtype, 1, True, scheme)
    assert usage.weights == stored_bytes(found[0].parameters())
    assert loading <= usage.weights + usage.loading + 8192 <= 2 * loading
    tokens = torch.randint(3, 299, (1, 20))
    running = peak_bytes(lambda: found[0].generate(tokens, 3, verbose=False, stop_at_eos=False))
    assert running <= usage.state + usage.working <= 3 * running


def peak_bytes(run: Any) -> int:
    """Return the most bytes that torch's CPU allocator held at once for a run."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run()
    events = profile.profiler.kineto_results.events()  # type: ignore[union-attr]
    now = most = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
