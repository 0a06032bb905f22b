"""Cutting taps of the short convolution of a layer: the loss of induction and retrieval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor

from experiments.beside.frame import (
    Bench,
    Experiment,
    Finding,
    both,
    harms,
    leaves_half,
    spares,
)
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.settings.papers import WHOLE
from hooked_hybrid.runs.intervals import SHARE, mean_interval


def cut_taps(model: HookedHybrid, layer: int, lags: Sequence[int]) -> list[HookSpec]:
    """Remove some inputs from a layer's short convolution, at every position.

    The hooks follow a sequence from its first position through pieces and steps, a row at a time;
    the state does not change. Inputs must have no padding.

    Args:
        model: whose taps are taken.
        layer: with a recurrence.
        lags: distances of the inputs in positions; 0 is the current one.

    Raises:
        ValueError: a lag that the convolution does not have; a run that continues from a state made
            without these hooks.
    """
    taps = model.blocks[layer].recurrence.conv.weight.detach()  # [d_conv channel], last is current
    n_past = len(taps) - 1
    if not lags or not set(lags) <= set(range(n_past + 1)):
        raise ValueError(f"lags {list(lags)}: layer {layer} reads 0 to {n_past} positions back")
    past: dict[int, Tensor] = {}
    seen: list[Tensor] = []

    def read(u: Tensor, hook: HookPoint) -> None:
        rows, first = hook.run.rows.tolist(), hook.run.query_pos[:, 0].tolist()
        if lost := [row for row, pos in zip(rows, first, strict=True) if pos and row not in past]:
            raise ValueError(f"rows {lost} continue from a state that was made without these hooks")
        zeros = u.new_zeros(n_past, u.shape[2])
        before = [past[r] if pos else zeros for r, pos in zip(rows, first, strict=True)]
        seen[:] = [torch.cat([torch.stack(before), u], dim=1)]
        past.update(zip(rows, seen[0][:, -n_past:], strict=True))

    def subtract(y: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        (inputs,) = seen
        for lag in lags:
            start = n_past - lag
            y = y - inputs[:, start : start + y.shape[1]] * taps[start]
        return y

    name = f"blocks.{layer}.mixer.hook_"
    return [(f"{name}in_proj", read), (f"{name}conv", subtract)]


@torch.no_grad()
def induction(
    model: HookedHybrid, hooks: Sequence[HookSpec], n: int = 50, batch: int = 32
) -> Tensor:
    """Return where the second copy of `n` random tokens is predicted correctly: [batch n - 1].

    The tokens of a copy are distinct, and differ between rows.
    """
    rng = torch.Generator().manual_seed(0)
    bos_id = model.cfg.bos_token_id or 0
    first = 1 + max(bos_id, model.cfg.pad_token_id or 0)
    copy = torch.stack([torch.randperm(model.cfg.d_vocab - first, generator=rng)[:n] + first
                        for _ in range(batch)])  # fmt: skip
    bos = torch.full((batch, 1), bos_id)
    tokens = torch.cat([bos, copy, copy], dim=1)
    guess = model.run_with_hooks(tokens, fwd_hooks=list(hooks)).argmax(-1)
    return (guess[:, n + 1 : -1] == tokens[:, n + 2 :]).float()


def shares(model: HookedHybrid, cuts: Mapping[str, Sequence[HookSpec]]) -> pd.DataFrame:
    """Return the share of `induction` under each cut, with its 95% interval over sequences."""
    rows = []
    for name, hooks in cuts.items():
        right = induction(model, hooks)
        of = [i for i, row in enumerate(right) for _ in row]
        low, high = mean_interval(right.flatten().tolist(), of, SHARE)
        rows.append((name, float(right.mean()), low, high))
    return pd.DataFrame(rows, columns=["setting", "induction", "induction_low", "induction_high"])


def run(bench: Bench) -> Finding:
    """Cut every past tap of every layer, together and one by one."""
    model = bench.model
    cuts: dict[str, list[HookSpec]] = {"whole": []}
    for layer in model.cfg.recurrent_layers:
        back = range(1, model.blocks[layer].recurrence.conv.weight.shape[0])
        for name, lags in {
            "all past taps": [*back],
            **{f"tap {i} back": [i] for i in back},
        }.items():
            cuts[f"layer {layer}, {name}"] = cut_taps(model, layer, lags)
    settings = [WHOLE, *(both(name, hooks) for name, hooks in cuts.items() if hooks)]
    table = bench.measure(settings)
    table = table.merge(shares(model, cuts), on="setting")
    base, cut = table.iloc[0], table.iloc[1:]
    names = {"induction": "accuracy", "induction_low": "low", "induction_high": "high"}
    measured = cut[["setting", *names]].rename(columns=names)
    falls = harms(measured, base["induction"])
    is_single = ~cut["setting"].str.contains("all past")
    harmful, single = cut[falls], cut[falls & is_single]
    layers = sorted({name.split(",")[0] for name in harmful["setting"]})
    ours = (
        f"induction is {100 * base['induction']:.0f}%; it falls below half by a cut in "
        f"{', '.join(layers) or 'no layer'} ("
        + "; ".join(
            f"{row['setting']}: induction {100 * row['induction']:.0f}% "
            f"[{100 * row['induction_low']:.0f}, {100 * row['induction_high']:.0f}], retrieval "
            f"{100 * row['accuracy']:.1f}%, text {row['more']:+.2f} nats"
            for _, row in harmful.iterrows()
        )
        + f"); single taps that do: {', '.join(single['setting']) or 'none'}"
    )
    at_one = len(layers) == 1 and list(single["setting"]) == [f"{layers[0]}, tap 1 back"]
    # Every other tap and layer must leave half, with its whole interval.
    others = measured[~falls & (is_single | ~cut["setting"].str.startswith(tuple(layers)))]
    if at_one and leaves_half(others, base["induction"]).all():
        return Finding("shows it", ours, table)
    none = spares(measured, base["induction"]).all()
    return Finding("does not show it" if none else "cannot say", ours, table)


EXPERIMENT = Experiment(
    "Mamba does induction by its short convolution, not by the state (2505.15105); in Mamba's "
    "circuit for indirect objects the convolution of one layer, 39, shifts names one position on "
    "(2407.14008)",
    "arXiv 2505.15105 and 2407.14008",
    run,
    "induction",
    "induction (share of a second copy predicted)",
)
