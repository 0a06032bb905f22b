"""The time of harvesting compared with the forward alone, and its memory.

Prints a table of processor seconds (one thread; medians of interleaved rounds) and one of peak
memory by the number of shards, each in its own process:

    python -m experiments.harvest_speed --rounds 5 --shards 4 --shards 16 --shards 64
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from torch import Tensor

from hooked_hybrid import HookedHybrid
from hooked_hybrid.harvest import harvest
from hooked_hybrid.harvest.shards import save

CONTEXT, ROWS, SHARD = 512, 8, 2**24
EVERY = "blocks.*.hook_resid_post"


def main(
    model: str = "tiny-griffin",
    rounds: int = 5,
    contexts: int = 64,
    shards: Annotated[list[int] | None, typer.Option()] = None,
    shard_megabytes: int = 16,
    memory_of: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> None:
    """Print the tables; without `--shards` no memory is measured."""
    torch.set_num_threads(1)
    if memory_of is not None:
        print(*_memory(model, memory_of, shard_megabytes * 2**20))
        return
    _print_speed(model, rounds, contexts)
    for n in shards or ():
        command = [sys.executable, "-m", "experiments.harvest_speed", "--model", model]
        command += ["--memory-of", str(n), "--shard-megabytes", str(shard_megabytes)]
        found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
        n_made, n_tokens, before, peak = (int(value) for value in found)
        print(
            f"{n_made:4} shards of {shard_megabytes} MB, {n_tokens:9,} tokens: peak "
            f"{peak / 2**20:6.1f} MB, {before / 2**20:.1f} MB of a forward alone"
        )


def _print_speed(name: str, rounds: int, contexts: int) -> None:
    model = HookedHybrid.from_pretrained(name)
    tokens = _tokens(model, contexts)
    last = f"blocks.{model.cfg.n_layers - 1}.hook_resid_post"
    ways: dict[str, Callable[[Path], object]] = {
        "forward alone": lambda _: _forward(model, tokens),
        "harvest, 1 hook point": lambda out: _harvest(model, tokens, last, out),
        f"harvest, {model.cfg.n_layers} hook points": lambda out: _harvest(
            model, tokens, EVERY, out
        ),
        f"transformers, {model.cfg.n_layers} hooks": _transformers(model, tokens),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way, run in ways.items():
            with tempfile.TemporaryDirectory() as folder:
                start = time.process_time()
                run(Path(folder) / "out")
                seconds[way].append(time.process_time() - start)
    print(f"{name}: {tokens.numel():,} tokens in contexts of {CONTEXT}, {rounds} rounds")
    for way, taken in seconds.items():
        ratios = [t / base for t, base in zip(taken, seconds["forward alone"], strict=True)]
        print(
            f"{way:26} {tokens.numel() / median(taken):9,.0f} tokens a second, "
            f"{median(ratios):.2f} x the forward's time ({min(ratios):.2f} - {max(ratios):.2f})"
        )


def _tokens(model: HookedHybrid, contexts: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(5, model.cfg.d_vocab, (contexts, CONTEXT), generator=generator)


def _forward(model: HookedHybrid, tokens: Tensor) -> None:
    with torch.no_grad():
        for rows in tokens.split(ROWS):
            model(rows, None, stop_at_layer=model.cfg.n_layers)


def _harvest(model: HookedHybrid, tokens: Tensor, hooks: str, out: Path) -> int:
    harvested = harvest(
        model,
        tokens,
        hooks,
        out,
        context_length=CONTEXT,
        batch_size=ROWS,
        shard_bytes=SHARD,
        verbose=False,
    )
    return len(harvested.paths)


def _transformers(model: HookedHybrid, tokens: Tensor) -> Callable[[Path], None]:
    """Return a harvest with forward hooks on the layers of `transformers`, 16 MB a file."""
    from transformers import AutoModelForCausalLM  # noqa: TID251

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        theirs = AutoModelForCausalLM.from_pretrained(folder).eval().model

    def run(out: Path) -> None:
        kept: dict[str, list[Tensor]] = {str(i): [] for i in range(len(theirs.layers))}
        handles = [
            layer.register_forward_hook(
                lambda _module, _args, value, i=i: kept[str(i)].append(
                    (value[0] if isinstance(value, tuple) else value).flatten(0, 1)
                )
            )
            for i, layer in enumerate(theirs.layers)
        ]
        out.mkdir()
        with torch.no_grad():
            for number, rows in enumerate(tokens.split(ROWS)):
                theirs(rows, use_cache=False)
                n_rows = sum(len(part) for part in kept["0"])
                if n_rows * len(kept) * kept["0"][0][0].nbytes > SHARD:
                    _flush(kept, out / f"{number}.safetensors")
        if kept["0"]:
            _flush(kept, out / "last.safetensors")
        for handle in handles:
            handle.remove()

    return run


def _flush(kept: dict[str, list[Tensor]], path: Path) -> None:
    save({name: torch.cat(parts) for name, parts in kept.items()}, path, {})
    for parts in kept.values():
        parts.clear()


def _memory(name: str, n_shards: int, shard_bytes: int) -> tuple[int, int, int, int]:
    """Return shards, tokens, and the peak memory in bytes: of a forward, and of the process."""
    model = HookedHybrid.from_pretrained(name)
    width = model.cfg.n_layers * model.cfg.d_model * model.dtype.itemsize
    contexts = n_shards * (shard_bytes // (width + 12) // CONTEXT)
    tokens = _tokens(model, contexts)
    _forward(model, tokens[:ROWS])
    before = _peak()
    with tempfile.TemporaryDirectory() as folder:
        harvested = harvest(
            model,
            tokens,
            EVERY,
            Path(folder) / "out",
            context_length=CONTEXT,
            batch_size=ROWS,
            shard_bytes=shard_bytes,
            verbose=False,
        )
        found = (len(harvested.paths), len(harvested))
    return *found, before, _peak()


def _peak() -> int:
    """Return this program's peak; `getrusage` gives its parent's if that was higher."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


if __name__ == "__main__":
    typer.run(main)
