"""Steps that need their own process: cold calls, and peaks of memory.

`run_child(step, ...)` runs one and returns its figures. `transformers` is never imported there.
"""

from __future__ import annotations

import ctypes
import json
import statistics
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from experiments.benchmarks.timing import clock

T = TypeVar("T")
MB = 1e6
SAMPLE_EVERY = 0.001


def run_child(step: str, *arguments: object) -> dict[str, float]:
    """Run a step in a fresh process and return what it printed.

    Raises:
        RuntimeError: it failed; the message contains its output.
    """
    threads = str(torch.get_num_threads())
    command = [sys.executable, "-m", "experiments.benchmarks.child", threads, step]
    done = subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{step} failed:\n{done.stderr}")
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def prefill_memory(folder: str, length: str) -> dict[str, float]:
    """Return the megabytes of temporary memory of a prefill, above the weights and its state."""
    model = _loaded(folder)
    warm, tokens = _tokens(16), _tokens(int(length))
    model(warm, return_type=None, return_state=True)
    (_, state), peak = peak_growth(lambda: model(tokens, return_type=None, return_state=True))
    kept = sum(t.nbytes for block in state.blocks for t in vars(block).values())
    return {"mb": (peak - kept) / MB, "state_mb": kept / MB}


def scan_memory(length: str) -> dict[str, float]:
    """Return the megabytes of temporary memory of the selective scan, above inputs and output."""
    from experiments.benchmarks.cases.scans import D_INNER, D_STATE, selective_inputs
    from hooked_hybrid.network.scans.selective_scan import selective_scan

    h0 = torch.zeros(1, D_INNER, D_STATE)
    selective_scan(*selective_inputs(64), h0)
    inputs = selective_inputs(int(length))
    (y, h), peak = peak_growth(lambda: selective_scan(*inputs, h0))
    return {"mb": (peak - y.nbytes - h.nbytes) / MB}


def cold_cache(folder: str, length: str) -> dict[str, float]:
    """Return the seconds of a plain forward, and of the first one that caches everything."""
    model, tokens = _loaded(folder), _tokens(int(length))
    model(tokens, return_type=None)
    plain = statistics.median(_seconds(lambda: model(tokens, return_type=None)) for _ in range(3))
    return {
        "plain": plain,
        "cached": _seconds(lambda: model.run_with_cache(tokens, return_type=None)),
    }


def load_ours(folder: str) -> dict[str, float]:
    """Return the seconds of the first load of the process, of a tiny model, and of this one."""
    import weights_conversion  # noqa: F401

    return {
        "first": _seconds(lambda: _loaded("tiny-griffin")),
        "seconds": _seconds(lambda: _loaded(folder)),
    }


def load_peak(folder: str) -> dict[str, float]:
    """Return the peak memory of `from_pretrained`, and its limit for these weights."""
    _loaded("tiny-griffin")
    model, peak = peak_growth(lambda: _loaded(folder))
    sizes = [p.nbytes for p in model.parameters()]
    return {"peak": peak / MB, "allowed": (1.1 * sum(sizes) + max(sizes)) / MB}


def load_copy(folder: str) -> dict[str, float]:
    """Return seconds of reading the file of a checkpoint and copying every tensor once."""
    from safetensors import safe_open

    def copied() -> list[torch.Tensor]:
        with safe_open(Path(folder) / "model.safetensors", "pt") as file:
            return [file.get_tensor(name).clone() for name in file.keys()]  # noqa: SIM118

    return {"seconds": _with_seconds(copied)[1]}


STEPS: dict[str, Callable[..., dict[str, float]]] = {
    "prefill-memory": prefill_memory,
    "scan-memory": scan_memory,
    "cold-cache": cold_cache,
    "load-ours": load_ours,
    "load-peak": load_peak,
    "load-copy": load_copy,
}


def peak_growth(work: Callable[[], T]) -> tuple[T, int]:
    """Return the result of some work, and its peak of anonymous memory in bytes.

    The allocator's free memory is returned to the system first, so that it hides nothing.
    """
    _give_back()
    before = peak = anonymous_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(SAMPLE_EVERY):
            peak = max(peak, anonymous_bytes())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        result = work()
    finally:
        done.set()
        watcher.join()
    return result, max(peak, anonymous_bytes()) - before


def anonymous_bytes() -> int:
    """Return the memory of this process that is not a mapped file.

    Raises:
        RuntimeError: the system does not report it.
    """
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report a process's anonymous memory")


def _give_back() -> None:
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _loaded(folder: str) -> Any:
    from hooked_hybrid import HookedHybrid

    return HookedHybrid.from_pretrained(folder)


def _tokens(length: int) -> torch.Tensor:
    from experiments.benchmarks.models import random_tokens

    return random_tokens(length)


def _seconds(work: Callable[[], object]) -> float:
    return _with_seconds(work)[1]


def _with_seconds(work: Callable[[], T]) -> tuple[T, float]:
    start = clock()
    result = work()
    return result, clock() - start


def main() -> None:
    """Run the step named on the command line, and print its figures."""
    threads, step, *arguments = sys.argv[1:]
    torch.set_num_threads(int(threads))
    with torch.no_grad():
        print(json.dumps(STEPS[step](*arguments)))


if __name__ == "__main__":
    main()
