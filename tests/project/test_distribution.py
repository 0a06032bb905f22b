"""What is published: the wheel made from the sdist, installed where this repository is not."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

from hooked_hybrid.presets.packaged import packaged_models

ROOT = Path(__file__).parents[2]
SOURCES = "hooked_hybrid weights_conversion experiments tests/test_floors.py".split()
FILES = "pyproject.toml README.md LICENSE MANIFEST.in".split()
BUILD = "import sys; from setuptools import build_meta as b; getattr(b, sys.argv[1])(sys.argv[2])"
PROGRAM = """
import importlib.util, sys
import hooked_hybrid, weights_conversion
from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.program import main

assert hooked_hybrid.__file__.startswith(sys.prefix), hooked_hybrid.__file__
assert weights_conversion.__file__.startswith(sys.prefix)
assert importlib.util.find_spec("experiments") is None
for name in ("tiny-griffin", "tiny-jamba"):
    model = HookedHybrid.from_pretrained(name)
    assert model.generate("the river", 2, verbose=False).startswith("the river")

sys.argv[1:] = ["--version"]
main()
"""


def run(*command: str | Path, cwd: Path) -> str:
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in command],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_published_files_hold_the_packages_and_work_where_they_are_installed(tmp_path: Path):
    tree, made = tmp_path / "tree", tmp_path / "made"
    made.mkdir()
    for name in SOURCES:
        if (ROOT / name).is_dir():
            skip = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, tree / name, ignore=skip)
        else:
            (tree / name).parent.mkdir()
            shutil.copy(ROOT / name, tree / name)
    for name in FILES:
        shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-c", BUILD, "build_sdist", made, cwd=tree)
    (sdist,) = made.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = tmp_path / sdist.name.removesuffix(".tar.gz")
    assert {"hooked_hybrid", "weights_conversion"} == {
        path.name for path in unpacked.iterdir() if path.is_dir() and "egg" not in path.name
    }
    run(sys.executable, "-c", BUILD, "build_wheel", made, cwd=unpacked)
    (wheel,) = made.glob("*.whl")
    packed = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    packages = {path.parts[0] for path in packed if not path.parts[0].endswith(".dist-info")}
    assert packages == {"hooked_hybrid", "weights_conversion"}
    for name, folder in packaged_models().items():
        presets = Path("hooked_hybrid", "presets", name)
        assert {presets / file.name for file in folder.iterdir()} <= packed

    clean = tmp_path / "clean"
    run(sys.executable, "-m", "venv", "--without-pip", clean, cwd=tmp_path)
    (packages,) = clean.glob("lib/python*/site-packages")
    # The dependencies, without what else is installed there: .pth files in it are not followed.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = sys.executable, "-m", "pip", "--python", clean / "bin" / "python", "install", "--quiet"
    run(*pip, "--no-deps", "--no-index", "--force-reinstall", wheel, cwd=tmp_path)
    assert (clean / "bin" / "hooked-hybrid").is_file()
    shown = run(clean / "bin" / "python", "-c", PROGRAM, cwd=tmp_path)
    assert shown.split() == ["hooked-hybrid", wheel.name.split("-")[1]]
