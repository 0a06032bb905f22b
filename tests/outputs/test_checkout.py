"""Reports name the commit of the code that ran, and of no other project's."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest

from hooked_hybrid.outputs import checkout


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    command = ["git", "-C", str(folder), *identity, *words]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def module_in(folder: Path) -> ModuleType:
    """Return the module as it would be in another folder."""
    folder.mkdir()
    path = Path(shutil.copy(checkout.__file__, folder))
    spec = importlib.util.spec_from_file_location("other_checkout", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def project(tmp_path: Path) -> Path:
    git(tmp_path, "init", "-q")
    git(tmp_path, "commit", "-q", "--allow-empty", "-m", "first")
    return tmp_path


def test_the_commit_is_that_of_the_checkout_with_a_plus_where_files_differ(project: Path):
    folder = project / "hooked_hybrid"
    module = module_in(folder)
    git(project, "add", ".")
    git(project, "commit", "-q", "-m", "package")
    head = git(project, "rev-parse", "--short", "HEAD")
    assert module.commit() == head
    module.commit.cache_clear()
    (project / "notes.txt").write_text("no part of the package")
    assert module.commit() == head
    module.commit.cache_clear()
    (folder / "new.py").write_text("x = 1")
    assert module.commit() == f"{head}+"
    (folder / "new.py").unlink()
    assert module.commit() == f"{head}+"  # a run goes on with the code it began with


def test_code_installed_in_another_project_is_of_no_commit_of_that(project: Path):
    assert module_in(project / "venv").commit() == checkout.UNKNOWN
