"""Prefill and decoding in bf16, as large models are loaded; many CPUs have no bf16 products."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from functools import partial

import torch
from torch import Tensor

from experiments.benchmarks.bars import HF
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.models import (
    Family,
    hf_prefill,
    hf_steps,
    jamba_mid,
    ours_prefill,
    ours_steps,
    random_tokens,
    rg_mid,
)
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved
from hooked_hybrid import HookedHybrid

STEPS, LENGTH = 16, 256
AGREE = partial(check_equal, tolerance=0.3)
"""Random Jamba's last logits in bf16 differ by 0.05 to 0.17 from those in fp32, in either code."""


def bf16(options: Options) -> Iterator[Measurement]:
    """Measure both models in bf16 against transformers."""
    tokens = random_tokens(options.size(LENGTH, 32))
    for family in (in_bf16(rg_mid()), in_bf16(jamba_mid())):
        yield _prefill(family, tokens, options)
        yield _step(family, tokens, options)


def _prefill(family: Family, tokens: Tensor, options: Options) -> Measurement:
    works: dict[str, Work] = {
        OURS: lambda: ours_prefill(family.ours, tokens)[0],
        HF: lambda: hf_prefill(family.hf, tokens)[0],
    }
    name = f"{family.name}, {tokens.shape[1]} tokens"
    seconds = interleaved(works, options.n_rounds(5), f"bf16 {name}", AGREE)
    return Measurement("bf16", name, seconds)


def _step(family: Family, tokens: Tensor, options: Options) -> Measurement:
    works: dict[str, Work] = {
        OURS: ours_steps(family.ours, tokens, STEPS),
        HF: hf_steps(family.hf, tokens, STEPS),
    }
    name = f"{family.name}, a step"
    seconds = interleaved(works, options.n_rounds(9), f"bf16 {name}", AGREE)
    return Measurement("bf16", name, {who: [s / STEPS for s in t] for who, t in seconds.items()})


def in_bf16(family: Family) -> Family:
    """Return a model with its weights rounded to bf16, in both implementations."""
    hf = deepcopy(family.hf).to(torch.bfloat16)
    return Family(family.name, HookedHybrid.from_hf(hf), hf)
