"""Properties of the report: one page with all in it, and our figures with the papers'."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

from hooked_hybrid.niah.report.published import NOT_RUN, PUBLISHED, Measure, Published, ours
from hooked_hybrid.niah.report.report import CAUTION, Written, summary_rows, write_report
from hooked_hybrid.niah.sweep import top_k_settings
from hooked_hybrid.runs.statistics import summary
from tests.niah.test_summary import sweep_table

CARD = {"model": "tiny <griffin>", "parameters": "1,800,000"}
COMMAND = "hooked-hybrid niah --k 0 --haystack '<b>'"


class Page(HTMLParser):
    """What a browser would see of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.cells: list[str] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("img", "meta"):
            self._open.append(tag)
        if tag == "td":
            self.cells.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data
        if self._open and self._open[-1] == "td":
            self.cells[-1] += data


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    return sweep_table(ks=(0, 2), stages=("generation", "both"))


@pytest.fixture(scope="module")
def written(table: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    folder = tmp_path_factory.mktemp("report")
    yield write_report(table, top_k_settings([0, 2]), CARD, folder, command=COMMAND)


@pytest.fixture(scope="module")
def page(written: Written) -> Page:
    return Page(written.report.read_text(encoding="utf-8"))


def test_the_page_needs_nothing_from_outside(written: Written, page: Page):
    text = written.report.read_text(encoding="utf-8")
    assert "http" not in re.sub(r"base64,[^\"]*", "", text)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object"}
    assert "url(" not in text and "@import" not in text
    for tag, attributes in page.tags:
        if tag == "img":
            assert str(attributes["src"]).startswith("data:image/png;base64,")
            assert attributes["alt"]


def test_the_page_holds_the_maps_and_the_curves_as_they_were_saved(written: Written, page: Page):
    sources = [str(attributes["src"]) for tag, attributes in page.tags if tag == "img"]
    images = [base64.b64decode(source.split(",", 1)[1]) for source in sources]
    names = ["retrieval_maps", "accuracy_by_k", "accuracy_by_k_and_window"]
    folder = written.report.parent
    assert images == [(folder / f"{name}.png").read_bytes() for name in names]


def test_every_setting_has_a_map_of_its_own_and_every_picture_a_pdf(written: Written):
    maps = [path.name for path in written.pictures if path.parent.name == "maps"]
    assert maps == [
        "00_generation_k0.png",
        "01_generation_k2.png",
        "02_both_k0.png",
        "03_both_k2.png",
    ]
    for path in written.pictures:
        assert path.is_file() and path.with_suffix(".pdf").is_file()


def test_command_model_and_versions_are_stated_and_escaped(page: Page):
    assert COMMAND in page.words
    assert "tiny <griffin>" in page.cells and "1,800,000" in page.cells
    assert f"torch {torch.__version__}" in page.words
    assert "griffin" not in {tag for tag, _ in page.tags}
    for name in ("generation k=0", "both k=2"):
        assert page.cells.count(name) == 2  # among the settings and among the figures


def test_every_figure_of_the_summary_stands_on_the_page(table: pd.DataFrame, page: Page):
    for row in summary(table).itertuples():
        assert f"{row.accuracy:.1%}" in page.cells
        assert "one needle" in page.cells  # its prompts say nothing of other needles
        assert f"{row.inside:.1%}" in page.cells and f"{row.outside:.1%}" in page.cells


def test_every_published_result_stands_beside_ours_with_its_source(table: pd.DataFrame, page: Page):
    assert CAUTION in page.words
    assert "a toy model does not confirm a claim about a 2B one" in CAUTION
    rows = list(zip(*(page.cells[i:] for i in range(5)), strict=False))
    for entry in PUBLISHED:
        row = (entry.what, entry.model, entry.value, ours(entry, table), entry.source)
        assert row in rows


def test_the_table_reads_back_as_it_was(table: pd.DataFrame, written: Written):
    back = pd.read_csv(written.table)
    pd.testing.assert_frame_equal(back, table, check_dtype=False)


def test_cells_that_a_rounding_may_have_decided_are_counted(tmp_path: Path):
    table = sweep_table(ks=(2,), stages=("both",))
    table.loc[:2, "min_margin"] = 9e-5
    written = write_report(table, [], CARD, tmp_path)
    assert f"3 of {len(table)} cells chose a token by less than 0.0001" in (
        written.report.read_text(encoding="utf-8")
    )


def test_a_report_that_fails_half_way_leaves_the_old_one(
    table: pd.DataFrame, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = table[table.setting == "both k=2"]
    write_report(small, [], CARD, tmp_path, command="the first")
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}

    def full(path: Path, text: str, **options: Any) -> None:
        path.write_bytes(text[: len(text) // 2].encode())
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        write_report(small, [], CARD, tmp_path, command="the second")
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    monkeypatch.undo()
    write_report(small, [], CARD, tmp_path, published=(), command="the third")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "the third" in text and "the first" not in text and "Jamba-Mini" not in text


def test_columns_of_the_window_are_left_out_without_a_window():
    headings, rows = summary_rows(sweep_table(window=None))
    assert not {"inside window", "beyond it"} & set(headings)
    assert {len(row) for row in rows} == {len(headings)}
    headings, rows = summary_rows(sweep_table())
    assert {"inside window", "beyond it"} < set(headings)
    assert {len(row) for row in rows} == {len(headings)}


def one_needle(accuracies: dict[int, float], stage: str = "generation", twice: bool = False) -> Any:
    """Return a table in which each k has an accuracy."""
    table = sweep_table(ks=tuple(accuracies), stages=(stage,)).assign(read_twice=twice)
    return table.assign(accuracy=table.k.map(accuracies).astype(float))


@pytest.mark.parametrize(
    ("measure", "accuracies", "figure"),
    [
        ("k=0", {0: 0.02, 4: 1.0}, "2.0% at k = 0"),
        ("k=0", {2: 1.0}, NOT_RUN),
        ("k=2", {0: 0.0, 2: 0.875}, "87.5% at k = 2"),
        ("tipping k", {0: 0.0, 1: 0.2, 2: 0.6, 8: 1.0}, "2 of 8"),
        ("tipping k", {8: 1.0, 2: 0.4, 4: 0.5}, "4 of 8"),
        ("tipping k", {2: 0.9, 8: 1.0}, "2 of 8 or fewer"),
        ("tipping k", {0: 0.9, 8: 1.0}, "0 of 8"),
        ("tipping k", {0: 0.0, 8: 0.01}, "none: below 5% at every k"),
        ("tipping k", {8: 1.0}, NOT_RUN),
        ("all heads", {0: 0.0, 8: 0.95}, "95.0% at k = 8, the largest run"),
        ("15% of heads", {0: 0.0, 2: 0.7, 8: 1.0}, "70.0% at k = 2 of 8"),
        ("15% of heads", {0: 0.0, 1: 0.7, 8: 1.0}, NOT_RUN),
    ],
)
def test_our_figure_is_that_of_the_same_measure(measure: Measure, accuracies: Any, figure: str):
    entry = Published("", "", "", "", measure)
    assert ours(entry, one_needle(accuracies)) == figure


def test_our_figure_is_of_the_same_stage_and_reading():
    entry = Published("", "", "", "", "k=2", "both", read_twice=True)
    assert ours(entry, one_needle({2: 0.5}, "both", twice=True)) == "50.0% at k = 2"
    assert ours(entry, one_needle({2: 0.5}, "generation", twice=True)) == NOT_RUN
    assert ours(entry, one_needle({2: 0.5}, "both", twice=False)) == NOT_RUN


def test_the_papers_main_numbers_are_there():
    values = {(p.measure, p.model.split("-")[-1], p.stage): p.value for p in PUBLISHED}
    assert values["tipping k", "2B", "generation"] == "1 of 10"
    assert values["tipping k", "9B", "generation"] == "2 of 16"
    assert values["tipping k", "1.6", "generation"] == "4 of 32"
    assert values["all heads", "2B", "generation"] == "50.3%"
    assert all(p.source and p.value and p.what for p in PUBLISHED)
    assert any(p.read_twice for p in PUBLISHED)
