"""Sweeps on a Ray cluster of several nodes on this machine: the same cells, whatever dies."""

from __future__ import annotations

import copy
import copyreg
import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from torch import Tensor
from typer.testing import CliRunner

from hooked_hybrid import HookPoint
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.evaluation.forms import FORMS
from hooked_hybrid.evaluation.running import Options, evaluate
from hooked_hybrid.harvest import harvest
from hooked_hybrid.interventions import keep_top_heads
from hooked_hybrid.niah.cached_state.sweep import CASES, cached_state
from hooked_hybrid.niah.language import text_loss
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.papers import weight_matrix
from hooked_hybrid.niah.store import FILE, Store
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.runs import ray_workers
from hooked_hybrid.runs.identity.model import model_identity
from hooked_hybrid.runs.ray_actor import Worker, pack_to_bytes, unpack_from_bytes
from hooked_hybrid.runs.ray_workers import RayWorkers
from hooked_hybrid.runs.work import Job, spread
from tests.niah.test_sweep import (
    LENGTHS,
    QUIET,
    all_settings,
    kill_prompts,
    model_of,
    prompts_of,
)

ROOT = Path(__file__).parent.parent.parent


def patiently(start: Callable[[], Any]) -> Any:
    """Start something of Ray's, which gives up after 30 s on a machine that is very busy."""
    for _ in range(2):
        with suppress(Exception):
            return start()
    return start()


class Nodes:
    """A cluster whose nodes can be killed."""

    def __init__(self) -> None:
        os.environ.setdefault("RAY_worker_niceness", "0")  # 15 by default: last on a busy machine
        fast = {"health_check_period_ms": 500, "health_check_failure_threshold": 3}
        head = {"num_cpus": 1, "include_dashboard": False, "_system_config": fast}
        self.cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=head))
        self.nodes = [self.add()]

    def add(self) -> Any:
        return patiently(lambda: self.cluster.add_node(num_cpus=1, wait=False))

    def kill_one(self) -> None:
        self.cluster.remove_node(self.nodes.pop(0), allow_graceful=False)


@pytest.fixture(scope="module", autouse=True)
def checked_functions_may_be_sent() -> Iterator[None]:
    """Let jaxtyping's wrappers, which only tests have, be pickled: they hold weak references."""
    copyreg.pickle(weakref.ReferenceType, lambda r: (weakref.ref, (r(),)))
    yield
    del copyreg.dispatch_table[weakref.ReferenceType]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    found = Nodes()
    ray.init(found.cluster.address, log_to_driver=False, logging_level="ERROR")
    yield found
    ray.shutdown()
    found.cluster.shutdown()


@pytest.fixture(scope="module")
def workers(nodes: Nodes) -> Iterator[RayWorkers]:
    """Two workers that keep the model of the last test."""
    with RayWorkers(nodes.cluster.address, n=2) as found:
        yield found


def settings_of_all_kinds() -> list[Setting]:
    """Hooks in prefill and generation, hooks of each prompt, a function of a user's."""
    return [*all_settings(), *weight_matrix(["keep", "omit"], ["omit"])]


def same_but_for_times(a: pd.DataFrame, b: pd.DataFrame) -> bool:
    return a.drop(columns="seconds").equals(b.drop(columns="seconds"))


def test_workers_give_the_cells_of_one_process_in_its_order(workers: RayWorkers, tmp_path: Path):
    model, prompts = model_of("griffin"), prompts_of("griffin")
    alone = niah(model, prompts, settings_of_all_kinds(), **QUIET)
    spread_out = niah(
        model, prompts, settings_of_all_kinds(), out=tmp_path, workers=workers, **QUIET
    )
    assert len(alone) == len(prompts) * len(settings_of_all_kinds())
    assert same_but_for_times(alone, spread_out)
    with sqlite3.connect(tmp_path / FILE) as kept:
        kept.execute("DELETE FROM cells WHERE length = ?", (LENGTHS[0],))
        kept.execute("UPDATE meta SET value = 1 WHERE key = 'format'")  # which has no digest
        for name in ("real_depth", "placed_between"):  # nor these
            kept.execute(f"ALTER TABLE cells DROP COLUMN {name}")
    resumed = niah(
        model, prompts, settings_of_all_kinds(), out=tmp_path, resume=True, workers=workers, **QUIET
    )
    assert same_but_for_times(alone, resumed)
    later = resumed["length"] != LENGTHS[0]
    assert resumed[later].equals(spread_out[later])  # and not run again: their seconds are the same


def fails_on_the_second_prompt(prompt: Prompt) -> list[Any]:
    def fail(x: Tensor, hook: HookPoint) -> None:
        if prompt.id == prompts_of("griffin")[1].id:
            raise ArithmeticError(f"no {hook.name} for me")

    return [("blocks.0.hook_mlp_out", fail)]


def test_what_a_hook_raises_ends_the_sweep_with_its_words(workers: RayWorkers, tmp_path: Path):
    model, prompts = model_of("griffin"), prompts_of("griffin")
    settings = [Setting("fails", generation=fails_on_the_second_prompt)]
    with pytest.raises(ArithmeticError, match="no blocks.0.hook_mlp_out for me"):
        niah(model, prompts, settings, out=tmp_path, workers=workers, **QUIET)


def test_what_cannot_be_sent_is_refused_before_work(workers: RayWorkers, tmp_path: Path):
    model, prompts = model_of("griffin"), prompts_of("griffin")[:1]
    lock = threading.Lock()

    def held(x: Tensor, hook: HookPoint) -> None:
        with lock:
            pass

    with pytest.raises(ValueError, match="setting 'held' cannot be sent to workers"):
        niah(model, prompts, {"held": [("hook_embed", held)]}, out=tmp_path / "r", workers=workers)
    a_hook, refused = model.hooks([("hook_embed", nap)]), "hook_embed has a hook on it"
    with a_hook, pytest.raises(ValueError, match=refused):
        niah(model, prompts, [Setting("a")], out=tmp_path / "r", workers=workers)
    assert not list(tmp_path.iterdir())


def few_cells(model: Any, prompts: Any, workers: RayWorkers | None) -> list[pd.DataFrame]:
    """The other work that goes to workers: cases of cached state, and the loss of text."""
    settings = top_k_settings([4, 0])
    return [
        cached_state(model, prompts, [2], CASES[:3], workers=workers, **QUIET),
        text_loss(model, settings, 180, 2, workers=workers, verbose=False),
    ]


def test_cached_state_and_the_loss_of_text_are_the_same_on_workers(workers: RayWorkers):
    model, prompts = model_of("griffin"), prompts_of("griffin")
    (cells, losses), (ours, lost) = (few_cells(model, prompts, on) for on in (None, workers))
    assert same_but_for_times(cells, ours)
    assert losses.equals(lost)


def test_a_harvest_has_the_same_bytes_on_workers(workers: RayWorkers, tmp_path: Path):
    tokens = torch.randint(5, 500, (24, 64), generator=torch.Generator().manual_seed(0))
    for name, on in (("alone", None), ("spread", workers)):
        harvest(
            model_of("griffin"),
            tokens,
            "blocks.*.hook_resid_post",
            tmp_path / name,
            context_length=64,
            shard_bytes=2**18,
            fwd_hooks=keep_top_heads(2),
            workers=on,
            verbose=False,
        )
    written = [
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("alone", "spread")
    ]
    assert len(written[0]) > 5
    assert written[0] == written[1]


def test_an_evaluation_is_the_same_on_workers(workers: RayWorkers, tmp_path: Path):
    model, said = model_of("griffin"), []
    options = Options(limit=2, num_fewshot=0)
    here, there = (
        evaluate(
            model,
            "griffin",
            ["needle_choice"],
            [FORMS["base"], FORMS["ablated"]],
            options,
            tmp_path / name,
            say=said.append,
            workers=on,
        )
        for name, on in (("here", None), ("there", workers))
    )
    assert len(here.cells) == 2
    assert [replace(c, seconds=0.0) for c in here.cells] == [
        replace(c, seconds=0.0) for c in there.cells
    ]


def nap(x: Tensor, hook: HookPoint) -> None:
    time.sleep(0.03)


def test_a_killed_node_costs_nothing_but_time(
    nodes: Nodes, workers: RayWorkers, monkeypatch: Any, caplog: Any, tmp_path: Path
):
    model, add, added = model_of("griffin"), Store.add, []
    settings = [*all_settings(), Setting("naps", generation=(("hook_embed", nap),))]
    alone = niah(model, kill_prompts(), settings, **QUIET)

    def add_and_kill(store: Store, cells: Any) -> None:
        add(store, cells)
        added.append(cells)
        if len(added) == 2:
            nodes.kill_one()

    monkeypatch.setattr(Store, "add", add_and_kill)
    with caplog.at_level(logging.WARNING):
        table = niah(model, kill_prompts(), settings, out=tmp_path, workers=workers, **QUIET)
    said = [record.getMessage() for record in caplog.records]
    assert any(s.startswith("a worker died on prompts ") and "(process " in s for s in said)
    assert all(len(s.partition("(")[2]) < 250 for s in said)
    assert same_but_for_times(alone, table)
    nodes.nodes.append(nodes.add())


def test_work_that_kills_its_workers_is_named(workers: RayWorkers, tmp_path: Path):
    model, prompts, here = model_of("griffin"), prompts_of("griffin"), os.getpid()
    deadly = prompts[-1].id

    def hooks(prompt: Prompt) -> list[Any]:
        def die(x: Tensor, hook: HookPoint) -> None:
            if prompt.id == deadly and os.getpid() != here:
                os._exit(1)

        return [("hook_embed", die)]

    with pytest.raises(OSError, match=f"3 workers died one after another on prompts .*{deadly}"):
        niah(model, prompts, [Setting("dies", (), hooks)], out=tmp_path, workers=workers, **QUIET)
    table = niah(model, prompts, [Setting("dies", (), hooks)], out=tmp_path, resume=True, **QUIET)
    assert len(table) == len(prompts)


def test_a_cluster_without_room_is_waited_for_up_to_the_given_time(nodes: Nodes, caplog: Any):
    patient = RayWorkers(nodes.cluster.address, n=1, threads=3, patience=1)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="no room for a worker of 3 CPU and 0 GPU in 1 s"):
        niah(model_of("griffin"), prompts_of("griffin"), [Setting("a")], workers=patient, **QUIET)
    assert 1 <= time.monotonic() - began < 20
    assert "no machine of the cluster has 3 CPU and 0 GPU for a worker: waiting 1 s" in caplog.text
    patient.n = None
    with pytest.raises(ValueError, match="no machine of the cluster has 3 CPU"):
        niah(model_of("griffin"), prompts_of("griffin"), [Setting("a")], workers=patient, **QUIET)


COMMAND = (
    "niah --model tiny-griffin --k 0 --k 4 --lengths 200 --lengths 260 --depths 0 --depths 0.3 "
    "--stages generation --max-new-tokens 8"
)

ONE_AFTER_THE_OTHER = """
import ast, sys
from hooked_hybrid.commands.program import build_app

for words in ast.literal_eval(sys.argv[1]):
    if build_app()(words, standalone_mode=False):
        sys.exit(1)
"""


def test_a_killed_driver_is_resumed_and_ends_as_one_process(tmp_path: Path):
    alone, killed = ([*COMMAND.split(), "--out", str(tmp_path / name)] for name in "ab")
    program = [sys.executable, "-m", "hooked_hybrid.commands.program", *killed]
    driver = subprocess.Popen([*program, "--ray", "local", "--workers", "2"], cwd=ROOT)
    cells = tmp_path / "b" / FILE
    while driver.poll() is None and n_cells(cells) < 2:
        time.sleep(0.05)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL and n_cells(cells) > 0
    both = [alone, [*killed, "--resume"]]  # as users do: code is not checked for types
    subprocess.run([sys.executable, "-c", ONE_AFTER_THE_OTHER, repr(both)], cwd=ROOT, check=True)
    first, second = (pd.read_csv(tmp_path / name / "table.csv") for name in "ab")
    assert same_but_for_times(first, second)


def n_cells(path: Path) -> int:
    """Count cells, of a file that may not be there yet."""
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as kept:
            return kept.execute("SELECT count(*) FROM cells").fetchone()[0]
    except sqlite3.OperationalError:
        return 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--workers 2", "give --ray too"),
        ("--ray local --device cuda", "give --gpus-per-worker"),
        ("--ray ray://a:1", "Ray client"),
    ],
)
def test_options_that_do_not_fit_are_refused(options: str, words: str, tmp_path: Path):
    arguments = [*COMMAND.split(), "--out", str(tmp_path / "r"), *options.split()]
    done = CliRunner().invoke(build_app(), arguments)
    assert done.exit_code == 1 and words in done.output


def test_without_ray_the_remedy_is_named(monkeypatch: Any):
    monkeypatch.setattr(ray_workers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install 'hooked-hybrid\[ray\]'"):
        RayWorkers()


def test_a_worker_refuses_another_model_than_the_callers():
    worker, ours = Worker(), model_identity(model_of("griffin"))
    precision = torch.get_float32_matmul_precision()
    assert model_identity(unpack_from_bytes(pack_to_bytes(model_of("griffin")))) == ours
    for other in (model_of("jamba"), copy.deepcopy(model_of("griffin")).bfloat16()):
        with pytest.raises(ValueError, match="another model"):
            worker.load(lambda: other, ours, 1, precision)  # noqa: B023
    worker.load(lambda: model_of("griffin"), ours, 1, precision)


class _Count(Job[int, int]):
    def __call__(self, model: Any, items: Any) -> Iterator[int]:
        yield from items

    def cost(self, item: int) -> float:
        return float(item)


def test_units_are_cut_where_they_are_long_and_the_costliest_come_first():
    units = [[1] * 4, [5] * 8, [2], []]
    pieces = spread(_Count(), units, 5)
    costs = [sum(piece) for piece in pieces]
    assert costs == sorted(costs, reverse=True) and max(costs) <= 15
    assert sorted(item for piece in pieces for item in piece) == sorted(chain(*units))
    assert all(len(set(piece)) == 1 for piece in pieces)
