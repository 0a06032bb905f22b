"""The summary of a sweep: its means, and their intervals over needles."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from hooked_hybrid.niah.cells import cell_of, with_places
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt
from hooked_hybrid.niah.settings.setting import Setting
from hooked_hybrid.runs.statistics import interval_of, select_scored, summary


def sweep_table(
    ks: Sequence[int | None] = (0, 2, 4),
    stages: Sequence[str] = ("generation", "both"),
    needles: Sequence[str] = ("paper",),
    lengths: Sequence[int] = (100, 200, 400),
    depths: Sequence[float] = (0.0, 0.5, 1.0),
    window: int | None = 250,
    seed: int = 0,
) -> pd.DataFrame:
    """Return a table as `niah` does, of made-up scores: none at k = 0, then more with k."""
    rng = np.random.default_rng(seed)
    rows = []
    for needle in needles:
        for length in lengths:
            for depth in depths:
                start = 5 + int((length - 50) * depth)
                seen = window is None or start >= length - window
                for stage in stages:
                    for k in ks:
                        score = 0.0 if k == 0 else float(rng.integers(2, 6)) - (not seen)
                        rows.append(
                            {
                                "prompt_id": f"{needle}-{length}-{depth}",
                                "setting": "no hooks" if k is None else f"{stage} k={k}",
                                "stage": stage,
                                "k": k,
                                "needle_id": needle,
                                "city": "San Francisco",
                                "template": "base",
                                "read_twice": False,
                                "n_distractors": 0,
                                "length": length,
                                "depth": depth,
                                "needle_start": start,
                                "needle_stop": start + 20,
                                "in_window": seen,
                                "output": 'eat a <b>sandwich</b>, said "he"',
                                "graded": score,
                                "accuracy": score / 5,
                                "binary": int(score == 5),
                                "released": score,
                                "n_new_tokens": 20,
                                "min_margin": 0.3,
                                "seconds": 0.1,
                            }
                        )
    table = pd.DataFrame(rows)
    return table.astype({"k": "Int64", "read_twice": "boolean", "in_window": "boolean"})


def test_summary_has_the_means_of_each_setting_in_the_order_of_the_table():
    table = sweep_table(ks=(4, 0))
    rows = summary(table).set_index("setting")
    assert list(rows.index) == ["generation k=4", "generation k=0", "both k=4", "both k=0"]
    cells = table[table.setting == "both k=4"]
    inside = cells.in_window.astype(bool)
    row = rows.loc["both k=4"]
    assert (row.k, row.stage, row.n, row.n_needles) == (4, "both", 9, 1)
    assert row.accuracy == pytest.approx(cells.graded.mean() / 5)
    assert row.binary == pytest.approx((cells.graded == 5).mean())
    assert row.inside == pytest.approx(cells[inside].accuracy.mean())
    assert row.outside == pytest.approx(cells[~inside].accuracy.mean())
    assert (row.n_inside, row.n_outside) == (inside.sum(), (~inside).sum())
    assert 0 < row.n_outside < 9
    assert np.isnan(row.low) and np.isnan(row.high)  # one needle says nothing of others


def test_intervals_are_over_needles_however_many_their_prompts():
    table = sweep_table(ks=(2,), stages=("both",), needles=("paper", "held-out-00"))
    table["accuracy"] = np.where(table.needle_id == "paper", 1.0, 0.0)
    row = summary(table).iloc[0]
    exact = stats.binomtest(1, 2).proportion_ci(method="exact")  # of two needles, not 18 cells
    assert (row.low, row.high) == pytest.approx((exact.low, exact.high), abs=1e-6)
    assert interval_of(table) == (row.low, row.high)


def test_cells_without_a_needle_count_nowhere():
    table = sweep_table().astype({"binary": float})  # as SQLite gives a column with gaps
    lost = {"accuracy": np.nan, "graded": np.nan, "binary": np.nan, "in_window": pd.NA}
    empty = table[table.length == 100].assign(needle_id="none", prompt_id="empty", **lost)
    both = pd.concat([table, empty.astype({"in_window": "boolean"})], ignore_index=True)
    pd.testing.assert_frame_equal(summary(both), summary(table))
    with pytest.raises(ValueError, match="no prompt held a needle"):
        select_scored(empty)


def test_cells_without_a_needles_name_are_those_of_one_needle_more():
    table = sweep_table(ks=(2,), stages=("both",), needles=("paper", "other"))
    table["needle_id"] = table["needle_id"].replace("other", None)
    (row,) = summary(table).to_dict("records")
    assert row["n_needles"] == 2 and row["low"] < row["accuracy"] < row["high"]


def test_a_setting_of_one_cell_has_its_figures_and_no_interval():
    table = sweep_table(ks=(2,), stages=("both",), lengths=(100,), depths=(0.5,))
    (row,) = summary(table).to_dict("records")
    assert (row["setting"], row["stage"], row["k"], row["n"]) == ("both k=2", "both", 2, 1)
    assert row["accuracy"] == table["accuracy"][0] and np.isnan(row["low"])
    assert (row["n_inside"], row["n_outside"]) == (1, 0) and np.isnan(row["outside"])


@pytest.mark.parametrize(
    ("window", "seen"), [(None, True), (41, True), (40, True), (39, False), (1, False)]
)
def test_a_needle_is_in_the_window_where_its_first_token_is(window: int | None, seen: bool):
    """Of 100 tokens, the last copy of the needle at 60: the last token sees 60 to 99 of them."""
    prompt = Prompt(
        "p", tuple(range(100)), 100, 0.5, PAPER, "paper", ((9, 15), (60, 66)), "base", True, 3,
        0.48, "words",
    )  # fmt: skip
    setting = Setting("s", spec={"kept": 2, "k": 2})
    cell = cell_of(prompt, setting, "is to eat a sandwich", 7, 0.5, 1.5, window)
    assert cell["in_window"] is seen
    assert (cell["needle_start"], cell["needle_stop"], cell["stage"]) == (9, 15, "generation")
    assert (cell["n_new_tokens"], cell["min_margin"], cell["seconds"]) == (7, 0.5, 1.5)
    assert cell["graded"] == 1.0 and cell["accuracy"] == 0.2 and not cell["binary"]
    assert (cell["k"], cell["length"], cell["n_distractors"], cell["depth"]) == (2, 100, 3, 0.5)
    assert (cell["real_depth"], cell["placed_between"]) == (0.48, "words")


def test_a_cell_without_a_needle_has_no_score_and_no_place():
    prompt = Prompt("p", (1, 2), 2, 0.5, None, "none", (), "base", False, 0)
    cell = cell_of(prompt, Setting("s"), "anything", 1, 0.5, 0.1, None)
    about = ("city", "needle_start", "needle_stop", "in_window", "graded", "accuracy", "binary")
    assert [cell[name] for name in about] == [None] * 7
    assert cell["released"] is None and cell["k"] is None


def test_places_of_older_tables_are_those_of_their_prompts():
    def prompt(name: str, real: float) -> Prompt:
        return Prompt(name, (1,), 1, 0.5, PAPER, "p", ((0, 1),), "base", False, 0, real, "words")

    prompts = [prompt("a", 0.25), prompt("b", 0.75)]
    table = pd.DataFrame({"prompt_id": ["b", "a", "b"]})
    known = table.assign(real_depth=0.5, placed_between="sentences")
    assert with_places(known, prompts) is known
    found = with_places(table.assign(real_depth=None, placed_between=None), prompts)
    assert found["real_depth"].tolist() == [0.75, 0.25, 0.75]
    assert found["placed_between"].tolist() == ["words"] * 3
    part = known.assign(placed_between=["sentences", None, None])
    assert with_places(part, prompts)["real_depth"].tolist() == [0.75, 0.25, 0.75]


def test_without_a_window_nothing_is_outside():
    rows = summary(sweep_table(window=None))
    assert rows.outside.isna().all() and (rows.n_outside == 0).all()
