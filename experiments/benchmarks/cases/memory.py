"""Temporary memory of a prefill."""

from __future__ import annotations

from collections.abc import Iterator

from experiments.benchmarks.child import run_child
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.models import rg_mid
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import progress


def memory(options: Options) -> Iterator[Measurement]:
    """Measure the peak in addition to weights and final state, in fresh processes."""
    folder = options.scratch / "rg-mid"
    if not folder.exists():
        rg_mid().ours.save_pretrained(folder)
    for length in options.sizes([1024, 4096, 16_384], [64]):
        rounds = progress(range(options.n_rounds(2)), f"memory {length}")
        grown = [run_child("prefill-memory", folder, length) for _ in rounds]
        note = f"above weights and {grown[0]['state_mb']:.1f} MB of state"
        values = {OURS: [found["mb"] for found in grown]}
        yield Measurement("memory", f"prefill of {length}", values, "MB", note=note)
