"""RecurrentGemma as Hugging Face publishes it: its config and its table of names."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    LayerConfig,
    MixerConfig,
    NormConfig,
    RGLRUConfig,
    RotaryConfig,
)
from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import ConfigReader, require, require_plain_layers, rope_settings
from weights_conversion.rules import CONV_TAPS, Rule, rule, tied_head

MODEL_TYPE = "recurrent_gemma"
ARCHITECTURE = "RecurrentGemmaForCausalLM"
NO_EFFECT = frozenset({"w_init_variance_scale", "final_w_init_variance_scale", "_block_types"})
IGNORED = (r"model\.normalizer", r".*\.rotary_emb\.inv_freq")

_BLOCK = "model.layers.{i}.temporal_block"
_MLP = "model.layers.{i}.mlp_block"

MODEL = (
    rule("model.embed_tokens.weight", "embed.W_E"),
    rule("model.final_norm.weight", "ln_final.weight"),
)
UNTIED = (rule("lm_head.weight", "unembed.weight"),)
EVERY_LAYER = (
    rule("model.layers.{i}.temporal_pre_norm.weight", "blocks.{i}.ln1.weight"),
    rule("model.layers.{i}.channel_pre_norm.weight", "blocks.{i}.ln2.weight"),
    *(
        rule(f"{_MLP}.{theirs}_proj.{part}", f"blocks.{{i}}.mlp.{theirs}.{part}")
        for theirs in ("gate", "up", "down")
        for part in ("weight", "bias")
    ),
)
ATTENTION = tuple(
    rule(f"{_BLOCK}.{name}_proj.weight", f"blocks.{{i}}.attn.{name}.weight") for name in "qkvo"
)
QKV_BIAS = tuple(
    rule(f"{_BLOCK}.{name}_proj.bias", f"blocks.{{i}}.attn.{name}.bias") for name in "qkv"
)
OUT_BIAS = (rule(f"{_BLOCK}.o_proj.bias", "blocks.{i}.attn.o.bias"),)
RECURRENT = (
    *(
        rule(f"{_BLOCK}.{name}.{part}", f"blocks.{{i}}.mixer.{name}.{part}")
        for name in ("linear_x", "linear_y", "linear_out")
        for part in ("weight", "bias")
    ),
    rule(f"{_BLOCK}.conv_1d.weight", "blocks.{i}.mixer.conv.weight", CONV_TAPS),
    rule(f"{_BLOCK}.conv_1d.bias", "blocks.{i}.mixer.conv.bias"),
    rule(f"{_BLOCK}.rg_lru.recurrent_param", "blocks.{i}.mixer.a_param"),
    rule(f"{_BLOCK}.rg_lru.input_gate_weight", "blocks.{i}.mixer.input_gate.weight"),
    rule(f"{_BLOCK}.rg_lru.input_gate_bias", "blocks.{i}.mixer.input_gate.bias"),
    rule(f"{_BLOCK}.rg_lru.recurrent_gate_weight", "blocks.{i}.mixer.rec_gate.weight"),
    rule(f"{_BLOCK}.rg_lru.recurrent_gate_bias", "blocks.{i}.mixer.rec_gate.bias"),
)


def rules(cfg: HybridConfig, names: Collection[str] = ()) -> list[Rule]:  # noqa: ARG001
    """Return the table for one model, layers filled in."""
    table = [*MODEL, *(() if cfg.tied_embedding else UNTIED)]
    for i, layer in enumerate(cfg.layers):
        mixer = layer.mixer
        parts = [*EVERY_LAYER, *(ATTENTION if isinstance(mixer, AttentionConfig) else RECURRENT)]
        if isinstance(mixer, AttentionConfig):
            parts += [*(QKV_BIAS if mixer.qkv_bias else ()), *(OUT_BIAS if mixer.out_bias else ())]
        table += [r.at(i) for r in parts]
    return table


def ignored(cfg: HybridConfig) -> tuple[str, ...]:
    """Return patterns of tensors that are not needed; a tied head is the embedding again."""
    return (*IGNORED, *tied_head(cfg))


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader = ConfigReader(config, NO_EFFECT)
    d_model, n_heads = reader.integer("hidden_size"), reader.integer("num_attention_heads")
    d_head = reader.integer("head_dim", d_model // n_heads)
    theta, share = rope_settings(reader)
    reader.only("hidden_activation", "gelu_pytorch_tanh")
    reader.only("hidden_act", "gelu_pytorch_tanh", "gelu")  # ignored if the other is set
    reader.only("embeddings_scale_by_sqrt_dim", True)
    n_layers, cycle = reader.integer("num_hidden_layers"), _cycle(reader)
    kinds = [cycle[i % len(cycle)] for i in range(n_layers)]
    width = reader.integer("intermediate_size")
    if width % 2:
        raise CheckpointError(f"config.json: intermediate_size={width} must be even (it is halved)")
    mlp = GatedMLPConfig(d_mlp=width // 2, act="gelu_tanh", bias=True)
    of_attention: dict[str, Any] = {
        "n_heads": n_heads,
        "n_kv_heads": reader.integer("num_key_value_heads", n_heads),
        "d_head": d_head,
        "n_keys": reader.integer("attention_window_size", 2048),
    }
    qkv_bias = reader.flag("attention_bias", False)
    of_recurrence = {
        "d_rnn": reader.integer("lru_width", d_model),
        "n_gate_blocks": n_heads,
        "d_conv": reader.integer("conv1d_width", 4),
    }
    mixers: dict[str, MixerConfig] = {}  # settings of an absent kind have no effect
    if "attention" in kinds:
        rotary = RotaryConfig(d_rotary=int(d_head * share), theta=theta)
        mixers["attention"] = AttentionConfig(
            **of_attention, rotary=rotary, qkv_bias=qkv_bias, out_bias=True
        )
    if "recurrent" in kinds:
        mixers["recurrent"] = RGLRUConfig(**of_recurrence)
    return HybridConfig(
        d_model=d_model,
        d_vocab=reader.integer("vocab_size"),
        layers=tuple(LayerConfig(mixers[kind], mlp) for kind in kinds),
        norm=NormConfig(eps=reader.number("rms_norm_eps", 1e-6), style="one_plus_weight"),
        scale_embedding=True,
        tied_embedding=reader.flag("tie_word_embeddings", True),
        logits_soft_cap=reader.number("logits_soft_cap", 30.0),
        **reader.special_tokens(),
        model_name=str(config.get("_name_or_path") or MODEL_TYPE),
        **reader.own_settings(),
        extra=reader.extra(),
    )


def _cycle(reader: ConfigReader) -> list[str]:
    """Return the kinds of layers, which repeat."""
    cycle = reader.get("block_types", ["recurrent", "recurrent", "attention"])
    known = ("recurrent", "attention")
    if not isinstance(cycle, list) or not cycle or any(kind not in known for kind in cycle):
        raise CheckpointError(
            f"config.json: block_types={str(cycle)[:80]!r}; 'recurrent' and 'attention' are known"
        )
    return cycle


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    require_plain_layers(cfg)
    attention = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, AttentionConfig)}
    recurrent = {layer.mixer for layer in cfg.layers if isinstance(layer.mixer, RGLRUConfig)}
    mlps = {layer.mlp for layer in cfg.layers}
    require(
        (
            all(isinstance(x.mixer, AttentionConfig | RGLRUConfig) for x in cfg.layers),
            "a layer's mixer is neither attention nor an RG-LRU",
        ),
        (all(isinstance(mlp, GatedMLPConfig) for mlp in mlps), "an MLP is a mixture of experts"),
        (len(attention) <= 1, "attention layers differ"),
        (len(recurrent) <= 1, "recurrent layers differ"),
        (len(mlps) == 1, "MLPs differ"),
    )
    mlp: Any = mlps.pop()
    rec = next(iter(recurrent), None)
    att = next(iter(attention), None) or _no_attention(cfg, rec)
    _require_expressible(cfg, att, rec, mlp)
    assert att.rotary is not None
    share = _rotary_share(att.rotary.d_rotary, att.d_head)
    eos = cfg.eos_token_id
    return {
        **cfg.extra,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "attention_bias": att.qkv_bias,
        "attention_window_size": att.n_keys,
        "block_types": _shortest_cycle(cfg),
        "bos_token_id": cfg.bos_token_id,
        "conv1d_width": rec.d_conv if rec else 4,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "head_dim": att.d_head,
        "hidden_activation": "gelu_pytorch_tanh",
        "hidden_size": cfg.d_model,
        "intermediate_size": 2 * mlp.d_mlp,
        "logits_soft_cap": cfg.logits_soft_cap,
        "lru_width": rec.d_rnn if rec else cfg.d_model,
        "num_attention_heads": att.n_heads,
        "num_hidden_layers": cfg.n_layers,
        "num_key_value_heads": att.n_kv_heads,
        "pad_token_id": cfg.pad_token_id,
        "partial_rotary_factor": share,
        "rms_norm_eps": cfg.norm.eps,
        "rope_parameters": {
            "partial_rotary_factor": share,
            "rope_theta": att.rotary.theta,
            "rope_type": "default",
        },
        "rope_theta": att.rotary.theta,
        "tie_word_embeddings": cfg.tied_embedding,
        "vocab_size": cfg.d_vocab,
    }


def _rotary_share(d_rotary: int, d_head: int) -> float:
    """Return the share that gives `d_rotary` when multiplied and truncated."""
    share = d_rotary / d_head
    return share if int(d_head * share) == d_rotary else math.nextafter(share, 1)


def _no_attention(cfg: HybridConfig, rec: RGLRUConfig | None) -> AttentionConfig:
    """Return the attention settings in the config of a model without attention."""
    n_heads = rec.n_gate_blocks if rec else 1
    d_head = max(cfg.d_model // n_heads, 4)
    rotary = RotaryConfig(d_rotary=d_head // 4 * 2)
    return AttentionConfig(n_heads, 1, d_head, n_keys=2048, rotary=rotary, out_bias=True)


def _require_expressible(
    cfg: HybridConfig, att: AttentionConfig, rec: RGLRUConfig | None, mlp: Any
) -> None:
    n_blocks = att.n_heads if rec is None else rec.n_gate_blocks
    require(
        (att.rotary is not None, "attention has no rotary positions"),
        (att.n_keys is not None, "attention has no window (n_keys=None)"),
        (att.out_bias, "attention's output has no bias"),
        (n_blocks == att.n_heads, f"n_gate_blocks={n_blocks} is not n_heads={att.n_heads}"),
        ((mlp.act, mlp.bias) == ("gelu_tanh", True), "MLPs are not GELU with biases"),
        (cfg.norm.style == "one_plus_weight", "norms multiply by weight, not by 1 + weight"),
        (cfg.scale_embedding, "embeddings are not scaled"),
        (cfg.logits_soft_cap is not None, "logits have no soft cap (logits_soft_cap=None)"),
    )


def _shortest_cycle(cfg: HybridConfig) -> list[str]:
    kinds = ["attention" if i in cfg.attention_layers else "recurrent" for i in range(cfg.n_layers)]
    for n in range(1, len(kinds) + 1):
        if all(kind == kinds[i % n] for i, kind in enumerate(kinds)):
            return kinds[:n]
    return kinds
