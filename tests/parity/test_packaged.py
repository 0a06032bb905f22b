"""The packaged models: transformers reads the same folders and computes the same."""

from __future__ import annotations

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: TID251

from hooked_hybrid import HookedHybrid
from hooked_hybrid.config import AttentionConfig, MambaConfig, MoEConfig, RGLRUConfig
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import grid
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.presets.packaged import packaged_models
from tests.tolerances import FP32_PARITY
from tests.transformers_versions import SLOW_MAMBA, WINDOWED
from weights_conversion import CheckpointError

ROOT = Path(__file__).parents[2]
MOST_BYTES = 8_000_000
NAMES = ("tiny-griffin", "tiny-jamba")
each = pytest.mark.parametrize("name", NAMES)


@cache
def ours(name: str) -> HookedHybrid:
    return HookedHybrid.from_pretrained(name, dtype=torch.float32)


def unwindowed(name: str) -> HookedHybrid:
    """Return the model as transformers before 5.4 computes a forward without a cache."""
    changes = {"n_keys": None} if "griffin" in name else {}
    return HookedHybrid.from_pretrained(name, dtype=torch.float32, **changes)


@cache
def theirs(name: str) -> Any:
    folder = packaged_models()[name]
    options = SLOW_MAMBA if "jamba" in name else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()


@cache
def prompts(name: str, length: int = 300) -> list[Any]:
    return grid(ours(name), [PAPER, *held_out_needles()[:3]], [length], [0.4, 1.0])


def test_they_are_what_they_are_called() -> None:
    assert tuple(packaged_models()) == NAMES
    griffin, jamba = (ours(name).cfg for name in NAMES)
    kinds = [{type(layer.mixer) for layer in cfg.layers} for cfg in (griffin, jamba)]
    assert kinds == [{RGLRUConfig, AttentionConfig}, {MambaConfig, AttentionConfig}]
    assert any(isinstance(layer.mlp, MoEConfig) for layer in jamba.layers)
    assert 1 <= len(jamba.attention_layers) <= 2


@each
def test_logits_are_those_of_transformers(name: str) -> None:
    tokens = torch.tensor([prompt.tokens for prompt in prompts(name)])
    with torch.no_grad():
        expected = theirs(name)(tokens, use_cache=False).logits
        found = (ours(name) if WINDOWED else unwindowed(name))(tokens)
    assert (found - expected).abs().max() < FP32_PARITY * expected.abs().max()


@each
def test_generated_tokens_are_those_of_transformers(name: str) -> None:
    tokens = torch.tensor([prompt.tokens for prompt in prompts(name)])
    expected = theirs(name).generate(tokens, max_new_tokens=30, do_sample=False)
    found = ours(name).generate(tokens, 30, return_type="tokens", verbose=False)
    n = min(found.shape[1], expected.shape[1])
    assert torch.equal(found[:, :n], expected[:, :n])
    assert n > tokens.shape[1] + 20


@each
def test_the_tokenizer_is_that_of_transformers(name: str) -> None:
    tokenizer, model = AutoTokenizer.from_pretrained(packaged_models()[name]), ours(name)
    text = f"CONTEXT:\nThe sea can heal a loud song . {PAPER.sentence}\nQUESTION:\nzebra?"
    assert tokenizer(text)["input_ids"] == model.to_tokens(text)[0].tolist()
    plain = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert plain == model.to_tokens(text, prepend_bos=False)[0].tolist()
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    cfg = model.cfg
    assert specials == (cfg.bos_token_id, cfg.eos_token_id, cfg.pad_token_id)


@each
def test_attention_is_what_retrieves(name: str) -> None:
    """A sample of what the model card reports."""
    in_window = [prompt for prompt in prompts(name, 220)]
    settings = [Setting("whole"), *top_k_settings([0])]
    table = niah(ours(name), in_window, settings, verbose=False)
    accuracy = table.groupby("setting")["accuracy"].mean()
    assert accuracy["whole"] > 0.95
    assert accuracy["generation k=0"] < 0.15
    assert accuracy["both k=0"] < 0.15


@each
def test_a_folder_is_small_and_has_its_card(name: str) -> None:
    files = [file for file in packaged_models()[name].iterdir() if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= MOST_BYTES
    assert {"config.json", "model.safetensors", "tokenizer.json", "README.md"} <= {
        file.name for file in files
    }


def test_the_error_of_an_unknown_model_lists_the_packaged_ones(tmp_path: Path) -> None:
    for wrong in ("tiny-grifin!", "tiny grifin"):
        with pytest.raises(CheckpointError, match="tiny-griffin, tiny-jamba"):
            HookedHybrid.from_pretrained(wrong)
    with pytest.raises(CheckpointError, match="no revision"):
        HookedHybrid.from_pretrained("tiny-griffin", revision="main")


def test_a_folder_of_the_same_name_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packaged_models()["tiny-jamba"], tmp_path / "tiny-griffin")
    monkeypatch.chdir(tmp_path)
    found = HookedHybrid.from_pretrained("tiny-griffin")
    assert found.cfg == ours("tiny-jamba").cfg
