"""`hooked-hybrid niah`: the whole experiment, from a model's name to pictures."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hooked_hybrid.cli import command_line, explained, folder
from hooked_hybrid.config import AttentionConfig, HybridConfig
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.niah.needles import PAPER, AnyNeedle, held_out_needles, load_needles
from hooked_hybrid.niah.plots import replacing
from hooked_hybrid.niah.prompts import (
    Haystack,
    default_depths,
    default_lengths,
    grid,
    shortest_length,
)
from hooked_hybrid.niah.ray_options import GpusPerWorker, Ray, Workers, located, workers_of
from hooked_hybrid.niah.report import Written, summary_rows, write_report
from hooked_hybrid.niah.sweep import niah as run_sweep
from hooked_hybrid.niah.sweep import top_k_settings
from hooked_hybrid.results_folder import claimed

if TYPE_CHECKING:
    import pandas as pd

    from hooked_hybrid.niah.ray_workers import RayWorkers

LONGEST = 4096
"""Tokens of the papers' longest prompt: no default is longer."""
SMALL = 20_000_000
"""Parameters below which one core is faster than several: they would wait for one another."""
ROOM = 32
"""Tokens of haystack in the shortest prompt, where template and needle take more than usual."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Stage(StrEnum):
    """Where heads are silenced."""

    generation = "generation"
    both = "both"


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, **settings)


Model = Annotated[
    str, _option("Packaged model, folder or hub id: --model google/recurrentgemma-2b.")
]
Ks = Annotated[
    list[int] | None,
    _option("Heads kept per attention layer: --k 0 --k 2.", "--k", show_default="each from 0 up"),
]
Stages = Annotated[
    list[Stage] | None,
    _option(
        "Where heads are silenced: --stages both adds prefill.",
        show_default="generation, then both",
    ),
]
Score = Annotated[Literal["entropy", "l2"], _option("How peaked a head is: --score l2.")]
Lengths = Annotated[
    list[int] | None,
    _option(
        "Tokens of a prompt: --lengths 256 --lengths 512.",
        show_default="ten, up to twice the window",
    ),
]
Depths = Annotated[
    list[float] | None,
    _option(
        "Share of the haystack before the needle: --depths 0 --depths 0.5.",
        show_default="ten, from 0 to 1",
    ),
]
HaystackPath = Annotated[
    Path | None,
    _option("Text file, or folder of .txt: --haystack essays/.", show_default="generated text"),
]
Needles = Annotated[
    list[str] | None,
    _option(
        "paper, held-out, none (the paper's question, its needle left out), or a JSON list of "
        "{sentence, question, keywords}: --needle mine.json.",
        show_default="paper",
    ),
]
NNeedles = Annotated[
    int | None,
    _option("Use the first so many of these needles: --n-needles 10.", min=1, show_default="all"),
]
Template = Annotated[
    Literal["base", "instruct", "chat"], _option("Form of the prompt: --template instruct.")
]
ReadTwice = Annotated[
    bool, _option("Give context and question twice: --read-twice.", "--read-twice")
]
Distractors = Annotated[
    int, _option("Sentences about other cities in each prompt: --distractors 3.", min=0)
]
FirstToken = Annotated[
    Literal["prefill", "generation"],
    _option("Stage that chooses the first new token: --first-token generation, as Google's code."),
]
MaxNewTokens = Annotated[int, _option("Length of an answer: --max-new-tokens 60.", min=1)]
Device = Annotated[str, _option("Where the model runs: --device cuda.")]
Dtype = Annotated[
    Literal["float32", "bfloat16", "float16"], _option("Of the weights: --dtype bfloat16.")
]
Out = Annotated[
    Path, _option("Folder of the results, new or empty: --out results/mine.", parser=folder)
]
Resume = Annotated[
    bool, _option("Go on with what --out holds: --out results/mine --resume.", "--resume")
]
ThesisDepth = Annotated[
    bool, _option("Count depth from the end, as the thesis: --thesis-depth.", "--thesis-depth")
]
Seed = Annotated[int, _option("Of the generated haystack and the distractors: --seed 1.")]
Threads = Annotated[
    int | None,
    _option("Processor cores: --threads 2.", min=1, show_default="1 for a small model, else all"),
]


def niah(
    model: Model = "tiny-griffin",
    k: Ks = None,
    stages: Stages = None,
    score: Score = "entropy",
    lengths: Lengths = None,
    depths: Depths = None,
    haystack: HaystackPath = None,
    needle: Needles = None,
    n_needles: NNeedles = None,
    template: Template = "base",
    read_twice: ReadTwice = False,
    distractors: Distractors = 0,
    first_token: FirstToken = "prefill",
    max_new_tokens: MaxNewTokens = 40,
    device: Device = "cpu",
    dtype: Dtype = "float32",
    out: Out = Path("results/niah"),
    resume: Resume = False,
    thesis_depth: ThesisDepth = False,
    seed: Seed = 0,
    threads: Threads = None,
    ray: Ray = None,
    workers: Workers = None,
    gpus_per_worker: GpusPerWorker = 0.0,
) -> None:
    """Needle in a haystack, with all but the k most peaked attention heads silenced.

    Writes a table, retrieval maps, accuracy by k, and a report beside the papers' numbers. It may
    be stopped at any time; the same command with --resume goes on.

    Example: hooked-hybrid niah --model tiny-jamba --k 0 --k 2 --stages generation --out results/j
    """
    with (
        explained(kept=str(out)),
        claimed(out, resume),
        pool(ray, workers, gpus_per_worker, threads, model, device, dtype) as on,
    ):
        hybrid = loaded(model, device, dtype)
        torch.set_num_threads(threads or default_threads(hybrid))
        wanted = [stage.value for stage in dict.fromkeys(stages or Stage)]
        settings = top_k_settings(heads_to_keep(k, hybrid.cfg), wanted, score)
        needles = needles_of(needle or ["paper"])[:n_needles]
        hay = Haystack(seed, () if haystack is None else Haystack.read(haystack).documents)
        form = (template, read_twice, distractors)
        lengths = lengths or lengths_for(hybrid, needles, *form, seed)
        prompts = grid(hybrid, needles, lengths, depths or default_depths(), hay, *form)
        table = run_sweep(
            hybrid,
            prompts,
            settings,
            out=out,
            resume=resume,
            max_new_tokens=max_new_tokens,
            first_token_stage=first_token,
            workers=on,
        )
        if not table["accuracy"].notna().any():
            _show_outputs(table, out)
            return
        with Console(stderr=True).status("drawing"):
            card = model_card(hybrid, model)
            written = write_report(
                table, settings, card, out, command=command_line(), thesis_depth=thesis_depth
            )
        show(table, written)


def longest_prompt(cfg: HybridConfig) -> int:
    """Return the longest prompt of a default sweep.

    As in the papers, twice the window, or what a model without a window was made for; no more than
    they ran.
    """
    windows = [m.n_keys for m in _attention(cfg) if m.n_keys is not None]
    own = 2 * min(windows) if windows else cfg.n_ctx
    return LONGEST if own is None else min(own, LONGEST)


def model_card(model: HookedHybrid, name: str) -> dict[str, str]:
    """Return facts about a model, for people."""
    attention = _attention(model.cfg)
    heads = sorted({mixer.n_heads for mixer in attention})
    windows = sorted({str(mixer.n_keys or "all") for mixer in attention})
    kinds = (type(layer.mixer).__name__.removesuffix("Config") for layer in model.cfg.layers)
    return {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers": " ".join(kinds),
        "heads in an attention layer": ", ".join(map(str, heads)) or "no attention layer",
        "keys a query sees": ", ".join(windows) or "none",
        "dtype, device": f"{str(model.dtype).removeprefix('torch.')}, {model.device}",
    }


def _attention(cfg: HybridConfig) -> list[AttentionConfig]:
    mixers = (layer.mixer for layer in cfg.layers)
    return [mixer for mixer in mixers if isinstance(mixer, AttentionConfig)]


def loaded(name: str, device: str, dtype: str) -> HookedHybrid:
    """Return the model, after a look at whether the device is there."""
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"--device {device} cannot be used here: {reason}") from None
    return HookedHybrid.from_pretrained(name, dtype=DTYPES[dtype], device=device)


def pool(
    ray: str | None,
    workers: int | None,
    gpus_per_worker: int | float,
    threads: int | None,
    model: str,
    device: str,
    dtype: str,
) -> AbstractContextManager[RayWorkers | None]:
    """Return the workers that a command's options ask for; see `ray_options.workers_of`."""
    load = partial(loaded, located(model), dtype=dtype)
    return workers_of(ray, workers, gpus_per_worker, threads, device, load)


def default_threads(model: HookedHybrid) -> int:
    """Return how many processor cores to use where none are asked for."""
    n_parameters = sum(parameter.numel() for parameter in model.parameters())
    return 1 if n_parameters < SMALL else torch.get_num_threads()


def heads_to_keep(ks: Sequence[int] | None, cfg: HybridConfig) -> list[int]:
    """Return every k to run, each once: those asked for, or all from 0."""
    counts = {mixer.n_heads for mixer in _attention(cfg)}
    if not counts:
        raise ValueError("this model has no attention layer: there are no heads to silence")
    most = min(counts)
    if wrong := [k for k in ks or () if not 0 <= k <= most]:
        given = ", ".join(map(str, wrong))
        raise ValueError(f"--k {given}: an attention layer has {most} heads; give 0 to {most}")
    return list(dict.fromkeys(ks or range(most + 1)))


def needles_of(sources: Sequence[str]) -> list[AnyNeedle | None]:
    """Return the needles that `--needle` names, in order; None for none."""
    found: list[AnyNeedle | None] = []
    for source in sources:
        if source in ("paper", "none"):
            found.append(PAPER if source == "paper" else None)
        else:
            found += held_out_needles() if source == "held-out" else load_needles(source)
    return found


def lengths_for(
    model: HookedHybrid,
    needles: Sequence[AnyNeedle | None],
    template: str,
    read_twice: bool,
    distractors: int,
    seed: int,
) -> list[int]:
    """Return ten lengths, the first with room for some haystack."""
    longest, form = longest_prompt(model.cfg), (template, read_twice, distractors)
    needed = max(shortest_length(model, needle, *form, seed=seed) for needle in needles)
    if needed > longest:
        raise ValueError(
            f"needle, template and distractors take {needed} tokens, the longest prompt by default "
            f"is {longest}: give --lengths, or fewer --distractors"
        )
    lengths = default_lengths(longest)
    return (
        lengths
        if lengths[0] >= needed
        else default_lengths(longest, shortest=min(needed + ROOM, longest))
    )


def show(table: pd.DataFrame, written: Written, losses: pd.DataFrame | None = None) -> None:
    """Print the accuracies, and where the files are."""
    console = Console()
    headings, rows = summary_rows(table, losses)
    if losses is not None:  # a screen is not wide enough for all columns
        kept = [i for i, text in enumerate(headings) if text not in ("cells", "whole answer")]
        headings, *rows = ([row[i] for i in kept] for row in (headings, *rows))
    shown = Table(title="accuracy: mean graded score / 5", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        is_name, is_long = heading == "setting", heading == "95% interval"
        shown.add_column(
            heading, justify="left" if is_name else "right", no_wrap=is_name or is_long
        )
    for row in rows:
        shown.add_row(*row)
    console.print(shown)
    joint = [path for path in written.pictures if path.parent == written.report.parent]
    for what, path in [
        *(("picture", path) for path in joint),
        ("each map", written.report.parent / "maps"),
        ("table", written.table),
        ("report", written.report),
    ]:
        console.print(f"{what:>8}  {path}", markup=False, highlight=False, soft_wrap=True)


def _show_outputs(table: pd.DataFrame, out: Path) -> None:
    """Print the commonest answers of prompts without a needle, which have no score, and write all.

    A model that retrieves should not name what is not there.
    """
    with replacing(out / "table.csv") as temporary:
        table.to_csv(temporary, index=False)
    shown = Table(title="answers without a needle", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("setting", "cells", "answer"):
        shown.add_column(heading)
    counts = table.groupby(["setting", "output"], sort=False).size()
    for setting, of_setting in counts.groupby(level="setting", sort=False):
        for (_, output), n in of_setting.nlargest(3).items():
            shown.add_row(str(setting), str(n), Text(str(output)))
    console = Console()
    console.print(shown)
    console.print(f"   table  {out / 'table.csv'}", markup=False, highlight=False, soft_wrap=True)


__all__ = [
    "default_threads",
    "heads_to_keep",
    "lengths_for",
    "loaded",
    "longest_prompt",
    "model_card",
    "needles_of",
    "niah",
    "pool",
    "show",
]
