"""Mamba-2 as transformers writes it: its config and its table of names.

Layers hold a mixer and no MLP.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from hooked_hybrid.config import HybridConfig, LayerConfig, Mamba2Config, NormConfig
from weights_conversion.errors import CheckpointError
from weights_conversion.hf_config import ConfigReader, require
from weights_conversion.rules import CONV_TAPS, Rule, rule, tied_head

MODEL_TYPE = "mamba2"
ARCHITECTURE = "Mamba2ForCausalLM"
NO_EFFECT = frozenset(
    """
    chunk_size expand intermediate_size norm_before_gate rescale_prenorm_residual residual_in_fp32
    time_step_floor time_step_init_scheme time_step_max time_step_min time_step_rank time_step_scale
    use_mamba_kernels
    """.split()
)

_LAYER = "backbone.layers.{i}"

MODEL = (
    rule("backbone.embeddings.weight", "embed.W_E"),
    rule("backbone.norm_f.weight", "ln_final.weight"),
)
UNTIED = (rule("lm_head.weight", "unembed.weight"),)
ignored = tied_head


def mixer_rules(cfg: Mamba2Config, source: str, target: str = "blocks.{i}.mixer") -> list[Rule]:
    """Return the names of a Mamba-2 mixer, which are the same in all families.

    Args:
        cfg: of the mixer.
        source: the mixer's path in the checkpoint, with `{i}` for the layer.
        target: its path here.
    """
    same = ["A_log", "D", "dt_bias", "in_proj.weight", "out_proj.weight"]
    same += ["norm.weight"] if cfg.norm else []
    same += ["in_proj.bias"] if cfg.in_bias else []
    same += ["out_proj.bias"] if cfg.out_bias else []
    table = [rule(f"{source}.{name}", f"{target}.{name}") for name in same]
    table.append(rule(f"{source}.conv1d.weight", f"{target}.conv.weight", CONV_TAPS))
    if cfg.conv_bias:
        table.append(rule(f"{source}.conv1d.bias", f"{target}.conv.bias"))
    return table


def rules(cfg: HybridConfig, names: Collection[str] = ()) -> list[Rule]:  # noqa: ARG001
    """Return the table for one model, layers filled in."""
    table = [*MODEL, *(() if cfg.tied_embedding else UNTIED)]
    for i, layer in enumerate(cfg.layers):
        assert isinstance(layer.mixer, Mamba2Config)
        norm = rule(f"{_LAYER}.norm.weight", "blocks.{i}.ln1.weight")
        table += [r.at(i) for r in (norm, *mixer_rules(layer.mixer, f"{_LAYER}.mixer"))]
    return table


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader = ConfigReader(config, NO_EFFECT)
    reader.only("hidden_act", "silu")
    reader.only("rms_norm", True)
    d_model = reader.integer("hidden_size", 4096)
    eps = reader.number("layer_norm_epsilon", 1e-5)
    use_bias = reader.flag("use_bias", False)
    dt_min, dt_max = time_step_limit(reader)
    n_groups = groups(
        reader, "n_groups", 8, "num_heads", n_heads := reader.integer("num_heads", 128)
    )
    mixer = Mamba2Config(
        n_heads=n_heads,
        d_head=reader.integer("head_dim", 64),
        d_state=reader.integer("state_size", 128),
        n_groups=n_groups,
        d_conv=reader.integer("conv_kernel", 4),
        conv_bias=reader.flag("use_conv_bias", True),
        in_bias=use_bias,
        out_bias=use_bias,
        dt_min=dt_min,
        dt_max=dt_max,
        norm_eps=eps,
    )
    expand = reader.get("expand", 2)
    if not isinstance(expand, int | float) or expand * d_model != mixer.d_inner:
        raise CheckpointError(
            f"config.json: num_heads * head_dim = {mixer.d_inner} is not expand * hidden_size = "
            f"{expand!r:.80} * {d_model}"
        )
    return HybridConfig(
        d_model=d_model,
        d_vocab=reader.integer("vocab_size", 32768),
        layers=(LayerConfig(mixer, None),) * reader.integer("num_hidden_layers", 64),
        norm=NormConfig(eps=eps, style="weight"),
        tied_embedding=reader.flag("tie_word_embeddings", False),
        **reader.special_tokens(),
        **{"n_ctx": None, **reader.own_settings()},
        model_name=str(config.get("_name_or_path") or MODEL_TYPE),
        extra=reader.extra(),
    )


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    mixers = {layer.mixer for layer in cfg.layers}
    require(
        (
            all(isinstance(layer.mixer, Mamba2Config) for layer in cfg.layers),
            "a layer's mixer is not Mamba-2",
        ),
        (all(layer.mlp is None for layer in cfg.layers), "layers have MLPs"),
        (len(mixers) == 1, "layers differ"),
    )
    (ssm,) = mixers
    assert isinstance(ssm, Mamba2Config)
    require(
        (ssm.norm == "gate_first", f"the norm of the output is {ssm.norm!r}"),
        (ssm.in_bias == ssm.out_bias, "one projection has a bias, the other has none"),
        (ssm.norm_eps == cfg.norm.eps, "the mixers' norms have another eps than the others"),
        (ssm.d_inner % cfg.d_model == 0, f"d_inner={ssm.d_inner} is not a multiple of d_model"),
        (ssm.in_scale == 1 and set(ssm.section_scales) == {1.0}, "the projection is scaled"),
        (cfg.norm.style == "weight", "norms multiply by 1 + weight, not by weight"),
        (not cfg.scale_embedding, "embeddings are scaled"),
        (cfg.logits_soft_cap is None, "logits have a soft cap"),
    )
    eos = cfg.eos_token_id
    return {
        **cfg.extra,
        "architectures": [ARCHITECTURE],
        "model_type": MODEL_TYPE,
        "bos_token_id": cfg.bos_token_id,
        "conv_kernel": ssm.d_conv,
        "eos_token_id": list(eos) if isinstance(eos, tuple) else eos,
        "expand": ssm.d_inner // cfg.d_model,
        "head_dim": ssm.d_head,
        "hidden_act": "silu",
        "hidden_size": cfg.d_model,
        "layer_norm_epsilon": cfg.norm.eps,
        "n_groups": ssm.n_groups,
        "num_heads": ssm.n_heads,
        "num_hidden_layers": cfg.n_layers,
        "pad_token_id": cfg.pad_token_id,
        "state_size": ssm.d_state,
        "tie_word_embeddings": cfg.tied_embedding,
        "time_step_limit": written_limit(ssm),
        "use_bias": ssm.in_bias,
        "use_conv_bias": ssm.conv_bias,
        "vocab_size": cfg.d_vocab,
    }


def groups(reader: ConfigReader, key: str, default: int, heads_key: str, n_heads: int) -> int:
    """Return the number of groups, whose name in the file is `key`.

    Raises:
        CheckpointError: the heads do not divide into them.
    """
    n_groups = reader.integer(key, default)
    if n_heads % n_groups:
        raise CheckpointError(
            f"config.json: {heads_key}={n_heads} is not a multiple of {key}={n_groups}"
        )
    return n_groups


def time_step_limit(reader: ConfigReader) -> tuple[float, float | None]:
    """Return the range of step sizes; no upper end is infinity in the file.

    transformers 5 writes infinity as {"__float__": "Infinity"}, 4 as the bare word.

    Raises:
        CheckpointError: it is no range of numbers.
    """
    given = reader.get("time_step_limit", (0.0, math.inf))
    shown = f"config.json: time_step_limit={given!r:.80} is not a range of two numbers"
    if not isinstance(given, list | tuple) or len(given) != 2:
        raise CheckpointError(shown)
    ends = [math.inf if end == {"__float__": "Infinity"} else end for end in given]
    if not all(isinstance(end, int | float) and not isinstance(end, bool) for end in ends):
        raise CheckpointError(shown)
    low, high = ends
    if not 0 <= low <= high or low == math.inf:
        raise CheckpointError(shown)
    return float(low), None if high == math.inf else float(high)


def written_limit(cfg: Mamba2Config) -> list[Any]:
    """Return the range of step sizes as transformers 5 writes it."""
    return [cfg.dt_min, {"__float__": "Infinity"} if cfg.dt_max is None else cfg.dt_max]
