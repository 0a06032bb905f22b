"""Shards: safetensors files whose headers describe their content, and the index of all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid.outputs.folders import remove_unfinished, replacing
from hooked_hybrid.outputs.foreign import one_line, parse_json, require_safetensors

FORMAT = 1
INDEX, RECIPE = "index.json", "recipe.json"
AGAIN = "continue with --resume, it is made again"
BESIDE = ("token", "document", "position")
"""Columns stored with the activations, int32 [token]."""
BLOCK = 2**14
"""Rows processed at a time for the statistics."""


@dataclass(frozen=True)
class HookSums:
    """Sums over the tokens of a shard, of the values as written.

    `norm` and `squared_norm` sum each token's L2 norm, taken over all axes after the position's;
    None for integers.
    """

    norm: float | None
    squared_norm: float | None


@dataclass(frozen=True)
class Header:
    """The metadata of a shard: its number, its recipe, and hashes of its tensors."""

    recipe: str
    shard: int
    n_tokens: int
    sums: dict[str, HookSums]
    sha256: dict[str, str]


def shard_name(shard: int, n_shards: int) -> str:
    """Return the file name of a shard."""
    return f"shard-{shard:05d}-of-{n_shards:05d}.safetensors"


def write_shard(
    path: Path, tensors: Mapping[str, Tensor], beside: Mapping[str, Tensor], recipe: str, shard: int
) -> Header:
    """Write a shard, whole or not at all.

    Args:
        path: of the file.
        tensors: activations by hook name, each [token ...].
        beside: the columns of `BESIDE`.
        recipe, shard: for the header.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    whole = {**tensors, **beside}
    header = Header(
        recipe,
        shard,
        len(beside["token"]),
        {name: _sums(value) for name, value in tensors.items()},
        {name: sha256_of(value) for name, value in whole.items()},
    )
    with replacing(path) as temporary:
        save(whole, temporary, {"harvest": json.dumps(asdict(header))})
    return header


def read_header(path: Path) -> Header:
    """Return the header of a shard.

    Raises:
        ValueError: the file is damaged, or not a shard of a harvest.
    """
    try:
        require_safetensors(path)
        with safe_open(path, "pt") as file:
            said = parse_json((file.metadata() or {})["harvest"], "its header")
            said["sums"] = {name: HookSums(**sums) for name, sums in said["sums"].items()}
            header = Header(**said)
            _require_types(header)
            rows = {name: file.get_slice(name).get_shape()[0] for name in header.sha256}
            if set(rows.values()) != {header.n_tokens} or {*rows} != {*header.sums, *BESIDE}:
                raise ValueError("its header does not fit its tensors")
    except (SafetensorError, AttributeError, LookupError, TypeError, ValueError) as error:
        why = one_line(error)
        raise ValueError(f"{path} is not a whole shard of a harvest ({why})") from error
    return header


def _require_types(header: Header) -> None:
    """Raise ValueError where a header contains values of other types than were written."""
    numbers = [n for sums in header.sums.values() for n in (sums.norm, sums.squared_norm)]
    if not (
        isinstance(header.recipe, str)
        and type(header.shard) is type(header.n_tokens) is int
        and all(n is None or type(n) is float for n in numbers)
        and all(isinstance(value, str) for value in header.sha256.values())
    ):
        raise ValueError("its header contains values of other types")


def check_shard(path: Path, hooks: Mapping[str, Mapping[str, Any]]) -> None:
    """Compare every tensor of a shard with the shard's header, and with the index.

    Args:
        path: of the shard.
        hooks: of the index.

    Raises:
        ValueError: one differs, or the shard is damaged or has other hook points.
    """
    header = read_header(path)
    kinds = {name: (hook["dtype"], hook["shape"]) for name, hook in hooks.items()}
    kinds |= {name: ("int32", []) for name in BESIDE}
    if {*kinds} != {*header.sha256}:
        raise ValueError(f"{path} has other hook points than {INDEX}")
    with safe_open(path, "pt") as file:
        for name, wanted in header.sha256.items():
            tensor = file.get_tensor(name)
            kind = str(tensor.dtype).removeprefix("torch."), list(tensor.shape[1:])
            is_same = kind == kinds[name] and sha256_of(tensor) == wanted
            if not is_same or (name in hooks and not _alike(_sums(tensor), header.sums[name])):
                raise ValueError(f"{path} is damaged at {name}: remove it and {AGAIN}")


def index_of(folder: Path, recipe: Mapping[str, Any], paths: Iterable[Path]) -> dict[str, Any]:
    """Return the index of a finished harvest, which depends on its shards alone.

    `hooks` gives each hook point's dtype, shape after the token axis, and over all tokens the mean
    L2 norm and the mean squared one.
    """
    paths = list(paths)
    headers = [read_header(path) for path in paths]
    n_tokens = sum(header.n_tokens for header in headers)
    hooks = {}
    with safe_open(paths[0], "pt") as file:
        for name in headers[0].sums:
            part = file.get_slice(name)
            hooks[name] = {
                "dtype": str(file.get_tensor(name).dtype).removeprefix("torch."),
                "shape": list(part.get_shape()[1:]),
                "mean_norm": _mean([h.sums[name].norm for h in headers], n_tokens),
                "mean_squared_norm": _mean([h.sums[name].squared_norm for h in headers], n_tokens),
            }
    shards = [
        {
            "file": str(path.relative_to(folder)),
            "tokens": header.n_tokens,
            "bytes": path.stat().st_size,
            "sha256": header.sha256,
        }
        for path, header in zip(paths, headers, strict=True)
    ]
    return {
        "format": FORMAT,
        "tokens": n_tokens,
        "hooks": hooks,
        "beside": list(BESIDE),
        "recipe": dict(recipe),
        "shards": shards,
    }


def write_json(path: Path, value: Any) -> None:
    """Write a file, whole or not at all."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")


def save(tensors: Mapping[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
    """Write a safetensors file.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(dict(tensors), path, metadata)
        path.chmod(mode)  # otherwise only the owner could read it
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise OSError(f"{path} cannot be written ({error})") from error
        raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def sha256_of(tensor: Tensor) -> str:
    """Return the SHA-256 of a contiguous CPU tensor's bytes."""
    return hashlib.sha256(tensor.flatten().view(torch.uint8).numpy().data).hexdigest()


def _sums(value: Tensor) -> HookSums:
    if not value.is_floating_point():
        return HookSums(None, None)
    norms = [part.flatten(1).float().norm(dim=1).double() for part in value.split(BLOCK)]
    return HookSums(
        sum(float(norm.sum()) for norm in norms), sum(float(norm @ norm) for norm in norms)
    )


def _alike(a: HookSums, b: HookSums) -> bool:
    """Whether sums differ by no more than the rounding of another machine."""
    pairs = ((a.norm, b.norm), (a.squared_norm, b.squared_norm))
    return all(x == y or (x and y and math.isclose(x, y, rel_tol=1e-5)) for x, y in pairs)


def _mean(sums: list[float | None], n: int) -> float | None:
    found = [value for value in sums if value is not None]
    return sum(found) / n if found else None


def short_hash(value: Any) -> str:
    """Return a hash of a JSON-able value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards in a folder, of whatever harvest."""
    return sorted(folder.glob("shard-*.safetensors"))


def begun_in(folder: Path) -> set[Path]:
    """Return safetensors' temporary files; their names do not tell which run wrote them."""
    return set(folder.glob(".tmp??????"))


def remove_begun(folder: Path, others: Collection[Path] = ()) -> None:
    """Remove temporary files of killed runs, except `others`; the caller must lock the folder."""
    remove_unfinished(folder)
    for path in begun_in(folder).difference(others):
        path.unlink(missing_ok=True)
