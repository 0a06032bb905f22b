"""Prefill: a prompt read once, with the last token's logits and a state to continue from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

from torch import Tensor

from experiments.benchmarks.bars import GEMM, GOOGLE, HF, SHORT
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.floors import gemm_floor, products
from experiments.benchmarks.models import (
    Family,
    google_logits,
    google_prefill,
    hf_prefill,
    jamba_mid,
    ours_prefill,
    random_tokens,
    rg_mid,
)
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import Work, check_equal, interleaved

SHORT_RUNS = 4
ROUNDS = {512: 7, 1024: 5, 2048: 3, 4096: 3}
NOTES = {
    "RG": "recurrentgemma computes no logits here; the others those of the last token",
    "Jamba": "transformers without mamba-ssm's kernels, as on any CPU",
}


def rg_prefill(options: Options) -> Iterator[Measurement]:
    """Measure RG mid against transformers, Google's code and the products alone; then its slope."""
    yield from _prefill("rg-prefill", rg_mid(), options, options.sizes(list(ROUNDS), [64, 128]))
    yield from _slope(options)


def jamba_prefill(options: Options) -> Iterator[Measurement]:
    """Measure Jamba mid against transformers and the products alone."""
    lengths = options.sizes([512, 1024, 2048], [64, 128])
    yield from _prefill("jamba-prefill", jamba_mid(), options, lengths)


def _prefill(
    case: str, family: Family, options: Options, lengths: Sequence[int]
) -> Iterator[Measurement]:
    _check_google(family, random_tokens(lengths[0]))
    for length in lengths:
        what = f"{length} tokens"
        rounds = options.n_rounds(ROUNDS.get(length, 3))
        works = _contestants(family, random_tokens(length))
        values = interleaved(works, rounds, f"{case} {what}", check_equal)
        yield Measurement(case, what, values, length=length, note=NOTES[family.name])


def _contestants(family: Family, tokens: Tensor) -> dict[str, Work]:
    works: dict[str, Work] = {
        OURS: lambda: ours_prefill(family.ours, tokens)[0],
        HF: lambda: hf_prefill(family.hf, tokens)[0],
    }
    google = family.google
    if google is not None:
        works[GOOGLE] = lambda: google_prefill(google, tokens)
    return works | {GEMM: gemm_floor(products(family.ours, tokens))}


def _check_google(family: Family, tokens: Tensor) -> None:
    """Raise an error if Google's logits differ from ours; its timed prefill computes none."""
    if family.google is not None:
        logits = google_logits(family.google, tokens)
        check_equal({OURS: ours_prefill(family.ours, tokens)[0], GOOGLE: logits})


def _slope(options: Options) -> Iterator[Measurement]:
    """Measure whether a token costs the same in long prompts as in one of 512."""
    short = options.size(512, 64)
    model, few = rg_mid().ours, random_tokens(short)
    for length in options.sizes([8192, 16_384], [256]):
        works: dict[str, Work] = {
            OURS: partial(ours_prefill, model, random_tokens(length)),
            SHORT: lambda: [ours_prefill(model, few) for _ in range(SHORT_RUNS)],
        }
        seconds = interleaved(works, options.n_rounds(2), f"rg-prefill {length} tokens")
        values = {
            OURS: [s / length for s in seconds[OURS]],
            SHORT: [s / (SHORT_RUNS * short) for s in seconds[SHORT]],
        }
        note = "seconds a token"
        yield Measurement("rg-prefill", f"{length} tokens, each", values, length=length, note=note)
