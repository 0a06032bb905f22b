"""RecurrentGemma as Google publishes it on Kaggle: a `.pt` of Griffin's parameters, no config."""

from __future__ import annotations

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
from weights_conversion.rules import SPLIT_BIAS, SPLIT_TRANSPOSED, Rule, Shapes, rule

WINDOW = 2048
"""Window of all published checkpoints; in Google's code a query sees this many keys and itself."""
SPECIAL_TOKENS: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}

MODEL = (
    rule("embedder.input_embedding", "embed.W_E"),
    rule("final_norm.scale", "ln_final.weight"),
)
EVERY_LAYER = (
    rule("blocks.{i}.temporal_pre_norm.scale", "blocks.{i}.ln1.weight"),
    rule("blocks.{i}.channel_pre_norm.scale", "blocks.{i}.ln2.weight"),
    rule(
        "blocks.{i}.mlp_block.ffw_up.w",
        "blocks.{i}.mlp.gate.weight blocks.{i}.mlp.up.weight",
        SPLIT_TRANSPOSED,
    ),
    rule(
        "blocks.{i}.mlp_block.ffw_up.b",
        "blocks.{i}.mlp.gate.bias blocks.{i}.mlp.up.bias",
        SPLIT_BIAS,
    ),
    rule("blocks.{i}.mlp_block.ffw_down.weight", "blocks.{i}.mlp.down.weight"),
    rule("blocks.{i}.mlp_block.ffw_down.bias", "blocks.{i}.mlp.down.bias"),
)
ATTENTION = (
    *(
        rule(f"blocks.{{i}}.attention_block.proj_{name}.weight", f"blocks.{{i}}.attn.{name}.weight")
        for name in "qkv"
    ),
    rule("blocks.{i}.attention_block.proj_final.weight", "blocks.{i}.attn.o.weight"),
    rule("blocks.{i}.attention_block.proj_final.bias", "blocks.{i}.attn.o.bias"),
)
RECURRENT = (
    *(
        rule(f"blocks.{{i}}.recurrent_block.{name}.{part}", f"blocks.{{i}}.mixer.{name}.{part}")
        for name in ("linear_x", "linear_y", "linear_out")
        for part in ("weight", "bias")
    ),
    rule("blocks.{i}.recurrent_block.conv_1d.w", "blocks.{i}.mixer.conv.weight"),
    rule("blocks.{i}.recurrent_block.conv_1d.b", "blocks.{i}.mixer.conv.bias"),
    rule("blocks.{i}.recurrent_block.rg_lru.a_param", "blocks.{i}.mixer.a_param"),
    *(
        rule(
            f"blocks.{{i}}.recurrent_block.rg_lru.{theirs}.{part[0]}",
            f"blocks.{{i}}.mixer.{ours}.{part}",
        )
        for theirs, ours in (("input_gate", "input_gate"), ("a_gate", "rec_gate"))
        for part in ("weight", "bias")
    ),
)


def rules(cfg: HybridConfig) -> list[Rule]:
    """Return the table for one model, layers filled in."""
    table = list(MODEL)
    for i, layer in enumerate(cfg.layers):
        mixer = ATTENTION if isinstance(layer.mixer, AttentionConfig) else RECURRENT
        table += [r.at(i) for r in (*EVERY_LAYER, *mixer)]
    return table


def ignored(cfg: HybridConfig) -> tuple[str, ...]:  # noqa: ARG001  (one signature for all tables)
    """Return patterns of tensors that are not needed, of which there are none."""
    return ()


def config_from_shapes(
    shapes: Shapes,
    n_keys: int = WINDOW + 1,
    logits_soft_cap: float = 30.0,
    n_heads: int | None = None,
) -> HybridConfig:
    """Return the config that the tensors of a `.pt` imply.

    The number of heads is that of the RG-LRU's gate blocks.

    Args:
        shapes: by Google's names.
        n_keys: keys a query sees, itself included: one more than Google's `attention_window_size`.
        logits_soft_cap: as published.
        n_heads: needed only for a model without a recurrent layer.

    Raises:
        CheckpointError: not a Griffin, inconsistent shapes, or an unknown number of heads.
    """
    try:
        return _config(shapes, n_keys, logits_soft_cap, n_heads)
    except CheckpointError:
        raise
    except ValueError as error:
        raise CheckpointError(f"the shapes in the .pt are inconsistent: {error}") from error


def _config(
    shapes: Shapes, n_keys: int, logits_soft_cap: float, n_heads: int | None
) -> HybridConfig:
    shape = _Shapes(shapes)
    d_vocab, d_model = shape.of("embedder.input_embedding", 2)
    n_layers = sum(name.endswith(".temporal_pre_norm.scale") for name in shapes)
    is_recurrent = [
        f"blocks.{i}.recurrent_block.linear_x.weight" in shapes for i in range(n_layers)
    ]
    kinds: dict[bool, MixerConfig] = {}
    if True in is_recurrent:
        block = f"blocks.{is_recurrent.index(True)}.recurrent_block"
        n_blocks = shape.of(f"{block}.rg_lru.input_gate.w", 3)[0]
        d_conv, d_rnn = shape.of(f"{block}.conv_1d.w", 2)
        kinds[True] = RGLRUConfig(d_rnn, n_blocks, d_conv)
        n_heads = n_blocks if n_heads is None else n_heads
    if n_heads is not None and n_heads < 1:
        raise CheckpointError(f"n_heads={n_heads}: give a positive number")
    if n_heads is None:
        raise CheckpointError(
            "without a recurrent layer the number of heads is unknown: give n_heads=..."
        )
    if False in is_recurrent:
        block = f"blocks.{is_recurrent.index(False)}.attention_block"
        d_q, d_kv = (shape.of(f"{block}.proj_{name}.weight", 2)[0] for name in "qk")
        d_head = d_q // n_heads
        if d_head * n_heads != d_q or not d_head or d_kv % d_head:
            raise CheckpointError(
                f"{block} projects to {d_q} and {d_kv} channels, which {n_heads} heads cannot share"
            )
        rotary = RotaryConfig(d_rotary=d_head // 2)
        kinds[False] = AttentionConfig(
            n_heads, d_kv // d_head, d_head, n_keys=n_keys, rotary=rotary, out_bias=True
        )
    mlp = GatedMLPConfig(d_mlp=shape.of("blocks.0.mlp_block.ffw_up.w", 3)[2])
    return HybridConfig(
        d_model=d_model,
        d_vocab=d_vocab,
        layers=tuple(LayerConfig(kinds[kind], mlp) for kind in is_recurrent),
        norm=NormConfig(style="one_plus_weight"),
        scale_embedding=True,
        logits_soft_cap=logits_soft_cap,
        default_prepend_bos=True,  # Google's sampler prepends it to every prompt
        model_name="recurrentgemma (Google)",
        **SPECIAL_TOKENS,
    )


class _Shapes:
    """Shapes by name, with errors that state what was expected."""

    def __init__(self, shapes: Shapes) -> None:
        self.shapes = shapes

    def of(self, name: str, n_axes: int) -> tuple[int, ...]:
        shape = self.shapes.get(name)
        if shape is None:
            raise CheckpointError(f"no tensor {name!r}: the .pt is not a Griffin of Google's")
        if len(shape) != n_axes or 0 in shape:
            raise CheckpointError(f"{name} has shape {shape}; it should have {n_axes} axes")
        return shape
