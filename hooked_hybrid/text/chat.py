"""Chat templates, rendered as by transformers, in a sandbox with limits."""

from __future__ import annotations

import json
from collections.abc import Mapping
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import meta
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import CallBlock, Node
from jinja2.parser import Parser

from hooked_hybrid.options import is_given, refuse_ignored, show
from hooked_hybrid.outputs.foreign import one_line
from hooked_hybrid.text.chat_bounds import BoundedEnvironment, BoundsError


class _Generation(Extension):
    """`{% generation %}`: marks the model's own words; the text itself is unchanged."""

    tags = {"generation"}  # noqa: RUF012  (jinja2's own convention)

    def parse(self, parser: Parser) -> Node:
        """Return the block's content."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return CallBlock(self.call_method("_as_it_is"), [], [], body).set_lineno(line)

    def _as_it_is(self, caller: Any) -> str:
        return str(caller())


def check_conversation(messages: Any) -> list[dict[str, Any]]:
    """Return the messages of one conversation as a list.

    Raises:
        ValueError: no message, several conversations, or a message that is not an object with a
            role. A template would silently write nothing for a missing entry.
    """
    is_one = not isinstance(messages, str | Mapping)
    found = list(messages) if is_one else []
    if not found:
        raise ValueError(
            f"a conversation is a list of messages, each a dict such as {{'role': 'user', "
            f"'content': 'Hello'}}: give at least one, not {show(messages)}"
        )
    for i, message in enumerate(found):
        if isinstance(message, list | tuple):
            raise ValueError("these are several conversations: give one at a time")
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} is {show(message)}: give a dict with a 'role', and what it says as "
                "'content'"
            )
        if len(message) < 2:
            raise ValueError(f"message {i} has a role ({message['role']!r}) and no content")
    return found


def refuse_unread(template: str, variables: Mapping[str, Any]) -> None:
    """Refuse variables that a template does not read, as they would have no effect.

    Raises:
        ValueError: names them, and the variables that the template reads.
    """
    given = {name: value for name, value in variables.items() if is_given(value)}
    if not given:
        return
    try:
        read = meta.find_undeclared_variables(_environment().parse(template))
    except (jinja2.TemplateError, RecursionError):
        return  # rendering reports the error
    unread = {name: value for name, value in given.items() if name not in read}
    refuse_ignored(f"the chat template reads {', '.join(sorted(read))}", **unread)


def render_chat(template: str, **variables: Any) -> str:
    """Return the text of a conversation.

    Args:
        template: Jinja source, as in a checkpoint.
        variables: `messages`, `add_generation_prompt`, special tokens, and others it may read;
            `tools` and `documents` are None unless given.

    Raises:
        ValueError: the template refuses the conversation, fails on it, accesses something
            forbidden, or exceeds the limits of `chat_bounds`.
    """
    environment = _environment()
    try:
        parsed = environment.from_string(template)
        pieces = parsed.generate(**{"tools": None, "documents": None, **variables})
        return environment.joined(pieces)
    except (jinja2.TemplateError, BoundsError) as error:
        said = one_line(error, 1000)
        raise ValueError(f"the chat template refuses this conversation: {said}") from error
    except Exception as error:  # a template may raise any error
        said = f"{type(error).__name__}: {one_line(error)}"
        raise ValueError(f"the chat template fails on this conversation: {said}") from error


def _environment() -> BoundedEnvironment:
    """Return the sandbox, with the functions that transformers provides to templates."""
    environment = BoundedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = environment.bounded(_to_json)
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON without the HTML escapes of jinja2's own filter."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)
