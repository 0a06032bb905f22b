"""Configs of the published architectures at any size, for models trained or drawn from scratch."""

from __future__ import annotations

from hooked_hybrid.config import (
    AttentionConfig,
    GatedMLPConfig,
    HybridConfig,
    LayerConfig,
    MambaConfig,
    MixerConfig,
    MLPConfig,
    MoEConfig,
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

    Examples:
        >>> cfg = presets.griffin("RRA", d_model=64, n_heads=2, n_keys=32)
        >>> cfg.attention_layers, cfg.d_head
        ((2,), 32)
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


def jamba(
    pattern: str = "MMAM" * 2,
    *,
    d_model: int = 128,
    d_vocab: int = 1024,
    n_heads: int = 4,
    n_kv_heads: int = 2,
    d_head: int | None = None,
    d_mlp: int | None = None,
    n_experts: int = 4,
    n_chosen: int = 2,
    expert_period: int = 2,
    expert_offset: int = 1,
    d_inner: int | None = None,
    d_state: int = 16,
    d_conv: int = 4,
    dt_rank: int | None = None,
    tied_embedding: bool = False,
    bos_token_id: int | None = 1,
    eos_token_id: int | None = 2,
    pad_token_id: int | None = 0,
) -> HybridConfig:
    """Return a config with Jamba's layers.

    Args:
        pattern: one letter a layer, M for a Mamba block and A for global attention.
        d_model, d_vocab: widths of the residual stream and of the vocabulary.
        n_heads, n_kv_heads: query and key-value heads of each attention layer.
        d_head: channels of a head; None shares `d_model` among the heads.
        d_mlp: width of each MLP and expert; None means 3.5 times `d_model`, as published.
        n_experts, n_chosen: experts of a mixture, and how many act on a token; with one expert
            every MLP is dense.
        expert_period, expert_offset: layer i has experts where i % period == offset.
        d_inner: channels of a Mamba block; None means twice `d_model`, as published.
        d_state, d_conv: states of a channel, taps of the convolution.
        dt_rank: rank of the step sizes; None means a sixteenth of `d_model`, as published.
        tied_embedding: whether the embedding is also the unembedding.
        bos_token_id, eos_token_id, pad_token_id: special tokens.

    Raises:
        ValueError: another letter in `pattern`, or sizes that do not go together.

    Examples:
        >>> cfg = presets.jamba("MMAM", d_model=64, n_experts=8)
        >>> cfg.attention_layers, cfg.layers[1].mlp.n_experts
        ((2,), 8)
    """
    if not pattern or set(pattern) - set("MA"):
        raise ValueError(f"pattern={pattern!r}: give an M or an A for each layer")
    d_head = d_model // n_heads if d_head is None else d_head
    mixers: dict[str, MixerConfig] = {
        "M": MambaConfig(
            d_inner=2 * d_model if d_inner is None else d_inner,
            d_state=d_state,
            dt_rank=-(-d_model // 16) if dt_rank is None else dt_rank,
            d_conv=d_conv,
        ),
        "A": AttentionConfig(n_heads, n_kv_heads, d_head),
    }
    width = 7 * d_model // 2 if d_mlp is None else d_mlp
    dense = GatedMLPConfig(width, act="silu", bias=False)
    mlp: MLPConfig = dense if n_experts == 1 else MoEConfig(n_experts, n_chosen, width)
    return HybridConfig(
        d_model=d_model,
        d_vocab=d_vocab,
        layers=tuple(
            LayerConfig(mixers[kind], mlp if i % expert_period == expert_offset else dense)
            for i, kind in enumerate(pattern)
        ),
        tied_embedding=tied_embedding,
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
        model_name="jamba",
    )
