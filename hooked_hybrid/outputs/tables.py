"""Tables as files: texts of a model or of others stay texts, whoever opens the file."""

from __future__ import annotations

import csv
import re
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hooked_hybrid.options import require
from hooked_hybrid.outputs.foreign import printable
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    import pandas as pd

_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-](\d+(\.\d*)?|\.\d+)?%?")
_TAG = re.compile(r"<(?!br>)(?=[A-Za-z/!?])")


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table, whole or not at all, such that a spreadsheet takes no text for a formula.

    A text that begins with `=`, `+`, `-`, `@`, a tab or a return, and is not a number, gets a `'`
    in front; so does one that begins so after some `'`. `read_csv` takes it away again.
    """
    shown = table.map(_quote)
    has_return = bool(shown.map(lambda v: isinstance(v, str) and "\r" in v).any(axis=None))
    quoting = csv.QUOTE_NONNUMERIC if has_return else csv.QUOTE_MINIMAL  # a return ends a row, bare
    with replacing(path) as temporary:
        shown.to_csv(temporary, index=False, quoting=quoting)


def read_csv(path: str | PathLike[str], texts: tuple[str, ...] = ("output",)) -> pd.DataFrame:
    """Return a table that `write_csv` wrote, or an earlier version of this library.

    Args:
        path: of the file.
        texts: columns in which every value is a text, "NA" and "" too.
    """
    require("pandas")
    import pandas as pd

    table = pd.read_csv(path)
    if kept := [name for name in texts if name in table]:
        plain = pd.read_csv(path, usecols=kept, dtype=str, na_filter=False)
        table[kept] = plain[kept]
    return table.map(_unquote)


def markdown_cell(value: object) -> str:
    """Return a value as a cell of a Markdown table: no HTML but `<br>`, no picture, one line."""
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
