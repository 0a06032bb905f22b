"""Sweeps of patches: each cell is the patch it says, on both families and in padded rows."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.analysis.activation_patching import (
    generic_activation_patch,
    patch_heads,
    patch_layers,
    patch_mixer_out,
    patch_mlp_out,
    patch_resid_pre,
    patch_states,
)
from hooked_hybrid.analysis.metrics import normalised
from hooked_hybrid.hooks.names import HookNameError
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import BF16, FP32_PARITY

CONFIGS = {"griffin": griffin_config("ARA", n_kv_heads=2), "jamba": jamba_config("AMA")}
models = pytest.mark.parametrize("name", list(CONFIGS))
N_POS = 9
CLEAN, CORRUPTED = random_tokens(2, N_POS, seed=1), random_tokens(2, N_POS, seed=2)


@cache
def model_of(name: str, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    return random_model(CONFIGS[name], dtype=dtype)


@cache
def clean_cache(name: str, dtype: torch.dtype = torch.float32) -> Any:
    return model_of(name, dtype).run_with_cache(CLEAN, names_filter=lambda n: "_input" not in n)[1]


def metric(logits: Tensor) -> Tensor:
    return logits[:, -1, 5].float() - logits[:, 3, 7].float()


@torch.no_grad()  # as sweeps run: in bf16 the two ways round differently, and experts may flip
def unpatched(model: HookedHybrid) -> Tensor:
    return metric(model(CORRUPTED))


@torch.no_grad()
def put(model: HookedHybrid, name: str, donor: Tensor, at: tuple[Any, ...]) -> Tensor:
    """The metric with one part of one value replaced, by indexing."""

    def replace(value: Tensor, hook: HookPoint) -> Tensor:
        value = value.clone()
        if name.endswith("ssm_state"):  # called once a position
            t = int(hook.run.query_pos[0, 0])
            if t == at[1]:
                value[:, 0] = donor[:, t]
            return value
        value[at] = donor[at]
        return value

    return metric(model.run_with_hooks(CORRUPTED, fwd_hooks=[(name, replace)]))


def assert_is(found: Tensor, wanted: Tensor, dtype: torch.dtype = torch.float32) -> None:
    scale = metric(model_of("griffin")(CORRUPTED)).abs().max() + 1
    bound = FP32_PARITY if dtype == torch.float32 else BF16
    assert float((found - wanted).abs().max()) < bound * float(scale)


@models
@pytest.mark.parametrize(
    ("sweep", "leaf", "dtype"),
    [
        (patch_resid_pre, "resid_pre", torch.float32),
        (patch_mixer_out, "mixer_out", torch.float32),
        (patch_mlp_out, "mlp_out", torch.bfloat16),
        (patch_states, "ssm_state", torch.float32),
        (patch_states, "ssm_state", torch.bfloat16),
    ],
)
def test_each_position_is_the_patch_of_that_position(
    name: str, sweep: Any, leaf: str, dtype: torch.dtype
):
    model, cache = model_of(name, dtype), clean_cache(name, dtype)
    positions = (0, 4)
    grid = sweep(model, CORRUPTED, cache, metric, positions=positions, verbose=False)
    layers = (1,) if leaf == "ssm_state" else (0, 1, 2)
    assert grid.axes == ("layer", "pos", "batch")
    assert grid.labels == (layers, positions, (0, 1))
    corrupted = unpatched(model)
    for layer in layers:
        full = next(n for n in model.hook_dict if n.startswith(f"blocks.{layer}.") and leaf in n)
        for t in positions:
            wanted = put(model, full, cache[full], (slice(None), t)) - corrupted
            assert_is(grid[layer, t], wanted, dtype)
    assert float(grid.values.abs().max()) > 1e-3


@models
@pytest.mark.parametrize("leaf", ["z", "k", "pattern"])
def test_each_head_is_the_patch_of_that_head(name: str, leaf: str):
    model, cache = model_of(name), clean_cache(name)
    grid = patch_heads(model, CORRUPTED, cache, metric, leaf, verbose=False)
    by_pos = patch_heads(
        model, CORRUPTED, cache, metric, leaf, True, positions=[2, 5], verbose=False
    )
    n_heads = 2 if leaf in "kv" else 4
    assert grid.axes == ("layer", "head", "batch")
    assert by_pos.axes == ("layer", "head", "pos", "batch")
    assert grid.labels == ((0, 2), tuple(range(n_heads)), (0, 1))
    corrupted, every = metric(model(CORRUPTED)), slice(None)
    for layer in (0, 2):
        full, head = f"blocks.{layer}.attn.hook_{leaf}", n_heads - 1
        at: Any = (every, head) if leaf == "pattern" else (every, every, head)
        assert_is(grid[layer, head], put(model, full, cache[full], at) - corrupted)
        at = (every, head, 5) if leaf == "pattern" else (every, 5, head)
        assert_is(by_pos[layer, head, 5], put(model, full, cache[full], at) - corrupted)
    scores = grid.head_scores()
    assert scores.layers == (0, 2)
    assert scores[2, 1] == pytest.approx(float(grid[2, 1].mean()))


@models
def test_the_whole_clean_stream_restores_everything_and_the_scale_says_so(name: str):
    model, cache = model_of(name), clean_cache(name)
    scaled = normalised(metric, model(CLEAN), model(CORRUPTED))
    names = ["hook_embed", "blocks.1.hook_resid_pre", "unembed.hook_logits", "ln_final.hook_scale"]
    options: dict[str, Any] = {"difference": False, "verbose": False}
    grid = generic_activation_patch(model, CORRUPTED, cache, scaled, names, **options)
    for full in ("hook_embed", "blocks.1.hook_resid_pre", "unembed.hook_logits"):
        assert relative(grid[full], torch.ones(2)) < FP32_PARITY * 10
    wanted = scaled(
        model.run_with_hooks(CORRUPTED, fwd_hooks=interventions.freeze(cache, names[3]))
    )
    assert relative(grid[names[3]], wanted) < FP32_PARITY * 10


@models
def test_a_scalar_metric_has_no_rows_and_heads_may_be_chosen(name: str):
    model, cache = model_of(name), clean_cache(name)
    names = ["blocks.2.attn.hook_z"]
    grid = generic_activation_patch(
        model, CORRUPTED, cache, lambda y: metric(y).sum(), names, ["pos"], heads=[1], verbose=False
    )
    assert grid.axes == ("name", "pos")
    wanted = put(model, names[0], cache[names[0]], (slice(None), 4, 1)).sum()
    assert_is(grid[names[0], 4], wanted - metric(model(CORRUPTED)).sum())
    (labels, value), *_ = grid.top(2)
    assert abs(value) == pytest.approx(float(grid.values.abs().max()))
    assert float(grid[labels]) == value


@models
def test_padded_rows_are_patched_at_their_own_positions(name: str):
    """The corrupted rows are padded on the left, the clean ones on the right."""
    model, lengths = model_of(name), (9, 6)
    left, right = torch.zeros(2, N_POS, dtype=torch.long), torch.zeros(2, N_POS, dtype=torch.long)
    corrupted, clean = CORRUPTED.clone(), CLEAN.clone()
    for i, n in enumerate(lengths):
        left[i, N_POS - n :], right[i, :n] = 1, 1
        corrupted[i, N_POS - n :] = CORRUPTED[i, :n]
    cache = model.run_with_cache(
        clean, attention_mask=right, names_filter=lambda n: "ssm_state" in n or "resid_pre" in n
    )[1]
    last: Any = lambda logits: logits[:, -1, 5]  # noqa: E731
    for leaf in ("ssm_state", "resid_pre"):
        grid = patch_layers(
            model,
            corrupted,
            cache,
            last,
            leaf,
            attention_mask=left,
            clean_attention_mask=right,
            positions=(0, 3, 5),
            verbose=False,
        )
        for i, n in enumerate(lengths):
            alone = patch_layers(
                model,
                CORRUPTED[i : i + 1, :n],
                cache.apply_slice_to_batch_dim(slice(i, i + 1)),
                last,
                leaf,
                clean_attention_mask=right[i : i + 1],
                positions=(0, 3, 5),
                verbose=False,
            )
            assert_is(grid.values[..., i], alone.values[..., 0])


def test_hooks_of_the_user_act_once_in_every_cell():
    """A cell begins at its own layer, where what stands before it has been edited already."""
    model, cache = model_of("griffin"), clean_cache("griffin")

    def doubled(value: Tensor, hook: HookPoint) -> Tensor:
        return 2 * value

    with model.hooks([("blocks.1.hook_resid_pre", doubled)]):
        grid = patch_mixer_out(model, CORRUPTED, cache, metric, positions=[4], verbose=False)
        full = "blocks.1.hook_mixer_out"
        corrupted = unpatched(model)
        wanted = put(model, full, cache[full], (slice(None), 4)) - corrupted
    assert_is(grid[1, 4], wanted)


def test_mistakes_are_refused(unchecked: None):
    model, cache = model_of("griffin"), clean_cache("griffin")
    options: dict[str, Any] = {"verbose": False}
    small = model.run_with_cache(CLEAN, names_filter="hook_embed")[1]
    with pytest.raises(ValueError, match="the clean cache lacks blocks.1.mixer.hook_ssm_state"):
        patch_states(model, CORRUPTED, small, metric, **options)
    with pytest.raises(ValueError, match="none of them heads"):
        patch_layers(model, CORRUPTED, cache, metric, "mlp_out", ["head"], **options)
    with pytest.raises(ValueError, match="numbers of heads differ"):
        names = ["blocks.0.attn.hook_q", "blocks.0.attn.hook_k"]
        generic_activation_patch(model, CORRUPTED, cache, metric, names, ["head"], **options)
    with pytest.raises(ValueError, match="axes"):
        patch_layers(model, CORRUPTED, cache, metric, "z", ["layer"], **options)  # type: ignore[list-item]
    with pytest.raises(HookNameError):
        patch_layers(model, CORRUPTED, cache, metric, "none", **options)
    grid = patch_mlp_out(model, CORRUPTED, cache, metric, positions=1, **options)
    with pytest.raises(KeyError, match="layer 7"):
        grid[7]
    with pytest.raises(ValueError, match="axes"):
        grid.head_scores()
    assert not model.list_hooks()
