"""Opening a checkpoint as a config and a lazy mapping of tensors: data only, never code."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_hybrid.outputs.foreign import printable, require_safetensors
from hooked_hybrid.presets.packaged import packaged_models
from weights_conversion.errors import CheckpointError
from weights_conversion.json_files import LARGEST_CONFIG, read_json
from weights_conversion.torch_files import read_torch_file
from weights_conversion.weight_files import find_weights, stale

HUB_FILES = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.pt")
ADAPTER_CONFIG = "adapter_config.json"
HUB_BIN_FILES = ("pytorch_model*.bin",)
"""Fetched only without safetensors, as most repositories have both formats."""
PLAIN_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
"""Dtypes of weights; numbers with fewer bits need a scale."""
_DTYPES = {
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""The dtypes of safetensors, by their names there."""


class TensorSource(Protocol):
    """Tensors by name, with their shapes and dtypes, which are known before reading."""

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of each tensor."""
        ...

    @property
    def unfit(self) -> Mapping[str, str]:
        """Dtype of each tensor that is not one of `PLAIN_DTYPES`."""
        ...

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file if possible."""
        ...


class MemorySource:
    """Tensors that are in memory, or already mapped.

    Args:
        tensors: by name.
        lets_go: whether each tensor is returned only once, so that its memory can be freed.
    """

    def __init__(self, tensors: Mapping[str, Tensor], lets_go: bool = False) -> None:
        self.tensors, self.lets_go = dict(tensors), lets_go
        self.shapes = {name: tuple(t.shape) for name, t in tensors.items()}
        self.unfit = {n: str(t.dtype) for n, t in tensors.items() if t.dtype not in PLAIN_DTYPES}

    def read(self, name: str) -> Tensor:
        """Return one tensor."""
        return self.tensors.pop(name) if self.lets_go else self.tensors[name]


class SafetensorsSource:
    """One safetensors file, or the shards of one model.

    Raises:
        CheckpointError: a file is missing, truncated or damaged, a name is in two of them, or
            the tensors are in both 16-bit dtypes, one of which must be misread.
    """

    def __init__(self, files: Mapping[Path, frozenset[str] | None]) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.handles: dict[str, Any] = {}
        self.unfit: dict[str, str] = {}
        of_dtype: dict[str, str] = {}
        for path, promised in files.items():
            _require_file(path)
            try:
                require_safetensors(path)
            except ValueError as error:
                raise CheckpointError(str(error)) from error
            try:
                handle = safe_open(path, "pt", device="cpu")
                names = list(handle.keys())
                slices = {name: handle.get_slice(name) for name in names}
                shapes = {name: tuple(part.get_shape()) for name, part in slices.items()}
                dtypes = {name: str(part.get_dtype()) for name, part in slices.items()}
            except SafetensorError as error:
                raise CheckpointError(
                    f"{path} is not a whole safetensors file ({error}): download it again"
                ) from error
            _refuse_shard(path, promised, shapes.keys(), self.shapes.keys())
            self.shapes.update(shapes)
            self.handles.update(dict.fromkeys(names, handle))
            of_dtype |= {dtype: name for name, dtype in dtypes.items()}
            self.unfit |= {
                name: str(_DTYPES.get(dtype, dtype))
                for name, dtype in dtypes.items()
                if _DTYPES.get(dtype) not in PLAIN_DTYPES
            }
        if {"F16", "BF16"} <= of_dtype.keys():
            raise CheckpointError(
                f"{of_dtype['F16']} is stored as float16 and {of_dtype['BF16']} as bfloat16: a "
                "header is damaged, download the checkpoint again"
            )

    def read(self, name: str) -> Tensor:
        """Return one tensor, mapped from its file."""
        return self.handles[name].get_tensor(name)


def open_torch_file(path: Path) -> MemorySource:
    """Return the tensors of a `torch.save` file, read as data only, and mapped if it is a zip.

    Raises:
        CheckpointError: damaged, with anything other than tensors by name, or with more bytes than
            the file.
    """
    return open_torch_files({path: None})


def open_torch_files(files: Mapping[Path, frozenset[str] | None]) -> MemorySource:
    """Return the tensors of one `torch.save` file, or of the shards of one model.

    Raises:
        CheckpointError: a file is missing, damaged, contains anything other than tensors by name or
            more than its size, lacks tensors of the index, or a name is in two of them.
    """
    found: dict[str, Tensor] = {}
    all_mapped = True
    for path, promised in files.items():
        _require_file(path)
        tensors, is_mapped = read_torch_file(path)
        _refuse_shard(path, promised, tensors.keys(), found.keys())
        found |= tensors
        all_mapped &= is_mapped
    return MemorySource(found, lets_go=not all_mapped)


def _refuse_adapter_alone(folder: Path) -> None:
    """Raise an error for a folder with an adapter and no model, which says how to load it."""
    path = folder / ADAPTER_CONFIG
    if path.is_file():
        base = read_json(path, LARGEST_CONFIG).get("base_model_name_or_path")
        base = str(base)[:200] if base else "the model it was trained on"
        raise CheckpointError(
            f"{folder} holds an adapter and no model: load its base model with it, "
            f"from_pretrained({base!a}, adapter={str(folder)!a}), which merges the two"
        )


def _require_file(path: Path) -> None:
    if not path.is_file():
        raise CheckpointError(
            f"{path} is missing, though the index names it: download the checkpoint again"
        )


def _refuse_shard(
    path: Path, promised: frozenset[str] | None, names: Set[str], others: Set[str]
) -> None:
    """Refuse a shard that repeats another's tensors or lacks tensors of the index."""
    if twice := others & names:
        raise CheckpointError(f"{min(twice)} is in {path} and in another shard")
    if promised is not None and (lost := promised - names):
        raise CheckpointError(f"{path} lacks {min(lost)}, which the index lists")


@dataclass(frozen=True)
class Checkpoint:
    """The location of a checkpoint, its `config.json` (None for a bare `.pt`), and its tensors."""

    folder: Path
    config: dict[str, Any] | None
    tensor_files: tuple[Path, ...] = field(default=())

    def tensors(self) -> TensorSource:
        """Open the tensor files.

        Raises:
            CheckpointError: there is no file, or one is missing or damaged.

        Warns:
            UserWarning: the folder has other weights, which are not read.
        """
        if self.config is None:
            return open_torch_file(self.tensor_files[0])
        weights = find_weights(self.folder)
        if weights.left:
            warnings.warn(printable(stale(self.folder, weights)), stacklevel=2)
        if weights.are_safetensors:
            return SafetensorsSource(weights.files)
        return open_torch_files(weights.files)

    def files(self) -> list[Path]:
        """Return the files that identify this checkpoint's weights."""
        if self.config is None:
            return list(self.tensor_files)
        return [self.folder / "config.json", *find_weights(self.folder).files]


def open_checkpoint(
    name_or_path: str | os.PathLike[str], revision: str | None = None
) -> Checkpoint:
    """Find a checkpoint: a directory, a `.pt` file, a packaged model, or a hub id, in this order.

    Raises:
        CheckpointError: nothing of this name, a directory without a checkpoint, a revision of a
            packaged model, or no network.
    """
    path = Path(name_or_path)
    if path.exists() and not path.is_file() and not path.is_dir():
        raise CheckpointError(f"{path} is neither a file nor a directory")
    if path.is_file():
        if path.suffix != ".pt":
            raise CheckpointError(f"{path} is a file: give its directory, or a .pt file")
        return Checkpoint(path.parent, None, (path,))
    if not path.is_dir():
        path = _find_or_download(os.fspath(name_or_path), revision)
    config = path / "config.json"
    if config.is_file():
        return Checkpoint(path, read_json(config, LARGEST_CONFIG))
    _refuse_adapter_alone(path)
    pt_files = sorted(p for p in path.glob("*.pt") if p.is_file())  # no pipe
    if len(pt_files) == 1:
        return Checkpoint(path, None, (pt_files[0],))
    if pt_files:
        names = ", ".join(p.name for p in pt_files)
        raise CheckpointError(f"{path} holds several .pt files ({names}): give the path of one")
    if any(path.glob("*.safetensors")):
        raise CheckpointError(f"{path} has weights but no config.json, which describes them")
    raise CheckpointError(f"{path} holds no checkpoint: neither config.json nor a .pt file")


def adapter_folder(name_or_path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Return the folder of an adapter: a directory here, or a hub id.

    Raises:
        CheckpointError: nothing of this name, or no network.
    """
    path = Path(name_or_path)
    if path.is_file():
        raise CheckpointError(f"adapter={str(path)!a} is a file: give its directory")
    return path if path.is_dir() else _download(os.fspath(name_or_path), revision)


def _find_or_download(name: str, revision: str | None) -> Path:
    folder = packaged_models().get(name)
    if folder is None:
        return _download(name, revision)
    if revision is not None:
        raise CheckpointError(f"{name} comes with this package and has no revision {revision!r}")
    return folder


def _download(repo: str, revision: str | None) -> Path:
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1:
        raise CheckpointError(f"{repo}: no such directory or file")
    known = ", ".join(packaged_models())
    try:
        folder = Path(snapshot_download(repo, revision=revision, allow_patterns=list(HUB_FILES)))
        if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
            snapshot_download(repo, revision=revision, allow_patterns=list(HUB_BIN_FILES))
        return folder
    except HFValidationError as error:
        raise CheckpointError(
            f"{repo!r} is not a directory here, a hub id or a packaged model ({known})"
        ) from error
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        raise CheckpointError(
            f"{repo!r} is not a directory here or a packaged model ({known}), and the hub did not "
            f"give it ({type(error).__name__}): check the name, the network, and for gated models "
            "`hf auth login`"
        ) from error
