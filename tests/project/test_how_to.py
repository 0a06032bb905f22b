"""The pages that show how something is done run as they stand, and print what they show."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from tests.loops import looped
from tests.page_blocks import ROOT, blocks_of, check_command, check_names, run_page
from weights_conversion import families

DOCS = ROOT / "docs"
HOW_TO = sorted((DOCS / "how-to").glob("*.md"))
OTHERS = [DOCS / "getting-started.md", *sorted((DOCS / "concepts").glob("*.md"))]
PAGES = [*HOW_TO, *OTHERS]


def run(path: Path, folder: Path) -> None:
    """Run a page in a folder of its own."""
    own = folder / path.stem
    own.mkdir()
    with pytest.MonkeyPatch.context() as patch, torch.set_grad_enabled(True):
        patch.setattr(families, "FAMILIES", dict(families.FAMILIES))  # a page adds one
        patch.chdir(own)
        patch.setenv("MPLBACKEND", "agg")
        run_page(path.read_text(encoding="utf-8"), path.relative_to(ROOT).as_posix())
    plt.close("all")


@looped("path", HOW_TO)
def test_every_how_to_runs_and_prints_what_it_shows(path: Path, tmp_path: Path, unchecked: None):
    run(path, tmp_path)


@looped("path", OTHERS)
def test_every_page_of_concepts_runs_and_prints_what_it_shows(
    path: Path, tmp_path: Path, unchecked: None
):
    run(path, tmp_path)


@looped("path", PAGES)
def test_every_page_has_one_title_and_shows_code(path: Path):
    text = path.read_text(encoding="utf-8")
    assert re.findall(r"^# .+", text, re.MULTILINE) == [text.splitlines()[0]]
    blocks = blocks_of(text)
    assert any(block.language == "python" and block.runs for block in blocks)
    code = [line for block in blocks if block.language != "sh" for line in block.text.splitlines()]
    assert [line for line in code if len(line) > 100] == []


@looped("path", HOW_TO)
def test_a_how_to_is_short_and_says_what_it_gives_what_goes_wrong_and_where_it_is(path: Path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= (160 if path.stem == "add-a-family" else 130)
    for heading in ("## What to look at", "## What goes wrong", "## Reference"):
        assert f"\n{heading}\n" in text, heading


@looped("path", PAGES)
def test_a_name_that_links_to_a_module_is_defined_there(path: Path):
    links = re.findall(r"\[`([\w.]+)`\]\(([^)\s]+\.py)\)", path.read_text(encoding="utf-8"))
    for name, target in links:
        source = (path.parent / target).resolve().read_text(encoding="utf-8")
        if name.endswith(".py"):
            assert target.endswith(f"/{name}")
            continue
        leaf = name.rpartition(".")[2]
        assert re.search(rf"(def|class) {leaf}\b|^{leaf}\b.* = ", source, re.MULTILINE), name


@looped("path", PAGES)
def test_an_error_that_a_page_quotes_is_one_of_the_librarys(path: Path):
    said = sources()
    for quoted in re.findall(r"`(?:\w+Error: )([^`]+)`", path.read_text(encoding="utf-8")):
        for part in quoted.split("..."):
            words = r"\W+".join(re.escape(word) for word in part.split())
            assert re.search(words.rstrip("="), said), f"{quoted}: {part!r}"


@cache
def sources() -> str:
    """Return the code of the library in one text."""
    folders = (ROOT / "hooked_hybrid", ROOT / "weights_conversion")
    return "\n".join(p.read_text(encoding="utf-8") for f in folders for p in f.rglob("*.py"))


def test_a_page_that_is_wrong_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    run_page("```python\nprint(1 + 1)\n```\n\n```text\n2\n```\n", "page.md")
    for page in (
        "```python\nprint(1 + 1)\n```\n\n```text\n3\n```\n",
        "```python\nprint(1 + 1)\n```\n",  # what it prints is not shown
        "```python\nx = 1\n```\n\n```text\n1\n```\n",
        "```sh\nhooked-hybrid parameters --model tiny-griffin\n```\n\n```text\nnothing\n```\n",
        "```fortran\n```\n",
    ):
        with pytest.raises(AssertionError):
            run_page(page, "page.md")
    with pytest.raises(ZeroDivisionError):
        run_page("```python\n1 / 0\n```\n", "page.md")


@looped(
    "source",
    [
        "import hooked_hybrid\nhooked_hybrid.gone",
        "from hooked_hybrid import HookedHybrid\nHookedHybrid.from_nowhere('x')",
        "from hooked_hybrid import HookedHybrid\nm = HookedHybrid.from_hf(1)\nm.run_with_gone(1)",
        "from hooked_hybrid import interventions\ninterventions.keep_top_heads(k=1, gone=2)",
        "from hooked_hybrid.interventions import gone",
    ],
)
def test_names_that_do_not_exist_are_noticed_in_a_block_that_is_not_run(source: str):
    with pytest.raises(AssertionError):
        check_names(source, {})


def test_options_that_do_not_exist_are_noticed_in_a_block_that_is_not_run():
    check_command(["hooked-hybrid", "niah", "--model", "tiny-griffin", "--out", "x"])
    for words in (
        ["hooked-hybrid", "niah", "--gone", "1"],
        ["hooked-hybrid", "gone"],
        ["make", "gone"],
        ["python", "-m", "experiments.gone"],
        ["pip", "install", "hooked-hybrid[gone]"],
        ["curl", "x"],
    ):
        with pytest.raises(Exception, match=r"."):
            check_command(words)
