# ruff: noqa: ARG005  (mutations share one signature)
"""Mutations, and those that do not depend on a file's content: bytes, lengths, folders.

A mutation is a function `(folder, rng) -> Damage | None` that damages a copy of a checkpoint; None
if it does not apply to it.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Literal

Expected = Literal["refused", "same", "finite"]
"""The required outcome: an error, equal values, or finite values. An error is always correct."""


@dataclass(frozen=True)
class Damage:
    """The damage to a checkpoint, in words, and the required outcome."""

    what: str
    expected: Expected


Mutation = Callable[[Path, Random], Damage | None]


def tensor_files(folder: Path) -> list[Path]:
    """Return the files with weights."""
    return sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".pt"))


def header_end(path: Path) -> int:
    """Return the offset of a safetensors file's data."""
    with path.open("rb") as file:
        return 8 + int.from_bytes(file.read(8), "little")


# --- bytes ----------------------------------------------------------------------------------------


def flip_data(folder: Path, rng: Random) -> Damage:
    """Flip bits within tensor data (of a `.pt`: anywhere in the file)."""
    path = rng.choice(tensor_files(folder))
    first = header_end(path) if path.suffix == ".safetensors" else 0
    where = _change(
        path, rng, first, rng.choice((1, 1, 8, 100)), lambda b: b ^ 1 << rng.randrange(8)
    )
    return Damage(f"{path.name}: bits flipped at {where}", "finite")


def overwrite_data(folder: Path, rng: Random) -> Damage:
    """Put random bytes, or bytes of all ones, over a stretch of tensor data."""
    path = rng.choice(tensor_files(folder))
    first = header_end(path) if path.suffix == ".safetensors" else 0
    n_bytes = path.stat().st_size
    start = rng.randrange(first, n_bytes)
    length = min(rng.choice((4, 64, 4096, 200_000)), n_bytes - start)
    new = rng.choice((rng.randbytes(length), b"\xff" * length, b"\0" * length))
    with path.open("r+b") as file:
        file.seek(start)
        file.write(new)
    return Damage(f"{path.name}: {length} bytes overwritten at {start}", "finite")


def flip_header(folder: Path, rng: Random) -> Damage | None:
    """Change single bytes of a safetensors header: an error, or no change of values."""
    path = rng.choice(tensor_files(folder))
    if path.suffix != ".safetensors":
        return None
    content = bytearray(path.read_bytes())
    where = [rng.randrange(header_end(path)) for _ in range(rng.choice((1, 1, 1, 3, 20)))]
    for i in where:
        content[i] = rng.choice((content[i] ^ 1 << rng.randrange(8), rng.randrange(256)))
    path.write_bytes(content)
    return Damage(f"{path.name}: header bytes changed at {sorted(where)[:3]}", "same")


def flip_text(folder: Path, rng: Random) -> Damage | None:
    """Flip bits of a JSON file."""
    files = sorted(folder.glob("*.json"))
    if not files:
        return None
    path = rng.choice(files)
    where = _change(path, rng, 0, rng.choice((1, 3, 30)), lambda b: b ^ 1 << rng.randrange(8))
    return Damage(f"{path.name}: bits flipped at {where}", "finite")


def truncate(folder: Path, rng: Random) -> Damage:
    """Cut a file of weights short."""
    path = rng.choice(tensor_files(folder))
    n_bytes = path.stat().st_size
    kept = rng.choice((0, 1, 7, 8, 9, n_bytes - 1, rng.randrange(n_bytes), rng.randrange(n_bytes)))
    os.truncate(path, kept)
    return Damage(f"{path.name}: cut to {kept} of {n_bytes} bytes", "refused")


def extend(folder: Path, rng: Random) -> Damage:
    """Append bytes to a file of weights; after a `.pt` they may be what zip allows to follow."""
    path = rng.choice(tensor_files(folder))
    tail = rng.choice((b"\0", rng.randbytes(100), b"\0" * 100_000, path.read_bytes()))
    with path.open("ab") as file:
        file.write(tail)
    is_pt = path.suffix == ".pt"
    return Damage(f"{path.name}: {len(tail)} bytes appended", "same" if is_pt else "refused")


def remove_stretch(folder: Path, rng: Random) -> Damage:
    """Take bytes out of the middle of a file of weights, or put some in."""
    path = rng.choice(tensor_files(folder))
    content = path.read_bytes()
    at, n = rng.randrange(len(content)), rng.choice((1, 8, 1000))
    grown = content[:at] + rng.randbytes(n) + content[at:]
    path.write_bytes(rng.choice((content[:at] + content[at + n :], grown)))
    return Damage(f"{path.name}: {n} bytes taken or added at {at}", _unless_pt(path))


# --- folders --------------------------------------------------------------------------------------


def replace_file(folder: Path, rng: Random) -> Damage:
    """Replace a required file by nothing, a folder, a pipe, a link, or bytes that are not text."""
    path = rng.choice([p for p in (folder / "config.json",) if p.exists()] + tensor_files(folder))
    how = rng.choice(sorted(_REPLACEMENTS))
    path.unlink()
    _REPLACEMENTS[how](path, rng)
    return Damage(f"{path.name}: {how} in its place", "refused")


def swap_files(folder: Path, rng: Random) -> Damage | None:
    """Exchange two files."""
    files = sorted(p for p in folder.iterdir() if p.suffix in (".safetensors", ".json"))
    files = [p for p in files if p.name != "tokenizer_config.json"]
    if len(files) < 2:
        return None
    a, b = rng.sample(files, 2)
    a.rename(folder / "third")
    b.rename(a)
    (folder / "third").rename(b)
    return Damage(f"{a.name} and {b.name} exchanged", "refused")


def _change(path: Path, rng: Random, first: int, n: int, change: Callable[[int], int]) -> list[int]:
    """Change `n` bytes of a file from `first` on, and return where (three at most)."""
    n_bytes = path.stat().st_size
    where = sorted(rng.randrange(first, n_bytes) for _ in range(n))
    with path.open("r+b") as file:
        for i in where:
            file.seek(i)
            (old,) = file.read(1)
            file.seek(i)
            file.write(bytes([change(old)]))
    return where[:3]


def _unless_pt(path: Path) -> Expected:
    return "finite" if path.suffix == ".pt" else "refused"


def _junk(path: Path, rng: Random) -> None:
    path.write_bytes(rng.randbytes(rng.choice((1, 100, 100_000))))


_REPLACEMENTS: dict[str, Callable[[Path, Random], object]] = {
    "nothing": lambda path, rng: None,
    "an empty file": lambda path, rng: path.touch(),
    "a folder": lambda path, rng: path.mkdir(),
    "a pipe": lambda path, rng: os.mkfifo(path),
    "a link to nowhere": lambda path, rng: path.symlink_to("/nowhere/at/all"),
    "a link to itself": lambda path, rng: path.symlink_to(path),
    "a link to a device": lambda path, rng: path.symlink_to("/dev/zero"),
    "junk": _junk,
    "text that is not UTF-8": lambda path, rng: path.write_bytes(b'{"a": "\xff\xfe"}'),
}

MUTATIONS: dict[str, Mutation] = {
    "data: bits flipped": flip_data,
    "data: stretch overwritten": overwrite_data,
    "header: bytes changed": flip_header,
    "length: cut short": truncate,
    "length: extended": extend,
    "length: stretch in or out": remove_stretch,
    "folder: file replaced": replace_file,
    "folder: files exchanged": swap_files,
    "text: bits flipped": flip_text,
}
