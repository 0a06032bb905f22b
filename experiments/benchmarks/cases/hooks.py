"""The cost of hooks: idle ones, a cache of everything, one edit of a state, silenced heads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from experiments.benchmarks.bars import PLAIN, STEP
from experiments.benchmarks.child import run_child
from experiments.benchmarks.figures import OURS, Measurement
from experiments.benchmarks.models import ours_prefill, ours_steps, random_tokens, rg_mid
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import interleaved, progress
from hooked_hybrid import HookPoint, interventions

N_CALLS, STEPS = 10_000, 16


def idle_hooks(options: Options) -> Iterator[Measurement]:
    """Measure the calls of hook points in a decoding step, with nothing attached, over the step."""
    model, tokens = rg_mid().ours, random_tokens(options.size(2048, 64))
    state = ours_prefill(model, tokens)[1]
    with counted_calls() as counted:
        model(tokens[:, :1], state=state, return_state=True)
    point, x = HookPoint("batch pos d_model"), torch.randn(1, 1, 512)

    def idle() -> None:
        for _ in range(N_CALLS):
            point(x)

    def empty() -> None:
        for _ in range(N_CALLS):
            pass

    steps = ours_steps(model, tokens, STEPS)
    works = {"idle": idle, "empty": empty, STEP: steps}
    seconds = interleaved(works, options.n_rounds(9), "idle-hooks")
    pairs = zip(seconds["idle"], seconds["empty"], strict=True)
    values = {
        OURS: [counted.n * (a - b) / N_CALLS for a, b in pairs],
        STEP: [s / STEPS for s in seconds[STEP]],
    }
    note = f"{counted.n} calls a step, each as long as in a loop of nothing else"
    yield Measurement("idle-hooks", "all idle points of a step", values, note=note)


class Count:
    """A counter."""

    n = 0


@contextmanager
def counted_calls() -> Iterator[Count]:
    """Count the calls of all hook points, by whichever method a layer calls them."""
    count = Count()

    def counting(method: str) -> Any:
        original = getattr(HookPoint, method)

        def call(self: HookPoint, *args: Any, **settings: Any) -> Tensor:
            count.n += 1
            return original(self, *args, **settings)

        return call

    with (
        patch.object(HookPoint, "__call__", counting("__call__")),
        patch.object(HookPoint, "branch", counting("branch")),
    ):
        yield count


def run_with_cache(options: Options) -> Iterator[Measurement]:
    """Measure a forward that keeps everything: in a warm process, and the first one of a process.

    Everything is what `run_with_cache` keeps by default, without large and lazy values.
    """
    model, tokens = rg_mid().ours, random_tokens(options.size(1024, 64))
    works = {
        OURS: lambda: model.run_with_cache(tokens, return_type=None),
        PLAIN: lambda: model(tokens, return_type=None),
    }
    values = interleaved(works, options.n_rounds(9), "run-with-cache")
    _, cache = model.run_with_cache(tokens, return_type=None)
    mb = sum(t.nbytes for t in cache.values()) / 1e6
    note = f"{tokens.shape[1]} tokens, {len(cache)} values, {mb:.0f} MB"
    del cache
    yield Measurement("run-with-cache", "everything, warm", values, note=note)
    folder = options.scratch / "rg-mid"
    if not folder.exists():
        model.save_pretrained(folder)
    cold: dict[str, list[float]] = {OURS: [], PLAIN: []}
    for _ in progress(range(options.n_rounds(5)), "run-with-cache, cold"):
        found = run_child("cold-cache", folder, tokens.shape[1])
        cold[OURS].append(found["cached"])
        cold[PLAIN].append(found["plain"])
    note = "first call in a fresh process, after plain forwards of the same length"
    yield Measurement("run-with-cache", "everything, first time", cold, note=note)


def state_edit(options: Options) -> Iterator[Measurement]:
    """Measure one edit of a recurrent state in the middle of a long prompt."""
    length = options.size(4096, 128)

    def halve(state: Tensor, hook: HookPoint) -> Tensor:  # noqa: ARG001
        return 0.5 * state

    edit = [("blocks.1.mixer.hook_ssm_state", interventions.hook_at(halve, length // 2))]
    yield from _over_plain("state-edit", f"one position of {length}", edit, length, options)


def top_k(options: Options) -> Iterator[Measurement]:
    """Measure the papers' sparsification of heads, all through a long prompt."""
    length = options.size(4096, 128)
    hooks = interventions.keep_top_heads(2)
    yield from _over_plain("top-k", f"2 of 4 heads, prefill of {length}", hooks, length, options)


def _over_plain(
    case: str, what: str, hooks: list[Any], length: int, options: Options
) -> Iterator[Measurement]:
    model, tokens = rg_mid().ours, random_tokens(length)
    works = {
        OURS: lambda: model.run_with_hooks(tokens, fwd_hooks=hooks, return_type=None),
        PLAIN: lambda: model(tokens, return_type=None),
    }
    yield Measurement(case, what, interleaved(works, options.n_rounds(5), case))
