"""Results of patching, attribution, scores and lenses as arrays with named axes, for figures."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hooked_hybrid.analysis.attribution import Attribution
from hooked_hybrid.analysis.channels import GroupScores
from hooked_hybrid.analysis.lens import Lens
from hooked_hybrid.analysis.patch_grid import PatchGrid
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.hooks.names import GROUPS

Result = HeadScores | GroupScores | PatchGrid | Attribution | Lens
RESULTS = (HeadScores, GroupScores, PatchGrid, Attribution, Lens)
"""Taken by functions of `plots` in place of values and their labels."""
PATCHED, ATTRIBUTED = "change of the metric by patching", "attributed change of the metric"
HEADS, PLACES = ("head", "kv_head", "group"), ("pos", "query")


@dataclass(frozen=True)
class Shown:
    """Values to draw.

    Attributes:
        values: an axis for each entry of `axes`; rows of a batch are averaged over.
        axes: "layer", "name" or "depth", then "head", "kv_head", "group", "pos", "query", ...
        labels: of the entries of each axis.
        name: what was measured, with its unit.
    """

    values: Tensor
    axes: tuple[str, ...]
    labels: tuple[tuple[Any, ...], ...]
    name: str = ""

    @property
    def rows(self) -> list[str]:
        """The labels of the first axis."""
        return list(map(str, self.labels[0]))

    @property
    def row_axis(self) -> str:
        """The first axis in words, for the side of a figure."""
        return {"name": "hook point"}.get(self.axes[0], self.axes[0])

    def require(self, plot: str, *axes: Sequence[str]) -> None:
        """Refuse values that a figure does not show.

        Args:
            plot: the figure.
            axes: for each axis after the first, its possible names.

        Raises:
            ValueError: other axes; the message has them, and the ones that are shown.
        """
        fits = len(self.axes) == 1 + len(axes) and all(
            axis in known for axis, known in zip(self.axes[1:], axes, strict=True)
        )
        if not fits:
            wanted = " and ".join(known[0] for known in axes)
            raise ValueError(
                f"{plot} shows values by layer, depth or hook point and by {wanted}, and these "
                f"have axes {self.axes}: reduce them to these, or give values and labels"
            )

    def curves(self) -> list[str]:
        """Return a label for each entry of the axes after the first, flattened."""
        return [
            " ".join(f"{a} {b}" for a, b in zip(self.axes[1:], labels, strict=True))
            for labels in itertools.product(*self.labels[1:])
        ]

    def parts(self) -> list[str]:
        """Return a label for each value, in the order of `values.flatten()`."""
        return [_label(self.axes, labels) for labels in itertools.product(*self.labels)]


def shown(result: Result) -> Shown:
    """Return a result as values with labels.

    Raises:
        ValueError: an attribution whose points have different axes or sizes.
    """
    if isinstance(result, Lens):
        values = result.values
        values = values[:, 0] if values.ndim == 3 and values.shape[1] == 1 else values
        axes = ("depth", *("batch", "pos")[-max(values.ndim - 1, 1) :])[: values.ndim]
        labels = (tuple(result.labels), *(_range(values, i) for i in range(1, values.ndim)))
        return Shown(values, (*axes, *["d_vocab"] * (values.ndim - len(axes))), labels)
    if isinstance(result, PatchGrid):
        return _of_grid(result)
    if isinstance(result, Attribution):
        return _of_attribution(result)
    axes = ("layer", "head" if isinstance(result, HeadScores) else "group")
    return Shown(result.values, axes, (result.layers, _range(result.values, 1)), result.name)


def name_of(result: Result) -> str:
    """Return what a result measures, with its unit as far as it is known."""
    return ATTRIBUTED if isinstance(result, Attribution) else shown(result).name


def parts_of(result: Result) -> tuple[Tensor, list[str]]:
    """Return every value of a result and its label, also of an attribution to unlike points."""
    if not isinstance(result, Attribution):
        found = shown(result)
        return found.values.flatten(), found.parts()
    each = _each(result)
    values = torch.cat([one.values.flatten() for one in each])
    return values, [part for one in each for part in one.parts()]


def patterns_of(result: Attribution) -> tuple[Tensor, list[str]]:
    """Return the maps of an attribution to scores or patterns, [map query key], and their titles.

    Raises:
        ValueError: an attribution without axes of queries and keys.
    """
    maps, titles = [], []
    for one in _each(result):
        if one.axes[1:] != ("head", "query", "key"):
            raise ValueError(
                f"{one.labels[0][0]!r} has axes {one.axes[1:]}, and maps need (head, query, key): "
                "attribute with reduce=None, and give attribution['blocks.*.attn.hook_pattern']"
            )
        layer = one.labels[0][0].partition("_")[0]
        maps += [*one.values[0]]
        titles += [f"L{layer}H{head}" for head in one.labels[1]]
    return torch.stack(maps), titles


def short_name(name: str) -> str:
    """Return a hook name as the labels of parts have it: "2_z", "0_resid_pre", "embed"."""
    path = name.replace("hook_", "")
    if not name.startswith("blocks."):
        return path
    _, layer, rest = path.split(".", 2)
    group, _, leaf = rest.rpartition(".")
    return f"{layer}_{leaf if group in GROUPS or not group else rest}"


def _of_grid(grid: PatchGrid) -> Shown:
    values, axes, labels = grid.values, grid.axes, grid.labels
    while axes[-1] == "batch":
        values, axes, labels = values.mean(-1), axes[:-1], labels[:-1]
    if axes[0] == "name":
        labels = (tuple(map(short_name, labels[0])), *labels[1:])
    return Shown(values, axes, labels, PATCHED)


def _each(result: Attribution) -> list[Shown]:
    """Return the values of each point, without the rows of a batch."""
    found = []
    for name, value in result.values.items():
        axes = result.axes[name]
        if axes[:1] == ("batch",):
            value, axes = value.mean(0), axes[1:]
        labels = ((short_name(name),), *(_range(value, i) for i in range(value.ndim)))
        found.append(Shown(value[None], ("name", *axes), labels, ATTRIBUTED))
    return found


def _of_attribution(result: Attribution) -> Shown:
    each = _each(result)
    kind = (each[0].axes, each[0].values.shape)
    if unlike := [one for one in each if (one.axes, one.values.shape) != kind]:
        said = [
            f"{one.labels[0][0]} has axes {one.axes[1:]} of {tuple(one.values.shape[1:])}"
            for one in (each[0], unlike[0])
        ]
        raise ValueError(
            f"{said[0]} and {said[1]}: choose points of one kind, such as "
            'attribution["blocks.*.attn.hook_z"]'
        )
    names = tuple(one.labels[0][0] for one in each)
    values = torch.cat([one.values for one in each])
    return Shown(values, each[0].axes, (names, *each[0].labels[1:]), ATTRIBUTED)


def _range(values: Tensor, axis: int) -> tuple[int, ...]:
    return tuple(range(values.shape[axis]))


def _label(axes: Sequence[str], labels: Sequence[Any]) -> str:
    """Return the label of one value: "L2H1", or "2_z pos 3"."""
    if axes in (("layer", "head"), ("layer", "group")):
        return f"L{labels[0]}{axes[1][0].upper()}{labels[1]}"
    first = f"layer {labels[0]}" if axes[0] == "layer" else str(labels[0])
    return " ".join([first, *(f"{a} {b}" for a, b in zip(axes[1:], labels[1:], strict=True))])
