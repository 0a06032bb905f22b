"""Half-lives and horizons are what counting tokens one by one gives."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookPoint
from hooked_hybrid.analysis.horizon import (
    decay_range,
    half_life,
    how_far,
    memory_horizon,
    tokens_until,
)
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY, HALF_LIFE_BY_MASK

N_POS = 40
models = pytest.mark.parametrize("name", list(CONFIGS))
families = pytest.mark.parametrize("name", ["griffin", "jamba"])


model_of = cache(tiny_model)


@cache
def cache_of(name: str) -> Any:
    return model_of(name).run_with_cache(random_tokens(2, N_POS))[1]


def log_decays(kept: Any, layer: int, row: int) -> Tensor:
    """Return [pos channel n] in float64."""
    mixer = kept.model.blocks[layer].mixer
    if hasattr(mixer, "a_param"):
        return kept["log_decay", layer][row].double()[..., None]
    dt, A = kept["ssm_dt", layer][row].double(), -mixer.A_log.double().exp()
    return dt[..., None] * A


def by_hand(documents: list[Tensor], eps: float) -> tuple[Tensor, Tensor]:
    """Return half-lives and median horizons of documents' log decays [pos channel n], by loops."""
    mean = torch.cat([d[1:] for d in documents]).mean(0)
    half, horizon = torch.empty_like(mean), torch.empty_like(mean)
    for c in range(mean.shape[0]):
        for n in range(mean.shape[1]):
            rate = float(mean[c, n])
            half[c, n] = math.log(0.5) / rate if rate else math.inf
            counts = []
            for log_a in (d[:, c, n].tolist() for d in documents):
                for s in range(len(log_a)):
                    left, k = 0.0, 0
                    while left >= math.log(eps):
                        k += 1
                        left += log_a[s + k] if s + k < len(log_a) else rate
                        if k > 10**4:
                            k = math.inf  # type: ignore[assignment]
                            break
                    counts.append(k)
            horizon[c, n] = sorted(counts)[(len(counts) - 1) // 2]
    return half, horizon


def assert_counted(kept: Any, layer: int, documents: list[Tensor], eps: float, **run: Any) -> None:
    half, horizon = by_hand([d[:, ::5] for d in documents], eps)
    is_single = hasattr(kept.model.blocks[layer].mixer, "a_param")
    shape = (slice(None, None, 5), 0) if is_single else (slice(None, None, 5),)
    found = half_life(kept, layer, **run), memory_horizon(kept, layer, eps, **run)
    if is_single:
        half, horizon = half[:, 0], horizon[:, 0]
    assert found[0].shape == kept["ssm_y", layer].shape[-1:] + half.shape[1:]
    assert relative(found[0][shape[0]], half) < FP32_PARITY
    assert torch.equal(found[1][shape[0]], horizon)


@models
@pytest.mark.parametrize("eps", [0.3, 0.01])
def test_tokens_are_counted_in_a_run(name: str, eps: float):
    kept = cache_of(name)
    assert_counted(kept, 0, [log_decays(kept, 0, i) for i in range(2)], eps)


@families
def test_padding_and_documents_are_distinguished(name: str):
    model, tokens = model_of(name), random_tokens(2, N_POS)
    mask = torch.ones_like(tokens)
    mask[0, :7], mask[1, 31:] = 0, 0
    _, kept = model.run_with_cache(tokens, attention_mask=mask)
    documents = [log_decays(kept, 1, i)[mask[i] > 0] for i in range(2)]
    assert_counted(kept, 1, documents, 0.05, attention_mask=mask)
    ids = torch.ones_like(tokens)
    ids[0, 12:], ids[1, :3], ids[1, 20:] = 2, 0, 4
    _, kept = model.run_with_cache(tokens, segment_ids=ids)
    documents = [log_decays(kept, 1, i)[ids[i] == d] for i, d in ((0, 1), (0, 2), (1, 1), (1, 4))]
    assert_counted(kept, 1, documents, 0.05, segment_ids=ids)


def test_decays_of_one_and_of_zero():
    model, tokens = model_of("griffin"), random_tokens(2, N_POS)

    def edit(a: Tensor, hook: HookPoint) -> Tensor:
        a = a.clone()
        a[..., 0], a[..., 1], a[..., 2], a[..., 3] = 0.0, -torch.inf, math.log(0.5), -1e-7
        return a

    with model.hooks([("blocks.0.mixer.hook_log_decay", edit)]):
        _, kept = model.run_with_cache(tokens)
    assert half_life(kept, 0)[:3].tolist() == [math.inf, 0.0, pytest.approx(1.0)]
    assert memory_horizon(kept, 0, eps=0.2)[:3].tolist() == [math.inf, 1.0, 3.0]
    assert float(half_life(kept, 0)[3]) == pytest.approx(math.log(2) * 1e7, rel=1e-6)
    assert float(memory_horizon(kept, 0, eps=0.5)[3]) == pytest.approx(math.log(2) * 1e7, rel=1e-6)


def test_a_continued_run_counts_its_first_decay():
    model, tokens = model_of("jamba"), random_tokens(1, N_POS)
    _, state = model(tokens[:, :39], return_state=True)
    _, kept = model.run_with_cache(tokens[:, 39:], state=state)
    expected = math.log(0.5) / log_decays(cache_of("jamba"), 0, 0)[39]
    assert relative(half_life(kept, 0, state=state), expected) < 10 * FP32_PARITY
    with pytest.raises(ValueError, match="no token of this cache follows another"):
        half_life(kept, 0)


@models
def test_every_decay_of_a_run_lies_in_the_range_of_the_weights(name: str):
    model, kept = model_of(name), cache_of(name)
    for layer in model.cfg.recurrent_layers:
        low, typical, high = decay_range(model, layer)
        met = torch.cat([log_decays(kept, layer, i) for i in range(2)]).exp()
        met = met[..., 0] if low.ndim == 1 else met
        assert low.shape == kept["ssm_y", layer].shape[-1:] + met.shape[2:]
        slack = 1 + FP32_PARITY
        assert bool((met >= low / slack).all() and (met <= high * slack).all())
        assert bool((low <= typical).all() and (typical <= high).all())


@families
def test_the_ends_of_the_range_are_reached(name: str):
    """With the gate or the step driven there, the decay is the end that the weights give."""
    model, tokens = model_of(name), random_tokens(1, 6)
    low, typical, high = decay_range(model, 0)
    mixer = model.blocks[0].mixer
    if name == "griffin":
        for gate, expected in ((1.0, low), (0.0, high)):
            hook = ("blocks.0.mixer.hook_rec_gate", lambda r, hook, g=gate: torch.full_like(r, g))
            with model.hooks([hook]):
                _, kept = model.run_with_cache(tokens)
            assert relative(kept["log_decay", 0][0, 3].exp(), expected) < FP32_PARITY
        hook = ("blocks.0.mixer.hook_conv", lambda u, hook: 0 * u)
        with model.hooks([hook]):
            _, kept = model.run_with_cache(tokens)
        assert relative(kept["log_decay", 0][0, 3].exp(), typical) < FP32_PARITY
        return
    channel = 5
    W = mixer.dt_norm.weight * mixer.dt_proj.W[:, channel]
    for sign, expected in ((1, low), (-1, high), (0, typical)):
        # The normalised step that drives this channel furthest.
        d = sign * mixer.dt_norm.weight * W / W.norm() * mixer.cfg.dt_rank**0.5
        hook = ("blocks.0.mixer.hook_dt_low", lambda x, hook, d=d: d.expand_as(x).clone())
        with model.hooks([hook]):
            _, kept = model.run_with_cache(tokens)
        found = log_decays(kept, 0, 0)[3, channel].exp()
        assert relative(found, expected[channel]) < FP32_PARITY


@models
def test_a_row_for_each_layer(name: str):
    kept = cache_of(name)
    cfg = kept.model.cfg
    rows = how_far(kept, eps=0.05)
    assert [r.layer for r in rows] == list(range(cfg.n_layers))
    for r in rows:
        if r.layer in cfg.attention_layers:
            window = 7.0 if "griffin" in name else math.inf
            assert (r.kind, r.tokens, r.longest, r.half_life) == ("attention", window, window, None)
        else:
            horizon = memory_horizon(kept, r.layer, 0.05)
            assert r.kind == ("rglru" if "griffin" in name else "mamba")
            assert (r.tokens, r.longest) == (float(horizon.median()), float(horizon.max()))
            assert r.half_life == float(half_life(kept, r.layer).median())
    table = pd.DataFrame(rows)
    assert list(table.columns) == ["layer", "kind", "tokens", "longest", "half_life"]


def test_channels_are_worked_on_some_at_a_time(monkeypatch: pytest.MonkeyPatch):
    kept = cache_of("jamba")
    whole = memory_horizon(kept, 0), half_life(kept, 0)
    monkeypatch.setattr("hooked_hybrid.analysis.horizon.SCRATCH", 2**18)
    assert torch.equal(memory_horizon(kept, 0), whole[0])
    assert relative(half_life(kept, 0), whole[1]) < FP32_PARITY


def test_tokens_until():
    log_decay = torch.tensor([0.0, -1.0, math.log(0.1), -torch.inf])
    found = tokens_until(0.01, log_decay).tolist()
    assert found == [math.inf, pytest.approx(math.log(100)), pytest.approx(2.0), 0.0]


@pytest.mark.usefixtures("unchecked")
def test_bad_arguments_are_refused():
    kept, model = cache_of("griffin"), model_of("griffin")
    for eps in (0, 1, 1.5, -0.1):
        with pytest.raises(ValueError, match=f"eps={eps}"):
            memory_horizon(kept, 0, eps)
    with pytest.raises(ValueError, match="layer 2 has no recurrence"):
        decay_range(model, 2)
    with pytest.raises(ValueError, match="layer 2 has no recurrence"):
        half_life(kept, 2)
    hooks = [("blocks.0.mixer.hook_ssm_decay", lambda a, hook: 1.5 + a)]
    jamba = model_of("jamba")
    with jamba.hooks(hooks):
        _, wrong = jamba.run_with_cache(
            random_tokens(1, 9), names_filter=lambda n: "blocks.0.mixer" in n
        )
    with pytest.raises(ValueError, match="above 1 or below 0"):
        half_life(wrong, 0)


def test_padding_whose_mask_was_not_given_lets_no_time_pass_in_mamba():
    model, tokens = tiny_model("jamba"), random_tokens(2, 20)
    mask = torch.ones_like(tokens)
    mask[1, :10] = 0
    _, cache = model.run_with_cache(tokens, attention_mask=mask)
    with_mask = half_life(cache, 0, attention_mask=mask)
    assert relative(half_life(cache, 0), with_mask) < HALF_LIFE_BY_MASK
