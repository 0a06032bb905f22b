"""Reading a `torch.save` file as data only, and never more bytes than the file has."""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from weights_conversion.errors import CheckpointError

LARGEST_PICKLE = 2**23
"""Bytes of names and shapes: enough for 50,000 tensors."""

_OF_TENSORS = re.compile(
    r"collections OrderedDict|torch \w+Storage|torch (Size|[a-z]\w*)|torch\.storage \w+Storage"
    r"|torch\._utils _rebuild_\w+|torch\.serialization _get_layout"
)
"""Types in the pickle of a tensor. torch allows more, such as `bytearray`, which can allocate any
number of bytes.
"""
_N_PICKLES = 5
"""Pickles in torch's older format: a number, a version, sizes of C's types, content, keys."""


def read_torch_file(path: Path) -> tuple[dict[str, Tensor], bool]:
    """Return the tensors of a `torch.save` file, and whether they are mapped (where it is a zip).

    Raises:
        CheckpointError: damaged, with anything other than tensors by name, or with more bytes than
            the file.
    """
    try:
        with path.open("rb") as file:
            is_zip = file.read(4) == b"PK\3\4"  # as torch decides; zipfile reads the end
        for part in _pickles(path, is_zip):
            _refuse_code(path, part)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # warnings about old formats are irrelevant here
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise _holds_code(path) from error
    except Exception as error:  # damage may raise almost any exception
        raise CheckpointError(
            f"{path} is not a whole torch.save file ({error}): download it again"
        ) from error
    if not isinstance(content, Mapping) or not all(
        isinstance(name, str) and isinstance(t, Tensor) for name, t in content.items()
    ):
        raise CheckpointError(f"{path} is not a mapping of names to tensors")
    _refuse_hollow(path, content)
    return dict(content), is_zip


def _pickles(path: Path, is_zip: bool) -> Iterator[IO[bytes]]:
    """Yield where each pickle begins that torch will read."""
    if not is_zip:
        with path.open("rb") as file:
            for _ in range(_N_PICKLES):
                yield file
        return
    with zipfile.ZipFile(path) as archive:
        _refuse_compressed(path, archive)
        for info in archive.infolist():
            # torch's own reader takes DATA.PKL for data.pkl
            if info.filename.lower().endswith(".pkl"):
                if info.file_size > LARGEST_PICKLE:
                    raise _too_long(path)
                yield io.BytesIO(archive.read(info))


def _refuse_compressed(path: Path, archive: zipfile.ZipFile) -> None:
    """Raise an error for a compressed zip: torch.save does not compress, as parts are mapped."""
    for info in archive.infolist():
        if info.compress_type != zipfile.ZIP_STORED:
            raise CheckpointError(
                f"{path} is compressed at {info.filename!r}, which torch.save never does: "
                "unpack it where you trust it and save it again"
            )
    names = [info.filename.lower() for info in archive.infolist()]
    if len({*names}) < len(names) or not all(name.isascii() for name in names):
        raise CheckpointError(f"{path} holds two parts of one name, or odd names: save it again")
    if archive.comment or min(info.header_offset for info in archive.infolist()):
        # torch would find another list of contents in it than zipfile did
        raise CheckpointError(f"{path} does not have the layout of torch.save: save it again")


def _refuse_code(path: Path, file: IO[bytes]) -> None:
    """Raise an error for a pickle with names other than those of tensors, before any is called."""
    start = file.tell()
    for operation, argument, place in pickletools.genops(file):
        if operation.name == "GLOBAL" and not _OF_TENSORS.fullmatch(str(argument)):
            raise _holds_code(path)
        if (place or 0) - start > LARGEST_PICKLE:
            raise _too_long(path)


def _holds_code(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} holds more than tensors, and code in checkpoints is never run: convert it to "
        "safetensors where you trust it"
    )


def _too_long(path: Path) -> CheckpointError:
    return CheckpointError(
        f"{path} has more than {LARGEST_PICKLE:,} bytes of names and shapes: no model's has"
    )


def _refuse_hollow(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise an error for tensors without their own memory, which could exceed any memory."""
    for name, t in tensors.items():
        if type(t) not in (Tensor, torch.nn.Parameter) or t.layout != torch.strided:
            raise CheckpointError(f"{path}: {name} is not a plain tensor: save its dense values")
        if t.device.type != "cpu" or t.is_quantized:
            raise CheckpointError(f"{path}: {name} contains no values (it is meta or quantized)")
        if t.nbytes > t.untyped_storage().nbytes():
            raise CheckpointError(f"{path}: {name} stores fewer values than it has entries")
    own = {name: t for name, t in tensors.items() if not _is_tied_head(name, tensors)}
    held, size = sum(t.nbytes for t in own.values()), path.stat().st_size
    if held > size:
        raise CheckpointError(
            f"{path} of {size:,} bytes lists tensors of {held:,}: they share their values"
        )


def _is_tied_head(name: str, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a tensor is the head of a model that shares it with the embedding."""
    if not name.endswith("lm_head.weight"):
        return False
    head = tensors[name]
    of_embedding = [t for n, t in tensors.items() if n.endswith("embed_tokens.weight")]
    return any(t.data_ptr() == head.data_ptr() and t.shape == head.shape for t in of_embedding)
