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

SECTIONS: dict[str, dict[str, str | None]] = {
    "Getting started": {
        "getting-started.md": None,
        "notebook-tour.md": "A tour, as a notebook",
        "transformerlens.md": None,
    },
    "How to": {
        f"how-to/{page}.md": None
        for page in (
            "patch-heads-and-positions",
            "patch-paths",
            "find-retrieval-and-induction-heads",
            "steer-while-sampling",
            "probe-and-autoencoder",
            "edit-a-state",
            "effective-attention",
            "your-own-sweep",
            "sweep-on-a-cluster",
            "load-your-own-checkpoint",
            "fine-tune-with-hooks",
            "compare-two-models",
            "write-an-intervention",
            "add-a-family",
        )
    },
    "Concepts": {
        "concepts/edits.md": None,
        "concepts/stages.md": None,
        "concepts/state.md": None,
        "concepts/padding.md": None,
        "concepts/pieces.md": None,
        "features.md": None,
        "hooks.md": "Every hook point",
        "harvest.md": None,
        "placement.md": None,
        "quantized.md": None,
        "interop.md": None,
    },
    "Studies": {
        "experiments.md": None,
        "findings.md": None,
        "findings_tables.md": "Every setting of every experiment",
        "reproduced/thesis2025-tiny-griffin/report.md": "The thesis, tiny-griffin",
        "reproduced/thesis2025-tiny-jamba/report.md": "The thesis, tiny-jamba",
        "reproduced/sllm2025-tiny-griffin/report.md": "The workshop paper, tiny-griffin",
        "outside_window.md": None,
        "where_recall_lives.md": None,
        "twins.md": None,
        "next_questions.md": None,
        "beside_other_results.md": None,
        "attribution_ranks.md": None,
        "tiny-griffin.md": "The model tiny-griffin",
        "tiny-jamba.md": "The model tiny-jamba",
    },
    "Project": {
        "changelog.md": None,
        "architecture.md": None,
        "contributing.md": None,
        "dependencies.md": None,
        "exactness.md": None,
        "speed.md": None,
        "benchmarks.md": None,
    },
}
"""The pages of each section, in order, with titles for the navigation; None is the page's heading.

A page in `docs/how-to` or `docs/concepts` that is not named here comes last in its section, any
other page in `docs` last in Studies, and the other notebooks in a part of How to.
"""

OBJECTS: dict[str, dict[str, str]] = {
    "hooked_hybrid.HookedHybrid": {
        "Make, load and save": "from_pretrained from_hf meta save_pretrained reset_parameters",
        "Run": "forward run_with_hooks run_with_cache generate hooks loss_fn",
        "Hooks that stay": (
            "add_hook add_perma_hook reset_hooks remove_all_hook_fns list_hooks attached "
            "check_hooks_to_add hook_points clear_contexts context_level"
        ),
        "Caches": "cached_names add_caching_hooks get_caching_hooks",
        "Text": (
            "to_tokens to_string to_str_tokens to_single_token to_single_str_token "
            "get_token_position get_attention_mask padding_mask apply_chat_template text "
            "tokens_to_residual_directions"
        ),
        "Weights and places": (
            "cfg W_E W_U W_Q W_K W_V W_O stack device dtype layer_devices placement quantization"
        ),
        "Parts of a forward": (
            "encode_texts run_embed run_blocks run_layout run_ln_final run_unembed running setup"
        ),
    }
}
"""Classes with a page of their own at the head of the reference: groups of their members."""

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


@cache
def parsed(module: str) -> ast.Module:
    """Return a module's source as a tree."""
    path = ROOT / module.replace(".", "/")
    file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    return ast.parse(file.read_text("utf-8"))


@cache
def purposes(module: str) -> dict[str, str]:
    """Return the first lines of the docstrings of what a module defines, by name.

    That of the module itself is at "". Of the variants of an overloaded function the last counts,
    of a constant the text below it.
    """
    body = parsed(module).body
    found = {"": ast.get_docstring(parsed(module)) or ""}
    for node, after in zip(body, [*body[1:], None], strict=True):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            found[node.name] = ast.get_docstring(node) or ""
        elif isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(after, ast.Expr):
            target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
            found[ast.unparse(target)] = str(getattr(after.value, "value", ""))
    return {name: text.partition("\n")[0] for name, text in found.items()}


def source_of(package: str, name: str) -> tuple[str, str]:
    """Return the module that defines a name which a package exports, and its name there."""
    for node in parsed(package).body:
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            if (alias.asname or alias.name) == name and node.module in modules():
                return source_of(str(node.module), alias.name)
    return package, name


def reference_page(module: str) -> str:
    """Return the Markdown of a module's page: its docstrings, or lists with a line for each entry.

    A package lists its public names, each linked to the page of its module, and its modules.

    Raises:
        KeyError: a public name without a docstring.
    """
    names, page = public_names(module), f"::: {module}\n"
    inside = [m for m in modules() if m.rpartition(".")[0] == module]
    if names:
        page += "    options:\n      members: false\n"
        page += "\nPublic names, each on the page of its module"
        if module != "hooked_hybrid":
            page += "; examples begin with what `hooked_hybrid` [makes][hooked_hybrid]"
        page += ":\n\n"
        for name in names:
            where, there = source_of(module, name)
            page += f"- [`{name}`][{module}.{name}]: {purposes(where)[there]}\n"
    if inside:
        page += "\nModules:\n\n"
        for name in inside:
            page += f"- [`{name.rpartition('.')[2]}`][{name}]: {purposes(name)['']}\n"
    return page


def page_of_object(path: str) -> str:
    """Return the page of a class in `OBJECTS`."""
    return f"reference/{path.rpartition('.')[2]}.md"


def object_page(path: str) -> str:
    """Return the Markdown of a class's own page: its members, inherited ones too, in groups."""
    name = path.rpartition(".")[2]
    text = f"# {name}\n\n::: {path}\n    options:\n      members: false\n"
    text += "      show_root_heading: false\n      show_root_toc_entry: false\n"
    options = "    options:\n      heading_level: 3\n      show_root_full_path: false\n"
    for group, members in OBJECTS[path].items():
        text += f"\n## {group}\n"
        text += "".join(f"\n::: {path}.{member}\n{options}" for member in members.split())
    return text


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
    objects = [{path.rpartition(".")[2]: page_of_object(path)} for path in OBJECTS]
    return [
        *objects,
        {"Public names": names},
        *({title: pages} for title, pages in nav.items() if pages),
    ]


def section_nav(section: str) -> list[Any]:
    """Return the navigation of a section: its pages on disk, first those named in `SECTIONS`."""
    named = {page: title for pages in SECTIONS.values() for page, title in pages.items()}
    docs = ROOT / "docs"
    found = [path.relative_to(docs).as_posix() for path in sorted(docs.rglob("*.md"))]
    found += documents().values()
    homes = {"how-to": "How to", "concepts": "Concepts", "": "Studies"}
    others = [page for page in found if page not in named and page != "index.md"]
    others.sort(key=lambda page: page.startswith("notebook-"))
    last = [
        page
        for page in others
        if not page.startswith("notebook-") and homes.get(os.path.dirname(page)) == section
    ]
    pages = [page for page in SECTIONS[section] if page in found]
    nav: list[Any] = [{title: page} if (title := named[page]) else page for page in pages]
    notebooks = [page for page in others if page.startswith("notebook-")]
    return [*nav, *last, *([{"Notebooks": notebooks}] if section == "How to" else [])]


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the sections and the reference into the navigation."""
    nav: list[Any] = [{"Home": "index.md"}]
    for section in SECTIONS:
        if section == "Project":
            nav.append({"Reference": reference_nav()})
        nav.append({section: section_nav(section)})
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
    for path in OBJECTS:
        files.append(File.generated(config, page_of_object(path), content=object_page(path)))
    return files


def on_page_markdown(markdown: str, page: Page, **_: Any) -> str:
    """Turn links between files into links between pages; searches rank what teaches first."""
    if page.file.src_uri in taught():
        page.meta["search"] = {"boost": 3}
    return relink(markdown, page.file.src_uri)


def taught() -> set[str]:
    """Return the pages that a search ranks first: of the sections that teach, and of classes."""
    sections = ("Getting started", "How to", "Concepts")
    return {page for name in sections for page in SECTIONS[name]} | set(
        map(page_of_object, OBJECTS)
    )


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
