"""Each option of a command reaches what the command does, and is refused where nothing reads it."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner, Result

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands.program import COMMANDS, build_app

APP = build_app()


class ReachedError(ValueError):
    """Raised in place of a command's work, with what it was given."""


def options_of(command: str) -> set[str]:
    """Return the parameters of a command."""
    function = getattr(import_module(COMMANDS[command]), command.replace("-", "_"))
    return set(inspect.signature(function).parameters) - {"context"}


def run(*arguments: str) -> Result:
    return CliRunner().invoke(APP, list(arguments))


# --- the options of a run: each reaches what follows ----------------------------------------------

RUN = {
    "model": ["--model", "tiny-jamba"],
    "out": ["--out", "other"],
    "resume": ["--resume"],
    "device": ["--device", "meta"],
    "dtype": ["--dtype", "bfloat16"],
    "quantize": ["--quantize", "int8"],
    "device_map": ["--device-map", '{"": "cpu"}'],
    "max_memory": ["--device-map", "auto", "--max-memory", "cpu=1GB"],
    "offload_folder": ["--device-map", "auto", "--offload-folder", "kept"],
    "threads": ["--threads", "2"],
    "ray": ["--ray", "auto"],
    "workers": ["--ray", "auto", "--workers", "3"],
    "gpus_per_worker": ["--ray", "auto", "--gpus-per-worker", "0.5"],
}
PROMPTS = {
    "lengths": ["--lengths", "200"],
    "depths": ["--depths", "0.5"],
    "haystack": ["--haystack", "essay.txt"],
    "needle": ["--needle", "held-out"],
    "n_needles": ["--needle", "held-out", "--n-needles", "2"],
    "template": ["--template", "instruct"],
    "distractors": ["--distractors", "1"],
    "seed": ["--seed", "1"],
    "max_new_tokens": ["--max-new-tokens", "9"],
}
FIRST = {"first_token": ["--first-token", "generation"]}
KS = {"k": ["--k", "1"]}
AFTER = {"thesis_depth": ["--thesis-depth"], "texts": ["--texts", "3"]}
"""What is read once the cells are there."""
SWEEPS: dict[str, dict[str, list[str]]] = {
    "niah": {
        **KS,
        "stages": ["--stages", "both"],
        "score": ["--score", "l2"],
        "read_twice": ["--read-twice"],
        **FIRST,
        "thesis_depth": AFTER["thesis_depth"],
    },
    "read-twice": {**KS, **FIRST, **AFTER},
    "weights": {"follow": ["--follow"], **FIRST, **AFTER},
    "layers": {**FIRST, **AFTER},
    "heads": {**FIRST, **AFTER},
    "controls": {**KS, "draws": ["--draws", "2"], **FIRST, **AFTER},
    "static": {
        "k": ["--k", "2"],
        "draws": ["--draws", "2"],
        "scored_on": ["--scored-on", "2"],
        **FIRST,
        **AFTER,
    },
    "cached-state": {**KS, "thesis_depth": AFTER["thesis_depth"]},
}
OTHERS: dict[str, dict[str, list[str]]] = {
    "eval": {
        "tasks": ["--tasks", "needle_choice"],
        "form": ["--form", "sparse"],
        "k": ["--k", "3"],
        "stage": ["--stage", "generation"],
        "num_fewshot": ["--num-fewshot", "2"],
        "limit": ["--limit", "3"],
        "chat": ["--chat"],
        "batch_size": ["--batch-size", "4"],
        "max_length": ["--max-length", "64"],
        "include_path": ["--include-path", "."],
    },
    "harvest": {
        "texts": ["--texts", "lines.jsonl"],
        "hook": ["--hook", "hook_embed"],
        "field": ["--field", "content"],
        "n_documents": ["--n-documents", "1"],
        "context_length": ["--context-length", "16"],
        "batch_size": ["--batch-size", "2"],
        "write": ["--write", "bfloat16"],
        "shard_megabytes": ["--shard-megabytes", "1"],
        "prepend_bos": ["--no-prepend-bos"],
        "keep_special": ["--keep-special"],
        "seed": ["--seed", "1"],
        "k": ["--k", "2"],
    },
    "reproduce": {
        "paper": ["--paper", "thesis2025"],
        "only": ["--only", "Table 6.1"],
        "list_items": ["--list"],
        "quick": ["--quick"],
        "lengths": ["--lengths", "200"],
        "depths": ["--depths", "0.5"],
        "held_out": ["--held-out", "1"],
        "seeds": ["--seeds", "3"],
        "haystack": ["--haystack", "essay.txt"],
        "template": ["--template", "instruct"],
        "first_token": ["--first-token", "generation"],
        "include_path": ["--include-path", "."],
        "thesis_depth": ["--no-thesis-depth"],
    },
    "parameters": {"model": ["--model", "tiny-jamba"], "out": ["--out", "other"]},
    "compute": {
        "model": ["--model", "tiny-jamba"],
        "max_length": ["--max-length", "64"],
        "batch": ["--batch", "2"],
        "logits": ["--logits", "all"],
        "out": ["--out", "other"],
    },
    "plan": {
        "model": ["--model", "tiny-jamba"],
        "gpus": ["--gpus", "1x2GB"],
        "cpu": ["--cpu", "3GB"],
        "disk": ["--gpus", "1x2GB", "--disk"],
        "lengths": ["--lengths", "64"],
        "batch": ["--batch", "2"],
        "dtype": ["--dtype", "float32"],
        "quantize": ["--quantize", "int8"],
        "as_json": ["--json"],
    },
}


def known(command: str) -> set[str]:
    if command in SWEEPS:
        return {*RUN, *PROMPTS, *SWEEPS[command]}
    return {*(RUN if command in ("eval", "harvest", "reproduce") else ()), *OTHERS[command]}


@pytest.mark.parametrize("command", COMMANDS)
def test_each_option_of_a_command_stands_in_the_table(command):
    assert options_of(command) == known(command)


@pytest.fixture
def reached(monkeypatch, tmp_path) -> Iterator[list[str]]:
    """Stop every command where its work would begin, and say what it was given."""
    monkeypatch.chdir(tmp_path)
    Path("essay.txt").write_text("A short essay about nothing at all. " * 200)
    Path("lines.jsonl").write_text('{"text": "a cat", "content": "two dogs"}\n{"text": "a fish"}\n')
    seen: list[str] = []
    tiny = HookedHybrid.from_pretrained("tiny-griffin")

    def stop(*given: Any, **named: Any) -> Any:
        seen.append(described((given, named)))
        raise ReachedError("reached")

    def load(*given: Any, **named: Any) -> HookedHybrid:
        seen.append(described((given, named)))
        return tiny

    monkeypatch.setattr(HookedHybrid, "from_pretrained", load)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: seen.append(f"{n} threads"))
    monkeypatch.setattr("hooked_hybrid.commands.accounting.compute_figure", lambda *_: None)
    monkeypatch.setattr("hooked_hybrid.commands.accounting.save_figure", lambda *_: [])
    for module, name in (
        ("commands.niah", "run_sweep"),
        ("commands.niah_experiments", "run_sweep"),
        ("commands.cached_state", "run_cases"),
        ("commands.evaluation", "evaluate"),
        ("commands.harvest", "run_harvest"),
        ("commands.papers", "walk"),
        ("commands.ray_options", "RayWorkers"),
    ):
        monkeypatch.setattr(f"hooked_hybrid.{module}.{name}", stop)
    return seen


def described(value: Any) -> str:
    """Return arguments as text: iterators by what they yield, models by nothing."""
    if isinstance(value, HookedHybrid):
        return "model"
    if isinstance(value, dict):
        return str({k: described(v) for k, v in value.items()})
    if isinstance(value, tuple | list) or hasattr(value, "__next__"):
        return str([described(v) for v in value])
    if hasattr(value, "func"):
        return described((value.func, value.keywords))
    if hasattr(value, "spec"):
        return str((value.name, value.spec))
    if hasattr(value, "tokens") and hasattr(value, "id"):
        return value.id
    return str(getattr(value, "__qualname__", None) or value)


SMALL = ["--lengths", "150", "--depths", "0"]
BASE = {
    "niah": SMALL,
    "layers": SMALL,
    "read-twice": ["--lengths", "250", "--depths", "0"],
    "weights": SMALL,
    "heads": SMALL,
    "controls": SMALL,
    "static": [*SMALL, "--scored-on", "1", "--k", "1", "--draws", "1"],
    "cached-state": SMALL,
    "eval": ["--tasks", "needle_choice"],
    "harvest": ["--texts", "lines.jsonl", "--hook", "blocks.0.hook_resid_pre"],
    "reproduce": ["--paper", "sllm2025", "--quick"],
}
REQUIRED = {"tasks", "texts", "hook", "paper", "quick"}


def effect(command: str, more: list[str], reached: list[str]) -> tuple[str, list[str], str]:
    """Return what a command says and hands on."""
    reached.clear()
    base = [a for a in BASE.get(command, [])]
    for option in (o for o in more if o.startswith("--") and o in base):
        at = base.index(option)
        del base[at : at + 2]
    result = run(command, *base, *more)
    return result.output, list(reached), str(result.exit_code)


REACHED = [(o, g) for o, g in {**RUN, **PROMPTS, **SWEEPS["niah"]}.items() if o not in AFTER]


def test_an_option_of_a_sweep_reaches_it(reached):
    """Of `niah`: the others' run, prompts and settings are made by the same groups."""
    before = effect("niah", [], reached)
    assert "reached" in before[0]
    for option, given in REACHED:
        after = effect("niah", given, reached)
        assert before != after, option


def test_an_option_of_an_account_changes_what_is_printed(reached, tmp_path):
    for command in ("parameters", "compute", "plan"):
        for i, (option, given) in enumerate(OTHERS[command].items()):
            plain = {"--model": "tiny-griffin"}
            if command == "plan" and option not in ("gpus", "disk"):
                plain |= {"--cpu": "2GB"}
            if option == "disk":
                plain |= {"--gpus": "1x2GB"}
            if command == "compute":
                plain |= {"--max-length": "32"}
            base = [word for pair in plain.items() for word in pair]
            out = [["--out", f"{side}{i}"] if command == "compute" else [] for side in "ab"]
            if option == "out":
                assert run(command, *base, *given).exit_code == 0
                assert any((tmp_path / "other").iterdir())
                continue
            more = [w for w in given if w not in plain or w == given[-1]]
            before, after = (
                run(command, *base, *o, *m) for o, m in zip(out, ([], more), strict=True)
            )
            assert before.output.replace("a", "") != after.output.replace("b", ""), option


# --- what has no effect ---------------------------------------------------------------------------

THESIS = ["--paper", "thesis2025"]
IDLE: list[tuple[str, list[str], str]] = [
    ("niah", ["--workers", "2"], "--workers"),
    ("niah", ["--gpus-per-worker", "1"], "--gpus-per-worker"),
    ("niah", ["--max-memory", "cpu=1GB"], "--max-memory"),
    ("niah", ["--offload-folder", "kept"], "--offload-folder"),
    ("niah", ["--device-map", "auto", "--device", "meta"], "--device"),
    ("niah", ["--ray", "auto", "--gpus-per-worker", "1", "--device", "cpu"], "--device"),
    ("niah", ["--ray", "auto", "--gpus-per-worker", "1", "--device", "cuda:1"], "--device"),
    ("niah", ["--ray", "auto", "--device", "meta"], "--device"),
    ("niah", ["--n-needles", "2"], "--n-needles"),
    ("niah", ["--needle", "none", "--thesis-depth"], "--thesis-depth"),
    ("niah", ["--haystack", "essay.txt", "--seed", "1"], "--seed"),
    ("layers", ["--needle", "none"], "--needle"),
    ("cached-state", ["--needle", "none"], "--needle"),
    ("harvest", ["--texts", "essay.txt", "--hook", "hook_embed", "--field", "text"], "field"),
    ("reproduce", [*THESIS, "--list", "--quick"], "--quick"),
    ("reproduce", [*THESIS, "--list", "--model", "tiny-jamba"], "--model"),
    ("reproduce", ["--paper", "thesis2025", "--only", "Table 2.1", "--lengths", "9"], "--lengths"),
    (
        "reproduce",
        ["--paper", "thesis2025", "--only", "Table 6.1", "--include-path", "."],
        "include",
    ),
]


def test_an_option_without_effect_is_refused(reached):
    for command, arguments, option in IDLE:
        result = run(command, *arguments)
        said = " ".join(result.output.split())
        assert result.exit_code == 1 and "error: " in said and option in said, (arguments, said)
        assert "reached" not in said


def test_a_default_given_explicitly_is_distinguished_from_one_left_out(reached):
    ray = ["--ray", "auto", "--gpus-per-worker", "1"]
    assert "reached" in run("niah", *ray).output
    assert "--device has no effect" in run("niah", *ray, "--device", "cpu").output
