"""`hooked-hybrid`: each experiment is a command, imported when the program starts."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module, metadata
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_hybrid.outputs.foreign import printable

if TYPE_CHECKING:
    import typer

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

    from hooked_hybrid.commands.parsing import Command

    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        help="Experiments on hybrid language models (recurrence + attention).",
    )
    app.callback()(_program_options())
    for name, module in COMMANDS.items():
        app.command(name, cls=Command)(getattr(import_module(module), name.replace("-", "_")))
    return app


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
