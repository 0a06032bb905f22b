"""Folding a norm's weight changes nothing but the few hook points between it and its readers."""

from __future__ import annotations

import dataclasses
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, interventions
from hooked_hybrid.model.folding import FoldRecord, fold_ln, unfold_ln
from hooked_hybrid.network.layers import InnerNorm, RMSNorm
from tests.models import (
    CONFIGS,
    griffin_config,
    jamba_config,
    layouts,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import BF16, FP32_PARITY

each = pytest.mark.parametrize("name", CONFIGS)
AFTER_A_NORM = ("hook_q_input", "hook_k_input", "hook_v_input", "hook_dt_low")


@cache
def original(name: str) -> HookedHybrid:
    return tiny_model(name)


@cache
def folded(name: str) -> tuple[HookedHybrid, FoldRecord]:
    return fold_ln(original(name))


def weights(model: HookedHybrid) -> dict[str, Tensor]:
    return {name: t.clone() for name, t in model.state_dict().items()}


def assert_same_bits(model: HookedHybrid, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[n], t) and after[n].dtype == t.dtype for n, t in before.items())


@each
def test_logits_are_as_before(name: str) -> None:
    model, _ = folded(name)
    tokens = random_tokens()
    assert relative(model(tokens), original(name)(tokens)) < FP32_PARITY


@each
def test_logits_are_as_before_with_padding_and_a_state(name: str) -> None:
    model, _ = folded(name)
    tokens, mask = random_tokens(3), torch.ones(3, 20, dtype=torch.long)
    mask[0, :6] = mask[1, 15:] = 0
    ours, state = model(tokens, attention_mask=mask, return_state=True)
    theirs, before = original(name)(tokens, attention_mask=mask, return_state=True)
    assert relative(ours[mask > 0], theirs[mask > 0]) < FP32_PARITY
    # States mean the same: one model goes on from the other's.
    more = random_tokens(3, 5, seed=1)
    assert relative(model(more, state=before), original(name)(more, state=state)) < FP32_PARITY


@each
def test_every_norm_multiplies_by_exactly_one(name: str) -> None:
    model, _ = folded(name)
    norms = {n: m for n, m in model.named_modules() if isinstance(m, RMSNorm)}
    assert len(norms) == 2 * model.cfg.n_layers + 1
    for norm in norms.values():
        assert torch.equal(norm.w, torch.ones_like(norm.w))
    inner = {n: m for n, m in model.named_modules() if isinstance(m, InnerNorm)}
    for path, norm in inner.items():
        was = original(name).get_submodule(path).weight
        assert torch.equal(norm.weight, torch.ones_like(was) if "dt_norm" in path else was)


@each
def test_hook_points_between_norm_and_reader_lose_the_weight_and_no_other_changes(
    name: str,
) -> None:
    before, (model, record) = original(name), folded(name)
    assert set(record.changed_hooks) == {
        n for n in before.hook_dict if n.rpartition(".")[2] in AFTER_A_NORM
    }
    multiplier = {n: f.multiplier for f in record.folds for n in f.hooks}
    assert model.hook_dict.keys() == before.hook_dict.keys()
    tokens, everything = random_tokens(), list(before.hook_dict)
    _, theirs = before.run_with_cache(tokens, names_filter=everything)
    _, ours = model.run_with_cache(tokens, names_filter=everything)
    for point in everything:
        if point not in multiplier:
            assert relative(ours[point].float(), theirs[point].float()) < FP32_PARITY, point
            continue
        assert relative(ours[point], theirs[point]) > 0.1, point
        assert relative(ours[point] * multiplier[point], theirs[point]) < FP32_PARITY, point


@each
def test_interventions_do_the_same(name: str) -> None:
    layer = original(name).cfg.attention_layers[0]
    path = f"blocks.{layer}.attn.hook_pattern"

    def first_key_only(pattern: Tensor, hook: Any) -> Tensor:
        return torch.zeros_like(pattern).index_fill(-1, torch.tensor([0]), 1.0)

    for hooks in (interventions.keep_top_heads(1), [(path, first_key_only)]):
        ours, theirs = (
            m.run_with_hooks(random_tokens(), fwd_hooks=hooks)
            for m in (folded(name)[0], original(name))
        )
        assert relative(theirs, original(name)(random_tokens())) > 1e-3
        assert relative(ours, theirs) < FP32_PARITY


@each
def test_gradients_of_the_residual_stream_are_as_before(name: str) -> None:
    grads = []
    for model in (folded(name)[0], original(name)):
        _, cache = model.run_with_cache(
            random_tokens(), names_filter="blocks.0.hook_resid_pre", incl_bwd=True
        )
        grads.append(cache["blocks.0.hook_resid_pre_grad"])
    assert relative(*grads) < FP32_PARITY


@each
def test_unfolding_restores_every_bit(name: str) -> None:
    before = weights(original(name))
    model, record = folded(name)
    back = unfold_ln(model, record)
    assert_same_bits(back, before)
    assert back.cfg == original(name).cfg
    assert layouts(back) == layouts(original(name))
    assert torch.equal(back(random_tokens()), original(name)(random_tokens()))
    # Neither fold_ln nor unfold_ln touched what they were given.
    assert_same_bits(original(name), before)
    assert all(torch.equal(m.w, torch.ones(24)) for m in model.modules() if isinstance(m, RMSNorm))


@each
def test_in_place_is_the_same_model_folded_and_back(name: str) -> None:
    model = tiny_model(name)
    before, memory = weights(model), layouts(model)
    result, record = fold_ln(model, inplace=True)
    assert result is model
    assert_same_bits(model, weights(folded(name)[0]))
    assert relative(model(random_tokens()), original(name)(random_tokens())) < FP32_PARITY
    assert record.n_bytes == sum(before[n].numel() * 4 for n in record.originals)
    assert unfold_ln(model, record, inplace=True) is model
    assert_same_bits(model, before)
    assert layouts(model) == memory
    assert model.cfg == original(name).cfg


@each
def test_models_share_no_memory(name: str) -> None:
    model, record = folded(name)
    back = unfold_ln(model, record)
    seen = [{p.data_ptr() for p in m.parameters()} for m in (original(name), model, back)]
    assert not seen[0] & seen[1] and not seen[0] & seen[2] and not seen[1] & seen[2]


@each
def test_a_tied_embedding_stays_and_the_unembedding_becomes_its_own(name: str) -> None:
    before, (model, record) = original(name), folded(name)
    assert record.was_tied == before.cfg.tied_embedding
    assert not model.cfg.tied_embedding
    assert torch.equal(model.W_E, before.W_E)
    assert relative(model.W_U, before.W_U * before.ln_final.w[:, None]) < FP32_PARITY


@each
def test_folding_twice_changes_nothing_more(name: str) -> None:
    model, _ = folded(name)
    again, record = fold_ln(model)
    assert_same_bits(again, weights(model))
    assert all(torch.equal(f.multiplier, torch.ones_like(f.multiplier)) for f in record.folds)


def test_the_norm_of_dt_can_stay() -> None:
    model, record = fold_ln(original("jamba"), inner_norms=False)
    path = "blocks.0.mixer.dt_norm.weight"
    assert torch.equal(model.state_dict()[path], original("jamba").state_dict()[path])
    assert not any("dt_low" in name for name in record.changed_hooks)
    assert relative(model(random_tokens()), original("jamba")(random_tokens())) < FP32_PARITY


def test_biases_of_the_readers_are_left_alone() -> None:
    cfg = griffin_config("RA")
    biased = dataclasses.replace(cfg.layers[1].mixer, qkv_bias=True)
    layers = (cfg.layers[0], dataclasses.replace(cfg.layers[1], mixer=biased))
    mamba = jamba_config("MA")
    projected = dataclasses.replace(mamba.layers[0].mixer, proj_bias=True)
    mamba_layers = (dataclasses.replace(mamba.layers[0], mixer=projected), mamba.layers[1])
    for changed in (
        dataclasses.replace(cfg, layers=layers),
        dataclasses.replace(mamba, layers=mamba_layers),
    ):
        model = random_model(changed)
        ours = fold_ln(model)[0]
        assert relative(ours(random_tokens()), model(random_tokens())) < FP32_PARITY


def test_training_mode_gradients_and_tokenizer_carry_over() -> None:
    model = tiny_model().train()
    model.tokenizer = object()
    model.blocks[0].ln1.weight.requires_grad_(True)
    model.blocks[0].mixer.linear_x.weight.requires_grad_(True)
    other, record = fold_ln(model)
    assert other.training and other.tokenizer is model.tokenizer
    trained = {n for n, p in other.named_parameters() if p.requires_grad}
    assert trained == {"blocks.0.ln1.weight", "blocks.0.mixer.linear_x.weight"}
    assert {n for n, p in unfold_ln(other, record).named_parameters() if p.requires_grad} == trained


def test_hooks_stay_on_the_model_they_were_attached_to() -> None:
    model = tiny_model()
    model.add_perma_hook("hook_embed", lambda x, hook: x * 0)
    other, _ = fold_ln(model)
    assert not other.list_hooks()
    fold_ln(model, inplace=True)
    assert len(model.list_hooks()) == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_folds_in_float32_and_says_that_it_rounds(dtype: torch.dtype) -> None:
    model = tiny_model("griffin", dtype=dtype)
    with pytest.warns(RuntimeWarning, match=f"rounded to {dtype}"):
        other, record = fold_ln(model)
    W, w = model.blocks[2].attn.q.weight, model.blocks[2].ln1.weight
    assert torch.equal(other.blocks[2].attn.q.weight, (W.float() * (1 + w.float())).to(dtype))
    assert {p.dtype for p in other.parameters()} == {dtype}
    assert relative(other(random_tokens()).float(), model(random_tokens()).float()) < BF16
    assert_same_bits(unfold_ln(other, record), weights(model))


@each
def test_saved_as_published_and_loaded_again(name: str, tmp_path: Path) -> None:
    model, _ = folded(name)
    model.save_pretrained(tmp_path / "folded")
    back = HookedHybrid.from_pretrained(tmp_path / "folded")
    assert_same_bits(back, weights(model))
    assert torch.equal(back(random_tokens()), model(random_tokens()))


@pytest.mark.parametrize("name", ["griffin", "jamba-dense-ends-in-attention"])
def test_transformers_loads_a_folded_model_with_its_own_head(name: str, tmp_path: Path) -> None:
    model, _ = folded(name)
    model.save_pretrained(tmp_path / "folded")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "folded", dtype=torch.float32).eval()
    with torch.no_grad():
        logits = theirs(random_tokens()).logits
    assert relative(original(name)(random_tokens()), logits) < FP32_PARITY


def test_edits_of_a_folded_model_are_not_lost_silently() -> None:
    model, record = fold_ln(original("griffin"))
    with torch.no_grad():
        model.blocks[2].attn.q.weight[0, 0] += 1
    with pytest.raises(ValueError, match=r"blocks\.2\.attn\.q\.weight is not what fold_ln left"):
        unfold_ln(model, record)
    with pytest.raises(ValueError, match="unfold before you edit or convert"):
        unfold_ln(fold_ln(original("griffin"))[0].double(), record)
    with pytest.raises(ValueError, match="is not what fold_ln left"):
        unfold_ln(original("griffin"), record)
    with pytest.raises(ValueError, match="the record is of another model"):
        unfold_ln(folded("jamba")[0], record)


def test_a_model_without_weights_cannot_be_folded() -> None:
    with pytest.raises(ValueError, match="meta device"):
        fold_ln(HookedHybrid.meta(CONFIGS["griffin"]))
