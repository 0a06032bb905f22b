"""A report of a sweep and its results, as one self-contained HTML page."""

from __future__ import annotations

import base64
import json
import platform
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from importlib import metadata
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from hooked_hybrid.niah.head_sets import standing_said
from hooked_hybrid.niah.report.plots import accuracy_by_k, retrieval_map, retrieval_maps
from hooked_hybrid.niah.report.published import PUBLISHED, Published, ours
from hooked_hybrid.outputs.figures import file_name, save_figure
from hooked_hybrid.outputs.foreign import refuse_link
from hooked_hybrid.outputs.tables import write_csv
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.runs.statistics import select_scored, summary

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

CAUTION = (
    "The models differ in size, training and text, and so may the prompts: a toy model does not "
    "confirm a claim about a 2B one."
)
"""The sentence below every comparison with published results."""
SMALL_MARGIN = 1e-4
_PACKAGES = "hooked-hybrid torch tokenizers numpy pandas matplotlib".split()
_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2rem auto; padding: 0 1rem;
  color: #222; background: #fff }
table { border-collapse: collapse; margin: 1rem 0; font-size: 14px }
th, td { border-bottom: 1px solid #ddd; padding: 4px 12px 4px 0; text-align: left;
  vertical-align: top }
td { font-variant-numeric: tabular-nums }
img { max-width: 100%; height: auto }
pre { background: #f4f4f4; padding: 8px; overflow-x: auto; white-space: pre-wrap }
.note { color: #555 }
"""


class Written(NamedTuple):
    """The files of a report: the page, the cells, and the figures.

    Examples:
        >>> from hooked_hybrid.niah.report import Written
        >>> Written._fields
        ('report', 'table', 'pictures')
    """

    report: Path
    table: Path
    pictures: list[Path]


def write_report(
    table: pd.DataFrame,
    settings: Sequence[Any],
    model_card: Mapping[str, Any],
    folder: str | PathLike[str],
    published: Sequence[Published] = PUBLISHED,
    *,
    command: str = "",
    thesis_depth: bool = False,
    losses: pd.DataFrame | None = None,
    figures: Mapping[str, Figure] | None = None,
    among: pd.DataFrame | None = None,
    unmapped: Collection[str] = (),
) -> Written:
    """Write `report.html`, `table.csv` and the figures of a sweep, each atomically.

    Args:
        table: of `niah`.
        settings: the `Setting`s of the sweep; their names and `spec` are listed.
        model_card: facts about the model, by name.
        folder: for the files; those of an earlier report are replaced.
        published: published results, shown next to the same figures of this table.
        command: the command line that produced the table.
        thesis_depth: see `retrieval_maps`.
        losses: of `hooked_hybrid.niah.language.text_loss`, shown next to the accuracies.
        figures: further figures, by title.
        among: of `hooked_hybrid.niah.head_sets.standings`, listed if it has rows.
        unmapped: settings without maps, such as numerous sets of heads.

    Raises:
        ValueError: no cell has a score.
        OSError: a file cannot be written.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> from hooked_hybrid.niah.report import write_report
        >>> from hooked_hybrid.niah.settings import Setting
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> settings = [Setting("whole")]
        >>> table = sweep.niah(model, cells, settings, verbose=False)
        >>> write_report(table, settings, {"model": "tiny-griffin"}, "results").report.name
        'report.html'
    """
    folder = Path(folder)
    further = {
        title: save_figure(figure, folder / file_name(title))[0]
        for title, figure in (figures or {}).items()
    }
    pictures = save_pictures(table[~table["setting"].isin(unmapped)], folder, thesis_depth)
    shown = {"maps": pictures[0]} | {p.stem: p for p in pictures if p.stem.startswith("accuracy")}
    write_csv(table, folder / "table.csv")
    body = [
        "<h1>Needle in a haystack</h1>",
        f"<h2>What was run</h2>{_what_was_run(table, settings, model_card, command)}",
        f"<h2>Accuracy by setting</h2>{_accuracy(table, losses)}",
        *(f"<h2>{escape(title)}</h2>{_image(path, title)}" for title, path in further.items()),
        f"<h2>Retrieval maps</h2>{_image(shown.pop('maps'), 'retrieval maps')}",
        *(f"<h2>{_TITLES[name]}</h2>{_image(path, name)}" for name, path in shown.items()),
    ]
    if among is not None and not among.empty:
        body.append(f"<h2>Among sets of heads</h2>{_standings(among)}")
    if published:
        beside = f"<p><strong>{CAUTION}</strong></p>{_beside(table, published)}"
        body.append(f"<h2>Beside the papers</h2>{beside}")
    page = (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f"<title>Needle in a haystack</title><style>{_STYLE}</style></head>\n<body>\n"
        + "\n".join(body)
        + "\n</body></html>\n"
    )
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page, encoding="utf-8")
    return Written(folder / "report.html", folder / "table.csv", [*further.values(), *pictures])


def save_pictures(
    table: pd.DataFrame, folder: str | PathLike[str], thesis_depth: bool = False
) -> list[Path]:
    """Write every figure as PNG and PDF; return the paths of the PNGs, the joint maps first.

    The curves are left out if no setting has a k; their split by window, if no needle is beyond it.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> from hooked_hybrid.niah.report import save_pictures
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> table = sweep.niah(model, cells, {"whole": []}, verbose=False)
        >>> [path.suffix for path in save_pictures(table, "pictures")]
        ['.png', '.png']
    """
    folder = Path(folder)
    refuse_link(folder / "maps")
    cells = select_scored(table)
    figures = {"retrieval_maps": retrieval_maps(cells, thesis_depth)}
    if cells["k"].notna().any() and cells["read_twice"].nunique() == 1:
        figures["accuracy_by_k"] = accuracy_by_k(cells)
        if not cells["in_window"].astype(bool).all():
            figures["accuracy_by_k_and_window"] = accuracy_by_k(cells, by_window=True)
    paths = [save_figure(figure, folder / name)[0] for name, figure in figures.items()]
    for i, setting in enumerate(cells["setting"].unique()):
        figure = retrieval_map(cells, setting, thesis_depth)
        paths.append(save_figure(figure, folder / "maps" / f"{i:02}_{file_name(setting)}")[0])
    return paths


def summary_rows(
    table: pd.DataFrame, losses: pd.DataFrame | None = None
) -> tuple[list[str], list[list[str]]]:
    """Return the headings and the rows of `summary`, as text for a page or a screen.

    With `losses` (of `text_loss`), the loss of text in nats a token and its difference from the
    first setting are shown too.

    Examples:
        >>> from hooked_hybrid.niah import needles, prompts, sweep
        >>> from hooked_hybrid.niah.report import summary_rows
        >>> cells = prompts.grid(model, [needles.PAPER], lengths=[96], depths=[0.5])
        >>> headings, rows = summary_rows(sweep.niah(model, cells, {"whole": []}, verbose=False))
        >>> headings[:3], rows[0][:3]
        (['setting', 'cells', 'accuracy'], ['whole', '1', '100.0%'])
    """
    figures = summary(table)
    headings = ["setting", "cells", "accuracy", "95% interval", "whole answer"]
    windowed = bool(figures["n_outside"].sum())
    headings += ["inside window", "beyond it"] if windowed else []
    headings += [] if losses is None else ["text loss", "more"]
    of_text = {} if losses is None else losses.set_index("setting").to_dict("index")
    rows = []
    for row in figures.to_dict("records"):
        interval = "one needle" if row["low"] != row["low"] else _interval(row)
        texts = [str(row["setting"]), str(row["n"]), _percent(row["accuracy"]), interval]
        texts.append(_percent(row["binary"]))
        texts += [_percent(row["inside"]), _percent(row["outside"])] if windowed else []
        if losses is not None:
            text = of_text[row["setting"]]
            texts += [f"{text['loss']:.3f}", f"{text['more']:+.3f}"]
        rows.append(texts)
    return headings, rows


def versions() -> dict[str, str]:
    """Return the versions that the numbers may depend on.

    Examples:
        >>> from hooked_hybrid.niah.report import versions
        >>> "torch" in versions()
        True
    """
    found = {"Python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


_TITLES = {
    "accuracy_by_k": "Accuracy by k",
    "accuracy_by_k_and_window": "Accuracy by k, inside the window and beyond it",
}


def _what_was_run(
    table: pd.DataFrame, settings: Sequence[Any], model_card: Mapping[str, Any], command: str
) -> str:
    lengths, depths = table["length"], table["depth"]
    prompts = table.drop_duplicates("prompt_id")
    facts = {
        **model_card,
        "prompts": f"{len(prompts)}: {lengths.nunique()} lengths from {lengths.min():,} to "
        f"{lengths.max():,} tokens, {depths.nunique()} depths",
        "depth": _depths_said(prompts),
        "needles": _list(table["needle_id"].unique()),
        "template": _list(table["template"].unique()),
        "context given twice": _list(table["read_twice"].unique()),
        "distractors": _list(table["n_distractors"].unique()),
        "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
    }
    specs = [[setting.name, json.dumps(dict(setting.spec))] for setting in settings]
    listed = (
        f"<details><summary>{len(specs)} settings</summary>{_table(['setting', 'spec'], specs)}"
    )
    shown = f"<pre>{escape(command)}</pre>" if command else ""
    return f"{shown}{_table(['', ''], [[k, str(v)] for k, v in facts.items()])}{listed}</details>"


def _depths_said(prompts: pd.DataFrame) -> str:
    """Return the distances of needles from requested depths, and the number within sentences."""
    hidden = prompts[prompts["accuracy"].notna()]
    if "real_depth" not in hidden or hidden["placed_between"].isna().all():
        return "as asked: where the needles really stand was not kept"
    off = 100 * (hidden["real_depth"] - hidden["depth"]).abs()
    amid = hidden["placed_between"].value_counts().drop("sentences", errors="ignore")
    near = "".join(f"; {n} between {what}, for no sentence ends near" for what, n in amid.items())
    return (
        f"needles stand {off.mean():.1f} points from the asked depth on average, {off.max():.1f} "
        f"at most; column real_depth has each{near}"
    )


def _accuracy(table: pd.DataFrame, losses: pd.DataFrame | None = None) -> str:
    n = select_scored(table)["needle_id"].nunique(dropna=False)
    close = int((table["min_margin"] < SMALL_MARGIN).sum())
    notes = [
        "Accuracy is the mean graded score / 5 (thesis, Table 2.1); whole answer is the share of "
        "cells that hold all of what to do.",
        "There is one needle: no interval can be given, for its prompts say nothing of others."
        if n < 2
        else f"Intervals are over {n} needles: they hold the mean over all such needles in 95% of "
        "samples or more, and where all are alike say how many others may be unlike.",
        f"{close} of {len(table)} cells chose a token by less than {SMALL_MARGIN:g} in its logit: "
        "there a rounding may decide.",
    ]
    return _table(*summary_rows(table, losses)) + "".join(
        f'<p class="note">{note}</p>' for note in notes
    )


def _beside(table: pd.DataFrame, published: Sequence[Published]) -> str:
    rows = [[p.what, p.model, p.value, ours(p, table), p.source] for p in published]
    return _table(["result", "their model", "published", "this model", "source"], rows)


def _standings(among: pd.DataFrame) -> str:
    rows = [
        [
            str(row["setting"]),
            _percent(row["accuracy"]),
            standing_said(row),
            f"{_percent(row['mean'])} ({_percent(row['lowest'])} to {_percent(row['highest'])})",
        ]
        for row in among.to_dict("records")
    ]
    return _table(["choice", "accuracy", "among", "the sets: mean (range)"], rows) + (
        '<p class="note">Needles inside the window. A set keeps as many heads of each attention '
        "layer as the choice does. A rank is of these sets on these prompts.</p>"
    )


def _table(headings: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings)
    lines = ("".join(f"<td>{escape(text)}</td>" for text in row) for row in rows)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def _image(path: Path, what: str) -> str:
    data = base64.b64encode(path.read_bytes()).decode("ascii")
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{data}"></p>'


def _list(values: Iterable[Any], most: int = 6) -> str:
    texts = [str(value) for value in values]
    more = f" and {len(texts) - most} more" if len(texts) > most else ""
    return ", ".join(texts[:most]) + more


def _percent(share: float) -> str:
    return "" if share != share else f"{share:.1%}"


def _interval(row: Mapping[str, Any]) -> str:
    return f"{100 * row['low']:.1f} to {100 * row['high']:.1f}%"
