"""`import hooked_hybrid` brings the few packages it needs, and its large parts when asked for."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path

from typer.testing import CliRunner

import hooked_hybrid
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.options import EXTRAS

ROOT = Path(__file__).parents[2]

HEAVY = """
    accelerate filelock huggingface_hub jinja2 lm_eval matplotlib pandas ray rich tokenizers torchao
    transformers typer
""".split()

PROGRAM = """
import sys
import hooked_hybrid
brought = {module.partition(".")[0] for module in sys.modules}
print(*sorted(brought.intersection(sys.argv[1:])))
print(*sorted(m for m in sys.modules if m.startswith("hooked_hybrid.analysis")))
assert hooked_hybrid.analysis.plots and hooked_hybrid.interventions.hook_at
try:
    hooked_hybrid.nothing
except AttributeError as error:
    print(error)
from hooked_hybrid import *
print(all(name in globals() for name in hooked_hybrid.__all__))
"""


def test_the_import_brings_no_large_package_and_large_parts_come_when_asked_for():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *HEAVY, "torch"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.splitlines() == [
        "torch",
        "",
        "module 'hooked_hybrid' has no attribute 'nothing'",
        "True",
    ], done.stderr


# --- with the base install alone ------------------------------------------------------------------

BASE = """
import sys
OPTIONAL = sys.argv[1].split()
for name in OPTIONAL:
    sys.modules[name] = None  # neither found nor imported

import importlib, pkgutil
import hooked_hybrid, weights_conversion

for package in (hooked_hybrid, weights_conversion):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.endswith((".__main__", ".triton_kernels")):
            continue
        try:
            importlib.import_module(found.name)
        except ImportError as error:
            print(f"IMPORT {found.name}: {error}")

from hooked_hybrid import HookedHybrid, analysis, interventions
from hooked_hybrid.accounting import count_parameters, flops_table

model = HookedHybrid.from_pretrained("tiny-griffin")
logits, cache = model.run_with_cache("the river is cold")
model.generate("the river", 2, fwd_hooks=interventions.keep_top_heads(2), verbose=False)
assert "torch._dynamo" not in sys.modules  # the compiler of torch: 1.5 s
assert analysis.entropy_profile(cache) and count_parameters(model.cfg).total
grid = analysis.memory_horizon(cache, 0)
assert len(flops_table(model.cfg, [8])) and analysis.plots.pattern_map(cache["pattern", 2][0])


def says(name, call):
    try:
        call()
    except ImportError as error:
        print(f"{name}: {error}")
    else:
        print(f"{name} works")


says("int8", lambda: HookedHybrid.from_pretrained("tiny-griffin", quantize="int8"))
says("auto", lambda: HookedHybrid.from_pretrained("tiny-griffin", device_map="auto"))
"""
OPTIONAL = [*EXTRAS, "datasets", "sentencepiece", "transformers", "triton", "mamba_ssm", "scipy"]
SENTENCES = """
int8: quantised weights need torchao 0.18 or later: pip install 'hooked-hybrid[quantized]'
auto: device_map='auto' needs accelerate: pip install 'hooked-hybrid[offload]', or give a dict
"""


def test_the_base_install_does_everything_that_needs_no_extra_and_names_the_extra_for_the_rest():
    done = subprocess.run(
        [sys.executable, "-c", BASE, " ".join(OPTIONAL)],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = done.stdout.splitlines()
    refused = dict(line[len("IMPORT ") :].split(": ", 1) for line in lines if "IMPORT " in line)
    assert refused == {
        f"hooked_hybrid.evaluation.{name}": "this needs lm_eval: pip install 'hooked-hybrid[eval]'"
        for name in ("generating", "lm")
    }, done.stderr
    said = [line for line in lines if not line.startswith("IMPORT ")]
    assert said == SENTENCES.split("\n")[1:-1], done.stderr


def test_every_package_that_is_named_comes_with_the_extra_that_is_named():
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = wanted["optional-dependencies"]
    for package, extra in EXTRAS.items():
        names = [re.split("[<>=;[]", line)[0].strip() for line in extras[extra]]
        assert package.replace("_", "-") in names
    base = {re.split("[<>=;[]", line)[0].strip() for line in wanted["dependencies"]}
    assert {"numpy", "pandas", "matplotlib", "typer", "rich"} <= base
    assert {"analysis", "niah"} <= extras.keys()  # of earlier versions: they still resolve


def test_the_version_is_one():
    assert metadata.version("hooked-hybrid") == hooked_hybrid.__version__
    assert CliRunner().invoke(build_app(), ["--version"]).output.split() == [
        "hooked-hybrid",
        hooked_hybrid.__version__,
    ]
