"""Conversations as text, in the form of lm-eval."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

log = logging.getLogger(__name__)
Message = dict[str, str]


def as_text(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    """Return a conversation as text, in the model's chat template.

    If the template rejects a system message, the message is left out, with a warning.

    Args:
        tokenizer: with `apply_chat_template`.
        messages: each with a "role" and a "content".
        add_generation_prompt: end with the opening of the model's turn; else right after the last
            message's words, for the model to continue.

    Raises:
        ValueError: no chat template, or one that refuses the conversation.
    """
    if not has_template(tokenizer):
        raise ValueError(
            "this checkpoint has no chat template: it was not tuned on conversations; leave the "
            "chat template out"
        )
    try:
        text = _render(tokenizer, messages, add_generation_prompt)
    except Exception as error:  # transformers raises jinja2's own
        others = [message for message in messages if message["role"] != "system"]
        if len(others) == len(messages):
            raise
        log.warning("the chat template refuses a system message; it is left out (%s)", error)
        messages, text = others, _render(tokenizer, others, add_generation_prompt)
    if add_generation_prompt:
        return text
    last = messages[-1]["content"].strip()
    return text[: text.rindex(last) + len(last)]


def has_template(tokenizer: Any) -> bool:
    """Whether a tokenizer has a chat template."""
    return getattr(tokenizer, "chat_template", None) is not None


def _render(tokenizer: Any, messages: Sequence[Message], add_generation_prompt: bool) -> str:
    return str(
        tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=add_generation_prompt
        )
    )
