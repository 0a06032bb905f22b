# ruff: noqa: ARG001, ARG005  (mutations share one signature)
"""Damage to the entries of a safetensors header, or of the index of shards."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from experiments.under_fire.damage import Damage, Mutation, header_end, tensor_files

DEEP = 100_000
"""Depth of nested lists, more than any parser's stack allows."""


def change_length(folder: Path, rng: Random) -> Damage | None:
    """Give the header another length."""
    path = rng.choice(tensor_files(folder))
    if path.suffix != ".safetensors":
        return None
    true = header_end(path) - 8
    n_bytes = path.stat().st_size
    length = rng.choice(
        (0, 1, true - 1, true + 1, true + 8, n_bytes, n_bytes * 2, 2**32, 2**63, 2**64 - 1)
    )
    with path.open("r+b") as file:
        file.write(length.to_bytes(8, "little"))
    return Damage(f"{path.name}: header length {length} for {true}", "refused")


def change_header(folder: Path, rng: Random) -> Damage | None:
    """Change the header's entry of one tensor, or of all."""
    path = rng.choice(tensor_files(folder))
    if path.suffix != ".safetensors":
        return None
    end = header_end(path)
    content = path.read_bytes()
    header: dict[str, Any] = json.loads(content[8:end])
    names = [n for n in header if n != "__metadata__"]
    name = rng.choice(names)
    how = rng.choice(sorted(_HEADER))
    text = _HEADER[how](header, name, rng)
    new = (json.dumps(header) if text is None else text).encode()
    path.write_bytes(len(new).to_bytes(8, "little") + new + content[end:])
    # If a tensor is alone in its shard, the duplicate entry is its own.
    is_same = how == "name twice" and len(names) == 1
    return Damage(f"{path.name}: {how} ({name})", "same" if is_same else "refused")


def _shape(make: Callable[[list[int], Random], Any]) -> Callable[..., None]:
    def change(header: dict[str, Any], name: str, rng: Random) -> None:
        header[name]["shape"] = make(header[name]["shape"], rng)

    return change


def _offsets(make: Callable[[list[int], Random], Any]) -> Callable[..., None]:
    def change(header: dict[str, Any], name: str, rng: Random) -> None:
        header[name]["data_offsets"] = make(header[name]["data_offsets"], rng)

    return change


def _rename(header: dict[str, Any], name: str, rng: Random) -> None:
    new = rng.choice(("", name + "_", name.upper(), "é" * 1000, "a\0b", "../x", name[:-1]))
    header[new] = header.pop(name)


def _dtype(header: dict[str, Any], name: str, rng: Random) -> None:
    old = header[name]["dtype"]
    others = "F16 BF16 I16 U16 F32 I32 F64 I8 U8 BOOL F8_E4M3 f32 float32 X".split()
    header[name]["dtype"] = rng.choice([*(d for d in others if d != old), None, 7, ["F32"]])


def _add(header: dict[str, Any], name: str, rng: Random) -> None:
    end = max(t["data_offsets"][1] for n, t in header.items() if n != "__metadata__")
    shape = rng.choice(([0], [0, 2**40], [2**62, 0]))
    header["model.extra"] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end]}


def _twice(header: dict[str, Any], name: str, rng: Random) -> str:
    other = rng.choice([n for n in header if n not in (name, "__metadata__")] or [name])
    entry = f"{json.dumps(name)}: {json.dumps(header[other])}"
    return json.dumps(header)[:-1] + ", " + entry + "}"


_HEADER: dict[str, Callable[[dict[str, Any], str, Random], str | None]] = {
    "tensor left out": lambda h, n, r: h.pop(n) and None,
    "tensor renamed": _rename,
    "tensor added": _add,
    "name twice": _twice,
    "entry of another type": lambda h, n, r: h.update({n: r.choice((None, 3, "x", [], {}))}),
    "entry without a field": lambda h, n, r: h[n].pop(r.choice(sorted(h[n]))) and None,
    "dtype": _dtype,
    "shape negative": _shape(lambda s, r: [-s[0], *s[1:]]),
    "shape zero": _shape(lambda s, r: [0, *s[1:]]),
    "shape huge": _shape(lambda s, r: [r.choice((2**31, 2**62, 2**64, 10**30)), *s[1:]]),
    "shape overflows to its true product": _shape(lambda s, r: [*s, 2**32, 2**32]),
    "shape off by one": _shape(lambda s, r: [s[0] + r.choice((-1, 1)), *s[1:]]),
    "shape with another axis": _shape(lambda s, r: r.choice(([1, *s], [*s, 1]))),
    "shape of many axes": _shape(lambda s, r: [*s, *[1] * 1000]),
    "shape of another type": _shape(
        lambda s, r: r.choice((None, "x", 7, [float(s[0]) + 0.5, *s[1:]], [str(s[0])], [s], {}))
    ),
    "offsets reversed": _offsets(lambda o, r: [o[1], o[0] - 1 if o[0] else 1]),
    "offsets shifted": _offsets(lambda o, r: [o[0] + 4, o[1] + 4]),
    "offsets of the whole file": _offsets(lambda o, r: [0, o[1] + 4]),
    "offsets out of the file": _offsets(lambda o, r: [o[0] + 2**40, o[1] + 2**40]),
    "offsets negative": _offsets(lambda o, r: [-8, o[1] - o[0] - 8]),
    "offsets huge": _offsets(lambda o, r: [r.choice((2**63, 2**64, 10**30)), o[1]]),
    "offsets of another type": _offsets(
        lambda o, r: r.choice((None, "x", [], [o[0]], [*o, 1], [str(o[0]), o[1]], [o[0] + 0.5, 1]))
    ),
    "header empty": lambda h, n, r: r.choice(("", "{}", "[]", "null", "3", " " * 64)),
    "header cut": lambda h, n, r: json.dumps(h)[: r.randrange(len(json.dumps(h)))],
    "header followed by more": lambda h, n, r: json.dumps(h) + r.choice(("}", "{}", "x")),
    "header nested deep": lambda h, n, r: '{"a":' + "[" * DEEP + "]" * DEEP + "}",
    "header not an object": lambda h, n, r: json.dumps([h]),
}


# --- the index ------------------------------------------------------------------------------------


def change_index(folder: Path, rng: Random) -> Damage | None:
    """Change the index's entry of one tensor, or of all."""
    path = folder / "model.safetensors.index.json"
    if not path.exists():
        return None
    index = json.loads(path.read_text())
    name = rng.choice(sorted(index["weight_map"]))
    how = rng.choice(sorted(_INDEX))
    text = _INDEX[how](index, name, rng)
    path.write_text(json.dumps(index) if text is None else text)
    # A shard with missing entries in the index still has the same tensors.
    return Damage(f"index: {how} ({name})", "same" if how == "name left out" else "refused")


def _point_at(*files: Any) -> Callable[..., None]:
    def change(index: dict[str, Any], name: str, rng: Random) -> None:
        index["weight_map"][name] = rng.choice(files)

    return change


def _another_shard(index: dict[str, Any], name: str, rng: Random) -> None:
    files = set(index["weight_map"].values()) - {index["weight_map"][name]}
    index["weight_map"][name] = rng.choice(sorted(files))


def _shard_left_out(index: dict[str, Any], name: str, rng: Random) -> None:
    lost = index["weight_map"][name]
    index["weight_map"] = {n: f for n, f in index["weight_map"].items() if f != lost}


_INDEX: dict[str, Callable[[dict[str, Any], str, Random], str | None]] = {
    "outside": _point_at("../x", "/etc/passwd", "..", ".", "a/../b", "C:\\x", "\0", "~/x"),
    "no such shard": _point_at("model-00099-of-00099.safetensors", "", "x" * 5000),
    "no file name": _point_at(None, 7, [], {}, ["model.safetensors"], True),
    "not a shard": _point_at("config.json", "model.safetensors.index.json", "tokenizer.json"),
    "another shard": _another_shard,
    "shard left out": _shard_left_out,
    "name left out": lambda i, n, r: i["weight_map"].pop(n) and None,
    "name added": lambda i, n, r: i["weight_map"].update({n + "_": i["weight_map"][n]}),
    "name changed": lambda i, n, r: i["weight_map"].update({n.upper(): i["weight_map"].pop(n)}),
    "map of another type": lambda i, n, r: i.update(
        weight_map=r.choice((None, 7, "x", [], {}, [n]))
    ),
    "no map": lambda i, n, r: i.pop("weight_map") and None,
    "no index": lambda i, n, r: r.choice(("", "{", "null", "[]", '"x"', "\0", "NaN")),
    "nested deep": lambda i, n, r: '{"weight_map":' + "[" * DEEP + "]" * DEEP + "}",
}

MUTATIONS: dict[str, Mutation] = {
    "header: length": change_length,
    "header: what it says": change_header,
    "index: what it says": change_index,
}
