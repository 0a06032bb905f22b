"""Checkpoints damaged by `experiments.under_fire`: refused with a clear error, or sound numbers.

`UNDER_FIRE_MUTANTS=5000` runs as many as the published figure.
"""

from __future__ import annotations

import json
import os
import pickle
import pickletools
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.under_fire import checkpoints
from experiments.under_fire.bases import Base
from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.presets.packaged import packaged_models
from tests.models import griffin_config, random_model
from weights_conversion import CheckpointError, google
from weights_conversion.rules import revert

pytestmark = pytest.mark.usefixtures("unchecked")

N_MUTANTS = int(os.environ.get("UNDER_FIRE_MUTANTS", "63"))
ROOT = Path(__file__).parents[2]
BIAS = "model.layers.0.temporal_block.linear_x.bias"


def test_mutants_are_refused_or_load_sound_numbers(tmp_path: Path):
    out = tmp_path / "summary.json"
    command = [sys.executable, "-m", "experiments.under_fire.checkpoints", "--out", str(out)]
    seed = ["--count", str(N_MUTANTS), "--seed", "9"]
    done = subprocess.run([*command, *seed], cwd=ROOT, capture_output=True, text=True, check=False)
    assert out.exists(), done.stderr
    found = json.loads(out.read_text())
    assert [r["what"] for r in found["wrong"]] == [] and done.returncode == 0
    assert found["mutants"] == N_MUTANTS
    assert len(found["by_kind"]) == min(N_MUTANTS, len(checkpoints.MUTATIONS))
    assert 0 < found["refused"] < N_MUTANTS


# --- the judge sees what it is there to see -------------------------------------------------------


def crash(path: Path, dtype: torch.dtype) -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def hang(path: Path, dtype: torch.dtype) -> None:
    time.sleep(60)


def swell(path: Path, dtype: torch.dtype) -> None:
    torch.ones(2**26).sum()
    time.sleep(0.2)
    raise CheckpointError("config.json")


def misname(path: Path, dtype: torch.dtype) -> None:
    raise TypeError("config.json")


def raise_what_has_no_name(path: Path, dtype: torch.dtype) -> None:
    raise type("Panic", (BaseException,), {"__module__": "nowhere"})("config.json")


def mumble(path: Path, dtype: torch.dtype) -> None:
    raise CheckpointError("something is wrong")


@pytest.mark.parametrize(
    ("load", "said"),
    [
        (crash, "crash: signal 15"),
        (hang, "hang"),
        (swell, "memory"),
        (misname, "error of type TypeError"),
        (raise_what_has_no_name, "crash: no report"),
        (mumble, "names neither"),
    ],
)
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, from 3.12 on
def test_what_goes_wrong_is_seen(load: Callable[..., Any], said: str, monkeypatch, tmp_path):
    monkeypatch.setattr(HookedHybrid, "from_pretrained", load)
    if load is hang:
        monkeypatch.setattr(checkpoints, "SECONDS", 0.5)
    watched = checkpoints.Watched(tmp_path, Base("", tmp_path, torch.float32), None)
    (wrong,) = checkpoints.verdict(watched, "finite", 1000, False, {"config.json"})
    assert said in wrong


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_long_error_is_no_hang(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def ramble(path: Path, dtype: torch.dtype) -> None:
        raise CheckpointError("config.json" + "x" * 2**20)

    monkeypatch.setattr(HookedHybrid, "from_pretrained", ramble)
    monkeypatch.setattr(checkpoints, "SECONDS", 2)
    watched = checkpoints.Watched(tmp_path, Base("", tmp_path, torch.float32), None)
    assert checkpoints.verdict(watched, "refused", 1000, False, {"config.json"}) == []


@pytest.mark.parametrize(
    ("report", "expected", "said"),
    [
        ({"is_finite": False, "has_finite_logits": True}, "finite", "weights"),
        ({"is_finite": True, "has_finite_logits": False}, "finite", "logits"),
        ({"is_finite": True, "has_finite_logits": True}, "refused", "not refused"),
        ({"is_finite": True, "has_finite_logits": True, "is_same": False}, "same", "other numbers"),
        ({"is_finite": True, "has_finite_logits": True, "use_error": "x"}, "finite", "used"),
    ],
)
def test_what_is_loaded_is_judged(report: dict[str, Any], expected: Any, said: str):
    watched = checkpoints.Watched.__new__(checkpoints.Watched)
    watched.status, watched.peak, watched.seconds, watched.report = 0, 0, 0.0, report
    (wrong,) = checkpoints.verdict(watched, expected, 1000, False, set())
    assert said in wrong
    assert "code was run" in checkpoints.verdict(watched, expected, 1000, True, set())


# --- single holes that mutants found --------------------------------------------------------------


@pytest.fixture
def griffin(tmp_path: Path) -> Path:
    """Return a copy of a packaged model."""
    return Path(shutil.copytree(packaged_models()["tiny-griffin"], tmp_path / "griffin"))


@pytest.fixture
def pt(tmp_path: Path) -> Path:
    """Return a whole `.pt` of Google's."""
    model = random_model(griffin_config("RA"))
    tensors = revert(google.rules(model.cfg), model.state_dict())
    torch.save({name: t.contiguous().clone() for name, t in tensors}, tmp_path / "2b.pt")
    return tmp_path / "2b.pt"


def refusal(path: Path, **options: Any) -> str:
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_pretrained(path, **options)
    return str(error.value)


def with_entry(folder: Path, value: float, dtype: torch.dtype | None = None) -> Path:
    """Put one number into a tensor, and perhaps store it in another dtype."""
    tensors = load_file(folder / "model.safetensors")
    tensors[BIAS][3] = value
    tensors[BIAS] = tensors[BIAS].to(dtype or tensors[BIAS].dtype)
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e30, -1e13])
def test_an_entry_no_model_has_is_refused_by_its_tensor(griffin: Path, value: float):
    message = refusal(with_entry(griffin, value))
    assert BIAS in message and "damaged" in message


def test_an_entry_that_the_dtype_cannot_hold_is_refused(griffin: Path):
    with_entry(griffin, 1e5)
    assert BIAS in refusal(griffin, dtype=torch.float16)
    bias = HookedHybrid.from_pretrained(griffin).blocks[0].mixer.linear_x.bias.detach()
    assert float(bias[3]) == float(torch.tensor(1e5).bfloat16())


def test_two_kinds_of_halves_are_refused(griffin: Path):
    message = refusal(with_entry(griffin, 0.0, torch.float16))
    assert "float16" in message and "bfloat16" in message and BIAS in message


def test_halves_beside_single_precision_load(griffin: Path):
    HookedHybrid.from_pretrained(with_entry(griffin, 0.5, torch.float32))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('{"model_type":' + "[" * 100_000 + "]" * 100_000 + "}", "too deep"),
        ('{"hidden_size": 1' + "0" * 10_000 + "}", "digits"),
        ('{"x": "' + "x" * 2**20 + '"}', "1,048,576"),
    ],
    ids=["deep", "long number", "large"],
)
def test_json_made_to_hurt_is_refused(griffin: Path, text: str, said: str):
    (griffin / "config.json").write_text(text)
    message = refusal(griffin)
    assert "config.json" in message and said in message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**12),
        ("num_hidden_layers", 9_999),
        ("vocab_size", 10**30),
        ("vocab_size", 2**31 - 1),
        ("rope_theta", 1e-300),
        ("rms_norm_eps", 1e29),
        ("logits_soft_cap", 1e-300),
        ("bos_token_id", 10**30),
        ("model_type", {}),
        ("block_types", [{}]),
    ],
)
def test_a_setting_no_model_has_is_refused_at_once(griffin: Path, key: str, value: Any):
    path = griffin / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    start = time.process_time()
    message = refusal(griffin)
    assert time.process_time() - start < 5
    assert key in message or f"the config gives ({value}," in message
    assert len(message) < 3000


def test_a_config_alone_is_bounded_too(griffin: Path):
    path = griffin / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "num_hidden_layers": 10**12}))
    with pytest.raises(CheckpointError, match="num_hidden_layers=1000000000000"):
        HybridConfig.from_pretrained(str(griffin))


@pytest.mark.parametrize("value", [7, [], {"content": 7}, True, "\ud800"])
def test_a_special_token_that_is_no_text_is_refused(griffin: Path, value: Any):
    (griffin / "tokenizer_config.json").write_text(json.dumps({"bos_token": value}))
    message = refusal(griffin)
    assert "tokenizer_config.json" in message and "bos_token" in message


def test_padding_and_cutting_in_the_tokenizer_file_are_not_followed(griffin: Path):
    path = griffin / "tokenizer.json"
    plain = HookedHybrid.from_pretrained(griffin).to_tokens("the pass key is 7")
    padding = {"strategy": {"Fixed": 10_000}, "direction": "Left", "pad_to_multiple_of": None}
    padding |= {"pad_id": 0, "pad_type_id": 0, "pad_token": "x"}
    cut = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    content = {**json.loads(path.read_text()), "padding": padding, "truncation": cut}
    path.write_text(json.dumps(content))
    assert torch.equal(HookedHybrid.from_pretrained(griffin).to_tokens("the pass key is 7"), plain)


def test_a_pipe_is_not_waited_for(tmp_path: Path):
    os.mkfifo(tmp_path / "2b.pt")
    assert "neither" in refusal(tmp_path)
    assert "neither a file nor a directory" in refusal(tmp_path / "2b.pt")


def test_a_compressed_pt_is_refused_before_it_is_unpacked(pt: Path):
    with zipfile.ZipFile(pt) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(pt, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, content)
    message = refusal(pt)
    assert str(pt) in message and "compressed" in message


class Bomb:
    """A pickle that takes much memory by calling what torch lets checkpoints call."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return bytearray, (2**28,)


def memory_of_loading(path: Path) -> int:
    """Return the memory [bytes] that a refused load takes, without mapped files."""
    watched = checkpoints.Watched(path, Base("", path, torch.float32), {})
    assert watched.report["error"] is CheckpointError, watched.report
    return watched.peak


@pytest.mark.parametrize("is_zip", [True, False])
@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # of fork, from 3.12 on
def test_a_pickle_that_would_fill_the_memory_is_refused(pt: Path, is_zip: bool):
    tensors = torch.load(pt, weights_only=True)
    torch.save({**tensors, "x": Bomb()}, pt, _use_new_zipfile_serialization=is_zip)
    assert memory_of_loading(pt) < 2**25
    assert "holds more than tensors" in refusal(pt)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_bomb_in_the_list_of_storages_is_refused(pt: Path):
    torch.save(torch.load(pt, weights_only=True), pt, _use_new_zipfile_serialization=False)
    content = pt.read_bytes()
    with pt.open("rb") as file:
        for _ in range(4):
            for _operation in pickletools.genops(file):
                pass
        start = file.tell()
    pt.write_bytes(content[:start] + pickle.dumps([Bomb()], protocol=2) + content[start:])
    assert memory_of_loading(pt) < 2**25


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_zip_that_only_torch_takes_for_one_is_refused_unpacked(pt: Path):
    with zipfile.ZipFile(pt) as old:
        records = {info.filename: old.read(info) for info in old.infolist()}
    with zipfile.ZipFile(pt, "w", zipfile.ZIP_DEFLATED) as new:
        for name, content in records.items():
            new.writestr(name, bytes(2**28) if name.endswith("data/0") else content)
    with pt.open("ab") as file:
        file.write(b"PK\5\6")  # the beginning of another end, at which zipfile gives up
    assert memory_of_loading(pt) < 2**25
    assert "not a whole torch.save file" in refusal(pt)


def test_a_zip_with_two_lists_of_contents_is_refused(tmp_path: Path):
    """zipfile would see one pickle in it and torch run another."""
    halves, lists = [], []
    for number in (1, 2):
        torch.save(number, tmp_path / "half.pt")
        raw = (tmp_path / "half.pt").read_bytes()
        end = raw.rindex(b"PK\5\6")
        n_bytes, start = struct.unpack("<2L", raw[end + 12 : end + 20])
        halves.append(raw[:start])
        lists.append(bytearray(raw[start : start + n_bytes]))
    for i in range(n_bytes):  # zipfile takes the second list, and adds to its places
        if lists[1].startswith(b"PK\1\2", i):
            place = int.from_bytes(lists[1][i + 42 : i + 46], "little")
            new = place + len(halves[0]) - n_bytes
            lists[1][i + 42 : i + 46] = new.to_bytes(4, "little", signed=True)
    tail = raw[end : end + 12] + struct.pack("<2LH", n_bytes, sum(map(len, halves)), 0)
    path = tmp_path / "2b.pt"
    path.write_bytes(b"".join([*halves, *lists, tail]))
    assert torch.load(path, weights_only=True) == 1
    with zipfile.ZipFile(path) as archive:
        assert pickle.loads(archive.read("half/data.pkl")) == 2
    assert "does not have the layout of torch.save" in refusal(path)


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_header_of_a_million_tensors_is_refused_unread(griffin: Path):
    path = griffin / "model.safetensors"
    content = path.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    empty = {"dtype": "F32", "shape": [0], "data_offsets": [len(content) - end] * 2}
    header = {**json.loads(content[8:end]), **{f"x{i}": empty for i in range(120_000)}}
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[end:])
    assert memory_of_loading(griffin) < 2**25
    message = refusal(griffin)
    assert str(path) in message and f"header of {len(text):,} bytes" in message


def test_more_experts_than_tensors_are_refused_at_once(tmp_path: Path):
    folder = Path(shutil.copytree(packaged_models()["tiny-jamba"], tmp_path / "jamba"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"num_experts": 10_000, "expert_layer_period": 1, "expert_layer_offset": 0}
    (folder / "config.json").write_text(json.dumps(config))
    start = time.process_time()
    assert "num_experts gives 40000 in all" in refusal(folder)
    assert time.process_time() - start < 1


def test_a_weight_of_eight_bits_is_refused_by_its_tensor(griffin: Path):
    message = refusal(with_entry(griffin, 0.0, torch.float8_e4m3fn))
    assert BIAS in message and "float8_e4m3fn" in message


HOLLOW: dict[str, Callable[[Tensor], Tensor]] = {
    "expanded": lambda t: torch.zeros(()).expand(t.shape),
    "huge": lambda t: torch.zeros(1, 1).expand(2**40, 2**8),
    "meta": lambda t: t.to("meta"),
    "sparse": lambda t: t.to_sparse(),
}


@pytest.mark.parametrize("how", HOLLOW)
@pytest.mark.parametrize("is_zip", [True, False])
def test_a_tensor_without_its_own_numbers_is_refused(pt: Path, how: str, is_zip: bool):
    tensors, name = torch.load(pt, weights_only=True), "embedder.input_embedding"
    save = partial(torch.save, _use_new_zipfile_serialization=is_zip)
    save({**tensors, name: HOLLOW[how](tensors[name])}, pt)
    message = refusal(pt)
    assert str(pt) in message and name in message


def test_tensors_that_share_their_numbers_are_refused(pt: Path):
    tensors = torch.load(pt, weights_only=True)
    shared = dict.fromkeys(tensors, tensors["embedder.input_embedding"])
    torch.save(shared, pt)
    assert "share their values" in refusal(pt)


@pytest.mark.parametrize("is_zip", [True, False])
def test_a_whole_pt_loads_in_both_formats(pt: Path, is_zip: bool):
    tensors = torch.load(pt, weights_only=True)
    torch.save(tensors, pt, _use_new_zipfile_serialization=is_zip)
    model = HookedHybrid.from_pretrained(pt)
    assert torch.equal(model.W_E, tensors["embedder.input_embedding"])
