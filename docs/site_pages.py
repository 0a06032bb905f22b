"""Pages of the site that are elsewhere, or nowhere, on disk: hooks that MkDocs calls.

README, changelog, model cards, notebooks and the interop record become pages; each module of the
two packages gets a page that mkdocstrings fills from its docstrings. Links between these files,
which are right on disk, are turned into links between their pages.
"""

from __future__ import annotations

import ast
import json
import os
import re
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent

DOCUMENTS = {
    "README.md": "index.md",
    "ARCHITECTURE.md": "architecture.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "interop/README.md": "interop.md",
    "hooked_hybrid/presets/tiny-griffin/README.md": "tiny-griffin.md",
    "hooked_hybrid/presets/tiny-jamba/README.md": "tiny-jamba.md",
}
"""Files outside `docs/`, and the pages they become."""

GUIDE = {
    "transformerlens.md": "For users of TransformerLens",
    "hooks.md": "Hook points",
    "interop.md": "With other packages",
    "findings.md": "What the packaged models show",
    "findings_tables.md": "Every setting of every experiment",
    "reproduced/thesis2025-tiny-griffin/report.md": "The thesis, tiny-griffin",
    "reproduced/thesis2025-tiny-jamba/report.md": "The thesis, tiny-jamba",
    "reproduced/sllm2025-tiny-griffin/report.md": "The workshop paper, tiny-griffin",
    "outside_window.md": "A needle outside the window",
    "where_recall_lives.md": "When retrieval moves into attention",
    "twins.md": "Twins with and without attention",
    "next_questions.md": "The thesis's next questions",
    "beside_other_results.md": "Other people's results",
    "harvest.md": "Harvesting activations",
    "placement.md": "Models larger than a device",
    "quantized.md": "Quantised weights",
    "tiny-griffin.md": "tiny-griffin",
    "tiny-jamba.md": "tiny-jamba",
    "architecture.md": "Architecture",
    "contributing.md": "Contributing",
    "changelog.md": "Changelog",
}
"""Titles of the guide's pages, in its order; others follow under their headings."""

PACKAGES = {
    "hooked_hybrid.model": "The model, its caches and its generation",
    "hooked_hybrid.model.residual": "The residual stream by parts",
    "hooked_hybrid.config": "Configs",
    "hooked_hybrid.hooks": "Hook points",
    "hooked_hybrid.interventions": "Interventions",
    "hooked_hybrid.analysis": "Analysis",
    "hooked_hybrid.analysis.forms": "Linear forms of recurrences",
    "hooked_hybrid.niah": "Needle in a haystack",
    "hooked_hybrid.niah.haystacks": "Haystacks",
    "hooked_hybrid.niah.settings": "Settings",
    "hooked_hybrid.niah.cached_state": "Needles in cached states",
    "hooked_hybrid.niah.report": "Reports and pictures",
    "hooked_hybrid.evaluation": "Language benchmarks",
    "hooked_hybrid.harvest": "Harvesting activations",
    "hooked_hybrid.papers": "The papers' tables and figures",
    "hooked_hybrid.accounting": "Parameters, compute and memory",
    "hooked_hybrid.accounting.plan": "Plans of memory",
    "hooked_hybrid.presets": "Published and packaged models",
    "weights_conversion": "Checkpoints",
    "hooked_hybrid.text": "Text and tokenizers",
    "hooked_hybrid.network": "Layers and states",
    "hooked_hybrid.network.mixers": "Mixers",
    "hooked_hybrid.network.mlps": "MLPs",
    "hooked_hybrid.network.attention": "Attention's kernels",
    "hooked_hybrid.network.scans": "Scans",
    "hooked_hybrid.network.kernels": "Kernels",
    "hooked_hybrid.network.weights": "Weights",
    "hooked_hybrid.network.placement": "Models larger than a device",
    "hooked_hybrid.runs": "Runs, workers and intervals",
    "hooked_hybrid.runs.identity": "What a stored result depends on",
    "hooked_hybrid.outputs": "Folders and files of results",
    "hooked_hybrid.commands": "Commands",
    "hooked_hybrid": "The other modules",
}
"""Titles of the packages in the reference, in its order."""


@cache
def modules() -> list[str]:
    """Return the dotted name of every module with a docstring, packages before their modules."""
    found = []
    for top in ("hooked_hybrid", "weights_conversion"):
        for path in sorted((ROOT / top).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
            if parts[-1] != "__main__" and ast.get_docstring(ast.parse(path.read_text("utf-8"))):
                found.append(name)
    return sorted(found)


def documents() -> dict[str, str]:
    """Return `DOCUMENTS` and the notebooks, which become pages with the outputs they hold."""
    found = sorted((ROOT / "notebooks").glob("*.ipynb"))
    return DOCUMENTS | {f"notebooks/{p.name}": f"notebook-{p.stem}.md" for p in found}


def markdown_of(path: Path) -> str:
    """Return a document as Markdown."""
    text = path.read_text("utf-8")
    if path.suffix != ".ipynb":
        return text
    parts = []
    for cell in json.loads(text)["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := shown_of(output))]
    return "\n\n".join(parts)


def shown_of(output: dict[str, Any]) -> str:
    """Return one output of a notebook's cell as Markdown: a picture, or text."""
    data = output.get("data", {})
    if "image/png" in data:
        return f"![](data:image/png;base64,{''.join(data['image/png']).replace(chr(10), '')})"
    text = "".join(output.get("text", data.get("text/plain", ())))
    return f"```text\n{text.rstrip()}\n```" if text.strip() else ""


def page_of(module: str) -> str:
    """Return the page of a module."""
    is_package = (ROOT / module.replace(".", "/")).is_dir()
    return f"reference/{module.replace('.', '/')}{'/index' if is_package else ''}.md"


def public_names(package: str) -> list[str]:
    """Return what `__all__` of a package lists of its modules' classes and functions."""
    init = ROOT / package.replace(".", "/") / "__init__.py"
    body = ast.parse(init.read_text("utf-8")).body if init.is_file() else []
    imported: set[str] = set()
    for node in body:
        if isinstance(node, ast.ImportFrom) and node.module != package:
            imported |= {name.asname or name.name for name in node.names}
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "__all__":
            known = set(modules())
            names = ast.literal_eval(node.value)
            return [n for n in names if n in imported and f"{package}.{n}" not in known]
    return []


def reference_page(module: str) -> str:
    """Return the Markdown of a module's page: its docstrings, or links to what it exports."""
    names = public_names(module)
    if not names:
        return f"::: {module}\n"
    links = "\n".join(f"- [`{name}`][{module}.{name}]" for name in names)
    options = "    options:\n      members: false\n"
    return f"::: {module}\n{options}\nPublic names, each on the page of its module:\n\n{links}\n"


def reference_nav() -> list[dict[str, Any]]:
    """Return the reference's part of the navigation.

    Raises:
        ValueError: a package that has no title in `PACKAGES`.
    """
    nav: dict[str, list[Any]] = {title: [] for title in PACKAGES.values()}
    for module in modules():
        package = module if page_of(module).endswith("/index.md") else module.rpartition(".")[0]
        if package not in PACKAGES:
            raise ValueError(f"{package} has no title: add one to PACKAGES in docs/site_pages.py")
        leaf = module.rpartition(".")[2]
        nav[PACKAGES[package]].append(
            page_of(module) if module == package else {leaf: page_of(module)}
        )
    names = nav["The other modules"].pop(0)
    return [{"Public names": names}, *({title: pages} for title, pages in nav.items() if pages)]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put guide and reference into the navigation."""
    guide: list[Any] = [{title: page} for page, title in GUIDE.items()]
    others = [page for source, page in documents().items() if source not in DOCUMENTS]
    others += sorted(path.name for path in (ROOT / "docs").glob("*.md"))
    guide += [page for page in others if page not in GUIDE]
    nav = [{"Home": "index.md"}, {"Guide": guide}, {"Reference": reference_nav()}]
    config.nav = nav
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages and pictures that do not stand in `docs/`."""
    from mkdocs.structure.files import File  # the rest is tested where MkDocs is not installed

    for source, page in documents().items():
        files.append(File.generated(config, page, content=markdown_of(ROOT / source)))
        for picture in (ROOT / source).parent.glob("*.png"):
            name = page.removesuffix(".md") + "-" + picture.name
            files.append(File.generated(config, name, abs_src_path=str(picture)))
    for module in modules():
        files.append(File.generated(config, page_of(module), content=reference_page(module)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files of the repository into links between pages."""
    return relink(markdown, page.file.src_uri)


def relink(markdown: str, page: str) -> str:
    """Return a page's text with links between pages in the place of links between files.

    Raises:
        ValueError: a link to a file that is not a page.
    """
    if page.startswith("reference/"):
        return markdown
    source = {made: source for source, made in documents().items()}.get(page, f"docs/{page}")

    def replaced(link: re.Match[str]) -> str:
        path = os.path.normpath(os.path.join(os.path.dirname(source), link[1]))
        there = os.path.relpath(page_at(path), os.path.dirname(page) or ".")
        return f"]({there}{link[2] or ''})"

    return re.sub(r"\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)", replaced, markdown)


def page_at(path: str) -> str:
    """Return the page that stands for a file of the repository.

    Raises:
        ValueError: there is none.
    """
    if path in (made := documents()):
        return made[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/")
    for source, page in DOCUMENTS.items():
        folder = os.path.dirname(source)
        if folder and path.endswith(".png") and os.path.dirname(path) == folder:
            return f"{page.removesuffix('.md')}-{os.path.basename(path)}"
    module = path.removesuffix(".py").removesuffix("/__init__").strip("/").replace("/", ".")
    if module in modules():
        return page_of(module)
    raise ValueError(f"a link to {path}, which is not a page: see DOCUMENTS in docs/site_pages.py")
