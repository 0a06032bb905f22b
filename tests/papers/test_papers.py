"""The papers' list: what it holds, how claims are judged, and the command that walks it."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands import papers as command
from hooked_hybrid.commands import program as cli
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import build_prompt
from hooked_hybrid.niah.settings.papers import weight_matrix
from hooked_hybrid.papers import checks, exact, language, needle_checks
from hooked_hybrid.papers.catalogue import CATALOGUE, items_of, runs_of
from hooked_hybrid.papers.claims import (
    ALL,
    JAMBA,
    RG_2B,
    RG_9B,
    Claim,
    Finding,
    Verdict,
    applies,
    judge,
    show_verdict,
    subject_of,
    together,
)
from hooked_hybrid.papers.evidence import Evidence, difference, estimate, tipping
from hooked_hybrid.papers.recipe import QUICK, PaperRecipe, prompts_of, recipe_for
from hooked_hybrid.papers.report import markdown
from hooked_hybrid.papers.runs import RUNS, Run, span_beside
from hooked_hybrid.papers.thesis_weights import PUBLISHED_WEIGHTS
from hooked_hybrid.presets import configs as presets

LISTED = {
    "sllm2025": ["Table 1", "Figure 2", "Figure 1", "Appendix C"],
    "thesis2025": [
        *("Table 2.1", "Figure 3.2", "Figure 4.1", "Figure 5.1", "Table 6.1", "Figure 6.2"),
        *("Figures B.1 to B.3", "Figure C.1", "Figure C.2", "Figure D.1"),
    ],
}
NEEDLES = ("paper", *(f"held-out-{i:02}" for i in range(59)))  # enough to bound what is alike
FOUR = NEEDLES[:4]
SMALL = ["--lengths", "150", "--depths", "1", "--held-out", "1", "--quick"]
EVERY = [(paper, item) for paper, items in CATALOGUE.items() for item in items]


@cache
def model_of(name: str) -> HookedHybrid:
    return HookedHybrid.from_pretrained(name, dtype=torch.float32)


def cells_of(setting: str, by_needle: dict[str, float], **columns: Any) -> pd.DataFrame:
    """Return cells of a setting: accuracy by needle, two seeds, inside and beyond the window."""
    rows = [
        {
            "setting": setting,
            "prompt_id": f"{needle} {seed} {length}",
            "needle_id": needle,
            "seed": seed,
            "length": length,
            "depth": 0.5,
            "stage": "generation",
            "k": None,
            "in_window": length == 100,
            "accuracy": accuracy,
            **columns,
        }
        for needle, accuracy in by_needle.items()
        for seed in (0, 1)
        for length in (100, 200)
    ]
    return pd.DataFrame(rows)


def alike(accuracy: float) -> dict[str, float]:
    return dict.fromkeys(NEEDLES, accuracy)


def recipe() -> PaperRecipe:
    return recipe_for(model_of("tiny-griffin"), QUICK, lengths=[100, 200], depths=[0.5])


def evidence_of(**runs: dict[str, dict[str, float]]) -> Evidence:
    """Return evidence of planted accuracies: run (- for _), setting, needle."""
    tables = {}
    for run, settings in runs.items():
        parts = []
        for name, accuracies in settings.items():
            stage, k = re.match(r"(\w+) k=(\d+)", name).groups() if "k=" in name else (None, None)
            parts.append(cells_of(name, accuracies, stage=stage, k=k and int(k)))
        tables[run.replace("_", "-")] = pd.concat(parts, ignore_index=True)
    cfg = model_of("tiny-griffin").cfg
    return Evidence("tiny-griffin", "the packaged model", cfg, recipe(), tables, {})


def by_k(accuracies: dict[int, float], stage: str = "generation") -> dict[str, dict[str, float]]:
    return {f"{stage} k={k}": alike(accuracy) for k, accuracy in accuracies.items()}


def test_every_table_and_figure_of_the_papers_is_listed():
    assert {paper: [item.name for item in items] for paper, items in CATALOGUE.items()} == LISTED


@pytest.mark.parametrize(("paper", "item"), EVERY, ids=lambda x: getattr(x, "name", x))
def test_every_claim_has_a_published_value_and_a_prediction(paper: str, item: Any):
    assert item.claims and set(runs_of(item)) <= set(RUNS)
    for claim in item.claims:
        assert claim.about in (RG_2B, RG_9B, JAMBA, ALL) and claim.text.endswith(".")
        assert claim.published and len(claim.prediction) > 5
        assert paper == "thesis2025" or claim.about == RG_2B  # Zani et al. ran the 2B alone


def test_published_numbers_are_those_of_the_papers():
    assert PUBLISHED_WEIGHTS["keep-only"] == "85.7%" and PUBLISHED_WEIGHTS["omit-keep"] == "63.0%"
    assert len(PUBLISHED_WEIGHTS) == 20
    texts = {
        (claim.about, claim.published) for item in CATALOGUE["thesis2025"] for claim in item.claims
    }
    assert {(RG_2B, "1 of 10"), (RG_9B, "2 of 16"), (JAMBA, "4 of 32")} <= texts
    (figure,) = items_of("thesis2025", ["Figure 5.1"])
    gaps = {claim.published for claim in figure.claims}
    assert {"9.1 points below base", "6.6 points below base"} <= gaps
    assert {"6.0 points below base", "about 42 points below base"} <= gaps


def test_items_are_found_by_name_and_unknown_ones_are_listed():
    assert [item.name for item in items_of("thesis2025", ["table 6.1", "figure-32"])] == [
        "Figure 3.2",
        "Table 6.1",
    ]
    with pytest.raises(ValueError, match="Table 7: thesis2025 has Table 2.1"):
        items_of("thesis2025", ["Table 7"])


def test_verdicts_name_the_published_model_only_where_it_is_the_one_given():
    small = model_of("tiny-griffin").cfg
    assert subject_of("tiny-griffin", small) == "the packaged model"
    assert subject_of("folder", small) == "this model"
    large = presets.griffin(("RRA" * 9)[:26], d_model=2560, n_heads=10, d_head=256)
    assert subject_of("google/recurrentgemma-2b", large) == RG_2B
    for other in ("google/recurrentgemma-2b-it", "someone/finetuned", "folder"):
        assert subject_of(other, large) == "a model of RecurrentGemma-2B's shape"
    assert subject_of("google/recurrentgemma-2b", small) == "this model"
    assert show_verdict(Verdict.NOT_SHOWN, RG_2B) == "RecurrentGemma-2B does not show it"
    assert show_verdict(Verdict.SHOWN, "the packaged model") == "the packaged model shows it"
    assert show_verdict(Verdict.UNTESTED, "the packaged model") == "untested on real weights"

    def claim(about: str, any_model: bool = False) -> Claim:
        return Claim("It is.", about, "1", "Holds.", lambda _: Finding(True, "1"), any_model)

    assert applies(claim(RG_9B), small)
    assert not applies(claim(JAMBA), small)
    assert applies(claim(JAMBA, any_model=True), small)
    assert not applies(claim(RG_9B, any_model=True), large)
    assert applies(claim(RG_2B), large)
    verdict, finding = judge(claim(JAMBA), evidence_of(top_k=by_k({8: 1.0})))
    assert verdict is Verdict.UNTESTED and JAMBA in finding.ours


def test_an_item_is_shown_where_every_tested_claim_is():
    shown, not_shown, untested = Verdict.SHOWN, Verdict.NOT_SHOWN, Verdict.UNTESTED
    assert together([shown, untested]) is shown
    assert together([shown, not_shown, untested]) is not_shown
    assert together([untested]) is untested


def test_figures_are_means_with_intervals_over_needles_and_seeds():
    cells = cells_of("a", dict(zip(FOUR, (0.0, 0.5, 0.5, 1.0), strict=True)))
    found = estimate(cells)
    assert found.mean == 0.5 and found.low < 0.5 < found.high
    assert (found.n, found.n_needles, found.by_seed) == (16, 4, (0.5, 0.5))
    more = cells.assign(accuracy=cells["accuracy"] + 0.25)
    gap = difference(more, cells)  # in pairs, so that what differs by needle does not count
    others = 1 - 0.025 ** (1 / 4)  # of four that are alike
    assert gap.mean == 0.25 and gap.low == pytest.approx(0.25 - 1.25 * others, abs=1e-6)


def test_tipping_points_are_where_half_of_the_best_is_left():
    def cells(accuracies: dict[int, float]) -> pd.DataFrame:
        return evidence_of(top_k=by_k(accuracies)).tables["top-k"]

    assert tipping(cells({0: 0.0, 1: 0.3, 2: 0.6, 8: 1.0})) == (2, 2, 2)
    assert tipping(cells({0: 0.0, 1: 0.3, 2: 0.5, 8: 1.0})) == (2, 2, 8)  # just half of the best
    assert tipping(cells({0: 0.0, 8: 0.01})) == (None, 0, None)  # 60 needles leave 6% open
    mixed, few = dict(zip(FOUR, (0.0, 0.0, 1.0, 1.0), strict=True)), dict.fromkeys(FOUR, 1.0)
    evidence = evidence_of(top_k={"generation k=1": mixed, "generation k=8": few})
    found = tipping(evidence.tables["top-k"])
    assert (found.k, found.low, found.high) == (1, 1, 8)


NO_MAP = needle_checks.empty_maps("top-k", lambda _: ["generation k=0"])
CASES: dict[str, tuple[Any, dict[str, Any], bool | None]] = {
    "fails at 0": (checks.without_heads(), by_k({0: 0.0, 8: 1.0}), True),
    "does not fail at 0": (checks.without_heads(), by_k({0: 0.3, 8: 1.0}), False),
    "nothing to lose": (checks.without_heads(), by_k({0: 0.0, 8: 0.1}), None),
    "tips at 1": (checks.tips_at(1, 10), by_k({0: 0.0, 1: 0.6, 8: 1.0}), True),
    "tips later": (checks.tips_at(1, 10), by_k({0: 0.0, 1: 0.2, 2: 0.9, 8: 1.0}), False),
    "two as good": (checks.as_good(4, 16), by_k({2: 0.95, 8: 1.0}), True),
    "two worse": (checks.as_good(4, 16), by_k({2: 0.85, 8: 1.0}), False),
    "every k": (checks.every_k_from(6, 8), by_k({6: 1.0, 7: 0.95, 8: 1.0}), True),
    "a hole": (checks.every_k_from(6, 8), by_k({6: 1.0, 7: 0.5, 8: 1.0}), False),
    "rises": (
        checks.above(checks.cells_at(1, 10), checks.cells_at(10, 10)),
        by_k({1: 0.9, 8: 0.5}),
        True,
    ),
    "falls": (
        checks.above(checks.cells_at(1, 10), checks.cells_at(10, 10)),
        by_k({1: 0.4, 8: 0.5}),
        False,
    ),
    "low": (
        checks.below([8, 4], 8, "both", 0.2),
        {**by_k({8: 0.1, 4: 0.0}, "both"), **by_k({8: 1.0})},
        True,
    ),
    "empty": (
        needle_checks.empty_maps("top-k", lambda _: ["generation k=0"]),
        by_k({0: 0, 8: 1}),
        True,
    ),
    "full": (
        needle_checks.empty_maps("top-k", lambda _: ["generation k=0"]),
        by_k({0: 1, 8: 1}),
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_checks_find_what_is_planted(case: str):
    check, accuracies, holds = CASES[case]
    finding = check(evidence_of(top_k=accuracies))
    assert finding.holds is holds and finding.ours


def test_a_claim_whose_interval_contains_the_border_is_not_shown_and_undecided():
    mixed = dict.fromkeys(NEEDLES, 0.0) | dict.fromkeys(NEEDLES[:20], 0.12)
    evidence = evidence_of(top_k={"generation k=0": mixed, "generation k=8": alike(1.0)})
    finding = checks.without_heads()(evidence)
    assert evidence.accuracy("top-k", "generation k=0").mean < checks.NOTHING
    assert finding.holds is False and "undecided" in finding.note


def test_what_is_left_beyond_the_window_and_complements():
    def weights(inside: float, beyond: float, other: tuple[float, float]) -> Evidence:
        evidence = evidence_of(
            weights={"keep-keep": alike(1.0), "keep-omit": alike(0.0), "omit-keep": alike(0.0)}
        )
        table = evidence.tables["weights"]
        for name, values in (("keep-omit", (inside, beyond)), ("omit-keep", other)):
            for is_inside, value in zip((True, False), values, strict=True):
                rows = (table["setting"] == name) & (table["in_window"] == is_inside)
                table.loc[rows, "accuracy"] = value
        return evidence

    left = needle_checks.left_beyond_window("keep-omit")
    assert left(weights(0, 1, (1, 0))).holds and not left(weights(0, 0, (1, 1))).holds
    assert not left(weights(1, 1, (1, 0))).holds
    both = needle_checks.complement("omit-keep", "keep-omit", "keep-keep")
    assert both(weights(0, 1, (1, 0))).holds
    assert not both(weights(0, 0, (1, 0))).holds and not both(weights(1, 1, (1, 0))).holds
    nothing = both(weights(0, 0, (1, 1)))  # one alone is not a complement
    assert nothing.holds is False and "keep-omit retrieves nothing" in nothing.note
    near = weights(0, 1, (1, 0))
    near.tables["weights"] = near.tables["weights"].assign(in_window=True)
    assert left(near).holds is None


def test_counts_and_score_are_exact():
    evidence = evidence_of(top_k=by_k({8: 1.0}))
    for find in (exact.score_of_examples, exact.counts_equal, exact.attention_is_small):
        assert find(evidence).holds, find.__name__
    assert exact.attention_bends(evidence).holds
    finding = exact.block_costs_three_times(evidence)
    assert finding.holds is False and "3.14" in finding.note
    headings, rows = exact.score_rows(evidence)
    assert {len(row) for row in rows} == {len(headings)}


def a_cell(task: str, form: str, right: list[int], chance: float = 0.25) -> Cell:
    value = sum(right) / len(right)
    documents = {str(i): float(r) for i, r in enumerate(right)}
    numbers = (value, 0.05, True, len(right), 0, documents, chance, {}, 0.0)
    return Cell(task, form, None, "acc,none", *numbers)


def test_benchmarks_are_judged_by_documents_and_untested_without_data():
    rights = {"base": [1] * 100, "sparse": [1] * 92 + [0] * 8, "ablated": [1] * 26 + [0] * 74}
    cells = {form: {"mmlu_x": a_cell("mmlu_x", form, right)} for form, right in rights.items()}
    evidence = evidence_of(top_k=by_k({8: 1.0}))
    evidence.language["mmlu"] = language.Scores(cells, chat=False)
    found = language.gap("mmlu", "sparse", 1.0, 20.0)(evidence)
    assert found.holds and "+8.0" in found.ours and "no chat template" in found.note
    assert language.gap("mmlu", "ablated", 30.0, 100.0)(evidence).holds
    assert not language.gap("mmlu", "sparse", 30.0, 100.0)(evidence).holds
    evidence.language["mmlu"].cells["ablated"]["mmlu_x"] = a_cell("mmlu_x", "ablated", [0, 1] * 50)
    assert not language.near_chance("mmlu", "ablated", 5.0)(evidence).holds
    nothing = language.gap("glue", "sparse", -10.0, 10.0)(evidence)
    assert nothing.holds is None and nothing.ours == language.NO_DATA
    assert language.bars_of("mmlu")(evidence) is not None
    assert language.bars_of("glue")(evidence) is None


def test_seeds_have_haystacks_and_held_out_needles_of_their_own():
    model = model_of("tiny-griffin")
    made = recipe_for(model, QUICK, n_held_out=2, n_seeds=2, lengths=[150], depths=[0.5])
    by_seed = prompts_of(model, made)
    names = [[p.needle_id for p in prompts] for prompts in by_seed.values()]
    assert names == [
        ["paper", "held-out-00", "held-out-01"],
        ["paper", "held-out-02", "held-out-03"],
    ]
    assert by_seed[0][0].tokens != by_seed[1][0].tokens
    text = "\n\n".join(f"The {noun} can heal a loud song ." * 9 for noun in ("sea", "king"))
    first, second = prompts_of(model, made, [text]).values()
    assert first[0].tokens != second[0].tokens
    with pytest.raises(ValueError, match="1 paragraphs for 2 seeds"):
        prompts_of(model, made, ["The sea can heal a song ."])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"n_seeds": 1}, "two seeds"), ({"n_held_out": 0}, "one held-out needle")],
)
def test_recipes_without_an_interval_are_refused(options: dict[str, int], message: str):
    with pytest.raises(ValueError, match=message):
        recipe_for(model_of("tiny-griffin"), QUICK, **options)
    many = recipe_for(model_of("tiny-griffin"), QUICK, lengths=[150], n_held_out=31)
    with pytest.raises(ValueError, match="there are 60"):
        many.needles(1)


def test_the_first_new_token_is_chosen_as_each_papers_program_did():
    def first(name: str) -> str:
        return recipe_for(model_of(name), QUICK, lengths=[150]).first_token

    assert (first("tiny-griffin"), first("tiny-jamba")) == ("generation", "prefill")


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_control_beside_the_needle_is_as_long_and_apart_from_it(depth: float):
    model = model_of("tiny-griffin")
    prompt = build_prompt(model, PAPER, 150, depth)
    ((start, stop),) = prompt.needle_spans
    other_start, other_stop = span_beside(prompt)
    assert other_stop - other_start == stop - start
    assert other_stop <= start or other_start >= stop
    question = len(prompt.tokens) - 40  # the question and what stands around it come after this
    assert other_start > 0 and other_stop < question + 15


def invoke(*arguments: str) -> Any:
    return CliRunner().invoke(cli.build_app(), ["reproduce", *arguments])


def test_the_list_is_shown_without_a_model():
    result = invoke("--paper", "sllm2025", "--list")
    assert result.exit_code == 0 and "Appendix C" in result.output
    named = invoke("--paper", "sllm2025", "--model", "nowhere", "--list")
    assert named.exit_code == 1 and "--list runs nothing" in named.output


def test_a_report_is_stopped_resumed_and_never_run_twice(tmp_path: Path, monkeypatch: Any):
    out = tmp_path / "r"
    wanted = ["--paper", "thesis2025", "--only", "Table 2.1", "--only", "Figure 6.2"]
    arguments = [*wanted, *SMALL, "--out", str(out)]
    few = Run(lambda *_: weight_matrix(["keep", "omit"], ["keep", "omit"]))
    monkeypatch.setitem(RUNS, "weights", few)
    written: list[str] = []
    write_item = command.write_item

    def stopped(item: Any, *rest: Any) -> Any:
        if item.name == "Figure 6.2" and not written:
            written.append(item.name)
            raise KeyboardInterrupt
        return write_item(item, *rest)

    monkeypatch.setattr(command, "write_item", stopped)
    assert invoke(*arguments).exit_code == cli.INTERRUPTED
    assert not (out / "report.md").exists() and (out / "table-2-1.csv").exists()
    assert invoke(*arguments).exit_code == 1  # not empty, and no --resume

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("a finished run was run again")

    monkeypatch.setattr(HookedHybrid, "generate", never)
    resumed = invoke(*arguments, "--resume")
    assert resumed.exit_code == 0, resumed.output
    page = (out / "report.md").read_text()
    assert "the score shows it" in page and "untested on real weights" in page
    assert "RecurrentGemma-2B shows it" not in page and "![Figure 6.2](figure-6-2.png)" in page
    assert (out / "figure-6-2.png").stat().st_size > 1000
    claims = pd.read_csv(out / "claims.csv")
    assert list(claims["item"].unique()) == ["Table 2.1", "Figure 6.2"]
    endings = tuple(verdict.value for verdict in Verdict)
    assert all(verdict.endswith(endings) for verdict in claims["verdict"])
    changed = invoke(*arguments, "--resume", "--seeds", "3")
    assert changed.exit_code == 1 and "another recipe: seeds" in " ".join(changed.output.split())
    other = invoke("--paper", "sllm2025", *SMALL, "--out", str(out), "--resume")
    assert other.exit_code == 1 and "another recipe: paper" in " ".join(other.output.split())
    assert (out / "report.md").read_text() == page


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path):
    (tmp_path / "mine.txt").write_text("mine")
    wanted = ["--paper", "sllm2025", "--only", "Table 1", "--quick", "--out", str(tmp_path)]
    for more, message in (([], "not empty"), (["--resume"], "something else")):
        result = invoke(*wanted, *more)
        assert result.exit_code == 1 and message in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--only", "Figure 4.1", "--lengths", "80"], "shortest possible prompt"),
        (["--only", "Figure 3.2", "--lengths", "66"], "too few tokens"),
        (["--only", "Table 6.1", "--held-out", "31"], "there are 60"),
    ],
)
def test_what_cannot_be_run_is_an_error_before_anything_runs(
    options: list[str], message: str, tmp_path: Path
):
    small = [] if "--held-out" in options else ["--held-out", "1"]
    length = [] if "--lengths" in options else ["--lengths", "150"]
    more = [*options, *small, *length, "--depths", "1", "--quick", "--out", str(tmp_path / "r")]
    result = invoke("--paper", "thesis2025", *more)
    assert result.exit_code == 1 and message in " ".join(result.output.split())
    assert not (tmp_path / "r").exists()


def test_tables_without_runs_need_none(tmp_path: Path):
    out = tmp_path / "r"
    result = invoke("--paper", "sllm2025", "--only", "Table 1", "--quick", "--out", str(out))
    assert result.exit_code == 0, result.output
    assert {p.name for p in out.iterdir()} == {
        *("report.md", "claims.csv", "table-1.csv", "recipe.json")
    }
    assert json.loads((out / "recipe.json").read_text())["seeds"] == [0, 1]
    assert "1,534,008,320" in (out / "report.md").read_text()


def test_markdown_tables_keep_their_columns():
    assert markdown(["a", "b"], [["x|y", "z"]]).splitlines()[2] == "| x\\|y | z |"
