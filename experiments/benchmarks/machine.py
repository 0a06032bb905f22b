"""The machine: its description, and the speed of its matrix products and memory."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import linear

from experiments.benchmarks.timing import timed
from hooked_hybrid.outputs.checkout import commit

PACKAGES = ("torch", "transformers", "recurrentgemma", "transformer-lens")
D = 512
READ_SHAPES = ((512, 3072), (1536, 512), (512, 512), (512, 8192))
"""d_in and d_out of RG mid's matrices."""


def described() -> dict[str, Any]:
    """Return the description of the machine and its software, without measuring."""
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "cores this process may use": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **_versions(),
        **provenance(),
    }


def _versions() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found


def provenance() -> dict[str, str]:
    """Return the date and the commit, with a plus if files differ from it."""
    now = datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %z")
    return {"date": now, "commit": commit()}


def commit_and_day() -> str:
    """Return the commit and the day as in marks of pages: "1a2b3c4+, 2026-11-30"."""
    return f"{commit()}, {datetime.now().astimezone():%Y-%m-%d}"


def speeds() -> dict[str, float]:
    """Return the speed of matrix products and of memory, fp32."""
    found = {f"GEMM {m} x {D} x {3 * D}, GFLOP/s": _gemm(m) for m in (512, 4096)}
    source, target = torch.randn(2**24), torch.empty(2**24)  # 64 MB
    found["copy of 64 MB, GB/s read and written"] = (
        2 * 2**26 / _best(lambda: target.copy_(source), 8) / 1e9
    )
    for d_in, d_out in READ_SHAPES:
        found[f"F.linear of one row, {d_in} to {d_out}, GB/s"] = _read(d_in, d_out)
    return found


def _gemm(m: int) -> float:
    a, b, out = torch.randn(m, D), torch.randn(D, 3 * D), torch.empty(m, 3 * D)
    return 2 * m * D * 3 * D / _best(lambda: torch.mm(a, b, out=out), 2**14 // m) / 1e9


def _read(d_in: int, d_out: int) -> float:
    """Return GB/s of many matrices in turn, so that they come from memory and not from caches."""
    weights = torch.randn(max(2, 2**25 // (d_in * d_out)), d_out, d_in)  # 128 MB
    x = torch.randn(1, d_in)

    def read_all() -> None:
        for weight in weights:
            linear(x, weight)

    return 4 * weights.numel() / _best(read_all, 1) / 1e9


def _best(work: Callable[[], object], repeats: int) -> float:
    """Return the median seconds of some work, once it is warm."""
    return statistics.median(timed(work, repeats)[1] for _ in range(6))


def _cpu() -> str:
    names = [
        line.partition(":")[2].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    flags = " ".join(f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if _has(f))
    return f"{names[0] if names else platform.processor()} ({flags})"


def _has(flag: str) -> bool:
    return f" {flag} " in Path("/proc/cpuinfo").read_text().replace("\n", " ")
