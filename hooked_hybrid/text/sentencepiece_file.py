"""Reading a `tokenizer.model` as a tokenizer of `tokenizers`."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE, Unigram

from hooked_hybrid.text.tokenizer_guard import require_charsmap

BLANK = "▁"
"""The character for a blank in a vocabulary."""
_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # types of pieces
_SPECIAL = (("unk", 40, 0), ("bos", 41, 1), ("eos", 42, 2), ("pad", 43, -1))  # field, default
_VARINT, _EIGHT_BYTES, _BYTES, _FOUR_BYTES = 0, 1, 2, 5  # kinds of fields


@dataclass(frozen=True)
class SentencePieceFile:
    """The content of a `tokenizer.model`.

    `pieces` are (text, score, type) by token. `ids` and `names` are those of "unk", "bos", "eos"
    and "pad", without those that the file disables (an id of -1).
    """

    pieces: tuple[tuple[str, float, int], ...]
    is_unigram: bool
    byte_fallback: bool
    ids: Mapping[str, int]
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool

    @property
    def names(self) -> dict[str, str]:
        """The special tokens' texts, by `bos_token`, `eos_token`, `pad_token` and `unk_token`."""
        return {f"{name}_token": self.pieces[i][0] for name, i in self.ids.items()}


def read_sentencepiece(content: bytes) -> SentencePieceFile:
    """Return the content of a `tokenizer.model`, from its bytes.

    Raises:
        ValueError: they are not a SentencePiece model.

    Source: sentencepiece, `sentencepiece_model.proto`: numbers of fields and their defaults.
    """
    pieces: list[tuple[str, float, int]] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] = {}
    try:
        for number, value in _fields(content):
            if number == 1:
                piece = dict(_fields(value))
                pieces.append((piece[1].decode(), _float(piece.get(2)), piece.get(3, 1)))
            elif number == 2:
                trainer |= _fields(value)
            elif number == 3:
                normalizer |= _fields(value)
        ids = {name: _signed(trainer.get(field, default)) for name, field, default in _SPECIAL}
        charsmap = bytes(normalizer.get(2, b""))
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, struct.error) as error:
        raise ValueError("its fields are not those of a SentencePiece model") from error
    kind = trainer.get(3, 1)
    if not pieces or kind not in (1, 2) or max(ids.values()) >= len(pieces):
        raise ValueError("it holds no BPE or unigram vocabulary")
    if charsmap:
        require_charsmap(charsmap)
    return SentencePieceFile(
        pieces=tuple(pieces),
        is_unigram=kind == 1,
        byte_fallback=bool(trainer.get(35, False)),
        ids={name: i for name, i in ids.items() if i >= 0},
        charsmap=charsmap,
        add_dummy_prefix=bool(normalizer.get(3, True)),
        remove_extra_whitespaces=bool(normalizer.get(4, True)),
    )


def sentencepiece_tokenizer(file: SentencePieceFile, prefix: str = "first") -> Tokenizer:
    """Return the tokenizer that a file describes.

    The names of control pieces and of the unknown piece in a text are read as these tokens, as in
    transformers; sentencepiece itself reads them as plain characters.

    Args:
        file: the result of `read_sentencepiece`.
        prefix: where a blank is added to text that begins without one, if the file adds blanks:
            "first", at the beginning; "always", after special tokens too; "never".
    """
    if not file.add_dummy_prefix:
        prefix = "never"
    elif file.remove_extra_whitespaces and prefix == "first":
        prefix = "always"  # "first" uses the first character before stripping
    tokenizer = Tokenizer(_unigram(file) if file.is_unigram else _bpe(file))
    steps: list[Any] = [normalizers.Precompiled(file.charsmap)] if file.charsmap else []
    if file.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if prefix == "never":
        steps.append(normalizers.Replace(" ", BLANK))
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=BLANK, prepend_scheme=prefix, split=file.is_unigram
        )
    if steps:
        tokenizer.normalizer = normalizers.Sequence(steps)
    decoding = [decoders.Replace(BLANK, " "), decoders.ByteFallback(), decoders.Fuse()]
    if prefix != "never":
        decoding.append(decoders.Strip(content=" ", left=1))
    tokenizer.decoder = decoders.Sequence(decoding)
    tokenizer.add_tokens(
        [
            AddedToken(text, normalized=False, special=kind != _USER_DEFINED)
            for text, _, kind in file.pieces
            if kind in (_UNKNOWN, _CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer


def _bpe(file: SentencePieceFile) -> BPE:
    """Return the pieces, and every merge that makes one, highest score first."""
    ids = {text: i for i, (text, _, _) in enumerate(file.pieces)}
    merges = []
    for text, i in ids.items():
        for cut in range(1, len(text)):
            left, right = text[:cut], text[cut:]
            if left in ids and right in ids:
                merges.append((-file.pieces[i][1], i, cut, left, right))
    merges.sort(key=lambda merge: merge[:3])
    return BPE(
        vocab=ids,
        merges=[merge[3:] for merge in merges],
        unk_token=file.names.get("unk_token"),
        fuse_unk=True,
        byte_fallback=file.byte_fallback,
    )


def _unigram(file: SentencePieceFile) -> Unigram:
    vocab = [(text, score) for text, score, _ in file.pieces]
    return Unigram(vocab, file.ids.get("unk"), file.byte_fallback)


def _fields(content: bytes) -> Iterator[tuple[int, Any]]:
    """Yield number and value of each field of a protobuf message."""
    at = 0
    while at < len(content):
        key, at = _varint(content, at)
        number, kind = key >> 3, key & 7
        if kind == _VARINT:
            value, at = _varint(content, at)
            yield number, value
            continue
        if kind == _BYTES:
            size, at = _varint(content, at)
        else:
            size = {_EIGHT_BYTES: 8, _FOUR_BYTES: 4}.get(kind, -1)
        if size < 0 or at + size > len(content):
            raise ValueError("a field is cut off or of no known kind")
        yield number, content[at : at + size]
        at += size


def _varint(content: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while at < len(content) and shift < 70:
        byte = content[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is cut off")


def _signed(value: int) -> int:
    """Return an int32; negative ones are encoded in 64 bits."""
    return value - (1 << 64) if value >= 1 << 63 else value


def _float(value: bytes | None) -> float:
    return 0.0 if value is None else float(struct.unpack("<f", value)[0])
