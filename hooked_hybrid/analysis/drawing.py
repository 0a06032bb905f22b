"""Drawing functions for figures of analyses: colour scales, maps, labels of positions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes

UP, DOWN, TOTAL, GREY = "#0072B2", "#D55E00", "#444444", "#D9D9D9"
LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Colours that colour-blind readers can distinguish. Source: Okabe and Ito (2008)."""
MARKERS = "osD^vPX"
MOST_NAMED = 48
"""Up to this many positions, each is labelled with its token; beyond it some with numbers."""
MOST_WRITTEN = 400
"""Up to this many cells, each contains its value as text."""


class Scale(NamedTuple):
    """A colour map and the normalisation of its values."""

    colors: str
    norm: Any


def as_array(values: Any) -> np.ndarray:
    """Return values of a tensor on any device, an array or a list, in fp32."""
    return _as_tensor(values).detach().float().cpu().numpy()


def is_integer(values: Any) -> bool:
    """Whether values are whole numbers by their type."""
    return not _as_tensor(values).is_floating_point()


def _as_tensor(values: Any) -> torch.Tensor:
    if isinstance(values, list | tuple) and values and isinstance(values[0], torch.Tensor):
        return torch.stack(list(values))
    return torch.as_tensor(values)


def scale_of(maps: Iterable[np.ndarray], signed: bool | None = None, log: bool = False) -> Scale:
    """Return a scale for maps drawn side by side: from 0 up, or with white at 0 in the middle.

    Values that are all negative, such as log-probabilities, have a scale from the lowest to 0.
    """
    from matplotlib.colors import LogNorm, Normalize

    known = torch.cat([torch.from_numpy(m).flatten() for m in maps])
    known = known[known.isfinite()]
    low, high = (float(known.min()), float(known.max())) if known.numel() else (0.0, 1.0)
    if log:
        return Scale("Blues_r", LogNorm(1, max(high, 2)))
    if signed is None:
        signed = low < 0 < high
    if signed:
        most = max(abs(low), abs(high)) or 1.0
        return Scale("RdBu_r", Normalize(-most, most))
    if high <= 0 and low < 0:
        return Scale("Blues", Normalize(low, 0))
    return Scale("Blues", Normalize(0, high or 1.0))


def draw_map(
    axes: Axes,
    values: np.ndarray,
    scale: Scale,
    aspect: Literal["auto", "equal"] = "auto",
    written: str | None = None,
    texts: Sequence[Sequence[str]] | None = None,
) -> Any:
    """Draw a heat map, grey for missing values; return the object with its colours.

    Args:
        axes: to draw on.
        values: [row column].
        scale: colours.
        aspect: of the cells.
        written: format of the values to write into few cells.
        texts: to write into the cells instead.
    """
    axes.set_facecolor(GREY)
    image = axes.imshow(
        values, cmap=scale.colors, norm=scale.norm, aspect=aspect, interpolation="nearest"
    )
    if texts is None and (written is None or values.size > MOST_WRITTEN):
        return image
    for (i, j), value in ((at, float(values[at])) for at in _cells(values)):
        if texts is None and value != value:
            continue
        text = visible(texts[i][j]) if texts is not None else _number(str(written), value)
        color = "black" if value != value or _is_light(image, value) else "white"
        style: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": 7, "clip_on": True}
        axes.text(j, i, text, color=color, parse_math=False, **style)
    return image


def name_positions(
    axes: Axes, side: Literal["x", "y"], n: int, tokens: Sequence[str] | None, inches: float
) -> None:
    """Name the positions along a side by their tokens, or number some of them; () names none.

    Args:
        axes: to draw on.
        side: which.
        n: positions.
        tokens: text of each; None for numbers.
        inches: the available length.
    """
    from matplotlib.ticker import MaxNLocator

    ticks = axes.set_xticks if side == "x" else axes.set_yticks
    if tokens is not None and not len(tokens):
        ticks([])
    elif tokens is not None and n <= min(MOST_NAMED, 9 * inches):
        size = max(5, min(8, 60 * inches / n))
        turned: dict[str, Any] = {"rotation": 90} if side == "x" else {}
        names = [visible(token) for token in tokens]
        ticks(range(n), names, fontsize=size, parse_math=False, **turned)
    else:
        axis = axes.xaxis if side == "x" else axes.yaxis
        axis.set_major_locator(MaxNLocator(max(2, int(2 * inches)), integer=True))
        axes.tick_params(axis=side, labelsize=8)


def side_of(n: int, alone: bool) -> float:
    """Return the inches of a square map of `n` positions, one of several or alone."""
    return min(7.0 if alone else 3.2, max(3.2 if alone else 1.9, 0.2 * n))


def frame(axes: Axes, row: int, column: int) -> None:
    """Draw a frame around a cell."""
    from matplotlib.patches import Rectangle

    corner = (column - 0.5, row - 0.5)
    axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=DOWN, linewidth=2))


def visible(token: str) -> str:
    """Return a token's text with visible line breaks and outer blanks, cut if long."""
    text = token.replace("\n", "\\n").replace("\t", "\\t")
    lead, tail = len(text) - len(text.lstrip(" ")), len(text) - len(text.rstrip(" "))
    inner = text.strip(" ")
    text = "·" * lead + inner + "·" * tail if inner else "·" * len(text)
    return text if len(text) <= 12 else text[:11] + "…"


def _number(written: str, value: float) -> str:
    text = written.format(value)
    return text.removeprefix("-") if float(text) == 0 else text


def _cells(values: np.ndarray) -> list[tuple[int, int]]:
    return [(i, j) for i in range(values.shape[0]) for j in range(values.shape[1])]


def _is_light(image: Any, value: float) -> bool:
    red, green, blue, _ = image.cmap(image.norm(value))
    return bool(0.299 * red + 0.587 * green + 0.114 * blue > 0.55)
