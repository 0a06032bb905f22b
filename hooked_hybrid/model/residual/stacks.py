"""The residual stream as a sum: stacks of what each part of a model wrote to it.

The stream after the last block is the embedding plus what every mixer and every MLP wrote. A stack
made from a cache sums to the stream of that run to rounding, with the effects of hooks on the
parts. An edit of the stream itself (`hook_resid_*`) belongs to no part; a remainder takes it.
Names, arguments and meaning are those of TransformerLens's `ActivationCache`, whose methods these
functions are.

Arguments they share:
    layer: stack what was written before this layer; None and -1 mean all layers.
    mlp_input: also what its mixer wrote, up to what its MLP reads.
    apply_ln: divide by the scale of the norm that reads the stream there, and multiply by its
        weight; see `apply_ln_to_stack`.
    pos_slice: positions, among those that the cache holds: an int or "last", each row's last
        token, drops the axis; a slice, indices or a mask keep it. A single position that is
        padding in some row is an error.
    return_labels: return `(stack, labels)`.
    incl_remainder: add what the stream there holds beyond the stack, labelled "remainder".
    project_output_onto: directions [d_model] or [d_model output] to take each part along, without
        ever holding whole parts; the last axis is then gone, or `output`.

They raise `HookNameError` where the cache holds too little, with the `names_filter` that keeps
enough; `ValueError` for a layer that is not there or a stack of nothing; `MemoryError` for a stack
that would not fit.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.config import AttentionConfig
from hooked_hybrid.hooks.names import WILD, Shorthand, find, get_act_name, matching
from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.model.cached_values import CachedValues
from hooked_hybrid.model.residual import parts as parts_of
from hooked_hybrid.model.residual.norms import apply_ln_to_stack
from hooked_hybrid.model.residual.reading import (
    Onto,
    mixer_parts_before,
    place_at,
    read_parts,
    require_parts,
    stack_parts,
    write_parts,
)
from hooked_hybrid.network.part import not_stated
from hooked_hybrid.options import refuse_ignored

Stacked = Float[Tensor, "component ..."] | tuple[Float[Tensor, "component ..."], list[str]]


def accumulated_resid(
    cache: CachedValues,
    layer: int | None = None,
    incl_mid: bool = False,
    apply_ln: bool = False,
    pos_slice: PosSlice = None,
    mlp_input: bool = False,
    return_labels: bool = False,
) -> Stacked:
    """Stack the stream as it enters each layer up to `layer`: its sums so far.

    Labels are "0_pre", "0_mid" (with `incl_mid`) and so on, and "final_post" at the end of all
    layers. With `apply_ln` there, each is divided by its own scale, as a logit lens needs;
    before an earlier layer all are divided by the scale of that layer's norm.

    Examples:
        >>> stack, labels = cache.accumulated_resid(return_labels=True)
        >>> stack.shape, labels[-2:]
        (torch.Size([7, 1, 16, 128]), ['5_pre', 'final_post'])
    """
    place, n_layers = place_at(cache, layer, mlp_input), cache.model.cfg.n_layers
    parts = []
    for i in range(place.layer + 1):
        label = "final_post" if i == n_layers else f"{i}_pre"
        parts.append(replace(parts_of.stream(cache.model, i, False), labels=(label,)))
        is_wanted = (incl_mid and i < place.layer) or (mlp_input and i == place.layer)
        if is_wanted and parts_of.has_mid(cache.model, i):
            parts.append(replace(parts_of.stream(cache.model, i, True), labels=(f"{i}_mid",)))
    at_end = place.layer == n_layers
    by_cached = apply_ln and not at_end
    stack, labels = stack_parts(cache, "accumulated_resid", parts, place, pos_slice, by_cached)
    if apply_ln and at_end:
        stack = apply_ln_to_stack(cache, stack, recompute_ln=True)
    return (stack, labels) if return_labels else stack


def decompose_resid(
    cache: CachedValues,
    layer: int | None = None,
    mlp_input: bool = False,
    mode: Literal["all", "mlp", "mixer", "attn"] = "all",
    apply_ln: bool = False,
    pos_slice: PosSlice = None,
    incl_embeds: bool = True,
    return_labels: bool = False,
) -> Stacked:
    """Stack what the embedding, each mixer and each MLP wrote; they sum to the stream.

    Labels say what each is: "embed", "0_rglru_out", "0_mamba_out", "2_attn_out", "2_mlp_out",
    "3_moe_out".

    Args:
        mode: "all"; "mlp", MLPs and mixtures; "mixer"; or "attn", attention layers alone.
        incl_embeds: begin with the embedding.

    Examples:
        >>> parts, labels = cache.decompose_resid(return_labels=True)
        >>> labels[:4]
        ['embed', '0_rglru_out', '0_mlp_out', '1_rglru_out']
        >>> torch.allclose(parts.sum(0), cache["resid_post", -1], atol=1e-3)
        True
    """
    if mode not in ("all", "mlp", "mixer", "attn"):
        raise ValueError(f"mode={mode!r}: give 'all', 'mlp', 'mixer' or 'attn'")
    place, cfg = place_at(cache, layer, mlp_input), cache.model.cfg
    parts = [parts_of.embedding()] if incl_embeds else []
    for i in range(place.layer + mlp_input):
        wrote = zip(cfg.layers[i].mixers, parts_of.mixers(cache.model, i), strict=True)
        for mixer, whole in wrote if mode != "mlp" else ():
            if mode != "attn" or isinstance(mixer, AttentionConfig):
                parts.append(whole)
        if i < place.layer and mode in ("all", "mlp") and cfg.layers[i].mlp is not None:
            parts.append(parts_of.mlp(cache.model, i))
    stack, labels = stack_parts(cache, "decompose_resid", parts, place, pos_slice, apply_ln)
    return (stack, labels) if return_labels else stack


def compute_head_results(cache: CachedValues) -> None:
    """Keep `hook_result` of every attention layer in the cache, as z @ W_O where it is not.

    Examples:
        >>> _, cache = model.run_with_cache(tokens)
        >>> cache.compute_head_results()
        >>> cache["result", 2].shape
        torch.Size([1, 16, 8, 128])
    """
    layers = cache.model.cfg.attention_layers
    parts = [parts_of.head_results(cache.model, i) for i in layers]
    require_parts(cache, "compute_head_results", parts)
    for part in parts:
        name = part.ways[0].names[0]
        value = read_parts(cache, part, None, None).movedim(0, -2)
        cache.keep(name, value, like=name.removesuffix("result") + "z")


def stack_head_results(
    cache: CachedValues,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: PosSlice = None,
    apply_ln: bool = False,
    *,
    mlp_input: bool = False,
    recurrent: Literal["none", "layer", "block"] = "none",
) -> Stacked:
    """Stack what each attention head wrote, "L2H0" and so on: `hook_result`, or z @ W_O.

    Args:
        recurrent: the parts of recurrent layers. "none": no part. "layer": one part each,
            "0_rglru_out". "block": the gate blocks of an RG-LRU, "L0B1", each the block's
            channels of `hook_gated` through its rows of the output projection; a Mamba layer
            has no groups of channels that act apart and stays one part. Output biases of heads
            and blocks are in the remainder.

    Examples:
        >>> heads, labels = cache.stack_head_results(return_labels=True)
        >>> heads.shape, labels[:2]
        (torch.Size([16, 1, 16, 128]), ['L2H0', 'L2H1'])
    """
    place = place_at(cache, layer, mlp_input)
    parts = mixer_parts_before(cache, place, recurrent)
    what, rest = "stack_head_results", incl_remainder
    stacked = stack_parts(cache, what, parts, place, pos_slice, apply_ln, incl_remainder=rest)
    return stacked if return_labels else stacked[0]


def stack_expert_results(
    cache: CachedValues,
    layer: int | None = -1,
    return_labels: bool = False,
    incl_remainder: bool = False,
    pos_slice: PosSlice = None,
    apply_ln: bool = False,
    *,
    mlp_input: bool = False,
) -> Stacked:
    """Stack what each expert of each mixture wrote, "L3E1" and so on: 0 where not chosen.

    From `hook_expert_out` or `hook_expert_post` where they are cached; else the chosen experts
    run again on what the mixture read.

    Examples:
        >>> _, cache = jamba.run_with_cache(tokens)
        >>> experts, labels = cache.stack_expert_results(return_labels=True)
        >>> experts.shape, labels[:2]
        (torch.Size([8, 1, 16, 128]), ['L1E0', 'L1E1'])
    """
    place = place_at(cache, layer, mlp_input)
    mixtures = [i for i in range(place.layer) if parts_of.letter(cache.model, i) == "E"]
    parts = [parts_of.mlp_parts(cache.model, i) for i in mixtures]
    what, rest = "stack_expert_results", incl_remainder
    stacked = stack_parts(cache, what, parts, place, pos_slice, apply_ln, incl_remainder=rest)
    return stacked if return_labels else stacked[0]


def get_neuron_results(
    cache: CachedValues,
    layer: int,
    neuron_slice: PosSlice = None,
    pos_slice: PosSlice = None,
    project_output_onto: Onto | None = None,
) -> Tensor:
    """Return what each neuron of a dense MLP wrote [*batch_pos neuron d_model].

    Examples:
        >>> cache.get_neuron_results(5, neuron_slice=[0, 7], pos_slice=-1).shape
        torch.Size([1, 2, 128])
    """
    n_layers = cache.model.cfg.n_layers
    if not -n_layers <= layer < n_layers:
        raise ValueError(f"layer={layer}: there are {n_layers} layers")
    layer %= n_layers
    letter = parts_of.letter(cache.model, layer)
    if letter == "E":
        raise ValueError(f"layer {layer} has a mixture: see stack_expert_results")
    if cache.model.cfg.layers[layer].mlp is None:
        having = cache.model.cfg.mlp_layers
        raise ValueError(f"layer {layer} has no MLP; layers that have: {having}")
    if letter != "N":
        raise not_stated(type(cache.model.blocks[layer].mlp), "part_letter", "neurons")
    part = parts_of.mlp_parts(cache.model, layer, neuron_slice)
    require_parts(cache, "get_neuron_results", [part])
    results = write_parts(cache, [part], pos_slice, project_output_onto)
    is_one = project_output_onto is not None and project_output_onto.ndim == 1
    return results.movedim(0, -1 if is_one else -2)


def stack_neuron_results(
    cache: CachedValues,
    layer: int | None,
    pos_slice: PosSlice = None,
    neuron_slice: PosSlice = None,
    return_labels: bool = False,
    incl_remainder: bool = False,
    apply_ln: bool = False,
    project_output_onto: Onto | None = None,
    mlp_input: bool = False,
) -> Stacked:
    """Stack what each neuron of each dense MLP wrote, "L2N7" and so on.

    Mixtures are in the remainder, as are output biases; `neuron_slice` chooses in every MLP.

    Examples:
        >>> neurons, labels = cache.stack_neuron_results(-1, pos_slice=-1, return_labels=True)
        >>> neurons.shape, labels[:2]
        (torch.Size([1536, 1, 128]), ['L0N0', 'L0N1'])
    """
    place = place_at(cache, layer, mlp_input)
    dense = [i for i in range(place.layer) if parts_of.letter(cache.model, i) == "N"]
    parts = [parts_of.mlp_parts(cache.model, i, neuron_slice) for i in dense]
    stack, labels = stack_parts(
        cache,
        "stack_neuron_results",
        parts,
        place,
        pos_slice,
        apply_ln,
        incl_remainder=incl_remainder,
        onto=project_output_onto,
    )
    return (stack, labels) if return_labels else stack


def stack_activation(
    cache: CachedValues,
    activation_name: Shorthand,
    layer: int | None = -1,
    sublayer_type: str | None = None,
    return_labels: bool = False,
) -> Stacked:
    """Stack one hook point of every layer before `layer` that has it; labels are full names.

    Args:
        activation_name: what follows `hook_`, for every layer; or names in any other spelling:
            "blocks.*.attn.hook_z", ("z", 2), "blocks.2.attn.hook_z".
        layer: -1 and None mean all layers.
        sublayer_type: of the hook point, "ln1" or "ln2", if its name does not say.

    Examples:
        >>> patterns, labels = cache.stack_activation("pattern", return_labels=True)
        >>> patterns.shape, labels[0]
        (torch.Size([2, 1, 8, 16, 16]), 'blocks.2.attn.hook_pattern')
    """
    last, points = place_at(cache, layer, False).layer, cache.model.hook_dict
    if isinstance(activation_name, str) and not {*WILD, "."} & {*activation_name}:
        names = [get_act_name(activation_name, i, sublayer_type) for i in range(last)]
        there = [found for found in (find(name, points) for name in dict.fromkeys(names)) if found]
    else:
        refuse_ignored("the name says where it is; leave it out", sublayer_type=sublayer_type)
        names = matching(activation_name, points, cache.n_layers)
        there = [
            name for name in names if name.startswith("blocks.") and points[name].layer() < last
        ]
    if not there:
        raise ValueError(f"no layer before {last} has {activation_name!r}, such as {names[:1]}")
    require_parts(cache, "stack_activation", [parts_of.whole(name, name) for name in there])
    shapes = {tuple(cache.cache_dict[name].shape) for name in there}
    if len(shapes) > 1:
        raise ValueError(f"layers have {activation_name!r} in shapes {sorted(shapes)}")
    stack = torch.stack([cache.cache_dict[name] for name in there])
    return (stack, there) if return_labels else stack


def get_full_resid_decomposition(
    cache: CachedValues,
    layer: int | None = None,
    mlp_input: bool = False,
    expand_neurons: bool = True,
    apply_ln: bool = False,
    pos_slice: PosSlice = None,
    return_labels: bool = False,
    project_output_onto: Onto | None = None,
    *,
    expand_experts: bool = True,
    recurrent: Literal["layer", "block"] = "block",
) -> Stacked:
    """Stack the finest parts there are; they sum to the stream.

    In this order: heads and recurrent layers, MLPs, the embedding, and under "bias" what the
    layers that are split wrote besides these parts: output biases, and, where the cache holds
    their writes (`hook_mixer_out` or `hook_attn_out`, `hook_mlp_out`), edits of these.

    Args:
        expand_neurons: split dense MLPs into neurons.
        expand_experts: split mixtures into experts; their neurons stay together.
        recurrent: as in `stack_head_results`.

    Examples:
        >>> parts = cache.get_full_resid_decomposition(pos_slice=-1)
        >>> parts.shape  # heads, gate blocks, neurons, biases and the embedding
        torch.Size([1586, 1, 128])
        >>> torch.allclose(parts.sum(0), cache["resid_post", -1][:, -1], atol=1e-3)
        True
    """
    if recurrent not in ("layer", "block"):
        raise ValueError(f"recurrent={recurrent!r}: give 'layer' or 'block'")
    place = place_at(cache, layer, mlp_input)
    splits = {"N": expand_neurons, "E": expand_experts}
    parts = mixer_parts_before(cache, place, recurrent)
    for i in (i for i in cache.model.cfg.mlp_layers if i < place.layer):
        is_split = splits.get(parts_of.letter(cache.model, i) or "", True)
        parts.append((parts_of.mlp_parts if is_split else parts_of.mlp)(cache.model, i))
    parts.append(parts_of.embedding())
    stack, labels = stack_parts(
        cache,
        "get_full_resid_decomposition",
        parts,
        place,
        pos_slice,
        apply_ln,
        incl_bias=True,
        onto=project_output_onto,
    )
    return (stack, labels) if return_labels else stack
