"""Every public name has an example in its docstring, and every example runs."""

from __future__ import annotations

import ast
import doctest
import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any

import pytest
import torch

import hooked_hybrid
import weights_conversion
from hooked_hybrid import (
    ActivationCache,
    FactoredMatrix,
    HookedHybrid,
    HybridConfig,
    HybridState,
)
from hooked_hybrid.analysis import Attribution, GroupScores, HeadScores, PairScores, PatchGrid
from hooked_hybrid.harvest import HarvestedActivations

ROOT = Path(__file__).parent.parent.parent
BY_MODULE = {
    "hooked_hybrid.analysis.plots": "head_grid pattern_map effective_attention_map attribution_bars"
    " residual_curves lens_map",
    "hooked_hybrid.niah.language": "text_loss",
    "hooked_hybrid.niah.needles": "Needle KeywordNeedle custom_needle draw_needle held_out_needles"
    " known_needles find_needle load_needles distractors_for",
    "hooked_hybrid.niah.prompts": "Prompt Haystack build_prompt grid shortest_length"
    " default_lengths default_depths",
    "hooked_hybrid.niah.scores": "graded binary released accuracy",
    "hooked_hybrid.niah.settings.papers": "weight_matrix layer_settings head_settings"
    " control_settings",
    "hooked_hybrid.niah.settings.static": "static_settings",
    "hooked_hybrid.niah.store": "read_cells",
    "hooked_hybrid.niah.sweep": "niah",
    "hooked_hybrid.runs.intervals": "mean_interval combine",
    "hooked_hybrid.runs.statistics": "summary",
}
"""Names that users import from modules, as their packages export none."""
WITHOUT = {
    HookedHybrid: "run_layout encode_texts run_embed run_blocks run_ln_final run_unembed running",
    ActivationCache: "value_at require_first_positions require_parts read_parts dim_of_pos batched"
    " unbatched pos_of key_pos_of keep",
    HybridState: "",
    HybridConfig: "on",
    FactoredMatrix: "",
    HeadScores: "",
    GroupScores: "",
    PatchGrid: "",
    PairScores: "",
    Attribution: "",
    HarvestedActivations: "opened is_floating resolve resolve_all",
}
"""The classes that users hold, all of whose methods have examples but those that only the library
itself calls."""


def is_ours(value: Any) -> bool:
    return str(value.__module__).partition(".")[0] in ("hooked_hybrid", "weights_conversion")


def exported() -> Iterator[tuple[str, Any]]:
    """Yield the classes and functions that packages export."""
    for top in (hooked_hybrid, weights_conversion):
        inside = pkgutil.walk_packages(top.__path__, top.__name__ + ".")
        for name in (top.__name__, *(module.name for module in inside if module.ispkg)):
            package = importlib.import_module(name)
            for leaf in getattr(package, "__all__", ()):
                value = getattr(package, leaf)
                if isinstance(inspect.unwrap(value), type | FunctionType) and is_ours(value):
                    yield f"{name}.{leaf}", value
    for name, leaves in BY_MODULE.items():
        for leaf in leaves.split():
            yield f"{name}.{leaf}", getattr(importlib.import_module(name), leaf)


def methods() -> Iterator[tuple[str, Any]]:
    """Yield the methods of the classes that users hold."""
    for of, left_out in WITHOUT.items():
        for part in of.__mro__:
            for name, value in vars(part).items() if is_ours(part) else ():
                value = getattr(value, "__func__", value)
                is_method = name[0] != "_" and isinstance(value, FunctionType)
                if is_method and name not in left_out.split():
                    yield f"{of.__name__}.{name}", value


def examples() -> dict[str, list[doctest.DocTest]]:
    """Return every example in a docstring, by the package it stands in."""
    found: dict[str, list[doctest.DocTest]] = {}
    for top in ("hooked_hybrid", "weights_conversion"):
        for path in sorted((ROOT / top).rglob("*.py")):
            if ">>> " in (text := path.read_text("utf-8")):
                parts = path.relative_to(ROOT).parts
                package = ".".join(parts[:2] if len(parts) > 2 else parts[:1])
                found.setdefault(package, []).extend(examples_of(path, ast.parse(text)))
    return found


def examples_of(path: Path, tree: ast.Module) -> Iterator[doctest.DocTest]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            text = ast.get_docstring(node, clean=True) or ""
            name = f"{path.relative_to(ROOT)}:{getattr(node, 'name', 'module')}"
            made = doctest.DocTestParser().get_doctest(text, {}, name, str(path), None)
            if made.examples:
                yield made


EXAMPLES = examples()


def run(example: doctest.DocTest, names: dict[str, Any]) -> str:
    """Run an example with these names in its namespace, and return what failed."""
    said: list[str] = []
    example.globs = names
    doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS).run(
        example, out=said.append, clear_globs=False
    )
    return "".join(said)


@cache
def shared() -> dict[str, Any]:
    """Return the names that all examples use, as the docstring of `hooked_hybrid` makes them."""
    names: dict[str, Any] = {"__name__": "__main__"}
    (made,) = (e for e in EXAMPLES["hooked_hybrid"] if e.name == "hooked_hybrid/__init__.py:module")
    assert run(made, names) == ""
    return names


def test_every_public_name_has_an_example():
    named = [*exported(), *methods()]
    assert len(named) > 300
    without = [name for name, value in named if ">>> " not in (value.__doc__ or "")]
    assert not without, f"no example in the docstring of {', '.join(without)}"


@pytest.mark.parametrize("package", EXAMPLES)
def test_every_example_gives_what_it_says(
    package: str, unchecked: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    names = shared()
    failed = "".join(run(example, dict(names)) for example in EXAMPLES[package])
    assert failed == "", failed
    assert not names["model"].attached() and not names["jamba"].attached()
    left = names["model"](names["tokens"])
    assert torch.allclose(left, names["logits"], atol=1e-4), "an example changed the model"


def test_an_example_that_is_wrong_is_noticed():
    example = doctest.DocTestParser().get_doctest(">>> 1 + 1\n3\n", {}, "wrong", None, None)
    assert "Expected:\n    3\nGot:\n    2" in run(example, {})
