"""A GPU that is not there: tensors that say they are on `cuda:0` and hold CPU numbers.

Every operation runs on the CPU, after the check that a GPU makes: all tensors on one device, but
for single numbers and for indices of a tensor on the GPU. What the host would wait for is noted.

    with PretendedGPU() as gpu:
        model = HookedHybrid(cfg, device="cuda")   # its values are real, its device is not
        model(tokens)
    gpu.waits, gpu.launches, gpu.attention

Unlike under `FakeTensorMode`, values can be read, so that checks, masks and choices by value run,
and results can be compared with a CPU's. Kernels that are not torch's must be replaced (`kernels`);
torch's fused attention is computed as it is defined, behind the choice that CUDA makes.

Limits: one GPU; inference mode takes composite operations apart only here; nothing is said of
speed, of memory, of the order of sums, or of what a kernel does with a layout.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import (
    TorchDispatchMode,
    _disable_current_modes,
    return_and_correct_aliasing,
)
from torch.utils._pytree import tree_map_only

from hooked_hybrid.network import elementwise
from hooked_hybrid.network.kernels import fused_attention
from tests.pretended_gpu.backends import backend

CUDA = torch.device("cuda", 0)
CPU = torch.device("cpu")
PROJECT = "/hooked_hybrid/"
NO_KERNEL = frozenset(
    "view _unsafe_view reshape expand permute transpose t select slice unsqueeze squeeze detach "
    "alias as_strided split split_with_sizes unbind empty empty_like new_empty empty_strided "
    "new_empty_strided _reshape_alias lift_fresh unfold diagonal view_as_real set_ resize_ "
    "is_same_size mT unsafe_split chunk movedim record_stream _local_scalar_dense".split()
)
"""Views, and other operations that launch nothing."""
WAITS = {
    "_local_scalar_dense": "item",
    "is_nonzero": "item",
    "nonzero": "nonzero",
    "masked_select": "masked_select",
    "_unique2": "unique",
    "_unique": "unique",
    "unique_dim": "unique",
    "unique_consecutive": "unique",
    "bincount": "bincount",
    "equal": "equal",
    "multinomial": "multinomial",
}
"""Operations inside which the host waits."""
COPIES = "copy_", "_copy_from", "_copy_from_and_resize"
INDEXING = "index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"


class Mixed(RuntimeError):
    """What a GPU says of tensors on two devices."""


def places(limit: int) -> tuple[str, ...]:
    """Return the frames of the project that are running, innermost first."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < limit:
        name = frame.f_code.co_filename
        if PROJECT in name:
            found.append(f"{name.split(PROJECT)[-1]}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(found) or ("the caller",)


class Pretended(Tensor):
    """CPU numbers that say they are on `cuda:0`."""

    elem: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, elem: Tensor) -> Pretended:
        return torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined, no-any-return]
            cls,
            elem.shape,
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            layout=elem.layout,
            device=CUDA,
            requires_grad=False,
        )

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    def __repr__(self, **_: Any) -> str:
        return f"Pretended({self.elem!r})"

    @property
    def data(self) -> Tensor:
        return Tensor.data.__get__(self)  # type: ignore[attr-defined]

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, Pretended):
            raise Mixed("data of another device")
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        self.elem = new.elem

    def data_ptr(self) -> int:
        return self.elem.data_ptr()

    def untyped_storage(self) -> Any:
        return self.elem.untyped_storage()

    def tolist(self) -> Any:
        PretendedGPU.entered().wait("tolist")
        return self.elem.tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy: use Tensor.cpu()")

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy: Tensor = Pretended(self.elem.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    def __format__(self, spec: str) -> str:
        return self.item().__format__(spec) if self.ndim == 0 else object.__format__(self, spec)

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return PretendedGPU.entered().run(func, args, kwargs or {})


def real(x: Any) -> Any:
    """Return a tree with the numbers of its pretended tensors."""
    return tree_map_only(Pretended, lambda t: t.elem.detach(), x)


def _pretended(x: Any) -> Any:
    kind = type(x)
    if kind is Tensor:
        return Pretended(x)
    if kind in (tuple, list):
        return kind(_pretended(t) for t in x)
    return Pretended(x) if isinstance(x, Tensor) and kind is not Pretended else x


PLAIN = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout})


def _inside(x: Any, tensors: list[Tensor]) -> Any:
    """Return arguments with the numbers of pretended tensors; add every tensor to the list."""
    kind = type(x)
    if kind is Pretended:
        tensors.append(x)
        return x.elem
    if kind in PLAIN:
        return x
    if isinstance(x, Tensor):
        tensors.append(x)
        return x
    if kind in (tuple, list):
        return kind([_inside(i, tensors) for i in x])
    return {key: _inside(i, tensors) for key, i in x.items()} if kind is dict else x


@contextlib.contextmanager
def on_the_numbers() -> Iterator[None]:
    """Run what stands for one kernel on CPU numbers, with no note of its operations."""
    with _disable_current_modes():
        yield


class Facts(NamedTuple):
    """What is asked of an operation each time it runs."""

    name: str
    has_aliases: bool
    """Whether a result may be an argument, or share its memory."""
    is_composite: bool


@functools.cache
def _facts_of(func: Any) -> Facts:
    has_aliases = any(r.alias_info is not None for r in func._schema.returns)
    has = torch._C._dispatch_has_kernel_for_dispatch_key
    is_composite = bool(has(func.name(), "CompositeImplicitAutograd"))
    return Facts(func.overloadpacket.__name__, has_aliases, is_composite)


class PretendedGPU(TorchDispatchMode):
    """The context in which `cuda` is a device.

    Args:
        capability: what the GPU says it is capable of.
        free: bytes it says are free.
    """

    current: ClassVar[PretendedGPU | None] = None
    only_watches = True  # constants are made once, as on a GPU, and forgotten afterwards

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # its check costs as much as an operation

    def __init__(self, capability: tuple[int, int] = (9, 0), free: int = 100 * 2**30) -> None:
        super().__init__()
        self.capability, self.free = capability, free
        self.reset()

    @classmethod
    def entered(cls) -> PretendedGPU:
        """Return the GPU whose context this is."""
        assert cls.current is not None, "a pretended tensor outside of its GPU"
        return cls.current

    def reset(self) -> None:
        """Forget what was noted."""
        self.waits: Counter[tuple[str, ...]] = Counter()
        self.launches: Counter[str] = Counter()
        self.attention: Counter[str] = Counter()
        self.host_work: Counter[str] = Counter()

    def wait(self, kind: str) -> None:
        """Note that the host waits."""
        self.waits[(kind, *places(2))] += 1

    # --- entering ---------------------------------------------------------------------------

    def __enter__(self) -> PretendedGPU:
        self._stack = contextlib.ExitStack()
        for name, value in self._cuda().items():
            patch = mock.patch.object(torch.cuda, name, value, create=True)
            self._stack.enter_context(patch)
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # so that `torch.tensor(device=)` comes here
        self._outer, PretendedGPU.current = PretendedGPU.current, self
        fused = fused_attention.scaled_dot_product_attention

        def attention(q: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return (self.attend if isinstance(q, Pretended) else fused)(q, *args, **kwargs)

        # Torch's own, which a CPU build cannot dispatch for CUDA.
        patch = mock.patch.object(fused_attention, "scaled_dot_product_attention", attention)
        self._stack.enter_context(patch)
        elementwise._constant.cache_clear()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)
        elementwise._constant.cache_clear()
        PretendedGPU.current = self._outer
        torch._C._set_only_lift_cpu_tensors(self._lifts)

    def _cuda(self) -> dict[str, Any]:
        """Return what `torch.cuda` says of this machine."""
        size = 141 * 10**9

        class Properties:
            major, minor = self.capability
            multi_processor_count, total_memory, name = 132, size, "pretended"

        def zero(*_: Any) -> int:
            return 0

        def nothing(*_: Any) -> None:
            return None

        return {
            "is_available": lambda: True,
            "is_initialized": lambda: True,
            "is_current_stream_capturing": lambda: False,
            "device_count": lambda: 1,
            "current_device": lambda: 0,
            "get_device_capability": lambda *_: self.capability,
            "get_device_properties": lambda *_: Properties,
            "mem_get_info": lambda *_: (self.free, size),
            "synchronize": lambda *_: self.wait("synchronize"),
            **dict.fromkeys(("_lazy_init", "empty_cache"), nothing),
            **dict.fromkeys(("memory_reserved", "memory_allocated"), zero),
            **dict.fromkeys(("_exchange_device", "_maybe_exchange_device"), zero),
        }

    # --- running ----------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, _types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return self.run(func, args, kwargs or {})

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what an operation gives, on the device on which a GPU would leave it."""
        name, has_aliases, is_composite = _facts_of(func)
        tensors: list[Tensor] = []
        inner_args = [_inside(x, tensors) for x in args]
        inner_kwargs = {key: _inside(x, tensors) for key, x in kwargs.items()} if kwargs else {}
        mine = [t for t in tensors if type(t) is Pretended]
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"]).type
        if wanted == "meta" or (not mine and wanted != "cuda"):
            if tensors and name not in NO_KERNEL:
                self.host_work[name] += 1
            return func(*args, **kwargs)
        infers = torch.is_inference_mode_enabled()
        if infers and is_composite:  # not taken apart by itself
            TorchDispatchMode.__enter__(self)
            try:
                return func.decompose(*args, **kwargs)
            finally:
                TorchDispatchMode.__exit__(self, None, None, None)
        self._check(func, name, args, tensors, mine, wanted)
        if wanted:
            inner_kwargs["device"] = CPU
        if "pin_memory" in inner_kwargs:
            inner_kwargs["pin_memory"] = False
        out = func(*inner_args, **inner_kwargs)
        if name not in NO_KERNEL:
            self.launches[name] += 1
        stays = isinstance(args[0], Pretended) if name == "copy_" else wanted != "cpu"
        if not stays:
            is_same = isinstance(out, Tensor) and any(
                out.data_ptr() == t.elem.data_ptr() for t in mine
            )
            return out.clone() if is_same and name in ("_to_copy", "to") else out
        if infers and mine and has_aliases and not mine[0].is_inference():
            # In inference mode too, a view of a tensor from outside counts its changes with it.
            with torch.inference_mode(False):
                out = _pretended(out)
        else:
            out = _pretended(out)
        if name == "_to_copy" or not mine or not has_aliases:
            return out
        return return_and_correct_aliasing(func, args, kwargs, out)

    def _check(
        self,
        func: Any,
        name: str,
        args: Any,
        tensors: list[Tensor],
        mine: list[Tensor],
        wanted: str | None,
    ) -> None:
        """Note what the host waits for; refuse what a GPU refuses."""
        others = [t for t in tensors if type(t) is not Pretended]
        if name in WAITS and mine:
            self.wait(WAITS[name])
        if name == "repeat_interleave" and "Tensor" in func._overloadname:
            self.wait("repeat_interleave")
        if name == "_to_copy":
            if mine and wanted == "cpu":
                self.wait("copy to the host")
            if others and wanted == "cuda":
                self.wait("copy to the GPU")
            return
        if name in COPIES:
            if mine and others:
                up = isinstance(args[0], Pretended)
                self.wait("copy to the GPU" if up else "copy to the host")
            return
        if name in INDEXING and isinstance(args[0], Pretended):
            others = self._check_indices(name, args, others)
        if mine and any(t.ndim for t in others):
            shapes = ", ".join(f"{t.device}{tuple(t.shape)}" for t in tensors)
            raise Mixed(f"{func}: {shapes}")

    def _check_indices(self, name: str, args: Any, others: list[Tensor]) -> list[Tensor]:
        """Note what indices make the host wait for; return tensors that are not indices."""
        indices = [i for i in args[1] if i is not None]
        masks = [i for i in indices if i.dtype in (torch.bool, torch.uint8)]
        fills = "put" in name and args[2].numel() == 1 and len(masks) == len(indices) == 1
        if masks and not fills:
            self.wait("index by a mask")
        for i in indices:
            if not isinstance(i, Pretended):
                self.wait("indices of the host")
        return [t for t in others if not any(t is i for i in indices)]

    # --- attention --------------------------------------------------------------------------

    def attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Return torch's attention as it is defined; note which kernel CUDA takes."""
        chosen = backend(q, k, v, attn_mask, is_causal, enable_gqa, self.capability)
        self.attention[chosen] += 1
        if enable_gqa:
            k, v = (t.repeat_interleave(q.shape[1] // t.shape[1], 1) for t in (k, v))
        before = self.launches.copy()
        scores = (q * q.shape[-1] ** -0.5) @ k.mT
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
        if attn_mask is None:
            weights = scores.softmax(-1)
        else:
            weights = scores.masked_fill(~attn_mask, -torch.inf).softmax(-1)
            weights = weights.masked_fill(~attn_mask.any(-1, keepdim=True), 0)  # as CUDA's do
        out = weights @ v
        self.launches = before
        self.launches["scaled_dot_product_attention"] += 1
        return out
