"""`hooked-hybrid niah`: the whole experiment, from a model's name to figures."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from hooked_hybrid.commands.option_groups import make_command, refuse_given
from hooked_hybrid.commands.program import command_line
from hooked_hybrid.commands.prompt_options import FirstToken, PromptOptions, ReadTwice, ThesisDepth
from hooked_hybrid.commands.run_options import RunOptions
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.niah.lengths import attention_of
from hooked_hybrid.niah.report.report import Written, summary_rows, write_report
from hooked_hybrid.niah.sweep import niah as run_sweep
from hooked_hybrid.niah.sweep import top_k_settings
from hooked_hybrid.outputs.foreign import one_line
from hooked_hybrid.outputs.tables import write_csv

if TYPE_CHECKING:
    import pandas as pd


class Stage(StrEnum):
    """The stages in which heads are zeroed."""

    generation = "generation"
    both = "both"


def _option(text: str, *names: str, **settings: Any) -> Any:
    return typer.Option(*names, help=text, **settings)


Ks = Annotated[
    list[int] | None,
    _option("Heads kept per attention layer: --k 0,2.", "--k", show_default="each from 0 up"),
]
Stages = Annotated[
    list[Stage] | None,
    _option(
        "Stages in which heads are zeroed: --stages both adds prefill.",
        show_default="generation, then both",
    ),
]
Score = Annotated[Literal["entropy", "l2"], _option("Measure of how peaked a head is: --score l2.")]


@make_command(out=Path("results/niah"))
def niah(
    run: RunOptions,
    prompts: PromptOptions,
    k: Ks = None,
    stages: Stages = None,
    score: Score = "entropy",
    read_twice: ReadTwice = False,
    first_token: FirstToken = "prefill",
    thesis_depth: ThesisDepth = False,
) -> None:
    """Needle in a haystack, with only the k most peaked attention heads of each layer.

    Writes a table, retrieval maps, accuracy by k, and a report with the papers' numbers. It may
    be stopped at any time and continued by the same command with --resume.

    Example: hooked-hybrid niah --model tiny-jamba --k 0,2 --stages generation --out results/j
    """
    with run.started() as workers:
        if not any(prompts.needles):
            refuse_given("--needle none has no score and no map", "thesis_depth")
        model = run.load()
        wanted = [stage.value for stage in dict.fromkeys(stages or Stage)]
        settings = top_k_settings(heads_to_keep(k, model.cfg), wanted, score)
        table = run_sweep(
            model,
            prompts.prompts(model, [read_twice]),
            settings,
            out=run.out,
            resume=run.resume,
            max_new_tokens=prompts.max_new_tokens,
            first_token_stage=first_token,
            workers=workers,
        )
        if not table["accuracy"].notna().any():
            _show_outputs(table, run.out)
            return
        with Console(stderr=True).status("drawing"):
            card = model_card(model, run.model)
            written = write_report(
                table, settings, card, run.out, command=command_line(), thesis_depth=thesis_depth
            )
        show(table, written)


def _kind(cfg: object) -> str:
    return type(cfg).__name__.removesuffix("Config")


def model_card(model: HookedHybrid, name: str) -> dict[str, str]:
    """Return a description of a model for the report."""
    attention = attention_of(model.cfg)
    heads = sorted({mixer.n_heads for mixer in attention})
    windows = sorted({str(mixer.n_keys or "all") for mixer in attention})
    kinds = ("+".join(map(_kind, layer.mixers)) or _kind(layer.mlp) for layer in model.cfg.layers)
    stored = {} if model.quantization is None else {"large weights": model.quantization.scheme}
    if model.placement is not None:
        places = Counter(model.placement.device_map.values())
        stored["parts by place"] = ", ".join(f"{n} on {p}" for p, n in places.items())
    return {
        "model": name,
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}",
        "layers": " ".join(kinds),
        "heads in an attention layer": ", ".join(map(str, heads)) or "no attention layer",
        "keys a query sees": ", ".join(windows) or "none",
        "dtype, device": f"{str(model.dtype).removeprefix('torch.')}, {model.device}",
        **stored,
    }


def heads_to_keep(ks: Sequence[int] | None, cfg: HybridConfig) -> list[int]:
    """Return every k to run, each once: the given ones, or all from 0."""
    counts = {mixer.n_heads for mixer in attention_of(cfg)}
    if not counts:
        raise ValueError("this model has no attention layer: there are no heads to silence")
    most = min(counts)
    if wrong := [k for k in ks or () if not 0 <= k <= most]:
        given = ", ".join(map(str, wrong))
        raise ValueError(f"--k {given}: an attention layer has {most} heads; give 0 to {most}")
    return list(dict.fromkeys(ks or range(most + 1)))


def show(table: pd.DataFrame, written: Written, losses: pd.DataFrame | None = None) -> None:
    """Print the accuracies and the paths of the files."""
    console = Console()
    headings, rows = summary_rows(table, losses)
    if losses is not None:  # a screen is not wide enough for all columns
        kept = [i for i, text in enumerate(headings) if text not in ("cells", "whole answer")]
        headings, *rows = ([row[i] for i in kept] for row in (headings, *rows))
    console.print(figures_table(headings, rows))
    joint = [path for path in written.pictures if path.parent == written.report.parent]
    for what, path in [
        *(("picture", path) for path in joint),
        ("each map", written.report.parent / "maps"),
        ("table", written.table),
        ("report", written.report),
    ]:
        console.print(f"{what:>8}  {path}", markup=False, highlight=False, soft_wrap=True)


def figures_table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """Return a table of `summary_rows` for a screen.

    On a narrow screen headings and figures are wrapped, as a truncated figure would be wrong. Names
    and intervals are not wrapped.
    """
    shown = Table(title="accuracy: mean graded score / 5", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in headings:
        is_name, is_long = heading == "setting", heading == "95% interval"
        shown.add_column(
            heading,
            justify="left" if is_name else "right",
            no_wrap=is_name or is_long,
            overflow="ellipsis" if is_name or is_long else "fold",
        )
    for row in rows:
        shown.add_row(*row)
    return shown


def _show_outputs(table: pd.DataFrame, out: Path) -> None:
    """Print the most frequent answers to prompts without a needle, and write all of them.

    They have no score. A model that retrieves should not name a missing needle.
    """
    write_csv(table, out / "table.csv")
    shown = Table(title="answers without a needle", box=SIMPLE_HEAD, collapse_padding=True)
    for heading in ("setting", "cells", "answer"):
        shown.add_column(heading)
    counts = table.groupby(["setting", "output"], sort=False).size()
    for setting, of_setting in counts.groupby(level="setting", sort=False):
        for (_, output), n in of_setting.nlargest(3).items():
            shown.add_row(str(setting), str(n), Text(one_line(output)))
    console = Console()
    console.print(shown)
    console.print(f"   table  {out / 'table.csv'}", markup=False, highlight=False, soft_wrap=True)
