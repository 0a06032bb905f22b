# ruff: noqa: ARG001, ARG005  (mutations share one signature)
"""Damage to tensors by name, and malicious `.pt` files: code, bombs, tensors without memory."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from experiments.under_fire.damage import Damage, Mutation, tensor_files

BOMB = 2**31
"""Unpacked size of a bomb, in bytes."""


class Command:
    """A pickle that would run a command when it is read, which creates the file `marker`."""

    def __init__(self, marker: Path, how: str) -> None:
        self.marker, self.how = str(marker), how

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        if self.how == "os.system":
            return os.system, (f"touch {self.marker}",)
        if self.how == "eval":
            return eval, (f"open({self.marker!r}, 'w')",)
        if self.how == "torch.load":
            return torch.load, (self.marker, None, None)
        return open, (self.marker, "w")


class Bytes:
    """A pickle of few bytes that would allocate `BOMB` bytes."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[int]]:
        return bytearray, (BOMB,)


def change_tensors(folder: Path, rng: Random) -> Damage:
    """Rewrite a file of weights in a valid format, with one wrong tensor."""
    path = rng.choice(tensor_files(folder))
    is_pt = path.suffix == ".pt"
    tensors = dict(torch.load(path, weights_only=True) if is_pt else load_file(path))
    name = rng.choice(sorted(tensors))
    how = rng.choice(sorted(_TENSORS))
    _TENSORS[how](tensors, name)
    tensors = {n: t.contiguous() for n, t in tensors.items()}
    torch.save(tensors, path) if is_pt else save_file(tensors, path, {"format": "pt"})
    return Damage(f"{path.name}: {how} ({name})", "refused")


def _entry(value: float) -> Callable[[dict[str, Tensor], str], None]:
    def change(tensors: dict[str, Tensor], name: str) -> None:
        tensors[name] = tensors[name].clone()
        tensors[name].view(-1)[-1] = value

    return change


_TENSORS: dict[str, Callable[[dict[str, Tensor], str], object]] = {
    "one entry NaN": _entry(float("nan")),
    "one entry infinite": _entry(float("inf")),
    "all NaN": lambda t, n: t.update({n: torch.full_like(t[n], float("nan"))}),
    "left out": lambda t, n: t.pop(n),
    "renamed": lambda t, n: t.update({n + "_": t.pop(n)}),
    "added": lambda t, n: t.update({"extra": torch.zeros(3)}),
    "integers": lambda t, n: t.update({n: t[n].long()}),
    "complex": lambda t, n: t.update({n: t[n].to(torch.complex64)}),
    "an axis more": lambda t, n: t.update({n: t[n][None]}),
    "flat": lambda t, n: t.update({n: t[n].reshape(-1)[:-1]}),
    "a number": lambda t, n: t.update({n: torch.zeros(())}),
    "empty": lambda t, n: t.update({n: t[n][:0]}),
    "an entry more": lambda t, n: t.update({n: torch.cat([t[n], t[n][:1]])}),
}


def rewrite_pt(folder: Path, rng: Random) -> Damage | None:
    """Write a malicious `.pt`, or one with tensors that are not plain."""
    path = folder / "2b.pt"
    if not path.exists():
        return None
    tensors = dict(torch.load(path, weights_only=True))
    name = rng.choice(sorted(tensors))
    how = rng.choice(sorted(_PT))
    content = _PT[how](tensors, name, folder, rng)
    if content is not None:
        torch.save(content, path, _use_new_zipfile_serialization=rng.random() < 0.5)
    return Damage(f"2b.pt: {how} ({name})", "refused")


def _code(tensors: dict[str, Any], name: str, folder: Path, rng: Random) -> Any:
    way = rng.choice(("os.system", "eval", "torch.load", "open"))
    command = Command(folder / "ran", way)
    content = rng.choice((command, {**tensors, "x": command}, {**tensors, name: command}))
    if rng.random() < 0.3:
        (folder / "2b.pt").write_bytes(pickle.dumps(content, protocol=rng.choice((0, 2, 4))))
        return None
    return content


def _bomb(tensors: dict[str, Any], name: str, folder: Path, rng: Random) -> None:
    """Write a zip that unpacks to much more than its size."""
    packed = folder / "packed"
    (folder / "2b.pt").rename(packed)
    target = rng.choice(("data.pkl", "data/0", "extra"))
    with (
        zipfile.ZipFile(packed) as old,
        zipfile.ZipFile(folder / "2b.pt", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new,
    ):
        for info in old.infolist():
            if not info.filename.endswith(target):
                new.writestr(info.filename, old.read(info))
        with new.open(f"archive/{target}", "w", force_zip64=True) as file:
            for _ in range(BOMB // 2**24):
                file.write(b"\x80" * 2**24)
    packed.unlink()
    if (
        rng.random() < 0.5
    ):  # a second end record begins here, at which Python's zipfile fails and torch does not
        with (folder / "2b.pt").open("ab") as file:
            file.write(b"PK\5\6")


def _unpacked(tensors: dict[str, Any], name: str, folder: Path, rng: Random) -> None:
    """Write the records compressed."""
    packed = folder / "packed"
    (folder / "2b.pt").rename(packed)
    if not zipfile.is_zipfile(packed):
        torch.save(tensors, packed)
    with (
        zipfile.ZipFile(packed) as old,
        zipfile.ZipFile(folder / "2b.pt", "w", zipfile.ZIP_DEFLATED) as new,
    ):
        for info in old.infolist():
            new.writestr(info.filename, old.read(info))
    packed.unlink()


def _bomb_of(tensors: dict[str, Any], name: str, folder: Path, rng: Random) -> None:
    if not zipfile.is_zipfile(folder / "2b.pt"):
        torch.save(tensors, folder / "2b.pt")
    _bomb(tensors, name, folder, rng)


def _expanded(tensors: dict[str, Any], name: str, folder: Path, rng: Random) -> dict[str, Any]:
    """Replace the embedding by one value expanded to a huge shape, larger than any memory."""
    d_model = tensors["final_norm.scale"].numel()
    return {**tensors, "embedder.input_embedding": torch.zeros(1, 1).expand(2**38, d_model)}


def _other(make: Callable[[Tensor], Any]) -> Callable[..., dict[str, Any]]:
    return lambda tensors, name, folder, rng: {**tensors, name: make(tensors[name])}


_PT: dict[str, Callable[[dict[str, Any], str, Path, Random], Any]] = {
    "code": _code,
    "a bomb": _bomb_of,
    "a bomb of one number": _other(lambda t: Bytes()),
    "compressed": _unpacked,
    "a huge tensor of one number": _expanded,
    "one number": _other(lambda t: torch.zeros(()).expand(t.shape)),
    "on meta": _other(lambda t: t.to("meta")),
    "huge on meta": _other(lambda t: torch.empty(2**40, 2**20, device="meta")),
    "sparse": _other(lambda t: t.to_sparse()),
    "quantised": _other(lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
    "a list": _other(lambda t: [t]),
    "None": _other(lambda t: None),
    "text": _other(lambda t: "x" * 1000),
    "nested": lambda t, n, f, r: {"model": {"state": t}},
    "names that are numbers": lambda t, n, f, r: dict(enumerate(t.values())),
    "a list of all": lambda t, n, f, r: list(t.values()),
    "a module": lambda t, n, f, r: torch.nn.Linear(2, 2),
    "nothing": lambda t, n, f, r: {},
}

MUTATIONS: dict[str, Mutation] = {
    "tensors: one is wrong": change_tensors,
    "pt: rewritten": rewrite_pt,
}
