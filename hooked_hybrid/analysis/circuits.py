"""Weights as circuits: what a head attends to and what it moves, from its matrices.

    score(query, key) = x_q W_Q R(n) W_K^T x_k        QK circuit; R(n) rotates by n positions
    write(key)        = x_k W_V W_O                   OV circuit

Here x is the input of the layer, after `ln1`. Heads are query heads; those that share a key-value
head share its weights. A recurrence has such a circuit too, along its linear path.
"""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.analysis.forms import form_of
from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import rotate
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.network.mixers import Attention, Mixer
from hooked_hybrid.network.part import NotSupported
from hooked_hybrid.network.weights.factored import FactoredMatrix

# --- one layer --------------------------------------------------------------------------------


def qk_circuit(
    model: HookedHybrid,
    layer: int,
    distance: int = 0,
    *,
    scaled: bool = False,
    with_norm: bool = False,
) -> FactoredMatrix:
    """Return `W_Q R W_K^T` of each head, where R is the rotation at a distance.

    `x_q @ qk @ x_k` is the attention score, before 1/sqrt(d_head), of a query for the key
    `distance` positions before it. Only the rotated channels of a head depend on the distance;
    without rotary positions (Jamba), none do. Query and key biases, which no published model has,
    would add a term of only the query (which softmax ignores), one of only the key, and a constant;
    they are left out.

    Args:
        model: any hybrid.
        layer: an attention layer.
        distance: tokens between query and key; 0 is the query itself.
        scaled: divide by sqrt(d_head), as the model does.
        with_norm: multiply by `ln1`'s weight on both sides, so that the circuit acts on the
            normalised residual stream (`ln1.hook_normalized`). `fold_ln` does this to a model.

    Returns:
        [head d_model d_model], rows for the query, in float32 or float64.

    Raises:
        ValueError: no attention layer, or a distance that the layer does not see.
        NotSupported: queries and keys are normalised, so that no such matrix makes scores.

    Examples:
        >>> qk = analysis.qk_circuit(model, 5, distance=2)
        >>> qk.shape
        torch.Size([8, 128, 128])
    """
    attention = attention_at(model, layer)
    if attention.cfg.qk_norm:
        raise NotSupported(f"layer {layer} has norms on queries and keys: scores are not bilinear")
    _check_distance(attention.cfg, layer, distance)
    W_Q = _turned(at_least_fp32(attention.W_Q), distance, attention.cfg)
    W_K = _per_query_head(attention.W_K, attention.cfg)
    if with_norm:
        w = norm_weight(model, layer)
        W_Q, W_K = W_Q * w[:, None], W_K * w[:, None]
    return FactoredMatrix(W_Q * attention.cfg.d_head**-0.5 if scaled else W_Q, W_K.mT)


def ov_circuit(model: HookedHybrid, layer: int, *, with_norm: bool = False) -> FactoredMatrix:
    """Return `W_V W_O` of each head: its output for a key with weight 1.

    Args:
        model: any hybrid.
        layer: an attention layer.
        with_norm: multiply by `ln1`'s weight on the reading side, as in `qk_circuit`.

    Returns:
        [head d_model d_model], rows for the key, in float32 or float64, without biases.

    Raises:
        ValueError: no attention layer.
        NotSupported: what it writes passes a norm.

    Examples:
        >>> analysis.ov_circuit(model, 5).shape
        torch.Size([8, 128, 128])
    """
    attention = attention_at(model, layer)
    _require_linear_write(model, layer)
    W_V = _per_query_head(attention.W_V, attention.cfg)
    W_V = W_V * norm_weight(model, layer)[:, None] if with_norm else W_V
    return FactoredMatrix(W_V, at_least_fp32(attention.W_O))


def recurrent_circuit(
    model: HookedHybrid, layer: int, lag: int | None = None, *, with_norm: bool = False
) -> FactoredMatrix:
    """Return `W_x diag(taps) W_out` of each gate block: the linear path through a recurrence.

    Between `W_x` and `W_out` the effect of a past token is elementwise: a tap of the convolution,
    the input gate, decays, and the other branch's gate. This is the path with only the tap. Gates
    and decays are positive, so the true path differs by a weight for each channel. Its sign can
    differ where the other branch's gate (gelu, silu) is negative; in a Mamba block also by the silu
    after the convolution and by the sign of C B.

    Args:
        model: any hybrid.
        layer: a recurrent layer.
        lag: tap of the convolution, 0 for the current token; None for the sum of all taps, the path
            of an early token with decays near 1.
        with_norm: multiply by `ln1`'s weight on the reading side.

    Returns:
        [gate_block d_model d_model]; a Mamba block counts as one.

    Raises:
        ValueError: no recurrent layer, or a lag beyond the convolution.
        NotSupported: what it writes passes a norm.

    Examples:
        >>> analysis.recurrent_circuit(model, 0).shape
        torch.Size([8, 128, 128])
    """
    mixer = recurrence_at(model, layer)
    _require_linear_write(model, layer)
    maps = recurrent_maps(mixer)
    W_in = maps["in"] * norm_weight(model, layer)[:, None] if with_norm else maps["in"]
    return FactoredMatrix(W_in * _taps(mixer, layer, lag), maps["out"])


# --- what layers hold -------------------------------------------------------------------------


def attention_at(model: HookedHybrid, layer: int) -> Attention:
    """Return the attention of a layer; a ValueError lists the attention layers."""
    if layer not in model.cfg.attention_layers:
        raise ValueError(
            f"layer {layer} has no attention; layers that have: {model.cfg.attention_layers}"
        )
    return model.blocks[layer].attn


def recurrence_at(model: HookedHybrid, layer: int) -> Mixer[Any]:
    """Return the recurrence of a layer; a ValueError lists the recurrent layers."""
    if layer not in model.cfg.recurrent_layers:
        raise ValueError(
            f"layer {layer} is not a recurrence; layers that are: {model.cfg.recurrent_layers}"
        )
    return model.blocks[layer].recurrence


def norm_weight(model: HookedHybrid, layer: int) -> Float[Tensor, " d_model"]:
    """Return what `ln1` of a layer multiplies by, in float32 or float64; 1 where it has none."""
    norm = model.blocks[layer].ln1
    if norm is None:
        return at_least_fp32(model.W_E.new_ones(model.cfg.d_model))
    return at_least_fp32(norm.w)


def require_one_mixer(model: HookedHybrid, layer: int) -> None:
    """Refuse a layer in which a head and a block of a recurrence would have the same number.

    Raises:
        NotSupported: the layer has several mixers side by side.
    """
    if len(model.cfg.layers[layer].mixers) > 1:
        raise NotSupported(
            f"layer {layer} has several mixers, and this counts the parts of one: use ov_circuit "
            "and recurrent_circuit"
        )


def _require_linear_write(model: HookedHybrid, layer: int) -> None:
    if model.blocks[layer].ln1_post is not None:
        raise NotSupported(
            f"what layer {layer} writes passes a norm, whose scale depends on the run: there is no "
            "circuit of weights alone"
        )


def recurrent_maps(
    mixer: Mixer[Any],
) -> dict[str, Float[Tensor, "gate_block a b"]]:
    """Return the linear maps into and out of a recurrence, by gate block, in float32 or float64.

    "in" [gate_block d_model channel] is the recurrent branch, "gate" the gate branch, and "out"
    [gate_block channel d_model] the output projection. A Mamba block is one gate block.
    """
    n = mixer.channel_groups(mixer.cfg) or 1
    maps = {k: at_least_fp32(W) for k, W in form_of(mixer.cfg).maps(mixer).items()}
    return {
        k: rearrange(W, "(n e) d -> n e d" if k == "out" else "d (n e) -> n d e", n=n)
        for k, W in maps.items()
    }


def _taps(mixer: Mixer[Any], layer: int, lag: int | None) -> Float[Tensor, "gate_block 1 channel"]:
    weight = at_least_fp32(form_of(mixer.cfg).taps(mixer))
    n_taps = weight.shape[0]
    if lag is not None and not 0 <= lag < n_taps:
        raise ValueError(f"lag={lag}: layer {layer}'s convolution has lags 0 to {n_taps - 1}")
    taps = weight.sum(0) if lag is None else weight[n_taps - 1 - lag]
    n = mixer.channel_groups(mixer.cfg) or 1
    return rearrange(taps, "(n e) -> n 1 e", n=n)


def _per_query_head(
    W: Float[Tensor, "kv_head m n"], cfg: AttentionConfig
) -> Float[Tensor, "head m n"]:
    return at_least_fp32(W).repeat_interleave(cfg.n_heads // cfg.n_kv_heads, dim=0)


def _turned(
    W: Float[Tensor, "head d_model d_head"], distance: int, cfg: AttentionConfig
) -> Float[Tensor, "head d_model d_head"]:
    """Return query weights rotated to position `distance`, with the key at 0."""
    if cfg.rotary is None or distance == 0:
        return W
    positions = torch.zeros(1, distance + 1, dtype=torch.long, device=W.device)
    layout = lay_out(positions, None, None, None).piece(distance, distance + 1)
    return rotate(W.flatten(0, 1)[None, None], layout, cfg.rotary).view_as(W)


def _check_distance(cfg: AttentionConfig, layer: int, distance: int) -> None:
    if distance < 0 or (cfg.n_keys is not None and distance >= cfg.n_keys):
        seen = "any from 0" if cfg.n_keys is None else f"0 to {cfg.n_keys - 1}"
        raise ValueError(f"distance={distance}: layer {layer} sees distances of {seen} tokens")
