"""`OnePosition`: the tensor of one position that hooks at a stepwise point are given."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

ONCE_A_POSITION = (
    "hooks here are called once a position, with one entry on the position axis: to act at some "
    "positions use interventions.hook_at(fn, positions) or edit_state(fn, positions); a function "
    "marked per_position is meant for each"
)


class OnePosition(Tensor):
    """The value passed to a hook at a point that is called once a position.

    While the hook runs, selecting on the position axis is an error: `h[:, -1]` would be the
    current position, not the last one.

    Examples:
        >>> shapes = set()
        >>> def note(state, hook):
        ...     shapes.add(tuple(state.shape))
        >>> hooks = [("blocks.0.mixer.hook_ssm_state", note)]
        >>> hooked = model.run_with_hooks(tokens, fwd_hooks=hooks)
        >>> shapes  # one position at a time
        {(1, 1, 128)}
    """

    point_name: str
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def of(cls, value: Tensor, name: str) -> OnePosition:
        """Return a view of the value as `OnePosition`."""
        here = value.as_subclass(cls)
        here.point_name = name
        return here

    def close(self) -> None:
        """Become a plain tensor: the hook has returned, and may have kept a reference."""
        del self.point_name
        self.__class__ = Tensor  # type: ignore[assignment]

    def __getitem__(self, index: Any) -> Tensor:
        """Return a selection on other axes than that of positions."""
        self._check(index)
        return super().__getitem__(index)

    def __setitem__(self, index: Any, value: Any) -> None:
        """Write to a selection on other axes than that of positions."""
        self._check(index)
        super().__setitem__(index, value)

    def _check(self, index: Any) -> None:
        if _axis_1(index, self.ndim) != slice(None):
            raise IndexError(
                f"{self.point_name!r} comes one position at a time: an index on axis 1"
            )


def _axis_1(index: Any, ndim: int) -> Any:
    """Return the part of an index for axis 1: all, if it is shorter or has a wide mask."""
    entries = [i for i in (index if isinstance(index, tuple) else (index,)) if i is not None]
    if any(getattr(i, "ndim", 1) != 1 and getattr(i, "dtype", 0) == torch.bool for i in entries):
        return slice(None)
    gap = next((at for at, i in enumerate(entries) if i is ...), len(entries))
    entries[gap : gap + 1] = [slice(None)] * (ndim - len(entries) + (gap < len(entries)))
    return entries[1] if len(entries) > 1 and isinstance(entries[1], slice) else entries[1:2]
