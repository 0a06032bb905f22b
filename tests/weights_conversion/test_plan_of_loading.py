"""Loading is planned before a tensor is read: what is planned is what becomes of each weight."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file

import weights_conversion.filling
from hooked_hybrid import HookedHybrid
from hooked_hybrid.network.placement.homes import Homes
from hooked_hybrid.network.weights.plain import is_quantized
from tests.models import griffin_config, random_model, random_tokens
from weights_conversion.errors import CheckpointError

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
SOURCES = ("SafetensorsSource", "MemorySource")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint whose large weights can be quantised."""
    path = tmp_path_factory.mktemp("models") / "griffin"
    config = griffin_config("RA", d_model=64, d_rnn=64, d_head=16, d_mlp=128)
    random_model(config).save_pretrained(path)
    return path


@pytest.fixture
def checkpoint(saved: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(saved, tmp_path / "model"))


def refuse_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    def read(self: Any, name: str) -> NoReturn:
        raise AssertionError(f"{name} was read")

    for source in SOURCES:
        monkeypatch.setattr(f"weights_conversion.sources.{source}.read", read)


PLANS: dict[str, dict[str, Any]] = {
    "on one device": {"dtype": torch.bfloat16},
    "on the disk": {"device_map": {"": "cpu", "blocks.1": "disk"}},
    "quantised": {"quantize": "int8", "quantize_only": lambda name: ".mlp." in name},
}


@pytest.mark.parametrize("kind", PLANS)
def test_each_weight_becomes_what_its_home_says(
    kind: str, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    options = dict(PLANS[kind])
    if "quantize" in options:
        pytest.importorskip("torchao")
    if "device_map" in options:
        options["offload_folder"] = tmp_path / "offload"
    plans: list[Homes] = []
    fill = weights_conversion.filling.fill

    def look(model: HookedHybrid, content: Any, homes: Homes) -> HookedHybrid:
        assert all(parameter.is_meta for parameter in model.parameters())
        plans.append(homes)
        return fill(model, content, homes)

    monkeypatch.setattr(weights_conversion.filling, "fill", look)
    model = HookedHybrid.from_pretrained(checkpoint, **options)
    (homes,) = plans
    weights = dict(model.named_parameters())
    assert weights.keys() == homes.of.keys()
    for name, home in homes.of.items():
        weight = weights[name]
        assert (tuple(weight.shape), weight.dtype) == (home.shape, home.dtype), name
        assert weight.device == home.place.device and weight.requires_grad == home.is_trained, name
        assert is_quantized(weight) == (home.scheme is not None), name
        assert home.scheme is not None or weight.stride() == home.stride, name
        assert home.file is None or home.file.stat().st_size == weight.nbytes, name
    on_disk = [name for name, home in homes.of.items() if home.file is not None]
    narrow = [name for name, home in homes.of.items() if home.scheme is not None]
    assert bool(on_disk) == (kind == "on the disk") and bool(narrow) == (kind == "quantised")
    assert all(name.startswith("blocks.1.") for name in on_disk)
    assert all(".mlp." in name for name in narrow)


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no dtype of weights": ({"dtype": "int8"}, "dtype='int8'"),
    "no scheme": ({"quantize": "int3"}, "give 'int8', 'nf4'"),
    "no kernel": ({"quantize": "int8", "dtype": torch.float16}, "int8 weights cannot be used"),
    "no such weight": ({"quantize": "int8", "quantize_only": ["embed.W_E"]}, "none of the"),
    "no folder": ({"device_map": {"": "disk"}}, "say where with offload_folder"),
    "no such part": ({"device_map": {"blocks.9": "cpu"}}, "blocks.9"),
    "brought and quantised": (
        {"device_map": {"": "meta", "blocks": "cpu"}, "quantize": "int8"},
        "quantised weights stay where they run",
    ),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_options_that_cannot_be_are_refused_before_a_tensor_is_read(
    kind: str, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    options, message = REFUSED[kind]
    if "quantize" in options:
        pytest.importorskip("torchao")
    refuse_reads(monkeypatch)
    with pytest.raises(ValueError, match=message):
        HookedHybrid.from_pretrained(checkpoint, **options)


def test_a_folder_that_cannot_be_filled_is_refused_before_a_tensor_is_read(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    refuse_reads(monkeypatch)
    (tmp_path / "file").write_text("")
    on_disk: dict[str, Any] = {"device_map": {"": "disk"}}
    with pytest.raises(OSError, match="cannot be written"):
        HookedHybrid.from_pretrained(checkpoint, offload_folder=tmp_path / "file", **on_disk)
    full = SimpleNamespace(free=10)
    monkeypatch.setattr("hooked_hybrid.network.placement.offload.shutil.disk_usage", lambda _: full)
    with pytest.raises(OSError, match="would take .* GB more"):
        HookedHybrid.from_pretrained(checkpoint, offload_folder=tmp_path / "offload", **on_disk)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("is_safetensors", [True, False])
def test_a_weight_of_few_bits_is_refused_before_a_tensor_is_read(
    dtype: torch.dtype, is_safetensors: bool, checkpoint: Path, monkeypatch: pytest.MonkeyPatch
):
    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    name = max(tensors)  # others would be read before it
    tensors[name] = tensors[name].to(dtype)
    file.unlink()
    if is_safetensors:
        save_file(tensors, file)
    else:
        torch.save(tensors, checkpoint / "pytorch_model.bin")
    refuse_reads(monkeypatch)
    with pytest.raises(CheckpointError, match=f"{name} is stored as .*16 bits or more"):
        HookedHybrid.from_pretrained(checkpoint)


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.parametrize("is_equal", [True, False])
def test_a_tied_head_that_is_stored_too_is_compared_in_both_formats_of_torch(
    is_zip: bool, is_equal: bool, checkpoint: Path
):
    before = HookedHybrid.from_pretrained(checkpoint)(random_tokens())
    tensors = load_file(checkpoint / "model.safetensors")
    (checkpoint / "model.safetensors").unlink()
    tensors[HEAD] = tensors[EMBEDDING] if is_equal else tensors[EMBEDDING] + 1
    path = checkpoint / "pytorch_model.bin"
    torch.save(tensors, path, _use_new_zipfile_serialization=is_zip)
    if is_equal:
        assert torch.equal(HookedHybrid.from_pretrained(checkpoint)(random_tokens()), before)
        return
    with pytest.raises(CheckpointError, match="differs from model.embed_tokens.weight"):
        HookedHybrid.from_pretrained(checkpoint)
