"""The class of the program's commands: lists by commas, errors that show the value, short help."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from hooked_hybrid.outputs.foreign import printable

HELP_ALL = "--help-all"
WIDEST = 100
"""Columns of help on a wider screen."""
FIRST_PANEL = "Options"
MORE = {
    "Prompts and answers, more": "prompts and answers",
    "Large models, several machines": "large models and several machines",
    "More options": "details",
}
"""Panels that `--help` leaves out, with the words by which it names them."""


class Command(TyperCommand):
    """A command whose lists are given by commas or one by one, and whose help is short."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse a command line, in which an option of several values may have them by commas."""
        given = list(args)
        if HELP_ALL in given:
            self.print_help(ctx, is_whole=True)
            raise typer.Exit
        try:
            return list(super().parse_args(ctx, list(split_lists(args, self.params))))
        except typer.BadParameter as error:
            error.message += _unread(error.param, given, error.message)
            raise

    def format_help(self, ctx: Any, formatter: Any) -> None:  # noqa: ARG002
        """Print the help without what few need."""
        self.print_help(ctx, is_whole=False)

    def print_help(self, ctx: Any, is_whole: bool) -> None:
        """Print what the command does, and its options by panel.

        Args:
            ctx: of the command.
            is_whole: with the panels of `MORE`.
        """
        console = Console(highlight=False)
        console.width = min(console.width, WIDEST)
        console.print(Text(f"\nUsage: {ctx.command_path} [OPTIONS]\n", style="bold"))
        for paragraph in (self.help or "").split("\n\n"):
            is_table = "\n    " in paragraph or paragraph.startswith("    ")
            console.print(Text(paragraph if is_table else " ".join(paragraph.split())), end="\n\n")
        panels: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            if not getattr(param, "hidden", False):
                panel = getattr(param, "rich_help_panel", None) or FIRST_PANEL
                panels.setdefault(str(panel), []).append(param)
        left_out = [MORE[name] for name in panels if name in MORE and not is_whole]
        panels = {n: p for n, p in panels.items() if is_whole or n not in MORE}
        width = max(len(_names(param)) for params in panels.values() for param in params)
        for name, params in sorted(panels.items(), key=lambda item: item[0] in MORE):
            table = Table.grid(padding=(0, 2))
            table.add_column(no_wrap=True, min_width=width)
            table.add_column(overflow="fold")
            for param in params:
                table.add_row(Text(_names(param), style="bold cyan"), _said(param))
            console.print(Panel(table, title=name, title_align="left", border_style="dim"))
        if left_out:
            console.print(Text(f"Options for {', '.join(left_out)}: {HELP_ALL}\n"))


def split_lists(words: Sequence[str], params: Sequence[Any]) -> Iterator[str]:
    """Yield the words of a command line, with one word for each value of an option's list.

    Args:
        words: such as "--k 0,4,8" or "--k=0,4,8". The name of an existing file is one value.
        params: of the command.
    """
    lists = {name for param in params if _is_list(param) for name in param.opts}
    waiting: str | None = None
    for word in words:
        name, equals, value = word.partition("=")
        if waiting is not None:
            for i, part in enumerate(_parts(word)):
                yield from [waiting, part] if i else [part]
            waiting = None
        elif equals and name in lists:
            yield from (f"{name}={part}" for part in _parts(value))
        else:
            waiting = word if word in lists else None
            yield word


def _is_list(param: Any) -> bool:
    return bool(getattr(param, "multiple", False))


def _parts(value: str) -> list[str]:
    """Return the values of a list by commas; a value with an empty part is left as it is."""
    parts = [part.strip() for part in value.split(",")]
    return [value] if not all(parts) or len(parts) == 1 or _exists(value) else parts


def _exists(name: str) -> bool:
    try:
        return Path(name).exists()
    except OSError:  # too long for a name
        return False


def _unread(parameter: Any, words: Sequence[str], message: str) -> str:
    """Return an addition to an option's error: the given value."""
    names = getattr(parameter, "opts", None) or []
    pairs = [*pairwise(words), *(tuple(w.split("=", 1)) for w in words)]
    values = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names]
    said = "" if any(value in message for value in values) else ", ".join(map(repr, values))
    return printable(f": {said}" if said else "")


def _names(param: Any) -> str:
    return ", ".join([*param.opts, *param.secondary_opts])


def _said(param: Any) -> Text:
    """Return the help of an option, its choices and its default."""
    named = _choices(param)
    said = [" | ".join(named)]
    if _is_list(param):
        said.append("several by commas")
    if param.required:
        said.append("required")
    elif shown := _default(param):
        said.append(f"default: {shown}")
    inside = "; ".join(part for part in said if part)
    text = Text(param.help or "")
    return text.append(f" [{inside}]", style="dim") if inside else text


def _choices(param: Any) -> list[str]:
    """Return the values among which an option chooses; none if it takes others."""
    kind = getattr(param, "type", None) or getattr(param, "type_descriptor", None)  # by version
    return [
        str(getattr(choice, "value", choice)) for choice in getattr(kind, "choices", None) or ()
    ]


def _default(param: Any) -> str:
    """Return an option's default in words; nothing if it has none to show."""
    if isinstance(param.show_default, str):
        return param.show_default
    default = param.default
    if default is None or callable(default) or isinstance(default, bool) or not param.show_default:
        return ""
    values = default if isinstance(default, list | tuple) else [default]
    return ", ".join(str(getattr(value, "value", value)) for value in values)
