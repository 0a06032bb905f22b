"""The twins' experiment: equal size, the same batches, probes that read what is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import experiments.recall.train as training
from experiments.recall.score import HELD_OUT, score
from experiments.recall.task import Task, draw
from experiments.twins import compare, figures, models, pages, probe
from experiments.twins.models import TWINS, TwinsPlan, configs, n_parameters
from hooked_hybrid import HookedHybrid
from hooked_hybrid.analysis import memory_horizon

SMALL = Task(length=24, n_facts=2, n_keys=4, n_values=4, n_filler=4)


def twin(name: str, task: Task = SMALL) -> HookedHybrid:
    """Return an untrained twin."""
    torch.manual_seed(0)
    return HookedHybrid(configs(task)[name]).requires_grad_(False)


@pytest.mark.parametrize("task", [models.TASK, SMALL])
def test_twins_are_of_one_size_and_differ_in_their_mixers(task: Task) -> None:
    made = configs(task)
    sizes = {name: n_parameters(cfg) for name, cfg in made.items()}
    assert max(sizes.values()) <= 1.01 * min(sizes.values())
    assert {name: len(cfg.attention_layers) for name, cfg in made.items()} == {
        "hybrid": 1,
        models.LONG: 1,
        "attention-free": 0,
        "attention-only": 3,
    }
    assert sizes["hybrid"] == sum(p.numel() for p in twin("hybrid", task).parameters())


def test_sizes_that_cannot_be_matched_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "TOLERANCE", 0.0)
    with pytest.raises(ValueError, match="parameters, the hybrid has"):
        configs.__wrapped__(SMALL)


def recording(make: Callable[..., Any], seen: list[Any]) -> Callable[..., Any]:
    """Return a function that also keeps what it makes."""

    def made(*given: Any) -> Any:
        seen.append(make(*given))
        return seen[-1]

    return made


def test_twins_see_the_same_batches_however_they_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(models, "DRILLS", 3)
    monkeypatch.setattr(training, "PASS", -1.0)  # the other schedule would rise at once
    seen: list[Any] = []
    for source in ("draw", "drill"):
        monkeypatch.setattr(training, source, recording(getattr(training, source), seen))
    for name in TWINS:
        models.train_one(tmp_path, TwinsPlan(SMALL, steps=5, kept=(5,), tokens=64), name, seed=1)
    assert [type(batch).__name__ for batch in seen] == (["Drill"] * 3 + ["RecallBatch"] * 2) * len(
        TWINS
    )
    for i, batch in enumerate(seen):
        assert torch.equal(batch.tokens, seen[i % 5].tokens)


def test_the_long_start_is_the_hybrid_with_other_decays(tmp_path: Path) -> None:
    cfg, recipe = configs(SMALL)["hybrid"], TwinsPlan(SMALL).recipe(0)
    one = models.Alike(cfg, SMALL, recipe, tmp_path / "one").model
    two = models.LongStart(cfg, SMALL, recipe, tmp_path / "two").model
    for (name, a), b in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b) != name.endswith("a_param")
    for layer in (0, 2):
        decays = two.blocks[layer].mixers[0].log_a_at_1.exp()
        assert models.START[0] <= decays.min() < decays.max() <= models.START[1]


def planted(n: int) -> tuple[torch.Tensor, probe.Facts]:
    """Return states that hold each fact in a feature of its own, among noise, and the facts."""
    facts = probe.facts_of(SMALL, draw(SMALL, n, 0))
    states = 0.1 * torch.randn(n, 20, generator=torch.Generator().manual_seed(0))
    states.scatter_add_(1, facts.keys * SMALL.n_values + facts.values, torch.ones(n, 2))
    return states, facts


def test_facts_are_those_of_the_tokens() -> None:
    batch = draw(SMALL, 20, 3)
    facts = probe.facts_of(SMALL, batch)
    for row, tokens in enumerate(batch.tokens.tolist()):
        ask = tokens.index(1)
        for key, value, back in zip(*(part[row].tolist() for part in facts), strict=True):
            assert tokens[ask - back - 1] == 2 + key
            assert tokens[ask - back] == SMALL.first_value + value


def test_a_probe_reads_what_a_state_holds_and_its_control_does_not() -> None:
    states, facts = planted(1600)
    read = probe.read_values(states, facts, SMALL)
    assert read.right.float().mean() > 0.99
    assert abs(float(read.other.mean()) - 0.25) < 0.1  # values of one sequence may be equal
    assert len(read.right) == len(read.distances) == pytest.approx(0.2 * facts.keys.numel(), abs=8)
    assert probe.read_values(states, facts, SMALL, shuffle=1).right.float().mean() < 0.4
    assert probe.read_presence(states, facts, SMALL).float().mean() > 0.99


def test_a_probe_reads_nothing_from_noise() -> None:
    _, facts = planted(1600)
    noise = torch.randn(1600, 20, generator=torch.Generator().manual_seed(1))
    assert abs(float(probe.read_values(noise, facts, SMALL).right.float().mean()) - 0.25) < 0.1
    any_value = 1 - (1 - 1 / SMALL.n_values) ** SMALL.n_facts
    assert abs(float(probe.read_presence(noise, facts, SMALL).float().mean()) - any_value) < 0.12


def test_values_without_their_keys_are_present_but_not_bound() -> None:
    _, facts = planted(1600)
    states = torch.zeros(1600, SMALL.n_values)
    states.scatter_add_(1, facts.values, torch.ones(1600, 2))
    assert probe.read_presence(states, facts, SMALL).float().mean() > 0.99
    read = probe.read_values(states, facts, SMALL)
    assert 0.4 < read.right.float().mean() < 0.8
    assert abs(float(read.right.float().mean() - read.other.mean())) < 0.1


def test_too_few_sequences_are_an_error() -> None:
    with pytest.raises(ValueError, match="9 sequences"):
        probe.fitted(torch.zeros(9, 2), torch.zeros(9, 3), torch.zeros(9, dtype=torch.long))


def test_states_are_those_of_the_cache_at_ask() -> None:
    model, batch = twin("hybrid"), draw(SMALL, 4, 0)
    states = probe.states_at_ask(model, SMALL, batch)
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda n: n.endswith("ssm_state"))
    assert list(states) == [0, 2]
    for layer, state in states.items():
        torch.testing.assert_close(state, cache["ssm_state", layer][:, 1 + SMALL.room])


def test_where_all_layers_begin_anew_questions_are_answered_from_nothing_before() -> None:
    model, batch = twin("attention-free"), draw(SMALL, 32, 0)
    rows = {row["at"]: row for row in compare.crossings(model, SMALL, batch)}
    alone = model(batch.tokens[:, 1 + SMALL.room :])[:, batch.questions - 1 - SMALL.room]
    assert list(rows) == ["0", "1", "2", "recurrences"]
    assert rows["recurrences"]["value"] == score(alone.argmax(-1) == batch.answers).accuracy


def test_horizons_are_those_of_every_channel() -> None:
    model, batch = twin("hybrid"), draw(SMALL, 4, 0)
    rows = compare.horizons(model, batch)
    _, cache = model.run_with_cache(batch.tokens, names_filter=lambda n: ".mixer." in n)
    for layer in (0, 2):
        mine = [row["value"] for row in rows if row["at"] == str(layer)]
        assert mine == memory_horizon(cache, layer).tolist()
    assert compare.horizons(twin("attention-only"), batch) == []


def test_the_whole_experiment_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, n in {"N_ANSWERED": 8, "N_PROBED": 80, "N_WATCHED": 2}.items():
        monkeypatch.setattr(compare, name, n)
    monkeypatch.setattr(compare, "FACTS", (1, 2))
    plan = TwinsPlan(SMALL, seeds=(0,), steps=2, kept=(2,), tokens=64)
    with pytest.raises(ValueError, match="contains no model"):
        compare.table(tmp_path, plan)
    for name in TWINS:
        models.train_one(tmp_path, plan, name, 0)
    found = compare.table(tmp_path, plan)
    assert set(found["twin"]) == set(TWINS)
    assert set(found["step"]) == {2}
    whole = found[(found["measure"] == "accuracy") & (found["at"] == "whole")]
    model = models.load(tmp_path, plan, "hybrid", 0, 2)
    right = compare.answered(model, draw(SMALL, 8, HELD_OUT))
    mine = whole[(whole["twin"] == "hybrid")]
    assert mine["value"].item() == score(right).accuracy
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")}
    for name in TWINS:
        models.train_one(tmp_path, plan, name, 0)
    assert compare.table(tmp_path, plan).equals(found)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.*")} == kept
    rows = figures.summary(found)
    chosen = rows[
        (rows["measure"] == "accuracy") & (rows["twin"] == "hybrid") & (rows["at"] == "whole")
    ]
    assert chosen["seed 0"].item() == score(right).accuracy
    drawn = figures.draw_all(found, tmp_path / "images")
    assert [path.name for path in drawn] == [
        f"twins_{name}.png" for name in ("recall", "ways", "kept", "horizons")
    ]
    assert all(path.stat().st_size > 10_000 for path in drawn)


def test_what_the_page_needs_is_each_seeds_value_and_what_spans_them() -> None:
    def rows(measure: str, at: str, step: int, values: list[float], control: float) -> list[dict]:
        same = {"measure": measure, "at": at, "twin": "hybrid", "step": step}
        return [{**same, "seed": s, "value": v, "control": control} for s, v in enumerate(values)]

    nan = float("nan")
    found = pd.DataFrame(
        rows("accuracy", "whole", 0, [0.1, 0.3], nan)
        + rows("accuracy", "whole", 800, [1.0, 0.5], nan)
        + rows("facts", "8", 0, [0.1, 0.1], nan)
        + rows("value", "0", 800, [0.2, 0.4], 0.06)
        + rows("horizon", "0", 800, [10.0, 20.0], nan)
        + rows("horizon", "0", 800, [13.0, 2000.0], nan)
    )
    made = pages.settings(found).set_index("setting")
    assert set(made.index) == {
        "accuracy whole hybrid", "accuracy whole hybrid, step 0", "value 0 hybrid",
        "median horizon 0 hybrid", "share beyond a sequence 0 hybrid",
    }  # fmt: skip
    columns = ["seed 0", "seed 1", "average", "least", "most"]
    assert made.loc["accuracy whole hybrid, step 0", columns].tolist() == [0.1, 0.3, 0.2, 0.1, 0.3]
    assert made.loc["value 0 hybrid", ["control", "control 1"]].tolist() == [0.06, 0.06]
    assert made.loc["median horizon 0 hybrid", ["seed 0", "seed 1"]].tolist() == [11.5, 1010.0]
    assert made.loc["share beyond a sequence 0 hybrid", "seed 1"] == 0.5
