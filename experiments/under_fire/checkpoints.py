"""Damaged checkpoints, each loaded in its own process, whose memory the parent process measures.

Source: none; the bounds are the project's own. Run `python -m experiments.under_fire.checkpoints
--count 5000 --out results.json`; `--only 17` loads the one mutant again and prints its error.
"""

from __future__ import annotations

import argparse
import json
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from tqdm import tqdm

from experiments.under_fire import damage, damage_headers, damage_pickles, damage_settings
from experiments.under_fire.bases import Base, make_bases
from experiments.under_fire.memory import private_bytes
from hooked_hybrid import HookedHybrid
from weights_conversion import CheckpointError
from weights_conversion.sources import open_checkpoint

MUTATIONS = {
    **damage.MUTATIONS,
    **damage_headers.MUTATIONS,
    **damage_settings.MUTATIONS,
    **damage_pickles.MUTATIONS,
}
SECONDS = 10
"""Seconds after which a load counts as hanging."""
MEMORY = 1.5
"""Memory limit of a load, in multiples of the size of the checkpoint's files."""
ALLOWANCE = 8 * 2**20
"""Further bytes of that limit: Python's objects, and torch's first buffers in a new process."""
POLL = 0.001
TEXT = "the pass key is 7"


class Watched:
    """The result of one load: the child's report, how it ended, and its peak memory."""

    def __init__(self, path: Path, base: Base, reference: dict[str, Any] | None) -> None:
        self.report: dict[str, Any] = {}
        with tempfile.TemporaryFile() as file:
            pid = os.fork()
            if not pid:  # the child reports and exits, whatever happens
                code = 1
                try:
                    pickle.dump(_loaded(path, base, reference), file)
                    file.flush()
                    code = 0
                finally:
                    os._exit(code)
            self.status, self.peak, self.seconds = _watch(pid)
            file.seek(0)
            if os.waitstatus_to_exitcode(self.status) == 0:
                self.report = pickle.load(file)


def _watch(pid: int) -> tuple[int, int, float]:
    """Return exit status, growth of private memory [bytes] and seconds of a child process."""
    start = time.perf_counter()
    first = peak = private_bytes(pid)
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        elapsed = time.perf_counter() - start
        if done:
            return status, peak - first, elapsed
        if elapsed > SECONDS:
            os.kill(pid, signal.SIGKILL)
        peak = max(peak, private_bytes(pid))
        time.sleep(POLL)


def _loaded(path: Path, base: Base, reference: dict[str, Any] | None) -> dict[str, Any]:
    """Load a checkpoint and return the outcome."""
    try:
        model = HookedHybrid.from_pretrained(path, dtype=base.dtype)
    except BaseException as error:  # any error is a result
        return {"error": type(error), "message": str(error), "trace": traceback.format_exc()}
    weights = model.state_dict()
    report: dict[str, Any] = {
        "is_finite": all(bool(torch.isfinite(w).all()) for w in weights.values()),
        "is_same": reference is not None
        and {name: _digest(w) for name, w in weights.items()} == reference,
    }
    try:
        with torch.no_grad():
            logits = model(torch.arange(3, 15)[None] % model.cfg.d_vocab)
            report["has_finite_logits"] = bool(torch.isfinite(logits).all())
            if model.tokenizer is not None:
                model.to_string(model.to_tokens(TEXT))
    except BaseException as error:
        report["use_error"], report["use_trace"] = repr(error), traceback.format_exc()
    return report


def _digest(weight: torch.Tensor) -> bytes:
    return weight.contiguous().view(torch.uint8).numpy().tobytes()


def verdict(watched: Watched, expected: str, n_bytes: int, ran: bool, words: set[str]) -> list[str]:
    """Return the faults of a load's outcome; empty if there are none."""
    report, wrong = watched.report, []
    if os.WIFSIGNALED(watched.status):
        number = os.WTERMSIG(watched.status)
        wrong.append("hang" if number == signal.SIGKILL else f"crash: signal {number}")
    elif not report:
        wrong.append("crash: no report")
    if ran:
        wrong.append("code was run")
    if watched.peak > MEMORY * n_bytes + ALLOWANCE:
        wrong.append(f"memory: {watched.peak / n_bytes:.2f} times the files")
    if "error" in report:
        if not issubclass(report["error"], CheckpointError | OSError | MemoryError):
            wrong.append(f"error of type {report['error'].__name__}")
        if not any(word in report["message"] for word in words):
            wrong.append("error that names neither file, tensor nor setting")
        return wrong
    if report and expected == "refused":
        wrong.append("not refused")
    if report and expected == "same" and not report["is_same"]:
        wrong.append("loaded as other numbers")
    if report and not report["is_finite"]:
        wrong.append("weights that are not finite")
    if report and not report.get("has_finite_logits"):
        wrong.append("logits that are not finite")
    if "use_error" in report:
        wrong.append(f"fails when it is used: {report['use_error'][:200]}")
    return wrong


class Range:
    """The bases in a folder, and mutants of them by number."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.bases = make_bases(folder / "whole")
        self.references: dict[str, dict[str, Any]] = {}
        self.words: dict[str, set[str]] = {}
        for base in self.bases:
            model = HookedHybrid.from_pretrained(base.folder, dtype=base.dtype)
            model(torch.arange(3, 5)[None])  # so that all code is loaded before the fork
            self.references[base.name] = {n: _digest(w) for n, w in model.state_dict().items()}
            self.words[base.name] = _words(base)

    def shoot(self, number: int) -> dict[str, Any]:
        """Damage a copy, load it, and return the outcome."""
        rng = Random(f"{self.seed}-{number}")
        kind = list(MUTATIONS)[number % len(MUTATIONS)]
        copy = self.folder / f"mutant-{number}"
        try:
            base, done = self._damaged(copy, kind, rng)
            n_bytes = max(_n_bytes(copy), _n_bytes(base.folder))
            watched = Watched(copy, base, self.references[base.name])
            ran = (copy / "ran").exists()
        finally:
            shutil.rmtree(copy, ignore_errors=True)
        wrong = verdict(watched, done.expected, n_bytes, ran, self.words[base.name])
        report = watched.report
        return {
            "number": number,
            "kind": kind,
            "base": base.name,
            "what": done.what,
            "expected": done.expected,
            "outcome": "refused" if "error" in report else "loaded",
            "is_same": bool(report.get("is_same")),
            "error": report["error"].__name__ if "error" in report else None,
            "message": report.get("message"),
            "seconds": watched.seconds,
            "memory": watched.peak / n_bytes,
            "wrong": wrong,
            "trace": report.get("trace") or report.get("use_trace"),
        }

    def _damaged(self, copy: Path, kind: str, rng: Random) -> tuple[Base, damage.Damage]:
        """Return the base of a mutant and the damage to its copy."""
        while True:
            base = rng.choice(self.bases)
            shutil.copytree(base.folder, copy)
            done = MUTATIONS[kind](copy, rng)
            if done is not None:
                return base, done
            shutil.rmtree(copy)


def _n_bytes(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.iterdir())


def _words(base: Base) -> set[str]:
    """Return the words that an error may name: files, tensors (ours or theirs) and settings."""
    words = {path.name for path in base.folder.iterdir()} | {"mutant-", "extra", "model.layers."}
    if (config := base.folder / "config.json").exists():
        words |= set(json.loads(config.read_text()))
    return words | set(open_checkpoint(base.folder).tensors().shapes)


def summary(results: list[dict[str, Any]]) -> dict[str, Any]:
    """Return counts and extremes by kind of mutation, and every mutant with a fault."""
    by_kind: dict[str, Any] = {}
    for kind in MUTATIONS:
        of_kind = [r for r in results if r["kind"] == kind]
        if of_kind:
            by_kind[kind] = {
                "mutants": len(of_kind),
                "refused": sum(r["outcome"] == "refused" for r in of_kind),
                "loaded the same": sum(r["is_same"] for r in of_kind),
                "wrong": sum(bool(r["wrong"]) for r in of_kind),
                "slowest [s]": round(max(r["seconds"] for r in of_kind), 3),
                "most memory [files]": round(max(r["memory"] for r in of_kind), 3),
            }
    return {
        "mutants": len(results),
        "refused": sum(r["outcome"] == "refused" for r in results),
        "errors": dict(Counter(r["error"] for r in results if r["error"])),
        "wrong": [r for r in results if r["wrong"]],
        "by_kind": by_kind,
    }


def main(arguments: list[str] | None = None) -> int:
    """Run the mutants, print the summary, and return 1 if any had a fault, else 0."""
    parser = argparse.ArgumentParser(prog="python -m experiments.under_fire.checkpoints")
    parser.add_argument("--count", type=int, default=5000, help="mutants")
    parser.add_argument("--first", type=int, default=0, help="the number of the first")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", type=int, help="the number of one mutant, shown whole")
    parser.add_argument("--out", type=Path, help="JSON file for the summary")
    args = parser.parse_args(arguments)
    torch.set_num_threads(1)  # a forked child has none of its parent's threads
    with tempfile.TemporaryDirectory(dir=_fast_folder()) as folder:
        (Path(folder) / "whole").mkdir()
        mutants = Range(Path(folder), args.seed)
        if args.only is not None:
            print(json.dumps(result := mutants.shoot(args.only), indent=1))
            print(result["trace"])
            return int(bool(result["wrong"]))
        results = []
        for i in tqdm(range(args.first, args.first + args.count), disable=None):
            results.append(result := mutants.shoot(i))
            if result["wrong"]:
                tqdm.write(f"{i}: {result['what']}: {result['wrong']}", file=sys.stderr)
    found = summary(results)
    text = json.dumps(found, indent=1)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)
    return int(bool(found["wrong"]))


def _fast_folder() -> str | None:
    """Return a folder in memory if there is one."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


if __name__ == "__main__":
    sys.exit(main())
