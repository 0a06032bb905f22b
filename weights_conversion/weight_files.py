"""Finding the weight files of a folder, in the order in which transformers searches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from hooked_hybrid.outputs.foreign import bare_name
from weights_conversion.errors import CheckpointError
from weights_conversion.json_files import LARGEST_INDEX, read_json

SAFETENSORS, TORCH = "model.safetensors", "pytorch_model.bin"
ORDER = (SAFETENSORS, f"{SAFETENSORS}.index.json", TORCH, f"{TORCH}.index.json")
"""The first that exists is read."""
LONGEST = 200
"""Most characters of a file's name."""
OF_OTHERS = ("*.h5", "*.msgpack", "*.gguf", "*.ckpt", "*.bin", "*.safetensors", "*.pt", "*.pth")
"""Files that look like weights."""


@dataclass(frozen=True)
class WeightFiles:
    """The files with a model's weights.

    `files` gives for each the tensors that an index lists in it, None without an index; `left`
    lists other weights, which are not read.
    """

    files: Mapping[Path, frozenset[str] | None]
    left: tuple[str, ...]

    @property
    def are_safetensors(self) -> bool:
        """Whether they are in the safetensors format, not in torch's."""
        return all(path.suffix == ".safetensors" for path in self.files)


def find_weights(folder: Path) -> WeightFiles:
    """Return the files that transformers would read in a folder.

    Raises:
        CheckpointError: there are none, or the index is invalid.
    """
    there = [folder / name for name in ORDER if (folder / name).is_file()]
    if not there:
        raise CheckpointError(_nothing_to_read(folder))
    first = there[0]
    files: Mapping[Path, frozenset[str] | None]
    files = _shards(first) if first.suffix == ".json" else {first: None}
    shards = [*folder.glob("model-*-of-*.safetensors"), *folder.glob("pytorch_model-*-of-*.bin")]
    left = {path.name for path in (*there[1:], *shards)} - {path.name for path in files}
    return WeightFiles(files, tuple(sorted(left)))


def stale(folder: Path, weights: WeightFiles) -> str:
    """Return a sentence about weights in the folder that are not read."""
    read = min(path.name for path in weights.files)
    more = "" if len(weights.files) == 1 else f" and its {len(weights.files) - 1} other shards"
    shown = ", ".join(weights.left[:4]) + (", ..." if len(weights.left) > 4 else "")
    return (
        f"{folder} holds weights twice: {read}{more} are read, as transformers does, and not "
        f"{shown}; remove what is left over from an earlier saving"
    )


def _nothing_to_read(folder: Path) -> str:
    found = sorted({path.name for pattern in OF_OTHERS for path in folder.glob(pattern)})
    message = f"{folder} has a config.json but none of {', '.join(ORDER)}: the weights are missing"
    if found:
        shown = ", ".join(found[:4]) + (", ..." if len(found) > 4 else "")
        message += f"; {shown} there is none of the names that transformers reads"
    return message


def _shards(index: Path) -> dict[Path, frozenset[str] | None]:
    weight_map = read_json(index, LARGEST_INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map: it is not an index")
    if outside := [f for f in weight_map.values() if not bare_name(f) or len(f) > LONGEST]:
        raise CheckpointError(f"{index} points outside its directory, at {str(outside[0])[:60]!a}")
    suffix = ".safetensors" if SAFETENSORS in index.name else ".bin"
    if others := [f for f in weight_map.values() if Path(f).suffix != suffix]:
        raise CheckpointError(f"{index} names {others[0]!r}, which is not a {suffix} file")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        files.setdefault(file, set()).add(name)
    return {index.parent / file: frozenset(names) for file, names in sorted(files.items())}
