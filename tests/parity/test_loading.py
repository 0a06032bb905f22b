"""Checkpoints come in and go out bit for bit, whatever wrote them and whoever reads them."""

import ast
import dataclasses
import importlib
import json
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import (  # noqa: TID251
    PreTrainedTokenizerFast,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
)

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.commands.convert import main
from hooked_hybrid.config import AttentionConfig, RGLRUConfig, RotaryConfig
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.mixers.attention import Attention
from hooked_hybrid.network.mixers.rglru import RGLRU
from hooked_hybrid.network.mlps.gated import GatedMLP
from tests.models import layouts, relative
from tests.references import (
    SPECS,
    google_griffin,
    google_logits,
    google_supports,
    hf_logits_uncached,
    hf_recurrentgemma,
    random_tokens,
)
from tests.tolerances import FP32_PARITY
from tests.transformers_versions import VERSION, needs_window, since_5
from weights_conversion import CheckpointError, check, google, recurrentgemma
from weights_conversion.filling import shapes_of
from weights_conversion.rules import account, revert

GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN_BY_4X = GOLDEN / "recurrentgemma_written_by_4x"
WRITTEN_BY_5X = GOLDEN / "recurrentgemma_hf"
TINY_PT = GOLDEN / "recurrentgemma_google" / "tiny.pt"
TINY_N_KEYS = 17
SMALL_SHARD = 20_000  # bytes; the models here have 100 to 300 thousand

GOOGLE = [name for name, spec in SPECS.items() if google_supports(spec)]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
every_spec = pytest.mark.parametrize("name", SPECS)

hf = cache(lambda name: hf_recurrentgemma(SPECS[name]))


@cache
def ours(name: str) -> HookedHybrid:
    return HookedHybrid.from_hf(hf(name)).requires_grad_(False)


def tokens_of(name: str) -> Tensor:
    return random_tokens(SPECS[name], batch=2, length=30)


def written_by_hf(name: str, folder: Path, **options: Any) -> Path:
    hf(name).save_pretrained(folder, **options)
    return folder


def read_by_hf(folder: Path) -> RecurrentGemmaForCausalLM:
    model, info = RecurrentGemmaForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype="auto", output_loading_info=True
    )
    assert not any(info.values()), info
    return model.eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        if path.name != "golden.safetensors":
            part = load_file(path)
            assert not found.keys() & part.keys()
            found |= part
    return found


def config_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def assert_same_tensors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].dtype == tensor.dtype, name
        assert actual[name].equal(tensor), name


def assert_same_model(actual: HookedHybrid, expected: HookedHybrid) -> None:
    assert actual.cfg == expected.cfg
    assert_same_tensors(actual.state_dict(), expected.state_dict())
    assert layouts(actual) == layouts(expected)  # as the model lays them out, not as the file did


# --- from Hugging Face ----------------------------------------------------------------------------


@every_spec
def test_from_pretrained_equals_from_hf(name: str, tmp_path: Path):
    assert_same_model(HookedHybrid.from_pretrained(written_by_hf(name, tmp_path)), ours(name))


def test_sharded_equals_one_file(tmp_path: Path):
    folder = written_by_hf("wide_recurrence", tmp_path, max_shard_size=SMALL_SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 5
    assert_same_model(HookedHybrid.from_pretrained(folder), ours("wide_recurrence"))
    assert_same_model(HookedHybrid.from_pretrained(str(folder)), ours("wide_recurrence"))


@pytest.mark.parametrize("on_disk", DTYPES)
@pytest.mark.parametrize("in_memory", DTYPES)
def test_every_dtype_loads_as_every_dtype(
    on_disk: torch.dtype, in_memory: torch.dtype, tmp_path: Path
):
    rounded = hf_recurrentgemma(SPECS["window_of_3"]).to(on_disk)
    rounded.save_pretrained(tmp_path)
    assert {t.dtype for t in tensors_in(tmp_path).values()} == {on_disk}
    model = HookedHybrid.from_pretrained(tmp_path, dtype=in_memory)
    expected = ours("window_of_3").state_dict()
    expected = {key: t.to(on_disk).to(in_memory) for key, t in expected.items()}
    assert_same_tensors(model.state_dict(), expected)
    assert_same_tensors(HookedHybrid.from_hf(rounded, in_memory).state_dict(), expected)


def test_bf16_loads_into_fp32_exactly(tmp_path: Path):
    hf_recurrentgemma(SPECS["as_published"]).to(torch.bfloat16).save_pretrained(tmp_path)
    model = HookedHybrid.from_pretrained(tmp_path)
    assert model.dtype == torch.float32
    for key, tensor in model.state_dict().items():
        assert tensor.bfloat16().float().equal(tensor), key
        assert tensor.bfloat16().equal(ours("as_published").state_dict()[key].bfloat16()), key
    upcast = read_by_hf(tmp_path).float()
    tokens = tokens_of("as_published")
    assert relative(model(tokens), hf_logits_uncached(upcast, tokens)) < FP32_PARITY


def test_from_hf_keeps_the_dtype_and_shares_no_memory():
    theirs = hf_recurrentgemma(SPECS["window_of_3"]).to(torch.bfloat16)
    model = HookedHybrid.from_hf(theirs)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert_same_tensors(model.state_dict(), before)


@since_5("it writes what it reads")
def test_a_config_of_transformers_4_reads_as_one_of_5(tmp_path: Path):
    old = config_in(WRITTEN_BY_4X)
    assert "rope_parameters" not in old
    assert old["transformers_version"].startswith("4.")
    RecurrentGemmaConfig.from_pretrained(WRITTEN_BY_4X).save_pretrained(tmp_path)
    new = config_in(tmp_path)
    assert "rope_theta" not in new
    assert new["rope_parameters"]["rope_theta"] == old["rope_theta"]
    assert recurrentgemma.config_from_dict(old) == recurrentgemma.config_from_dict(new)
    changed = [{**old, "rope_theta": 7.0}, {**old, "partial_rotary_factor": 1.0}]
    assert all(
        recurrentgemma.config_from_dict(c) != recurrentgemma.config_from_dict(old) for c in changed
    )


def test_tensors_of_old_checkpoints_that_are_not_needed_are_left(tmp_path: Path):
    folder = written_by_hf("as_published", tmp_path)
    tensors = tensors_in(folder)
    tensors |= {
        "lm_head.weight": tensors["model.embed_tokens.weight"].clone(),
        "model.normalizer": torch.tensor(5.65),
        "model.layers.2.temporal_block.rotary_emb.inv_freq": torch.ones(2),
    }
    save_file(tensors, folder / "model.safetensors")
    assert_same_model(HookedHybrid.from_pretrained(folder), ours("as_published"))


# --- to Hugging Face ------------------------------------------------------------------------------


@every_spec
def test_transformers_loads_what_is_saved(name: str, tmp_path: Path):
    ours(name).save_pretrained(tmp_path / "saved")
    theirs = read_by_hf(tmp_path / "saved")
    assert_same_tensors(theirs.state_dict(), hf(name).state_dict())
    logits = hf_logits_uncached(theirs, tokens_of(name))
    assert logits.equal(hf_logits_uncached(hf(name), tokens_of(name)))
    assert relative(logits, ours(name)(tokens_of(name))) < FP32_PARITY


@pytest.mark.parametrize("name", ["wide_recurrence", "wide_heads"])
def test_transformers_loads_saved_shards(name: str, tmp_path: Path):
    ours(name).save_pretrained(tmp_path, max_shard_size=SMALL_SHARD)
    shards = sorted(tmp_path.glob("*.safetensors"))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(shards) > 5
    assert {path.name for path in shards} == set(index["weight_map"].values())
    assert index["metadata"]["total_size"] == sum(
        t.numel() * t.element_size() for t in tensors_in(tmp_path).values()
    )
    for path in shards:
        with safe_open(path, "pt") as shard:
            names = set(shard.keys())
        assert names == {n for n, file in index["weight_map"].items() if file == path.name}
        size = sum(tensors_in(tmp_path)[n].nbytes for n in names)
        assert size <= SMALL_SHARD or len(names) == 1
    assert_same_tensors(read_by_hf(tmp_path).state_dict(), hf(name).state_dict())


@needs_window
def test_transformers_loads_a_saved_google_model(tmp_path: Path):
    model = HookedHybrid.from_pretrained(TINY_PT, n_keys=TINY_N_KEYS)
    model.save_pretrained(tmp_path / "saved")
    assert config_in(tmp_path / "saved")["attention_window_size"] == TINY_N_KEYS
    golden = load_file(TINY_PT.parent / "golden.safetensors")
    theirs = hf_logits_uncached(read_by_hf(tmp_path / "saved"), golden["input_ids"])
    assert relative(theirs, golden["logits"]) < FP32_PARITY


@pytest.mark.parametrize("dtype", DTYPES)
def test_saving_and_loading_changes_no_bit(dtype: torch.dtype, tmp_path: Path):
    model = HookedHybrid.from_hf(hf("wide_heads"), dtype)
    model.save_pretrained(tmp_path / "saved")
    loaded = HookedHybrid.from_pretrained(tmp_path / "saved", dtype)
    assert_same_model(loaded, model)
    assert read_by_hf(tmp_path / "saved").dtype == dtype


@pytest.mark.parametrize("source", [WRITTEN_BY_4X, WRITTEN_BY_5X])
def test_a_checkpoint_comes_out_as_it_went_in(source: Path, tmp_path: Path):
    HookedHybrid.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_in(tmp_path / "saved"), tensors_in(source))
    before, after = config_in(source), config_in(tmp_path / "saved")
    assert before.pop("transformers_version")
    assert after == {**after, **before}
    read = [
        RecurrentGemmaConfig.from_pretrained(folder).to_dict()
        for folder in (source, tmp_path / "saved")
    ]
    for config in read:
        config.pop("_name_or_path")
        if VERSION < (5,):
            config.pop("rope_parameters", None)  # it keeps what it has no word for
    assert read[0] == read[1]


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="not empty"):
        ours("window_of_3").save_pretrained(tmp_path)
    with pytest.raises(FileExistsError, match="is a file"):
        ours("window_of_3").save_pretrained(tmp_path / "note.txt")
    assert [path.name for path in tmp_path.iterdir()] == ["note.txt"]
    assert (tmp_path / "note.txt").read_text() == "mine"


@pytest.mark.parametrize("exists", [True, False])
def test_nothing_half_written_is_left(
    exists: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    target, written = tmp_path / "saved", []
    if exists:
        target.mkdir()

    def fail(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        if written:
            raise OSError("No space left on device")
        written.append(path)
        path.write_bytes(b"part of a model")

    # by name, `weights_conversion.save` is the function
    monkeypatch.setattr(importlib.import_module("weights_conversion.save"), "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        ours("window_of_3").save_pretrained(target, max_shard_size=SMALL_SHARD)
    assert written
    assert list(tmp_path.rglob("*")) == ([target] if exists else [])


def test_a_model_without_words_in_any_config_is_not_saved(tmp_path: Path):
    model = HookedHybrid.from_hf(hf("as_published"), logits_soft_cap=None)
    with pytest.raises(CheckpointError, match="no published family"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# --- from Google and back -------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_google_file_comes_out_as_it_went_in(dtype: torch.dtype, tmp_path: Path):
    parameters = {n: t.to(dtype) for n, t in torch.load(TINY_PT, weights_only=True).items()}
    torch.save(parameters, tmp_path / "tiny.pt")
    model = HookedHybrid.from_pretrained(tmp_path / "tiny.pt", dtype)
    back = dict(revert(google.rules(model.cfg), model.state_dict()))
    assert_same_tensors(back, parameters)


@pytest.mark.parametrize("name", GOOGLE)
def test_a_google_file_equals_the_hf_directory_of_its_weights(name: str, tmp_path: Path):
    spec, griffin = SPECS[name], google_griffin(SPECS[name])
    torch.save(griffin.state_dict(), tmp_path / "griffin.pt")
    given = {"n_keys": spec.n_keys} if spec.attention_layers else {}
    if not spec.recurrent_layers:
        with pytest.raises(CheckpointError, match="n_heads"):
            HookedHybrid.from_pretrained(tmp_path / "griffin.pt", **given)
        given["n_heads"] = spec.n_heads
    model = HookedHybrid.from_pretrained(tmp_path / "griffin.pt", **given)
    # `hf_recurrentgemma` takes the end tokens out of its generation_config
    ends = {"eos_token_id": google.SPECIAL_TOKENS["eos_token_id"]}
    expected = ours(name).cfg.with_overrides(model_name=model.cfg.model_name, **ends)
    # A `.pt` has neither file: BOS is put in front as Google's sampler does.
    assert model.cfg == dataclasses.replace(
        expected, generation_config={}, default_prepend_bos=True
    )
    assert_same_tensors(model.state_dict(), ours(name).state_dict())
    assert relative(model(tokens_of(name)), google_logits(griffin, tokens_of(name))) < FP32_PARITY
    assert HybridConfig.from_pretrained(str(tmp_path / "griffin.pt"), **given) == model.cfg


def test_a_directory_with_one_pt_equals_the_file(tmp_path: Path):
    model = HookedHybrid.from_pretrained(TINY_PT)
    (tmp_path / "2b.pt").write_bytes(TINY_PT.read_bytes())
    assert_same_model(HookedHybrid.from_pretrained(tmp_path), model)
    (tmp_path / "2b-it.pt").write_bytes(TINY_PT.read_bytes())
    with pytest.raises(CheckpointError, match="2b-it.pt, 2b.pt"):
        HookedHybrid.from_pretrained(tmp_path)


def test_a_google_file_in_torchs_format_of_before_1_6_loads(tmp_path: Path):
    parameters = torch.load(TINY_PT, weights_only=True)
    torch.save(parameters, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    model = HookedHybrid.from_pretrained(tmp_path / "old.pt")
    assert_same_model(model, HookedHybrid.from_pretrained(TINY_PT))


def test_a_google_file_of_another_dtype_is_rounded_once(tmp_path: Path):
    exact = HookedHybrid.from_pretrained(TINY_PT)
    rounded = HookedHybrid.from_pretrained(TINY_PT, torch.bfloat16)
    expected = {key: t.bfloat16() for key, t in exact.state_dict().items()}
    assert_same_tensors(rounded.state_dict(), expected)
    parameters = torch.load(TINY_PT, weights_only=True)
    torch.save({n: t.bfloat16() for n, t in parameters.items()}, tmp_path / "bf16.pt")
    upcast = HookedHybrid.from_pretrained(tmp_path / "bf16.pt")
    assert upcast.dtype == torch.float32
    assert_same_tensors(upcast.state_dict(), {key: t.float() for key, t in expected.items()})


# --- config and its overrides ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "n_keys"), [(TINY_PT, 2049), (WRITTEN_BY_4X, 16), (WRITTEN_BY_5X, 16)]
)
def test_overrides_change_the_config_and_no_weight(source: Path, n_keys: int):
    plain = HookedHybrid.from_pretrained(source)
    other = HookedHybrid.from_pretrained(source, n_keys=5, logits_soft_cap=9.0, eos_token_id=3)
    keys = [
        {m.n_keys for layer in cfg.layers if isinstance(m := layer.mixer, AttentionConfig)}
        for cfg in (plain.cfg, other.cfg)
    ]
    assert keys == [{n_keys}, {5}]
    assert (plain.cfg.logits_soft_cap, other.cfg.logits_soft_cap) == (30.0, 9.0)
    assert (plain.cfg.eos_token_id, other.cfg.eos_token_id) == (1, 3)
    assert other.cfg == plain.cfg.with_overrides(n_keys=5, logits_soft_cap=9.0, eos_token_id=3)
    assert_same_tensors(other.state_dict(), plain.state_dict())
    tokens = torch.arange(12)[None]
    assert relative(other(tokens), plain(tokens)) > 1e-3
    assert other(tokens).abs().max() < 9


def test_from_hf_takes_overrides_too():
    other = HookedHybrid.from_hf(hf("as_published"), n_keys=5, logits_soft_cap=9.0)
    assert other.cfg == ours("as_published").cfg.with_overrides(n_keys=5, logits_soft_cap=9.0)


@pytest.mark.parametrize("source", [TINY_PT, WRITTEN_BY_5X])
@pytest.mark.parametrize("setting", ["d_model", "nkeys", "layers"])
def test_an_unknown_override_is_refused_by_name(source: Path, setting: str):
    with pytest.raises(TypeError, match=setting):
        HookedHybrid.from_pretrained(source, **{setting: 5})
    with pytest.raises(TypeError, match=setting):
        HybridConfig.from_pretrained(str(source), **{setting: 5})


@pytest.mark.parametrize("source", [TINY_PT, WRITTEN_BY_4X, WRITTEN_BY_5X])
@pytest.mark.parametrize("overrides", [{}, {"n_keys": 5, "logits_soft_cap": 9.0}])
def test_the_config_alone_is_that_of_the_model(source: Path, overrides: dict[str, Any]):
    cfg = HybridConfig.from_pretrained(str(source), **overrides)
    assert cfg == HookedHybrid.from_pretrained(source, **overrides).cfg


def test_the_config_alone_needs_no_weights(tmp_path: Path):
    (tmp_path / "config.json").write_bytes((WRITTEN_BY_4X / "config.json").read_bytes())
    whole = HybridConfig.from_pretrained(str(WRITTEN_BY_4X))
    assert HybridConfig.from_pretrained(str(tmp_path)) == whole
    assert HybridConfig.from_pretrained(tmp_path) == whole


def test_every_rotary_width_survives_saving():
    cfg = HybridConfig.from_pretrained(str(WRITTEN_BY_4X))
    lost = []
    for d_head in range(4, 129, 4):
        for d_rotary in range(2, d_head + 1, 2):
            rotary = RotaryConfig(d_rotary=d_rotary)
            mixer = dataclasses.replace(cfg.layers[2].mixer, d_head=d_head, rotary=rotary)
            layer = dataclasses.replace(cfg.layers[2], mixer=mixer)
            config = recurrentgemma.config_to_dict(dataclasses.replace(cfg, layers=(layer,)))
            share = config["rope_parameters"]["partial_rotary_factor"]
            if int(d_head * share) != d_rotary:  # as transformers and this library read it
                lost.append((d_head, d_rotary))
    assert not lost


# --- tokenizer ------------------------------------------------------------------------------------


def words() -> Tokenizer:
    names = ["<pad>", "<eos>", "<bos>", *(f"w{i}" for i in range(50))]
    tokenizer = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = Whitespace()
    return tokenizer


@pytest.mark.parametrize("puts_bos", [True, False])
def test_the_tokenizer_of_a_directory_is_loaded_and_saved(puts_bos: bool, tmp_path: Path):
    """The file's own post-processor says whether BOS stands in front, as in transformers."""
    folder, own = written_by_hf("as_published", tmp_path / "theirs"), words()
    if puts_bos:
        own.post_processor = TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    own.save(str(folder / "tokenizer.json"))
    expected = [*([2] if puts_bos else []), 3, 5, 7]
    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))
    assert theirs("w0 w2 w4")["input_ids"] == expected
    model = HookedHybrid.from_pretrained(folder)
    assert model.to_tokens("w0 w2 w4").tolist() == [expected]
    assert model.to_tokens("w0 w2 w4", prepend_bos=True).tolist() == [[2, 3, 5, 7]]
    assert model.to_string(torch.tensor([3, 5])) == "w0 w2"
    assert model("w0 w2 w4").equal(model(torch.tensor([expected])))
    model.save_pretrained(tmp_path / "ours")
    again = HookedHybrid.from_pretrained(tmp_path / "ours")
    assert again.to_tokens("w0 w2 w4").tolist() == [expected]


def test_a_tokenizer_given_is_used_instead(tmp_path: Path):
    folder = written_by_hf("as_published", tmp_path)
    assert HookedHybrid.from_pretrained(folder).tokenizer is None
    words().save(str(folder / "tokenizer.json"))
    given = words()
    assert HookedHybrid.from_pretrained(folder, tokenizer=given).tokenizer is given
    assert HookedHybrid.from_hf(hf("as_published"), tokenizer=given).tokenizer is given


# --- the command ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_command_converts_a_google_file(
    dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    target = tmp_path / "converted"
    assert main([str(TINY_PT), str(target), "--dtype", dtype]) == 0
    assert str(target) in capsys.readouterr().out
    assert config_in(target)["attention_window_size"] == 2049
    theirs, model = read_by_hf(target), HookedHybrid.from_pretrained(TINY_PT)
    assert str(theirs.dtype) == f"torch.{dtype}"
    rounded = HookedHybrid.from_hf(theirs).state_dict()
    assert_same_tensors(rounded, {key: t.to(theirs.dtype) for key, t in model.state_dict().items()})
    if dtype == "float32":
        tokens = torch.arange(40)[None]
        assert relative(hf_logits_uncached(theirs, tokens), model(tokens)) < FP32_PARITY


@pytest.mark.parametrize(
    ("source", "n_tensors"), [(TINY_PT, 89), (WRITTEN_BY_4X, 154), (WRITTEN_BY_5X, 99)]
)
def test_the_command_checks_without_reading_a_tensor(
    source: Path,
    n_tensors: int,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    def read(self: Any, name: str) -> NoReturn:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("weights_conversion.sources.SafetensorsSource.read", read)
    monkeypatch.setattr("weights_conversion.sources.MemorySource.read", read)
    assert main(["--check", str(source)]) == 0
    out = capsys.readouterr().out
    model = HookedHybrid.meta(HybridConfig.from_pretrained(str(source)))
    n_parameters = sum(p.numel() for p in model.parameters())
    assert out == f"{check(source)}\n"
    assert f"{n_tensors} tensors" in out
    assert f"{n_parameters:,} parameters" in out
    assert f"{model.cfg.n_layers} layers" in out


def test_the_command_says_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    target = tmp_path / "converted"
    assert main([str(tmp_path / "nowhere"), str(target)]) == 1
    assert "nowhere" in capsys.readouterr().err
    assert not target.exists()
    target.mkdir()
    (target / "note.txt").write_text("mine")
    assert main([str(TINY_PT), str(target)]) == 1
    assert "not empty" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(TINY_PT)])


# --- nothing is drawn, nothing is allocated twice -------------------------------------------------


@pytest.mark.parametrize("source", [TINY_PT, WRITTEN_BY_4X, "in memory"])
def test_loading_draws_no_random_number(source: Path | str, monkeypatch: pytest.MonkeyPatch):
    theirs = hf("as_published")

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise AssertionError("a parameter was initialised")

    for name in dir(torch.nn.init):
        if name.endswith("_") and not name.startswith("_"):
            monkeypatch.setattr(torch.nn.init, name, refuse)
    for name in ("normal_", "uniform_", "to_empty"):
        owner = torch.nn.Module if name == "to_empty" else torch.Tensor
        monkeypatch.setattr(owner, name, refuse)
    random_state = torch.get_rng_state()
    model = (
        HookedHybrid.from_hf(theirs)
        if source == "in memory"
        else HookedHybrid.from_pretrained(source)
    )
    assert torch.get_rng_state().equal(random_state)
    assert not any(t.is_meta for t in (*model.parameters(), *model.buffers()))
    with pytest.raises(AssertionError, match="initialised"):  # so the guards would have seen it
        HookedHybrid(model.cfg)


def test_a_meta_model_has_no_memory():
    model = HookedHybrid.meta(HybridConfig.from_pretrained(str(TINY_PT)))
    assert all(t.is_meta for t in (*model.parameters(), *model.buffers()))


def test_the_model_does_not_need_its_files(tmp_path: Path):
    folder = written_by_hf("as_published", tmp_path)
    model = HookedHybrid.from_pretrained(folder)
    size = (folder / "model.safetensors").stat().st_size
    (folder / "model.safetensors").write_bytes(bytes(size))  # in place: a mapping would see it
    assert_same_model(model, ours("as_published"))


# --- the published models, without memory ---------------------------------------------------------

PUBLISHED: dict[str, dict[str, Any]] = {
    "2b": {
        "hidden_size": 2560,
        "num_hidden_layers": 26,
        "num_attention_heads": 10,
        "lru_width": 2560,
        "intermediate_size": 15360,
    },
    "9b": {
        "hidden_size": 4096,
        "num_hidden_layers": 38,
        "num_attention_heads": 16,
        "lru_width": 4096,
        "intermediate_size": 24576,
    },
}
OF_BOTH: dict[str, Any] = {
    "model_type": "recurrent_gemma",
    "vocab_size": 256_000,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "attention_window_size": 2048,
    "conv1d_width": 4,
    "logits_soft_cap": 30.0,
    "block_types": ["recurrent", "recurrent", "attention"],
    "partial_rotary_factor": 0.5,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-6,
    "hidden_activation": "gelu_pytorch_tanh",
    "attention_bias": False,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
# Table 1 of Zani et al. 2025 (2B), and the sums of transformers' own models
COUNTS = {
    "2b": {
        "mlp": 1_534_008_320,
        "recurrent": 377_994_240,
        "rg_lru": 23_731_200,
        "attention": 115_363_840,
        "norm": 135_680,
        "not embedding": 2_027_502_080,
        "all": 2_682_862_080,
    },
    "9b": {
        "mlp": 5_738_897_408,
        "recurrent": 1_364_320_256,
        "rg_lru": 54_845_440,
        "attention": 427_868_160,
        "norm": 315_392,
        "not embedding": 7_531_401_216,
        "all": 8_579_977_216,
    },
}
every_size = pytest.mark.parametrize("size", PUBLISHED)
every_list = pytest.mark.parametrize("publisher", ["hf", "google"])


def published_keys(publisher: str, size: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a published checkpoint."""
    lines = (GOLDEN / "keys" / f"keys_{publisher}_rg_{size}.txt").read_text().splitlines()
    return {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}


@cache
def published_config(publisher: str, size: str) -> HybridConfig:
    if publisher == "google":
        return google.config_from_shapes(published_keys("google", size))
    return recurrentgemma.config_from_dict({**OF_BOTH, **PUBLISHED[size]})


@every_size
@every_list
def test_published_models_have_the_published_counts(size: str, publisher: str):
    model = HookedHybrid.meta(published_config(publisher, size))

    def count(*kinds: type) -> int:
        return sum(
            p.numel() for m in model.modules() if isinstance(m, kinds) for p in m.parameters()
        )

    rg_lru = [
        p.numel()
        for name, p in model.named_parameters()
        if any(part in name for part in ("input_gate.", "rec_gate.", "a_param"))
    ]
    total = sum(p.numel() for p in model.parameters())
    assert COUNTS[size] == {
        "mlp": count(GatedMLP),
        "recurrent": count(RGLRU),
        "rg_lru": sum(rg_lru),
        "attention": count(Attention),
        "norm": count(RMSNorm),
        "not embedding": count(GatedMLP, RGLRU, Attention, RMSNorm),
        "all": total,
    }
    assert total - model.W_E.numel() == COUNTS[size]["not embedding"]


@every_size
def test_both_publishers_describe_one_model_but_for_the_window(size: str):
    hf_cfg, google_cfg = (published_config(publisher, size) for publisher in ("hf", "google"))
    keys = [cfg.layers[2].mixer.n_keys for cfg in (hf_cfg, google_cfg)]
    assert keys == [2048, 2049]
    alike = google_cfg.with_overrides(n_keys=2048, model_name=hf_cfg.model_name)
    assert (google_cfg.default_prepend_bos, hf_cfg.default_prepend_bos) == (True, None)
    assert (
        dataclasses.replace(alike, default_prepend_bos=None) == hf_cfg
    )  # the tokenizer decides there
    attention = {"2b": range(2, 26, 3), "9b": range(2, 38, 3)}[size]
    assert hf_cfg.attention_layers == tuple(attention)
    recurrence = hf_cfg.layers[0].mixer
    assert isinstance(recurrence, RGLRUConfig)
    assert recurrence.n_gate_blocks == hf_cfg.n_heads == PUBLISHED[size]["num_attention_heads"]


@cache
def our_shapes(publisher: str, size: str) -> dict[str, tuple[int, ...]]:
    return shapes_of(HookedHybrid.meta(published_config(publisher, size)))


def account_for(publisher: str, size: str, keys: dict[str, tuple[int, ...]]) -> None:
    table = google if publisher == "google" else recurrentgemma
    cfg = published_config(publisher, size)
    account(table.rules(cfg), keys, our_shapes(publisher, size), table.ignored(cfg))


@every_size
@every_list
def test_every_published_key_is_accounted_for(size: str, publisher: str):
    keys = published_keys(publisher, size)
    n_keys = {("hf", "2b"): 485, ("hf", "9b"): 705, ("google", "2b"): 432, ("google", "9b"): 628}
    assert len(keys) == n_keys[publisher, size]
    account_for(publisher, size, keys)
    if publisher == "hf":  # saved files leave the tied head out
        account_for(publisher, size, {n: s for n, s in keys.items() if n != "lm_head.weight"})


@every_list
def test_a_published_key_astray_is_named(publisher: str):
    keys = published_keys(publisher, "2b")
    ends = ("final_norm.weight", "final_norm.scale", "embed_tokens.weight", "input_embedding")
    astray = [n for n in keys if ".5." in n or n.endswith(ends)]  # layer 5 is attention
    assert len(astray) > 10
    for name in astray:
        without = {n: s for n, s in keys.items() if n != name}
        with pytest.raises(CheckpointError, match="in 1 places") as error:
            account_for(publisher, "2b", without)
        assert f"missing: {name}" in str(error.value)
        with pytest.raises(CheckpointError) as error:
            account_for(publisher, "2b", {**keys, name: (*keys[name][:-1], keys[name][-1] + 2)})
        assert name in str(error.value)
    with pytest.raises(CheckpointError, match="in 1 places") as error:
        account_for(publisher, "2b", {**keys, "model.layers.26.ln.weight": (7,)})
    assert "unexpected: model.layers.26.ln.weight (7,)" in str(error.value)
