"""The rules by which claims are judged: what is too little to conclude from, and what is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands import papers as command
from hooked_hybrid.commands.program import build_app
from hooked_hybrid.evaluation.cells import Cell
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.papers import checks, language, needle_checks, runs, shares
from hooked_hybrid.papers.catalogue import items_of, runs_of
from hooked_hybrid.papers.claims import Finding, Verdict, judge, run_check
from hooked_hybrid.papers.evidence import Evidence, Untested, estimate, tipping
from hooked_hybrid.papers.reading import how_to_read
from hooked_hybrid.papers.recipe import PACKAGED, QUICK, prompts_of, recipe_for
from hooked_hybrid.papers.report import items_in, not_run
from hooked_hybrid.presets import configs as presets
from tests.papers.test_papers import (
    FOUR,
    NEEDLES,
    a_cell,
    alike,
    by_k,
    evidence_of,
    invoke,
    model_of,
)


def with_heads(evidence: Evidence, n: int) -> Evidence:
    """Return the evidence as if of a model with so many heads."""
    return replace(evidence, cfg=presets.griffin("RRA", d_model=16 * n, n_heads=n, d_head=16))


def test_needles_that_are_all_alike_bound_only_how_many_are_not():
    seven = dict.fromkeys([*FOUR, "a", "b", "c"], 0.0)
    whole = dict.fromkeys(seven, 1.0)
    few = evidence_of(top_k={"generation k=0": seven, "generation k=8": whole})
    finding = checks.without_heads()(few)
    assert finding.holds is False and "undecided" in finding.note
    assert checks.without_heads()(evidence_of(top_k=by_k({0: 0.0, 8: 1.0}))).holds


def test_tipping_points_weigh_cells_as_accuracies_do():
    halves = [dict.fromkeys(NEEDLES, 1.0) | dict.fromkeys(NEEDLES[:30], low) for low in (0.0, 1.0)]
    one = {"generation k=1": halves[0], "generation k=8": halves[1]}
    table = evidence_of(top_k=one).tables["top-k"]
    fails = table["needle_id"].isin(NEEDLES[:30])
    short = table[fails | (table["length"] == 100)]  # those that retrieve have half the cells
    assert estimate(short[short["k"] == 1]).mean == pytest.approx(1 / 3)  # of needles alike: a half
    assert (tipping(short).k, tipping(short).low) == (8, 8)


def test_shares_of_heads_that_are_no_whole_number_are_untested():
    assert [shares.share(k, of, 8) for k, of in ((1, 10), (4, 32), (27, 32), (0, 10))] == [
        *(1, 1, 7, 0)
    ]
    assert [shares.share(k, of, 8) for k, of in ((1, 16), (2, 32), (6, 32), (2, 10))] == [None] * 4
    assert all(shares.share(k, of, of) == k for of in (10, 16, 32) for k in range(of + 1))
    assert shares.head_counts(5, 12, 16, 8) == [3, 4, 5, 6]
    evidence = evidence_of(top_k=by_k({k: 1.0 for k in range(9)}))
    (maps,) = items_of("thesis2025", ["Figures B.1 to B.3"])
    two_of_sixteen = next(c for c in maps.claims if c.text.startswith("Two heads of sixteen"))
    finding = run_check(two_of_sixteen.check, evidence)
    assert finding.holds is None and "no k for 1 of 16" in finding.ours


def test_sides_that_share_a_setting_are_not_compared():
    evidence = evidence_of(top_k=by_k({k: 1.0 for k in range(9)}))
    check = checks.above(checks.cells_at(range(1, 5), 8), checks.cells_at(4, 8))
    with pytest.raises(Untested, match="both sides hold generation k=4"):
        check(evidence)


@pytest.mark.parametrize("n", [13, 14, 15, 64])
def test_the_heads_that_claims_about_a_second_reading_ask_for_are_run(n: int):
    few = shares.few_heads(n)
    for k, of in shares.TWICE_AT:
        assert shares.share(k, of, n) in (None, *few)
    assert {0, 1, 2} <= set(few) and (n < 64 or {4, 8, 13} <= set(few))


def test_settings_that_were_not_run_and_empty_ranges_are_untested():
    evidence = evidence_of(top_k=by_k({0: 0.0, 8: 1.0}))
    missing = run_check(checks.as_good(4, 8), evidence)
    assert missing.holds is None and "no setting 'generation k=4'" in missing.ours
    assert run_check(checks.every_k_from(8, 8), evidence).holds is None
    assert run_check(checks.without_heads("top-k-twice"), evidence).holds is None


def test_each_run_is_guarded_by_its_own_whole_model():
    good, bad = by_k({0: 0.0, 8: 1.0}), by_k({0: 0.0, 8: 0.1})
    assert checks.without_heads("top-k-twice")(evidence_of(top_k=bad, top_k_twice=good)).holds
    finding = checks.without_heads("top-k-twice")(evidence_of(top_k=good, top_k_twice=bad))
    assert finding.holds is None and "top-k-twice" in finding.ours


@pytest.mark.parametrize(
    ("parts", "holds"),
    [([True, None], None), ([False, None], False), ([True, True], True), ([None], None)],
)
def test_a_claim_of_parts_holds_where_all_do(parts: list[bool | None], holds: bool | None):
    check = checks.both_hold(*(lambda _, part=part: Finding(part, "x") for part in parts))
    assert check(evidence_of(top_k=by_k({8: 1.0}))).holds is holds


def test_complements_are_of_the_cells_that_the_whole_model_retrieves():
    names = ("keep-keep", "keep-omit", "omit-keep")
    evidence = evidence_of(weights={name: alike(0.0) for name in names})
    table = evidence.tables["weights"]
    at = {False: table["length"] == 200, True: table["length"] == 100}
    table.loc[at[True] & (table["setting"] != "keep-omit"), "accuracy"] = 1.0
    table.loc[at[False], "accuracy"] = 0.2  # beyond the window a little, in all three
    odd = table["seed"] == 1
    table.loc[at[True] & odd, "accuracy"] = [1.0 - v for v in table.loc[at[True] & odd, "accuracy"]]
    table.loc[at[True] & (table["setting"] == "keep-keep"), "accuracy"] = 1.0
    check = needle_checks.complement("omit-keep", "keep-omit", "keep-keep")
    assert check(evidence).holds and "of 120 cells" in check(evidence).ours


def test_a_quick_run_and_a_full_one_are_distinguished():
    quick = evidence_of(top_k=by_k({0: 0.0, 8: 1.0}))
    (figure,) = items_of("thesis2025", ["Figure 3.2"])
    verdict, finding = judge(figure.claims[0], quick)
    assert verdict is Verdict.UNTESTED and "too little" in finding.note and "0.0%" in finding.ours
    recipe = recipe_for(model_of("tiny-griffin"), PACKAGED, n_held_out=29)
    full = replace(quick, recipe=recipe)
    assert judge(figure.claims[0], full)[0] is Verdict.SHOWN
    assert "--quick" in how_to_read(quick) and "--quick" not in how_to_read(full)
    assert "over 59 needles" in how_to_read(full) and "6% here" in how_to_read(full)
    assert "run over 61 needles too" in how_to_read(full) and "at 0%, at most 4.8%" in how_to_read(
        full
    )


def some(accuracy: float) -> dict[str, float]:
    return dict.fromkeys([*FOUR, "a", "b", "c"], accuracy)


def test_few_needles_alike_are_bounded_by_the_many():
    few = {"generation k=0": some(0.0), "generation k=8": some(1.0)}
    zero, third = by_k({0: 0.0, 8: 1.0}), by_k({8: 1.0})
    third |= {"generation k=0": alike(0.0) | dict.fromkeys(NEEDLES[:20], 1.0)}
    held = checks.without_heads()(evidence_of(top_k=few, top_k_many=zero))
    assert (
        held.holds
        and "of 60 needles at 100 tokens 0.0% (95% 0.0 to 6.0); at most 4.9%" in held.ours
    )
    assert checks.without_heads()(evidence_of(top_k=few, top_k_many=third)).holds is False
    lost = evidence_of(top_k=few, top_k_many=by_k({0: 0.0, 8: 0.1}))
    assert run_check(checks.without_heads(), lost).holds is None  # nothing to lose in the many
    some_left = {"generation k=0": some(0.0) | {"a": 1.0}, "generation k=8": some(1.0)}
    mixed = checks.without_heads()(evidence_of(top_k=some_left, top_k_many=zero))
    assert mixed.holds is False and "undecided" in mixed.note  # the many do not outvote the few


def test_differences_of_few_needles_alike_are_bounded_by_the_many():
    check = checks.above(checks.cells_of("omit-keep"), checks.cells_of("keep-keep"), by=-0.05)
    few = {"keep-keep": some(0.7), "omit-keep": some(0.7)}
    same = {"keep-keep": alike(1.0), "omit-keep": alike(1.0)}
    assert check(evidence_of(weights=few)).holds is False
    assert check(evidence_of(weights=few, weights_many=same)).holds
    lacking = same | {"omit-keep": alike(1.0) | dict.fromkeys(NEEDLES[:20], 0.0)}
    assert check(evidence_of(weights=few, weights_many=lacking)).holds is False
    one_side = evidence_of(weights=few, weights_many={"keep-keep": alike(1.0)})
    assert check(one_side).holds is False


def test_the_many_are_every_needle_once():
    recipe = recipe_for(model_of("tiny-griffin"), PACKAGED)
    by_seed = prompts_of(model_of("tiny-griffin"), recipe, many=True)
    prompts = [prompt for found in by_seed.values() for prompt in found]
    assert len({prompt.needle_id for prompt in prompts}) == len(prompts) == recipe.n_many == 61
    assert {(prompt.length, prompt.depth) for prompt in prompts} == {(min(recipe.lengths), 0.5)}


def scores_of(**rights: list[int]) -> language.Scores:
    cells = {form: {"glue_x": a_cell("glue_x", form, right, 0.5)} for form, right in rights.items()}
    return language.Scores(cells)


def judged_scores(check: Any, suite: str = "glue", **rights: list[int]) -> Finding:
    evidence = evidence_of(top_k=by_k({8: 1.0}))
    evidence.language[suite] = scores_of(**rights)
    return check(evidence)


def test_a_tie_is_not_below():
    (figure,) = items_of("thesis2025", ["Figure 5.1"])
    below = next(claim.check for claim in figure.claims if "sparse is below ablated" in claim.text)
    good, worse = [1] * 90 + [0] * 10, [1] * 60 + [0] * 40
    assert not judged_scores(below, base=good, sparse=good, ablated=good).holds
    assert judged_scores(below, base=good, sparse=worse, ablated=good).holds
    many = [1] * 4000
    hardly = [1] * 3980 + [0] * 20  # half a point, and surely so
    assert judged_scores(below, base=many, sparse=hardly, ablated=many).holds is False


def test_a_model_at_chance_tests_no_claim_about_language():
    lot, good = [1, 0] * 50, [1] * 90 + [0] * 10
    within = language.gap("glue", "sparse", -10.0, 10.0)
    near = language.near_chance("glue", "ablated", 15.0)
    for check in (within, near):
        finding = judged_scores(check, base=lot, sparse=lot, ablated=lot)
        assert finding.holds is None and "base is at chance" in finding.ours
    assert judged_scores(near, base=good, ablated=lot).holds
    assert judged_scores(within, base=good, sparse=[*good[1:], 1], ablated=lot).holds
    correlation = Cell("cola", "base", None, "mcc,none", 0.02, 0.03, True, 99, 0, {}, None, {}, 0.0)
    evidence = evidence_of(top_k=by_k({8: 1.0}))
    forms = {form: {"cola": replace(correlation, form=form)} for form in ("base", "sparse")}
    evidence.language["glue"] = language.Scores(forms)
    assert "base is at chance" in within(evidence).ours
    forms["base"]["cola"] = replace(correlation, value=0.3)
    assert within(evidence).holds is False


def arguments_of(out: Path, *only: str) -> list[str]:
    named = [part for name in only for part in ("--only", name)]
    return ["--paper", "sllm2025", *named, "--quick", "--out", str(out)]


def test_items_that_read_no_prompt_join_a_report_with_options_of_prompts(tmp_path: Path):
    """They are of the folder's recipe, so that its options have to be given again."""
    out = tmp_path / "r"
    recipe = {"paper": "sllm2025", "lengths": [150, 200]}
    options = ["--lengths", "150", "--depths", "1"]
    alone = invoke(*arguments_of(out, "Table 1"), *options)
    assert alone.exit_code == 1 and "these items read no prompt" in alone.output
    reads = next(item.name for item in items_of("sllm2025") if runs_of(item))
    out.mkdir()
    (out / "recipe.json").write_text(json.dumps(recipe))
    (out / "claims.csv").write_text(f"item\n{reads}\n")
    again = invoke(*arguments_of(out, "Table 1"), *options, "--resume")
    assert again.exit_code == 1 and "another recipe" in again.output


def test_a_folder_in_which_nothing_was_run_takes_other_prompts(tmp_path: Path):
    """As one that a table of the config began, with lengths that were not given."""
    model = HookedHybrid.from_pretrained("tiny-griffin")
    begun = recipe_for(model, QUICK, lengths=[150, 190])
    begun.save(tmp_path, "sllm2025", resume=False)
    other = replace(begun, lengths=(160, 200))
    other.save(tmp_path, "sllm2025", resume=True)
    assert json.loads((tmp_path / "recipe.json").read_text())["lengths"] == [160, 200]
    with pytest.raises(ValueError, match="another recipe: paper"):
        other.save(tmp_path, "thesis2025", resume=True)
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "cells.sqlite").touch()
    with pytest.raises(ValueError, match="another recipe: lengths"):
        begun.save(tmp_path, "sllm2025", resume=True)


def test_resuming_some_items_keeps_the_others_in_the_report(tmp_path: Path):
    out = tmp_path / "r"
    assert invoke(*arguments_of(out, "Table 1", "Figure 2")).exit_code == 0
    again = invoke(*arguments_of(out, "Figure 2"), "--resume")
    assert again.exit_code == 0, again.output
    assert (
        items_in(out) == ["Table 1", "Figure 2"] and "## Table 1" in (out / "report.md").read_text()
    )
    (out / "claims.csv").write_text("nothing")
    broken = invoke(*arguments_of(out, "Figure 2"), "--resume")
    assert broken.exit_code == 1 and "claims.csv cannot be read" in " ".join(broken.output.split())


def folders_of_benchmarks(monkeypatch: pytest.MonkeyPatch) -> list[Path | None]:
    """Return the folders that runs measure from, one for each; nothing is measured."""
    seen: list[Path | None] = []

    def measured(*arguments: Any) -> language.Scores:
        seen.append(arguments[5])
        return language.Scores(why_not=language.NO_DATA)

    monkeypatch.setattr(command, "measure", measured)
    return seen


def test_the_folder_of_benchmarks_is_kept_with_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, tasks, seen = tmp_path / "r", tmp_path / "tasks", folders_of_benchmarks(monkeypatch)
    tasks.mkdir()
    wanted = ["--paper", "thesis2025", "--only", "Figure C.1", "--quick", "--out", str(out)]
    assert invoke(*wanted).exit_code == 0
    before = json.loads((out / "recipe.json").read_text())
    del before["include_path"]  # as recipes were written once
    (out / "recipe.json").write_text(json.dumps(before))
    assert invoke(*wanted, "--resume").exit_code == 0
    assert invoke(*wanted, "--resume", "--include-path", str(tasks)).exit_code == 0
    assert invoke(*wanted, "--resume", "--include-path", str(tasks)).exit_code == 0
    assert seen == [None, None, tasks, tasks]
    other = invoke(*wanted, "--resume", "--include-path", str(tmp_path))
    assert other.exit_code == 1 and "another recipe: include_path" in " ".join(other.output.split())
    assert (
        "documents of each task | the first 2; none could be read"
        in (out / "report.md").read_text()
    )


def test_a_folder_whose_code_would_run_is_never_taken_from_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The recipe may be another's; what it names is computed again, and never read."""
    out, tasks, seen = tmp_path / "r", tmp_path / "tasks", folders_of_benchmarks(monkeypatch)
    tasks.mkdir()
    wanted = ["--paper", "thesis2025", "--only", "Figure C.1", "--quick", "--out", str(out)]
    assert invoke(*wanted).exit_code == 0
    recipe = json.loads((out / "recipe.json").read_text())
    for name in (str(tasks), "\x1b[31mtasks", ["tasks"], "a\0b"):
        (out / "recipe.json").write_text(json.dumps({**recipe, "include_path": name}))
        result = invoke(*wanted, "--resume")
        assert result.exit_code == 1 and "\x1b" not in result.stderr, result.output
        expected = "give --include-path again" if isinstance(name, str) else "holds no recipe"
        assert expected in " ".join(result.output.split()) or "\0" in name
    assert seen == [None]
    for name in ("reproduce", "eval"):
        shown = CliRunner().invoke(build_app(), [name, "--help-all"]).output
        assert "code is run" in " ".join(shown.replace("│", " ").split())


def test_a_missing_folder_of_benchmarks_is_an_error_before_anything_runs(tmp_path: Path):
    out = tmp_path / "r"
    wanted = ["--paper", "thesis2025", "--only", "Figure C.1", "--quick", "--out", str(out)]
    result = invoke(*wanted, "--include-path", str(tmp_path / "none"))
    assert result.exit_code == 1 and "there is no such folder" in " ".join(result.output.split())
    assert not out.exists()


def test_an_item_that_fails_leaves_the_others_their_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    out, write_item = tmp_path / "r", command.write_item

    def fails(item: Any, *rest: Any) -> Any:
        if item.name == "Figure 2":
            raise KeyError("a column")
        return write_item(item, *rest)

    monkeypatch.setattr(command, "write_item", fails)
    result = invoke(*arguments_of(out, "Table 1", "Figure 2"))
    assert result.exit_code == 1 and "Figure 2 not run: KeyError: a column" in " ".join(
        result.output.split()
    )
    claims = pd.read_csv(out / "claims.csv").groupby("item")["verdict"].unique()
    assert list(claims["Figure 2"]) == ["untested on real weights"]
    assert list(claims["Table 1"]) == ["the published config shows it"]
    page = (out / "report.md").read_text()
    assert "not run: KeyError: a column" in page and "## Figure 2" in page


def test_an_item_that_was_not_run_has_no_verdict():
    (item,) = items_of("thesis2025", ["Figure 3.2"])
    entry = not_run(item, Untested("run x was not made"))
    assert entry.verdict is Verdict.UNTESTED
    assert {finding.ours for finding in entry.findings} == {"not run: run x was not made"}


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (",2.0,", ",x,"), (",2.0,", ",,"), (",2.0,", ",1e999,"), ("loss", "cost"),
        (",more_high", ",more_high,mine"), ("k=1", "k=2"),
    ],
)  # fmt: skip
def test_losses_of_others_that_are_no_numbers_are_refused(
    old: str, new: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    monkeypatch.setattr(runs, "_describe_losses", lambda *_: {})
    model = HookedHybrid.from_pretrained("tiny-griffin")
    recipe, settings = recipe_for(model, QUICK), [Setting("whole"), Setting("k=1")]
    table = "setting,loss,low,high,more,more_low,more_high\nwhole,1.0,,,0,,\nk=1,2.0,1,3,1,,\n"
    (tmp_path / "text_loss.json").write_text("{}")
    (tmp_path / "text_loss.csv").write_text(table)
    assert runs.text_losses(model, settings, recipe, tmp_path)["loss"].tolist() == [1, 2]
    (tmp_path / "text_loss.csv").write_text(table.replace(old, new))
    with pytest.raises(ValueError, match=r"text_loss\.csv is damaged: remove it"):
        runs.text_losses(model, settings, recipe, tmp_path)
