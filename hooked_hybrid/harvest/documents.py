"""Documents on disk as tokens: written once, one after another, and read as a memory map."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from jaxtyping import Int
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hooked_hybrid.harvest.shards import save
from hooked_hybrid.outputs.foreign import one_line, parse_json, require_safetensors
from hooked_hybrid.outputs.whole_files import replacing, unfinished_name

FILE = "tokens.safetensors"
Document = str | Sequence[int] | Tensor
"""A text, or its tokens [pos]."""


@dataclass(frozen=True)
class Documents:
    """The tokens of all documents, one after another.

    `starts` contains the index at which each begins, and the end of the last. `digest` is a hash of
    the documents as given, `encoding` describes how texts were tokenized, and `sha256` is a hash of
    tokens and starts.
    """

    tokens: Int[Tensor, " token"]
    starts: Int[Tensor, " bound"]
    digest: str
    encoding: str
    sha256: str

    @classmethod
    def open(cls, folder: Path) -> Documents:
        """Return the documents that `write_documents` wrote to a folder, memory-mapped, not loaded.

        Raises:
            ValueError: the file is damaged.
        """
        path = folder / FILE
        try:
            require_safetensors(path)
            with safe_open(path, "pt") as file:
                said = parse_json((file.metadata() or {})["documents"], "its header")
                found = cls(file.get_tensor("tokens"), file.get_tensor("starts"), **said)
            found.require_possible()
        except (SafetensorError, KeyError, TypeError, ValueError) as error:
            why = one_line(error)
            raise ValueError(f"{path} is damaged ({why}): harvest into another folder") from error
        return found

    def require_possible(self, d_vocab: int | None = None) -> None:
        """Check that tokens and starts are consistent.

        Args:
            d_vocab: size of the vocabulary; None does not check the tokens.

        Raises:
            ValueError: they are not.
        """
        tokens, starts = self.tokens, self.starts
        if not all(isinstance(t, str) for t in (self.digest, self.encoding, self.sha256)):
            raise ValueError("its header contains values of other types")
        kinds = (tokens.dtype, tokens.ndim, starts.dtype, starts.ndim)
        if kinds != (torch.int32, 1, torch.int64, 1) or not len(starts):
            raise ValueError("its tensors have other types")
        if starts[0] != 0 or starts[-1] != len(tokens) or bool((starts.diff() < 0).any()):
            raise ValueError("its documents begin but there are no tokens")
        if d_vocab is not None and not (tokens.min() >= 0 and tokens.max() < d_vocab):
            raise ValueError("it contains tokens that are not in the vocabulary")

    @property
    def is_whole(self) -> bool:
        """Whether tokens and starts are as they were written; reads all of them."""
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
    """Write the tokens of all documents to a folder, with one document in memory at a time.

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
    """Return the hash that `write_documents` stores for documents, without tokenizing them."""
    digest = hashlib.sha256()
    for document in documents:
        _feed(digest, document)
    return digest.hexdigest()


@contextmanager
def _raw_file(folder: Path) -> Iterator[BinaryIO]:
    path = unfinished_name(folder / "tokens.raw")
    try:
        with path.open("xb") as file:
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
    except (TypeError, ValueError, RuntimeError):  # no tensor can be made of it
        ids = torch.empty(0, 0)
    is_other = ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool
    if ids.ndim != 1 or (len(ids) and is_other):
        raise ValueError(
            f"a document is a text or a row of tokens, not {type(document).__name__} "
            f"{' '.join(str(document).split())[:60]}"
        )
    return ids.cpu()
