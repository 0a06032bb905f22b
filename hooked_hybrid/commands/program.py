"""`hooked-hybrid`: each experiment is a command, imported when the program starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module, metadata
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.outputs.foreign import printable

if TYPE_CHECKING:
    import typer
    from typer.core import TyperCommand

_EXPERIMENTS = "hooked_hybrid.commands.niah_experiments"
_ACCOUNTING = "hooked_hybrid.commands.accounting"
COMMANDS = {
    "niah": "hooked_hybrid.commands.niah",
    "read-twice": _EXPERIMENTS,
    "weights": _EXPERIMENTS,
    "layers": _EXPERIMENTS,
    "heads": _EXPERIMENTS,
    "controls": _EXPERIMENTS,
    "static": _EXPERIMENTS,
    "eval": "hooked_hybrid.commands.evaluation",
    "cached-state": "hooked_hybrid.commands.cached_state",
    "parameters": _ACCOUNTING,
    "compute": _ACCOUNTING,
    "plan": "hooked_hybrid.commands.plan",
    "harvest": "hooked_hybrid.commands.harvest",
    "reproduce": "hooked_hybrid.commands.papers",
}
"""Commands, with the module of the function of the same name (- for _)."""
INTERRUPTED = 130


def main() -> None:
    """Run the program."""
    build_app()()


def build_app() -> typer.Typer:
    """Return the program with all its commands."""
    import typer

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Experiments on hybrid language models (recurrence + attention).",
    )
    app.callback()(_program_options())
    command = _command()
    for name, module in COMMANDS.items():
        app.command(name, cls=command)(getattr(import_module(module), name.replace("-", "_")))
    return app


def _command() -> type[TyperCommand]:
    """Return the class of the commands, whose errors show an invalid value."""
    import typer
    from typer.core import TyperCommand

    class Command(TyperCommand):
        def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
            given = list(args)
            try:
                return super().parse_args(ctx, args)
            except typer.BadParameter as error:
                error.message += _unread(error.param, given, error.message)
                raise

    return Command


def _unread(parameter: Any, words: Sequence[str], message: str) -> str:
    """Return an addition to an option's error: the given value, and how to give several."""
    names = getattr(parameter, "opts", None) or []
    pairs = [*pairwise(words), *(tuple(w.split("=", 1)) for w in words)]
    values = [pair[1] for pair in pairs if len(pair) == 2 and pair[0] in names]
    said = "" if any(value in message for value in values) else ", ".join(map(repr, values))
    parts = [part.strip() for value in values for part in value.split(",") if part.strip()]
    if getattr(parameter, "multiple", False) and len(parts) > len(values):
        said += f"; give them one by one: {' '.join(f'{names[0]} {part}' for part in parts)}"
    return printable(f": {said}" if said else "")


def _program_options() -> Callable[..., None]:
    """Return the function of the program's own options."""
    import typer

    def show_version(asked: bool) -> bool:
        if asked:
            typer.echo(f"hooked-hybrid {metadata.version('hooked-hybrid')}")
            raise typer.Exit
        return asked

    def program(
        version: bool = typer.Option(
            False,
            "--version",
            callback=show_version,
            is_eager=True,
            help="Print the version and exit.",
        ),
    ) -> None:
        """Experiments on hybrid language models (recurrence + attention)."""

    return program


@contextmanager
def report_errors(kept: str | None) -> Iterator[None]:
    """Report errors of a command in one red line, with an exit code.

    Args:
        kept: the folder of the results so far, shown when a command with `--resume` is
            interrupted. None if nothing is kept.

    Raises:
        typer.Exit: 1 after an error of input, memory or disk, 130 after Ctrl-C.
    """
    import torch
    import typer

    try:
        yield
    except (ValueError, MemoryError, OSError, torch.OutOfMemoryError) as error:
        _say(f"error: {' '.join(str(error).split()) or type(error).__name__}", "bold red")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        if kept is None:
            _say("stopped", "yellow")
            raise typer.Exit(INTERRUPTED) from None
        resumed = command_line() + ("" if "--resume" in sys.argv else " --resume")
        _say(f"stopped; what is done is in {kept}. To go on: {resumed}", "yellow")
        raise typer.Exit(INTERRUPTED) from None


def folder(given: str | Path) -> Path:
    """Return the path of a folder from the text of an option.

    Raises:
        typer.BadParameter: it is blank, like an unset variable of a shell.
    """
    import typer

    if not str(given).strip():
        raise typer.BadParameter("is blank: give the name of a folder")
    return Path(given)


def command_line() -> str:
    """Return the command line, to be run again."""
    return shlex.join(["hooked-hybrid", *sys.argv[1:]])


def _say(text: str, style: str) -> None:
    from rich.console import Console

    shown = printable(text)  # it may quote what others wrote
    Console(stderr=True).print(shown, style=style, markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    main()
