"""The sweep engine: batched and shared work gives what one run at a time gives."""

from __future__ import annotations

import copy
import itertools
import sqlite3
import subprocess
import sys
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookNameError, HookPoint
from hooked_hybrid.niah.haystacks.word_tokenizer import word_tokenizer
from hooked_hybrid.niah.haystacks.words import vocabulary
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt, grid
from hooked_hybrid.niah.store import FILE, read_cells
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.runs.identity.model import weights_hash
from tests.models import griffin_config, jamba_config, random_model

QUIET: dict[str, Any] = {"verbose": False, "max_new_tokens": 4}
LENGTHS = (70, 84)
DEPTHS = (0.0, 0.5, 1.0)


@cache
def model_of(name: str) -> HookedHybrid:
    sizes = {"d_vocab": len(vocabulary())}
    cfg = griffin_config(n_keys=58, **sizes) if name == "griffin" else jamba_config(**sizes)
    model = random_model(cfg)
    model.tokenizer = word_tokenizer()
    return model


@cache
def prompts_of(name: str) -> tuple[Prompt, ...]:
    return tuple(grid(model_of(name), [PAPER], LENGTHS, DEPTHS))


def halve_mlp(x: Tensor, hook: HookPoint) -> Tensor:
    return 0.5 * x


def all_settings() -> list[Setting]:
    user = Setting("half an mlp", generation=(("blocks.1.hook_mlp_out", halve_mlp),))
    return [Setting("none"), *top_k_settings([0, 2, 4]), user]


models = pytest.mark.parametrize("name", ["griffin", "jamba"])


@models
@pytest.mark.parametrize("first", ["prefill", "generation"])
def test_batched_settings_with_shared_prefill_equal_one_run_at_a_time(name: str, first: Any):
    model, prompts = model_of(name), prompts_of(name)
    table = niah(model, prompts, all_settings(), first_token_stage=first, **QUIET)
    assert len(table) == len(prompts) * 8
    outputs = {(r.prompt_id, r.setting): r for r in table.itertuples()}
    for prompt, setting in itertools.product(prompts, all_settings()):
        alone = model.generate(
            torch.tensor([prompt.tokens]),
            4,
            prefill_hooks=setting.prefill,
            generation_hooks=setting.generation,
            first_token_stage=first,
            return_type="output",
            verbose=False,
        )
        cell = outputs[prompt.id, setting.name]
        assert abs(cell.min_margin - float(alone.margins.min())) < 1e-4
        if cell.min_margin > 1e-4:
            assert cell.output == alone.text[0]
    assert table.min_margin.gt(1e-4).mean() > 0.9


def test_one_new_token_in_prefill_is_chosen_under_the_hooks_of_prefill():
    """No generation follows, so its hooks are left out; a setting with no others is refused."""
    model, prompts = model_of("griffin"), prompts_of("griffin")[:2]
    both, generation = top_k_settings([0], stages=("both",)), top_k_settings([0], ("generation",))
    table = niah(model, prompts, [Setting("none"), *both], max_new_tokens=1, verbose=False)
    for cell in table[table.setting == "both k=0"].itertuples():
        tokens = torch.tensor([next(p for p in prompts if p.id == cell.prompt_id).tokens])
        with model.hooks(both[0].prefill):
            logits = model(tokens, stage="prefill")[0, -1].topk(2).values
        assert cell.min_margin == pytest.approx(float(logits[0] - logits[1]), abs=1e-5)
    with pytest.raises(ValueError, match="'generation k=0' has hooks for generation only"):
        niah(model, prompts, [Setting("none"), *generation], max_new_tokens=1, verbose=False)


def test_tokens_that_prompts_share_are_run_once():
    model = model_of("griffin")
    prompts = grid(model, [PAPER], [250], DEPTHS)
    read: list[int] = []

    def count(x: Tensor, hook: HookPoint) -> None:
        if hook.run.stage == "prefill":
            read.append(x.shape[0] * x.shape[1])

    with model.hooks([("hook_embed", count)]):
        niah(model, prompts, [Setting("none")], **QUIET)
    beginnings = {p.tokens[:i] for p in prompts for i in range(1, p.length)}
    assert sum(read) == len(beginnings) + len(prompts)  # the last token is read for each prompt
    assert sum(read) < 0.9 * sum(p.length for p in prompts)


def test_settings_may_be_given_as_names_and_hooks():
    model, prompts = model_of("griffin"), prompts_of("griffin")[:2]
    table = niah(
        model, prompts, {"plain": [], "half": [("blocks.1.hook_mlp_out", halve_mlp)]}, **QUIET
    )
    assert sorted(table.setting.unique()) == ["half", "plain"]
    both = niah(model, prompts, [Setting("plain")], **QUIET)
    plain = table[table.setting == "plain"]
    assert list(plain.output) == list(both.output)


def test_cells_say_where_the_needle_was_and_whether_the_window_reaches_it():
    model, prompts = model_of("griffin"), prompts_of("griffin")
    table = niah(model, prompts, [Setting("none")], **QUIET).set_index("prompt_id")
    for prompt in prompts:
        cell = table.loc[prompt.id]
        assert (cell.needle_start, cell.needle_stop) == prompt.needle_spans[0]
        assert cell.in_window == (prompt.needle_spans[0][0] >= prompt.length - 58)
        assert (cell.length, cell.depth) == (prompt.length, prompt.depth)
    assert table.in_window.any() and not table.in_window.all()
    assert table.accuracy.between(0, 1).all()


def same_but_for_times(a: Any, b: Any) -> bool:
    by = ["prompt_id", "setting"]
    a, b = (t.drop(columns="seconds").sort_values(by).reset_index(drop=True) for t in (a, b))
    return a.equals(b)


def test_a_finished_run_resumes_to_itself_and_another_experiment_is_refused(tmp_path: Path):
    model, prompts = model_of("griffin"), prompts_of("griffin")[:4]
    first = niah(model, prompts, all_settings(), out=tmp_path / "r", **QUIET)
    again = niah(model, prompts, all_settings(), out=tmp_path / "r", resume=True, **QUIET)
    assert first.equals(again)
    with pytest.raises(FileExistsError, match="resume"):
        niah(model, prompts, all_settings(), out=tmp_path / "r", **QUIET)
    others: list[tuple[Any, Any, dict[str, Any], str]] = [
        (model, prompts, {"settings": all_settings()[:2]}, "setting '.*': left out"),
        (model, prompts[:2], {"settings": all_settings()}, "the prompts"),
        (model_of("jamba"), prompts, {"settings": all_settings()}, "another experiment: config "),
    ]
    for other, its_prompts, options, message in others:
        with pytest.raises(ValueError, match=message):
            niah(other, its_prompts, out=tmp_path / "r", resume=True, **options, **QUIET)
    assert len(list((tmp_path / "r").iterdir())) == 1
    read = read_cells(tmp_path / "r")
    by = ["prompt_id", "setting"]
    pd.testing.assert_frame_equal(
        *(table.sort_values(by, ignore_index=True) for table in (read, first))
    )
    with pytest.raises(FileNotFoundError, match="give the folder of a sweep"):
        read_cells(tmp_path)
    kept = sqlite3.connect(tmp_path / "r" / FILE)
    assert kept.execute("SELECT count(*) FROM cells").fetchone() == (len(first),)


def test_one_number_of_one_weight_makes_it_another_model(tmp_path: Path):
    model, prompts = copy.deepcopy(model_of("griffin")), prompts_of("griffin")[:1]
    assert weights_hash(model) == weights_hash(model_of("griffin"))
    niah(model, prompts, [Setting("a")], out=tmp_path / "r", **QUIET)
    with torch.no_grad():
        model.blocks[2].attn.o.weight[5, 3] += 1e-6
    with pytest.raises(ValueError, match="another experiment: the weights; give"):
        niah(model, prompts, [Setting("a")], out=tmp_path / "r", resume=True, **QUIET)


def test_an_empty_folder_may_be_resumed(tmp_path: Path):
    prompts = prompts_of("griffin")[:1]
    table = niah(model_of("griffin"), prompts, [Setting("a")], out=tmp_path, resume=True, **QUIET)
    assert len(table) == 1


def test_errors_come_before_any_prompt_is_run(tmp_path: Path):
    model, prompts = model_of("griffin"), prompts_of("griffin")[:1]
    ran: list[int] = []
    with model.hooks([("hook_embed", lambda x, hook: ran.append(1))]):
        with pytest.raises(ValueError, match="no prompts"):
            niah(model, [], [Setting("a")], **QUIET)
        with pytest.raises(ValueError, match="own name"):
            niah(model, prompts, [Setting("a"), Setting("a")], **QUIET)
        with pytest.raises(HookNameError, match="hook_mlp_out"):
            niah(model, prompts, {"a": [("blocks.1.hook_mlp_uot", halve_mlp)]}, **QUIET)
        with pytest.raises(ValueError, match="stages"):
            top_k_settings([1], ["decode"])
    assert not ran and not list(tmp_path.iterdir())


KILL = textwrap.dedent(
    """
    import os, random, signal, sqlite3, sys, time
    from pathlib import Path
    import torch
    torch.set_num_threads(1)  # and no work before a fork: a thread pool would not survive it
    sys.path.insert(0, {root!r})
    from jaxtyping import install_import_hook
    from tests import checking
    checking.put_off()
    install_import_hook("hooked_hybrid", "tests.checking.when_called")  # hooks count by their code
    from tests.niah.test_sweep import QUIET, all_settings, kill_prompts, model_of
    from hooked_hybrid.niah.sweep import niah
    model, prompts, settings = model_of("griffin"), kill_prompts(10), all_settings()

    def start(folder):
        child = os.fork()
        if not child:
            niah(model, prompts, settings, out=folder, resume=True, **QUIET)
            os._exit(0)
        return child

    def has_kept_a_prompt():
        for store in Path(sys.argv[1]).glob("[1-9]*/cells.sqlite"):
            with sqlite3.connect(store) as cells:
                tables = cells.execute("SELECT count(*) FROM sqlite_master WHERE name = 'cells'")
                if tables.fetchone()[0] and cells.execute("SELECT 1 FROM cells").fetchone():
                    return True
        return False

    begun = time.perf_counter()
    os.waitpid(start(sys.argv[1] + "/0"), 0)
    longest, rng = (time.perf_counter() - begun) / 8, random.Random(0)
    kills, folder = 0, 1
    while kills < 30 or (kills < 90 and not has_kept_a_prompt()):  # on a slow machine: some more
        child = start(f"{{sys.argv[1]}}/{{folder}}")
        time.sleep(rng.uniform(0, longest))
        os.kill(child, signal.SIGKILL)
        was_killed = os.WIFSIGNALED(os.waitpid(child, 0)[1])
        kills += was_killed
        folder += not was_killed  # it was done before: the next one begins anew
        longest *= 1.05  # so that some prompt ends, however slow the machine is now
    """
)


@cache
def kill_prompts(n_depths: int = 20) -> tuple[Prompt, ...]:
    depths = [i / (n_depths - 1) for i in range(n_depths)]
    return tuple(grid(model_of("griffin"), [PAPER], LENGTHS, depths))


def test_a_run_killed_at_30_random_instants_ends_as_an_undisturbed_one(tmp_path: Path):
    root = str(Path(__file__).parent.parent.parent)
    subprocess.run([sys.executable, "-c", KILL.format(root=root), tmp_path], check=True)
    undisturbed, *disturbed = sorted(tmp_path.iterdir(), key=lambda folder: int(folder.name))
    prompts, n_settings, n_kept = kill_prompts(10), len(all_settings()), 0
    for folder in disturbed:
        with sqlite3.connect(folder / FILE) as kept:
            rows = kept.execute("SELECT count(*) FROM cells GROUP BY prompt_id").fetchall()
        assert all(n == n_settings for (n,) in rows)
        n_kept += len(rows)
    assert n_kept
    whole, *ends = (
        niah(model_of("griffin"), prompts, all_settings(), out=folder, resume=True, **QUIET)
        for folder in (undisturbed, *disturbed)
    )
    assert len(whole) == len(prompts) * n_settings
    assert all(same_but_for_times(end, whole) for end in ends)
