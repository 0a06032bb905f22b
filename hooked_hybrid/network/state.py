"""The state of a hybrid model between two forwards, as a value.

A forward takes a state and returns another; the one passed in is not changed. Every tensor has
the batch as its first axis, so that rows can be picked, repeated and exchanged.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid.hooks.slicing import Indices, indices_on
from hooked_hybrid.network.block_state import (
    BlockState,
    block_of,
    cat_blocks,
    graft,
    leaf_of,
    require_types,
)
from hooked_hybrid.outputs.foreign import one_line, parse_json, require_safetensors
from hooked_hybrid.outputs.whole_files import replacing

Rows = Indices
MOST_BLOCKS = 2**16
"""Of a file of others, so that one large number in it does not fill the memory."""


@dataclass(frozen=True, eq=False)
class HybridState:
    """The state of a whole model.

    States that follow one another may share memory: their tensors are to be read. Change a state by
    `replace`, or change the tensors of its `clone`.

    `next_pos` is the position of each row's next token in its document; `segment` is the id of
    that document (1 where no `segment_ids` were given). `n_seen` counts the tokens of every row
    where all rows have the same number and one document, else it is None.

    Examples:
        >>> logits, state = model(tokens, return_state=True)
        >>> model(torch.tensor([[answer]]), state=state).shape  # one more token
        torch.Size([1, 1, 583])
        >>> state.next_pos.tolist()
        [16]
    """

    blocks: tuple[BlockState, ...]
    next_pos: Int[Tensor, " batch"]
    segment: Int[Tensor, " batch"]
    n_seen: int | None = None

    @property
    def batch_size(self) -> int:
        """Number of rows."""
        return self.next_pos.shape[0]

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors, counting shared storage once per tensor."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    @property
    def device(self) -> torch.device:
        """Device of the row counters; blocks live with their layers."""
        return self.next_pos.device

    def __eq__(self, other: object) -> bool:
        """Whether every tensor is the same, bit for bit."""
        if not isinstance(other, HybridState) or self.n_seen != other.n_seen:
            return False
        mine, theirs = self.tensors(), other.tensors()
        return mine.keys() == theirs.keys() and all(
            torch.equal(t, theirs[name].to(t.device)) for name, t in mine.items()
        )

    __hash__ = None  # type: ignore[assignment]

    def detach(self) -> HybridState:
        """Return the state without its graph.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> state.tensors()["blocks.2.k"].requires_grad
            True
            >>> state.detach().tensors()["blocks.2.k"].requires_grad
            False
        """
        return self._map(lambda t: t.detach())

    def clone(self) -> HybridState:
        """Return the state in memory of its own.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> state.clone().n_bytes == state.n_bytes
            True
        """
        return self._map(lambda t: t.clone())

    def fork(self, n: int) -> HybridState:
        """Return a state with each row `n` times in a row: 0 0 1 1 for two rows and n = 2.

        Raises:
            ValueError: `n` is not positive.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> state.fork(3).batch_size
            3
        """
        if n < 1:
            raise ValueError(f"fork({n}): give the number of copies of each row, 1 or more")
        return self._map(lambda t: t.repeat_interleave(n, dim=0))

    def __getitem__(self, rows: Rows) -> HybridState:
        """Return the state of some rows, in the order given; an int keeps the batch axis.

        Raises:
            IndexError: a row that is not there, or a mask of another number of rows.
            ValueError: fractions, or what chooses no rows.
        """
        index = self._indices(rows)
        return self._map(lambda t: t[index.to(t.device)])

    def to(
        self,
        device: torch.device | str | Sequence[torch.device] | None = None,
        dtype: torch.dtype | None = None,
    ) -> HybridState:
        """Return the state on a device, with keys, values and convolution inputs in a dtype.

        Args:
            device: for everything; or a device for each block (`model.layer_devices`).
            dtype: None leaves each part its own.

        Raises:
            ValueError: another number of devices than of blocks.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> state.to(dtype=torch.bfloat16).tensors()["blocks.2.k"].dtype
            torch.bfloat16
        """
        n, counters, devices = len(self.blocks), None, []
        if device is None or isinstance(device, (torch.device, str)):
            counters, devices = device, [device] * n
        else:
            devices = [*device]  # the counters stay: a forward takes them to its layers
        if len(devices) != n:
            raise ValueError(f"{len(devices)} devices for a state of {n} blocks")

        def moved(name: str, t: Tensor, to: Any) -> Tensor:
            keeps_dtype = leaf_of(name) in ("ssm", "pos") or not t.is_floating_point()
            return t.to(device=to, dtype=None if keeps_dtype else dtype)

        blocks = tuple(
            b.with_tensors({name: moved(name, t, to) for name, t in b.tensors().items()})
            for b, to in zip(self.blocks, devices, strict=True)
        )
        return dataclasses.replace(
            self,
            blocks=blocks,
            next_pos=self.next_pos.to(device=counters),
            segment=self.segment.to(device=counters),
        )

    def replace(
        self,
        other: HybridState,
        kinds: Collection[str] = ("ssm", "conv", "kv"),
        layers: Collection[int] | None = None,
        rows: Rows | None = None,
    ) -> HybridState:
        """Return this state with parts taken from another of the same model.

        Args:
            other: the donor; row i gives to row i.
            kinds: any of "ssm" (recurrent state, and whatever else a kind of layer keeps), "conv"
                (convolution inputs), "kv" (keys, values and their positions).
            layers: block indices; None means all.
            rows: rows that receive; None means all.

        Returns:
            A state that counts positions as this one does. Where the two hold different numbers
            of keys, the shorter is filled up on the left with empty places.

        Raises:
            ValueError: unknown kinds, a layer out of range, or a donor of another shape.
            IndexError: a row out of range, or a mask of another number of rows.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> _, other = model(tokens.flip(1), return_state=True)
            >>> mixed = state.replace(other, kinds=["ssm"], layers=[0])
            >>> torch.equal(mixed.tensors()["blocks.0.ssm"], other.tensors()["blocks.0.ssm"])
            True
        """
        kinds = {kinds} if isinstance(kinds, str) else set(kinds)
        if unknown := kinds - {"ssm", "conv", "kv"}:
            raise ValueError(f"state kinds are 'ssm', 'conv' and 'kv', not {sorted(unknown)}")
        if other.batch_size != self.batch_size or len(other.blocks) != len(self.blocks):
            raise ValueError(
                f"the donor has {other.batch_size} rows and {len(other.blocks)} blocks, this state "
                f"{self.batch_size} and {len(self.blocks)}; both must be of one model and batch"
            )
        chosen = set(range(len(self.blocks))) if layers is None else set(layers)
        if outside := [i for i in chosen if not 0 <= i < len(self.blocks)]:
            raise ValueError(f"no block {outside}: there are {len(self.blocks)}, from 0")
        where = torch.full((self.batch_size,), rows is None, device=self.device)
        if rows is not None:
            where[self._indices(rows)] = True
        blocks = tuple(
            graft(mine, theirs, kinds, where) if i in chosen else mine
            for i, (mine, theirs) in enumerate(zip(self.blocks, other.blocks, strict=True))
        )
        # The donor's keys may have other positions, so no assumption on them remains.
        return dataclasses.replace(
            self, blocks=blocks, n_seen=None if "kv" in kinds else self.n_seen
        )

    @classmethod
    def cat(cls, states: Sequence[HybridState]) -> HybridState:
        """Return one state with the rows of several, in order.

        Where they hold different numbers of keys, the shorter are filled up on the left with
        empty places.

        Raises:
            ValueError: no state, or states of different models.

        Examples:
            >>> from hooked_hybrid import HybridState
            >>> _, state = model(tokens, return_state=True)
            >>> HybridState.cat([state, state]).batch_size
            2
        """
        if not states or len({len(s.blocks) for s in states}) != 1:
            raise ValueError("cat takes one or more states of one model")
        blocks = tuple(cat_blocks(parts) for parts in zip(*(s.blocks for s in states), strict=True))
        n_seen = {s.n_seen for s in states}
        return cls(
            blocks,
            torch.cat([s.next_pos for s in states]),
            torch.cat([s.segment for s in states]),
            n_seen.pop() if len(n_seen) == 1 else None,
        )

    # --- as plain tensors ---------------------------------------------------------------------

    def tensors(self) -> dict[str, Tensor]:
        """Return every tensor by a name such as `blocks.2.k`.

        Examples:
            >>> _, state = model(tokens, return_state=True)
            >>> state.tensors()["blocks.2.k"].shape
            torch.Size([1, 16, 1, 16])
        """
        named = {
            f"blocks.{i}.{name}": t
            for i, b in enumerate(self.blocks)
            for name, t in b.tensors().items()
        }
        return {**named, "next_pos": self.next_pos, "segment": self.segment}

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Examples:
            >>> from hooked_hybrid import HybridState
            >>> _, state = model(tokens, return_state=True)
            >>> state.save("state.safetensors")
            >>> HybridState.load("state.safetensors").next_pos.tolist()
            [16]
        """
        tensors = {name: t.detach().contiguous().clone() for name, t in self.tensors().items()}
        with replacing(Path(path)) as partial:
            about = {"n_seen": json.dumps(self.n_seen), "n_blocks": json.dumps(len(self.blocks))}
            save_file(tensors, partial, metadata=about)

    @classmethod
    def load(cls, path: str | os.PathLike[str], device: str = "cpu") -> HybridState:
        """Read a state that `save` wrote.

        Raises:
            FileNotFoundError, safetensors.SafetensorError: no such file, or no safetensors file.
            ValueError: a pipe or the like, or a safetensors file that holds something else.

        Examples:
            >>> from hooked_hybrid import HybridState
            >>> _, state = model(tokens, return_state=True)
            >>> state.save("prompt.safetensors")
            >>> HybridState.load("prompt.safetensors").batch_size
            1
        """
        require_safetensors(Path(path))
        with safe_open(path, "pt", device=device) as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            about = file.metadata() or {}
            n_seen, n_blocks = (
                parse_json(about.get(name, "null"), path) for name in ("n_seen", "n_blocks")
            )
        if not {"next_pos", "segment"} <= tensors.keys():
            raise ValueError(f"{path} holds no state: write one with state.save(path)")
        try:
            for name, value in (("n_seen", n_seen), ("n_blocks", n_blocks)):
                if value is not None and (type(value) is not int or value < 0):
                    raise ValueError(f"{name}={one_line(value)}")
            state = cls.from_tensors(tensors, n_seen, n_blocks)
            state._require_types()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no whole state ({one_line(error)})") from error
        return state

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], n_seen: int | None = None, n_blocks: int | None = None
    ) -> HybridState:
        """Rebuild a state from `tensors()`.

        Args:
            tensors: by name.
            n_seen: as in the state.
            n_blocks: of the model; None means up to the last one that has a tensor, which is right
                unless layers without a mixer follow it.

        Raises:
            ValueError: names that no state has, or blocks beyond `n_blocks`.

        Examples:
            >>> from hooked_hybrid import HybridState
            >>> _, state = model(tokens, return_state=True)
            >>> HybridState.from_tensors(state.tensors(), n_seen=16).next_pos.tolist()
            [16]
        """
        parts: dict[int, dict[str, Tensor]] = {}
        for name, t in tensors.items():
            if name.startswith("blocks."):
                _, index, leaf = name.split(".", 2)
                parts.setdefault(int(index), {})[leaf] = t
        n = max(parts, default=-1) + 1 if n_blocks is None else n_blocks
        if outside := [i for i in parts if not 0 <= i < min(n, MOST_BLOCKS)]:
            raise ValueError(f"a tensor of block {outside[0]}, of {min(n, MOST_BLOCKS)}")
        blocks = tuple(block_of(parts.get(i, {})) for i in range(min(n, MOST_BLOCKS)))
        return cls(blocks, tensors["next_pos"], tensors["segment"], n_seen)

    # --- inside -------------------------------------------------------------------------------

    def _map(self, fn: Callable[[Tensor], Tensor]) -> HybridState:
        blocks = tuple(
            b.with_tensors({name: fn(t) for name, t in b.tensors().items()}) for b in self.blocks
        )
        return dataclasses.replace(
            self, blocks=blocks, next_pos=fn(self.next_pos), segment=fn(self.segment)
        )

    def _require_types(self) -> None:
        """Refuse tensors that no forward returns, such as those of a file of others.

        Raises:
            ValueError: another number of rows or axes, another dtype, or a position below 0.
        """
        counters = {"next_pos": self.next_pos, "segment": self.segment}
        for name, t in self.tensors().items():
            if t.ndim == 0 or len(t) != self.batch_size:
                raise ValueError("its tensors are of other numbers of rows")
            if name in counters and (t.ndim != 1 or t.dtype != torch.int64):
                raise ValueError(f"{name} has {t.ndim} axes of {t.dtype}, not one of torch.int64")
        for i, block in enumerate(self.blocks):
            require_types(block, f"blocks.{i}")
        if bool((self.next_pos < 0).any()):
            raise ValueError("next_pos is below 0")

    def _indices(self, rows: Any) -> Tensor:
        try:
            return indices_on(rows, self.batch_size, "rows", may_be_empty=True).to(self.device)
        except TypeError as error:
            raise ValueError(str(error)) from error
