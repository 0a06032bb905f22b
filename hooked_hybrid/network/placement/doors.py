"""Running a model whose blocks lie in several places.

The residual stream and the layout are moved to a block's device before it runs, and its weights
with them where they are kept elsewhere; its state is made there and stays. accelerate's hooks do
this for modules whose inputs are tensors in lists and dicts; our modules take a layout and a state,
and their calls bypass `nn.Module.__call__`.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from hooked_hybrid.network.block_state import BlockState
from hooked_hybrid.network.layout import Layout
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.places import Place
from hooked_hybrid.shapes import Resid, Tokens


class Placement:
    """The places of a model's parts, and the moves into and out of its blocks.

    Args:
        model: has its weights in these places.
        places: of every part, see `places.resolve`.

    Examples:
        >>> from hooked_hybrid.network.placement import Placement, resolve
        >>> placement = Placement(model, resolve(model.cfg, {"": "cpu"}))
        >>> placement.device_map["blocks.0"], placement.is_on_one_device
        ('cpu', True)
    """

    def __init__(self, model: Network, places: Mapping[str, Place]) -> None:
        self.places = dict(places)
        blocks = [places[f"blocks.{i}"] for i in range(model.cfg.n_layers)]
        self.layer_devices = tuple(place.runs_on for place in blocks)
        self.brings_weights = any(place.is_streamed or place.on_disk for place in blocks)
        self._doors = [
            Door(block, place.runs_on, place.is_streamed)
            for block, place in zip(model.blocks, blocks, strict=True)
        ]

    @property
    def device_map(self) -> dict[str, str]:
        """The places by part, as `from_pretrained` takes them."""
        return {part: place.name for part, place in self.places.items()}

    @property
    def is_on_one_device(self) -> bool:
        """Whether every part is kept and runs on one device; some may be mapped from the disk."""
        return len({d for p in self.places.values() for d in (p.device, p.runs_on)}) == 1

    @contextmanager
    def inside(self, model: Network, i: int, layout: Layout) -> Iterator[Layout]:
        """Move block `i` to the device it runs on; `hook.run` has tensors on that device."""
        here = layout.on(self.layer_devices[i])
        device = torch.cuda.device(here.pos.device) if here.pos.is_cuda else nullcontext()
        door = self._doors[i]
        with device, door, door.graph(), model.running(here):  # kernels run on the current GPU
            yield here

    def run_block(
        self, model: Network, i: int, resid: Resid, state: BlockState | None, layout: Layout
    ) -> tuple[Resid, BlockState]:
        """Return the output of block `i`, on its device."""
        with self.inside(model, i, layout) as here:
            return model.blocks[i](resid.to(self.layer_devices[i]), state, here)

    def run_pieces(
        self,
        model: Network,
        tokens: Tokens,
        layout: Layout,
        states: Sequence[BlockState | None],
        piece: int,
    ) -> tuple[Iterator[Resid], Sequence[BlockState]]:
        """Return the residual stream of each piece after all blocks, and the blocks' states.

        Each block runs on all pieces before the next block does, so that its weights are moved
        once, not once for each piece; the values do not depend on this order.
        """
        parts = [layout.piece(at, at + piece) for at in range(0, layout.length, piece)]
        streams: list[Resid] = []
        after: list[BlockState] = []
        for part, own in zip(parts, tokens.split(piece, dim=1), strict=True):
            with model.running(part):
                streams.append(model.run_embed(own))
        for i, state in enumerate(states):
            with self._doors[i]:
                for number, part in enumerate(parts):
                    streams[number], state = self.run_block(model, i, streams[number], state, part)
            assert state is not None  # there is a piece
            after.append(state)
        return iter(streams), after

    def __reduce__(self) -> NoReturn:
        """Refuse to copy, which would read all weights into memory."""
        raise TypeError(
            "a model placed by a device_map is not copied or pickled: load it again with the same "
            "device_map and offload_folder"
        )


class Brought(NamedTuple):
    """The record in a graph of a weight that was moved: how to move it again."""

    kept: nn.Parameter
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Door:
    """Moves the weights of a block to the device it runs on, while any forward is inside.

    Otherwise they are in the place where they are kept. A graph for gradients holds no copy of
    them on the block's device: the backward pass moves each of them again.
    """

    def __init__(self, block: nn.Module, device: torch.device, is_streamed: bool) -> None:
        self.block, self.device, self.is_streamed = block, device, is_streamed
        self._lock, self._n_inside = threading.Lock(), 0
        self._kept: list[tuple[nn.Module, dict[str, Any]]] = []
        self._origins: dict[int, nn.Parameter] = {}

    def graph(self) -> AbstractContextManager[Any]:
        """Return a context in which operations of the block save their inputs for gradients."""
        if not self.is_streamed or not torch.is_grad_enabled():
            return nullcontext()
        return saved_tensors_hooks(self._saved, self._restored)

    def _saved(self, value: Tensor) -> Tensor | Brought:
        kept = self._origins.get(value.untyped_storage().data_ptr())
        if kept is None:
            return value.detach()  # otherwise a result would keep its own graph alive
        return Brought(kept, tuple(value.shape), value.stride(), int(value.storage_offset()))

    def _restored(self, saved: Tensor | Brought) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        again = saved.kept.detach().to(self.device)
        return again.as_strided(saved.shape, saved.stride, saved.offset)

    def __enter__(self) -> None:
        if self.is_streamed:
            with self._lock:
                self._n_inside += 1
                if self._n_inside == 1:
                    self._bring()

    def __exit__(self, *_: object) -> None:
        if self.is_streamed:
            with self._lock:
                self._n_inside -= 1
                if self._n_inside == 0:
                    self._let_go()

    def _bring(self) -> None:
        try:
            for module in self.block.modules():
                if own := {n: p for n, p in module._parameters.items() if p is not None}:
                    self._kept.append((module, own))
                    moved = {n: _there(p, self.device) for n, p in own.items()}
                    module._parameters.update(moved)
                    if self.device.type != "meta":  # there all storages have address 0
                        self._origins |= {
                            moved[n].untyped_storage().data_ptr(): p for n, p in own.items()
                        }
        except BaseException:
            self._let_go()
            self._n_inside -= 1
            raise

    def _let_go(self) -> None:
        for module, own in self._kept:
            module._parameters.update(own)
        self._kept, self._origins = [], {}


def _there(parameter: nn.Parameter, device: torch.device) -> Any:
    """Return a parameter's values on a device; gradients flow back to it if it needs them."""
    moved = parameter.to(device)
    return moved if parameter.requires_grad else nn.Parameter(moved, requires_grad=False)


def is_one_device(places: Mapping[str, Place]) -> bool:
    """Whether the places are all on one device, with nothing on the disk."""
    return len({(p.device, p.runs_on, p.on_disk) for p in places.values()}) == 1 and not any(
        p.on_disk for p in places.values()
    )
