"""Shards: safetensors files that say in their header what they hold, and the index of all."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid.results_folder import remove_unfinished, replacing

FORMAT = 1
INDEX, RECIPE = "index.json", "recipe.json"
BESIDE = ("token", "document", "position")
"""Columns beside the activations, int32 [token]."""
BLOCK = 2**14
"""Rows looked at together for the statistics."""


@dataclass(frozen=True)
class HookSums:
    """Sums over the tokens of a shard, of the values as they are written.

    `norm` and `squared_norm` are of each token's L2 norm, over all that follows the position; None
    for integers.
    """

    norm: float | None
    squared_norm: float | None


@dataclass(frozen=True)
class Header:
    """What a shard says of itself: which it is, of which recipe, and hashes of its tensors."""

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
        ValueError: the file is damaged, or no shard of a harvest.
    """
    try:
        with safe_open(path, "pt") as file:
            said = json.loads((file.metadata() or {})["harvest"])
    except (SafetensorError, KeyError, ValueError) as error:
        raise ValueError(f"{path} is no whole shard of a harvest ({error})") from error
    said["sums"] = {name: HookSums(**sums) for name, sums in said["sums"].items()}
    return Header(**said)


def index_of(folder: Path, recipe: Mapping[str, Any], paths: Iterable[Path]) -> dict[str, Any]:
    """Return the index of a finished harvest: a function of its shards alone.

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
        path.chmod(mode)  # else nobody but the owner could read it
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


def _mean(sums: list[float | None], n: int) -> float | None:
    found = [value for value in sums if value is not None]
    return sum(found) / n if found else None


def shard_paths(folder: Path) -> list[Path]:
    """Return the shards in a folder, whatever harvest they are of."""
    return sorted(folder.glob("shard-*.safetensors"))


def remove_begun(folder: Path) -> None:
    """Remove what killed runs began to write; only for who holds the folder."""
    remove_unfinished(folder)
    for path in folder.glob(".tmp??????"):  # what safetensors itself writes to at first
        path.unlink(missing_ok=True)
