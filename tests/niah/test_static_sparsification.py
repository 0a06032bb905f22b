"""Static sparsification: fixed sets of heads are those that a ranking names, and run as such."""

from __future__ import annotations

import random
from functools import cache
from itertools import combinations
from pathlib import Path

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.analysis.answers import NeedlePrompt
from hooked_hybrid.analysis.heads import retrieval_scores
from hooked_hybrid.analysis.planted import Planted, planted_retrieval
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.commands import program as cli
from hooked_hybrid.interventions import keep_heads, keep_top_heads
from hooked_hybrid.niah.head_sets import head_sets, standing_said, standings
from hooked_hybrid.niah.needles import PAPER, held_out_needles
from hooked_hybrid.niah.prompts import grid
from hooked_hybrid.niah.report.setting_plots import accuracy_by_heads_kept
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.niah.settings.static import (
    BY_LOT,
    EVERY_SET,
    RUN_TIME,
    other_prompts,
    sets_beside,
    sizes_of,
    static_settings,
)
from tests.models import griffin_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

CFG = griffin_config("RARA", n_keys=30)
RANKING = HeadScores((1, 3), torch.tensor([[0.4, 0.9, 0.8, 0.1], [0.7, 0.2, 0.3, 0.0]]), "made up")


@cache
def settings_of() -> dict[str, Setting]:
    made = static_settings(CFG, {"mine": RANKING}, [1, 2], n_draws=2)
    assert len({setting.name for setting in made}) == len(made)
    return {setting.name: setting for setting in made}


@cache
def planted() -> Planted:
    return planted_retrieval(0.1)


def run(model: HookedHybrid, setting: Setting, tokens: torch.Tensor) -> torch.Tensor:
    assert setting.prefill == setting.generation and isinstance(setting.prefill, tuple)
    return model.run_with_hooks(tokens, fwd_hooks=list(setting.prefill))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("no heads", []),
        ("mine, a layer 2", [(1, 1), (3, 0)]),
        ("mine, a layer 4", [(1, 1), (1, 2), (3, 0), (3, 2)]),
        ("mine, overall 1", [(1, 1)]),
        ("mine, overall 2", [(1, 1), (1, 2)]),
        ("mine, overall 4", [(1, 1), (1, 2), (3, 0), (1, 0)]),
    ],
)
def test_the_best_heads_of_a_ranking_are_kept(name: str, kept: list[tuple[int, int]]):
    model, tokens = random_model(CFG), random_tokens()
    found = run(model, settings_of()[name], tokens)
    expected = model.run_with_hooks(tokens, fwd_hooks=keep_heads(kept))
    assert relative(found, expected) < FP32_PARITY


def test_the_choice_at_run_time_is_the_papers():
    model, tokens = random_model(CFG), random_tokens()
    for k in (1, 2):
        found = run(model, settings_of()[f"{RUN_TIME} {2 * k}"], tokens)
        expected = model.run_with_hooks(tokens, fwd_hooks=keep_top_heads(k))
        assert torch.equal(found, expected)


def test_random_sets_have_as_many_heads_in_each_layer():
    drawn = [s for name, s in settings_of().items() if name.startswith(BY_LOT)]
    assert [s.name for s in drawn] == [f"{BY_LOT} {n} #{i}" for n in (2, 4) for i in (0, 1)]
    for setting in drawn:
        cut = setting.spec["heads"]
        assert {len(cut["1"]), len(cut["3"])} == {4 - setting.spec["n_heads"] // 2}
    assert drawn[0].spec["heads"] != drawn[1].spec["heads"]
    again = static_settings(CFG, {"mine": RANKING}, [1, 2], n_draws=2)
    assert [s.spec for s in again] == [s.spec for s in settings_of().values()]


def test_every_curve_has_its_sizes():
    sizes = sizes_of(list(settings_of().values()))
    assert set(sizes) == set(settings_of()) - {"whole", "no heads"}
    ways: dict[str, set[int]] = {}
    for way, n in sizes.values():
        ways.setdefault(way, set()).add(n)
    assert ways == {
        RUN_TIME: {2, 4}, "mine, a layer": {2, 4}, "mine, overall": {1, 2, 4}, BY_LOT: {2, 4},
    }  # fmt: skip


def test_a_model_with_one_attention_layer_has_no_overall_curve():
    ranking = HeadScores((1,), torch.arange(4.0)[None])
    made = static_settings(griffin_config("RA"), {"mine": ranking}, [1], n_draws=0)
    assert [s.name for s in made] == ["whole", "no heads", f"{RUN_TIME} 1", "mine, a layer 1"]


def test_heads_chosen_on_other_prompts_keep_the_planted_retrieval():
    """One head of eight, chosen by its retrieval score elsewhere, answers everything."""
    model = planted().model
    there, here = planted().prompts(8, 40, seed=1), planted().prompts(16, 60, seed=2)
    pairs = zip(there.tokens.tolist(), there.spans, strict=True)
    prompts = [NeedlePrompt(tokens, [span]) for tokens, span in pairs]
    ranking = retrieval_scores(model, prompts, max_new_tokens=1, verbose=False)
    worst = HeadScores(ranking.layers, -ranking.values)
    made = static_settings(model.cfg, {"best": ranking, "worst": worst}, [1, 3], n_draws=0)
    settings = {setting.name: setting for setting in made}

    def accuracy(name: str) -> float:
        said = run(model, settings[name], here.tokens)[:, -1].argmax(-1)
        return float((said == here.answers[:, 0]).float().mean())

    assert accuracy("whole") == accuracy("best, overall 1") == accuracy("best, a layer 2") == 1
    assert accuracy("no heads") == accuracy("worst, overall 6") == accuracy("worst, a layer 6") == 0


def test_heads_are_chosen_on_prompts_that_no_sweep_has():
    model = HookedHybrid.from_pretrained("tiny-griffin")
    prompts = other_prompts(model, 4)
    assert len(prompts) == 12 and {p.length for p in prompts} == {192}
    evaluated = [PAPER, *held_out_needles()]
    assert not {p.needle.city for p in prompts if p.needle} & {n.city for n in evaluated}
    same = grid(model, [PAPER], [192], [0.0, 0.5, 1.0])
    assert not {p.tokens[:40] for p in prompts} & {p.tokens[:40] for p in same}
    assert all(p.needle_spans[0][0] >= p.length - 256 for p in prompts)


def test_what_cannot_be_chosen_is_refused():
    for ks, draws in (([], 1), ([0], 1), ([4], 1), ([1], -1)):
        with pytest.raises(ValueError, match=r"give 1 to 3 heads and 0 draws"):
            static_settings(CFG, {"mine": RANKING}, ks, draws)
    other = HeadScores((1, 2), RANKING.values)
    with pytest.raises(ValueError, match=r"'other' ranks layers \(1, 2\), heads are in \[1, 3\]"):
        static_settings(CFG, {"other": other}, [1])


def test_the_picture_has_a_line_for_each_way_and_a_band_for_the_draws():
    names = list(settings_of())
    table = pd.DataFrame(
        [
            {
                "setting": name, "accuracy": 0.1 * i % 1, "in_window": inside, "needle_id": "a",
                "prompt_id": f"{inside}", "stage": "both", "k": None,
            }
            for i, name in enumerate(names)
            for inside in (True, False)
        ]
    )  # fmt: skip
    figure = accuracy_by_heads_kept(table, sizes_of(list(settings_of().values())))
    titles = [axes.get_title() for axes in figure.axes]
    assert titles == ["needle inside the window", "needle beyond the window"]
    lines = {line.get_label(): line for line in figure.axes[0].get_lines()}
    ways = {RUN_TIME, "mine, a layer", "mine, overall", BY_LOT}
    assert set(lines) == {*ways, "whole", "no heads"}
    of = table[table["in_window"]].set_index("setting")["accuracy"]
    mean = (of[f"{BY_LOT} 2 #0"] + of[f"{BY_LOT} 2 #1"]) / 2
    assert lines[BY_LOT].get_xydata()[0] == pytest.approx([2, mean])
    assert lines["mine, overall"].get_xdata().tolist() == [1, 2, 4]
    assert len(figure.axes[0].collections) == 2  # the band, and a line where it has no width
    assert figure.legends[0].get_title().get_text().startswith("band: range of several sets")


def test_the_command_writes_its_picture_and_resumes(tmp_path: Path, few_maps: None):
    out = tmp_path / "r"
    small = [
        "--model",
        "tiny-jamba",
        "--k",
        "4",
        "--draws",
        "1",
        "--scored-on",
        "1",
        "--texts",
        "0",
    ]
    prompts = ["--lengths", "180", "--depths", "1", "--max-new-tokens", "4"]
    command = ["static", *small, *prompts, "--out", str(out)]
    result = CliRunner().invoke(cli.build_app(), command)
    assert result.exit_code == 0, result.output
    assert {"Accuracy_by_heads_kept.png", "table.csv", "report.html"} <= {
        path.name for path in out.iterdir()
    }
    table = pd.read_csv(out / "table.csv")
    assert {f"{RUN_TIME} 4", "retrieval, a layer 4", "copying, a layer 4", f"{BY_LOT} 4 #0"} <= set(
        table["setting"]
    )
    assert CliRunner().invoke(cli.build_app(), [*command, "--resume"]).exit_code == 0


# --- every set of heads ---------------------------------------------------------------------------


def test_every_set_of_heads_is_tried_where_there_are_few():
    """Four of eight heads can be chosen in 70 ways; of two layers 4,900: then some are drawn."""
    one = head_sets({2: 8}, 4, None, random.Random(0), usual=20)
    assert len(one) == len(set(one)) == 70
    assert {heads for heads in one} == set(combinations([(2, h) for h in range(8)], 4))
    two = head_sets({2: 8, 5: 8}, 4, None, random.Random(0), usual=20)
    assert len(two) == len(set(two)) == 20
    assert all([layer for layer, _ in heads] == [2] * 4 + [5] * 4 for heads in two)


@pytest.mark.parametrize(("most", "n"), [(0, 0), (1, 1), (69, 69), (70, 70), (71, 70)])
def test_the_given_number_of_sets_is_drawn_and_no_two_are_equal(most: int, n: int):
    found = head_sets({2: 8}, 4, most, random.Random(0), usual=20)
    assert len(found) == len(set(found)) == n


def test_sets_drawn_once_differ_where_the_draws_would_not():
    """Twenty draws of 70 with this seed hold one set twice."""
    rng = random.Random(0)
    plain = [tuple(sorted(rng.sample(range(8), 4))) for _ in range(20)]
    assert len(set(plain)) == 19
    found = head_sets({2: 8}, 4, 20, random.Random(0), usual=20)
    assert len(set(found)) == 20


def test_a_choice_is_ranked_among_the_sets_of_its_size():
    rows = [("mine", 0.5), ("a", 0.2), ("b", 0.5), ("c", 0.9), ("d", 1.0)]
    cells = [
        {"setting": name, "accuracy": value if inside else 0.0, "in_window": inside}
        for name, value in rows
        for inside in (True, False)
    ]
    (row,) = standings(pd.DataFrame(cells), {"mine": ["a", "b", "c", "d"], "other": ["e"]}).to_dict(
        "records"
    )
    assert (row["setting"], row["accuracy"], row["n_sets"]) == ("mine", 0.5, 4)
    assert (row["n_below"], row["n_equal"], row["n_above"]) == (1, 1, 2)
    assert (row["lowest"], row["highest"]) == (0.2, 1.0) and row["mean"] == pytest.approx(0.65)
    assert standing_said(row) == "above 1, equal to 1, below 2 of 4 sets"


def test_choices_in_one_layer_are_ranked_among_every_set_and_those_over_all_layers_are_not():
    ranking = HeadScores((1,), torch.arange(4.0)[None])
    made = static_settings(griffin_config("RA"), {"mine": ranking}, [2])
    beside = sets_beside(made)
    assert set(beside) == {f"{RUN_TIME} 2", "mine, a layer 2"}
    assert beside["mine, a layer 2"] == [f"{EVERY_SET} 2 #{i}" for i in range(6)]
    of = {s.name: s for s in made}
    kept = {
        tuple(sorted({0, 1, 2, 3} - set(of[name].spec["heads"]["1"])))
        for name in beside[f"{RUN_TIME} 2"]
    }
    assert kept == set(combinations(range(4), 2))
    assert "mine, overall 2" not in sets_beside(list(settings_of().values()))


def test_the_report_says_where_a_choice_stands_among_every_set(tmp_path: Path, few_maps: None):
    out = tmp_path / "r"
    small = "--model tiny-jamba --k 1 --scored-on 1 --texts 0 --lengths 180 --depths 1"
    command = ["static", *small.split(), "--max-new-tokens", "4", "--out", str(out)]
    result = CliRunner().invoke(cli.build_app(), command)
    assert result.exit_code == 0, result.output
    sets = pd.read_csv(out / "sets.csv").set_index("setting")
    assert set(sets.index) == {f"{RUN_TIME} 1", "retrieval, a layer 1", "copying, a layer 1"}
    assert (sets["n_sets"] == 8).all()
    table = pd.read_csv(out / "table.csv").set_index("setting")["accuracy"]
    every = table[[f"{EVERY_SET} 1 #{i}" for i in range(8)]]
    assert sets.loc[f"{RUN_TIME} 1", "n_above"] == (every > table[f"{RUN_TIME} 1"] + 1e-9).sum()
    assert "Among sets of heads" in (out / "report.html").read_text()
    maps = [path.name for path in (out / "maps").iterdir() if path.suffix == ".png"]
    assert maps and len(maps) == table.index.nunique() - 8  # none of a set
