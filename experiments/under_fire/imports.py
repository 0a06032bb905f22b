"""The cost of `import hooked_hybrid` and of `import torch`, in fresh processes, interleaved.

Run `python -m experiments.under_fire.imports --pairs 9`.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time

MODULES = ("torch", "hooked_hybrid")


def cost(module: str) -> tuple[float, float]:
    """Return the wall and processor seconds of importing a module in a new process."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    """Print medians [seconds] and their ratio to those of torch."""
    parser = argparse.ArgumentParser(prog="python -m experiments.under_fire.imports")
    parser.add_argument("--pairs", type=int, default=9)
    args = parser.parse_args(arguments)
    for module in MODULES:
        cost(module)  # compiled and in the page cache
    costs: dict[str, list[tuple[float, float]]] = {module: [] for module in MODULES}
    for _ in range(args.pairs):
        for module in MODULES:
            costs[module].append(cost(module))
            print(module, *costs[module][-1], file=sys.stderr)
    table = {}
    for i, kind in enumerate(("wall", "processor")):
        medians = {m: statistics.median(c[i] for c in costs[m]) for m in MODULES}
        table[kind] = {**medians, "ratio": medians["hooked_hybrid"] / medians["torch"]}
    print(json.dumps(table, indent=1))


if __name__ == "__main__":
    main()
