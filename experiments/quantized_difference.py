"""The effect of quantized weights on size, logits, losses, retrieval and time.

    python -m experiments.quantized_difference results/quantized

The packaged models on needle prompts, and random models of width 1024 on random tokens: these are
wide enough for the rows and blocks of large models, but have none of the outliers of trained
weights. Existing tables are not made again.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments import quantized_kept
from experiments.window_relay import kept
from hooked_hybrid import HookedHybrid
from hooked_hybrid.accounting.configs import PUBLISHED
from hooked_hybrid.network.weights.plain import stored_bytes
from hooked_hybrid.network.weights.quantization import Only
from hooked_hybrid.network.weights.quantized import quantizable, quantize_weights
from hooked_hybrid.niah.needles import Needle, known_needles
from hooked_hybrid.niah.prompts import grid
from hooked_hybrid.niah.sweep import niah
from hooked_hybrid.outputs.folders import replacing
from hooked_hybrid.presets import configs as presets
from hooked_hybrid.runs.intervals import GAP, SHARE, mean_interval

PACKAGED = ("tiny-griffin", "tiny-jamba")
WIDE = {
    "random griffin 1024": presets.griffin("RRA", d_model=1024, d_vocab=4096),
    "random jamba 1024": presets.jamba("MMA", d_model=1024, d_vocab=4096),
}
TEXTS, TEXT_LENGTH = 30, 240
WIDE_TEXTS, WIDE_LENGTH = 4, 64
LENGTHS, DEPTHS = (160, 400), (0.33, 0.67)
PROMPT, STEPS, ROUNDS = 64, 6, 3
ENDS = {"kl": None, "loss": None, "top1": SHARE}
"""Bounds of the figures that are compared by text and have some."""

KINDS: dict[str, Callable[[str], bool]] = {
    "attention": lambda name: ".attn." in name,
    "recurrence": lambda name: ".mixer." in name,
    "dense MLP": lambda name: ".mlp." in name and name.endswith(".weight"),
    "experts": lambda name: ".mlp." in name and not name.endswith(".weight"),
}
"""Predicates on weight names, by kind of layer."""


class Variant(NamedTuple):
    """A dtype of activations and plain weights, and the quantization of the large weights."""

    dtype: torch.dtype
    scheme: str | None = None

    @property
    def name(self) -> str:
        """Such as "bf16" or "int8 in fp32"."""
        dtype = {torch.float32: "fp32", torch.bfloat16: "bf16"}[self.dtype]
        return dtype if self.scheme is None else f"{self.scheme} in {dtype}"


FP32, BF16 = Variant(torch.float32), Variant(torch.bfloat16)
VARIANTS = (FP32, BF16, *(Variant(v.dtype, s) for s in ("int8", "nf4") for v in (FP32, BF16)))


def made(model: str, variant: Variant, only: Only | None = None) -> HookedHybrid:
    """Return a packaged model, or a random one of seed 0, in this variant."""
    if model in PACKAGED:
        found = HookedHybrid.from_pretrained(model, dtype=variant.dtype)
    else:
        torch.manual_seed(0)
        found = HookedHybrid(WIDE[model]).to(variant.dtype)
    if variant.scheme is not None:
        quantize_weights(found, variant.scheme, only)
    return found


def texts(model: HookedHybrid, name: str) -> Tensor:
    """Return tokens [text pos]: needle prompts for a packaged model, else random ones."""
    if name in PACKAGED:
        prompts = grid(model, needles(TEXTS), [TEXT_LENGTH], [0.5])
        return torch.tensor([prompt.tokens for prompt in prompts])
    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, model.cfg.d_vocab, (WIDE_TEXTS, WIDE_LENGTH), generator=generator)


def needles(n: int) -> list[Needle]:
    """Return the paper's needle and held-out ones."""
    return list(known_needles().values())[:n]


def log_probabilities(model: HookedHybrid, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Return fp32 logits and log-probabilities [text pos d_vocab]."""
    with torch.no_grad():
        logits = model(tokens).float()
    return logits, logits.log_softmax(-1)


def compared(
    ours: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor], tokens: Tensor
) -> dict[str, float]:
    """Return the differences between a model's outputs and a reference's, means over positions.

    `logit` is the root mean square difference of logits over the root mean square of the
    reference's, each less its mean over the vocabulary; `kl` (nats/token) the divergence from the
    reference; `loss` (nats/token) the increase in loss; `top1` the
    share of positions with the same likeliest token. `kl`, `loss` and `top1` have 95% intervals
    over texts.
    """
    (a, p), (b, q) = ours, theirs
    by_text: dict[str, Float[Tensor, " text"]] = {
        "kl": (q.exp() * (q - p)).sum(-1).mean(1),
        "loss": _losses(p, tokens) - _losses(q, tokens),
        "top1": (a.argmax(-1) == b.argmax(-1)).float().mean(1),
    }
    a, b = a - a.mean(-1, keepdim=True), b - b.mean(-1, keepdim=True)
    found = {"logit": float(((a - b).square().mean() / b.square().mean()).sqrt())}
    for name, values in by_text.items():
        low, high = mean_interval(values.tolist(), range(len(values)), ENDS[name])
        found |= {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}
    return found


def _losses(log_p: Tensor, tokens: Tensor) -> Float[Tensor, " text"]:
    return -log_p[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0].mean(1)


def differences(name: str) -> pd.DataFrame:
    """Return a row for each variant and reference (fp32, bf16)."""
    outputs = {}
    for variant in VARIANTS:
        model = made(name, variant)
        tokens = texts(model, name)
        outputs[variant] = log_probabilities(model, tokens)
    return pd.DataFrame(
        {"model": name, "variant": v.name, "against": r.name}
        | compared(outputs[v], outputs[r], tokens)
        for r in (FP32, BF16)
        for v in VARIANTS
        if v != r and not (r == BF16 and v == FP32)
    )


def by_kind(name: str) -> pd.DataFrame:
    """Return a row for each kind of layer and scheme, with only that kind quantized, in fp32.

    `error` is the mean of |Q - W| / |W| over its weights.
    """
    plain = made(name, FP32)
    tokens = texts(plain, name)
    reference = log_probabilities(plain, tokens)
    rows = []
    for kind, is_one in KINDS.items():
        if not any(map(is_one, quantizable(plain.cfg))):
            continue
        for scheme in ("int8", "nf4"):
            model = made(name, Variant(torch.float32, scheme), is_one)
            assert model.quantization is not None
            row: dict[str, Any] = {"model": name, "kind": kind, "scheme": scheme}
            row |= {"weights": len(model.quantization.weights)}
            row |= {"error": statistics.mean(w.error for w in model.quantization.weights)}
            rows.append(row | compared(log_probabilities(model, tokens), reference, tokens))
    return pd.DataFrame(rows)


def retrieval(name: str, n_needles: int) -> pd.DataFrame:
    """Return a row for each variant: retrieval accuracy, and its difference to fp32 cell by cell.

    Intervals (95%) are over needles.
    """
    tables = {}
    for variant in VARIANTS:
        model = made(name, variant)
        prompts = grid(model, needles(n_needles), LENGTHS, DEPTHS)
        cells = niah(model, prompts, {"whole": []}, verbose=False).set_index("prompt_id")
        tables[variant.name] = cells
    plain = tables[FP32.name]
    rows = []
    for name_of, cells in tables.items():
        accuracy, clusters = cells["accuracy"], cells["needle_id"]
        difference = accuracy - plain["accuracy"].loc[cells.index]
        low, high = mean_interval(accuracy, clusters, SHARE)
        less, more = mean_interval(difference, clusters, GAP)
        same = (cells["output"] == plain["output"].loc[cells.index]).mean()
        row = {"model": name, "variant": name_of, "n": len(cells), "accuracy": accuracy.mean()}
        row |= {"low": low, "high": high, "difference": difference.mean()}
        rows.append(row | {"d_low": less, "d_high": more, "same_output": same})
    return pd.DataFrame(rows)


def times(name: str) -> pd.DataFrame:
    """Return seconds of processor time of a prefill and of a step, and their ratio to bf16.

    Variants are interleaved, so that a change of the machine's speed affects all of them; the
    figures are medians, the ratios medians of those within a round.
    """
    models = {v.name: made(name, v) for v in VARIANTS}
    prompt = texts(models[FP32.name], name)[:1, :PROMPT]
    for model in models.values():
        prefill_and_steps(model, prompt)
    rounds = [
        {v: prefill_and_steps(model, prompt) for v, model in models.items()} for _ in range(ROUNDS)
    ]
    rows = []
    for v in models:
        row: dict[str, Any] = {"model": name, "variant": v}
        for i, what in enumerate(("prefill", "step")):
            row[f"{what}_s"] = statistics.median(r[v][i] for r in rounds)
            for other in (FP32.name, BF16.name):
                ratios = [r[v][i] / r[other][i] for r in rounds]
                row[f"{what}/{other}"] = statistics.median(ratios)
        rows.append(row)
    return pd.DataFrame(rows)


def prefill_and_steps(model: HookedHybrid, prompt: Tensor) -> tuple[float, float]:
    """Return the processor time (s) of a prefill, and the median of some steps after it."""
    steps = []
    with torch.no_grad():
        start = time.process_time()
        _, state = model(prompt, logits_to_keep=1, return_state=True, stage="prefill")
        prefill = time.process_time() - start
        for _ in range(STEPS):
            start = time.process_time()
            _, state = model(prompt[:, -1:], state=state, return_state=True, stage="generation")
            steps.append(time.process_time() - start)
    return prefill, statistics.median(steps)


def sizes() -> pd.DataFrame:
    """Return the bytes of the published models' weights, made without memory."""
    rows = []
    for name, cfg in PUBLISHED.items():
        for scheme in (None, "int8", "nf4"):
            model = HookedHybrid.meta(cfg, dtype=torch.bfloat16)
            variant = Variant(torch.bfloat16, scheme)
            if scheme is not None:
                quantize_weights(model, scheme)
            n = sum(p.numel() for p in model.parameters())
            n_bytes = stored_bytes(model.parameters())
            row = {"model": name, "variant": variant.name, "parameters": n, "bytes": n_bytes}
            rows.append(row | {"bits_a_parameter": 8 * n_bytes / n})
    return pd.DataFrame(rows)


def tables(out: Path, n_needles: int) -> Iterator[tuple[str, pd.DataFrame]]:
    """Yield each table by name, made or read."""
    make: dict[str, Callable[[], pd.DataFrame]] = {"sizes": sizes}
    for name in WIDE:
        make[f"times-{name}"] = partial(times, name)
    for name in PACKAGED:
        make[f"retrieval-{name}"] = partial(retrieval, name, n_needles)
    for name in (*PACKAGED, *WIDE):
        make[f"differences-{name}"] = partial(differences, name)
        make[f"by-kind-{name}"] = partial(by_kind, name)
    for name, table in make.items():
        yield name, kept(out / f"{name.replace(' ', '-')}.csv", table)


def main() -> None:
    """Make every missing table, and write all of them in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--needles", type=int, default=31, help="of the retrieval tables")
    args = parser.parse_args()
    if not 2 <= args.needles <= len(known_needles()):
        parser.error(f"--needles {args.needles}: give 2 to {len(known_needles())}")
    torch.set_num_threads(1)
    args.out.mkdir(parents=True, exist_ok=True)
    pages: list[str] = []
    found: dict[str, pd.DataFrame] = {}
    for name, table in tables(args.out, args.needles):
        found[name] = table
        pages.append(f"## {name}\n\n{markdown(table)}")
        print(pages[-1], flush=True)
    (args.out / "pages").mkdir(exist_ok=True)
    parts = ([t for n, t in found.items() if n.startswith(w)] for w in ("retrieval", "times"))
    with replacing(args.out / "pages" / "table.csv") as temporary:
        quantized_kept.settings(*parts).to_csv(temporary, index=False)
    with replacing(args.out / "tables.md") as temporary:
        temporary.write_text("\n\n".join(pages) + "\n", encoding="utf-8")


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown, numbers with three digits."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        cells = (f"{x:.3g}" if isinstance(x, float) else str(x) for x in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
