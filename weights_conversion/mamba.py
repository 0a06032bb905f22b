"""Mamba as transformers writes it: its config and its table of names; Falcon-Mamba shares them.

Layers hold a mixer and no MLP.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Literal

from hooked_hybrid.config import HybridConfig, LayerConfig, MambaConfig, NormConfig
from weights_conversion.hf_config import ConfigReader, require
from weights_conversion.rules import CONV_TAPS, Rule, rule, tied_head

MODEL_TYPE = "mamba"
ARCHITECTURE = "MambaForCausalLM"
NO_EFFECT = frozenset(
    """
    fused_add_norm pad_vocab_size_multiple rescale_prenorm_residual residual_in_fp32 time_step_floor
    time_step_init_scheme time_step_max time_step_min time_step_scale use_associative_scan
    use_mambapy use_falcon_mambapy
    """.split()
)
DEFAULT_INNER_EPS = 1e-6

_LAYER = "backbone.layers.{i}"
_MIXER = f"{_LAYER}.mixer"

MODEL = (
    rule("backbone.embeddings.weight", "embed.W_E"),
    rule("backbone.norm_f.weight", "ln_final.weight"),
)
UNTIED = (rule("lm_head.weight", "unembed.weight"),)
ignored = tied_head
EVERY_LAYER = (
    rule(f"{_LAYER}.norm.weight", "blocks.{i}.ln1.weight"),
    *(
        rule(f"{_MIXER}.{name}", f"blocks.{{i}}.mixer.{name}")
        for name in ("A_log", "D", "dt_proj.weight", "dt_proj.bias")
    ),
    *(
        rule(f"{_MIXER}.{name}.weight", f"blocks.{{i}}.mixer.{name}.weight")
        for name in ("in_proj", "x_proj", "out_proj")
    ),
    rule(f"{_MIXER}.conv1d.weight", "blocks.{i}.mixer.conv.weight", CONV_TAPS),
)
CONV_BIAS = (rule(f"{_MIXER}.conv1d.bias", "blocks.{i}.mixer.conv.bias"),)
PROJ_BIAS = tuple(
    rule(f"{_MIXER}.{name}.bias", f"blocks.{{i}}.mixer.{name}.bias")
    for name in ("in_proj", "out_proj")
)


def rules(cfg: HybridConfig, names: Collection[str] = ()) -> list[Rule]:  # noqa: ARG001
    """Return the table for one model, layers filled in."""
    table = [*MODEL, *(() if cfg.tied_embedding else UNTIED)]
    for i, layer in enumerate(cfg.layers):
        mixer = layer.mixer
        assert isinstance(mixer, MambaConfig)
        own = (*(CONV_BIAS if mixer.conv_bias else ()), *(PROJ_BIAS if mixer.proj_bias else ()))
        table += [r.at(i) for r in (*EVERY_LAYER, *own)]
    return table


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    return read_config(ConfigReader(config, NO_EFFECT), None, DEFAULT_INNER_EPS, MODEL_TYPE)


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    return {**write_config(cfg, None), "architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}


def read_config(
    reader: ConfigReader,
    inner_norm: Literal["plain"] | None,
    inner_eps: float,
    model_type: str,
) -> HybridConfig:
    """Return our config of either family.

    Args:
        reader: of its `config.json`.
        inner_norm: of dt, B and C.
        inner_eps: of these norms.
        model_type: of the family.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader.only("hidden_act", "silu")
    d_model = reader.integer("hidden_size", 768)
    # The published file of falcon-mamba-7b has an expand of 16, which transformers does not read
    # where there is an intermediate_size.
    d_inner = reader.integer("intermediate_size", reader.integer("expand", 2) * d_model)
    n_layers = reader.integer("num_hidden_layers")
    again = {"d_inner": d_inner, "d_model": d_model, "n_layer": n_layers}
    for key, value in (*again.items(), ("rms_norm", True), ("ssm_cfg", {})):
        reader.only(key, value)  # in files that were converted from those of mamba-ssm
    rank = reader.get("time_step_rank", "auto")
    mixer = MambaConfig(
        d_inner=d_inner,
        d_state=reader.integer("state_size", 16),
        dt_rank=-(-d_model // 16) if rank == "auto" else reader.integer("time_step_rank"),
        d_conv=reader.integer("conv_kernel", 4),
        conv_bias=reader.flag("use_conv_bias", True),
        proj_bias=reader.flag("use_bias", False),
        norm_eps=inner_eps,
        inner_norm=inner_norm,
    )
    return HybridConfig(
        d_model=d_model,
        d_vocab=reader.integer("vocab_size", 50280),
        layers=(LayerConfig(mixer, None),) * n_layers,
        norm=NormConfig(eps=reader.number("layer_norm_epsilon", 1e-5), style="weight"),
        tied_embedding=reader.flag("tie_word_embeddings", True),
        **reader.special_tokens(),
        **{"n_ctx": None, **reader.own_settings()},
        model_name=str(reader.config.get("_name_or_path") or model_type),
        extra=reader.extra(),
    )


def write_config(cfg: HybridConfig, inner_norm: Literal["plain"] | None) -> dict[str, Any]:
    """Return the settings that both families have.

    Raises:
        CheckpointError: they cannot express the model; gives the reason.
    """
    mixers = {layer.mixer for layer in cfg.layers}
    require(
        (
            all(isinstance(layer.mixer, MambaConfig) for layer in cfg.layers),
            "a layer's mixer is not Mamba",
        ),
        (all(layer.mlp is None for layer in cfg.layers), "layers have MLPs"),
        (len(mixers) == 1, "layers differ"),
    )
    (ssm,) = mixers
    assert isinstance(ssm, MambaConfig)
    require(
        (ssm.inner_norm == inner_norm, f"the norms of dt, B and C are {ssm.inner_norm!r}"),
        (
            inner_norm is not None or ssm.norm_eps == DEFAULT_INNER_EPS,
            "norm_eps is set, of norms that are not there",
        ),
        (ssm.d_inner % cfg.d_model == 0, f"d_inner={ssm.d_inner} is not a multiple of d_model"),
        (cfg.norm.style == "weight", "norms multiply by 1 + weight, not by weight"),
        (not cfg.scale_embedding, "embeddings are scaled"),
        (cfg.logits_soft_cap is None, "logits have a soft cap"),
    )
    eos = cfg.eos_token_id
    return {
        **cfg.extra,
        "bos_token_id": cfg.bos_token_id,
        "conv_kernel": ssm.d_conv,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "expand": ssm.d_inner // cfg.d_model,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": ssm.d_inner,
        "layer_norm_epsilon": cfg.norm.eps,
        "num_hidden_layers": cfg.n_layers,
        "pad_token_id": cfg.pad_token_id,
        "state_size": ssm.d_state,
        "tie_word_embeddings": cfg.tied_embedding,
        "time_step_rank": ssm.dt_rank,
        "use_bias": ssm.proj_bias,
        "use_conv_bias": ssm.conv_bias,
        "vocab_size": cfg.d_vocab,
    }
