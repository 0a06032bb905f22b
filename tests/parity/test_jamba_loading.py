"""Jambas come in and go out bit for bit, experts one by one or fused; what cannot be read is named.

Published files and `save_pretrained` hold each expert by itself, transformers 5 holds them fused in
memory and, with `save_original_format=False`, on disk.
"""

import ast
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import JambaConfig, JambaForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HybridConfig
from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    LayerConfig,
    MambaConfig,
    MoEConfig,
    RGLRUConfig,
)
from hooked_hybrid.network.layers import InnerNorm, RMSNorm
from hooked_hybrid.network.mixers.attention import Attention
from hooked_hybrid.network.mixers.mamba import Mamba
from hooked_hybrid.network.mlps.gated import GatedMLP
from hooked_hybrid.network.mlps.moe import MoE
from tests.jamba_references import SPECS, JambaSpec, hf_jamba, hf_logits_uncached, randomise
from tests.models import layouts, relative
from tests.references import random_tokens
from tests.tolerances import FP32_PARITY
from tests.transformers_versions import EAGER_EXPERTS, SLOW_MAMBA, VERSION, since_5
from weights_conversion import CheckpointError, check, jamba
from weights_conversion.filling import shapes_of
from weights_conversion.rules import account, revert

GOLDEN = Path(__file__).parents[1] / "golden"
WRITTEN_BY_5X, WRITTEN_BY_4X = GOLDEN / "jamba_hf", GOLDEN / "jamba_written_by_4x"
SMALL_SHARD = 20_000  # bytes; the models here have 100 to 500 thousand
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

ALL_SPECS = {
    **SPECS,
    # of 12 experts, number 10 comes after number 9, and not after number 1
    "twelve_experts": JambaSpec(n_layers=2, n_experts=12, n_chosen=3, d_mlp=20, seed=1),
}
SPEC = "short_convolution"  # where one will do: attention, Mamba, experts with both, dense MLPs
WITH_EXPERTS = [name for name, spec in ALL_SPECS.items() if spec.expert_layers]
every_spec = pytest.mark.parametrize("name", ALL_SPECS)
of_5 = since_5("holds and writes no fused experts")
FUSED_KIND = pytest.param("fused", marks=of_5)
every_layout = pytest.mark.parametrize(
    "is_fused", [False, pytest.param(True, marks=of_5)], ids=["separate", "fused"]
)
every_golden = pytest.mark.parametrize("source", [WRITTEN_BY_4X, WRITTEN_BY_5X], ids=["4x", "5x"])

hf = cache(lambda name: hf_jamba(ALL_SPECS[name]))


@cache
def ours(name: str) -> HookedHybrid:
    return HookedHybrid.from_hf(hf(name)).requires_grad_(False)


def tokens_of(name: str) -> Tensor:
    return random_tokens(ALL_SPECS[name], batch=4, length=40)


def written_by_hf(model: JambaForCausalLM, folder: Path, is_fused: bool = False, **options) -> Path:
    layout = {"save_original_format": not is_fused} if VERSION >= (5,) else {}
    model.save_pretrained(folder, **layout, **options)
    return folder


def read_by_hf(folder: Path) -> JambaForCausalLM:
    model, info = JambaForCausalLM.from_pretrained(
        folder,
        attn_implementation="eager",
        **EAGER_EXPERTS,
        **SLOW_MAMBA,
        dtype="auto",
        output_loading_info=True,
    )
    assert not any(info.values()), info
    return model.eval()


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a directory, by name."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("model*.safetensors")):
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
@every_layout
def test_from_pretrained_equals_from_hf(name: str, is_fused: bool, tmp_path: Path):
    folder = written_by_hf(hf(name), tmp_path, is_fused)
    names = tensors_in(folder).keys()
    assert any(n.endswith("experts.gate_up_proj") for n in names) == (
        is_fused and name in WITH_EXPERTS
    )
    assert ("lm_head.weight" in names) != ALL_SPECS[name].tied
    assert_same_model(HookedHybrid.from_pretrained(folder), ours(name))


@every_layout
@pytest.mark.parametrize("name", [SPEC, "one_of_eight_experts", "dense"])
def test_sharded_equals_one_file(name: str, is_fused: bool, tmp_path: Path):
    folder = written_by_hf(hf(name), tmp_path, is_fused, max_shard_size=SMALL_SHARD)
    assert len(list(folder.glob("*.safetensors"))) > 4
    assert_same_model(HookedHybrid.from_pretrained(folder), ours(name))


@pytest.mark.parametrize("on_disk", DTYPES)
@pytest.mark.parametrize("in_memory", DTYPES)
@every_layout
def test_every_dtype_loads_as_every_dtype(
    on_disk: torch.dtype, in_memory: torch.dtype, is_fused: bool, tmp_path: Path
):
    rounded = hf_jamba(ALL_SPECS[SPEC]).to(on_disk)
    written_by_hf(rounded, tmp_path, is_fused)
    assert {t.dtype for t in tensors_in(tmp_path).values()} == {on_disk}
    model = HookedHybrid.from_pretrained(tmp_path, dtype=in_memory)
    expected = {key: t.to(on_disk).to(in_memory) for key, t in ours(SPEC).state_dict().items()}
    assert_same_tensors(model.state_dict(), expected)
    assert_same_tensors(HookedHybrid.from_hf(rounded, in_memory).state_dict(), expected)


def test_from_hf_keeps_the_dtype_and_shares_no_memory():
    theirs = hf_jamba(ALL_SPECS[SPEC]).to(torch.bfloat16)
    model = HookedHybrid.from_hf(theirs)
    before = {key: t.clone() for key, t in model.state_dict().items()}
    assert {t.dtype for t in before.values()} == {torch.bfloat16}
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.zero_()
    assert_same_tensors(model.state_dict(), before)


@every_golden
def test_from_hf_of_what_transformers_read_equals_from_pretrained(source: Path):
    theirs = HookedHybrid.from_hf(read_by_hf(source), model_name="jamba")
    assert_same_model(theirs, HookedHybrid.from_pretrained(source))


def test_one_expert_is_a_dense_mlp():
    for n_chosen in (1, 2):  # transformers does not look at it
        config = {**hf("dense").config.to_dict(), "num_experts_per_tok": n_chosen}
        cfg = jamba.config_from_dict(config)
        assert all(isinstance(layer.mlp, GatedMLPConfig) for layer in cfg.layers)
    assert not [name for name in hf("dense").state_dict() if "expert" in name or "router" in name]
    logits = hf_logits_uncached(hf("dense"), tokens_of("dense"))
    assert relative(ours("dense")(tokens_of("dense")), logits) < FP32_PARITY


# --- to Hugging Face ------------------------------------------------------------------------------


@every_spec
def test_transformers_loads_what_is_saved(name: str, tmp_path: Path):
    ours(name).save_pretrained(tmp_path / "saved")
    theirs = read_by_hf(tmp_path / "saved")
    assert_same_tensors(theirs.state_dict(), hf(name).state_dict())
    logits = hf_logits_uncached(theirs, tokens_of(name))
    assert logits.equal(hf_logits_uncached(hf(name), tokens_of(name)))
    assert relative(ours(name)(tokens_of(name)), logits) < FP32_PARITY


@every_spec
def test_what_is_saved_is_what_transformers_saves(name: str, tmp_path: Path):
    ours(name).save_pretrained(tmp_path / "ours")
    written_by_hf(hf(name), tmp_path / "theirs")
    assert_same_tensors(tensors_in(tmp_path / "ours"), tensors_in(tmp_path / "theirs"))


@pytest.mark.parametrize("name", [SPEC, "one_of_eight_experts", "dense"])
def test_transformers_loads_saved_shards(name: str, tmp_path: Path):
    ours(name).save_pretrained(tmp_path, max_shard_size=SMALL_SHARD)
    assert len(list(tmp_path.glob("*.safetensors"))) > 4
    assert_same_tensors(read_by_hf(tmp_path).state_dict(), hf(name).state_dict())
    assert_same_model(HookedHybrid.from_pretrained(tmp_path), ours(name))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", [SPEC, "dense", "with_projection_bias"])
def test_saving_and_loading_changes_no_bit(name: str, dtype: torch.dtype, tmp_path: Path):
    model = HookedHybrid.from_hf(hf(name), dtype)
    model.save_pretrained(tmp_path / "saved")
    assert_same_model(HookedHybrid.from_pretrained(tmp_path / "saved", dtype), model)
    assert read_by_hf(tmp_path / "saved").dtype == dtype


@pytest.mark.parametrize("name", WITH_EXPERTS)
def test_names_and_tensors_revert_to_either_layout(name: str, tmp_path: Path):
    for is_fused in (False, True) if VERSION >= (5,) else (False,):
        expected = tensors_in(written_by_hf(hf(name), tmp_path / str(is_fused), is_fused))
        rules = jamba.rules(ours(name).cfg, expected)
        assert_same_tensors(dict(revert(rules, ours(name).state_dict())), expected)


@every_golden
def test_a_checkpoint_comes_out_as_it_went_in(source: Path, tmp_path: Path):
    HookedHybrid.from_pretrained(source).save_pretrained(tmp_path / "saved")
    assert_same_tensors(tensors_in(tmp_path / "saved"), tensors_in(source))
    before, after = config_in(source), config_in(tmp_path / "saved")
    assert before.pop("transformers_version")
    assert before.pop("sliding_window", None) is None  # null says what its absence says
    assert after == {**after, **before}
    read = [
        JambaConfig.from_pretrained(folder).to_dict() for folder in (source, tmp_path / "saved")
    ]
    for config in read:
        config.pop("_name_or_path")
        config.pop("sliding_window", None)
    assert read[0] == read[1]


def test_what_is_saved_has_the_published_names(tmp_path: Path):
    HookedHybrid.from_pretrained(WRITTEN_BY_5X).save_pretrained(tmp_path / "saved")
    written = {name: tuple(t.shape) for name, t in tensors_in(tmp_path / "saved").items()}
    assert written == published_keys("hf_jamba_saved_tiny")


# Settings that the published models leave at their defaults.
VARIANTS: dict[str, dict[str, Any]] = {
    "other eps": {"rms_norm_eps": 0.3},
    "other heads": {"head_dim": 12},
    "rank by width": {"mamba_dt_rank": "auto"},
    "several ends": {"eos_token_id": [2, 7]},
}


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=since_5("no head_dim")) if "heads" in v else v for v in VARIANTS],
)
def test_other_settings_equal_hf_and_survive_saving(variant: str, tmp_path: Path):
    given = {**hf(SPEC).config.to_dict(), **VARIANTS[variant]}
    config = JambaConfig(**given, attn_implementation="eager", **EAGER_EXPERTS)
    with torch.random.fork_rng(devices=[]):
        theirs = JambaForCausalLM(config).eval()
    randomise(theirs, seed=7)
    tokens, model = tokens_of(SPEC), HookedHybrid.from_hf(theirs)
    expected = hf_logits_uncached(theirs, tokens)
    assert relative(model(tokens), expected) < FP32_PARITY
    model.save_pretrained(tmp_path / "saved")
    assert hf_logits_uncached(read_by_hf(tmp_path / "saved"), tokens).equal(expected)
    assert_same_model(HookedHybrid.from_pretrained(tmp_path / "saved"), model)


def test_a_model_that_only_looks_like_a_jamba_is_not_saved(tmp_path: Path):
    rg_lru = LayerConfig(RGLRUConfig(d_rnn=16, n_gate_blocks=4), GatedMLPConfig(20, "silu", False))
    model = HookedHybrid(HybridConfig(d_model=16, d_vocab=31, layers=(rg_lru, rg_lru)))
    with pytest.raises(CheckpointError, match="no published family"):
        model.save_pretrained(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


# --- configs of transformers 4 and 5 --------------------------------------------------------------


def test_a_config_of_transformers_4_reads_as_one_of_5(tmp_path: Path):
    old = config_in(WRITTEN_BY_4X)
    assert old["transformers_version"].startswith("4.")
    assert {"sliding_window", "num_logits_to_keep", "torch_dtype"} <= old.keys()
    JambaConfig.from_pretrained(WRITTEN_BY_4X).save_pretrained(tmp_path)
    new = config_in(tmp_path)
    assert "dtype" in new
    assert "torch_dtype" not in new
    assert jamba.config_from_dict(old) == jamba.config_from_dict(new)


@pytest.mark.parametrize(("d_model", "rank"), [(32, 2), (33, 3), (4096, 256), (15, 1)])
def test_the_rank_auto_is_a_sixteenth_of_the_width_rounded_up(d_model: int, rank: int):
    config = {**config_in(WRITTEN_BY_5X), "hidden_size": d_model, "num_attention_heads": 1}
    config |= {"num_key_value_heads": 1, "mamba_dt_rank": "auto"}
    given = JambaConfig(**config).mamba_dt_rank
    absent = {key: value for key, value in config.items() if key != "mamba_dt_rank"}
    assert ranks_in(config) == ranks_in(absent) == {rank} == {given}


def ranks_in(config: dict[str, Any]) -> set[int]:
    mixers = [layer.mixer for layer in jamba.config_from_dict(config).layers]
    return {mixer.dt_rank for mixer in mixers if isinstance(mixer, MambaConfig)}


def test_what_a_config_leaves_out_is_what_transformers_assumes():
    needed = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
    sizes = dict(zip(needed, (61, 64, 48, 10), strict=True))
    short = {"model_type": "jamba", "num_attention_heads": 4, "num_key_value_heads": 2, **sizes}
    cfg, whole = (jamba.config_from_dict(c) for c in (short, JambaConfig(**short).to_dict()))
    assert cfg.layers == whole.layers
    assert (cfg.norm, cfg.tied_embedding) == (whole.norm, whole.tied_embedding)


def test_an_offset_outside_its_period_selects_no_layer():
    config = config_in(WRITTEN_BY_5X) | {"attn_layer_offset": 3, "expert_layer_offset": 2}
    assert (config["attn_layer_period"], config["expert_layer_period"]) == (3, 2)
    cfg = jamba.config_from_dict(config)
    assert cfg.attention_layers == ()
    assert not [layer for layer in cfg.layers if isinstance(layer.mlp, MoEConfig)]


def test_settings_without_effect_are_kept():
    kept = {"use_mamba_kernels": False, "output_router_logits": True, "attention_dropout": 0.1}
    kept |= {"router_aux_loss_coef": 0.5, "num_logits_to_keep": 1, "initializer_range": 0.3}
    cfg = jamba.config_from_dict({**config_in(WRITTEN_BY_4X), **kept})
    assert cfg == jamba.config_from_dict(config_in(WRITTEN_BY_4X))
    again = jamba.config_to_dict(cfg)
    assert again == {**again, **kept}


# --- the published models, without memory ---------------------------------------------------------

# FACTS: hidden 4096, 32 layers, attention at 4, 12, 20, 28, 16 experts at odd layers
MINI: dict[str, Any] = {
    "model_type": "jamba",
    "architectures": ["JambaForCausalLM"],
    "attn_layer_offset": 4,
    "attn_layer_period": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "expert_layer_offset": 1,
    "expert_layer_period": 2,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_state": 16,
    "mamba_dt_rank": 256,
    "mamba_expand": 2,
    "mamba_inner_layernorms": True,
    "mamba_proj_bias": False,
    "max_position_embeddings": 262144,
    "num_attention_heads": 32,
    "num_experts": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "num_logits_to_keep": 1,
    "pad_token_id": 0,
    "rms_norm_eps": 1e-06,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.44.2",
    "use_mamba_kernels": True,
    "vocab_size": 65536,
}
# The larger sibling as AI21 describes it (398 billion parameters, 94 active), and the dense one (3)
LARGE = {
    "hidden_size": 8192,
    "intermediate_size": 24576,
    "mamba_dt_rank": 512,
    "num_attention_heads": 64,
    "num_hidden_layers": 72,
}
REASONING_3B = {
    "attn_layer_offset": 7,
    "attn_layer_period": 14,
    "hidden_size": 2560,
    "intermediate_size": 8192,
    "mamba_dt_rank": 160,
    "num_attention_heads": 20,
    "num_experts": 1,
    "num_experts_per_tok": 1,
    "num_hidden_layers": 28,
    "num_key_value_heads": 1,
    "tie_word_embeddings": True,
}
BILLION = 10**9


def published_keys(file: str) -> dict[str, tuple[int, ...]]:
    """Shape of every tensor of a published checkpoint."""
    lines = (GOLDEN / "keys" / f"keys_{file}.txt").read_text().splitlines()
    return {name: ast.literal_eval(shape) for name, shape in (line.split("\t") for line in lines)}


@cache
def published_config(**changes: Any) -> HybridConfig:
    return jamba.config_from_dict({**MINI, **changes})


@cache
def shapes_of_mini() -> dict[str, tuple[int, ...]]:
    return shapes_of(HookedHybrid.meta(published_config()))


def count(model: nn.Module, *kinds: type) -> int:
    modules = [m for m in model.modules() if isinstance(m, kinds)]
    return sum(p.numel() for m in modules for p in m.parameters())


def n_parameters(cfg: HybridConfig) -> int:
    return sum(p.numel() for p in HookedHybrid.meta(cfg).parameters())


def n_idle(cfg: HybridConfig) -> int:
    """Parameters of the experts that a token does not choose."""
    experts = [layer.mlp for layer in cfg.layers if isinstance(layer.mlp, MoEConfig)]
    return sum((e.n_experts - e.n_chosen) * 3 * cfg.d_model * e.d_mlp for e in experts)


def test_mini_has_the_published_counts():
    cfg = published_config()
    model = HookedHybrid.meta(cfg)
    total = n_parameters(cfg)
    assert total == 51_570_323_328
    assert total - n_idle(cfg) == 12_110_311_296
    assert total - model.W_E.numel() - model.W_U.numel() == 51_033_452_416  # the paper's 51.03
    assert count(model, Attention) == 4 * 41_943_040
    assert count(model, Mamba) == 28 * 105_308_448
    assert count(model, GatedMLP) == 16 * 176_160_768
    assert count(model, MoE) == 16 * 2_818_637_824
    routers = [m.router for m in model.modules() if isinstance(m, MoE)]
    assert [sum(p.numel() for p in router.parameters()) for router in routers] == 16 * [65_536]
    assert count(model, MoE) - 16 * 65_536 == 45_097_156_608
    norms = [m for m in model.modules() if isinstance(m, RMSNorm | InnerNorm)]
    assert len(norms) == 149
    assert count(model, RMSNorm, InnerNorm) == 274_304
    parts = count(model, Attention, Mamba, GatedMLP, MoE, RMSNorm)
    assert parts == 51_033_452_416  # the norms of dt, B and C are Mamba's


def test_mini_has_its_layers_where_they_are():
    cfg = published_config()
    assert cfg.attention_layers == (4, 12, 20, 28)
    with_experts = [i for i, layer in enumerate(cfg.layers) if isinstance(layer.mlp, MoEConfig)]
    assert with_experts == list(range(1, 32, 2))
    assert cfg.layers[4].mixer == AttentionConfig(n_heads=32, n_kv_heads=8, d_head=128)
    assert cfg.layers[0].mixer == MambaConfig(d_inner=8192, d_state=16, dt_rank=256)
    assert cfg.layers[1].mlp == MoEConfig(n_experts=16, n_chosen=2, d_mlp=14336)
    assert cfg.layers[0].mlp == GatedMLPConfig(d_mlp=14336, act="silu", bias=False)
    assert (cfg.n_ctx, cfg.tied_embedding, cfg.logits_soft_cap) == (262144, False, None)
    assert cfg == jamba.config_from_dict(JambaConfig().to_dict())


def test_large_has_the_counts_its_authors_give():
    cfg = published_config(**LARGE)
    total = n_parameters(cfg)
    assert (total // BILLION, (total - n_idle(cfg)) // BILLION) == (398, 94)
    assert len(cfg.attention_layers) == 9


def test_the_dense_3b_is_dense():
    cfg = published_config(**REASONING_3B)
    total = n_parameters(cfg)
    assert (total // BILLION, n_idle(cfg)) == (3, 0)
    assert cfg.attention_layers == (7, 21)
    assert all(isinstance(layer.mlp, GatedMLPConfig) for layer in cfg.layers)


@pytest.mark.parametrize("changes", [{}, LARGE, REASONING_3B], ids=["mini", "large", "3b"])
def test_tensors_of_the_published_models_in_memory_are_accounted_for(changes: dict[str, Any]):
    with torch.device("meta"):
        theirs = JambaForCausalLM(JambaConfig(**{**MINI, **changes}))
    cfg = published_config(**changes)
    assert jamba.config_from_dict(theirs.config.to_dict()) == cfg
    keys = {name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    account(jamba.rules(cfg, keys), keys, shapes_of(HookedHybrid.meta(cfg)), jamba.ignored(cfg))
    assert n_parameters(cfg) == sum(p.numel() for p in theirs.parameters())


KEYS = {"hub_jamba_mini_perexpert": 1251, "hf_jamba_mini_inmemory": 515}
every_list = pytest.mark.parametrize("file", KEYS)


def account_for(keys: dict[str, tuple[int, ...]]) -> None:
    cfg = published_config()
    account(jamba.rules(cfg, keys), keys, shapes_of_mini(), jamba.ignored(cfg))


@every_list
def test_every_published_key_is_accounted_for(file: str):
    keys = published_keys(file)
    assert len(keys) == KEYS[file]
    account_for(keys)
    table = jamba.rules(published_config(), keys)
    assert {name for r in table for name in r.sources} == keys.keys()


@every_list
def test_a_published_key_astray_is_named(file: str):
    keys = published_keys(file)
    # one layer of each kind, and of its experts the one where the order of names is another
    tried = (
        r"(?!model\.layers).*|model\.layers\.(1|12)\.(?!.*experts\.\d).*|.*\.1\..*experts\.10\..*"
    )
    astray = [name for name in keys if re.fullmatch(tried, name)]
    assert len(astray) > 25
    for name in astray:
        without = {n: s for n, s in keys.items() if n != name}
        with pytest.raises(CheckpointError, match="in 1 places") as error:
            account_for(without)
        assert f"missing: {name}" in str(error.value)
        for shape in [(*keys[name][:-1], keys[name][-1] + 2), (2, *keys[name]), ()]:
            with pytest.raises(CheckpointError, match="in [12] places") as error:
                account_for({**keys, name: shape})
            assert f"{name} {shape}" in str(error.value)
    with pytest.raises(CheckpointError, match="in 1 places") as error:
        account_for({**keys, "model.layers.32.mamba.D": (7,)})
    assert "unexpected: model.layers.32.mamba.D (7,)" in str(error.value)


# --- checkpoints that are refused -----------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good checkpoints, `separate` and `fused`."""
    folder = tmp_path_factory.mktemp("whole")
    for kind in ("separate", "fused") if VERSION >= (5,) else ("separate",):
        written_by_hf(hf(SPEC), folder / kind, kind == "fused")
    return folder


@pytest.fixture
def broken(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, unchecked: None
) -> Callable[..., str]:
    """Break a copy of one of them, and return the message with which it is refused.

    All is accounted for before the first tensor is read, so that none may be.
    """

    def read(self: Any, name: str) -> NoReturn:
        raise AssertionError(f"{name} was read")

    def refusal(
        kind: str = "separate",
        change: Callable[[dict[str, Tensor]], object] | None = None,
        **settings: Any,
    ) -> str:
        folder = Path(shutil.copytree(whole / kind, tmp_path / "checkpoint"))
        if change is not None:
            change(tensors := load_file(folder / "model.safetensors"))
            save_file(tensors, folder / "model.safetensors")
        if settings:
            (folder / "config.json").write_text(json.dumps({**config_in(folder), **settings}))
        monkeypatch.setattr("weights_conversion.sources.SafetensorsSource.read", read)
        with pytest.raises(CheckpointError) as error:
            HookedHybrid.from_pretrained(folder)
        with pytest.raises(CheckpointError) as same:
            check(folder)
        assert str(same.value) == str(error.value)
        return str(error.value)

    return refusal


@pytest.mark.parametrize(
    ("kind", "n_tensors"), [("separate", 83), pytest.param("fused", 63, marks=of_5)]
)
def test_whole_checkpoints_are_accounted_for(kind: str, n_tensors: int, whole: Path):
    summary = check(whole / kind)
    assert summary.startswith(f"{n_tensors} tensors become {len(ours(SPEC).state_dict())}, ")
    assert "not needed: none" in summary


EXPERT = "model.layers.1.feed_forward.experts.2.up_proj.weight"
FUSED = "model.layers.1.feed_forward.experts.gate_up_proj"
STATE = "model.layers.2.mamba.A_log"


@pytest.mark.parametrize(
    ("kind", "name"), [("separate", EXPERT), pytest.param("fused", FUSED, marks=of_5)]
)
def test_a_missing_tensor_is_named(kind: str, name: str, broken):
    message = broken(kind, lambda t: t.pop(name))
    assert f"missing: {name}" in message
    assert "in 1 places" in message


@pytest.mark.parametrize("kind", ["separate", FUSED_KIND])
@pytest.mark.parametrize(
    "name", ["model.layers.1.feed_forward.experts.4.up_proj.weight", "model.layers.0.moe.bias"]
)
def test_an_unexpected_tensor_is_named(kind: str, name: str, broken):
    message = broken(kind, lambda t: t.update({name: torch.zeros(3, 5)}))
    assert f"unexpected: {name} (3, 5)" in message
    assert "in 1 places" in message


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("separate", EXPERT),
        *(pytest.param("fused", name, marks=of_5) for name in (FUSED, STATE)),
    ],
)
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (4, 3, 5)], ids=str)
def test_a_tensor_of_another_shape_is_named(kind: str, name: str, shape: tuple, broken):
    message = broken(kind, lambda t: t.update({name: torch.zeros(shape)}))
    assert f"{name} {shape}" in message


def test_a_missing_expert_is_named(broken):
    names = [EXPERT.replace("up_proj", f"{part}_proj") for part in ("gate", "up", "down")]
    message = broken(change=lambda t: [t.pop(name) for name in names])
    assert "in 3 places" in message
    assert all(f"missing: {name}" in message for name in names)


def test_experts_of_different_shapes_are_named(broken):
    def widen(tensors: dict[str, Tensor]) -> None:
        for part, axis in (("gate", 0), ("up", 0), ("down", 1)):
            name = EXPERT.replace("up_proj", f"{part}_proj")
            tensors[name] = torch.cat([tensors[name]] * 2, dim=axis)

    d_model, d_mlp = SPECS[SPEC].d_model, SPECS[SPEC].d_mlp
    message = broken(change=widen)
    assert "in 3 places" in message
    assert f"{EXPERT} {(2 * d_mlp, d_model)}" in message
    assert f"{EXPERT.replace('up_proj', 'down_proj')} {(d_model, 2 * d_mlp)}" in message


@of_5
def test_experts_fused_in_one_layer_only_are_named(broken, whole):
    fused = load_file(whole / "fused" / "model.safetensors")
    part = {name: t for name, t in fused.items() if ".layers.1.feed_forward.experts." in name}

    def mix(tensors: dict[str, Tensor]) -> None:
        for name in [n for n in tensors if ".layers.1.feed_forward.experts." in n]:
            tensors.pop(name)
        tensors.update(part)

    message = broken(change=mix)
    assert "missing: model.layers.3.feed_forward.experts.gate_up_proj" in message
    assert "unexpected: model.layers.3.feed_forward.experts.0.down_proj.weight" in message


def test_an_untied_head_that_is_not_there_is_named(broken):
    assert "missing: lm_head.weight" in broken(change=lambda t: t.pop("lm_head.weight"))


def test_a_head_that_differs_from_the_embedding_it_is_tied_to_is_named(tmp_path: Path):
    folder = written_by_hf(hf("dense"), tmp_path)
    tensors = tensors_in(folder)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, folder / "model.safetensors")
    assert_same_model(HookedHybrid.from_pretrained(folder), ours("dense"))
    tensors["lm_head.weight"] += 1e-3
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match="tie_word_embeddings"):
        HookedHybrid.from_pretrained(folder)


@pytest.mark.parametrize("kind", ["separate", FUSED_KIND])
def test_every_tensor_astray_is_named(kind: str, whole: Path):
    source = {name: tuple(t.shape) for name, t in tensors_in(whole / kind).items()}
    cfg = ours(SPEC).cfg
    target = shapes_of(HookedHybrid.meta(cfg))

    def account_for_these(keys: dict[str, tuple[int, ...]]) -> None:
        account(jamba.rules(cfg, keys), keys, target, jamba.ignored(cfg))

    account_for_these(source)
    for name, shape in source.items():
        if name.endswith("experts.gate_up_proj"):
            continue  # without it, experts are taken to be stored one by one
        without = {n: s for n, s in source.items() if n != name}
        for changed, expected in [
            (without, f"missing: {name}"),
            ({**source, name: (*shape[:-1], shape[-1] + 1)}, name),
            ({**source, name: (2, *shape)}, name),
            ({**source, name: ()}, name),
            ({**source, f"{name}_": shape}, f"unexpected: {name}_"),
        ]:
            with pytest.raises(CheckpointError, match="in [12] places") as error:
                account_for_these(changed)
            assert expected in str(error.value)


BAD_SETTINGS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "unknown": ({"moe_jitter": 0.1, "qk_norm": True}, ("moe_jitter", "qk_norm")),
    "window": ({"sliding_window": 4096}, ("sliding_window=4096",)),
    "activation": ({"hidden_act": "gelu"}, ("hidden_act='gelu'", "silu")),
    "no inner norms": ({"mamba_inner_layernorms": False}, ("mamba_inner_layernorms=False",)),
    "more chosen than there are": (
        {"num_experts_per_tok": 5},
        ("num_experts_per_tok=5", "num_experts=4"),
    ),
    "rotary of 4.x": ({"rope_scaling": {"type": "linear", "factor": 2.0}}, ("rope_scaling",)),
    "rotary of 5.x": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
        ("rope_parameters",),
    ),
    "theta": ({"rope_theta": 1e4}, ("rope_theta",)),
    "quantised": ({"quantization_config": {"quant_method": "fp8"}}, ("quantization_config",)),
    "another architecture": ({"model_type": "bloom"}, ("model_type", "'bloom'", "jamba")),
    "no experts": ({"num_experts": 0}, ("num_experts=0",)),
    "half an expert": ({"num_experts": 2.5}, ("num_experts=2.5",)),
    "rank in words": ({"mamba_dt_rank": "half"}, ("mamba_dt_rank='half'",)),
    "no layers": ({"num_hidden_layers": 0}, ("num_hidden_layers=0",)),
    "no width": ({"hidden_size": None}, ("hidden_size",)),
    "period of nothing": ({"attn_layer_period": 0}, ("attn_layer_period=0",)),
    "offset before the first layer": ({"expert_layer_offset": -1}, ("expert_layer_offset=-1",)),
    "flag in words": ({"mamba_conv_bias": "yes"}, ("mamba_conv_bias='yes'",)),
    "heads that do not share keys": ({"num_key_value_heads": 3}, ("num_key_value_heads", "3")),
    # tensors of other shapes than the config says
    "another vocabulary": ({"vocab_size": 90}, ("model.embed_tokens.weight", "(90, 20)")),
    "an expert more": (
        {"num_experts": 5},
        ("missing: model.layers.1.feed_forward.experts.4.", "router.weight (4, 20)"),
    ),
    "an expert less": (
        {"num_experts": 3},
        ("unexpected: model.layers.1.feed_forward.experts.3.", "router.weight (4, 20)"),
    ),
    "one expert": ({"num_experts": 1}, ("missing: model.layers.1.feed_forward.down_proj.weight",)),
    "attention elsewhere": (
        {"attn_layer_offset": 2},
        ("missing: model.layers.1.mamba.A_log", "in 32 places"),
    ),
    "experts elsewhere": ({"expert_layer_offset": 0}, ("missing: model.layers.0.feed_forward.",)),
    "no convolution bias": (
        {"mamba_conv_bias": False},
        ("unexpected: model.layers.0.mamba.conv1d.bias",),
    ),
    "projection bias": (
        {"mamba_proj_bias": True},
        ("missing: model.layers.0.mamba.in_proj.bias",),
    ),
    "more states": ({"mamba_d_state": 9}, ("model.layers.0.mamba.A_log (60, 8)", "(60, 9)")),
    "a wider convolution": ({"mamba_d_conv": 4}, ("model.layers.0.mamba.conv1d.weight",)),
}


@pytest.mark.parametrize("case", BAD_SETTINGS)
def test_a_bad_setting_is_named(case: str, broken):
    changes, fragments = BAD_SETTINGS[case]
    message = broken(**changes)
    for fragment in fragments:
        assert fragment in message


@since_5("experts are modules of their own")
def test_a_model_in_memory_that_does_not_match_its_config_is_refused():
    theirs = hf_jamba(ALL_SPECS[SPEC])
    experts = theirs.model.layers[1].feed_forward.experts
    experts.down_proj = nn.Parameter(experts.down_proj[:3].detach().clone())
    with pytest.raises(CheckpointError) as error:
        HookedHybrid.from_hf(theirs)
    assert "model.layers.1.feed_forward.experts.down_proj (3, " in str(error.value)
    with pytest.raises(CheckpointError, match="missing: lm_head.weight; .* base model"):
        HookedHybrid.from_hf(hf(SPEC).model)
