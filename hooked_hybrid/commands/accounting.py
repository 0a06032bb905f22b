"""`hooked-hybrid parameters` and `compute`: the size and cost of a model, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hooked_hybrid.accounting.configs import config_of
from hooked_hybrid.accounting.flops import flops_table, recurrence_over_attention
from hooked_hybrid.accounting.memory import memory_table, tokens_where_attention_is_larger
from hooked_hybrid.accounting.parameters import ParameterCount, count_parameters
from hooked_hybrid.accounting.plots import compute_figure
from hooked_hybrid.commands.program import folder, report_errors
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network import mixers
from hooked_hybrid.outputs.figures import save_figure
from hooked_hybrid.outputs.whole_files import replacing

if TYPE_CHECKING:
    import pandas as pd

Model = Annotated[
    str,
    typer.Option(
        help="recurrentgemma-2b, recurrentgemma-9b, jamba-mini (none needs a network), a packaged "
        "model, the path of a config.json or its folder, or a hub id: --model jamba-mini."
    ),
]
OptionalOut = Annotated[
    Path | None,
    typer.Option(
        help="Folder for parameters.csv: --out results/2b.",
        show_default="none written",
        parser=folder,
    ),
]
Out = Annotated[
    Path,
    typer.Option(help="Folder for tables and picture: --out results/compute.", parser=folder),
]
MaxLength = Annotated[
    int, typer.Option(help="Longest prompt, in tokens: --max-length 65536.", min=1, max=2**24)
]
Batch = Annotated[int, typer.Option(help="Rows: --batch 8.", min=1)]
Logits = Annotated[
    Literal["last", "all"],
    typer.Option(help="Positions of the prompt whose logits are computed: --logits all."),
]
DTYPES = (torch.bfloat16, torch.float32)
POINTS = 32
"""Number of evenly spaced lengths in the figure, besides powers of 2 and the windows."""


def parameters(model: Model = "recurrentgemma-2b", out: OptionalOut = None) -> None:
    """Parameters by kind of layer, in all and active per token, from the config alone.

    Example: hooked-hybrid parameters --model jamba-mini --out results/mini
    """
    with report_errors(kept=None):
        _refuse_existing(out, "parameters.csv")
        counted = count_parameters(config_of(model))
        Console().print(_parameter_table(counted, model))
        if out is not None:
            _write_csv(counted.table(), out / "parameters.csv")


def compute(
    model: Model = "recurrentgemma-2b",
    max_length: MaxLength = 8192,
    batch: Batch = 1,
    logits: Logits = "last",
    out: Out = Path("results/compute"),
) -> None:
    """Operations by kind of layer and bytes of the state, by length, from the config alone.

    Example: hooked-hybrid compute --model recurrentgemma-2b --max-length 8192 --out results/2b
    """
    with report_errors(kept=None):
        _refuse_existing(out, "flops.csv", "state.csv", "compute.png", "compute.pdf")
        cfg = config_of(model)
        lengths, n_logits = lengths_up_to(max_length, cfg), 1 if logits == "last" else None
        flops = flops_table(cfg, lengths, batch, n_logits)
        memory = memory_table(cfg, lengths, DTYPES, batch)
        figure = compute_figure(flops, memory, windows_of(cfg, max_length), title_of(model, batch))
        Console().print(_compute_table(cfg, flops, memory, model))
        _print_crossing(cfg)
        _write_csv(flops, out / "flops.csv")
        _write_csv(memory, out / "state.csv")
        for path in save_figure(figure, out / "compute"):
            _print_path("picture", path)


def lengths_up_to(longest: int, cfg: HybridConfig) -> list[int]:
    """Return the lengths to count at, in order: powers of 2, evenly spaced ones and windows."""
    powers = [2**i for i in range(longest.bit_length())]
    even = [max(1, longest * i // POINTS) for i in range(1, POINTS + 1)]
    return sorted({*powers, *even, *windows_of(cfg, longest)})


def windows_of(cfg: HybridConfig, longest: int) -> list[int]:
    """Return the numbers of keys of attention windows, up to `longest`."""
    return sorted({n_keys for n_keys in mixers.windows_of(cfg) if n_keys <= longest})


def title_of(model: str, batch: int = 1) -> str:
    """Return a title for the picture."""
    rows = "" if batch == 1 else f", {batch} rows"
    return f"{model}: counted from the config{rows}"


def _parameter_table(counted: ParameterCount, model: str) -> Table:
    shown = Table(title=f"parameters of {model}", box=SIMPLE_HEAD, collapse_padding=True)
    shown.add_column("kind of layer", no_wrap=True)
    names = ("layers", "parameters", "active", "share", "of sum")
    for name in names:
        shown.add_column(name, justify="right", no_wrap=name in ("parameters", "active"))
    for row in counted.table().to_dict("records"):
        shares = (_percent(row[name]) for name in ("share", "share_of_column"))
        kind = f"  of it {row['kind']}" if row["part_of"] else row["kind"]
        shown.add_row(
            kind, str(row["modules"]), f"{row['parameters']:,}", f"{row['active']:,}", *shares
        )
    shown.add_section()
    without = f"{counted.without_embeddings:,}", f"{counted.active_without_embeddings:,}"
    shown.add_row("without embeddings", "", *without)
    shown.add_row("all", "", f"{counted.total:,}", f"{counted.active:,}")
    shown.caption = (
        "share: of the parameters without embeddings; of sum: of the column's sum without them, in "
        "which parts count twice, as in Table 1 of Zani et al. (2025)"
    )
    return shown


def _compute_table(
    cfg: HybridConfig, flops: pd.DataFrame, memory: pd.DataFrame, model: str
) -> Table:
    """Return a line for every fourth power of 2 and the longest: sums, ratios, state."""
    title = f"compute of {model}: matrix products, scans and elementwise operations"
    shown = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True)
    compares = bool(cfg.attention_layers and cfg.recurrent_layers)
    headings = ["tokens", "prefill", "one more", "state, bf16"]
    headings += ["recurrence : attention", "a layer : a layer"] if compares else []
    for heading in headings:
        shown.add_column(heading, justify="right")
    sums = flops.groupby(["stage", "length"])["total"].sum()
    of_bf16 = memory[memory["dtype"] == "bfloat16"].set_index("length")["total"]
    longest = int(flops["length"].max())
    for length in [n for n in flops["length"].unique() if n in _lengths_to_show(longest)]:
        ratio = recurrence_over_attention(cfg, int(length)) if compares else None
        shown.add_row(
            f"{length:,}",
            _with_prefix(sums["prefill", length], "FLOP"),
            _with_prefix(sums["step", length], "FLOP"),
            _with_prefix(of_bf16[length], "B"),
            *([] if ratio is None else [f"{ratio.all_layers:.2f}", f"{ratio.a_layer:.2f}"]),
        )
    return shown


def _lengths_to_show(longest: int) -> set[int]:
    return {1, longest, *(2**i for i in range(6, longest.bit_length()))}


def _print_crossing(cfg: HybridConfig) -> None:
    crossing = tokens_where_attention_is_larger(cfg)
    if cfg.attention_layers and cfg.recurrent_layers:
        from_there = "never outgrow" if crossing is None else f"from {crossing:,} tokens on outgrow"
        Console().print(f"keys and values {from_there} the recurrences' state (bfloat16)")


def _with_prefix(value: Any, unit: str) -> str:
    from matplotlib.ticker import EngFormatter

    return EngFormatter(unit=unit, places=2).format_data(float(value))


def _percent(share: float) -> str:
    if share != share:  # embedding and read-out have none
        return ""
    return f"{100 * share:.1f}%" if share >= 5e-4 else "<0.1%"


def _refuse_existing(folder: Path | None, *names: str) -> None:
    for path in () if folder is None else [folder / name for name in names]:
        if path.exists():
            raise ValueError(f"{path} already exists: give another folder with --out")


def _write_csv(table: pd.DataFrame, path: Path) -> None:
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)
    _print_path("table", path)


def _print_path(what: str, path: Path) -> None:
    Console().print(f"{what:>8}  {path}", markup=False, highlight=False, soft_wrap=True)
