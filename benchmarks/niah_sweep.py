"""Cells per second of the sweep engine against one prompt and one setting at a time.

    python -m benchmarks.niah_sweep [--model tiny-griffin] [--rounds 5]

The peer is `transformers`, greedy, its own prefill for every cell and no intervention (which would
only cost it time), made to decode as many tokens as the sweep did in that cell. Rounds alternate.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM  # noqa: TID251
from transformers.utils import logging  # noqa: TID251

from hooked_hybrid import HookedHybrid
from hooked_hybrid.niah.command import longest_prompt
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt, default_depths, grid
from hooked_hybrid.niah.sweep import niah, top_k_settings
from hooked_hybrid.packaged import packaged_models

N_NEW = 40


def seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny-griffin", choices=list(packaged_models()))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompts", type=int, default=10, help="depths of the longest prompt")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.set_verbosity_error()

    model = HookedHybrid.from_pretrained(args.model, dtype=torch.float32)
    peer = AutoModelForCausalLM.from_pretrained(packaged_models()[args.model]).float().eval()
    length = longest_prompt(model.cfg)
    prompts = grid(model, [PAPER], [length], default_depths(args.prompts))
    settings = top_k_settings(range(9), ["generation"])
    table = niah(model, prompts, settings, max_new_tokens=N_NEW, verbose=False)
    lengths = table.set_index(["prompt_id", "setting"])["n_new_tokens"]

    def ours() -> None:
        niah(model, prompts, settings, max_new_tokens=N_NEW, verbose=False)

    def theirs(prompt: Prompt) -> None:
        tokens = torch.tensor([prompt.tokens])
        for setting in settings:
            n = int(lengths[prompt.id, setting.name])
            peer.generate(tokens, max_new_tokens=n, min_new_tokens=n, do_sample=False)

    ours_s, theirs_s = [], []
    for i in range(args.rounds + 1):  # the first warms up
        prompt = prompts[i % len(prompts)]
        ours_s.append(seconds(ours) / (len(prompts) * len(settings)))
        theirs_s.append(seconds(lambda: theirs(prompt)) / len(settings))  # noqa: B023
    fast, slow = (1 / statistics.median(times[1:]) for times in (ours_s, theirs_s))
    print(f"{args.model}, {length} tokens, {len(settings)} settings, {args.threads} thread(s)")
    print(f"hooked_hybrid sweep      {fast:8.1f} cells/s")
    print(f"transformers one by one  {slow:8.1f} cells/s")
    ratios = [b / a for a, b in zip(ours_s[1:], theirs_s[1:], strict=True)]
    print(f"ratio {statistics.median(ratios):.1f} (rounds: {min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
