"""Device consistency without a GPU: what runs on a pretended one is what runs on a CPU.

All runs once, in a process of its own, as torch must be imported after what stands for its device;
the tests read what it wrote.
"""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from hooked_hybrid import analysis, interventions
from tests.layer_configs import CONFIGS as LAYERS
from tests.models import CONFIGS
from tests.pretended_gpu import guard

HERE = Path(__file__).parent
RESULTS = "Agreement Attribution DecayRange EntropyProfile GroupScores HeadScores Lens PairScores"
RESULTS += " PatchGrid Reach Receiver Sender TopTokens"
RUNS_NOTHING = {
    "analysis": {*RESULTS.split(), "plots"},  # what functions return; it draws what the host has
    "interventions": {"check_spans"},  # takes no tensor of a model
}
"""Public names that need no scenario, and why."""
LEAST_ROWS = {"griffin": 140, "jamba": 140}
LEAST_FAULTS = 12
SKIPPED = guard.why_not()

needs_a_guard = pytest.mark.skipif(SKIPPED is not None, reason=str(SKIPPED))


def test_the_pretended_gpu_is_there():
    """A machine without a compiler says so, and not in a skipped test alone."""
    if SKIPPED is not None:
        warnings.filterwarnings("always", category=pytest.PytestWarning)
        warnings.warn(pytest.PytestWarning(f"NOTHING OF A GPU IS TESTED: {SKIPPED}"), stacklevel=1)


def found(factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Return what the process wrote; it runs once, whichever worker asks first."""
    is_shared = "PYTEST_XDIST_WORKER" in os.environ  # tests run in several processes
    folder = factory.getbasetemp().parent if is_shared else factory.getbasetemp()
    out = folder / "pretended-gpu.json"
    with FileLock(f"{out}.lock"):
        if not out.exists():
            what = [*CONFIGS, *LAYERS, "faults", "budgets", "doors"]
            command = [sys.executable, "-m", "tests.pretended_gpu.run", str(out), *what]
            root = HERE.parent.parent
            run = subprocess.run(command, capture_output=True, text=True, cwd=root)
            assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads(out.read_text())


def rows_of(model: str, factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [row for row in found(factory)["rows"] if row["model"] == model]


@needs_a_guard
@pytest.mark.parametrize("model", [*CONFIGS, *LAYERS])
def test_nothing_mixes_devices_and_values_are_a_cpus(model: str, tmp_path_factory):
    rows = rows_of(model, tmp_path_factory)
    bad = [(r["scenario"], r["inputs"], r["error"] or r["difference"]) for r in rows]
    assert not [row for row in bad if row[2]]
    assert len(rows) >= LEAST_ROWS.get(model, 8)
    assert {row["inputs"] for row in rows} == {"cpu", "cuda"}


@needs_a_guard
def test_every_kernel_that_a_gpu_has_was_run(tmp_path_factory):
    calls = {*found(tmp_path_factory)["kernels"]}
    packages = {
        f"{p} {way}" for p in ("causal-conv1d", "mamba-ssm") for way in ("forward", "backward")
    }
    assert calls == packages | {"Triton linear scan", "Triton selective scan"}


@needs_a_guard
def test_attention_is_never_cudnns_and_fused_where_heads_are_aligned(tmp_path_factory):
    """The griffins' heads are of 8 numbers, the jambas' of 6, which no fused kernel reads."""
    for model in CONFIGS:
        taken = {kind for r in rows_of(model, tmp_path_factory) for kind in r["attention"]}
        assert taken == ({"efficient"} if "griffin" in model else {"math"})


@needs_a_guard
def test_the_packaged_models_go_through_every_door(tmp_path_factory):
    doors = found(tmp_path_factory)["doors"]
    assert len(doors) >= 12
    assert not {name: how for name, how in doors.items() if how}


@needs_a_guard
def test_the_host_waits_no_more_than_it_did(tmp_path_factory):
    for name, waits in found(tmp_path_factory)["waits"].items():
        layers = waits["attention layers"]
        # The range of the tokens; and in each attention layer, whether values are finite.
        assert waits["forward"] <= 1 + layers, (name, waits)
        assert waits["step"] <= 2, (name, waits)  # has a row ended, is there a choice
        assert waits["step in a graph"] == 0, (name, waits)
        assert waits["step under keep_top_heads"] <= 2 + 10 * layers, (name, waits)


@needs_a_guard
def test_planted_faults_are_noticed(tmp_path_factory):
    faults = found(tmp_path_factory)["faults"]
    assert len(faults) >= LEAST_FAULTS
    assert not [name for name, seen in faults.items() if not seen]


def names_used(of: str) -> set[str]:
    """Return the attributes of `interventions` or `analysis` that scenarios read."""
    names: set[str] = set()
    for path in ("stages.py", "edits.py", "readings.py"):
        for node in ast.walk(ast.parse((HERE / path).read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                read = {"I": "interventions"}.get(node.value.id, node.value.id)
                names |= {node.attr} if read == of else set()
    return names


@pytest.mark.parametrize("module", [interventions, analysis], ids=["interventions", "analysis"])
def test_every_public_name_has_a_scenario(module: Any):
    """A new one is added to the scenarios, or to `RUNS_NOTHING` with a reason."""
    of = module.__name__.rpartition(".")[2]
    used, public = names_used(of), {*module.__all__}
    assert public - used - RUNS_NOTHING[of] == set()
    assert RUNS_NOTHING[of] <= public and not used & RUNS_NOTHING[of]
