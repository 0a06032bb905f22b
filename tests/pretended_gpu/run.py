"""Run scenarios on a pretended GPU and compare with a CPU: `python -m tests.pretended_gpu.run`.

In a process of its own, as torch is imported after what stands for its device. Prints nothing;
writes one JSON: a row for each run, what the host waited for, and which faults were noticed.
"""

from __future__ import annotations

from tests.pretended_gpu import guard

guard.load()  # before torch

import argparse  # noqa: E402
import json  # noqa: E402
import os  # noqa: E402
import time  # noqa: E402
import traceback  # noqa: E402
import warnings  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.utils._pytree import tree_flatten  # noqa: E402

from hooked_hybrid import HookedHybrid  # noqa: E402
from tests.layer_configs import CONFIGS as LAYERS  # noqa: E402
from tests.models import (  # noqa: E402
    CONFIGS,
    griffin_config,
    jamba_config,
    random_model,
    tiny_model,
)
from tests.pretended_gpu.budgets import waits_of  # noqa: E402
from tests.pretended_gpu.device import PretendedGPU, real  # noqa: E402
from tests.pretended_gpu.doors import DOORS, Door  # noqa: E402
from tests.pretended_gpu.edits import EDITS  # noqa: E402
from tests.pretended_gpu.faults import FAULTS, planted  # noqa: E402
from tests.pretended_gpu.kernels import calls, pretended_kernels  # noqa: E402
from tests.pretended_gpu.readings import READINGS  # noqa: E402
from tests.pretended_gpu.stages import STAGES, Scenario  # noqa: E402

TOLERANCE = 3e-4
"""Of the largest entry: sums are those of a CPU, in another order where a kernel is replaced."""
SHALLOW = {"griffin": griffin_config("RA"), "jamba": jamba_config("MA")}
"""What runs all scenarios: a layer of each kind, as each operation costs its note."""
FEW = ("forward", "padding_on_the_left", "packing", "cached_steps", "generation_of_padded_rows")
FEW += ("cache_of_everything", "grad_training", "grad_training_on_padded_rows")
"""Stages of models that differ from these by their sizes alone."""


def scenarios_of(name: str) -> dict[str, Scenario]:
    """Return what is run on a model.

    Edits run in a forward on both families; in generation, and with gradients, on one.
    """
    left_out = ", generation" if name == "griffin" else "grad under "
    edits = {key: fn for key, fn in EDITS.items() if left_out not in key}
    return {**STAGES, **edits, **READINGS}


def on_gpu(cpu: HookedHybrid) -> HookedHybrid:
    """Return the same model on the pretended GPU."""
    model = HookedHybrid(cpu.cfg, device="cuda", dtype=cpu.dtype)
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), cpu.parameters(), strict=True):
            mine.copy_(theirs)
    return model.eval()


def different(found: Any, wanted: Any) -> str | None:
    """Return how two results differ, or None."""
    mine, theirs = tree_flatten(real(found))[0], tree_flatten(wanted)[0]
    if len(mine) != len(theirs):
        return f"{len(mine)} values for {len(theirs)}"
    return next((d for pair in zip(mine, theirs, strict=True) if (d := _differ(*pair))), None)


def _differ(found: Any, wanted: Any) -> str | None:
    if isinstance(wanted, float):
        found, wanted = torch.tensor(float(found)), torch.tensor(wanted)
    if not isinstance(wanted, Tensor):
        return None if found == wanted else f"{found!r} for {wanted!r}"[:200]
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return f"{found.dtype}{tuple(found.shape)} for {wanted.dtype}{tuple(wanted.shape)}"
    if not wanted.is_floating_point() or not wanted.numel():
        return None if torch.equal(found, wanted) else "other integers"
    found, wanted = found.detach().double(), wanted.detach().double()
    is_small = wanted.isfinite() & (wanted.abs() < 1e30)  # not what stands for masked scores
    most = float(wanted[is_small].abs().max()) if bool(is_small.any()) else 1.0
    if torch.allclose(found, wanted, 1e-12, TOLERANCE * max(most, 1e-6), equal_nan=True):
        return None
    return f"off by {float((found - wanted).abs().max()):.2g} of {most:.2g}"


def run(fn: Scenario, model: HookedHybrid, key: str, device: str | None) -> Any:
    """Return what a scenario gives; inputs lie on a device, or where they were made."""
    with torch.set_grad_enabled(key.startswith("grad")):
        return fn(model, lambda t: t if device is None else t.to(device))


def rows_of(name: str) -> list[dict[str, Any]]:
    """Return a row for each run: whether it raised, and how it differs from a CPU's."""
    few = {key: STAGES[key] for key in FEW}
    if name in LAYERS:
        return _rows_of(name, random_model(LAYERS[name]), few)
    whole = _rows_of(name, tiny_model(name), few)
    if name not in SHALLOW:
        return whole
    return whole + _rows_of(name, random_model(SHALLOW[name]), scenarios_of(name))


def _rows_of(name: str, cpu: HookedHybrid, scenarios: dict[str, Scenario]) -> list[dict[str, Any]]:
    cpu, rows = cpu.requires_grad_(), []
    wanted = {key: run(fn, cpu, key, None) for key, fn in scenarios.items()}
    with PretendedGPU() as gpu, pretended_kernels():
        model = on_gpu(cpu)
        for i, (key, fn) in enumerate(scenarios.items()):
            inputs = "cpu" if i % 4 == 3 else "cuda"  # a user's tokens may lie on either
            row: dict[str, Any] = {"model": name, "scenario": key, "inputs": inputs, "error": None}
            gpu.reset()
            try:
                found = run(fn, model, key, inputs)
                row["difference"] = different(found, wanted[key])
            except Exception as error:
                frames = [f for f in traceback.extract_tb(error.__traceback__)]
                mine = [
                    f"{Path(f.filename).name}:{f.lineno}" for f in frames if "hybrid" in f.filename
                ]
                row["error"] = f"{type(error).__name__}: {error} ({', '.join(mine[-4:])})"
                model.reset_hooks()
                model.zero_grad()
            row["waits"], row["launches"] = sum(gpu.waits.values()), sum(gpu.launches.values())
            row["attention"] = dict(gpu.attention)
            rows.append(row)
    return rows


def faults_noticed() -> dict[str, str]:
    """Return what is seen of each planted fault: an error, a difference, or nothing."""
    found, scenarios = {}, {**STAGES, **EDITS, **READINGS}
    models = {name: random_model(cfg).requires_grad_() for name, cfg in SHALLOW.items()}
    for name, fault in FAULTS.items():
        cpu, scenario = models[fault.model], scenarios[fault.scenario]
        wanted = run(scenario, cpu, fault.scenario, None)
        with PretendedGPU(), pretended_kernels(), planted(fault):
            try:
                got = run(scenario, on_gpu(cpu), fault.scenario, "cuda")
                found[name] = different(got, wanted) or ""
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:200]
    return found


def through(door: Door) -> str | None:
    """Return how a door's result differs from a CPU's, or which error it gives."""
    try:
        return different(*door())
    except Exception as error:
        return "".join(traceback.format_exception(error)[-6:])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument(
        "what", nargs="+", choices=[*CONFIGS, *LAYERS, "doors", "faults", "budgets"]
    )
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("error", UserWarning)  # a kernel that is left out says so by one
    started = time.process_time()
    found: dict[str, Any] = {"rows": []}
    for what in given.what:
        if what == "faults":
            found["faults"] = faults_noticed()
        elif what == "budgets":
            found["waits"] = waits_of(on_gpu)
        elif what == "doors":
            found["doors"] = {name: through(door) for name, door in DOORS.items()}
        else:
            found["rows"] += rows_of(what)
    found |= {"kernels": dict(calls), "seconds": time.process_time() - started}
    given.out.write_text(json.dumps(found))
    os._exit(0)  # tensors of a device that is gone are not taken apart


if __name__ == "__main__":
    main()
