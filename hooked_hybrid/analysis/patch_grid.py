"""The effects of patching: a number for each patched location, with labels."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float
from torch import Tensor

from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.hooks.names import HookNameError, is_shorthand, resolve
from hooked_hybrid.network.finite import require_numbers


@dataclass(frozen=True)
class PatchGrid:
    """A grid of effects of patching.

    Attributes:
        values: metric(patched) - metric(corrupted), or the metric itself with `difference=False`.
        axes: of `values`: "name" or "layer", then "pos", "head"; "batch" last if the metric has
            one value for each row.
        labels: for each axis, the labels of its entries.

    Examples:
        >>> grid = analysis.patch_heads(model, riga, cache, metric, verbose=False)
        >>> grid.axes, grid.values.shape
        (('layer', 'head'), torch.Size([2, 8]))
    """

    values: Float[Tensor, "*axes"]
    axes: tuple[str, ...]
    labels: tuple[tuple[Any, ...], ...]

    def __getitem__(self, labels: Any) -> Tensor:
        """Return the entry of some labels, in the order of the axes; later axes may be left out.

        Args:
            labels: of the axis "name", a hook name in any spelling that fits one of them.

        Raises:
            KeyError: a label that an axis does not have, or more labels than axes.
        """
        found = self.values
        labels = labels if isinstance(labels, tuple) else (labels,)
        if self.axes[0] == "name":
            labels = self._with_full_name(labels)
        if len(labels) > len(self.axes):
            raise KeyError(f"{labels}: the axes are {self.axes}")
        for axis, label, known in zip(self.axes, labels, self.labels, strict=False):
            if label not in known:
                raise KeyError(f"{axis} {label!r}: there are {known}")
            found = found[known.index(label)]
        return found

    def _with_full_name(self, labels: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return the labels, the first one as a full name; alone it may be `("z", 2)`."""
        names = self.labels[0]
        last = max((int(n.split(".")[1]) for n in names if n.startswith("blocks.")), default=-1)
        try:
            return (resolve(labels[0], names, last + 1), *labels[1:])
        except HookNameError:
            if not is_shorthand(labels):
                raise
            return (resolve(labels, names, last + 1),)

    def top(self, n: int) -> list[tuple[tuple[Any, ...], float]]:
        """Return the labels and values of the `n` entries furthest from 0, the furthest first.

        Raises:
            ValueError: a value that is NaN.

        Examples:
            >>> values = torch.tensor([[0.5, 2.0], [-3.0, 0.0]])
            >>> grid = analysis.PatchGrid(values, ("layer", "pos"), ((0, 1), (7, 15)))
            >>> grid.top(2)
            [((1, 7), -3.0), ((0, 15), 2.0)]
        """
        require_numbers(self.values, f"the grid of {self.axes}")
        flat = self.values.flatten()
        order = flat.abs().argsort(descending=True, stable=True)[:n].tolist()
        labels = list(itertools.product(*self.labels))
        return [(labels[i], float(flat[i])) for i in order]

    def head_scores(self, name: str = "change of the metric by patching") -> HeadScores:
        """Return a grid of layers and heads, averaged over rows, as scores of heads.

        Raises:
            ValueError: a grid of other axes.

        Examples:
            >>> grid = analysis.PatchGrid(torch.rand(2, 2), ("layer", "head"), ((2, 5), (0, 1)))
            >>> grid.head_scores().layers
            (2, 5)
        """
        if self.axes[:2] != ("layer", "head") or self.axes[2:] not in ((), ("batch",)):
            raise ValueError(f"scores of heads need axes ('layer', 'head'), not {self.axes}")
        values = self.values if self.axes[2:] == () else self.values.mean(-1)
        return HeadScores(tuple(self.labels[0]), values, name)
