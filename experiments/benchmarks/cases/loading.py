"""Loading a checkpoint, against reading its file and copying every tensor once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from experiments.benchmarks.bars import COPY, WEIGHTS
from experiments.benchmarks.child import run_child
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import progress
from hooked_hybrid import HookedHybrid
from hooked_hybrid.presets import configs as presets

SIZES = {"100 MB": ("RRARRA", 512), "1 GB": ("RRARR", 2048)}
"""Layers and width; the vocabulary is 8192."""


def loading(options: Options) -> Iterator[Measurement]:
    """Measure seconds and the peak of memory, each in fresh processes, the file in the cache."""
    first: list[float] = []
    for size in ["100 MB"] if options.quick else SIZES:
        folder = options.scratch / f"griffin-{size.replace(' ', '-')}"
        _write(folder, size)
        seconds: dict[str, list[float]] = {OURS: [], COPY: []}
        peaks: dict[str, list[float]] = {OURS: [], WEIGHTS: []}
        (folder / "model.safetensors").read_bytes()  # cached from now on
        for _ in progress(range(options.n_rounds(5)), f"loading {size}"):
            found = run_child("load-ours", folder)
            first.append(found["first"])
            seconds[OURS].append(found["seconds"])
            seconds[COPY].append(run_child("load-copy", folder)["seconds"])
        for _ in range(options.n_rounds(2)):
            found = run_child("load-peak", folder)
            peaks[OURS].append(found["peak"])
            peaks[WEIGHTS].append(found["allowed"])
        note = "once the process has loaded a model; theirs is safetensors, every tensor cloned"
        yield Measurement("loading", f"{size}, seconds", seconds, note=note)
        note = "anonymous memory; the other side is 1.1 times the weights, and the largest tensor"
        yield Measurement("loading", f"{size}, peak", peaks, "MB", note=note)
    note = "the first load of a process, of a model of 2 MB: what is imported then"
    yield Measurement("loading", "tiny-griffin, seconds", {OURS: first}, note=note)


def _write(folder: Path, size: str) -> None:
    if folder.exists():
        return
    pattern, d_model = SIZES[size]
    HookedHybrid(presets.griffin(pattern, d_model=d_model, d_vocab=8192)).save_pretrained(folder)
