"""Cells per second of the sweep engine against one prompt and one setting at a time.

    python -m benchmarks.niah_sweep [--model tiny-griffin] [--rounds 5]

The peer is `transformers`, greedy, its own prefill for every cell and no intervention (which would
only cost it time). Both decode the same prompts to the same end; rounds alternate.
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
from hooked_hybrid.niah.prompts import default_depths, grid
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
    sampled = prompts[:: max(len(prompts) // 3, 1)]

    def ours() -> None:
        niah(model, prompts, settings, max_new_tokens=N_NEW, verbose=False)

    def theirs() -> None:
        for prompt in sampled:
            tokens = torch.tensor([prompt.tokens])
            peer.generate(tokens, max_new_tokens=N_NEW, do_sample=False)

    ours_s, theirs_s = [], []
    for _ in range(args.rounds + 1):  # the first warms up
        ours_s.append(seconds(ours) / (len(prompts) * len(settings)))
        theirs_s.append(seconds(theirs) / len(sampled))
    fast, slow = (1 / statistics.median(times[1:]) for times in (ours_s, theirs_s))
    print(f"{args.model}, {length} tokens, {len(settings)} settings, {args.threads} thread(s)")
    print(f"hooked_hybrid sweep      {fast:8.1f} cells/s")
    print(f"transformers one by one  {slow:8.1f} cells/s")
    ratios = [b / a for a, b in zip(ours_s[1:], theirs_s[1:], strict=True)]
    print(f"ratio {statistics.median(ratios):.1f} (rounds: {min(ratios):.1f} to {max(ratios):.1f})")


if __name__ == "__main__":
    main()
