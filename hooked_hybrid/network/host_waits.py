"""Detecting operations that the host waits for, before a CUDA graph is captured."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKING = torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape
UNTAGGED = ("multinomial",)
"""Operations that wait inside their GPU implementation, which cannot be seen from outside."""
READS = (Tensor.tolist, Tensor.numpy)
"""Methods that read a tensor without an operation."""
FROM_HOST = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)
"""Functions that make a tensor from Python numbers and copy it to its device."""


class AsksNothing(TorchDispatchMode):
    """Raises RuntimeError at operations that the host waits for, which cannot be captured.

    A failed capture leaves torch's random generator unusable. Other threads are not watched.

    Decoding runs below autograd, where composite operations arrive whole: they are decomposed, so
    that each part is checked.
    """

    only_watches = True
    """Tensors made inside this mode are valid outside it."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # else torch imports its compiler for the first operation: seconds

    def __init__(self) -> None:
        super().__init__()
        self._reads = _ReadsNothing()

    def __enter__(self) -> AsksNothing:
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._reads.__exit__(*error)
        super().__exit__(*error)

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if _is_made_of_others(func):
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        out = func(*args, **kwargs)
        if _asks(func, args, out):
            raise RuntimeError(f"the host waits for the result of {func}")
        return out


class _ReadsNothing(TorchFunctionMode):
    """Raises RuntimeError where numbers are copied to or from the host without an operation."""

    def __torch_function__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in READS:
            raise RuntimeError(f"the host waits for the result of {func.__name__}")
        out = func(*args, **(kwargs or {}))
        if func in FROM_HOST and out.device.type != "cpu":
            given = args[1:] if func is Tensor.new_tensor else args
            if not (given and isinstance(given[0], Tensor) and given[0].device == out.device):
                raise RuntimeError(f"the host waits for the numbers of {func.__name__}")
        return out


def _is_made_of_others(func: Any) -> bool:
    return bool(
        torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CompositeImplicitAutograd")
    )


def _asks(func: Any, args: tuple[Any, ...], out: Any) -> bool:
    """Return whether the host waits in an operation that returned `out`."""
    name = func.overloadpacket.__name__
    if name in ("index", "index_put", "index_put_"):  # a mask is searched for its True entries
        return any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1])
    if name in ("copy_", "_to_copy"):
        leaves = tree_leaves((args, out))
        return len({t.device for t in leaves if isinstance(t, Tensor)}) > 1
    if name == "lift_fresh":  # `torch.tensor` of numbers, after they were copied
        return bool(out.device.type != "cpu")
    return name in UNTAGGED or not {*func.tags}.isdisjoint(ASKING)
