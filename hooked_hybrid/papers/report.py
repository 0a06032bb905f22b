"""The report: a page with every table and figure, published and ours, and one of three verdicts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hooked_hybrid.outputs.figures import save_figure
from hooked_hybrid.outputs.foreign import LARGEST_RESULTS, require_plain_file
from hooked_hybrid.outputs.tables import markdown_cell, write_csv
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.papers.checks import UNDECIDED
from hooked_hybrid.papers.claims import (
    TITLES,
    Finding,
    Item,
    Paper,
    Verdict,
    judge,
    show_verdict,
    together,
)
from hooked_hybrid.papers.controls import CONTROLS
from hooked_hybrid.papers.evidence import Evidence, Untested
from hooked_hybrid.papers.figures import value_rows
from hooked_hybrid.papers.reading import facts_of, how_to_read

if TYPE_CHECKING:
    import pandas as pd

PAGE, CLAIMS = "report.md", "claims.csv"


@dataclass(frozen=True)
class Judged:
    """An item with the verdict and finding of each claim, its values, controls and files.

    `why_not` is the reason why an item was not run; then every claim is untested.
    """

    item: Item
    verdicts: tuple[Verdict, ...]
    findings: tuple[Finding, ...]
    picture: Path | None
    table: Path | None
    values: tuple[list[str], list[list[str]]] | None = None
    controls: tuple[str, ...] = ()
    why_not: str = ""

    @property
    def verdict(self) -> Verdict:
        """The verdict on the item."""
        return together(self.verdicts)


def write_item(item: Item, evidence: Evidence, folder: Path) -> Judged:
    """Judge an item and write its figure (PNG and PDF) and its table (CSV).

    Raises:
        OSError: a file cannot be written.
    """
    import pandas as pd

    found = [judge(claim, evidence) for claim in item.claims]
    values = _values(item, evidence)
    controls = tuple(CONTROLS[name].line(evidence) for name in item.controls)
    base, picture, table = folder / _slug(item.name), None, None
    if item.draw is not None and (figure := item.draw(evidence)) is not None:
        picture = save_figure(figure, base)[0]
    if values:
        headings, lines = values
        table = base.with_suffix(".csv")
        write_csv(pd.DataFrame(lines, columns=headings), table)
    verdicts, findings = zip(*found, strict=True)
    return Judged(item, verdicts, findings, picture, table, values, controls)


def not_run(item: Item, error: Exception) -> Judged:
    """Return an item that was stopped by an error: every claim is untested for that reason."""
    said = str(error.args[0]) if error.args else ""
    known = isinstance(error, Untested | ValueError)
    why = f"not run: {said if known else ': '.join(filter(None, (type(error).__name__, said)))}"
    n = len(item.claims)
    findings = (Finding(None, why),) * n
    return Judged(item, (Verdict.UNTESTED,) * n, findings, None, None, why_not=why)


def items_in(folder: Path) -> list[str]:
    """Return the names of the items in a folder's report; empty if there is no report.

    Raises:
        ValueError: its claims cannot be read.
    """
    import pandas as pd

    path = folder / CLAIMS
    if not path.exists():
        return []
    try:
        require_plain_file(path, LARGEST_RESULTS)
        return list(map(str, pd.read_csv(path)["item"].unique()))
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path} cannot be read, so that the items of the report are unknown: remove it, and "
            f"run all items again with --resume"
        ) from error


def write_report(
    paper: Paper,
    done: Sequence[Judged],
    evidence: Evidence,
    card: Mapping[str, str],
    folder: Path,
    command: str,
) -> Path:
    """Write `report.md` and `claims.csv`, each completely or not at all; return the page.

    Args:
        paper: whose items these are.
        done: items, in order.
        evidence: by which they were judged.
        card: facts about the model, by name.
        folder: of the files.
        command: the command line.

    Raises:
        OSError: a file cannot be written.
    """
    write_csv(_claims(done, evidence), folder / CLAIMS)
    parts = [
        f"# {TITLES[paper]}: tables and figures, run on {markdown_cell(evidence.name)}",
        how_to_read(evidence),
        "## All items\n\n" + _overview(done, evidence),
        *(_section(entry, evidence) for entry in done),
        *_controls(done, evidence),
        "## What was run\n\n" + _what_was_run(facts_of(evidence, card), command),
    ]
    page = folder / PAGE
    with replacing(page) as temporary:
        temporary.write_text("\n\n".join(part.strip() for part in parts) + "\n", encoding="utf-8")
    return page


def verdict_of(entry: Judged, evidence: Evidence) -> str:
    """Return an item's verdict in words, with the number of its claims of each kind."""
    subjects = {claim.subject or evidence.subject for claim in entry.item.claims}
    return show_verdict(entry.verdict, subjects.pop() if len(subjects) == 1 else evidence.subject)


def count_claims(entry: Judged) -> str:
    """Return the numbers of an item's claims that were shown, undecided and untested."""
    of = Counter(entry.verdicts)
    tested = of[Verdict.SHOWN] + of[Verdict.NOT_SHOWN]
    found = zip(entry.verdicts, entry.findings, strict=True)
    n_open = sum(v is Verdict.NOT_SHOWN and UNDECIDED in f.note for v, f in found)
    parts = [f"{of[Verdict.SHOWN]} of {tested} shown"] if tested else []
    parts += [f"{n_open} undecided"] if n_open else []
    parts += [f"{of[Verdict.UNTESTED]} untested"] if of[Verdict.UNTESTED] else []
    return ", ".join(parts)


def markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(map(markdown_cell, line)) + " |" for line in lines)


def _values(item: Item, evidence: Evidence) -> tuple[list[str], list[list[str]]] | None:
    """Return the item's own table, or the figures of every setting of its runs."""
    if item.rows is not None:
        return item.rows(evidence)
    rows = [
        [run, *line]
        for run in item.runs
        for line in value_rows(evidence, run, list(evidence.tables[run]["setting"].unique()))
    ]
    return (
        (["run", "setting", "accuracy", "inside the window", "beyond it"], rows) if rows else None
    )


def _claims(done: Sequence[Judged], evidence: Evidence) -> pd.DataFrame:
    import pandas as pd

    return pd.DataFrame(
        {
            "item": entry.item.name,
            "claim": claim.text,
            "about": claim.about,
            "published": claim.published,
            "ours": finding.ours,
            "note": finding.note,
            "verdict": show_verdict(verdict, claim.subject or evidence.subject),
            "prediction": claim.prediction,
        }
        for entry in done
        for claim, verdict, finding in zip(
            entry.item.claims, entry.verdicts, entry.findings, strict=True
        )
    )


def _overview(done: Sequence[Judged], evidence: Evidence) -> str:
    rows = [
        [
            f"[{entry.item.name}](#{entry.item.name.lower().replace(' ', '-').replace('.', '')})",
            entry.item.shows,
            f"**{verdict_of(entry, evidence)}**",
            count_claims(entry),
        ]
        for entry in done
    ]
    return markdown(["item", "what it shows", "verdict", "claims"], rows)


def _section(entry: Judged, evidence: Evidence) -> str:
    item, table = entry.item, _claims([entry], evidence)
    rows = [
        [
            line["claim"],
            line["about"],
            line["published"],
            "<br>".join(filter(None, (line["ours"], line["note"]))),
            line["verdict"],
        ]
        for line in table.to_dict("records")
    ]
    head = f"{item.shows} **Verdict: {verdict_of(entry, evidence)}** ({count_claims(entry)})."
    parts = [f"## {item.name}", f"{head} {item.note}".strip()]
    parts.append(markdown(["claim", "about", "published", "ours", "verdict"], rows))
    if entry.picture is not None:
        parts.append(f"![{item.name}]({entry.picture.name})")
    parts.append(
        "Prediction for the published weights, claim by claim:\n\n"
        + "\n".join(f"{i}. {claim.prediction}" for i, claim in enumerate(item.claims, 1))
    )
    if entry.controls:
        parts.append("Controls:\n\n" + "\n".join(f"- {line}." for line in entry.controls))
    if entry.values:
        parts.append(_fold(f"{len(entry.values[1])} values", markdown(*entry.values)))
    return "\n\n".join(parts)


def _controls(done: Sequence[Judged], evidence: Evidence) -> list[str]:
    ran = (entry for entry in done if not entry.why_not)
    names = dict.fromkeys(name for entry in ran for name in entry.item.controls)
    tables = [
        f"### {control.title}\n\n{_fold('values', markdown(*control.rows(evidence)))}"
        for control in (CONTROLS[name] for name in names)
    ]
    return ["## Controls", *tables] if tables else []


def _what_was_run(facts: Mapping[str, str], command: str) -> str:
    shown = f"```\n{command}\n```\n\n" if command else ""
    return shown + markdown(["", ""], [[name, value] for name, value in facts.items()])


def _fold(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>"


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
