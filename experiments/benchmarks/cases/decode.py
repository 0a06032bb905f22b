"""Decoding: one token a forward, after a context longer than the window."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from experiments.benchmarks.bars import GOOGLE, HF, READ
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.floors import products, read_floor
from experiments.benchmarks.models import (
    Family,
    google_steps,
    hf_steps,
    jamba_mid,
    ours_steps,
    random_tokens,
    rg_mid,
)
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved

STEPS, ROWS, CONTEXT = 16, 11, 2048


def decode(options: Options) -> Iterator[Measurement]:
    """Measure the seconds of a step, for a row, with one row and with eleven."""
    for family in (rg_mid(), jamba_mid()):
        yield from _one_row(family, options)
        if family.google is not None:
            yield from _rows(family, options)


def _one_row(family: Family, options: Options) -> Iterator[Measurement]:
    tokens = random_tokens(options.size(CONTEXT, 64))
    works: dict[str, Work] = {
        OURS: ours_steps(family.ours, tokens, STEPS),
        HF: hf_steps(family.hf, tokens, STEPS),
    }
    if family.google is not None:
        works[GOOGLE] = google_steps(family.google, tokens, STEPS)
    floor = read_floor(products(family.ours, torch.tensor([[5]]), unembed=True))
    works[READ] = lambda: [floor() for _ in range(STEPS)]
    name = f"{family.name}, one row"
    seconds = interleaved(works, options.n_rounds(9), f"decode {name}", check_equal)
    values = {who: [s / STEPS for s in each] for who, each in seconds.items()}
    yield Measurement("decode", name, values, note=f"a step after {tokens.shape[1]} tokens")


def _rows(family: Family, options: Options) -> Iterator[Measurement]:
    tokens = random_tokens(options.size(CONTEXT, 64))
    works: dict[str, Work] = {
        OURS: ours_steps(family.ours, tokens, STEPS, ROWS),
        HF: hf_steps(family.hf, tokens, STEPS),
    }
    name = f"{family.name}, a row of {ROWS}"
    seconds = interleaved(works, options.n_rounds(9), f"decode {name}", check_equal)
    values = {
        OURS: [s / STEPS / ROWS for s in seconds[OURS]],
        HF: [s / STEPS for s in seconds[HF]],
    }
    note = f"{ROWS} rows of ours against one of transformers, which cannot fork its state"
    yield Measurement("decode", name, values, note=note)
