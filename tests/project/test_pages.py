"""Figures of the pages are those of the results kept with them, and say what made them."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest

from experiments.pages import figures, results, tables, writing
from experiments.pages.results import COMMIT, DOCS, KEPT, Kept, keep, kept
from experiments.pages.writing import BLOCK, ELSEWHERE, FIGURE, filled, pages, written
from hooked_hybrid.niah.head_sets import standings
from hooked_hybrid.outputs.folders import replacing
from hooked_hybrid.runs.statistics import summary

PAGES = {path.name: path for path in pages()}
PROGRAMS = re.compile(r"hooked-hybrid [a-z]|python -m experiments\.|no program kept")


# --- the pages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_what_its_command_writes_now(name: str):
    text = PAGES[name].read_text(encoding="utf-8")
    assert written(text) == text, "run: python -m experiments.pages"


@pytest.mark.parametrize("name", PAGES)
def test_every_mark_names_its_command_and_its_commit(name: str):
    text = PAGES[name].read_text(encoding="utf-8")
    blocks = list(BLOCK.finditer(text))
    assert len(blocks) == text.count("<!-- measured:") == text.count("<!-- end -->")
    assert len(list(FIGURE.finditer(text))) == text.count("<!--=")
    for block in blocks:
        assert PROGRAMS.match(block["command"]), block["what"]
        assert COMMIT.fullmatch(block["commit"]), block["what"]


NO_MEASUREMENT = (
    "| | layers | width of the MLPs |",  # sizes of the twins
    "| scheme | what is stored |",
    "| experiment | published |",  # words, each with a section of its own
    "| file | |",
)


@pytest.mark.parametrize("name", PAGES)
def test_a_table_of_a_page_with_marks_stands_between_marks(name: str):
    outside = BLOCK.sub("", PAGES[name].read_text(encoding="utf-8"))
    heads = re.findall(r"(?<!\|)\n(\|[^\n]*)\n\|-", outside)
    assert not [head for head in heads if not head.startswith(NO_MEASUREMENT)]


@pytest.mark.parametrize("name", sorted(path.stem for path in KEPT.glob("*.csv")))
def test_results_in_the_tree_say_what_made_them_and_stand_on_a_page(name: str):
    found = kept(name)
    assert PROGRAMS.match(found.command) and COMMIT.fullmatch(found.commit)
    assert found.settings
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES.values())
    assert re.search(rf"<!-- measured: \w+ {name} \||<!--={name}@", text)


@pytest.mark.parametrize("report", sorted((DOCS / "reproduced").glob("*/report.md")), ids=str)
def test_a_report_of_a_reproduction_names_its_command_and_its_commit(report: Path):
    text = report.read_text(encoding="utf-8")
    (code,) = re.findall(r"^\| code \| commit (\S+?),? .*wrote this report", text, re.MULTILINE)
    assert COMMIT.fullmatch(code)
    paper, _, model = report.parent.name.partition("-")
    (command,) = re.findall(r"^hooked-hybrid reproduce .*$", text, re.MULTILINE)
    assert f"--paper {paper} " in command and f"--model {model} " in command


# --- what is written ------------------------------------------------------------------------------

CELLS = pd.DataFrame(
    [
        (setting, needle, depth, inside, value)
        for setting, values in {
            "whole": (1.0, 1.0, 0.5, 0.0), "peaked k=1": (0.6, 0.2, 0.0, 0.0),
            "every k=1 #0": (0.0, 0.0, 0.0, 0.0), "every k=1 #1": (0.6, 0.2, 0.0, 0.0),
            "every k=1 #2": (1.0, 0.9, 0.0, 0.0),
        }.items()
        for (needle, depth, inside), value in zip(
            [("a", 0, True), ("b", 0, True), ("a", 1, False), ("b", 1, False)], values, strict=True
        )
    ],
    columns=["setting", "needle_id", "depth", "in_window", "accuracy"],
)  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(results, "KEPT", tmp_path / "measured")
    CELLS.to_csv(tmp_path / "table.csv", index=False)
    losses = {"loss": [2.0, 2.25], "more": [0, 0.25], "more_low": [0, 0.1], "more_high": [0, 0.4]}
    names = {"setting": ["whole", "peaked k=1"]}
    pd.DataFrame(names | losses).to_csv(tmp_path / "text_loss.csv", index=False)
    kept.cache_clear()
    yield tmp_path
    kept.cache_clear()


def made(folder: Path) -> Kept:
    keep("mine", folder, "hooked-hybrid controls", "1a2b3c4+, 2026-11-30")
    return kept("mine")


def test_kept_results_give_the_figures_of_the_folder(folder: Path):
    found = made(folder)
    assert (found.command, found.commit) == ("hooked-hybrid controls", "1a2b3c4+, 2026-11-30")
    full = CELLS.assign(stage="both", k=None, binary=0)
    wanted = summary(full[full["in_window"]]).set_index("setting").loc["peaked k=1"]
    figure = figures.figure_of("mine@peaked k=1")
    assert figure[:3] == pytest.approx(tuple(wanted[["accuracy", "low", "high"]]))
    of_all = summary(full).set_index("setting").loc["whole"]
    assert figures.figure_of("mine@whole@all")[:3] == pytest.approx(
        tuple(of_all[["accuracy", "low", "high"]])
    )
    assert figures.figure_of("mine@whole@beyond").value == 0.25
    assert figures.figure_of("mine@peaked k=1@more") == (0.25, 0.1, 0.4, False)
    assert figures.figure_of("mine@every*@max").value == pytest.approx(0.95)


def test_a_rank_is_that_of_the_command(folder: Path):
    found = made(folder)
    every = [s for s in found.settings if s.startswith("every")]
    wanted = standings(CELLS, {"peaked k=1": every}).iloc[0]
    for column in figures.RANKS:
        assert figures.figure_of(f"mine@peaked k=1@{column}").value == pytest.approx(wanted[column])
    assert "| peaked k=1 | 40.0 [" in tables.chosen("mine")
    assert "| all 3 | 1, 1, 1 | 45.0 (0.0 to 95.0) |" in tables.chosen("mine")
    assert "every k" not in tables.experiment("mine")


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("1%<!--=mine@peaked k=1-->", "40%"),
        ("0.00<!--=mine@peaked k=1-->", "40.00"),
        ("+1.000 [+0.0, +0.0]<!--=mine@peaked k=1@more-->", "+0.250 [+0.1, +0.4]"),
        ("0.0% [0, 1]<!--=mine@whole-->", "100.0% [16, 100]"),
        ("9<!--=mine@peaked k=1@n_sets-->", "3"),
    ],
)
def test_a_figure_keeps_its_form(folder: Path, old: str, new: str):
    made(folder)
    text = written(f"It leaves {old} of it.")
    assert text.startswith(f"It leaves {new}<!--=") and text.endswith("--> of it.")


def test_a_block_is_replaced_with_its_command_and_commit(folder: Path):
    made(folder)
    text = written("a\n<!-- measured: experiment mine | - | - -->\nold\n<!-- end -->\nb\n")
    mark = "<!-- measured: experiment mine | hooked-hybrid controls | 1a2b3c4+, 2026-11-30 -->"
    assert text.startswith(f"a\n{mark}\n2 prompts inside, 2 beyond; 2 needles.\n")
    assert "| peaked k=1 | 40.0 [" in text and "| 2.250 | +0.250 [+0.100, +0.400] |" in text
    assert "old" not in text and text.endswith("<!-- end -->\nb\n")
    assert written(text) == text


def test_the_block_of_another_program_is_filled_by_it():
    text = f"a\n<!-- measured: {ELSEWHERE} x | old | 1a2b3c4 -->\nold\n<!-- end -->\nb"
    new = filled(text, "x", "table", "python -m experiments.x", "2b3c4d5")
    mark = f"<!-- measured: {ELSEWHERE} x | python -m experiments.x | 2b3c4d5 -->"
    assert new == f"a\n{mark}\ntable\n<!-- end -->\nb" == written(new)
    with pytest.raises(ValueError, match="the page has 0 blocks elsewhere 'y'"):
        filled(text, "y", "", "c", "2b3c4d5")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1<!--=none@whole-->", "no results 'none'"),
        ("1<!--=mine@gone-->", "mine@gone: not among whole"),
        ("1<!--=mine@every*-->", "many settings need one of max"),
        ("1<!--=mine@whole@taste-->", "no column 'taste'"),
        ("1<!--=mine@whole@n_sets-->", "no set of heads of its size"),
        ("<!-- measured: list mine | a | b -->\n<!-- end -->", "give one of experiment"),
    ],
)
def test_a_mark_of_nothing_is_an_error(folder: Path, text: str, said: str):
    made(folder)
    with pytest.raises(ValueError, match=said):
        written(text)


def test_results_without_their_command_or_commit_are_refused(folder: Path):
    for command, commit in (("", "1a2b3c4"), ("hooked-hybrid niah", "yesterday")):
        with pytest.raises(ValueError, match="give both"):
            keep("mine", folder, command, commit)
    path = writing.DOCS / "measured"
    assert path == KEPT  # of the module that was imported; the fixture's is another
    made(folder)
    body = (folder / "measured/mine.csv").read_text().split("\n", 2)[2]
    with replacing(folder / "measured/mine.csv") as temporary:
        temporary.write_text(body)
    kept.cache_clear()
    with pytest.raises(ValueError, match="does not begin with its command"):
        kept("mine")
