"""What a model or others say stays text in tables and pages, whatever opens them."""

from __future__ import annotations

import csv
from pathlib import Path

import pandas as pd
import pytest

from hooked_hybrid.evaluation.report import _table
from hooked_hybrid.niah.report.report import write_report
from hooked_hybrid.outputs.tables import markdown_cell, read_csv, write_csv
from hooked_hybrid.papers.report import markdown
from tests.niah.test_summary import sweep_table

OUTPUTS = [
    '=HYPERLINK("http://x", "y")',
    "+1+cmd|' /C calc'!A0",
    "-2+3",
    "@SUM(1)",
    "\t=1",
    "\r=1",
    "'=1",
    "''@x",
    "'quoted'",
    "-1.5",
    "+3%",
    "-",
    "NA",
    "",
    "nan",
    "null",
    'plain, "with" all\nof it',
    " =1",
]


def test_no_output_is_a_formula_and_each_is_read_back_as_it_was(tmp_path: Path):
    table = pd.DataFrame({"output": OUTPUTS, "k": range(len(OUTPUTS)), "graded": 0.5})
    table["stage"] = [None, *["=both"] * (len(OUTPUTS) - 1)]
    write_csv(table, tmp_path / "table.csv")
    with (tmp_path / "table.csv").open(newline="") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    harmless = ("-1.5", "+3%", "-")
    assert not [c for c in cells if c[:1] in ("=", "+", "-", "@", "\t", "\r") and c not in harmless]
    back = read_csv(tmp_path / "table.csv")
    assert list(back["output"]) == OUTPUTS
    assert list(back["k"]) == list(table["k"]) and list(back["graded"]) == [0.5] * len(OUTPUTS)
    assert back["stage"].isna()[0] and list(back["stage"][1:]) == list(table["stage"][1:])


def test_a_table_without_such_texts_is_written_as_before(tmp_path: Path):
    table = sweep_table(ks=(2,), stages=("both",), window=None)
    write_csv(table, tmp_path / "new.csv")
    table.to_csv(tmp_path / "old.csv", index=False)
    assert (tmp_path / "new.csv").read_bytes() == (tmp_path / "old.csv").read_bytes()
    pd.testing.assert_frame_equal(
        read_csv(tmp_path / "old.csv", texts=()), pd.read_csv(tmp_path / "old.csv")
    )


def test_the_report_of_a_sweep_keeps_formulas_out_of_its_table(tmp_path: Path):
    table = sweep_table(ks=(2,), stages=("both",), window=None)
    table["output"] = "=1+1"
    written = write_report(table, [], {}, tmp_path)
    assert ",=1+1" not in written.table.read_text()
    assert set(read_csv(written.table)["output"]) == {"=1+1"}


@pytest.mark.parametrize("writer", [_table, markdown])
def test_a_cell_of_a_markdown_page_holds_no_html_no_picture_and_no_escape(writer):
    bad = "<script>alert(1)</script> <img src=x> ![x](http://y) a|b\nc \x1b[31m <!-- <br>"
    page = writer(["head"], [[bad]])
    line = page.splitlines()[-1]
    assert len(page.splitlines()) == 3 and line.count("<") == 1 and "<br>" in line
    assert "![" not in line and "a\\|b c" in line and line.isprintable()
    assert markdown_cell("k < 5, 3 & 4, [0.1, 0.2]") == "k < 5, 3 & 4, [0.1, 0.2]"
