"""The page of hook points is what the models are, and its shapes are what a forward leaves."""

from __future__ import annotations

import ast
import importlib
import json
import re
from functools import cache
from pathlib import Path

import pytest
import torch

from docs import generate_hooks, site_pages
from docs.site_pages import SECTIONS
from hooked_hybrid import ActivationCache, HookedHybrid
from hooked_hybrid.commands.program import COMMANDS
from hooked_hybrid.hooks.point import HookPoint
from tests.models import CONFIGS, random_tokens, tiny_model

ROOT = Path(__file__).parent.parent.parent


def test_the_page_of_hook_points_is_what_the_generator_writes():
    assert generate_hooks.page() == generate_hooks.PAGE.read_text(encoding="utf-8"), (
        "run: python docs/generate_hooks.py"
    )


def test_the_page_names_every_hook_point_of_every_model():
    page = generate_hooks.PAGE.read_text(encoding="utf-8")
    for title, cfg in generate_hooks.MODELS.items():
        model = HookedHybrid.meta(cfg)
        own = page.split(f"\n## {title}\n")[1].split("\n## ")[0]
        listed = set()
        for part in own.split("\n### ")[1:]:
            names = re.findall(r"^\| `(\S+)` \|", part, re.MULTILINE)
            where = re.search(r"^Blocks? ([\d, to]+);", part, re.MULTILINE)
            blocks = [f"blocks.{i}." for i in numbers(where[1])] if where else [""]
            listed |= {block + name for block in blocks for name in names}
        assert listed == set(model.hook_dict)
        assert f"{len(listed)} hook points in {cfg.n_layers} blocks" in own


@pytest.mark.parametrize("name", CONFIGS)
def test_shapes_and_marks_are_those_of_a_forward(name):
    model = tiny_model(name)
    _, cache = model.run_with_cache(random_tokens(2, 9), names_filter=lambda _: True)
    _, default = model.run_with_cache(random_tokens(2, 9))
    sizes = {"batch": 2, "pos": 9, "query": 9, "key": 9}
    assert set(cache) == set(model.hook_dict)
    for hook, value in cache.items():
        stated = generate_hooks.shape(model, hook)
        assert tuple(sizes[s] if s in sizes else int(s) for s in stated) == value.shape, hook
        marks = generate_hooks.marks(model.hook_dict[hook])
        assert ("large" in marks) == (hook not in default)
        assert ("integer" in marks) == (not value.is_floating_point())


def test_the_published_models_have_their_published_sizes():
    """Parameters, counted on what transformers makes of the published configs."""
    sizes = {
        title: sum(p.numel() for p in HookedHybrid.meta(cfg).parameters())
        for title, cfg in generate_hooks.MODELS.items()
    }
    assert sizes["RecurrentGemma-2B"] == 2_682_862_080
    assert sizes["Jamba-v0.1 and Mini 1.5"] == 51_570_323_328


def test_a_hook_point_without_a_meaning_is_an_error():
    model = HookedHybrid.meta(CONFIGS["griffin"])
    model.blocks[0].hook_new = HookPoint("batch pos d_model")
    model.setup()
    with pytest.raises(LookupError, match=r"'blocks.0.hook_new' has no meaning: add a line for Bl"):
        generate_hooks.meanings_section([model])


def test_a_meaning_without_a_hook_point_is_an_error(monkeypatch):
    meanings = generate_hooks.MEANINGS["Block"]
    monkeypatch.setitem(generate_hooks.MEANINGS, "Block", {**meanings, "hook_gone": "nothing"})
    models = [HookedHybrid.meta(cfg) for cfg in CONFIGS.values()]
    with pytest.raises(LookupError, match=r"Block has no hook points \['hook_gone'\]"):
        generate_hooks.meanings_section(models)


def test_spans():
    assert generate_hooks.spans([0, 1, 3, 4, 5, 9]) == "0, 1, 3 to 5, 9"
    assert numbers("0, 1, 3 to 5, 9") == [0, 1, 3, 4, 5, 9]


def numbers(text: str) -> list[int]:
    """Return what `generate_hooks.spans` was given."""
    runs = [[int(n) for n in run.split(" to ")] for run in text.split(", ")]
    return [n for run in runs for n in range(run[0], run[-1] + 1)]


def test_names_on_the_page_for_users_of_transformerlens_exist():
    text = (ROOT / "docs" / "transformerlens.md").read_text(encoding="utf-8")
    text = text.split("## Circuit analysis")[1].split("## TransformerLens's own")[0]
    here = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| ")]
    names = re.findall(r"`((?:analysis|folding|cache)\.[\w.]+)`", " ".join(here))
    assert len(names) > 15
    for name in names:
        path, _, leaf = name.rpartition(".")
        path = path.replace("folding", "model.folding")
        is_cache = path == "cache"
        where = ActivationCache if is_cache else importlib.import_module(f"hooked_hybrid.{path}")
        assert callable(getattr(where, leaf, None)), name
    theirs = re.findall(r"`cache\.(\w+)`.*\| the same \|", text)
    theirs += re.findall(r"^\| `cache\.\w+`, `cache\.(\w+)` \| the same \|", text, re.MULTILINE)
    assert len(theirs) > 5
    assert all(callable(getattr(ActivationCache, name)) for name in theirs)


def test_files_that_the_page_says_test_a_name_use_it():
    """Each name of "The same" is called, given or read in one of the files in its row."""
    text = (ROOT / "docs" / "transformerlens.md").read_text(encoding="utf-8")
    rows = [
        [re.findall(r"`([^`]+)`", cell) for cell in line.strip("| ").split(" | ")]
        for line in text.split("## The same")[1].split("## Different")[0].splitlines()
        if line.startswith("| `")
    ]
    unused = {}
    for names, *_, files in rows:
        tests = "\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
        for name in names:
            calls = rf"\.{name}\b|\b{name}[=(.]|\"{name}\"|isinstance\(.*{name}|\({name}\)"
            if not re.search(calls.replace("()", ""), tests):
                unused[name] = files
    built_in = {"in", "len", "forward"}  # `in cache`, `len(cache)`, `model(...)`
    assert set(unused) <= built_in, unused


# --- the pages for those who change the code ------------------------------------------------------

PAGES_ON_THE_CODE = ("ARCHITECTURE.md", "CONTRIBUTING.md")
PYTHON = ".venv/bin/python"


@cache
def defined_names() -> frozenset[str]:
    """Return every name that the code of the project defines: functions, classes, values."""
    names = {"hooked_hybrid", "weights_conversion", "experiments", "main", "hooked-hybrid"}
    for folder in ("hooked_hybrid", "weights_conversion", "experiments", "tests"):
        for path in (ROOT / folder).rglob("*.py"):
            names |= set(path.relative_to(ROOT).with_suffix("").parts)
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.FunctionDef | ast.ClassDef):
                    names.add(node.name)
                elif isinstance(node, ast.arg):
                    names.add(node.arg)
                elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
                    names.add(node.id if isinstance(node, ast.Name) else node.attr)
    return frozenset(names)


def is_there(quoted: str) -> bool:
    """Whether a path, a command or a name that a page quotes is what it is in the repository."""
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    if quoted.startswith("make "):
        return quoted.removeprefix("make ") in targets
    if quoted.startswith(f"{PYTHON} -m pytest "):
        return (ROOT / quoted.split()[-1]).is_file()
    if quoted.startswith("python -m "):
        module = quoted.split()[2].replace(".", "/")
        return any((ROOT / (module + end)).is_file() for end in ("/__main__.py", ".py"))
    if quoted.startswith("hooked-hybrid "):
        return quoted.split()[1] in COMMANDS
    quoted = re.sub(r"[\w/]*<\w+>\.py", lambda found: found[0].split("<")[0], quoted)
    if "/" in quoted or re.search(r"\.(py|md|toml|txt)$", quoted):
        found = list(ROOT.glob(f"{quoted}")) or list(ROOT.glob(f"hooked_hybrid/{quoted}"))
        return bool(found or list(ROOT.glob(f"weights_conversion/{quoted}")))
    words = re.findall(r"[A-Za-z_]\w*", quoted)
    return bool(words) and all({w, f"hook_{w}"} & defined_names() for w in words)


@pytest.mark.parametrize("page", PAGES_ON_THE_CODE)
def test_every_path_command_and_name_on_the_pages_on_the_code_is_there(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    quoted = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    assert len(quoted) > 15
    assert [q for q in quoted if not is_there(q)] == []


def test_a_path_or_name_that_is_gone_is_noticed():
    for gone in (
        "hooked_hybrid/model.py",
        "network/mixers/gone.py",
        "make nothing",
        "python -m experiments.nothing",
        "hooked-hybrid nothing",
        "HookedHybrid.from_nothing",
        "weights_conversion/gone/<family>.py",
    ):
        assert not is_there(gone), gone


def test_every_part_of_the_library_stands_on_a_floor_of_the_page():
    table = (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").split("## Floors")[1]
    cells = " ".join(
        line.split("|")[1]
        for line in table.split("\n## ")[0].splitlines()
        if line.startswith("| `")
    )
    listed = {
        name.rstrip("/").removeprefix("hooked_hybrid/") for name in re.findall(r"`(.+?)`", cells)
    }
    parts = {
        path.name
        for path in (ROOT / "hooked_hybrid").iterdir()
        if (path.suffix == ".py" or (path / "__init__.py").is_file()) and path.name != "__init__.py"
    }
    assert listed == parts | {"weights_conversion"}


UNPLAIN = (
    r"\b(?<!there )(?:is|are) no (?:whole|plain|valid|number|multiple|file|folder)",
    r"\bnobody'?s? (?:else|says|knows|wants|looks|asked)",
    r"\bno one's\b",
    r"\bunless told\b",
    r"\bcannot be told\b",
    r'"""What ',
    r"\b(?:is|are|was|were) told\b",
    r"\bat its door\b",
    r"\bfor people\b",
    r"\bput together again\b",
    r"\b[Ll]et go of\b",
    r"\bno words for\b",
    r"\bwhere(?:ver)? there (?:is|are) (?:any|none|one|some)\b",
    r"\bstands? (?:at padding|side by side|by itself)\b",
    r"\bthe message says (?:what|which|why)\b",
    r"\bwhich a warning says\b",
    r"\bas it comes\b",
)
"""Phrases that a reader stumbles on. Plain ones: "is not a", "nothing else", "by default"; for a
docstring that begins with "What": the thing itself ("The config of a layer")."""


def test_the_library_and_its_pages_have_none_of_some_compressed_phrases():
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    for package in ("hooked_hybrid", "weights_conversion"):
        sources += (ROOT / package).rglob("*.py")
    found = [
        f"{path.relative_to(ROOT)}: {match[0]}"
        for path in sources
        if path.name != "CHANGELOG.md"
        for match in re.finditer("|".join(UNPLAIN), path.read_text(encoding="utf-8"))
    ]
    assert found == []


# --- the site -----------------------------------------------------------------------------------


def test_every_module_has_its_place_in_the_reference():
    """`make docs` needs no line for a new module, and one for a new package."""
    listed = re.findall(r"reference/[\w/]+\.md", repr(site_pages.reference_nav()))
    pages = [site_pages.page_of(module) for module in site_pages.modules()]
    own = [site_pages.page_of_object(path) for path in site_pages.OBJECTS]
    assert sorted(listed) == sorted([*own, *pages])
    assert listed[0] == "reference/HookedHybrid.md"
    assert "hooked_hybrid.analysis.scores" in site_pages.modules()


def test_the_page_of_the_model_has_every_public_member():
    groups = site_pages.OBJECTS["hooked_hybrid.HookedHybrid"].values()
    listed = [name for group in groups for name in group.split()]
    public = {name for name in dir(HookedHybrid) if not name.startswith("_")}
    own = public - set(dir(torch.nn.Module)) | {"forward"}
    assert sorted(listed) == sorted(own)


def test_every_page_stands_once_in_the_navigation():
    listed = re.findall(r"[\w/-]+\.md", repr([site_pages.section_nav(s) for s in SECTIONS]))
    docs = ROOT / "docs"
    pages = [path.relative_to(docs).as_posix() for path in docs.rglob("*.md")]
    pages += [page for page in site_pages.documents().values() if page != "index.md"]
    assert sorted(listed) == sorted(pages)
    assert {page for pages in SECTIONS.values() for page in pages} <= set(listed)
    assert list(SECTIONS) == ["Getting started", "How to", "Concepts", "Studies", "Project"]


def test_the_search_splits_names_at_underscores_and_capitals():
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (separator,) = re.findall(r"separator: '(.*)'", settings)
    assert re.split(separator, "run_with_cache") == ["run", "with", "cache"]
    assert re.split(separator, "ActivationCache") == ["Activation", "Cache"]
    assert re.split(separator, "hooked_hybrid.model") == ["hooked", "hybrid", "model"]


def test_every_link_between_documents_leads_to_a_page():
    documents = {page: ROOT / source for source, page in site_pages.documents().items()}
    docs = ROOT / "docs"
    documents |= {path.relative_to(docs).as_posix(): path for path in docs.rglob("*.md")}
    for page, path in documents.items():
        site_pages.relink(site_pages.markdown_of(path), page)


def test_links_are_turned_into_links_between_pages():
    def relink(link: str, page: str = "index.md") -> str:
        return site_pages.relink(f"[a]({link})", page)[4:-1]

    assert relink("docs/hooks.md#mamba") == "hooks.md#mamba"
    assert relink("docs/images/niah.png") == "images/niah.png"
    assert relink("hooked_hybrid/presets/tiny-jamba/README.md") == "tiny-jamba.md"
    assert relink("training.png", "tiny-jamba.md") == "tiny-jamba-training.png"
    assert relink("hooked_hybrid/network/plan.py") == "reference/hooked_hybrid/network/plan.md"
    assert relink("../README.md", "findings.md") == "index.md"
    assert relink("figure.png", "reproduced/thesis/report.md") == "figure.png"
    assert relink("../../findings.md", "reproduced/thesis/report.md") == "../../findings.md"
    assert relink("https://example.org/a.md") == "https://example.org/a.md"
    with pytest.raises(ValueError, match=r"a link to gone\.md, which is not a page"):
        relink("gone.md")


def test_a_notebook_becomes_a_page(tmp_path):
    text = {"output_type": "stream", "text": ["loss\n", "0.5\n"]}
    picture = {"output_type": "display_data", "data": {"image/png": "iVBO\nRw0=\n"}}
    value = {"output_type": "execute_result", "data": {"text/plain": ["[1, 2]"]}}
    code = {"cell_type": "code", "source": ["x = 1\n", "x"], "outputs": [text, picture, value]}
    cells = [{"cell_type": "markdown", "source": ["# A tour"]}, code]
    path = tmp_path / "tour.ipynb"
    path.write_text(json.dumps({"cells": cells}))
    assert site_pages.markdown_of(path) == (
        "# A tour\n\n```python\nx = 1\nx\n```\n\n```text\nloss\n0.5\n```\n\n"
        "![](data:image/png;base64,iVBORw0=)\n\n```text\n[1, 2]\n```"
    )


def test_a_package_that_exports_names_links_to_them():
    page = site_pages.reference_page("hooked_hybrid.interventions")
    top_heads = "- [`keep_top_heads`][hooked_hybrid.interventions.keep_top_heads]: Zero the outputs"
    assert top_heads in page
    assert "- [`window`][hooked_hybrid.interventions.window]: Limiting how far back" in page
    hooks = site_pages.reference_page("hooked_hybrid.hooks")
    assert "- [`HookFn`][hooked_hybrid.hooks.HookFn]: A hook, called as" in hooks
    scan = "hooked_hybrid.network.scans.scan"
    assert site_pages.reference_page(scan) == f"::: {scan}\n"


def test_every_entry_of_a_list_in_the_reference_says_its_purpose():
    pages = "".join(site_pages.reference_page(module) for module in site_pages.modules())
    entries = re.findall(r"^- \[.*$", pages, re.MULTILINE)
    assert len(entries) > 300
    assert [entry for entry in entries if not re.search(r"\]: .{8}", entry)] == []
