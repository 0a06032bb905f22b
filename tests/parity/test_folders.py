"""Which files of a folder are read, and under which names: what transformers reads, said aloud."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HybridConfig
from tests.references import SPECS, hf_recurrentgemma
from weights_conversion import CheckpointError, check
from weights_conversion.names import strip_wrappers
from weights_conversion.sources import MemorySource

GOLDEN = Path(__file__).parents[1] / "golden"
SPEC = "window_of_3"
SMALL_SHARD = "20KB"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"

hf = cache(lambda seed: hf_recurrentgemma(SPECS[SPEC]) if seed == 0 else moved(seed))


def moved(seed: int) -> Any:
    """The same model with an embedding of its own, to tell files apart by."""
    model = hf_recurrentgemma(SPECS[SPEC])
    with torch.no_grad():
        model.model.embed_tokens.weight += seed
    return model


def wrote(seed: int, kind: str, folder: Path) -> None:
    """Write a model of transformers' as one of the four kinds of files that it reads."""
    shards = {"max_shard_size": SMALL_SHARD} if kind in (INDEX, BIN_INDEX) else {}
    if kind in (SINGLE, INDEX):
        for left in folder.glob("generation_config.json"):
            left.unlink()
        hf(seed).save_pretrained(inner := folder / "inner", **shards)
    else:  # transformers 5 writes no more of these; 4 wrote a tied head too
        inner = folder / "inner"
        hf(seed).config.save_pretrained(inner)
        state = dict(hf(seed).state_dict())
        assert state["lm_head.weight"].data_ptr() == state["model.embed_tokens.weight"].data_ptr()
        if kind == BIN:
            torch.save(state, inner / BIN)
        else:
            parts = [dict(list(state.items())[i::3]) for i in range(3)]
            files = [f"pytorch_model-0000{i}-of-00003.bin" for i in (1, 2, 3)]
            for part, file in zip(parts, files, strict=True):
                torch.save({name: t.clone() for name, t in part.items()}, inner / file)
            weight_map = {n: f for part, f in zip(parts, files, strict=True) for n in part}
            (inner / BIN_INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    for path in inner.iterdir():
        shutil.move(path, folder / path.name)
    inner.rmdir()


def embedding(model: HookedHybrid) -> Tensor:
    return model.W_E


@pytest.mark.parametrize("kind", [SINGLE, INDEX, BIN, BIN_INDEX])
def test_each_kind_of_files_loads_bit_for_bit(kind: str, tmp_path: Path):
    wrote(0, kind, tmp_path)
    expected = HookedHybrid.from_hf(hf(0)).state_dict()
    model = HookedHybrid.from_pretrained(tmp_path)
    assert all(t.equal(expected[name]) for name, t in model.state_dict().items())
    assert "become" in check(tmp_path)


PAIRS = [
    (first, second)
    for i, first in enumerate([SINGLE, INDEX, BIN, BIN_INDEX])
    for second in [SINGLE, INDEX, BIN, BIN_INDEX][i + 1 :]
]


@pytest.mark.parametrize(("first", "second"), PAIRS)
@pytest.mark.parametrize("first_is_newer", [True, False])
def test_of_two_kinds_the_one_that_transformers_reads(
    first: str, second: str, first_is_newer: bool, tmp_path: Path
):
    order = [(2, second), (1, first)] if first_is_newer else [(1, first), (2, second)]
    for seed, kind in order:
        wrote(seed, kind, tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert theirs.model.embed_tokens.weight.equal(hf(1).model.embed_tokens.weight)
    with pytest.warns(UserWarning, match="holds weights twice") as seen:
        model = HookedHybrid.from_pretrained(tmp_path)
    assert embedding(model).equal(theirs.model.embed_tokens.weight)
    (message,) = [str(w.message) for w in seen]
    assert str(tmp_path) in message
    assert second in message or ", ..." in message
    with pytest.warns(UserWarning, match="holds weights twice"):
        check(tmp_path)


def test_shards_saved_over_by_one_file_load(tmp_path: Path):
    wrote(2, INDEX, tmp_path)
    for shard in tmp_path.glob("model-*.safetensors"):
        shard.unlink()
    wrote(1, SINGLE, tmp_path)
    with pytest.warns(UserWarning, match=f"not {INDEX}; remove"):
        model = HookedHybrid.from_pretrained(tmp_path)
    assert embedding(model).equal(hf(1).model.embed_tokens.weight)


def test_shards_of_an_earlier_saving_cause_a_warning_and_are_not_read(tmp_path: Path):
    wrote(2, INDEX, tmp_path)
    old = sorted(tmp_path.glob("model-*.safetensors"))
    for path in old:
        path.rename(path.with_name(path.name.replace("-of-000", "-of-001")))
    wrote(1, INDEX, tmp_path)
    with pytest.warns(UserWarning, match=r"model-00001-of-001\d\d.safetensors"):
        model = HookedHybrid.from_pretrained(tmp_path)
    assert embedding(model).equal(hf(1).model.embed_tokens.weight)


def test_offloaded_weights_follow_the_file_that_is_read(tmp_path: Path):
    folder, disk = tmp_path / "model", tmp_path / "disk"
    folder.mkdir()
    how: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": disk}
    wrote(1, BIN, folder)
    first = embedding(HookedHybrid.from_pretrained(folder, **how)).clone()
    (folder / BIN).unlink()
    wrote(2, BIN, folder)
    second = embedding(HookedHybrid.from_pretrained(folder, **how))
    assert first.equal(hf(1).model.embed_tokens.weight)
    assert second.equal(hf(2).model.embed_tokens.weight)


def test_a_missing_torch_shard_is_named(tmp_path: Path):
    wrote(0, BIN_INDEX, tmp_path)
    lost = tmp_path / "pytorch_model-00002-of-00003.bin"
    lost.unlink()
    with pytest.raises(CheckpointError, match=f"{lost} is missing"):
        HookedHybrid.from_pretrained(tmp_path)


def test_a_tensor_other_than_the_head_may_not_share_values_with_the_embedding(tmp_path: Path):
    wrote(0, BIN, tmp_path)
    state = torch.load(tmp_path / BIN)
    state |= {f"model.copy.{i}": state["model.embed_tokens.weight"] for i in range(9)}
    torch.save(state, tmp_path / BIN)
    with pytest.raises(CheckpointError, match="share their values"):
        HookedHybrid.from_pretrained(tmp_path)


# --- names ----------------------------------------------------------------------------------------


def renamed(folder: Path, rename: Callable[[str], str]) -> Path:
    tensors = load_file(folder / SINGLE)
    save_file({rename(name): t for name, t in tensors.items()}, folder / SINGLE)
    return folder


PREFIXES: dict[str, Callable[[str], str]] = {
    "compiled": lambda n: f"_orig_mod.{n}",
    "compiled layers": lambda n: n.replace(".temporal_block.", "._orig_mod.temporal_block."),
    "parallel": lambda n: f"module.{n}",
    "parallel and compiled": lambda n: f"module._orig_mod.{n}",
    "sharded over processes": lambda n: f"_fsdp_wrapped_module.{n}",
    "without the head": lambda n: n.removeprefix("model."),
}


@pytest.mark.parametrize("how", PREFIXES)
def test_names_of_a_wrapped_model_are_read_as_its_own(how: str, tmp_path: Path):
    wrote(0, SINGLE, tmp_path)
    model = HookedHybrid.from_pretrained(renamed(tmp_path, PREFIXES[how]))
    expected = HookedHybrid.from_hf(hf(0)).state_dict()
    assert all(t.equal(expected[name]) for name, t in model.state_dict().items())


def test_a_base_checkpoint_of_transformers_loads(tmp_path: Path):
    hf(0).model.save_pretrained(tmp_path)
    assert "RecurrentGemmaModel" in (tmp_path / "config.json").read_text()
    model = HookedHybrid.from_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    tokens = torch.arange(3)[None]  # as many as the window: 4.x has none in a plain forward
    with torch.no_grad():
        expected = theirs(tokens, use_cache=False).logits
    assert torch.allclose(model(tokens), expected, rtol=1e-5, atol=1e-5)
    inner = HookedHybrid.from_hf(AutoModel.from_pretrained(tmp_path))
    assert all(t.equal(model.state_dict()[name]) for name, t in inner.state_dict().items())


def test_a_base_checkpoint_whose_head_is_its_own_is_refused(tmp_path: Path):
    AutoModel.from_pretrained(GOLDEN / "jamba_hf").save_pretrained(tmp_path)
    for way in (HookedHybrid.from_pretrained, check):
        with pytest.raises(CheckpointError, match="missing: lm_head.weight.*base model"):
            way(tmp_path)


def test_another_prefix_is_named(tmp_path: Path):
    wrote(0, SINGLE, tmp_path)
    with pytest.raises(CheckpointError, match="prefix 'policy.net.'"):
        HookedHybrid.from_pretrained(renamed(tmp_path, lambda n: f"policy.net.{n}"))


def test_two_tensors_of_one_plain_name_are_refused():
    both = MemorySource({"a.weight": torch.ones(1), "_orig_mod.a.weight": torch.ones(1)})
    with pytest.raises(CheckpointError, match="'a.weight' and '_orig_mod.a.weight'|are both"):
        strip_wrappers(both)


class Wrapped(nn.Module):
    """As torch's data-parallel wrappers hold a model."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module


def compiled(module: nn.Module) -> Any:
    return torch.compile(module, backend="eager")


@pytest.mark.parametrize("wrap", [compiled, Wrapped, lambda m: compiled(Wrapped(m))])
def test_a_wrapped_model_in_memory_is_the_one_inside(wrap: Callable[[nn.Module], nn.Module]):
    model = HookedHybrid.from_hf(wrap(hf(0)))
    expected = HookedHybrid.from_hf(hf(0))
    assert model.cfg == expected.cfg
    assert all(t.equal(expected.state_dict()[name]) for name, t in model.state_dict().items())


# --- generation_config.json -----------------------------------------------------------------------


def changed(folder: Path, file: str, **changes: Any) -> None:
    path = folder / file
    content = json.loads(path.read_text()) if path.exists() else {}
    content.update(changes)
    path.write_text(json.dumps({k: v for k, v in content.items() if v != "absent"}))


PROMPT = torch.arange(5, 11)[None]


@pytest.fixture
def ending(tmp_path: Path) -> Path:
    """A checkpoint whose greedy tokens after `PROMPT` are 92 80 80 55 11 21 21 80."""
    source = GOLDEN / "recurrentgemma_hf"
    (tmp_path / "ending").mkdir()
    for name in ("config.json", SINGLE):
        shutil.copy(source / name, tmp_path / "ending")
    return tmp_path / "ending"


ENDS: dict[str, tuple[Any, dict[str, Any] | None, list[int]]] = {
    "several": (1, {"eos_token_id": [1, 80]}, [92, 80]),
    "one": (80, {"eos_token_id": 11}, [92, 80, 80, 55, 11]),
    "of config.json alone": (11, None, [92, 80, 80, 55, 11]),
    "none in a file that is there": (80, {"pad_token_id": 0}, [92, 80, 80, 55, 11, 21, 21, 80]),
}


@pytest.mark.parametrize("case", ENDS)
def test_rows_end_where_transformers_ends_them(case: str, ending: Path):
    of_config, generation, expected = ENDS[case]
    changed(ending, "config.json", eos_token_id=of_config)
    if generation is not None:
        changed(ending, "generation_config.json", **generation)
    theirs = AutoModelForCausalLM.from_pretrained(ending)
    out = theirs.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert out[0, 6:].tolist() == expected
    model = HookedHybrid.from_pretrained(ending)
    assert model.generate(PROMPT, 8, verbose=False)[0, 6:].tolist() == expected
    copied = HookedHybrid.from_hf(theirs)
    assert copied.generate(PROMPT, 8, verbose=False)[0, 6:].tolist() == expected
    assert HybridConfig.from_pretrained(ending) == model.cfg
    model.save_pretrained(ending.parent / "saved")
    again = HookedHybrid.from_pretrained(ending.parent / "saved")
    assert again.cfg == model.cfg
    theirs_again = AutoModelForCausalLM.from_pretrained(ending.parent / "saved")
    out = theirs_again.generate(PROMPT, max_new_tokens=8, do_sample=False)
    assert out[0, 6:].tolist() == expected


def test_an_end_that_a_user_gives_counts_first(ending: Path):
    changed(ending, "generation_config.json", eos_token_id=[1, 80])
    model = HookedHybrid.from_pretrained(ending, eos_token_id=55)
    assert model.generate(PROMPT, 8, verbose=False)[0, 6:].tolist() == [92, 80, 80, 55]


def test_settings_of_generation_that_are_not_used_are_listed_once_and_kept(ending: Path):
    given = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 50, "top_k": 50}
    changed(ending, "generation_config.json", eos_token_id=1, bos_token_id=2, **given)
    with pytest.warns(UserWarning, match="settings that generate does not take") as seen:
        model = HookedHybrid.from_pretrained(ending)
    (message,) = [str(w.message) for w in seen]
    assert "do_sample=True, max_length=50, temperature=0.6, top_p=0.9;" in message
    model.save_pretrained(ending.parent / "saved")
    kept = json.loads((ending.parent / "saved" / "generation_config.json").read_text())
    assert kept == {**kept, "do_sample": True, "temperature": 0.6, "top_p": 0.9, "max_length": 50}
    theirs = AutoModelForCausalLM.from_pretrained(ending)
    with pytest.warns(UserWarning, match="do_sample=True, max_length=50, temperature=0.6"):
        HookedHybrid.from_hf(theirs)


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"eos_token_id": "x"}', '{"eos_token_id": [1, true]}', "[" * 5000]
)
def test_a_broken_generation_config_is_named(content: str, ending: Path):
    (ending / "generation_config.json").write_text(content)
    for way in (HookedHybrid.from_pretrained, HybridConfig.from_pretrained, check):
        with pytest.raises(CheckpointError, match="generation_config.json"):
            way(ending)


# --- keys of config.json --------------------------------------------------------------------------

HARMLESS: dict[str, Any] = {
    "_attn_implementation_autoset": True,
    "_commit_hash": "0123abcd",
    "cache_implementation": "hybrid",
    "max_length": 20,
    "pretraining_tp": 1,
    "tokenizer_class": "GemmaTokenizerFast",
    "sep_token_id": 3,
    "is_decoder": True,
    "pruned_heads": {},
}
LISTED: dict[str, Any] = {
    "auto_map": {"AutoModelForCausalLM": "modeling.Model"},
    "hidden_dropout": 0.1,
    "max_length": 512,
    "model_max_length": 8192,
    "unsloth_fixed": True,
    "unsloth_version": "2026.1",
    "z_loss_coef": 0.1,
    "quantum_field": None,
}
REFUSED: dict[str, Any] = {
    "add_cross_attention": True,
    "is_encoder_decoder": True,
    "logit_scale": 0.5,
    "pretraining_tp": 2,
    "pruned_heads": {"0": [1]},
    "qk_norm": False,
    "residual_multiplier": 0.22,
    "transformers_weights": "other.safetensors",
    "use_qk_norm": True,
}


@pytest.mark.parametrize("name", ["recurrentgemma_hf", "jamba_hf"])
def test_keys_without_effect_pass(name: str, tmp_path: Path):
    source = GOLDEN / name
    shutil.copy(source / "config.json", tmp_path)
    expected = HybridConfig.from_pretrained(source)
    changed(tmp_path, "config.json", **HARMLESS)
    assert HybridConfig.from_pretrained(tmp_path, eos_token_id=expected.eos_token_id) == expected
    changed(tmp_path, "config.json", **LISTED)
    with pytest.warns(UserWarning, match="settings without an effect here") as seen:
        cfg = HybridConfig.from_pretrained(tmp_path)
    assert cfg == expected
    (message,) = [str(w.message) for w in seen]
    assert all(key in message for key in LISTED if key != "auto_map" or "jamba" not in name)
    assert not any(key in message for key in HARMLESS if key not in LISTED)


@pytest.mark.parametrize("key", REFUSED)
def test_keys_that_may_change_the_maths_are_refused_unless_ignored_by_the_user(
    key: str, tmp_path: Path
):
    source = GOLDEN / "recurrentgemma_hf"
    for name in ("config.json", SINGLE):
        shutil.copy(source / name, tmp_path)
    changed(tmp_path, "config.json", **{key: REFUSED[key]})
    for way in (HookedHybrid.from_pretrained, HybridConfig.from_pretrained, check):
        with pytest.raises(
            CheckpointError, match=f"unknown to this library: {key};.*ignore_config_keys="
        ):
            way(tmp_path)
        way(tmp_path, ignore_config_keys=[key])
    theirs = AutoModelForCausalLM.from_pretrained(source)
    setattr(theirs.config, key, REFUSED[key])
    with pytest.raises(CheckpointError, match=key):
        HookedHybrid.from_hf(theirs)
    HookedHybrid.from_hf(theirs, ignore_config_keys=[key])


def test_a_known_setting_can_be_ignored_too():
    source = GOLDEN / "recurrentgemma_hf"
    cfg = HybridConfig.from_pretrained(source, ignore_config_keys=["logits_soft_cap"])
    assert cfg.logits_soft_cap == 30.0  # as where the file does not say


def test_keys_to_ignore_that_are_not_there_are_an_error():
    source = GOLDEN / "recurrentgemma_hf"
    with pytest.raises(ValueError, match="config.json has no qk_norm"):
        HookedHybrid.from_pretrained(source, ignore_config_keys=["qk_norm"])
    with pytest.raises(TypeError, match="list of names"):
        HookedHybrid.from_pretrained(source, ignore_config_keys="qk_norm")
    with pytest.raises(ValueError, match=r"a .pt has no config.json"):
        HookedHybrid.from_pretrained(
            GOLDEN / "recurrentgemma_google" / "tiny.pt", ignore_config_keys=["qk_norm"]
        )


def test_a_name_with_control_characters_is_shown_without_them(tmp_path: Path):
    shutil.copy(GOLDEN / "jamba_hf" / "config.json", tmp_path)
    changed(tmp_path, "config.json", **{"\x1b[2Jqk": 1})
    with pytest.raises(CheckpointError) as error:
        HybridConfig.from_pretrained(tmp_path)
    assert "\x1b" not in str(error.value)
