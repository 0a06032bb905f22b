"""Bamba: Mamba-2, some layers of attention with half of each head rotated, and dense MLPs."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    LayerConfig,
    Mamba2Config,
    NormConfig,
    RotaryConfig,
)
from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import ConfigReader, require, require_plain_layers, rope_settings
from weights_conversion.mamba2 import groups, mixer_rules, time_step_limit, written_limit
from weights_conversion.rules import Rule, rule, tied_head

MODEL_TYPE = "bamba"
ARCHITECTURE = "BambaForCausalLM"
NO_EFFECT = frozenset("mamba_chunk_size num_logits_to_keep z_loss_coefficient".split())
ROTATED_SHARE = 0.5
"""transformers rotates half of each head whatever the config says."""

_LAYER = "model.layers.{i}"

MODEL = (
    rule("model.embed_tokens.weight", "embed.W_E"),
    rule("model.final_layernorm.weight", "ln_final.weight"),
)
UNTIED = (rule("lm_head.weight", "unembed.weight"),)
ignored = tied_head
EVERY_LAYER = (
    rule(f"{_LAYER}.input_layernorm.weight", "blocks.{i}.ln1.weight"),
    rule(f"{_LAYER}.pre_ff_layernorm.weight", "blocks.{i}.ln2.weight"),
    *(
        rule(f"{_LAYER}.feed_forward.{name}_proj.weight", f"blocks.{{i}}.mlp.{name}.weight")
        for name in ("gate", "up", "down")
    ),
)
ATTENTION = tuple(
    rule(f"{_LAYER}.self_attn.{name}_proj.weight", f"blocks.{{i}}.attn.{name}.weight")
    for name in "qkvo"
)


def rules(cfg: HybridConfig, names: Collection[str] = ()) -> list[Rule]:  # noqa: ARG001
    """Return the table for one model, layers filled in."""
    table = [*MODEL, *(() if cfg.tied_embedding else UNTIED)]
    for i, layer in enumerate(cfg.layers):
        if isinstance(layer.mixer, Mamba2Config):
            mixer = mixer_rules(layer.mixer, f"{_LAYER}.mamba")
        else:
            mixer = list(ATTENTION)
        table += [r.at(i) for r in (*EVERY_LAYER, *mixer)]
    return table


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader = ConfigReader(config, NO_EFFECT)
    d_model, n_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    for key, value in (("hidden_act", "silu"), ("attention_bias", False), ("mlp_bias", False)):
        reader.only(key, value)
    theta, share = rope_settings(reader)
    if share != ROTATED_SHARE:
        raise CheckpointError(f"config.json: partial_rotary_factor={share} is not {ROTATED_SHARE}")
    eps, d_head = reader.number("rms_norm_eps", 1e-5), d_model // n_heads
    if d_head < 4:
        raise CheckpointError(
            f"config.json: heads of hidden_size / num_attention_heads = {d_head} channels are too "
            "narrow to rotate half of them"
        )
    reader.only("attn_rotary_emb", int(d_head * share))  # in the first published files
    attention = AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=reader.integer("num_key_value_heads", n_heads),
        d_head=d_head,
        rotary=RotaryConfig(int(d_head * share), theta),
    )
    mamba = _mamba(reader, d_model, eps)
    mlp = GatedMLPConfig(reader.integer("intermediate_size"), act="silu", bias=False)
    n_layers = reader.integer("num_hidden_layers")
    places = _attention_places(reader, n_layers)
    longest = reader.get("max_position_embeddings")
    n_ctx = None if longest is None else reader.integer("max_position_embeddings")
    return HybridConfig(
        d_model=d_model,
        d_vocab=reader.integer("vocab_size"),
        layers=tuple(
            LayerConfig(attention if i in places else mamba, mlp) for i in range(n_layers)
        ),
        norm=NormConfig(eps=eps, style="weight"),
        tied_embedding=reader.flag("tie_word_embeddings", False),
        **reader.special_tokens(),
        **{"n_ctx": n_ctx, **reader.own_settings()},
        model_name=str(config.get("_name_or_path") or MODEL_TYPE),
        extra=reader.extra(),
    )


def _mamba(reader: ConfigReader, d_model: int, eps: float) -> Mamba2Config:
    n_heads, width = reader.integer("mamba_n_heads"), reader.integer("mamba_expand", 2) * d_model
    if width % n_heads:
        raise CheckpointError(
            f"config.json: mamba_expand * hidden_size = {width} is not a multiple of "
            f"mamba_n_heads={n_heads}"
        )
    d_head = reader.get("mamba_d_head", "auto")
    d_head = width // n_heads if d_head == "auto" else reader.integer("mamba_d_head")
    if d_head * n_heads != width:
        raise CheckpointError(
            f"config.json: mamba_n_heads * mamba_d_head = {d_head * n_heads} is not mamba_expand * "
            f"hidden_size = {width}"
        )
    dt_min, dt_max = time_step_limit(reader)
    has_bias = reader.flag("mamba_proj_bias", False)
    return Mamba2Config(
        n_heads=n_heads,
        d_head=d_head,
        d_state=reader.integer("mamba_d_state", 256),
        n_groups=groups(reader, "mamba_n_groups", 1, "mamba_n_heads", n_heads),
        d_conv=reader.integer("mamba_d_conv", 4),
        conv_bias=reader.flag("mamba_conv_bias", True),
        in_bias=has_bias,
        out_bias=has_bias,
        dt_min=dt_min,
        dt_max=dt_max,
        norm_eps=eps,
    )


def _attention_places(reader: ConfigReader, n_layers: int) -> frozenset[int]:
    """Return the layers of attention.

    Raises:
        CheckpointError: one is no layer.
    """
    places = reader.get("attn_layer_indices") or []
    if not isinstance(places, list) or not all(
        isinstance(i, int) and not isinstance(i, bool) and 0 <= i < n_layers for i in places
    ):
        raise CheckpointError(
            f"config.json: attn_layer_indices={places!r:.80} are not layers from 0 to "
            f"{n_layers - 1}"
        )
    return frozenset(places)


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    require_plain_layers(cfg)
    attention = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)}
    mamba = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, Mamba2Config)}
    mlps = {layer.mlp for layer in cfg.layers}
    require(
        (
            all(isinstance(x.mixer, AttentionConfig | Mamba2Config) for x in cfg.layers),
            "a layer's mixer is neither attention nor Mamba-2",
        ),
        (len(mamba) == 1, "there is not one kind of Mamba-2 layer"),
        (len(attention) <= 1, "attention layers differ"),
        (len(mlps) == 1, "MLPs differ"),
    )
    (ssm,), (mlp,) = mamba, mlps
    assert isinstance(ssm, Mamba2Config)
    att = next(iter(attention), None) or _attention_of(cfg)
    assert isinstance(att, AttentionConfig)
    rotary = att.rotary
    require(
        (
            isinstance(mlp, GatedMLPConfig) and (mlp.act, mlp.bias) == ("silu", False),
            "MLPs are not gated SiLU ones without biases",
        ),
        (
            rotary is not None and rotary.d_rotary == int(att.d_head * ROTATED_SHARE),
            "attention does not rotate half of each head",
        ),
        (att.n_heads * att.d_head == cfg.d_model, "heads are not as wide as the stream together"),
        (att.n_keys is None, "attention has a window (n_keys)"),
        (not att.qkv_bias and not att.out_bias, "attention has biases"),
        (ssm.norm == "gate_first", f"the norm of the output is {ssm.norm!r}"),
        (ssm.in_bias == ssm.out_bias, "one projection has a bias, the other has none"),
        (ssm.norm_eps == cfg.norm.eps, "the mixers' norms have another eps than the others"),
        (ssm.d_inner % cfg.d_model == 0, f"d_inner={ssm.d_inner} is not a multiple of d_model"),
        (ssm.in_scale == 1 and set(ssm.section_scales) == {1.0}, "the projection is scaled"),
        (cfg.norm.style == "weight", "norms multiply by 1 + weight, not by weight"),
        (not cfg.scale_embedding, "embeddings are scaled"),
        (cfg.logits_soft_cap is None, "logits have a soft cap"),
    )
    assert rotary is not None and isinstance(mlp, GatedMLPConfig)
    eos = cfg.eos_token_id
    return {
        **cfg.extra,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": False,
        "attn_layer_indices": list(cfg.attention_layers),
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": mlp.d_mlp,
        "mamba_conv_bias": ssm.conv_bias,
        "mamba_d_conv": ssm.d_conv,
        "mamba_d_head": ssm.d_head,
        "mamba_d_state": ssm.d_state,
        "mamba_expand": ssm.d_inner // cfg.d_model,
        "mamba_n_groups": ssm.n_groups,
        "mamba_n_heads": ssm.n_heads,
        "mamba_proj_bias": ssm.in_bias,
        **({} if cfg.n_ctx is None else {"max_position_embeddings": cfg.n_ctx}),
        "mlp_bias": False,
        "num_attention_heads": att.n_heads,
        "num_hidden_layers": cfg.n_layers,
        "num_key_value_heads": att.n_kv_heads,
        "pad_token_id": cfg.pad_token_id,
        "rms_norm_eps": cfg.norm.eps,
        "rope_parameters": {
            "partial_rotary_factor": ROTATED_SHARE,
            "rope_theta": rotary.theta,
            "rope_type": "default",
        },
        "rope_theta": rotary.theta,
        "tie_word_embeddings": cfg.tied_embedding,
        "time_step_limit": written_limit(ssm),
        "vocab_size": cfg.d_vocab,
    }


def _attention_of(cfg: HybridConfig) -> AttentionConfig:
    """Return what to write where there is no attention: one head as wide as the stream."""
    return AttentionConfig(1, 1, cfg.d_model, rotary=RotaryConfig(cfg.d_model // 2))
