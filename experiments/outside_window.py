"""How a needle outside the attention window is retrieved: tables and figures of one page.

    python -m experiments.outside_window results/outside_window [--images docs/images]

Three experiments on tiny-griffin, loaded without a window, which hooks then impose: the window on
and off by stage and by layer; layers that restart at a boundary between needle and question; and
activation patching by depth and place, between two prompts that differ only in the needle. Then
those of `experiments.window_relay`, on models trained to recall from beyond their window. A stopped
run continues where it was.
"""

from __future__ import annotations

import argparse
import random
import shutil
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from experiments import window_figures, window_kept, window_relay
from hooked_hybrid import HookedHybrid
from hooked_hybrid.analysis import generic_activation_patch
from hooked_hybrid.hooks.attaching import HookSpec
from hooked_hybrid.interventions import knock_out_crossings, limit_window
from hooked_hybrid.niah.needles import Needle, draw_needle, find_needle, known_needles
from hooked_hybrid.niah.prompts import Prompt, build_prompt, grid
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.niah.sweep import niah
from hooked_hybrid.outputs.figures import save_figure
from hooked_hybrid.outputs.whole_files import replacing
from hooked_hybrid.runs.statistics import interval_of

WINDOW = 256
"""Keys that a query of tiny-griffin sees, itself included."""
QUESTION = 27
"""Tokens of the template from the question on."""
LENGTHS, DEPTHS = (320, 512, 1024), (0.0, 0.67)
BOUNDARY_DEPTHS = (0.33, 0.67)
TRACE_LENGTH, TRACE_DEPTH = 416, 0.0
MOST_TRACED = 10
"""Most needles of the longer experiments."""


def window_settings() -> list[Setting]:
    """Return settings: window on and off by stage, and on in a single attention layer."""
    on, off = tuple(limit_window(WINDOW)), ()
    stages = {"on": on, "off": off}
    settings = [
        Setting(f"prefill {p}, generation {g}", stages[p], stages[g], {"prefill": p, "gen": g})
        for p in stages
        for g in stages
    ]
    for layer in (2, 5):
        hooks = tuple(limit_window(WINDOW, layers=layer))
        settings.append(Setting(f"on in layer {layer} alone", hooks, hooks, {"layer": layer}))
    return settings


def boundary_settings(model: HookedHybrid) -> list[Setting]:
    """Return settings: sets of layers restart between needle and question, or before the needle.

    The latter is the control: the same damage at a place that the needle does not have to pass.
    """
    cfg = model.cfg
    sets: dict[str, Sequence[int]] = {f"layer {i}": [i] for i in range(cfg.n_layers)}
    sets |= {"all attention": cfg.attention_layers, "all recurrences": cfg.recurrent_layers}
    sets |= {"all but layer 2": [i for i in range(cfg.n_layers) if i != 2]}

    def hooks(where: str, layers: Sequence[int]) -> Callable[[Prompt], list[HookSpec]]:
        def made(prompt: Prompt) -> list[HookSpec]:
            start, stop = prompt.needle_spans[0]
            between = (stop + prompt.length - QUESTION) // 2
            boundary = between if where == "between" else start
            return knock_out_crossings(cfg, boundary, layers=layers)

        return made

    settings = [Setting("nothing", spec={"cut": "nothing"})]
    for where in ("between", "before"):
        for name, layers in sets.items():
            made = hooks(where, layers)
            settings.append(Setting(f"{name}, {where}", made, made, {"cut": name, "at": where}))
    return settings


def swept(
    model: HookedHybrid, prompts: Sequence[Prompt], settings: Sequence[Setting], out: Path
) -> pd.DataFrame:
    """Return a sweep's cells, with whether the needle is beyond the window of the last token."""
    cells = niah(model, prompts, settings, out=out, resume=out.exists())
    return cells.assign(beyond=cells["needle_start"] < cells["length"] - WINDOW)


def by_setting(cells: pd.DataFrame, by: Sequence[str] = ("setting", "beyond")) -> pd.DataFrame:
    """Return accuracy (fraction) by setting and place, with 95% intervals over needles.

    Columns: those of `by`, then `accuracy`, `low`, `high`, and `n` prompts.
    """
    rows = []
    for names, own in cells.groupby(list(by), sort=False):
        low, high = interval_of(own)
        figures = {"accuracy": own["accuracy"].mean(), "low": low, "high": high, "n": len(own)}
        rows.append({**dict(zip(by, names, strict=True)), **figures})
    return pd.DataFrame(rows)


def pairs(model: HookedHybrid, needles: Sequence[Needle]) -> tuple[Tensor, Tensor, Tensor]:
    """Return prompts [pair pos] up to where the answers to two needles of one city differ.

    Returns:
        Those with the one needle, those with the other, and the next words of their answers [pair
        2].
    """
    clean, corrupted, words = [], [], []
    for i, needle in enumerate(needles):
        rng, other = random.Random(i), needle
        while other.phrases[0].split()[0] == needle.phrases[0].split()[0]:
            other = draw_needle(rng, needle.city)
        one, two = (build_prompt(model, n, TRACE_LENGTH, TRACE_DEPTH) for n in (needle, other))
        start = one.needle_spans[0][0]
        parts = next(
            t for t, (a, b) in enumerate(zip(one.tokens, two.tokens, strict=True)) if a != b
        )
        frame = one.tokens[start:parts]
        clean.append((*one.tokens, *frame))
        corrupted.append((*two.tokens, *frame))
        words.append((one.tokens[parts], two.tokens[parts]))
    return torch.tensor(clean), torch.tensor(corrupted), torch.tensor(words)


def places(prompt: Prompt, n_pos: int) -> dict[str, range]:
    """Return the ranges of the parts of a prompt and the beginning of its answer, by name."""
    start, stop = prompt.needle_spans[0]
    edge, ask = n_pos - WINDOW, prompt.length - QUESTION
    return {
        "needle": range(start, stop),
        "3 after it": range(stop, stop + 3),
        "up to the window": range(stop + 3, edge),
        "in the window": range(edge, ask),
        "question": range(ask, prompt.length),
        "answer so far": range(prompt.length, n_pos - 1),
        "last token": range(n_pos - 1, n_pos),
    }


def stream_names(model: HookedHybrid) -> list[str]:
    """Return the residual stream before each layer and after the last."""
    last = model.cfg.n_layers - 1
    return [
        *(f"blocks.{i}.hook_resid_pre" for i in range(last + 1)),
        f"blocks.{last}.hook_resid_post",
    ]


@torch.no_grad()
def patched(
    model: HookedHybrid, needles: Sequence[Needle], hooks: Sequence[HookSpec]
) -> pd.DataFrame:
    """Return the effect of patching by depth, place and pair of prompts.

    `logits` is the change, by the clean stream at the place, of the difference of the two words'
    logits in the corrupted run; `total` is the change between the runs; both under `hooks`.
    """
    clean, corrupted, words = pairs(model, needles)
    parts = places(build_prompt(model, needles[0], TRACE_LENGTH, TRACE_DEPTH), clean.shape[1])
    names = stream_names(model)

    def metric(logits: Float[Tensor, "batch pos d_vocab"]) -> Float[Tensor, " batch"]:
        of_words = logits[:, -1].gather(1, words)
        return of_words[:, 0] - of_words[:, 1]

    found: list[dict[str, Any]] = []
    with model.hooks(list(hooks)):
        logits, cache = model.run_with_cache(clean, names_filter=names)
        total = (metric(logits) - metric(model(corrupted))).tolist()
        for place, at in parts.items():
            cells = generic_activation_patch(
                model, corrupted, cache, metric, names, positions=at, verbose=False
            )
            for depth, values in enumerate(cells.values.tolist()):
                row = {"place": place, "depth": depth}
                found += [
                    {**row, "pair": i, "logits": x, "total": total[i]} for i, x in enumerate(values)
                ]
    return pd.DataFrame(found)


@torch.no_grad()
def differences(
    model: HookedHybrid, needles: Sequence[Needle], hooks: Sequence[HookSpec]
) -> pd.DataFrame:
    """Return the difference of the streams of a pair's two prompts, by depth and position.

    `difference` is their distance over the norm of the clean one, a mean over pairs.
    """
    names = stream_names(model)
    with model.hooks(list(hooks)):
        clean, corrupted = (
            model.run_with_cache(tokens, names_filter=names)[1]
            for tokens in pairs(model, needles)[:2]
        )
    found: list[dict[str, Any]] = []
    for depth, name in enumerate(names):
        gap = (clean[name] - corrupted[name]).norm(dim=-1) / clean[name].norm(dim=-1)
        for pos, x in enumerate(gap.mean(0).tolist()):
            found.append({"depth": depth, "pos": pos, "difference": x})
    return pd.DataFrame(found)


def griffin(out: Path, n_needles: int) -> dict[str, pd.DataFrame]:
    """Return the tables of the three experiments on tiny-griffin; existing ones are read.

    Returns:
        "windows" and "boundaries", cells of sweeps; "patched" and "differences", those of these
        functions with the window on and off.
    """
    model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None).requires_grad_(False)
    needles = [find_needle(name) for name in list(known_needles())[:n_needles]]
    some = needles[:MOST_TRACED]
    tables = {
        "windows": swept(
            model, grid(model, needles, LENGTHS, DEPTHS), window_settings(), out / "windows"
        ),
        "boundaries": swept(
            model,
            grid(model, some, [TRACE_LENGTH], BOUNDARY_DEPTHS),
            boundary_settings(model),
            out / "boundaries",
        ),
    }
    for make in (patched, differences):
        table = partial(_both_windows, make, model, some)
        tables[make.__name__] = window_relay.kept(out / f"{make.__name__}.csv", table)
    return tables


def _both_windows(
    make: Callable[..., pd.DataFrame], model: HookedHybrid, needles: Sequence[Needle]
) -> pd.DataFrame:
    """Return the tables made with the window on and off, as one."""
    windows = {"on": limit_window(WINDOW), "off": []}
    return pd.concat(make(model, needles, hooks).assign(window=w) for w, hooks in windows.items())


def unseen(n_needles: int) -> int:
    """Return the first position of the longer experiments whose window contains no needle."""
    model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None)
    some = list(known_needles().values())[: min(n_needles, MOST_TRACED)]
    prompts = grid(model, some, [TRACE_LENGTH], [TRACE_DEPTH])
    return max(prompt.needle_spans[0][1] for prompt in prompts) - 1 + WINDOW


def main() -> None:
    """Run what is missing, write figures and tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--images", type=Path, help="another folder for the figures (PNG)")
    parser.add_argument("--needles", type=int, default=31, help="of tiny-griffin's prompts")
    parser.add_argument("--pattern", default="RRARRA", help="layers of the models that are trained")
    args = parser.parse_args()
    if not 2 <= args.needles <= len(known_needles()):
        parser.error(f"--needles {args.needles}: give 2 to {len(known_needles())}")
    torch.set_num_threads(1)
    tables = griffin(args.out, args.needles)
    window_kept.write(args.out, tables, unseen(args.needles))
    scores, traces = window_relay.run(args.pattern, args.out / "relay")
    for name, figure in {
        "griffin": window_figures.settings(tables["windows"], tables["boundaries"]),
        "trace": window_figures.trace(tables["patched"], tables["differences"]),
        "relay": window_figures.relay(scores),
        "relay_trace": window_figures.relay_trace(traces),
    }.items():
        png, _ = save_figure(figure, args.out / f"outside_window_{name}")
        if args.images:
            with replacing(args.images / png.name) as temporary:
                shutil.copyfile(png, temporary)
    windows = tables["windows"].assign(distance=lambda t: t["length"] - t["needle_start"])
    found = [by_setting(windows), by_setting(windows, ("setting", "length", "distance"))]
    found += [by_setting(tables["boundaries"]), window_relay.by_cut(scores)]
    page = [markdown(table) for table in found]
    with replacing(args.out / "tables.md") as temporary:
        temporary.write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print("\n\n".join(page))


def markdown(table: pd.DataFrame) -> str:
    """Return a table in Markdown, fractions in percent."""
    lines = ["| " + " | ".join(map(str, table.columns)) + " |", "|---" * len(table.columns) + "|"]
    for row in table.itertuples(index=False):
        cells = (f"{100 * x:.1f}" if isinstance(x, float) else str(x) for x in row)
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
