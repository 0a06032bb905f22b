"""Load a checkpoint at the true shape of RecurrentGemma-2B and compare it with transformers.

    python -m experiments.true_shape FOLDER [--n-pos 2112] [--dtype float32] [--step speed]

Weights are random bf16, written by transformers itself (about 5.4 GB). Each step runs in its own
process, so that its memory is measured alone: write; load with ours, with the peak of anonymous
memory measured; the times of prefill and of a cached step, plain and with the top-2 heads kept
(these two in `--dtype`: a CPU without bf16 instructions takes some five times as long in bf16); the
logits of one prompt longer than the window, by both, compared. Needs the `test` extra. A stopped
run continues in FOLDER. `docs/measured/true_shape.json` contains the figures of a run.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import torch

PUBLISHED: dict[str, Any] = {
    "vocab_size": 256_000,
    "hidden_size": 2560,
    "num_hidden_layers": 26,
    "num_attention_heads": 10,
    "num_key_value_heads": 1,
    "lru_width": 2560,
    "intermediate_size": 15_360,
    "attention_window_size": 2048,
}
ROUNDS, STEPS = 2, 4
STEP_NAMES = ("write", "load", "speed", "hf", "ours", "compare")


def write(folder: Path, n_layers: int) -> None:
    """Make a random model in bf16 and save it with transformers."""
    from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM  # noqa: TID251

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    config = RecurrentGemmaConfig(**{**PUBLISHED, "num_hidden_layers": n_layers})
    with torch.device("meta"):
        model = RecurrentGemmaForCausalLM(config)
    model.to_empty(device="cpu")
    model.tie_weights()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            fan_in = parameter.shape[-1] if parameter.ndim > 1 else 10
            parameter.normal_(std=fan_in**-0.5)
            if name.endswith("recurrent_param"):
                parameter.uniform_(-7, 1)
    model.save_pretrained(folder / "checkpoint", max_shard_size="2GB")


def measure_loading(folder: Path, dtype: torch.dtype) -> None:
    """Load with ours while a thread watches the process's anonymous memory."""
    from hooked_hybrid import HookedHybrid

    before, peak, done = _anonymous_bytes(), 0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.is_set():
            peak = max(peak, _anonymous_bytes())
            time.sleep(0.002)

    watcher = threading.Thread(target=watch)
    watcher.start()
    start = time.perf_counter()
    model = HookedHybrid.from_pretrained(folder / "checkpoint", dtype=dtype)
    seconds = time.perf_counter() - start
    done.set()
    watcher.join()
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    allowed = 1.1 * sum(sizes) + max(sizes)
    _note(
        folder,
        dtype=str(dtype),
        weights_bytes=sum(sizes),
        largest_tensor_bytes=max(sizes),
        peak_anonymous_bytes=peak - before,
        peak_over_weights=(peak - before) / sum(sizes),
        within_bound=peak - before <= allowed,
        seconds_to_load=seconds,
    )


def measure_speed(folder: Path, dtype: torch.dtype, n_pos: int) -> None:
    """Time prefill and cached steps, with and without the top-2 heads; plain and hooked in turn."""
    from hooked_hybrid import HookedHybrid, interventions

    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, PUBLISHED["vocab_size"], (1, n_pos), generator=generator)
    model = HookedHybrid.from_pretrained(folder / "checkpoint", dtype=dtype)
    hooks = {"plain": [], "top_2": interventions.keep_top_heads(2)}
    times: dict[str, list[float]] = {}
    with torch.no_grad():
        _, state = model(tokens[:, :32], return_state=True)  # warms up
        for _ in range(ROUNDS):
            for name, fwd_hooks in hooks.items():
                with model.hooks(fwd_hooks):
                    start = time.perf_counter()
                    _, state = model(tokens, return_state=True, logits_to_keep=1)
                    times.setdefault(f"prefill_{name}", []).append(time.perf_counter() - start)
                    for step in range(STEPS):
                        start = time.perf_counter()
                        _, state = model(tokens[:, step : step + 1], state=state, return_state=True)
                        times.setdefault(f"step_{name}", []).append(time.perf_counter() - start)
    middle = {name: statistics.median(seconds) for name, seconds in times.items()}
    _note(
        folder,
        n_pos=n_pos,
        dtype=str(dtype),
        threads=torch.get_num_threads(),
        prefill_tokens_per_second=n_pos / middle["prefill_plain"],
        prefill_top_2_over_plain=middle["prefill_top_2"] / middle["prefill_plain"],
        step_seconds=middle["step_plain"],
        step_top_2_over_plain=middle["step_top_2"] / middle["step_plain"],
    )


def compute_logits(folder: Path, whose: str, n_pos: int) -> None:
    """Save the bf16 logits of one prompt, by transformers or by ours."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(3, PUBLISHED["vocab_size"], (1, n_pos), generator=generator)
    path = folder / "checkpoint"
    model: Any
    with torch.no_grad():
        if whose == "hf":
            from transformers import RecurrentGemmaForCausalLM  # noqa: TID251

            model = RecurrentGemmaForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
            logits = model.eval()(tokens, use_cache=False).logits
        else:
            from hooked_hybrid import HookedHybrid

            model = HookedHybrid.from_pretrained(path, dtype=torch.bfloat16)
            logits = model(tokens)
    torch.save(logits[0], folder / f"logits_{whose}_{n_pos}.pt")


def compare(folder: Path, n_pos: int) -> None:
    """Record the differences, and whether the argmax agrees wherever the margin is clear."""
    hf, ours = (
        torch.load(folder / f"logits_{whose}_{n_pos}.pt", weights_only=True, mmap=True)
        for whose in ("hf", "ours")
    )
    difference = torch.empty(n_pos)
    margin, same = torch.empty(n_pos), torch.empty(n_pos, dtype=torch.bool)
    for t in range(n_pos):
        a, b = hf[t].float(), ours[t].float()
        difference[t] = (a - b).abs().max()
        top = a.topk(2).values
        margin[t], same[t] = top[0] - top[1], a.argmax() == b.argmax()
    clear = margin > 2 * difference
    _note(
        folder,
        n_pos=n_pos,
        largest_logit=float(max(row.float().abs().max() for row in hf)),
        max_difference=float(difference.max()),
        median_difference=float(difference.median()),
        positions_with_clear_margin=int(clear.sum()),
        same_argmax_where_clear=bool(same[clear].all()),
        same_argmax_anywhere=float(same.float().mean()),
    )


def _anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("this system does not report a process's anonymous memory")


def _note(folder: Path, **figures: Any) -> None:
    print(json.dumps(figures, indent=2), flush=True)
    with (folder / "figures.jsonl").open("a") as file:
        file.write(json.dumps(figures) + "\n")


def main() -> None:
    """Run every step in its own process."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--n-pos", type=int, default=2112)
    parser.add_argument("--layers", type=int, default=26)
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--step", choices=STEP_NAMES)
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)
    if args.step is None:
        args.folder.mkdir(parents=True, exist_ok=True)
        for step in STEP_NAMES:
            if step == "write" and (args.folder / "checkpoint" / "config.json").exists():
                continue
            if (args.folder / f"logits_{step}_{args.n_pos}.pt").exists():
                continue
            print(f"--- {step}", flush=True)
            command = [sys.executable, "-m", "experiments.true_shape", *sys.argv[1:]]
            subprocess.run([*command, "--step", step], check=True)
    elif args.step == "write":
        write(args.folder, args.layers)
    elif args.step == "load":
        measure_loading(args.folder, dtype)
    elif args.step == "speed":
        measure_speed(args.folder, dtype, args.n_pos)
    elif args.step in ("hf", "ours"):
        compute_logits(args.folder, args.step, args.n_pos)
    else:
        compare(args.folder, args.n_pos)


if __name__ == "__main__":
    main()
