"""The logit lens against the model run from each depth, over depth and over generated tokens."""

from __future__ import annotations

import re

import jaxtyping
import pytest
import torch

from hooked_hybrid.analysis import lens as lens_module
from hooked_hybrid.analysis.lens import (
    lens_of_generation,
    lens_ranks,
    lens_top_tokens,
    logit_lens,
    token_over_depth,
)
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.model.residual import reading as residual_reading
from tests.models import CONFIGS, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY

MODELS = {name: tiny_model(name) for name in CONFIGS}
TOKENS = random_tokens(batch=2, n_pos=9)
RUNS = {name: model.run_with_cache(TOKENS) for name, model in MODELS.items()}
every_config = pytest.mark.parametrize("config", CONFIGS)


@pytest.fixture
def small_blocks(monkeypatch):
    """Blocks of two rows, so that several make one depth."""
    monkeypatch.setattr(lens_module, "BLOCK_VALUES", 2 * 61)


@every_config
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_last_depth_is_the_models_own_output_bit_for_bit(config, dtype):
    model = tiny_model(config, dtype=dtype)
    own, cache = model.run_with_cache(TOKENS)
    values, labels = logit_lens(model, cache)
    assert labels == [*(f"{i}_pre" for i in range(model.cfg.n_layers)), "final_post"]
    assert values.dtype == own.dtype and torch.equal(values[-1], own)
    uncapped = logit_lens(model, cache, [-1], soft_cap=False).values[0]
    assert torch.equal(uncapped, cache["logits"])


@every_config
def test_each_depth_is_the_model_with_its_later_layers_cut(config):
    """Layers that write nothing leave the stream as it entered them."""
    model, (_, cache) = MODELS[config], RUNS[config]
    values, labels = logit_lens(model, cache, incl_mid=True)
    n = model.cfg.n_layers
    assert labels == [f"{i}_{at}" for i in range(n) for at in ("pre", "mid")] + ["final_post"]

    def writes(layer: int, of: str) -> str:
        return f"blocks.{layer}.hook_{of}_out"

    order = [writes(i, of) for i in range(n) for of in ("mixer", "mlp")]
    for depth in range(len(labels)):
        cut = [(name, lambda x, hook: 0 * x) for name in order[depth:]]
        assert relative(values[depth], model.run_with_hooks(TOKENS, fwd_hooks=cut)) < FP32_PARITY


@every_config
def test_the_values_of_a_token_are_those_of_the_whole_lens(config, small_blocks):
    model, (_, cache) = MODELS[config], RUNS[config]
    logits = logit_lens(model, cache).values
    ids = TOKENS.expand(len(logits), -1, -1)[..., None]
    for kind, whole in {
        "logits": logits,
        "probs": logits.softmax(-1),
        "logprobs": logits.log_softmax(-1),
    }.items():
        assert relative(logit_lens(model, cache, kind=kind).values, whole) < FP32_PARITY
        got = token_over_depth(model, cache, TOKENS, kind).values
        assert relative(got, whole.gather(-1, ids)[..., 0]) < FP32_PARITY
    order = logits.argsort(dim=-1, descending=True)
    ranks = (order == ids).int().argmax(-1)
    assert torch.equal(lens_ranks(model, cache, TOKENS).values, ranks)
    assert torch.equal(token_over_depth(model, cache, TOKENS, "ranks").values, ranks)
    top = lens_top_tokens(model, cache, 3)
    assert torch.equal(top.tokens, order[..., :3])
    assert relative(top.probs, logits.softmax(-1).topk(3).values) < FP32_PARITY


def test_layers_positions_and_tokens():
    model, (_, cache) = MODELS["griffin"], RUNS["griffin"]
    whole = logit_lens(model, cache).values
    some = logit_lens(model, cache, [-1, 2], pos_slice=[3, -1])
    assert some.labels == ["final_post", "2_pre"]
    assert relative(some.values, whole[[4, 2]][:, :, [3, -1]]) < FP32_PARITY
    one = token_over_depth(model, cache, 7, "logits", pos_slice=-1)
    assert relative(one.values, whole[:, :, -1, 7]) < FP32_PARITY
    by_row = token_over_depth(model, cache, [7, 8], "logits").values
    assert relative(by_row[:, 1], whole[:, 1, :, 8]) < FP32_PARITY
    row = cache.apply_slice_to_batch_dim(1)
    assert relative(logit_lens(model, row).values, whole[:, 1]) < FP32_PARITY
    got = token_over_depth(model, row, TOKENS[1], "logits").values
    assert (
        relative(got, whole[:, 1].gather(-1, TOKENS[1].expand(5, -1)[..., None])[..., 0])
        < FP32_PARITY
    )


def test_hooks_on_the_final_norm_are_in_the_last_depth():
    model = MODELS["griffin"]
    with model.hooks([("ln_final.hook_scale", lambda x, hook: 2 * x)]):
        own, cache = model.run_with_cache(TOKENS)
    assert torch.equal(logit_lens(model, cache, [-1]).values[0], own)


@pytest.mark.parametrize("config", ["griffin", "jamba"])
def test_generated_tokens_have_the_log_probabilities_they_were_chosen_with(config):
    model = MODELS[config]
    first = model.generate(TOKENS, 6, stop_at_eos=False, return_type="output", verbose=False)
    ends = int(first.new_tokens[0, 1])
    options = {"eos_token_id": ends, "return_type": "output", "verbose": False}
    out = model.generate(TOKENS, 6, names_filter=True, **options)
    values, labels = lens_of_generation(model, out)
    n_chosen = int((out.new_tokens[0] == ends).int().argmax()) + 1
    assert n_chosen < out.new_tokens.shape[1] and labels[-1] == "final_post"
    assert bool(values[:, 0, n_chosen:].isnan().all())
    assert not bool(values[:, 0, :n_chosen].isnan().any() or values[:, 1].isnan().any())
    assert relative(values[-1, 1], out.logprobs[1]) < FP32_PARITY
    assert relative(values[-1, 0, :n_chosen], out.logprobs[0, :n_chosen]) < FP32_PARITY
    ranks = lens_of_generation(model, out, "ranks").values
    assert bool((ranks[-1, 1] == 0).all()) and bool((ranks[:, 0, n_chosen:] == -1).all())
    _, whole = model.run_with_cache(out.tokens[:, :-1])
    pos = slice(TOKENS.shape[1] - 1, None)
    wanted = token_over_depth(model, whole, out.new_tokens, pos_slice=pos).values
    assert relative(values[:, 1], wanted[:, 1]) < FP32_PARITY


def test_the_error_of_a_generation_without_a_cache_gives_a_sufficient_remedy():
    model = MODELS["jamba"]
    options = {"return_type": "output", "verbose": False, "stop_at_eos": False}
    out = model.generate(TOKENS, 3, **options)
    with pytest.raises(ValueError, match="kept no cache") as error:
        lens_of_generation(model, out)
    advised = re.search(r"names_filter=(lambda name: .*?\)\))", str(error.value))
    assert advised is not None
    out = model.generate(TOKENS, 3, names_filter=eval(advised[1]), **options)
    assert relative(lens_of_generation(model, out).values[-1], out.logprobs) < FP32_PARITY


def test_errors_name_the_value_and_the_remedy(monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as users have it
    model, (_, cache) = MODELS["griffin"], RUNS["griffin"]
    _, little = model.run_with_cache(TOKENS, names_filter="hook_embed")
    with pytest.raises(HookNameError, match="the lens needs 'blocks.0.hook_resid_post' and 3 oth"):
        logit_lens(model, little)
    for message, call in {
        "layers=.5.: give depths from 0 to 4": lambda: logit_lens(model, cache, [5]),
        "layers=..: give depths": lambda: logit_lens(model, cache, []),
        "kind='ranks': give one of": lambda: logit_lens(model, cache, kind="ranks"),
        "kind='rank': give one of": lambda: token_over_depth(model, cache, 5, "rank"),
        "k=62: give 1 to 61": lambda: lens_top_tokens(model, cache, 62),
        r"tokens have shape \(3,\)": lambda: lens_ranks(model, cache, [1, 2, 3]),
        "the vocabulary has 61": lambda: lens_ranks(model, cache, 61),
    }.items():
        with pytest.raises(ValueError, match=message):
            call()
    monkeypatch.setattr(residual_reading, "WORTH_CHECKING", 1)
    monkeypatch.setattr(residual_reading, "available_bytes", lambda device: 1000)
    with pytest.raises(MemoryError, match="this lens needs .* or use token_over_depth"):
        logit_lens(model, cache)
    assert lens_ranks(model, cache, 5).values.shape == (5, 2, 9)
