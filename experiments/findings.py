"""Write the tables of `docs/findings_tables.md` from the folders of finished experiments.

    python -m experiments.findings docs/findings_tables.md results/FOLDER [FOLDER ...]

Each folder is one that `hooked-hybrid weights`, `layers`, `heads`, `controls` or `read-twice`
wrote.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from hooked_hybrid.niah.plots import replacing
from hooked_hybrid.niah.statistics import interval_of, scored

HEAD = """# Tables behind the findings

Accuracy is the mean graded score / 5 in percent, with its 95% interval over needles
(`hooked_hybrid.intervals`), for needles inside the attention window of the last prompt token and
beyond it. An interval is of the mean over all such needles: four that are all alike leave open what
60% of others do, so that 100 comes with [39.8, 100.0]. "Text loss" is that of haystack text in nats
a token, "more" what it is above the first setting's, with Student's interval over texts. Written by
`python -m experiments.findings`.
"""


def accuracy(rows: pd.DataFrame) -> str:
    """Return mean and interval in percent; a dash where there is nothing."""
    if rows.empty:
        return "-"
    low, high = interval_of(rows)
    interval = "" if low != low else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * rows['accuracy'].mean():.1f}{interval}"


def section(folder: Path) -> str:
    """Return one experiment's table."""
    cells = scored(pd.read_csv(folder / "table.csv"))
    losses = pd.read_csv(folder / "text_loss.csv").set_index("setting")
    inside = cells["in_window"].astype(bool)
    lines = ["| setting | inside | beyond | text loss | more |", "|---|---|---|---|---|"]
    for name in cells["setting"].unique():
        own, text = cells["setting"] == name, losses.loc[name]
        ends = f"[{text['more_low']:+.3f}, {text['more_high']:+.3f}]"
        alike = text["more_low"] == text["more_high"]
        more = f"{text['more']:+.3f} {'(in every text)' if alike else ends}"
        parts = (accuracy(cells[own & where]) for where in (inside, ~inside))
        lines.append(f"| {name} | {' | '.join(parts)} | {text['loss']:.3f} | {more} |")
    n_inside, n_beyond = (cells[w]["prompt_id"].nunique() for w in (inside, ~inside))
    title = f"## {folder.name.removeprefix('exp-')}"
    counts = (
        f"{n_inside} prompts inside, {n_beyond} beyond; {cells['needle_id'].nunique()} needles."
    )
    return "\n".join([title, "", counts, "", *lines, ""])


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("page", type=Path)
    parser.add_argument("folders", type=Path, nargs="+")
    args = parser.parse_args()
    with replacing(args.page) as temporary:
        temporary.write_text("\n".join([HEAD, *map(section, args.folders)]), encoding="utf-8")


if __name__ == "__main__":
    main()
