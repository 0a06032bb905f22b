"""The tokenizer of a checkpoint, without `transformers`: `tokenizer.json` or `tokenizer.model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from hooked_hybrid.text.chat import check_conversation, refuse_unread, render_chat
from hooked_hybrid.text.tokenizer_files import read_backend, read_chat_template, read_files
from hooked_hybrid.text.tokenizer_guard import breaking_off

Message = dict[str, Any]


class CheckpointTokenizer:
    """Encoding, decoding, special tokens and chat template, from a checkpoint's files.

    Tokens equal those of `transformers` 5 for the same files. With a `tokenizer.json`, its
    post-processor determines whether BOS and EOS are put around a text, and `add_bos_token` and
    `add_eos_token` of `tokenizer_config.json` are not read. With a `tokenizer.model` these two
    determine it; both are off by default.

    Args:
        backend: the tokenizer of `tokenizers`.
        settings: `tokenizer_config.json`, parsed.
        chat_template: Jinja source, or None.
        files: the files that `save_pretrained` writes, by name.
    """

    def __init__(
        self,
        backend: Tokenizer,
        settings: dict[str, Any],
        chat_template: str | None,
        files: dict[str, bytes],
    ) -> None:
        self.backend = backend
        self.settings, self.chat_template, self.files = settings, chat_template, files

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """Return the tokens of a text, optionally with the special tokens around it."""
        with breaking_off("the tokenizer cannot read this text"):
            return list(self.backend.encode(text, add_special_tokens=add_special_tokens).ids)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Return the text of tokens."""
        with breaking_off("the tokenizer cannot write these tokens"):
            return str(self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens))

    @property
    def bos_token_id(self) -> int | None:
        """Beginning-of-sequence token, if the files name one."""
        return self._special_id("bos_token")

    @property
    def eos_token_id(self) -> int | None:
        """End-of-sequence token, if the files name one."""
        return self._special_id("eos_token")

    @property
    def pad_token_id(self) -> int | None:
        """Padding token, if the files name one."""
        return self._special_id("pad_token")

    @property
    def truncation_side(self) -> str:
        """Side on which a text that is too long is cut: "right", unless the files state another."""
        return str(self.settings.get("truncation_side") or "right")

    def apply_chat_template(
        self,
        conversation: Sequence[Message],
        add_generation_prompt: bool = True,
        tokenize: bool = True,
        **variables: Any,
    ) -> list[int] | str:
        """Return a conversation in the format of the model's training.

        Args:
            conversation: messages with "role" and "content".
            add_generation_prompt: end with the opening of the model's turn.
            tokenize: return tokens instead of text.
            variables: further variables of the template.

        Raises:
            ValueError: the checkpoint has no chat template; the template refuses the conversation
                or does not read a variable; or this is not one conversation.
        """
        if self.chat_template is None:
            raise ValueError(
                "this checkpoint has no chat template: it was not tuned on conversations; write "
                "the prompt as plain text"
            )
        messages = check_conversation(conversation)
        refuse_unread(self.chat_template, variables)
        text = render_chat(
            self.chat_template,
            messages=messages,
            add_generation_prompt=add_generation_prompt,
            **{**self._special_texts(), **variables},
        )
        return self.encode(text) if tokenize else text

    def save_pretrained(self, folder: str) -> None:
        """Write the files the tokenizer was read from."""
        for name, content in self.files.items():
            (Path(folder) / name).write_bytes(content)

    def _special_texts(self) -> dict[str, str]:
        """Return every special token in the settings, as templates expect them."""
        names = [name for name in self.settings if name.endswith("_token")]
        return {name: text for name in names if isinstance(text := self._special_text(name), str)}

    def _special_text(self, name: str) -> str | None:
        value = self.settings.get(name)
        return value.get("content") if isinstance(value, dict) else value

    def _special_id(self, name: str) -> int | None:
        text = self._special_text(name)
        return None if text is None else self.backend.token_to_id(text)


def read_tokenizer(folder: Path) -> CheckpointTokenizer | None:
    """Return the tokenizer of a checkpoint's folder, or None if there is none.

    Raises:
        ValueError: a file that cannot be read; names it.
    """
    files = read_files(folder)
    found = read_backend(files, folder)
    if found is None:
        return None
    return CheckpointTokenizer(*found, read_chat_template(files, folder), files)
