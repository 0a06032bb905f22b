"""The tokenizer of a checkpoint, without `transformers`: `tokenizer.json` or `tokenizer.model`."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hooked_hybrid.chat import render_chat

Message = dict[str, str]


class CheckpointTokenizer:
    """Encoding, decoding, special tokens and chat template, as a checkpoint's files give them.

    Args:
        encode: tokens of a text, without special tokens.
        decode: text of tokens; the flag says whether special tokens are left out.
        id_of: the token that a special string is, or None.
        settings: `tokenizer_config.json`, parsed.
        chat_template: Jinja source, or None.
        files: what `save_pretrained` writes, by name.
    """

    def __init__(
        self,
        encode: Callable[[str], list[int]],
        decode: Callable[[list[int], bool], str],
        id_of: Callable[[str], int | None],
        settings: dict[str, Any],
        chat_template: str | None,
        files: dict[str, bytes],
    ) -> None:
        self._encode, self._decode, self._id_of = encode, decode, id_of
        self.settings, self.chat_template, self.files = settings, chat_template, files

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the tokens of a text, after BOS where special tokens are asked for."""
        ids = self._encode(text)
        bos = self.bos_token_id
        return [bos, *ids] if add_special_tokens and bos is not None else ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        return self._decode(list(ids), skip_special_tokens)

    @property
    def bos_token_id(self) -> int | None:
        """Beginning-of-sequence token, where the files name one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """End-of-sequence token, where the files name one."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Padding token, where the files name one."""
        return self._special_id("pad_token")

    @property
    def adds_bos(self) -> bool | None:
        """Whether the model was trained with BOS in front; None where the files do not say."""
        return self.settings.get("add_bos_token")

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """Return a conversation as the model was trained to read it.

        Args:
            conversation: messages with "role" and "content".
            add_generation_prompt: end with the opening of the model's turn.
            tokenize: return tokens; else text.
            variables: further variables of the template.

        Raises:
            ValueError: the checkpoint has no chat template, or it refuses the conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template: it was not tuned on conversations; write "
                "the prompt as plain text"
            )
        text = render_chat(
            self.chat_template,
            messages=list(conversation),
            add_generation_prompt=add_generation_prompt,
            **{**self._special_texts(), **variables},
        )
        return self.encode(text) if tokenize else text

    def save_pretrained(self, folder: str) -> None:
        """Write the files the tokenizer was read from."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def _special_texts(self) -> dict[str, str]:
        """Return every special token the settings name, as templates expect them."""
        names = [name for name in self.settings if name.endswith("_token")]
        return {name: text for name in names if isinstance(text := self._special_text(name), str)}

    def _special_text(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _special_id(self, name: str) -> int | None:
        text = self._special_text(name)
        return None if text is None else self._id_of(text)


def read_tokenizer(folder: Path) -> CheckpointTokenizer | None:
    """Return the tokenizer of a checkpoint's folder, or None where there is none.

    Raises:
        ValueError: a file that cannot be read, by name.
        ImportError: only a `tokenizer.model` is there and sentencepiece is not installed.
    """
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja")
    files = {n: (folder / n).read_bytes() for n in names if (folder / n).is_file()}
    settings, template = _settings(files, folder), _template(files, folder)
    if "tokenizer.json" in files:
        return _from_json(files, settings, template, folder)
    if "tokenizer.model" in files:
        return _from_sentencepiece(files, settings, template, folder)
    return None


def _settings(files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    try:
        content = json.loads(files.get("tokenizer_config.json", b"{}"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'tokenizer_config.json'} is not JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{folder / 'tokenizer_config.json'} does not hold an object")
    for key, value in content.items():
        text = value.get("content") if isinstance(value, dict) else value
        is_used = key in ("add_bos_token", "bos_token", "eos_token", "pad_token")
        is_right = isinstance(text, bool) if key == "add_bos_token" else _is_text(text)
        if is_used and text is not None and not is_right:
            raise ValueError(f"{folder / 'tokenizer_config.json'}: {key} is {str(value)[:80]!a}")
    return content


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be encoded: half a surrogate pair cannot."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def _template(files: dict[str, bytes], folder: Path) -> str | None:
    """Return the chat template: a file of its own, or in the settings, where several have names."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8 text") from error
    found = _settings(files, folder).get("chat_template")
    if isinstance(found, list):
        named = {t.get("name"): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def _from_json(
    files: dict[str, bytes], settings: dict[str, Any], template: str | None, folder: Path
) -> CheckpointTokenizer:
    try:
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
    except Exception as error:  # the library raises a bare Exception
        raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer ({error})") from error
    tokenizer.no_padding()  # texts are padded here, to the longest of a batch, and never cut
    tokenizer.no_truncation()
    return CheckpointTokenizer(
        encode=lambda text: tokenizer.encode(text, add_special_tokens=False).ids,
        decode=lambda ids, skip: tokenizer.decode(ids, skip_special_tokens=skip),
        id_of=tokenizer.token_to_id,
        settings=settings,
        chat_template=template,
        files=files,
    )


def _from_sentencepiece(
    files: dict[str, bytes], settings: dict[str, Any], template: str | None, folder: Path
) -> CheckpointTokenizer:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise ImportError(
            f"{folder / 'tokenizer.model'} needs sentencepiece: pip install "
            "'hooked-hybrid[sentencepiece]', or pass tokenizer=..."
        ) from error
    try:
        model = SentencePieceProcessor(model_proto=files["tokenizer.model"])
    except RuntimeError as error:
        raise ValueError(f"{folder / 'tokenizer.model'} is not a sentencepiece model") from error
    control = {i for i in (model.bos_id(), model.eos_id(), model.pad_id()) if i >= 0}
    named = {
        f"{name}_token": model.id_to_piece(i)
        for name, i in (("bos", model.bos_id()), ("eos", model.eos_id()), ("pad", model.pad_id()))
        if i >= 0
    }

    def decode(ids: list[int], skip: bool) -> str:
        return str(model.decode([i for i in ids if not (skip and i in control)]))

    def id_of(piece: str) -> int | None:
        i = model.piece_to_id(piece)
        return None if i == model.unk_id() else int(i)

    return CheckpointTokenizer(
        encode=lambda text: list(model.encode(text)),
        decode=decode,
        id_of=id_of,
        settings={**named, **settings},
        chat_template=template,
        files=files,
    )
