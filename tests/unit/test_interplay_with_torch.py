"""Models go through what torch and its neighbours do with any module: saved, copied, converted."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, load_model, save_file, save_model

from hooked_hybrid import HookedHybrid
from tests.models import (
    CONFIGS,
    jamba_config,
    layouts,
    random_model,
    random_tokens,
    tiny_model,
)

models = pytest.mark.parametrize("name", list(CONFIGS))
families = pytest.mark.parametrize("name", ["griffin", "jamba"])


def wide_model(tied: bool) -> HookedHybrid:
    """Return a model whose embedding, too, lies along its outputs."""
    return random_model(jamba_config("MA", tied_embedding=tied))


def other_model(model: HookedHybrid) -> HookedHybrid:
    """Return another model of the same config."""
    return random_model(model._cfg, seed=7)


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
def test_weights_are_saved_by_safetensors_and_loaded_strictly(tied: bool, tmp_path: Path):
    model, tokens = wide_model(tied), random_tokens()
    assert not all(weight.is_contiguous() for weight in model.parameters())
    wanted = model(tokens)

    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    for assign in (False, True):
        loaded = other_model(model)
        loaded.load_state_dict(load_file(tmp_path / "weights.safetensors"), assign=assign)
        assert torch.equal(loaded(tokens), wanted)
        assert layouts(loaded) == layouts(model)

    save_model(model, str(tmp_path / "model.safetensors"))
    loaded = other_model(model)
    load_model(loaded, tmp_path / "model.safetensors", strict=True)
    assert torch.equal(loaded(tokens), wanted)

    torch.save(model.state_dict(), tmp_path / "weights.pt")
    loaded.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert torch.equal(loaded(tokens), wanted)


@models
def test_a_state_dict_is_the_weights_and_no_write_to_it_is_lost(name: str):
    """A write reaches the model, or is an error."""
    model = tiny_model(name)
    kept = model.state_dict()
    assert kept.keys() == dict(model.named_parameters()).keys()
    n_refused = 0
    for key, weight in model.named_parameters():
        assert torch.equal(kept[key], weight)
        assert kept[key].is_contiguous()
        try:
            kept[key].fill_(0.5)
        except RuntimeError as error:
            assert "Inplace update to inference tensor" in str(error)
            n_refused += 1
        else:
            assert bool((weight == 0.5).all())
    assert 0 < n_refused < len(kept)
    copied = copy.deepcopy(kept)
    for key, t in model.state_dict(keep_vars=True).items():
        assert t is model.get_parameter(key)
        copied[key].zero_()  # a copy is the caller's own
        assert bool((t != 0).any())


@models
def test_a_model_that_was_given_a_state_dict_can_be_trained(name: str):
    model, tokens = tiny_model(name), random_tokens()
    model.load_state_dict(other_model(model).state_dict(), assign=True)
    model.requires_grad_(True)
    model(tokens, return_type="loss").backward()
    assert all(p.grad is not None and not p.is_inference() for p in model.parameters())
