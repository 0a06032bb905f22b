"""`hooked-hybrid plan`: the places of a model's parts, and whether it fits, before loading."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any, Literal

import torch
import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from hooked_hybrid.accounting.configs import config_of
from hooked_hybrid.accounting.plan.machine import (
    ANY_DISK,
    Machine,
    gpus_of,
    show_size,
    size_of,
    this_machine,
)
from hooked_hybrid.accounting.plan.planning import MemoryPlan
from hooked_hybrid.accounting.plan.planning import plan as make_plan
from hooked_hybrid.accounting.plan.split import Usage
from hooked_hybrid.commands.accounting import Model
from hooked_hybrid.commands.program import report_errors
from hooked_hybrid.network.placement.places import DISK

LENGTHS = (2048, 8192, 32768)

Gpus = Annotated[
    list[str] | None,
    typer.Option(
        help="GPUs and their memory: --gpus 8x40GB, or 2x80GB,1x24GB.",
        show_default="this machine's, unless --cpu is given",
    ),
]
Cpu = Annotated[
    str | None,
    typer.Option(
        help="CPU memory for blocks that are on no GPU, or for all without GPUs: --cpu 200GB.",
        show_default="none with --gpus",
    ),
]
Disk = Annotated[bool, typer.Option("--disk", help="Allow blocks on the disk.")]
Lengths = Annotated[
    list[int] | None,
    typer.Option(
        help="Tokens of prompt and continuation: --lengths 2048,8192,65536.",
        show_default=", ".join(map(str, LENGTHS)),
    ),
]
Batch = Annotated[int, typer.Option(help="Rows: --batch 8.", min=1)]
Dtype = Annotated[
    Literal["bfloat16", "float16", "float32"],
    typer.Option(help="Dtype of weights, keys and values."),
]
Quantize = Annotated[
    Literal["int8", "nf4"] | None,
    typer.Option(
        help="Large weights in 8 or 4 bits, which stay where they run: --quantize int8.",
        show_default="none",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, bytes as numbers.")]


def plan(
    model: Model = "jamba-mini",
    gpus: Gpus = None,
    cpu: Cpu = None,
    disk: Disk = False,
    lengths: Lengths = None,
    batch: Batch = 1,
    dtype: Dtype = "bfloat16",
    quantize: Quantize = None,
    as_json: AsJson = False,
) -> None:
    """The places of a model's parts, with memory by length; exit code 1 if it does not fit.

    Example: hooked-hybrid plan --model ai21labs/AI21-Jamba-Mini-1.6 --gpus 8x40GB
    """
    with report_errors(kept=None):
        machine = _machine(gpus, cpu, disk)
        found = make_plan(
            config_of(model),
            machine,
            list(lengths or LENGTHS),
            batch,
            getattr(torch, dtype),
            quantize,
        )
        if as_json:
            Console().print_json(json.dumps(as_dict(found)))
            if not found.fits:
                raise typer.Exit(1)
            return
        device_map = found.require()
        Console().print(_devices(found, model))
        Console().print(_lengths(found))
        elsewhere = sorted({place for place in device_map.values()} & {"cpu", DISK})
        if elsewhere and machine.gpus:
            Console().print(f"blocks on {' and '.join(elsewhere)} run on the last GPU in use")
        Console().print(_notes(found), style="dim")


def _notes(found: MemoryPlan) -> str:
    """Return the meaning of the columns."""
    notes = (
        "activations: most bytes of a forward's values, and the state before it, with logits "
        "of one position; without gradients and values kept by hooks."
    )
    if any(used.loading > used.running for used in found.usages(min(found.lengths))):
        notes += " loading: its bytes on top of the weights; the larger of it and a run counts."
    if found.machine.gpus:
        notes += " On GPUs attention is counted without a fused kernel, an upper bound, and 1 GB "
        notes += "for CUDA itself."
    return notes


def as_dict(found: MemoryPlan) -> dict[str, Any]:
    """Return a plan as data: bytes, the device map, and the reason if there is none."""
    names = [name for name, _ in found.machine.devices]
    about = {
        "dtype": str(found.sizes.dtype).removeprefix("torch."),
        "quantize": found.sizes.quantize,
        "batch": found.sizes.batch,
        "lengths": list(found.lengths),
        "capacity": dict(found.machine.devices),
        "weights": sum(found.sizes.weights.values()),
        "fits": found.fits,
    }
    if not found.fits:
        return {
            **about,
            "why_not": found.why_not,
            "would_fit": [change.option for change in found.changes],
        }
    usage = {
        str(length): {
            name: {**asdict(used), "total": used.total}
            for name, used in zip(names, found.usages(length), strict=True)
        }
        for length in found.lengths
    }
    return {**about, "device_map": found.require(), "usage": usage}


def _machine(gpus: Sequence[str] | None, cpu: str | None, disk: bool) -> Machine:
    if gpus is None and cpu is None:
        return this_machine(None, has_folder=disk)
    given = () if gpus is None else gpus_of(",".join(gpus))
    return Machine(given, 0 if cpu is None else size_of(cpu), ANY_DISK if disk else None)


def _devices(found: MemoryPlan, model: str) -> Table:
    """Return a line for each device in use and for parts kept elsewhere."""
    kind = str(found.sizes.dtype).removeprefix("torch.")
    kind += "" if found.sizes.quantize is None else f" and {found.sizes.quantize}"
    table = Table(title=f"{model} in {kind}: what goes where", box=SIMPLE_HEAD)
    for heading in ("place", "parts"):
        table.add_column(heading)
    for heading in ("weights", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    split, used = found.split, found.usages(max(found.lengths))
    assert split is not None  # otherwise `require` has raised
    for k, (name, capacity) in enumerate(found.machine.devices):
        if not split.uses(k):
            table.add_row(name, "unused", "", show_size(capacity))
            continue
        parts = ["embed, ln_final, unembed"] if k == split.first else []
        parts += [_blocks(split.blocks(k))] if split.held[k] else []
        table.add_row(name, ", ".join(parts), show_size(used[k].weights), show_size(capacity))
    weights, rest = found.sizes.weights, split.kept_elsewhere
    for name, blocks in (("cpu", rest[: split.on_cpu]), (DISK, rest[split.on_cpu :])):
        if blocks:
            kept = sum(weights[f"blocks.{i}"] for i in blocks)
            memory = show_size(found.machine.cpu) if name == "cpu" else ""
            table.add_row(name, _blocks(blocks), show_size(kept), memory)
    return table


def _lengths(found: MemoryPlan) -> Table:
    """Return a line for each length and device in use."""
    rows = f"{found.sizes.batch} row" + ("s" if found.sizes.batch > 1 else "")
    title = f"memory by length, {rows}"
    table = Table(title=title, box=SIMPLE_HEAD, collapse_padding=True, pad_edge=False)
    loads = any(used.loading > used.running for used in found.usages(min(found.lengths)))
    loading = ("loading",) if loads else ()
    for heading in ("tokens", "device", "weights", "state", "activations", *loading, "all", "of"):
        table.add_column(heading, justify="right", no_wrap=True)
    for length in found.lengths:
        shown_length = f"{length:,}"
        for (name, capacity), used in zip(found.machine.devices, found.usages(length), strict=True):
            if used.total:
                table.add_row(shown_length, name, *_columns(used, loads), show_size(capacity))
                shown_length = ""
    return table


def _columns(used: Usage, loads: bool) -> tuple[str, ...]:
    weights = show_size(used.weights) + (f" + {show_size(used.brought)}" if used.brought else "")
    loading = (show_size(used.loading),) if loads else ()
    return (
        weights,
        show_size(used.state),
        show_size(used.working),
        *loading,
        show_size(used.total),
    )


def _blocks(blocks: range) -> str:
    if len(blocks) == 1:
        return f"blocks.{blocks[0]}"
    return f"blocks.{blocks[0]} to {blocks[-1]}"
