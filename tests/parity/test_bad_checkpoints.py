"""A checkpoint that cannot be loaded is refused: one `CheckpointError` that names what is wrong.

Every case is read by `from_pretrained` and by the command, which leaves nothing behind.
"""

import json
import os
import pickle
import shutil
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import RecurrentGemmaForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.commands.convert import main
from tests.references import SPECS, google_griffin, hf_recurrentgemma
from weights_conversion import CheckpointError, check, google, recurrentgemma
from weights_conversion.filling import shapes_of
from weights_conversion.rules import account

pytestmark = pytest.mark.usefixtures("unchecked")

SPEC = SPECS["window_of_3"]
SMALL_SHARD = 20_000


@cache
def theirs() -> RecurrentGemmaForCausalLM:
    return hf_recurrentgemma(SPEC)


@cache
def parameters_of_google() -> dict[str, Tensor]:
    return dict(google_griffin(SPEC).state_dict())


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three good checkpoints: `single` and `sharded` of Hugging Face's, `google` with a `.pt`."""
    folder = tmp_path_factory.mktemp("whole")
    theirs().save_pretrained(folder / "single")
    theirs().save_pretrained(folder / "sharded", max_shard_size=SMALL_SHARD)
    (folder / "google").mkdir()
    torch.save(parameters_of_google(), folder / "google" / "2b.pt")
    return folder


@pytest.fixture
def copy(whole: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Make a copy of one of them, to be broken."""
    return lambda kind: Path(shutil.copytree(whole / kind, tmp_path / "checkpoint"))


def refusal_of(
    path: Path | str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    needs_values: bool = False,
) -> str:
    """Return the message with which a checkpoint is refused, by every way of reading it.

    What only the values tell, `check` cannot see.
    """
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_pretrained(path)
    assert type(error.value) is CheckpointError
    if not needs_values:
        with pytest.raises(CheckpointError) as same:
            check(path)
        assert str(same.value) == str(error.value)
    capsys.readouterr()
    assert main([str(path), str(tmp_path / "converted")]) == 1
    assert capsys.readouterr().err == f"error: {error.value}\n"
    assert not [p.name for p in tmp_path.iterdir() if p.name.startswith("converted")]
    return str(error.value)


@pytest.mark.parametrize("kind", ["single", "sharded", "google"])
def test_whole_checkpoints_load(kind: str, whole: Path):
    assert HookedHybrid.from_pretrained(whole / kind).cfg.d_model == SPEC.d_model
    assert "not needed: none" in check(whole / kind)


# --- tensors that do not match the config ---------------------------------------------------------


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the one file in a directory."""
    if (path := folder / "2b.pt").exists():
        tensors = torch.load(path, weights_only=True)
        change(tensors)
        torch.save(tensors, path)
        return
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


NORM = {
    "single": "model.layers.1.channel_pre_norm.weight",
    "google": "blocks.1.channel_pre_norm.scale",
}
every_kind = pytest.mark.parametrize("kind", NORM)


@pytest.fixture
def no_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let no tensor be read: all are accounted for before the first is."""

    def read(self: Any, name: str) -> NoReturn:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("weights_conversion.sources.SafetensorsSource.read", read)
    monkeypatch.setattr("weights_conversion.sources.MemorySource.read", read)


@every_kind
def test_a_missing_tensor_is_named(kind: str, copy, tmp_path, capsys, no_reads):
    change_tensors(folder := copy(kind), lambda t: t.pop(NORM[kind]))
    message = refusal_of(folder, tmp_path, capsys)
    assert f"missing: {NORM[kind]}" in message
    assert "in 1 places" in message


@every_kind
def test_an_unexpected_tensor_is_named(kind: str, copy, tmp_path, capsys, no_reads):
    change_tensors(folder := copy(kind), lambda t: t.update({"model.extra": torch.zeros(3, 5)}))
    message = refusal_of(folder, tmp_path, capsys)
    assert "unexpected: model.extra (3, 5)" in message
    assert "in 1 places" in message


@every_kind
@pytest.mark.parametrize("shape", [(33,), (31,), (1,), (32, 1), (1, 32), ()], ids=str)
def test_a_tensor_of_another_shape_is_named(kind: str, shape, copy, tmp_path, capsys, no_reads):
    change_tensors(folder := copy(kind), lambda t: t.update({NORM[kind]: torch.zeros(shape)}))
    message = refusal_of(folder, tmp_path, capsys)
    assert f"{NORM[kind]} {shape}" in message
    assert "(32,)" in message
    assert "in 1 places" in message


def test_all_errors_are_reported_at_once(copy, tmp_path, capsys, no_reads):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.extra"] = tensors.pop(NORM["single"])
        tensors["model.final_norm.weight"] = torch.zeros(7)

    change_tensors(folder := copy("single"), change)
    message = refusal_of(folder, tmp_path, capsys)
    assert "in 3 places" in message
    for name in (NORM["single"], "model.extra (32,)", "model.final_norm.weight (7,)"):
        assert name in message


@every_kind
def test_every_tensor_astray_is_named(kind: str):
    if kind == "google":
        source = {name: tuple(t.shape) for name, t in parameters_of_google().items()}
        cfg, table = google.config_from_shapes(source, n_keys=SPEC.n_keys), google
    else:
        source = {name: tuple(t.shape) for name, t in theirs().state_dict().items()}
        source.pop("lm_head.weight")
        cfg, table = recurrentgemma.config_from_dict(theirs().config.to_dict()), recurrentgemma
    target = shapes_of(HookedHybrid.meta(cfg))
    account(table.rules(cfg), source, target, table.ignored(cfg))
    for name, shape in source.items():
        without = {n: s for n, s in source.items() if n != name}
        for broken, expected in [
            (without, f"missing: {name}"),
            ({**source, name: (*shape[:-1], shape[-1] + 1)}, name),
            ({**source, name: (2, *shape)}, name),
            ({**source, name: ()}, name),
            ({**source, f"{name}_": shape}, f"unexpected: {name}_"),
        ]:
            with pytest.raises(CheckpointError, match="in [12] places") as error:
                account(table.rules(cfg), broken, target, table.ignored(cfg))
            assert expected in str(error.value)


def test_a_head_that_differs_from_the_embedding_it_is_tied_to(copy, tmp_path, capsys):
    def change(tensors: dict[str, Tensor]) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1e-3

    change_tensors(folder := copy("single"), change)
    message = refusal_of(folder, tmp_path, capsys, needs_values=True)
    assert "lm_head.weight" in message
    assert "tie_word_embeddings" in message


def test_an_untied_head_that_is_not_there(copy, tmp_path, capsys, no_reads):
    change_config(folder := copy("single"), tie_word_embeddings=False)
    assert "missing: lm_head.weight" in refusal_of(folder, tmp_path, capsys)


@every_kind
def test_integers_are_no_weights(kind: str, copy, tmp_path, capsys):
    change_tensors(folder := copy(kind), lambda t: t.update({NORM[kind]: torch.ones(32).long()}))
    message = refusal_of(folder, tmp_path, capsys, needs_values=True)
    assert "int64" in message
    assert "blocks.1.ln2.weight" in message or NORM[kind] in message


# --- damaged files --------------------------------------------------------------------------------


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, -1])
@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("single", "model.safetensors"),
        ("sharded", "model-00002-of-00005.safetensors"),
        ("google", "2b.pt"),
    ],
)
def test_a_file_cut_short_is_named(kind: str, file: str, kept: float, copy, tmp_path, capsys):
    folder = copy(kind)
    path = next(folder.glob(file.replace("00005", "*")))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * kept) if isinstance(kept, float) else kept])
    message = refusal_of(folder, tmp_path, capsys)
    assert str(path) in message
    assert "download it again" in message


class Command:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("how", ["torch.save", "old torch.save", "pickle"])
@pytest.mark.parametrize("alone", [True, False])
def test_code_in_a_pt_file_is_never_run(how: str, alone: bool, copy, tmp_path, capsys):
    folder, marker = copy("google"), tmp_path / "marker"
    content: Any = Command(marker)
    if not alone:
        content = {**parameters_of_google(), "blocks.0.evil": content}
    path = folder / "2b.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch.save")
    message = refusal_of(folder, tmp_path, capsys)
    assert str(path) in message
    assert not marker.exists()
    torch.load(path, weights_only=False) if how != "pickle" else pickle.loads(path.read_bytes())
    assert marker.exists()  # so it would have run


def test_a_module_in_a_pt_file_is_refused(copy, tmp_path, capsys):
    torch.save(torch.nn.Linear(2, 2), path := copy("google") / "2b.pt")
    message = refusal_of(path, tmp_path, capsys)
    assert str(path) in message
    assert "more than tensors" in message


@pytest.mark.parametrize("content", [{"model": {"w": torch.ones(2)}}, [torch.ones(2)], {3: 4}])
def test_a_pt_file_of_anything_but_named_tensors_is_refused(content, copy, tmp_path, capsys):
    torch.save(content, path := copy("google") / "2b.pt")
    message = refusal_of(path, tmp_path, capsys)
    assert f"{path} is not a mapping of names to tensors" in message


def test_a_pt_file_of_another_model_is_refused(copy, tmp_path, capsys):
    torch.save({"w": torch.ones(2)}, path := copy("google") / "2b.pt")
    message = refusal_of(path, tmp_path, capsys)
    assert "embedder.input_embedding" in message
    assert "Griffin" in message


def test_a_pickle_named_safetensors_is_refused(copy, tmp_path, capsys):
    path, marker = copy("single") / "model.safetensors", tmp_path / "marker"
    torch.save(Command(marker), path)
    assert str(path) in refusal_of(path.parent, tmp_path, capsys)
    assert not marker.exists()


# --- shards ---------------------------------------------------------------------------------------


def change_index(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    change(index["weight_map"])
    path.write_text(json.dumps(index))


EMBEDDING = "model.embed_tokens.weight"


def test_a_missing_shard_is_named(copy, tmp_path, capsys):
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    message = refusal_of(folder, tmp_path, capsys)
    assert str(shard) in message
    assert "missing" in message


@pytest.mark.parametrize(
    "outside", ["../single/model.safetensors", "/etc/passwd", "..", "sub/model.safetensors"]
)
def test_an_index_that_points_outside_is_refused(outside: str, copy, tmp_path, capsys, whole):
    folder = copy("sharded")
    shutil.copytree(whole / "single", tmp_path / "single")
    shutil.copytree(whole / "single", folder / "sub")
    change_index(folder, lambda weight_map: weight_map.update({EMBEDDING: outside}))
    message = refusal_of(folder, tmp_path, capsys)
    assert outside in message
    assert "index" in message


@pytest.mark.parametrize("file", [7, None, ["model.safetensors"]])
def test_an_index_that_names_no_file_is_refused(file, copy, tmp_path, capsys):
    folder = copy("sharded")
    change_index(folder, lambda weight_map: weight_map.update({EMBEDDING: file}))
    assert "model.safetensors.index.json" in refusal_of(folder, tmp_path, capsys)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_a_broken_index_is_named(content: str, copy, tmp_path, capsys):
    path = copy("sharded") / "model.safetensors.index.json"
    path.write_text(content)
    assert str(path) in refusal_of(path.parent, tmp_path, capsys)


def test_an_index_that_promises_too_much_is_refused(copy, tmp_path, capsys):
    folder = copy("sharded")
    shard = sorted(folder.glob("*.safetensors"))[0]
    change_index(folder, lambda weight_map: weight_map.update({"model.extra": shard.name}))
    message = refusal_of(folder, tmp_path, capsys)
    assert "model.extra" in message
    assert shard.name in message


def test_a_tensor_in_two_shards_is_named(copy, tmp_path, capsys):
    folder = copy("sharded")
    first, second = sorted(folder.glob("*.safetensors"))[:2]
    twice = next(iter(load_file(first)))
    save_file({**load_file(second), twice: load_file(first)[twice]}, second)
    message = refusal_of(folder, tmp_path, capsys)
    assert twice in message
    assert second.name in message


# --- files that are not there ---------------------------------------------------------------------


def test_a_missing_config_is_named(copy, tmp_path, capsys):
    (folder := copy("single")).joinpath("config.json").unlink()
    message = refusal_of(folder, tmp_path, capsys)
    assert str(folder) in message
    assert "config.json" in message


@pytest.mark.parametrize("also", [[], ["tf_model.h5"], ["2b.pt"]])
def test_missing_weights_are_named(also: list[str], copy, tmp_path, capsys):
    (folder := copy("single")).joinpath("model.safetensors").unlink()
    for file in also:
        (folder / file).write_bytes(b"")
    message = refusal_of(folder, tmp_path, capsys)
    assert str(folder) in message
    assert "model.safetensors" in message
    assert "pytorch_model.bin" in message
    assert all(file in message for file in also)


def test_an_empty_directory_is_refused(tmp_path, capsys):
    (folder := tmp_path / "checkpoint").mkdir()
    message = refusal_of(folder, tmp_path, capsys)
    assert str(folder) in message
    assert "config.json" in message


@pytest.mark.parametrize("path", ["/nowhere/at/all", "./nowhere", "../nowhere/2b.pt", "~/nowhere"])
def test_a_missing_directory_is_named(path: str, tmp_path, capsys):
    assert path in refusal_of(path, tmp_path, capsys)


def test_a_file_that_is_no_pt_is_refused(copy, tmp_path, capsys):
    path = copy("single") / "model.safetensors"
    message = refusal_of(path, tmp_path, capsys)
    assert str(path) in message
    assert "directory" in message


@pytest.mark.parametrize("repo", ["nobody-1/no-such-model", "no-such-model", "not a name/at all!"])
def test_an_unknown_hub_id_is_named(repo: str, tmp_path, capsys, monkeypatch):
    def connect(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", connect)
    monkeypatch.setattr(socket, "getaddrinfo", connect)
    message = refusal_of(repo, tmp_path, capsys)
    assert repr(repo) in message
    assert "hub" in message


# --- configs --------------------------------------------------------------------------------------


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


BAD_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "another architecture": ({"model_type": "llama"}, ("model_type", "'llama'", "recurrent_gemma")),
    "no architecture": ({"model_type": None}, ("model_type", "None")),
    "unknown setting": ({"sparsity": 0.5}, ("sparsity",)),
    "quantised": (
        {"quantization_config": {"quant_method": "bitsandbytes"}},
        ("quantization_config",),
    ),
    "scaled rotary": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        ("rotary", "yarn"),
    ),
    "scaled rotary of 4.x": (
        {"rope_parameters": None, "rope_scaling": {"type": "linear", "factor": 2.0}},
        ("linear",),
    ),
    "rotary of no known kind": ({"rope_parameters": "default"}, ("rope_parameters", "'default'")),
    "unknown rotary setting": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mscale": 2}},
        ("mscale",),
    ),
    "odd width": ({"intermediate_size": 97}, ("intermediate_size=97", "even")),
    "another activation": ({"hidden_activation": "relu"}, ("hidden_activation='relu'",)),
    "unscaled embedding": (
        {"embeddings_scale_by_sqrt_dim": False},
        ("embeddings_scale_by_sqrt_dim=False",),
    ),
    "another block": ({"block_types": ["recurrent", "mamba"]}, ("block_types", "mamba")),
    "no block": ({"block_types": []}, ("block_types", "[]")),
    "no width": ({"hidden_size": None}, ("hidden_size",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers=0",)),
    "width in words": ({"hidden_size": "32"}, ("hidden_size='32'",)),
    "true width": ({"hidden_size": True}, ("hidden_size=True",)),
    "half a head": ({"num_attention_heads": 2.5}, ("num_attention_heads=2.5",)),
    # tensors of other shapes than the config says
    "another vocabulary": ({"vocab_size": 90}, (EMBEDDING, "(101, 32)", "(90, 32)")),
    "one layer more": ({"num_hidden_layers": 6}, ("missing: model.layers.5.",)),
    "one layer less": ({"num_hidden_layers": 4}, ("unexpected: model.layers.4.",)),
    "biased queries": ({"attention_bias": True}, ("missing:", "q_proj.bias")),
    # impossible together
    "heads that do not share keys": ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
    "heads that do not divide": ({"lru_width": 33}, ("lru_width", "33")),
    "odd rotary": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.2}},
        ("partial_rotary_factor",),
    ),
    "more rotary than head": (
        {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 2.0}},
        ("partial_rotary_factor",),
    ),
    "no cap": ({"logits_soft_cap": 0.0}, ("logits_soft_cap", "0.0")),
    "cap in words": ({"logits_soft_cap": "thirty"}, ("logits_soft_cap", "thirty")),
    "theta in words": ({"rope_parameters": {"rope_theta": "big"}}, ("rope_theta", "big")),
    "eps in words": ({"rms_norm_eps": "small"}, ("rms_norm_eps", "small")),
    "end in words": ({"eos_token_id": "</s>"}, ("eos_token_id", "</s>")),
    "blocks in a dict": ({"block_types": {"attention": 1}}, ("block_types",)),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_named(case: str, copy, tmp_path, capsys, no_reads):
    changes, fragments = BAD_SETTINGS[case]
    change_config(folder := copy("single"), **changes)
    message = refusal_of(folder, tmp_path, capsys)
    for fragment in fragments:
        assert fragment in message


@pytest.mark.parametrize("content", ["", "{", "[1]", "3", b"\xff\xfe\x00"])
def test_a_config_that_is_no_object_is_named(content: str | bytes, copy, tmp_path, capsys):
    path = copy("single") / "config.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refusal_of(path.parent, tmp_path, capsys)
    with pytest.raises(CheckpointError, match="config.json"):
        HybridConfig.from_pretrained(str(path.parent))


# --- models in memory -----------------------------------------------------------------------------


def test_a_model_in_memory_of_another_architecture_is_refused():
    llama = SimpleNamespace(config=SimpleNamespace(to_dict=lambda: {"model_type": "llama"}))
    with pytest.raises(CheckpointError, match="'llama'"):
        HookedHybrid.from_hf(llama)


def test_a_model_without_its_embedding_is_refused():
    part = {n: t for n, t in theirs().model.state_dict().items() if "embed" not in n}
    model = SimpleNamespace(
        config=theirs().config,
        state_dict=lambda: part,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    with pytest.raises(CheckpointError, match="missing: model.embed_tokens.weight"):
        HookedHybrid.from_hf(model)


def test_a_model_in_memory_that_does_not_match_its_config_is_refused():
    broken = hf_recurrentgemma(SPEC)
    broken.model.final_norm.weight = torch.nn.Parameter(torch.ones(7))
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_hf(broken)
    assert "model.final_norm.weight (7,)" in str(error.value)
