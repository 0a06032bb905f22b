"""Configs of the published architectures at any size, for models trained or drawn from scratch."""

from __future__ import annotations

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


def griffin(
    pattern: str = "RRA" * 2,
    *,
    d_model: int = 128,
    d_vocab: int = 1024,
    n_heads: int = 4,
    n_kv_heads: int = 1,
    d_head: int | None = None,
    d_mlp: int | None = None,
    d_rnn: int | None = None,
    d_conv: int = 4,
    n_keys: int | None = 256,
    logits_soft_cap: float | None = 30.0,
    bos_token_id: int | None = 2,
    eos_token_id: int | None = 1,
    pad_token_id: int | None = 0,
) -> HybridConfig:
    """Return a config with RecurrentGemma's layers.

    Args:
        pattern: one letter a layer, R for an RG-LRU block and A for local attention.
        d_model, d_vocab: widths of the residual stream and of the vocabulary.
        n_heads: query heads of each attention layer, and gate blocks of each RG-LRU.
        n_kv_heads: key-value heads; 1 is multi-query attention, as published.
        d_head: channels of a head; None shares `d_model` among the heads.
        d_mlp: width of the MLP; None means 3 times `d_model`, as published.
        d_rnn: channels of the RG-LRU; None means `d_model`, as published.
        d_conv: taps of the convolution.
        n_keys: keys a query sees, itself included; None for all.
        logits_soft_cap: bound of the logits; None for none.
        bos_token_id, eos_token_id, pad_token_id: special tokens.

    Raises:
        ValueError: another letter in `pattern`, or sizes that do not go together.
    """
    if not pattern or set(pattern) - set("RA"):
        raise ValueError(f"pattern={pattern!r}: give an R or an A for each layer")
    d_head = d_model // n_heads if d_head is None else d_head
    mixers: dict[str, MixerConfig] = {
        "R": RGLRUConfig(d_model if d_rnn is None else d_rnn, n_heads, d_conv),
        "A": AttentionConfig(
            n_heads,
            n_kv_heads,
            d_head,
            n_keys=n_keys,
            rotary=RotaryConfig(d_rotary=d_head // 4 * 2),
            out_bias=True,
        ),
    }
    mlp = GatedMLPConfig(3 * d_model if d_mlp is None else d_mlp, act="gelu_tanh", bias=True)
    return HybridConfig(
        d_model=d_model,
        d_vocab=d_vocab,
        layers=tuple(LayerConfig(mixers[kind], mlp) for kind in pattern),
        norm=NormConfig(style="one_plus_weight"),
        scale_embedding=True,
        tied_embedding=True,
        logits_soft_cap=logits_soft_cap,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        model_name="griffin",
    )
