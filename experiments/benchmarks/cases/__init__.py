"""The benchmarks by name. Each yields its measurements one at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from experiments.benchmarks.cases.attention import attention
from experiments.benchmarks.cases.decode import decode
from experiments.benchmarks.cases.hooks import idle_hooks, run_with_cache, state_edit, top_k
from experiments.benchmarks.cases.loading import loading
from experiments.benchmarks.cases.memory import memory
from experiments.benchmarks.cases.narrow import bf16
from experiments.benchmarks.cases.prefill import jamba_prefill, rg_prefill
from experiments.benchmarks.cases.scans import mamba_scan, scan
from experiments.benchmarks.cases.sweep import niah_sweep
from experiments.benchmarks.cases.transformerlens import transformerlens
from experiments.benchmarks.figures import Measurement
from experiments.benchmarks.options import Options

Case = Callable[[Options], Iterator[Measurement]]

CASES: Mapping[str, Case] = {
    "rg-prefill": rg_prefill,
    "jamba-prefill": jamba_prefill,
    "decode": decode,
    "bf16": bf16,
    "scan": scan,
    "mamba-scan": mamba_scan,
    "attention": attention,
    "idle-hooks": idle_hooks,
    "run-with-cache": run_with_cache,
    "niah-sweep": niah_sweep,
    "loading": loading,
    "memory": memory,
    "state-edit": state_edit,
    "top-k": top_k,
    "transformerlens": transformerlens,
}
