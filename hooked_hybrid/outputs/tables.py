"""Tables as files, in which foreign text stays text in every program that opens them."""

from __future__ import annotations

import csv
import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.outputs.foreign import printable
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-](\d+(\.\d*)?|\.\d+)?%?")
_TAG = re.compile(r"<(?!br>)(?=[A-Za-z/!?])")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table atomically, such that a spreadsheet does not read any text as a formula.

    A text that begins with `=`, `+`, `-`, `@`, a tab or a return, and is not a number, gets a `'`
    in front; so does one that begins so after one or more `'`. `read_csv` removes it.
    """
    shown = table.map(_quote)
    has_return = bool(shown.map(lambda v: isinstance(v, str) and "\r" in v).any(axis=None))
    quoting = (
        csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL
    )  # an unquoted return ends a row
    with replacing(path) as temporary:
        shown.to_csv(temporary, index=False, quoting=quoting)


def read_csv(path: str | PathLike[str], texts: tuple[str, ...] = ("output",)) -> pd.DataFrame:
    """Return a table that `write_csv`, or an earlier version of this library, wrote.

    Args:
        path: of the file.
        texts: columns in which every value is a text, including "NA" and "".
    """
    import pandas as pd

    table = pd.read_csv(path)
    if kept := [name for name in texts if name in table]:
        plain = pd.read_csv(path, usecols=kept, dtype=str, na_filter=False)
        table[kept] = plain[kept]
    return table.map(_unquote)


def markdown_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: one line, without HTML except `<br>`."""
    text = printable(value).replace("|", "\\|").replace("![", "!\\[")
    return _TAG.sub("&lt;", " ".join(text.splitlines()))


def _quote(value: Any) -> Any:
    if not isinstance(value, str) or not _FORMULA.match(value) or _NUMBER.fullmatch(value):
        return value
    return f"'{value}"


def _unquote(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("'") and _FORMULA.match(value):
        return value[1:]
    return value
