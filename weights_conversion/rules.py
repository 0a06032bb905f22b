"""Conversion as a table: names on both sides, an invertible transform, strict accounting."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hooked_hybrid.config import HybridConfig
from weights_conversion.errors import CheckpointError
from weights_conversion.sources import TensorSource

LARGEST_WEIGHT = 1e12
"""A gated MLP multiplies three weights, whose product must be within float32's range. One flipped
top bit of an exponent gives 1e30 and more.
"""

Tensors = tuple[Tensor, ...]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Transform:
    """A map from source tensors to ours, and its exact inverse."""

    convert: Callable[[Tensors], Tensors]
    revert: Callable[[Tensors], Tensors]


def _cat(tensors: Sequence[Tensor], dim: int) -> Tensor:
    """Return `torch.cat`, which on the meta device would import the compiler of torch: 1.5 s."""
    if not tensors[0].is_meta:
        return torch.cat(tuple(tensors), dim)
    shapes = [list(t.shape) for t in tensors]
    length = sum(shape.pop(dim) for shape in shapes)
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError("tensors of different shapes")
    return tensors[0].new_empty([*shapes[0][:dim], length, *shapes[0][dim:]])


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    return _cat([t[None] for t in tensors], 0)


SAME = Transform(lambda t: t, lambda t: t)
CONV_TAPS = Transform(
    lambda t: (t[0].squeeze(1).transpose(0, 1),), lambda t: (t[0].transpose(0, 1)[:, None],)
)
"""A depthwise convolution [channel 1 tap] <-> [tap channel]."""
SPLIT_TRANSPOSED = Transform(
    lambda t: t[0].transpose(1, 2).unbind(),
    lambda t: (_stack(t).transpose(1, 2),),
)
"""Two matrices stacked as [2 in out] <-> two of [out in]."""
SPLIT_BIAS = Transform(
    lambda t: (t[0][0, 0, 0], t[0][1, 0, 0]),
    lambda t: (_stack(t)[:, None, None],),
)
"""Two biases stacked as [2 1 1 out] <-> two of [out]."""

SPLIT_ROWS = Transform(lambda t: t[0].chunk(2, dim=1), lambda t: (_cat(t, 1),))
"""Two stacks of matrices side by side as [n 2*out in] <-> two of [n out in]."""
STACK = Transform(lambda t: (_stack(t),), lambda t: t[0].unbind())
"""Separate matrices <-> one stack of them."""


@dataclass(frozen=True)
class Rule:
    """`sources` become `targets`; `{i}` in a name is the layer."""

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    transform: Transform = SAME

    def at(self, layer: int) -> Rule:
        """Return the rule with the layer filled in."""
        fill = lambda names: tuple(n.replace("{i}", str(layer)) for n in names)  # noqa: E731
        return Rule(fill(self.sources), fill(self.targets), self.transform)


def rule(source: str, target: str, transform: Transform = SAME) -> Rule:
    """Return a rule between names separated by blanks."""
    return Rule(tuple(source.split()), tuple(target.split()), transform)


def tied_head(cfg: HybridConfig) -> tuple[str, ...]:
    """Return the pattern of a tensor that is not needed: a tied head is the embedding again."""
    return (r"lm_head\.weight",) if cfg.tied_embedding else ()


def account(rules: Iterable[Rule], source: Shapes, target: Shapes, ignored: Sequence[str]) -> None:
    """Check that every source is used or ignored, every target filled, and all shapes agree.

    Args:
        rules: with layers filled in.
        source: shapes in the checkpoint.
        target: shapes of the model.
        ignored: patterns (`re.fullmatch`) of source names that are not needed.

    Raises:
        CheckpointError: listing what is missing, left over or of another shape; no tensor is read.
    """
    rules = list(rules)
    used = {name for r in rules for name in r.sources}
    problems = [f"missing: {name}" for name in sorted(used - source.keys())]
    problems += [
        f"unexpected: {name} {source[name]}"
        for name in sorted(source.keys() - used)
        if not any(re.fullmatch(pattern, name) for pattern in ignored)
    ]
    filled = [name for r in rules for name in r.targets]
    problems += [f"not filled: {name}" for name in sorted(target.keys() - set(filled))]
    problems += [f"filled twice: {name}" for name, n in sorted(Counter(filled).items()) if n > 1]
    for r in rules:
        if all(name in source for name in r.sources):
            problems += _shape_problems(r, source, target)
    if problems:
        shown = "\n  ".join(problems[:12])
        more = f"\n  ... and {len(problems) - 12} more" if len(problems) > 12 else ""
        raise CheckpointError(
            f"the checkpoint does not match its config in {len(problems)} places:\n  {shown}{more}"
        )


def require_layers(n_layers: int, source: Shapes) -> None:
    """Refuse a config with more layers than tensors, before any layer is made.

    Raises:
        CheckpointError: it has more.
    """
    if n_layers > len(source):
        raise CheckpointError(
            f"config.json: num_hidden_layers={n_layers}, but there are {len(source)} tensors"
        )


def convert(
    rules: Iterable[Rule], source: TensorSource, dtype: torch.dtype = torch.float32
) -> Iterator[tuple[str, Tensor]]:
    """Yield each of our tensors, reading one rule's sources at a time.

    Args:
        rules: with layers filled in.
        source: the tensors to read.
        dtype: that the tensors will be converted to; they are yielded as stored.

    Raises:
        CheckpointError: a tensor with an entry that is NaN, above `LARGEST_WEIGHT`, or beyond the
            range of that dtype.
    """
    for r in rules:
        read = tuple(_finite(name, source.read(name), dtype) for name in r.sources)
        yield from zip(r.targets, r.transform.convert(read), strict=True)


def _finite(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor after checking that its entries are within a dtype's range, in one pass."""
    least, most = (float(bound) for bound in tensor.detach().aminmax())  # NaN, if there is one
    largest = math.nan if math.isnan(least) else max(-least, most)
    if not largest <= LARGEST_WEIGHT:
        raise CheckpointError(
            f"{name} contains {'NaN' if math.isnan(largest) else f'{largest:g}'}, as no trained "
            f"model does: its data are damaged, download the checkpoint again"
        )
    if largest > torch.finfo(dtype).max:
        raise CheckpointError(
            f"{name} contains {largest:g}, which exceeds {dtype}: give a wider dtype"
        )
    return tensor


def revert(rules: Iterable[Rule], tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield each tensor under its name in the checkpoint: the inverse of `convert`."""
    for r in rules:
        back = r.transform.revert(tuple(tensors[name] for name in r.targets))
        yield from zip(r.sources, back, strict=True)


def _shape_problems(r: Rule, source: Shapes, target: Shapes) -> list[str]:
    """Return the shapes that a rule would produce, without data."""
    empty = tuple(torch.empty(source[name], device="meta") for name in r.sources)
    shown = ", ".join(f"{name} {source[name]}" for name in r.sources)
    try:
        converted = tuple(r.transform.convert(empty))
        back = r.transform.revert(converted)
    except (IndexError, RuntimeError, ValueError):
        converted, back = (), ()
    is_whole = [t.shape for t in back] == [t.shape for t in empty]  # otherwise a part would be lost
    if not is_whole or len(converted) != len(r.targets):
        return [f"{shown} has unexpected axes"]
    got = [tuple(t.shape) for t in converted]
    return [
        f"{shown} gives {name} the shape {shape}, the config gives {target[name]}"
        for name, shape in zip(r.targets, got, strict=True)
        if name in target and shape != target[name]
    ]
