"""The output of each part of a layer to the residual stream, from the cache of a run."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.hooks.slicing import PosSlice, indices_on
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.part import Part
from hooked_hybrid.network.written import Way

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel


@dataclass(frozen=True)
class Parts:
    """Parts of one write, with all ways to them: the first that the cache holds is taken.

    `bias` is what the layer writes in addition to these parts: the same at every position, or,
    behind a norm, one part with a way of its own. `written` is the whole write, which hooks may
    have edited after these parts.
    """

    labels: tuple[str, ...]
    ways: tuple[Way, ...]
    bias: Float[Tensor, " d_model"] | Parts | None = None
    written: Parts | None = None


def whole(label: str, *names: str) -> Parts:
    """Return a write as one part, cached under any of some names."""
    return Parts((label,), tuple(Way((name,), _as_one) for name in names))


def embedding() -> Parts:
    """Return what the embedding starts the stream with."""
    return whole("embed", "hook_embed")


def stream(model: LanguageModel, layer: int, mlp_input: bool) -> Parts:
    """Return the residual stream that a layer's mixers or MLP read, or the last one."""
    before = f"blocks.{layer - 1}.hook_resid_post"
    if layer == model.cfg.n_layers:
        return whole("whole", before)
    if mlp_input and has_mid(model, layer):
        return whole("whole", f"blocks.{layer}.hook_resid_mid")
    here = f"blocks.{layer}.hook_resid_pre"
    return whole("whole", here, before) if layer else whole("whole", here, "hook_embed")


def has_mid(model: LanguageModel, layer: int) -> bool:
    """Whether a layer has a stream between a mixer and an MLP."""
    return f"blocks.{layer}.hook_resid_mid" in model.hook_dict


def mixers(model: LanguageModel, layer: int) -> list[Parts]:
    """Return what each mixer of a layer writes, as one part."""
    block = model.blocks[layer]
    if len(block.mixers) == 1:
        names = (*reversed(block.out_hooks), "hook_mixer_out")
        label = f"{layer}_{block.mixers[0].label}_out"
        return [whole(label, *(f"blocks.{layer}.{name}" for name in names))]
    post = [] if block.ln1_post is None else ["ln1_post.hook_scale"]
    found = []
    for i, mixer in enumerate(block.mixers):
        names = tuple(f"blocks.{layer}.{n}" for n in (*block.out_hooks, "hook_mixer_out", *post))
        values = partial(_one_of_several, block.ln1_post, i, f"blocks.{layer}.hook_mixer_out")
        found.append(Parts((f"{layer}_{mixer.label}_out",), (Way(names, values),)))
    return found


def mlp(model: LanguageModel, layer: int) -> Parts:
    """Return what an MLP or a mixture writes, as one part."""
    return whole(f"{layer}_{model.blocks[layer].mlp.label}_out", f"blocks.{layer}.hook_mlp_out")


def mixer_parts(model: LanguageModel, layer: int, path: str) -> Parts:
    """Return what each part of a mixer writes, such as heads, or all of it where it acts as one."""
    block = model.blocks[layer]
    number = block.mixer_paths.index(path)
    mixer, written = block.mixers[number], mixers(model, layer)[number]
    if not mixer.part_letter:
        return written
    return _split(mixer, block.ln1, (block.ln1_post, "ln1_post"), layer, written)


def head_results(model: LanguageModel, layer: int) -> Parts:
    """Return what each head of a layer's attention gives at `hook_result`."""
    attn = model.blocks[layer].attn
    return _split(attn, model.blocks[layer].ln1, (None, ""), layer, None)


def mlp_parts(model: LanguageModel, layer: int, which: PosSlice = None) -> Parts:
    """Return what each part of an MLP writes, neurons or experts; or all of it.

    Args:
        model: the model.
        layer: index of the block.
        which: of the parts; None means all.
    """
    block = model.blocks[layer]
    if not block.mlp.part_letter:
        return mlp(model, layer)
    post = (block.ln2_post, "ln2_post")
    return _split(block.mlp, block.ln2, post, layer, mlp(model, layer), which)


def letter(model: LanguageModel, layer: int) -> str | None:
    """Return what parts of an MLP are called: "N" neurons, "E" experts.

    None if it acts as one, or if there is none.
    """
    mlp = model.blocks[layer].mlp
    return None if mlp is None else mlp.part_letter


def _split(
    part: Part,
    before: RMSNorm | None,
    after: tuple[RMSNorm | None, str],
    layer: int,
    written: Parts | None,
    which: PosSlice = None,
) -> Parts:
    """Return the parts that a mixer or an MLP states, or some of them.

    Args:
        part: the mixer or the MLP.
        before: the norm that it reads through.
        after: the norm on what it writes, with its path in the block.
        layer: index of the block.
        written: the whole write.
        which: of the parts; None means all.
    """
    split = part.split(before)
    numbers, ways, bias = list(range(split.n)), split.ways, split.bias
    if which is not None:
        index = indices_on(which, split.n, "neurons", tuple_is_slice=True)
        numbers, ways = index.tolist(), tuple(_some(way, index) for way in ways)
    norm, path = after
    found: Float[Tensor, " d_model"] | Parts | None = bias
    if norm is not None:
        ways = tuple(_after_norm(way, norm, f"{path}.hook_scale") for way in ways)
        if bias is not None:
            way = Way((f"{path}.hook_scale",), partial(_constant_after_norm, norm, bias))
            found = Parts(("bias",), (_in_block(way, layer),))
    labels = tuple(f"L{layer}{part.part_letter}{i}" for i in numbers)
    return Parts(labels, tuple(_in_block(way, layer) for way in ways), found, written)


def _in_block(way: Way, layer: int) -> Way:
    return replace(way, names=tuple(f"blocks.{layer}.{name}" for name in way.names))


def _some(way: Way, index: Tensor) -> Way:
    """Return a way to some of the parts."""

    def values(*found: Tensor) -> Tensor:
        parts = way.values(*found)
        return parts[..., index.to(parts.device), :]

    def weight() -> Tensor:
        assert way.weight is not None
        return way.weight()[index.to(way.weight().device)]

    return Way(way.names, values, None if way.weight is None else weight)


def _after_norm(way: Way, norm: RMSNorm, scale: str) -> Way:
    """Return a way to the parts behind a norm, whose scale in the run is held fixed."""
    weigh = way.weight

    def values(*found: Tensor) -> Tensor:
        parts = at_least_fp32(way.values(*found[:-1])) * inverse(found[-1])[..., None]
        return parts if weigh is not None else parts * norm.w.to(parts)

    def weight() -> Tensor:
        assert weigh is not None
        return at_least_fp32(weigh()) * norm.w

    return Way((*way.names, scale), values, None if weigh is None else weight)


def _constant_after_norm(norm: RMSNorm, bias: Tensor, scale: Tensor) -> Tensor:
    return _as_one(inverse(at_least_fp32(scale)) * (at_least_fp32(bias) * norm.w).to(scale.device))


def _one_of_several(
    norm: RMSNorm | None, number: int, name: str, *found: Tensor
) -> Float[Tensor, "*batch_pos 1 d_model"]:
    """Return what one of several mixers added to the stream.

    Raises:
        ValueError: a hook has edited their sum, which is then no sum of theirs.
    """
    outs, added = [at_least_fp32(t) for t in found], found[-1]
    if norm is not None:
        *outs, scale = outs
        added = found[-2]
        outs = [out * inverse(scale) * norm.w.to(out) for out in outs[:-1]] + outs[-1:]
    *outs, whole = outs
    rounding = 8 * torch.finfo(added.dtype).eps * max(float(out.abs().max()) for out in outs)
    if float((sum(outs) - whole).abs().max()) > rounding:
        raise ValueError(
            f"{name!r} was edited in this run, and is the sum of several mixers' writes: edit one "
            "of these writes instead, or read the sum from the cache"
        )
    return _as_one(outs[number])


def inverse(scale: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """Return 1 / scale, and 0 at positions of a generation that a finished row did not read."""
    return torch.where(scale == 0, 0.0, scale.reciprocal())


def _as_one(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)
