"""`import hooked_hybrid` brings the few packages it needs, and its large parts when asked for."""

from __future__ import annotations

import subprocess
import sys

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
