"""Bytes of a model's state by the number of tokens read, of attention and of recurrence."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import astuple, dataclass
from typing import TYPE_CHECKING

import torch

from hooked_hybrid.config import HybridConfig, LayerConfig, MixerConfig
from hooked_hybrid.network.block_state import kept_dtype
from hooked_hybrid.network.mixers import mixer_of

if TYPE_CHECKING:
    import pandas as pd

POSITION = torch.int64.itemsize
"""Bytes of the position of a key, of a row's next position and of its document."""
IN_PART = {
    "k": "keys_values",
    "v": "keys_values",
    "pos": "key_positions",
    "conv": "convolution",
    "ssm": "recurrence",
}
"""The field of `StateBytes` for each tensor of a state; others are counted by whether they grow."""
_FAR = 2**40
"""Tokens at which a layer without a window is assumed to be larger than any recurrence."""


@dataclass(frozen=True)
class StateBytes:
    """Bytes of a state; `total` is `HybridState.n_bytes`.

    Examples:
        >>> from hooked_hybrid.accounting import state_bytes
        >>> size = state_bytes(model.cfg, 100)
        >>> size.keys_values, size.recurrence, size.total
        (12800, 2048, 19536)
    """

    keys_values: int = 0
    """Of attention: keys and values of the tokens that a later one may still see."""
    key_positions: int = 0
    """Of attention: the positions of these tokens."""
    convolution: int = 0
    """Of recurrences: the last inputs of the short convolutions."""
    recurrence: int = 0
    """Of recurrences: the states, which are fp32 in every narrower dtype."""
    counters: int = 0
    """Of the rows: next position and document."""

    @property
    def of_attention(self) -> int:
        """Keys, values and their positions."""
        return self.keys_values + self.key_positions

    @property
    def of_recurrence(self) -> int:
        """States and convolution inputs."""
        return self.convolution + self.recurrence

    @property
    def total(self) -> int:
        """The sum of all parts."""
        return self.of_attention + self.of_recurrence + self.counters

    def __add__(self, other: StateBytes) -> StateBytes:
        """Return the sum of each part."""
        return StateBytes(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))

    def __mul__(self, n: int) -> StateBytes:
        """Return `n` times as many."""
        return StateBytes(*(part * n for part in astuple(self)))


def state_bytes(
    cfg: HybridConfig, n_tokens: int, dtype: torch.dtype = torch.bfloat16, batch: int = 1
) -> StateBytes:
    """Return the size of the state after `n_tokens` tokens of each row, without padding.

    A window of `n_keys` keys, the query itself included, leaves `n_keys - 1` to remember. Space
    that a buffer reserves for later keys is not counted.

    Raises:
        ValueError: a number of tokens or a batch below 1.

    Examples:
        >>> from hooked_hybrid.accounting import state_bytes
        >>> _, state = model(tokens, return_state=True)
        >>> state_bytes(model.cfg, 16, torch.float32).total == state.n_bytes
        True
    """
    if n_tokens < 1 or batch < 1:
        raise ValueError(f"n_tokens={n_tokens}, batch={batch}: give 1 or more of each")
    row = StateBytes(counters=2 * POSITION)
    for layer in cfg.layers:
        row += layer_state_bytes(layer, n_tokens, dtype)
    return row * batch


def layer_state_bytes(cfg: LayerConfig, n_tokens: int, dtype: torch.dtype) -> StateBytes:
    """Return the bytes of one row of a layer's state; see `mixer_state_bytes`."""
    parts = (mixer_state_bytes(mixer, n_tokens, dtype) for mixer in cfg.mixers)
    return sum(parts, start=StateBytes())


def mixer_state_bytes(cfg: MixerConfig, n_tokens: int, dtype: torch.dtype) -> StateBytes:
    """Return the bytes of one row of a mixer's state, from its shapes.

    Raises:
        NotSupported: the mixer does not state the shapes of its state.
    """
    mixer, found = mixer_of(cfg), {part: 0 for part in IN_PART.values()}
    for name, shape in mixer.state_shapes(cfg).items():
        n = math.prod(shape) * (mixer.n_kept(cfg, n_tokens) if name in mixer.grows else 1)
        part = IN_PART.get(name, "keys_values" if name in mixer.grows else "recurrence")
        found[part] += n * kept_dtype(name, dtype).itemsize
    return StateBytes(**found)


def memory_table(
    cfg: HybridConfig,
    lengths: Iterable[int],
    dtypes: Iterable[torch.dtype] = (torch.bfloat16, torch.float32),
    batch: int = 1,
) -> pd.DataFrame:
    """Return a line for each dtype and length, in bytes.

    Returns:
        Columns `dtype`, `length`, those of `StateBytes`, `of_attention`, `of_recurrence`, `total`.

    Examples:
        >>> from hooked_hybrid.accounting import memory_table
        >>> memory_table(model.cfg, [64, 128], [torch.float32])["total"].tolist()
        [25616, 43024]
    """
    import pandas as pd

    lines = []
    for dtype in dtypes:
        for length in sorted(set(lengths)):
            size = state_bytes(cfg, length, dtype, batch)
            sums = {
                name: getattr(size, name) for name in ("of_attention", "of_recurrence", "total")
            }
            name = str(dtype).removeprefix("torch.")
            lines.append({"dtype": name, "length": length, **vars(size), **sums})
    return pd.DataFrame(lines)


def tokens_where_attention_is_larger(
    cfg: HybridConfig, dtype: torch.dtype = torch.bfloat16
) -> int | None:
    """Return the least number of tokens whose keys and values are larger than the recurrent states.

    None if they never are: a short window, or no attention layer.

    Examples:
        >>> from hooked_hybrid.accounting import PUBLISHED, tokens_where_attention_is_larger
        >>> tokens_where_attention_is_larger(PUBLISHED["jamba-mini"])
        979
    """
    mixers = [(mixer_of(of), of) for layer in cfg.layers for of in layer.mixers]
    windows = [mixer.window(of) for mixer, of in mixers if mixer.grows]
    last = _FAR if None in windows else max((w for w in windows if w is not None), default=1)

    def is_larger(n_tokens: int) -> bool:
        size = state_bytes(cfg, n_tokens, dtype)
        return size.of_attention > size.of_recurrence

    return bisect_left(range(last + 1), True, lo=1, key=is_larger) if is_larger(last) else None
