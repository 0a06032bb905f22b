"""`model.cfg` says what TransformerLens's functions ask a config for."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.config import GatedMLPConfig, LayerConfig
from hooked_hybrid.presets import configs as presets
from tests.models import CONFIGS, tiny_model


@pytest.mark.parametrize("name", CONFIGS)
def test_device_and_dtype_are_the_models_own_at_any_time(name):
    model, cfg = tiny_model(name), CONFIGS[name]
    assert (cfg.device, cfg.dtype) == (None, None)
    assert (model.cfg.device, model.cfg.dtype) == (torch.device("cpu"), torch.float32)
    other = copy.deepcopy(model).to(torch.bfloat16)
    assert (other.cfg.dtype, model.cfg.dtype) == (torch.bfloat16, torch.float32)
    assert HookedHybrid.meta(model.cfg).cfg.device == torch.device("meta")
    other.cfg = cfg
    assert other.cfg.dtype is torch.bfloat16


def test_they_are_no_part_of_what_a_config_is():
    model = tiny_model()
    assert model.cfg == CONFIGS["griffin"]
    assert hash(model.cfg) == hash(CONFIGS["griffin"])
    assert repr(model.cfg) == repr(CONFIGS["griffin"])
    assert model.cfg.with_overrides(n_ctx=7).dtype is None
    assert pickle.loads(pickle.dumps(model.cfg)).dtype is torch.float32


def test_the_config_of_a_model_stays_one_object():
    model = tiny_model()
    assert model.cfg is model.cfg


def test_widths_that_all_layers_share():
    cfg = CONFIGS["griffin-gqa-ends-in-attention"]
    assert (cfg.n_heads, cfg.n_key_value_heads, cfg.d_mlp) == (4, 2, 20)
    assert (cfg.attn_only, cfg.normalization_type) == (False, "RMS")
    wide = LayerConfig(cfg.layers[0].mixer, GatedMLPConfig(40))
    uneven = dataclasses.replace(cfg, layers=(*cfg.layers, wide))
    with pytest.raises(AttributeError, match=r"layers have d_mlp in \[20, 40\]: not one value"):
        _ = uneven.d_mlp
    with pytest.raises(AttributeError, match=r"attention layers have n_kv_heads in \[\]"):
        _ = presets.griffin("RR").n_key_value_heads
