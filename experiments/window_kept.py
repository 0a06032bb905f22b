"""The figures of tiny-griffin's tables on the page on needles outside the window.

Part of `python -m experiments.outside_window`; kept by

    python -m experiments.pages keep outside-windows results/outside_window/pages/cells ...
    python -m experiments.pages keep outside-window results/outside_window/pages/figures ...
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd

from hooked_hybrid.outputs.whole_files import replacing

BETWEEN = ("3 after it", "up to the window", "in the window", "question", "answer so far")
"""Places between a needle and the last token."""


def write(out: Path, tables: dict[str, pd.DataFrame], unseen: int) -> None:
    """Write the cells of the windows, and the figures of the other tables (`settings`)."""
    windows = tables["windows"]
    parts = {
        "cells": windows.assign(in_window=~windows["beyond"]),
        "figures": settings(tables, unseen),
    }
    for name, table in parts.items():
        path = out / "pages" / name / "table.csv"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as temporary:
            table.to_csv(temporary, index=False)


def settings(tables: dict[str, pd.DataFrame], unseen: int) -> pd.DataFrame:
    """Return `setting` and its figures for the boundaries, the patching and the streams.

    `accuracy` is that with restarted layers, a fraction. Of patching, means over pairs: `logits`
    restored, and their largest absolute value over all places between needle and last token and all
    depths; `total` is the largest absolute value of a pair's total. `share` is the largest
    difference of the stream after the last layer, relative to its norm, over positions from
    `unseen` on, whose windows contain nothing of the needle.
    """
    rows: list[dict[str, Any]] = []
    for name, own in tables["boundaries"].groupby("setting", sort=False):
        rows.append({"setting": name, "accuracy": own["accuracy"].mean()})
    for on, own in tables["patched"].groupby("window"):
        means = own.groupby(["place", "depth"])["logits"].mean()
        totals = own.groupby("pair")["total"].first()
        row = {"setting": f"window {on}: all", "logits": totals.mean(), "total": totals.abs().max()}
        rows.append(row)
        for place in ("needle", "last token"):
            for depth, value in means[place].items():
                rows.append({"setting": f"window {on}: {place}, {depth}", "logits": value})
        most = means[means.index.get_level_values("place").isin(BETWEEN)].abs().max()
        rows.append({"setting": f"window {on}: between", "logits": most})
    for on, own in tables["differences"].groupby("window"):
        last = own["depth"] == own["depth"].max()
        far = own["pos"] >= unseen
        row = {"setting": f"window {on}: streams", "share": own[last & far]["difference"].max()}
        rows.append(row)
    return pd.DataFrame(rows)
