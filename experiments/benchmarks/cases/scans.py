"""The recurrences alone, against the loops of `transformers`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from experiments.benchmarks.bars import HF
from experiments.benchmarks.child import run_child
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved
from hooked_hybrid.network.scans.scan import scan as our_scan
from hooked_hybrid.network.scans.selective_scan import selective_scan

D_INNER, D_STATE = 1024, 16


def scan(options: Options) -> Iterator[Measurement]:
    """Measure h_t = a_t h_(t-1) + x_t."""
    for width in (512, 2560):
        what = f"{options.size(4096, 256)} x {width}"
        works = linear_works(options.size(4096, 256), width)
        values = interleaved(works, options.n_rounds(9), f"scan {what}", check_equal)
        yield Measurement("scan", what, values)


def linear_works(length: int, width: int) -> dict[str, Work]:
    """Return our scan of one row and transformers' loop."""
    from transformers.models.recurrent_gemma import modeling_recurrent_gemma as hf  # noqa: TID251

    a, x = 0.2 + 0.799 * torch.rand(1, length, width), torch.randn(1, length, width)
    h0, reset = torch.zeros(1, width), torch.zeros(1, length, 1, dtype=torch.bool)
    loop: Any = hf.RecurrentGemmaRglru._rnn_scan
    return {OURS: lambda: our_scan(a, x, h0), HF: lambda: loop(None, x, a, reset, None)[0]}


def mamba_scan(options: Options) -> Iterator[Measurement]:
    """Measure Mamba's selective scan, discretisation included, and our scratch memory."""
    for length in options.sizes([1024, 2048, 4096, 8192], [128]):
        what = f"{length} positions"
        rounds = options.n_rounds(5 if length < 8192 else 3)
        values = interleaved(selective_works(length), rounds, f"mamba-scan {what}", check_equal)
        yield Measurement("mamba-scan", what, values, note=f"{D_INNER} channels, {D_STATE} states")
    length = options.size(4096, 128)
    grown = [run_child("scan-memory", length)["mb"] for _ in range(options.n_rounds(3))]
    note = "peak of anonymous memory above inputs and output, in a process of its own"
    yield Measurement("mamba-scan", f"scratch at {length}", {OURS: grown}, "MB", note=note)


def selective_inputs(length: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return u, dt, A, B and C of one row."""
    u, dt = torch.randn(1, length, D_INNER), 0.001 + 0.1 * torch.rand(1, length, D_INNER)
    A = -torch.arange(1.0, D_STATE + 1).expand(D_INNER, -1).contiguous()
    return u, dt, A, torch.randn(1, length, D_STATE), torch.randn(1, length, D_STATE)


def selective_works(length: int) -> dict[str, Work]:
    """Return our selective scan of one row and transformers' loop, which keeps channels first."""
    from transformers.models.jamba import modeling_jamba as hf  # noqa: TID251

    u, dt, A, B, C = selective_inputs(length)
    h0 = torch.zeros(1, D_INNER, D_STATE)
    hf_u, hf_dt, hf_B, hf_C = (t.transpose(1, 2) for t in (u, dt, B, C))
    loop: Any = hf.mamba_selective_scan
    return {
        OURS: lambda: selective_scan(u, dt, A, B, C, h0)[0],
        HF: lambda: loop(hf_u, hf_dt, A, hf_B, hf_C).transpose(1, 2),
    }
