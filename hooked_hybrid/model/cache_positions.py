"""What a cache says of positions: which it holds, where padding is, and reading past it.

Padding may stand on the left or on the right of a row, so that index -1 is not each row's last
token. `cache.attention_mask` says where tokens are; `last_token`, `mean_over_pos` and `unpadded`
read a value without what stands at padding. Positions are those of the document, counted from 0.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks.names import Shorthand
from hooked_hybrid.hooks.places import Places, last_index, take_per_row
from hooked_hybrid.hooks.slicing import PosSlice, read_indices
from hooked_hybrid.network.layout import lay_out
from hooked_hybrid.outputs.foreign import one_line, parse_json, require_safetensors
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    from hooked_hybrid.model.language_model import LanguageModel

_PLACES = "places."
_FORMAT = "hooked_hybrid.ActivationCache"

C = TypeVar("C", bound="CachePositions")


class CachePositions:
    """The methods of `ActivationCache` that use positions, and those that keep it on disk."""

    cache_dict: dict[str, Tensor]
    places: dict[str, Places]
    axes: dict[str, tuple[str, ...]]
    has_batch_dim: bool
    pos_slice: PosSlice
    n_layers: int

    if TYPE_CHECKING:

        def full_name(self, key: Shorthand) -> str: ...  # noqa: D102

    @property
    def attention_mask(self) -> Int[Tensor, "*batch pos"]:
        """1 at tokens and 0 at padding, for the positions that values hold.

        In a cache of a generation also 0 where a row had ended. (Fewer logits may have been
        computed than positions: `positions(name)` is that of one value.)

        Raises:
            ValueError: no value has positions, or the cache was made by hand without a mask.
        """
        return (self.positions() >= 0).long()

    def positions(self, name: Shorthand | None = None) -> Int[Tensor, "*batch pos"]:
        """Return the position in its document of each entry, -1 at padding.

        Args:
            name: of which value; None means the one with the most positions.

        Raises:
            HookNameError: no such value.
            ValueError: as `attention_mask`.
        """
        if name is not None:
            full = self.full_name(name)
            pos = self.pos_of(full)
        else:
            known = [self.places[n].pos for n in self.cache_dict if n in self.places]
            if not known:
                known = [p for n in self.cache_dict if (p := self._counted(n)) is not None][:1]
            if not known:
                raise ValueError("no value of this cache has positions")
            full, pos = next(iter(self.cache_dict)), max(known, key=lambda p: p.shape[1])
        pos = pos.to(self.cache_dict[full].device, copy=True)
        return pos if self.has_batch_dim else pos[0]

    def last_token(self, name: Shorthand) -> Float[Tensor, ...]:
        """Return a value at each row's last token, without the axis of positions.

        Scores and patterns keep their keys [batch head key].

        Raises:
            HookNameError: no such value.
            IndexError: a row's last token was not kept.
            ValueError: the value has no positions.
        """
        full = self.full_name(name)
        value, dim = self._batched(full)
        index = last_index(self.pos_of(full), full)
        return self._unbatched(take_per_row(value, index, dim).squeeze(dim))

    def mean_over_pos(self, name: Shorthand) -> Float[Tensor, ...]:
        """Return the mean of a value over each row's tokens, summed in fp32 or wider.

        Raises:
            HookNameError: no such value.
            ValueError: the value has no positions, or a row no token among them.
        """
        full = self.full_name(name)
        value, dim = self._batched(full)
        is_real = (self.pos_of(full) >= 0).to(value.device)
        n = is_real.sum(1)
        if bool((n == 0).any()):
            raise ValueError(f"{full!r} holds no token of row {int((n == 0).nonzero()[0])}")
        shape = [1] * value.ndim
        shape[0], shape[dim] = is_real.shape
        wide = value.to(torch.promote_types(value.dtype, torch.float32))
        total = wide.masked_fill(~is_real.view(shape), 0).sum(dim)
        return self._unbatched((total / n.view(-1, *(1,) * (total.ndim - 1))).to(value.dtype))

    def unpadded(self, name: Shorthand) -> list[Tensor]:
        """Return a value of each row at its tokens alone: copies of different lengths.

        Scores and patterns lose the keys at padding too.

        Raises:
            HookNameError: no such value.
            ValueError: the value has no positions.
        """
        full = self.full_name(name)
        value, dim = self._batched(full)
        pos, keys = self.pos_of(full), self._key_pos_of(full)
        rows = []
        for row, own in enumerate(value):
            here = (pos[row] >= 0).nonzero()[:, 0].to(own.device)
            own = own.index_select(dim - 1, here)
            if keys is not None:
                own = own.index_select(-1, (keys[row] >= 0).nonzero()[:, 0].to(own.device))
            rows.append(own)
        return rows

    @property
    def has_padding(self) -> bool:
        """Whether some entry of some value stands at padding, as far as is known."""
        seen = {id(p.pos): p.pos for p in self.places.values()}
        return any(bool((pos < 0).any()) for pos in seen.values())

    def require_first_positions(self, purpose: str) -> None:
        """Refuse a cache whose values are not those of the run's first positions, one by one.

        Raises:
            ValueError: it was made with another `pos_slice`, so that an index means another place.
        """
        kept = self.pos_slice
        if isinstance(kept, tuple):
            kept = slice(*kept)
        if isinstance(kept, slice):
            kept = None if kept.start in (None, 0) and kept.step in (None, 1) else kept
        if kept is not None:
            raise ValueError(
                f"{purpose} needs values from the run's first position on, and this cache was made "
                f"with pos_slice={self.pos_slice}: make it without, or with slice(n)"
            )

    # --- on disk ----------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the cache to a safetensors file, whole or not at all; `load` reads it.

        Any reader of safetensors finds the values under their full names; under names that begin
        with "places." are the positions of their entries.

        Raises:
            OSError: the file cannot be written.
        """
        from safetensors.torch import save_file

        tensors = {name: t.detach().contiguous() for name, t in self.cache_dict.items()}
        if len({t.untyped_storage().data_ptr() for t in tensors.values()}) < len(tensors):
            tensors = {name: t.clone() for name, t in tensors.items()}
        index: dict[str, list[int | None]] = {}
        numbers: dict[int, int] = {}
        for name, places in self.places.items():
            index[name] = []
            for pos in (places.pos, places.key_pos):
                if pos is not None and id(pos) not in numbers:
                    numbers[id(pos)] = len(numbers)
                    tensors[f"{_PLACES}{numbers[id(pos)]}"] = pos.contiguous().clone()
                index[name].append(None if pos is None else numbers[id(pos)])
        about = {
            "format": _FORMAT,
            "names": list(self.cache_dict),
            "axes": {name: list(axes) for name, axes in self.axes.items()},
            "places": index,
            "has_batch_dim": self.has_batch_dim,
            "pos_slice": _as_json(self.pos_slice),
            "n_layers": self.n_layers,
        }
        with replacing(Path(path)) as partial:
            save_file(tensors, partial, metadata={"about": json.dumps(about)})

    @classmethod
    def load(
        cls: type[C],
        path: str | os.PathLike[str],
        model: LanguageModel | None = None,
        device: torch.device | str = "cpu",
    ) -> C:
        """Read a cache that `save` wrote.

        Args:
            path: the file.
            model: that it comes from; may also be given later, as `cache.model`.
            device: where the values are put.

        Raises:
            FileNotFoundError, safetensors.SafetensorError: no such file, or no safetensors file.
            ValueError: a safetensors file that holds something else, or of another model.
        """
        from safetensors import safe_open

        require_safetensors(Path(path))
        with safe_open(path, "pt", device=str(device)) as file:
            try:
                about = parse_json((file.metadata() or {}).get("about", "null"), path)
                is_ours = isinstance(about, dict) and about.get("format") == _FORMAT
            except ValueError:
                is_ours = False
            if not is_ours:
                raise ValueError(f"{path} holds no cache: write one with cache.save(path)")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        try:
            new: Any = cls.__new__(cls)
            new.cache_dict = {name: tensors[name] for name in about["names"]}
            new.axes = {str(n): tuple(map(str, axes)) for n, axes in about["axes"].items()}
            at: Any = lambda i: None if i is None else tensors[f"{_PLACES}{int(i)}"]  # noqa: E731
            new.places = {str(n): Places(at(p), at(k)) for n, (p, k) in about["places"].items()}
            new.has_batch_dim, new.n_layers = bool(about["has_batch_dim"]), int(about["n_layers"])
            new.pos_slice, new._model = _of_json(about["pos_slice"]), None
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no whole cache: {one_line(repr(error))}") from error
        if model is not None:
            if unknown := [n for n in new.axes if n.removesuffix("_grad") not in model.hook_dict]:
                raise ValueError(f"{path} holds {unknown[0]!r}, which this model does not have")
            new.model = model
        return new

    # --- inside -----------------------------------------------------------------------------------

    def pos_of(self, full: str) -> Int[Tensor, "batch kept"]:
        """Return the places of a value; those of a cache made by hand count from 0."""
        if full in self.places:
            return self.places[full].pos
        pos = self._counted(full)
        if pos is None:
            raise ValueError(f"{full!r} has no positions")
        return pos

    def _key_pos_of(self, full: str) -> Int[Tensor, "batch key"] | None:
        """Return the positions of a value's keys; None where it has none."""
        if full in self.places:
            return self.places[full].key_pos
        return self._counted(full) if "key" in self.axes.get(full, ()) else None

    def _counted(self, full: str) -> Int[Tensor, "batch kept"] | None:
        """Return positions from 0 on for a value of which nothing is known."""
        axes = self.axes.get(full, ())
        dim = next((axes.index(a) for a in ("pos", "query") if a in axes), None)
        if dim is None:
            return None
        value, dim = self._batched(full)
        return torch.arange(value.shape[dim]).expand(value.shape[0], -1)

    def _batched(self, full: str) -> tuple[Tensor, int]:
        """Return a value with its batch axis, and the index of its axis of positions."""
        axes = self.axes.get(full, ())
        dim = next((axes.index(a) for a in ("pos", "query") if a in axes), None)
        if dim is None:
            raise ValueError(f"{full!r} has no positions")
        value = self.cache_dict[full]
        return (value if self.has_batch_dim else value[None]), dim

    def _unbatched(self, value: Tensor) -> Tensor:
        return value if self.has_batch_dim else value[0]

    def _place_by_mask(self, attention_mask: Int[Tensor, "batch pos"]) -> None:
        """Take a mask to say where the entries of every value stood."""
        if self.places:
            raise ValueError("give places or attention_mask, not both")
        pos = lay_out(attention_mask, None, attention_mask, None).pos
        for name in self.cache_dict:
            if "pos" in self.axes.get(name, ()) or "query" in self.axes.get(name, ()):
                value, dim = self._batched(name)
                if (value.shape[0], value.shape[dim]) != pos.shape:
                    raise ValueError(
                        f"attention_mask has shape {tuple(pos.shape)}, and {name!r} has "
                        f"{value.shape[0]} rows of {value.shape[dim]} positions"
                    )
                self.places[name] = Places(pos, pos if "key" in self.axes[name] else None)


def _as_json(pos_slice: PosSlice) -> Any:
    """Return a selection of positions as JSON holds it."""
    if pos_slice is None or isinstance(pos_slice, str):
        return pos_slice
    read = read_indices(pos_slice, "positions", tuple_is_slice=True)
    if isinstance(read, slice):
        return {"slice": [read.start, read.stop, read.step]}
    return read if isinstance(read, int) else read.tolist()


def _of_json(read: Any) -> PosSlice:
    return slice(*read["slice"]) if isinstance(read, dict) else read
