"""What each part of a layer writes to the residual stream, from what a run left in its cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.hooks.slicing import PosSlice, indices_on
from hooked_hybrid.network.layers import RMSNorm
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.part import Part
from hooked_hybrid.network.written import Way

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel


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


def mixer_parts(model: LanguageModel, layer: int) -> Parts:
    """Return what each part of a mixer writes, such as heads, or all of it where it acts as one."""
    block, written = model.blocks[layer], mixer(model, layer)
    if not block.any_mixer.part_letter:
        return written
    return _split(block.any_mixer, block.ln1, layer, written)


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
    return _split(block.mlp, block.ln2, layer, mlp(model, layer), which)


def letter(model: LanguageModel, layer: int) -> str | None:
    """Return what parts of an MLP are called: "N" neurons, "E" experts, None if it acts as one."""
    return mlp_of(model.cfg.layers[layer].mlp).part_letter


def _split(part: Part, norm: RMSNorm, layer: int, written: Parts, which: PosSlice = None) -> Parts:
    """Return the parts that a mixer or an MLP states, or some of them."""
    split = part.split(norm)
    numbers, ways = list(range(split.n)), split.ways
    if which is not None:
        index = indices_on(which, split.n, "neurons", tuple_is_slice=True)
        numbers, ways = index.tolist(), tuple(_some(way, index) for way in ways)
    ways = tuple(
        replace(way, names=tuple(f"blocks.{layer}.{name}" for name in way.names)) for way in ways
    )
    labels = tuple(f"L{layer}{part.part_letter}{i}" for i in numbers)
    return Parts(labels, ways, split.bias, written)


def _some(way: Way, index: Tensor) -> Way:
    """Return a way to some of the parts."""

    def values(*found: Tensor) -> Tensor:
        parts = way.values(*found)
        return parts[..., index.to(parts.device), :]

    def weight() -> Tensor:
        assert way.weight is not None
        return way.weight()[index.to(way.weight().device)]

    return Way(way.names, values, None if way.weight is None else weight)


def _as_one(x: Tensor) -> Tensor:
    return x.unsqueeze(-2)
