"""Documents on disk as tokens: written once, one after the other, and read as a memory map."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_hybrid.harvest.shards import save
from hooked_hybrid.options import refuse_ignored
from hooked_hybrid.results_folder import replacing

FILE = "tokens.safetensors"
Document = str | Sequence[int] | Tensor
"""A text, or its tokens [pos]."""


@dataclass(frozen=True)
class Documents:
    """The tokens of every document, one after the other.

    `starts` holds where each begins, and where the last ends. `digest` is a hash of what was read,
    `encoding` says how texts were made tokens, and `sha256` is a hash of tokens and starts.
    """

    tokens: Int[Tensor, " token"]
    starts: Int[Tensor, " bound"]
    digest: str
    encoding: str
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Return those that `write_documents` left in a folder, mapped: no memory is taken.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / FILE
        try:
            with safe_open(path, "pt") as file:
                said = json.loads(file.metadata()["documents"])
                return cls(file.get_tensor("tokens"), file.get_tensor("starts"), **said)
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error}): harvest into another folder") from error

    @property
    def is_whole(self) -> bool:
        """Whether tokens and starts are those that were written; reads them all."""
        found = hashlib.sha256(self.tokens.numpy().data)
        found.update(self.starts.numpy().data)
        return found.hexdigest() == self.sha256


def write_documents(
    documents: Iterable[Document],
    encode: Callable[[Document], Sequence[int]],
    encoding: str,
    d_vocab: int,
    folder: Path,
) -> None:
    """Write the tokens of all documents to a folder; no more than one document is held.

    Raises:
        ValueError: there is no token, or a document that cannot be read or has a token that is not
            in the vocabulary; the message gives its number.
        OSError: the disk is full.
    """
    digest, content, starts = hashlib.sha256(), hashlib.sha256(), array("q", [0])
    with replacing(folder / FILE) as temporary, _raw_file(folder) as raw:
        for i, document in enumerate(documents):
            try:
                _feed(digest, document)
                ids = array("i", _known(encode(document), d_vocab))
            except ValueError as error:
                raise ValueError(f"document {i}: {error}") from error
            content.update(ids)
            ids.tofile(raw)
            starts.append(starts[-1] + len(ids))
        if not starts[-1]:
            raise ValueError(f"there is no token in the {len(starts) - 1} documents")
        raw.flush()
        content.update(starts)
        tensors = {
            "tokens": torch.from_file(raw.name, size=starts[-1], dtype=torch.int32),
            "starts": torch.frombuffer(starts, dtype=torch.int64),
        }
        said = {"digest": digest.hexdigest(), "encoding": encoding, "sha256": content.hexdigest()}
        save(tensors, temporary, {"documents": json.dumps(said)})


def digest_of(documents: Iterable[Document]) -> str:
    """Return the hash of documents that `write_documents` keeps, without tokenizing them."""
    digest = hashlib.sha256()
    for document in documents:
        _feed(digest, document)
    return digest.hexdigest()


@contextmanager
def _raw_file(folder: Path) -> Iterator[BinaryIO]:
    path = folder / f".tokens.raw.{os.getpid()}.tmp"
    try:
        with path.open("wb") as file:
            yield file
    finally:
        path.unlink(missing_ok=True)


def _feed(digest: Any, document: Document) -> None:
    if isinstance(document, str):
        content: Any = document.encode()
    else:
        content = _row(document).long().contiguous().numpy().data
    digest.update(f"{isinstance(document, str)} {len(content)} ".encode())
    digest.update(content)


def _known(ids: Sequence[int], d_vocab: int) -> Sequence[int]:
    """Return tokens that are all in the vocabulary."""
    if len(ids) and not 0 <= min(ids) <= max(ids) < d_vocab:
        raise ValueError(
            f"tokens from {min(ids)} to {max(ids)}, but the model's go from 0 to {d_vocab - 1}"
        )
    return ids


def ids_of(document: Sequence[int] | Tensor) -> list[int]:
    """Return tokens as a list.

    Raises:
        ValueError: they are not one row of integers.
    """
    return _row(document).tolist()


def _row(document: Sequence[int] | Tensor) -> Tensor:
    try:
        ids = torch.as_tensor(document)
    except (TypeError, ValueError, RuntimeError):  # there is no tensor of it
        ids = torch.empty(0, 0)
    is_other = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if ids.ndim != 1 or (len(ids) and is_other):
        raise ValueError(
            f"a document is a text or a row of tokens, not {type(document).__name__} "
            f"{' '.join(str(document).split())[:60]}"
        )
    return ids.cpu()


# --- sources --------------------------------------------------------------------------------------


def read_texts(source: str | Path, field: str | None = None) -> Iterator[str]:
    """Yield the documents of a file or a folder, in the order of names and lines.

    Args:
        source: a .txt file (one document), a .jsonl file (one a line), a folder of such files at
            any depth, or a folder that `datasets.Dataset.save_to_disk` wrote.
        field: of a line or a row, where the text is; None is "text".

    Raises:
        ValueError: nothing is there, a field of .txt files alone, a file is neither, not UTF-8 or
            not JSON, the field or `datasets` is missing: before the first document where that can
            be seen, else at it.
    """
    source = Path(source)
    if not source.exists():
        raise ValueError(f"texts {source}: there is no such file or folder")
    if (source / "dataset_info.json").exists():
        if find_spec("datasets") is None:
            raise ValueError(f"texts {source} is a saved data set: pip install datasets to read it")
        return _rows_of(source, field or "text")
    if (source / "dataset_dict.json").exists():
        splits = sorted(folder.name for folder in source.iterdir() if folder.is_dir())
        raise ValueError(f"texts {source} has parts: give the folder of one, {', '.join(splits)}")
    files = [source]
    if source.is_dir():
        found = (f for f in source.rglob("*") if f.suffix in _READERS and f.is_file())
        files = sorted(found, key=lambda file: file.relative_to(source).parts)
    if not files or files[0].suffix not in _READERS:
        raise ValueError(f"texts {source}: give a .txt or .jsonl file, or a folder of such files")
    if all(file.suffix == ".txt" for file in files):
        refuse_ignored("a .txt file is one document and has no fields", field=field)
    return (text for file in files for text in _read(file, field or "text"))


def _read(file: Path, field: str) -> Iterator[str]:
    try:
        yield from _READERS[file.suffix](file, field)
    except OSError as error:
        raise ValueError(f"texts {file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"texts {file} is not UTF-8 ({error})") from error


def _whole(file: Path, field: str) -> Iterator[str]:  # noqa: ARG001  (a text has no fields)
    yield file.read_text(encoding="utf-8-sig")


def _lines(file: Path, field: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(f"texts {file}, line {number}: no JSON ({error})") from None
            yield _text_of(row, field, f"{file}, line {number}")


def _rows_of(folder: Path, field: str) -> Iterator[str]:
    from datasets import load_from_disk

    for number, row in enumerate(load_from_disk(str(folder))):
        yield _text_of(row, field, f"{folder}, row {number}")


def _text_of(row: Any, field: str, where: str) -> str:
    text = row.get(field) if isinstance(row, dict) else None
    if not isinstance(text, str):
        has = f"; it has {', '.join(map(str, row))}" if isinstance(row, dict) else ""
        raise ValueError(f"texts {where}: no text in the field {field!r}{has}: give another field")
    return text


_READERS: dict[str, Callable[[Path, str], Iterator[str]]] = {".txt": _whole, ".jsonl": _lines}
