"""Results stored in the tree, with the command and the commit that made them."""

from __future__ import annotations

import re
from functools import cache
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from hooked_hybrid.outputs.folders import replacing

DOCS = Path(__file__).parents[2] / "docs"
KEPT = DOCS / "measured"
COMMIT = re.compile(r"[0-9a-f]{7,40}\+?(?:, \d{4}-\d\d-\d\d)?")
"""A commit, with a plus if files differed from it, and the day if it is known."""


class Kept(NamedTuple):
    """Results stored in the tree: a row a setting, needle and side of the window, or a setting."""

    name: str
    command: str
    commit: str
    table: pd.DataFrame

    @property
    def settings(self) -> list[str]:
        """Names of the settings, in order."""
        return list(dict.fromkeys(self.table["setting"]))


def keep(name: str, folder: Path, command: str, commit: str) -> Path:
    """Store the figures of a finished folder (`table.csv`, `text_loss.csv`) for pages in the tree.

    Cells become sums by setting, needle and side of the window, from which every mean and interval
    follows; a table with one row for each setting is stored unchanged, to nine digits.

    Raises:
        ValueError: no command or no commit.
    """
    if not command or not COMMIT.fullmatch(commit):
        raise ValueError(f"command {command!r}, commit {commit!r}: give both, a commit as 1a2b3c4")
    table = pd.read_csv(folder / "table.csv")
    if "needle_id" in table:
        cells = table[table["accuracy"].notna()].assign(inside=table["in_window"].astype(int))
        by = cells.groupby(["setting", "needle_id", "inside"], sort=False)["accuracy"]
        table = by.agg(n="size", total="sum").reset_index().rename(columns={"needle_id": "needle"})
        if (losses := folder / "text_loss.csv").exists():
            columns = ["setting", "loss", "more", "more_low", "more_high"]
            of_text = pd.read_csv(losses)[columns].drop_duplicates("setting")
            table = table.merge(of_text, on="setting", how="left", sort=False)
    path = KEPT / f"{name}.csv"
    path.parent.mkdir(exist_ok=True)
    body = table.to_csv(index=False, float_format="%.9g")
    with replacing(path) as temporary:
        text = f"# command: {command}\n# commit: {commit}\n{body}"
        temporary.write_text(text, encoding="utf-8")
    return path


@cache
def kept(name: str) -> Kept:
    """Return results by their name.

    Raises:
        ValueError: there are none, or their command or commit is missing.
    """
    path = KEPT / f"{name}.csv"
    if not path.exists():
        raise ValueError(f"no results {name!r} in {KEPT}: keep them, or write another name")
    first, second, body = path.read_text(encoding="utf-8").split("\n", 2)
    command, commit = (line.partition(": ")[2] for line in (first, second))
    if not first.startswith("# command: ") or not COMMIT.fullmatch(commit):
        raise ValueError(f"{path} does not begin with its command and its commit")
    return Kept(name, command, commit, pd.read_csv(StringIO(body)))
