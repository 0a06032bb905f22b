"""Adapters are merged as peft means them, or refused in a sentence that says how to load them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.convert import main
from tests.models import relative
from tests.tolerances import FP32_PARITY
from weights_conversion import CheckpointError, check

GOLDEN = Path(__file__).parents[1] / "golden"
# written by peft, with the logits of its model before a merge: `golden_meta.json` says of which
BASES = {"griffin": GOLDEN / "recurrentgemma_hf", "jamba": GOLDEN / "jamba_hf"}
each = pytest.mark.parametrize("name", BASES)


def adapter(name: str) -> Path:
    return GOLDEN / "adapters" / name


@pytest.fixture
def copy(tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy of an adapter, to be changed."""
    return lambda name: Path(shutil.copytree(adapter(name), tmp_path / "adapter"))


def changed_settings(folder: Path, **changes: Any) -> Path:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def changed_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> Path:
    change(tensors := load_file(folder / "adapter_model.safetensors"))
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@each
def test_a_merged_adapter_gives_pefts_logits(name: str):
    golden = load_file(adapter(name) / "golden.safetensors")
    plain = HookedHybrid.from_pretrained(BASES[name])
    model = HookedHybrid.from_pretrained(BASES[name], adapter=adapter(name))
    assert relative(plain(golden["input_ids"]), golden["logits"]) > 0.1  # so it does something
    assert relative(model(golden["input_ids"]), golden["logits"]) < FP32_PARITY
    assert model.cfg == plain.cfg


@each
def test_a_merged_model_is_saved_as_a_plain_one(name: str, tmp_path: Path):
    model = HookedHybrid.from_pretrained(BASES[name], adapter=str(adapter(name)))
    model.save_pretrained(tmp_path / "merged")
    again = HookedHybrid.from_pretrained(tmp_path / "merged").state_dict()
    assert all(again[key].equal(tensor) for key, tensor in model.state_dict().items())


def test_the_command_merges(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    source, given = str(BASES["jamba"]), ["--adapter", str(adapter("jamba"))]
    assert main([source, str(tmp_path / "merged"), *given]) == 0
    model = HookedHybrid.from_pretrained(BASES["jamba"], adapter=adapter("jamba"))
    again = HookedHybrid.from_pretrained(tmp_path / "merged").state_dict()
    assert all(again[key].equal(tensor) for key, tensor in model.state_dict().items())
    capsys.readouterr()
    assert main([source, "--check", *given]) == 0
    assert capsys.readouterr().out == f"{check(BASES['jamba'], adapter=adapter('jamba'))}\n"


def test_an_adapter_of_pefts_old_format_is_read(copy: Callable[[str], Path]):
    folder = copy("griffin")
    tensors = load_file(folder / "adapter_model.safetensors")
    (folder / "adapter_model.safetensors").unlink()
    torch.save(tensors, folder / "adapter_model.bin")
    golden = load_file(folder / "golden.safetensors")
    model = HookedHybrid.from_pretrained(BASES["griffin"], adapter=folder)
    assert relative(model(golden["input_ids"]), golden["logits"]) < FP32_PARITY


def test_offloaded_weights_of_an_adapted_model_are_not_those_of_its_base(tmp_path: Path):
    golden = load_file(adapter("griffin") / "golden.safetensors")
    how: dict[str, Any] = {"device_map": {"": "disk"}, "offload_folder": tmp_path}
    HookedHybrid.from_pretrained(BASES["griffin"], **how)
    model = HookedHybrid.from_pretrained(BASES["griffin"], adapter=adapter("griffin"), **how)
    assert relative(model(golden["input_ids"]), golden["logits"]) < FP32_PARITY


# --- an adapter that was not named ----------------------------------------------------------------


def test_an_adapter_beside_the_weights_needs_a_word(copy: Callable[[str], Path]):
    folder = copy("griffin")
    shutil.copytree(BASES["griffin"], folder, dirs_exist_ok=True)
    shutil.copy(adapter("griffin") / "golden.safetensors", folder)
    for way in (HookedHybrid.from_pretrained, check):
        with pytest.raises(CheckpointError, match="adapter as well as the weights.*merge.*=False"):
            way(folder)
    golden = load_file(folder / "golden.safetensors")
    merged = HookedHybrid.from_pretrained(folder, adapter=folder)
    assert relative(merged(golden["input_ids"]), golden["logits"]) < FP32_PARITY
    plain = HookedHybrid.from_pretrained(folder, adapter=False)
    expected = HookedHybrid.from_pretrained(BASES["griffin"])
    assert plain(golden["input_ids"]).equal(expected(golden["input_ids"]))


def test_an_adapter_alone_says_how_to_load_it():
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_pretrained(adapter("jamba"))
    message = str(error.value)
    assert "holds an adapter and no model" in message
    assert f"from_pretrained('jamba_hf', adapter={str(adapter('jamba'))!r})" in message


def test_the_error_of_a_wrapped_adapters_checkpoint_asks_for_a_merge(tmp_path: Path):
    folder = Path(shutil.copytree(BASES["griffin"], tmp_path / "wrapped"))
    tensors = load_file(folder / "model.safetensors")
    wrapped = {f"base_model.model.{name}": t for name, t in tensors.items()}
    save_file(wrapped, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="adapter that is not merged.*merge_and_unload"):
        HookedHybrid.from_pretrained(folder)


def test_a_matrix_of_integers_is_refused_before_an_adapter_is_merged_into_it(tmp_path: Path):
    base = Path(shutil.copytree(BASES["griffin"], tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    name = Q.removeprefix("base_model.model.").replace("lora_A.", "")
    tensors[name] = tensors[name].to(torch.int8)
    save_file(tensors, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=f"{name} is stored as torch.int8"):
        HookedHybrid.from_pretrained(base, adapter=adapter("griffin"))


# --- adapters that are not merged -----------------------------------------------------------------

Q = "base_model.model.model.layers.2.temporal_block.q_proj.lora_A.weight"
UNSUPPORTED: dict[str, dict[str, Any]] = {
    "peft_type='IA3'": {"peft_type": "IA3"},
    "use_dora='True'": {"use_dora": True},
    "init_lora_weights='pissa'": {"init_lora_weights": "pissa"},
    "layer_replication": {"layer_replication": [[0, 2]]},
    "target_parameters": {"target_parameters": ["experts.gate_up_proj"]},
    "some_new_kind": {"some_new_kind": 3},
    "alpha_pattern": {"alpha_pattern": {"layers.[0-9]+.q_proj": 3}},
}


@pytest.mark.parametrize("said", UNSUPPORTED)
def test_an_adapter_of_another_kind_is_refused_by_name(said: str, copy: Callable[[str], Path]):
    folder = changed_settings(copy("griffin"), **UNSUPPORTED[said])
    with pytest.raises(CheckpointError, match="merge it with peft") as error:
        HookedHybrid.from_pretrained(BASES["griffin"], adapter=folder)
    assert said in str(error.value)


BROKEN: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "has no other factor": lambda t: t.pop(Q),
    "is stored as torch.int8 in the adapter": lambda t: t.update({Q: t[Q].to(torch.int8)}),
    "do not update a matrix": lambda t: t.update({Q: t[Q][:, 1:].contiguous()}),
    "the base model has not": lambda t: t.update(
        {n.replace("q_proj", "z_proj"): t.pop(n) for n in list(t) if "q_proj" in n}
    ),
    "has rank 1": lambda t: t.update(
        {Q: t[Q][:1].clone(), Q.replace("_A", "_B"): t[Q.replace("_A", "_B")][:, :1].clone()}
    ),
    "which embedding and head share": lambda t: t.update(
        {"base_model.model.model.embed_tokens.weight": torch.zeros(97, 48)}
    ),
    "final_norm.original_module.* both replace": lambda t: t.update(
        {
            f"base_model.model.model.final_norm.{wrapper}.weight": torch.ones(48)
            for wrapper in ("modules_to_save", "original_module")
        }
    ),
    "changes lm_head.weight, which embedding and head share": lambda t: t.update(
        {"base_model.model.lm_head.weight": torch.zeros(97, 48)}
    ),
    "lora_magnitude_vector": lambda t: t.update(
        {Q.replace("lora_A", "lora_magnitude_vector"): torch.ones(3)}
    ),
}


@pytest.mark.parametrize("said", BROKEN)
def test_an_adapter_that_does_not_fit_is_refused(said: str, copy: Callable[[str], Path]):
    folder = changed_tensors(copy("griffin"), BROKEN[said])
    with pytest.raises(CheckpointError, match=said):
        HookedHybrid.from_pretrained(BASES["griffin"], adapter=folder)


@pytest.mark.parametrize("value", [True, 0, -1, "8", None, float("nan")])
def test_a_scale_that_is_no_number_is_refused(value: Any, copy: Callable[[str], Path]):
    folder = changed_settings(copy("jamba"), lora_alpha=value)
    with pytest.raises(CheckpointError, match="lora_alpha"):
        HookedHybrid.from_pretrained(BASES["jamba"], adapter=folder)


def test_scales_of_a_module_that_hang_on_the_order_of_patterns_are_refused(
    copy: Callable[[str], Path],
):
    """peft takes the first pattern that fits, and saves them in the order of the alphabet."""
    both = {"q_proj": 3, "2.temporal_block.q_proj": 5}
    folder = changed_settings(copy("griffin"), alpha_pattern=both)
    with pytest.raises(CheckpointError, match="q_proj, 2.temporal_block.q_proj for .*the first"):
        HookedHybrid.from_pretrained(BASES["griffin"], adapter=folder)
    alike = HookedHybrid.from_pretrained(
        BASES["griffin"], adapter=changed_settings(folder, alpha_pattern=dict.fromkeys(both, 3))
    )
    one = HookedHybrid.from_pretrained(
        BASES["griffin"], adapter=changed_settings(folder, alpha_pattern={"q_proj": 3})
    )
    assert all(one.state_dict()[k].equal(v) for k, v in alike.state_dict().items())


def test_no_adapter_where_one_is_asked_for_is_refused(tmp_path: Path):
    with pytest.raises(CheckpointError, match="holds no adapter"):
        HookedHybrid.from_pretrained(BASES["griffin"], adapter=tmp_path)
    with pytest.raises(CheckpointError, match="is a file: give its directory"):
        HookedHybrid.from_pretrained(BASES["griffin"], adapter=BASES["jamba"] / "config.json")
    with pytest.raises(CheckpointError, match="convert it first"):
        HookedHybrid.from_pretrained(
            GOLDEN / "recurrentgemma_google" / "tiny.pt", adapter=adapter("griffin")
        )
