"""The state of one layer between two forwards: tensors, by name."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NoReturn, get_type_hints

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import pad


class BlockState:
    """The state of one layer: a frozen dataclass of tensors whose first axis is the batch.

    A class of states is found by the names of its tensors, which no other has. Those in `growing`
    have an axis of keys after the batch, one for each token that is remembered.
    """

    growing: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Let states that are read from a file be of this class."""
        super().__init_subclass__(**kwargs)
        if names := frozenset(cls.__annotations__):
            _CLASSES[names] = cls

    def tensors(self) -> dict[str, Tensor]:
        """Return its tensors by name."""
        return vars(self)

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> BlockState:
        """Return a state of the same kind with these tensors."""
        return type(self)(**tensors)

    def grows(self, name: str) -> bool:
        """Whether a tensor has an axis of keys."""
        return name in self.growing

    @property
    def n_keys(self) -> int:
        """Keys that are remembered; 0 where none are."""
        return self.tensors()[self.growing[0]].shape[1] if self.growing else 0


_CLASSES: dict[frozenset[str], type[BlockState]] = {}


class NoState(BlockState):
    """The empty state of a layer without a mixer."""


class JointState(BlockState):
    """The state of a layer with several mixers: the state of each, by its path in the block.

    Tensors are called after both ("attn.k"); `state.k` is the one that is called so in any of them.
    """

    def __init__(self, parts: Mapping[str, BlockState]) -> None:
        vars(self)["parts"] = dict(parts)
        growing = (f"{path}.{name}" for path, part in parts.items() for name in part.growing)
        vars(self)["growing"] = tuple(growing)

    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors of all, by path and name."""
        return {
            f"{path}.{name}": t
            for path, part in self.parts.items()
            for name, t in part.tensors().items()
        }

    def with_tensors(self, tensors: Mapping[str, Tensor]) -> JointState:
        """Return a state of the same kind with these tensors."""
        own: dict[str, dict[str, Tensor]] = {path: {} for path in self.parts}
        for name, t in tensors.items():
            path, _, leaf = name.partition(".")
            own[path][leaf] = t
        return JointState({path: self.parts[path].with_tensors(own[path]) for path in own})

    def __getattr__(self, name: str) -> Any:
        """Return a part by its path, or a tensor that one of the parts has under this name."""
        parts = vars(self).get("parts", {})
        if name in parts:
            return parts[name]
        found = [vars(part)[name] for part in parts.values() if name in vars(part)]
        if len(found) != 1:
            raise AttributeError(f"{len(found)} parts of this state have {name!r}: {list(parts)}")
        return found[0]

    def __setattr__(self, name: str, value: Any) -> NoReturn:
        """Refuse to change a state: it is a value."""
        raise dataclasses.FrozenInstanceError(f"cannot assign to field {name!r}")


@dataclass(frozen=True, eq=False)
class AttentionState(BlockState):
    """Keys and values that later queries may still see, oldest first.

    `k` is after rotation and after every hook. `pos` is the position of each key in its
    document, or -1 where a row has none (padding, or an earlier document).
    """

    growing = ("k", "v", "pos")

    k: Float[Tensor, "batch key kv_head d_head"]
    v: Float[Tensor, "batch key kv_head d_head"]
    pos: Int[Tensor, "batch key"]


@dataclass(frozen=True, eq=False)
class RecurrentState(BlockState):
    """The last inputs of the short convolution, oldest first, and the recurrence's state.

    `ssm` is fp32 (or wider) in every model dtype.
    """

    conv: Float[Tensor, "batch tap convolved"]
    ssm: Float[Tensor, "batch channel ..."]


FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def require_types(block: BlockState, where: str) -> None:
    """Refuse tensors of other dtypes or numbers of axes than the class of the state has.

    Raises:
        ValueError: it names the tensor.
    """
    if isinstance(block, JointState):
        for path, part in block.parts.items():
            require_types(part, f"{where}.{path}")
        return
    for name, kind in get_type_hints(type(block)).items():
        if name not in block.tensors():
            continue
        t = block.tensors()[name]
        usual = FLOATS if t.is_floating_point() else (torch.int64,)
        if not isinstance(t, kind) or t.dtype not in usual:
            raise ValueError(f"{where}.{name} has {t.ndim} axes of {t.dtype}: not of a state")
        if name == "pos" and bool((t < -1).any()):
            raise ValueError(f"{where}.pos is below -1")


def kept_dtype(name: str, dtype: torch.dtype) -> torch.dtype:
    """Return the dtype in which a model of some dtype keeps a tensor of its state."""
    name = leaf_of(name)
    if name == "pos":
        return torch.int64
    return torch.promote_types(dtype, torch.float32) if name == "ssm" else dtype


def leaf_of(name: str) -> str:
    """Return a tensor's name without the path of its mixer."""
    return name.rpartition(".")[2]


def _kind(block: BlockState, name: str) -> str:
    """Return which of `HybridState.replace`'s kinds a tensor is of."""
    if block.grows(name):
        return "kv"
    return "conv" if leaf_of(name) == "conv" else "ssm"


def block_of(tensors: Mapping[str, Tensor]) -> BlockState:
    """Return the state of a block whose tensors have these names."""
    parts: dict[str, dict[str, Tensor]] = {}
    for name, t in tensors.items():
        path, _, leaf = name.rpartition(".")
        parts.setdefault(path, {})[leaf] = t
    states = {path: class_of(own)(**own) for path, own in parts.items()}
    if "" in states or not states:
        return states.get("", NoState())
    return JointState(states)


def class_of(tensors: Mapping[str, Any]) -> type[BlockState]:
    """Return the class of states that consist of tensors of these names."""
    try:
        return _CLASSES[frozenset(tensors)]
    except KeyError:
        raise ValueError(f"no kind of layer keeps {', '.join(sorted(tensors))}") from None


def graft(mine: BlockState, theirs: BlockState, kinds: set[str], rows: Tensor) -> BlockState:
    """Return a state with tensors of some kinds taken from another where `rows` is true."""
    if type(mine) is not type(theirs) or mine.tensors().keys() != theirs.tensors().keys():
        raise ValueError("the donor's layers are of other kinds: both states must be of one model")
    if "kv" in kinds:
        mine, theirs = _same_number_of_keys(mine, theirs)
    own, others, new = mine.tensors(), theirs.tensors(), {}
    for name, t in own.items():
        donor = others[name]
        if _kind(mine, name) not in kinds:
            continue
        if donor.shape != t.shape:
            raise ValueError(
                f"the donor's {name} has shape {tuple(donor.shape)}, this state's {tuple(t.shape)}"
            )
        where = rows.to(t.device).view(-1, *(1,) * (t.ndim - 1))
        new[name] = torch.where(where, donor.to(t), t)
    return mine.with_tensors({**own, **new})


def _same_number_of_keys(*blocks: BlockState) -> tuple[BlockState, ...]:
    """Return states of one number of keys, those with fewer filled up on the left."""
    most = max(block.n_keys for block in blocks)
    return tuple(_widened(block, most - block.n_keys) for block in blocks)


def _widened(block: BlockState, more: int) -> BlockState:
    """Return a state with empty places before its keys."""
    if more == 0 or not block.growing:
        return block
    tensors = block.tensors()
    wider = {
        name: pad(t, (0, 0) * (t.ndim - 2) + (more, 0), value=-1 if leaf_of(name) == "pos" else 0)
        for name, t in tensors.items()
        if block.grows(name)
    }
    return block.with_tensors({**tensors, **wider})


def cat_blocks(parts: Sequence[BlockState]) -> BlockState:
    """Return one state of the rows of several."""
    parts = _same_number_of_keys(*parts)
    names = {(type(p), frozenset(p.tensors())) for p in parts}
    if len(names) != 1:
        raise ValueError("cat takes states of one model: their layers are of different kinds")
    tensors = [p.tensors() for p in parts]
    return parts[0].with_tensors(
        {name: torch.cat([of[name] for of in tensors]) for name in tensors[0]}
    )
