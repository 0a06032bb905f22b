"""Statistics of a sweep: a row for each setting, with means and their intervals over needles."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hooked_hybrid.runs.intervals import SHARE, mean_interval

if TYPE_CHECKING:
    import pandas as pd


def select_scored(table: pd.DataFrame) -> pd.DataFrame:
    """Return the cells with an accuracy: those whose prompt contains a needle.

    Raises:
        ValueError: there is none.
    """
    cells = table[table["accuracy"].notna()]
    if cells.empty:
        raise ValueError("the table has no cell with a score: no prompt held a needle")
    return cells


def interval_of(rows: pd.DataFrame) -> tuple[float, float]:
    """Return the 95% interval of the accuracy of some cells, over needles.

    Both ends are NaN for a single needle.
    """
    return mean_interval(rows["accuracy"], rows["needle_id"], SHARE)


def summary(table: pd.DataFrame) -> pd.DataFrame:
    """Return one row for each setting, in the order of the table.

    Cells without a score are left out. Columns: `setting`, `stage`, `k`; `n` cells of `n_needles`
    needles; `accuracy` (mean graded score / 5) with `low` and `high`, its 95% interval over needles
    (see `hooked_hybrid.runs.intervals`; NaN if there is one needle); `binary`, the share of
    whole answers;
    `inside` and `outside`, the accuracy with the needle within the attention window of the last
    prompt token and beyond it (NaN if there is no such cell), of `n_inside` and `n_outside`
    cells.

    Raises:
        ValueError: no cell has a score.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> from hooked_hybrid.runs.statistics import summary
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> summary(sweep.niah(model, cells, {"whole": []}, verbose=False))["accuracy"].tolist()
        [1.0]
    """
    import pandas as pd

    cells = select_scored(table)
    groups = cells.groupby("setting", sort=False)
    return pd.DataFrame([{"setting": name, **_figures(rows)} for name, rows in groups])


def _figures(rows: pd.DataFrame) -> dict[str, Any]:
    inside = rows["in_window"].astype(bool)
    low, high = interval_of(rows)
    return {
        "stage": rows["stage"].iloc[0],
        "k": rows["k"].iloc[0],
        "n": len(rows),
        "n_needles": rows["needle_id"].nunique(dropna=False),
        "accuracy": rows["accuracy"].mean(),
        "low": low,
        "high": high,
        "binary": rows["binary"].mean(),
        "inside": rows.loc[inside, "accuracy"].mean(),
        "outside": rows.loc[~inside, "accuracy"].mean(),
        "n_inside": int(inside.sum()),
        "n_outside": int((~inside).sum()),
    }
