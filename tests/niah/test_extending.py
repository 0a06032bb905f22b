"""A sweep that is gone on with under more settings and prompts keeps its finished cells."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import Tensor

from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.niah.cached_state import CASES, cached_state
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt, grid
from hooked_hybrid.niah.scores import scorer
from hooked_hybrid.niah.settings.setting import Setting, top_k_settings
from hooked_hybrid.niah.store import FILE, Store, read_cells
from hooked_hybrid.niah.sweep import niah
from tests.niah.test_sweep import model_of

QUIET: dict[str, Any] = {"max_new_tokens": 3, "verbose": False}
MODEL = model_of("griffin")
FEW = grid(MODEL, [PAPER], [120], [0.0, 1.0])
MORE = grid(MODEL, [PAPER], [100, 120], [0.0, 0.5, 1.0])
SETTINGS = [Setting("none"), *top_k_settings([0, 1])]


def halve(x: Tensor, hook: HookPoint) -> Tensor:
    return x / 2


def double(x: Tensor, hook: HookPoint) -> Tensor:
    return 2 * x


def of(hook: Any) -> Setting:
    return Setting("mine", (("hook_embed", hook),), (("hook_embed", hook),))


def run(folder: Path | None, prompts: list[Prompt], settings: list[Setting], **options: Any) -> Any:
    resume = folder is not None and folder.exists()
    return niah(MODEL, prompts, settings, out=folder, resume=resume, **QUIET, **options)


def without_times(table: pd.DataFrame) -> pd.DataFrame:
    return table.drop(columns="seconds")


def assert_same_cells(a: pd.DataFrame, b: pd.DataFrame) -> None:
    pd.testing.assert_frame_equal(without_times(a), without_times(b), rtol=1e-3, atol=1e-3)


def added_by(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    added: list[tuple[str, str]] = []
    add = Store.add

    def count(store: Store, cells: Any) -> None:
        add(store, cells)
        added.extend((cell["prompt_id"], cell["setting"]) for cell in cells)

    monkeypatch.setattr(Store, "add", count)
    return added


def test_more_settings_and_prompts_run_the_new_cells_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = run(tmp_path / "r", FEW, SETTINGS[:2])
    added = added_by(monkeypatch)
    whole = run(tmp_path / "r", MORE, SETTINGS)
    old = {(p.id, s.name) for p in FEW for s in SETTINGS[:2]}
    new = {(p.id, s.name) for p in MORE for s in SETTINGS} - old
    assert len(added) == len(new) and set(added) == new
    assert_same_cells(whole, run(None, MORE, SETTINGS))
    mine = whole[[cell in old for cell in zip(whole.prompt_id, whole.setting, strict=True)]]
    pd.testing.assert_frame_equal(mine.reset_index(drop=True), first)  # times too: not run again
    added.clear()
    assert run(tmp_path / "r", MORE, SETTINGS).equals(whole) and not added
    again = run(tmp_path / "r", MORE, [*SETTINGS, Setting("another")])
    assert len(added) == len(MORE) and len(again) == len(whole) + len(MORE)
    assert len(read_cells(tmp_path / "r")) == len(again)


def test_an_extension_that_is_stopped_anywhere_continues_to_the_same_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(tmp_path / "whole", FEW, SETTINGS[:1])
    whole = run(tmp_path / "whole", MORE, SETTINGS)
    add, left = Store.add, [1]

    def stop(store: Store, cells: Any) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        add(store, cells)

    monkeypatch.setattr(Store, "add", stop)
    stopped, table = 0, None
    steps: list[tuple[list[Prompt], list[Setting]]] = [(FEW, SETTINGS[:1]), (MORE, SETTINGS)]
    for prompts, settings in steps:
        table = None
        while table is None:
            left[0] = 1
            try:
                table = run(tmp_path / "r", prompts, settings)
            except KeyboardInterrupt:
                stopped += 1
    assert stopped >= 2
    assert table is not None and without_times(table).equals(without_times(whole))


def test_a_first_run_that_was_not_finished_is_finished_and_extended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        add, calls = Store.add, []

        def stop(store: Store, cells: Any) -> None:
            if calls:
                raise KeyboardInterrupt
            calls.append(add(store, cells))

        patched.setattr(Store, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "r", MORE, SETTINGS[:1])
    table = run(tmp_path / "r", MORE, SETTINGS)
    assert_same_cells(table, run(None, MORE, SETTINGS))


@pytest.mark.parametrize(
    ("prompts", "settings", "options", "match"),
    [
        (MORE, [*SETTINGS[1:], Setting("new")], {}, "setting 'none': left out"),
        (MORE[3:5], [*SETTINGS, of(halve)], {}, "the prompts"),
        ([*reversed(MORE)], [*SETTINGS, of(halve)], {}, "the prompts"),
        (MORE, [*SETTINGS, of(double)], {}, "setting 'mine': hooks"),
        (MORE, [*SETTINGS, of(halve)], {"first_token_stage": "generation"}, "first_token_stage"),
        (MORE, [*SETTINGS, of(halve)], {"score": "binary"}, "score"),
    ],
)
def test_what_changes_a_finished_cell_is_refused(
    prompts: Any, settings: Any, options: Any, match: str, tmp_path: Path
) -> None:
    run(tmp_path / "r", FEW, [SETTINGS[0], of(halve)])
    before = (tmp_path / "r" / FILE).read_bytes()
    with pytest.raises(ValueError, match=f"another experiment: .*{match}"):
        run(tmp_path / "r", prompts, settings, **options)
    assert (tmp_path / "r" / FILE).read_bytes() == before
    table = run(tmp_path / "r", MORE, [*SETTINGS, of(halve)])  # the same, and more
    assert len(table) == len(MORE) * (len(SETTINGS) + 1)


def test_a_finished_store_of_an_earlier_version_is_extended_too(tmp_path: Path) -> None:
    first = run(tmp_path / "r", FEW, SETTINGS[:1])
    with sqlite3.connect(tmp_path / "r" / FILE) as file:
        file.execute("DELETE FROM meta WHERE key = 'blocks'")
    file.close()
    assert run(tmp_path / "r", FEW, SETTINGS[:1]).equals(first)
    assert_same_cells(run(tmp_path / "r", MORE, SETTINGS), run(None, MORE, SETTINGS))


def test_an_extended_store_is_of_a_version_that_earlier_ones_refuse(tmp_path: Path) -> None:
    def version() -> int:
        file = sqlite3.connect(tmp_path / "r" / FILE)
        (found,) = file.execute("SELECT value FROM meta WHERE key = 'format'").fetchone()
        file.close()
        return int(found)

    run(tmp_path / "r", FEW, SETTINGS[:1])
    assert version() == 3
    run(tmp_path / "r", FEW, SETTINGS[:2])
    assert version() == 4


@pytest.mark.parametrize("blocks", ["{}", "[[1, 2]]", '[[["a"], ["none"]]]', "[]", "3", "[["])
def test_a_store_with_other_blocks_is_damaged(blocks: str, tmp_path: Path) -> None:
    run(tmp_path / "r", FEW, SETTINGS[:1])
    with sqlite3.connect(tmp_path / "r" / FILE) as file:
        file.execute("UPDATE meta SET value = ? WHERE key = 'blocks'", (blocks,))
    file.close()
    with pytest.raises(ValueError, match="is damaged"):
        run(tmp_path / "r", FEW, SETTINGS[:1])


def test_a_sweep_of_cached_states_is_extended(tmp_path: Path) -> None:
    options = {"max_new_tokens": 2, "verbose": False}
    cached_state(MODEL, FEW, [0], CASES[:2], out=tmp_path / "r", **options)
    both = cached_state(MODEL, MORE, [0, 1], CASES[:2], out=tmp_path / "r", resume=True, **options)
    assert_same_cells(both, cached_state(MODEL, MORE, [0, 1], CASES[:2], **options))


# --- own prompts and scores ---------------------------------------------------------------------


def starts_well(output: str, needle: Any) -> float:
    return 0.25 if output else 0.75


def test_needles_are_made_into_prompts_of_ones_own_template() -> None:
    own = "read this . {haystack} {question} the answer ."
    made = niah(MODEL, [PAPER], {"none": []}, lengths=[100], depths=[0.5], template=own, **QUIET)
    (prompt,) = grid(MODEL, [PAPER], [100], [0.5], template=own)
    assert list(made.prompt_id) == [prompt.id] and list(made.template) == [own]
    text = MODEL.to_string(list(prompt.tokens))
    assert "read this" in text and prompt.length == 100
    assert prompt.id != grid(MODEL, [PAPER], [100], [0.5])[0].id
    (twice,) = grid(MODEL, [PAPER], [160], [0.5], template=own, read_twice=True)
    assert len(twice.needle_spans) == 2
    usual = niah(MODEL, [PAPER], {"none": []}, lengths=[120], depths=[0.0, 1.0], **QUIET)
    assert_same_cells(usual, run(None, FEW, [Setting("none")]))
    for options, match in (
        ({"template": "bsae"}, "give one of base, instruct, chat, or a text with"),
        ({"template": "{haystack} only"}, r"has \{question\} 0 times"),
        ({"template": "{question} {haystack}"}, r"give \{haystack\}, and"),
        ({"template": "{haystack} {question} {x}"}, r"has \{x\}"),
    ):
        with pytest.raises(ValueError, match=match):
            niah(MODEL, [PAPER], {"none": []}, lengths=[100], **options, **QUIET)
    with pytest.raises(ValueError, match="template.*prompts.grid"):
        niah(MODEL, FEW, {"none": []}, template=own, **QUIET)
    with pytest.raises(ValueError, match="give prompts alone, or needles alone"):
        niah(MODEL, [*FEW, PAPER], {"none": []}, **QUIET)


def test_a_score_of_ones_own_is_the_accuracy_and_part_of_the_experiment(tmp_path: Path) -> None:
    usual = run(None, FEW, SETTINGS[:1])
    own = run(tmp_path / "r", FEW, SETTINGS[:1], score=starts_well)
    assert set(own.accuracy) <= {0.25, 0.75}
    assert list(own.graded) == list(usual.graded) and list(own.output) == list(usual.output)
    stored = sqlite3.connect(tmp_path / "r" / FILE)
    (said,) = stored.execute("SELECT value FROM meta WHERE key = 'experiment'").fetchone()
    assert set(json.loads(said)["score"]) >= {"hash"}
    stored.close()
    assert run(tmp_path / "r", FEW, SETTINGS[:1], score=starts_well).equals(own)
    for other in ("graded", "binary", lambda output, needle: 1.0):
        with pytest.raises(ValueError, match="another experiment: score"):
            run(tmp_path / "r", FEW, SETTINGS[:1], score=other)
    binary = run(None, FEW, SETTINGS[:1], score="binary")
    assert list(binary.accuracy) == list(binary.binary.astype(float))
    with pytest.raises(ValueError, match="gave 5.0 for .*: give 0 to 1"):
        run(None, FEW, SETTINGS[:1], score=lambda output, needle: 5)
    with pytest.raises((ValueError, TypeError), match="graded"):
        scorer("grade")  # type: ignore[arg-type]
