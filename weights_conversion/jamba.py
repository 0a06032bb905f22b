"""Jamba as Hugging Face publishes it: its config and its table of names.

Published files have separate experts; transformers 5 fuses them in memory. Both are read, and the
published layout is written.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    LayerConfig,
    MambaConfig,
    MLPConfig,
    MoEConfig,
    NormConfig,
)
from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import ConfigReader, require, require_plain_layers
from weights_conversion.periods import period_of, periodic
from weights_conversion.rules import CONV_TAPS, SPLIT_ROWS, STACK, Rule, rule, tied_head

MODEL_TYPE = "jamba"
ARCHITECTURE = "JambaForCausalLM"
NO_EFFECT = frozenset(
    """
    auto_map calc_logits_for_entire_prompt n_ctx num_logits_to_keep output_router_logits
    router_aux_loss_coef use_associative_scan use_mamba_kernels use_mambapy
    """.split()
)

_LAYER = "model.layers.{i}"
_MLP = f"{_LAYER}.feed_forward"

MODEL = (
    rule("model.embed_tokens.weight", "embed.W_E"),
    rule("model.final_layernorm.weight", "ln_final.weight"),
)
UNTIED = (rule("lm_head.weight", "unembed.weight"),)
ignored = tied_head
EVERY_LAYER = (
    rule(f"{_LAYER}.input_layernorm.weight", "blocks.{i}.ln1.weight"),
    rule(f"{_LAYER}.pre_ff_layernorm.weight", "blocks.{i}.ln2.weight"),
)
ATTENTION = tuple(
    rule(f"{_LAYER}.self_attn.{name}_proj.weight", f"blocks.{{i}}.attn.{name}.weight")
    for name in "qkvo"
)
MAMBA = (
    *(
        rule(f"{_LAYER}.mamba.{name}", f"blocks.{{i}}.mixer.{name}")
        for name in ("A_log", "D", "dt_proj.weight", "dt_proj.bias")
    ),
    *(
        rule(f"{_LAYER}.mamba.{name}.weight", f"blocks.{{i}}.mixer.{name}.weight")
        for name in ("in_proj", "x_proj", "out_proj")
    ),
    rule(f"{_LAYER}.mamba.conv1d.weight", "blocks.{i}.mixer.conv.weight", CONV_TAPS),
    rule(f"{_LAYER}.mamba.dt_layernorm.weight", "blocks.{i}.mixer.dt_norm.weight"),
    rule(f"{_LAYER}.mamba.b_layernorm.weight", "blocks.{i}.mixer.B_norm.weight"),
    rule(f"{_LAYER}.mamba.c_layernorm.weight", "blocks.{i}.mixer.C_norm.weight"),
)
CONV_BIAS = (rule(f"{_LAYER}.mamba.conv1d.bias", "blocks.{i}.mixer.conv.bias"),)
PROJ_BIAS = tuple(
    rule(f"{_LAYER}.mamba.{name}.bias", f"blocks.{{i}}.mixer.{name}.bias")
    for name in ("in_proj", "out_proj")
)
DENSE = tuple(
    rule(f"{_MLP}.{name}_proj.weight", f"blocks.{{i}}.mlp.{name}.weight")
    for name in ("gate", "up", "down")
)
ROUTER = (rule(f"{_MLP}.router.weight", "blocks.{i}.mlp.router.weight"),)
FUSED_EXPERTS = (
    rule(f"{_MLP}.experts.gate_up_proj", "blocks.{i}.mlp.gate blocks.{i}.mlp.up", SPLIT_ROWS),
    rule(f"{_MLP}.experts.down_proj", "blocks.{i}.mlp.down"),
)


def separate_experts(n_experts: int) -> tuple[Rule, ...]:
    """Return the rules that stack separately stored experts."""
    return tuple(
        rule(
            " ".join(f"{_MLP}.experts.{e}.{name}_proj.weight" for e in range(n_experts)),
            f"blocks.{{i}}.mlp.{name}",
            STACK,
        )
        for name in ("gate", "up", "down")
    )


def rules(cfg: HybridConfig, names: Collection[str] = ()) -> list[Rule]:
    """Return the table for one model, layers filled in.

    Args:
        cfg: the model.
        names: of the source, which determine whether its experts are fused.

    Raises:
        CheckpointError: more experts than tensors.
    """
    is_fused = any(name.endswith(".experts.gate_up_proj") for name in names)
    n_experts = sum(x.mlp.n_experts for x in cfg.layers if isinstance(x.mlp, MoEConfig))
    if names and not is_fused and n_experts > len(names):
        raise CheckpointError(
            f"config.json: num_experts gives {n_experts} in all, but there are {len(names)} tensors"
        )
    table = [*MODEL, *(() if cfg.tied_embedding else UNTIED)]
    for i, layer in enumerate(cfg.layers):
        parts = [*EVERY_LAYER, *_mixer_rules(layer.mixer)]
        if isinstance(layer.mlp, MoEConfig):
            experts = FUSED_EXPERTS if is_fused else separate_experts(layer.mlp.n_experts)
            parts += [*ROUTER, *experts]
        else:
            parts += DENSE
        table += [r.at(i) for r in parts]
    return table


def _mixer_rules(mixer: object) -> tuple[Rule, ...]:
    if not isinstance(mixer, MambaConfig):
        return ATTENTION
    return (
        *MAMBA,
        *(CONV_BIAS if mixer.conv_bias else ()),
        *(PROJ_BIAS if mixer.proj_bias else ()),
    )


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader = ConfigReader(config, NO_EFFECT)
    d_model, n_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    reader.only("hidden_act", "silu")
    reader.only("sliding_window", None)
    reader.only("mamba_inner_layernorms", True)
    reader.only("rope_scaling", None)
    reader.only("rope_parameters", None)
    eps = reader.number("rms_norm_eps", 1e-6)
    attention = AttentionConfig(
        n_heads=n_heads,
        n_kv_heads=reader.integer("num_key_value_heads", n_heads),
        d_head=reader.integer("head_dim", d_model // n_heads),
    )
    rank = reader.get("mamba_dt_rank", "auto")
    mamba = MambaConfig(
        d_inner=reader.integer("mamba_expand", 2) * d_model,
        d_state=reader.integer("mamba_d_state", 16),
        dt_rank=-(-d_model // 16) if rank == "auto" else reader.integer("mamba_dt_rank"),
        d_conv=reader.integer("mamba_d_conv", 4),
        conv_bias=reader.flag("mamba_conv_bias", True),
        proj_bias=reader.flag("mamba_proj_bias", False),
        norm_eps=eps,
    )
    dense, experts = _mlps(reader)
    longest = reader.get("max_position_embeddings")
    own = {
        "n_ctx": None if longest is None else reader.integer("max_position_embeddings"),
        **reader.own_settings(),
    }
    is_attention = periodic(reader, "attn_layer_period", "attn_layer_offset", 8, 4)
    has_experts = periodic(reader, "expert_layer_period", "expert_layer_offset", 2, 1)
    return HybridConfig(
        d_model=d_model,
        d_vocab=reader.integer("vocab_size"),
        layers=tuple(
            LayerConfig(
                attention if is_attention(i) else mamba, experts if has_experts(i) else dense
            )
            for i in range(reader.integer("num_hidden_layers"))
        ),
        norm=NormConfig(eps=eps, style="weight"),
        tied_embedding=reader.flag("tie_word_embeddings", False),
        **reader.special_tokens(),
        **own,
        model_name=str(config.get("_name_or_path") or MODEL_TYPE),
        extra=reader.extra(),
    )


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    require_plain_layers(cfg)
    attention = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)}
    mamba = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, MambaConfig)}
    experts = {layer.mlp for layer in cfg.layers if isinstance(layer.mlp, MoEConfig)}
    dense = {layer.mlp for layer in cfg.layers if isinstance(layer.mlp, GatedMLPConfig)}
    widths = {mlp.d_mlp for mlp in experts} | {mlp.d_mlp for mlp in dense}
    places = _places(cfg)
    require(
        (
            all(isinstance(layer.mixer, AttentionConfig | MambaConfig) for layer in cfg.layers),
            "a layer's mixer is neither attention nor Mamba",
        ),
        (len(mamba) <= 1, "Mamba layers differ"),
        (len(attention) <= 1, "attention layers differ"),
        (len(experts) <= 1, "mixtures of experts differ"),
        (len(widths) == 1, "MLPs and experts differ in width"),
        (places is not None, "attention or experts do not come at equal distances"),
    )
    assert places is not None
    ssm = next(iter(mamba), None) or MambaConfig(
        2 * cfg.d_model, 16, -(-cfg.d_model // 16), norm_eps=cfg.norm.eps
    )
    att = next(iter(attention), None) or AttentionConfig(1, 1, cfg.d_model)
    _require_expressible(cfg, att, ssm, experts, dense)
    moe = next(iter(experts), None) or MoEConfig(1, 1, next(iter(widths)))
    eos = cfg.eos_token_id
    return {
        **cfg.extra,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        **places,
        "bos_token_id": cfg.bos_token_id,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        **({} if att.n_heads * att.d_head == cfg.d_model else {"head_dim": att.d_head}),
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "intermediate_size": widths.pop(),
        "mamba_conv_bias": ssm.conv_bias,
        "mamba_d_conv": ssm.d_conv,
        "mamba_d_state": ssm.d_state,
        "mamba_dt_rank": ssm.dt_rank,
        "mamba_expand": ssm.d_inner // cfg.d_model,
        "mamba_proj_bias": ssm.proj_bias,
        **({} if cfg.n_ctx is None else {"max_position_embeddings": cfg.n_ctx}),
        "num_attention_heads": att.n_heads,
        "num_experts": moe.n_experts,
        "num_experts_per_tok": moe.n_chosen,
        "num_hidden_layers": cfg.n_layers,
        "num_key_value_heads": att.n_kv_heads,
        "pad_token_id": cfg.pad_token_id,
        "rms_norm_eps": cfg.norm.eps,
        "tie_word_embeddings": cfg.tied_embedding,
        "vocab_size": cfg.d_vocab,
    }


def _mlps(reader: ConfigReader) -> tuple[MLPConfig, MLPConfig]:
    """Return the dense MLP, and the MLP of layers with experts; one expert is dense."""
    width = reader.integer("intermediate_size")
    n_experts = reader.integer("num_experts", 16)
    n_chosen = reader.integer("num_experts_per_tok", 2)
    dense = GatedMLPConfig(d_mlp=width, act="silu", bias=False)
    if n_experts == 1:
        return dense, dense
    if n_chosen > n_experts:
        raise CheckpointError(
            f"config.json: num_experts_per_tok={n_chosen} is more than num_experts={n_experts}"
        )
    return dense, MoEConfig(n_experts, n_chosen, width)


def _places(cfg: HybridConfig) -> dict[str, int] | None:
    """Return periods and offsets of attention and of experts, or None if not periodic."""
    attention = period_of(list(cfg.attention_layers), cfg.n_layers)
    with_experts = [i for i, layer in enumerate(cfg.layers) if isinstance(layer.mlp, MoEConfig)]
    experts = period_of(with_experts, cfg.n_layers)
    if attention is None or experts is None:
        return None
    names = [f"{kind}_layer_{what}" for kind in ("attn", "expert") for what in ("period", "offset")]
    return dict(zip(names, (*attention, *experts), strict=True))


def _require_expressible(
    cfg: HybridConfig, att: AttentionConfig, ssm: MambaConfig, experts: set[Any], dense: set[Any]
) -> None:
    require(
        (att.rotary is None, "attention has rotary positions"),
        (att.n_keys is None, "attention has a window (n_keys)"),
        (not att.qkv_bias and not att.out_bias, "attention has biases"),
        (ssm.d_inner % cfg.d_model == 0, f"d_inner={ssm.d_inner} is not a multiple of d_model"),
        (ssm.norm_eps == cfg.norm.eps, "Mamba's norms have another eps than the others"),
        (
            all(moe.n_experts > 1 for moe in experts),
            "a mixture has one expert, but num_experts=1 means a dense MLP: make it a "
            "GatedMLPConfig",
        ),
        (all(moe.act == "silu" for moe in experts), "experts are not SiLU"),
        (
            all((mlp.act, mlp.bias) == ("silu", False) for mlp in dense),
            "MLPs are not SiLU without biases",
        ),
        (cfg.norm.style == "weight", "norms multiply by 1 + weight, not by weight"),
        (not cfg.scale_embedding, "embeddings are scaled"),
        (cfg.logits_soft_cap is None, "logits have a soft cap"),
    )
