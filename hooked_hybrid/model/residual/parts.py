"""What each part of a layer writes to the residual stream, from what a run left in its cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.config import MambaConfig, RGLRUConfig
from hooked_hybrid.hooks.slicing import PosSlice, indices_on
from hooked_hybrid.network.layers import RMSNorm, at_least_fp32
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.weights.plain import as_matrix
from hooked_hybrid.network.weights.products import linear

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel
    from hooked_hybrid.network.mlps.moe import MoE


@dataclass(frozen=True)
class Way:
    """One way to find a write: which cached values, and what they go through.

    `values` makes [*batch_pos part inner] of them. They are the writes themselves, or what
    `weight` [part inner d_model] turns into them.
    """

    names: tuple[str, ...]
    values: Callable[..., Tensor]
    weight: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Parts:
    """Parts of one write, with all ways to them: the first that the cache holds is taken.

    `bias` is what the layer writes in addition to these parts, the same at every position;
    `written` is the whole write, which hooks may have edited after these parts.
    """

    labels: tuple[str, ...]
    ways: tuple[Way, ...]
    bias: Float[Tensor, " d_model"] | None = None
    written: Parts | None = None


def whole(label: str, *names: str) -> Parts:
    """Return a write as one part, cached under any of some names."""
    return Parts((label,), tuple(Way((name,), _as_one) for name in names))


def embedding() -> Parts:
    """Return what the embedding starts the stream with."""
    return whole("embed", "hook_embed")


def stream(model: LanguageModel, layer: int, mlp_input: bool) -> Parts:
    """Return the residual stream that a layer's mixer or MLP reads, or the last one."""
    if mlp_input:
        return whole("whole", f"blocks.{layer}.hook_resid_mid")
    before = f"blocks.{layer - 1}.hook_resid_post"
    if layer == model.cfg.n_layers:
        return whole("whole", before)
    here = f"blocks.{layer}.hook_resid_pre"
    return whole("whole", here, before) if layer else whole("whole", here, "hook_embed")


def mixer(model: LanguageModel, layer: int) -> Parts:
    """Return what a mixer writes, as one part."""
    mixer = mixer_of(model.cfg.layers[layer].mixer)
    names = (*reversed(mixer.out_hooks), "hook_mixer_out")
    return whole(f"{layer}_{mixer.label}_out", *(f"blocks.{layer}.{name}" for name in names))


def mlp(model: LanguageModel, layer: int) -> Parts:
    """Return what an MLP or a mixture writes, as one part."""
    label = mlp_of(model.cfg.layers[layer].mlp).label
    return whole(f"{layer}_{label}_out", f"blocks.{layer}.hook_mlp_out")


def heads(model: LanguageModel, layer: int) -> Parts:
    """Return what each head of an attention layer writes; `b_O` is left over."""
    attention = model.blocks[layer].attn
    labels = tuple(f"L{layer}H{h}" for h in range(attention.cfg.n_heads))
    path = f"blocks.{layer}.attn"
    results = Way((f"{path}.hook_result",), _as_they_are)
    z = Way((f"{path}.hook_z",), _as_they_are, lambda: attention.W_O)
    return Parts(labels, (results, z), attention.b_O, mixer(model, layer))


def gate_blocks(model: LanguageModel, layer: int) -> Parts:
    """Return what each gate block of an RG-LRU writes; the output bias is left over.

    The gates act within blocks of channels, which the output projection then adds up.
    """
    rglru = model.blocks[layer].mixer
    n_blocks = rglru.cfg.n_gate_blocks
    labels = tuple(f"L{layer}B{block}" for block in range(n_blocks))
    gated = Way(
        (f"blocks.{layer}.mixer.hook_gated",),
        lambda x: x.unflatten(-1, (n_blocks, -1)),
        lambda: rglru.linear_out.W.unflatten(0, (n_blocks, -1)),
    )
    return Parts(labels, (gated,), rglru.linear_out.bias, mixer(model, layer))


RECURRENT_PARTS: dict[type, Callable[[LanguageModel, int], Parts]] = {
    RGLRUConfig: gate_blocks,
    MambaConfig: mixer,
}
"""The parts of each kind of recurrence that act apart; Mamba's channels have no such groups."""


def neurons(model: LanguageModel, layer: int, neuron_slice: PosSlice = None) -> Parts:
    """Return what each neuron of a dense MLP writes; the output bias is left over."""
    dense = model.blocks[layer].mlp
    index = torch.arange(dense.cfg.d_mlp)
    if neuron_slice is not None:
        index = indices_on(neuron_slice, dense.cfg.d_mlp, "neurons", tuple_is_slice=True)
    post = Way(
        (f"blocks.{layer}.mlp.hook_post",),
        lambda x: x[..., index.to(x.device), None],
        lambda: dense.W_out[index.to(dense.W_out.device), None],
    )
    labels = tuple(f"L{layer}N{n}" for n in index.tolist())
    return Parts(labels, (post,), dense.down.bias, mlp(model, layer))


def experts(model: LanguageModel, layer: int) -> Parts:
    """Return what each expert of a mixture writes: zero where it was not chosen."""
    block, path = model.blocks[layer], f"blocks.{layer}.mlp"
    chosen = (f"{path}.hook_expert_weights", f"{path}.hook_expert_indices")
    ways = (
        Way((f"{path}.hook_expert_out", chosen[1]), partial(_by_expert, block.mlp)),
        Way((f"{path}.hook_expert_post", *chosen), partial(_from_post, block.mlp)),
        Way((f"blocks.{layer}.ln2.hook_normalized", *chosen), partial(_run, block.mlp, block.ln2)),
    )
    labels = tuple(f"L{layer}E{e}" for e in range(block.mlp.cfg.n_experts))
    return Parts(labels, ways, written=mlp(model, layer))


def weigh(norm: RMSNorm, normalized: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what a norm gives for values it has divided by their scale, rounded as it rounds."""
    weight = norm.weight.to(normalized.device)
    if norm.adds_one:
        return torch.addcmul(normalized, normalized, at_least_fp32(weight)).to(dtype)
    return normalized.to(dtype) * weight


def _as_one(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)


def _as_they_are(x: Tensor) -> Tensor:
    return x


def _by_expert(
    moe: MoE,
    written: Float[Tensor, "*batch_pos n_chosen d_model"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return the writes of a token's chosen experts under each expert's own number."""
    empty = written.new_zeros(*indices.shape[:-1], moe.cfg.n_experts, written.shape[-1])
    return empty.scatter_add(-2, indices[..., None].expand_as(written), written)


def _from_post(
    moe: MoE,
    post: Float[Tensor, "*batch_pos n_chosen d_mlp"],
    weights: Float[Tensor, "*batch_pos n_chosen"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return each expert's write from its values after the nonlinearity."""
    down = as_matrix(moe.down)
    written = post.new_zeros(*indices.shape, down.shape[1])
    for expert in indices.unique().tolist():
        at = (indices == expert).nonzero(as_tuple=True)
        written[at] = linear(post[at], down[expert].to(post.device)) * weights[at][:, None]
    return _by_expert(moe, written, indices)


def _run(
    moe: MoE,
    norm: RMSNorm,
    normalized: Float[Tensor, "*batch_pos d_model"],
    weights: Float[Tensor, "*batch_pos n_chosen"],
    indices: Int[Tensor, "*batch_pos n_chosen"],
) -> Float[Tensor, "*batch_pos n_experts d_model"]:
    """Return each expert's write by running the chosen ones again on what the mixture read."""
    down = as_matrix(moe.down)
    device = down.device
    x = weigh(norm, normalized.to(device), down.dtype)
    post = x.new_zeros(*indices.shape, moe.cfg.d_mlp)
    for expert in indices.unique().tolist():
        at = (indices == expert).to(device).nonzero(as_tuple=True)
        post[at] = moe._post(x[at[:-1]], expert)
    return _from_post(moe, post.to(weights.device), weights, indices)
