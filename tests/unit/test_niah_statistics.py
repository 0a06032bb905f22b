"""Properties of the clustered bootstrap and of the summary of a sweep."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import pytest

from hooked_hybrid.niah import statistics
from hooked_hybrid.niah.statistics import cluster_column, clustered_interval, scored, summary


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


def naive_interval(values: Any, clusters: Any, n: int, seed: int) -> tuple[float, float]:
    rng = np.random.default_rng(seed)
    labels = sorted(set(clusters))
    groups = [[v for v, c in zip(values, clusters, strict=True) if c == x] for x in labels]
    means = []
    for _ in range(n):
        drawn = [groups[i] for i in rng.integers(len(groups), size=len(groups))]
        means.append(np.mean([v for group in drawn for v in group]))
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def clustered_values(seed: int, n_clusters: int = 25) -> tuple[np.ndarray, np.ndarray]:
    """Return values around 0.4 that share most of their spread within clusters of unequal size."""
    rng = np.random.default_rng(seed)
    clusters = np.repeat(np.arange(n_clusters), rng.integers(1, 9, size=n_clusters))
    shared = rng.normal(0, 0.3, size=n_clusters)[clusters]
    return 0.4 + shared + rng.normal(0, 0.05, size=len(clusters)), clusters


def test_the_interval_is_that_of_resampling_clusters_one_at_a_time():
    values, clusters = clustered_values(1)
    ours = clustered_interval(values, clusters, n_resamples=8000)
    assert ours == pytest.approx(naive_interval(values, clusters, 8000, seed=7), abs=0.008)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says():
    covered = []
    for seed in range(150):
        low, high = clustered_interval(*clustered_values(seed), n_resamples=400)
        covered.append(low <= 0.4 <= high)
    assert 0.86 <= np.mean(covered) <= 0.99


def test_values_that_vary_together_give_a_wider_interval_than_independent_ones():
    values, clusters = clustered_values(3)
    low, high = clustered_interval(values, clusters)
    low_cells, high_cells = clustered_interval(values, range(len(values)))
    assert high - low > 1.5 * (high_cells - low_cells)


def test_a_higher_level_gives_a_wider_interval_around_the_mean():
    values, clusters = clustered_values(4)
    low, high = clustered_interval(values, clusters, level=0.99)
    inner_low, inner_high = clustered_interval(values, clusters, level=0.5)
    assert low < inner_low < values.mean() < inner_high < high


def test_order_and_names_of_clusters_do_not_matter_and_the_seed_does():
    values, clusters = clustered_values(5)
    order = np.random.default_rng(0).permutation(len(values))
    first = clustered_interval(values, clusters)
    assert clustered_interval(values[order], clusters[order]) == pytest.approx(first, abs=1e-12)
    named = [f"needle {c:03}" for c in clusters]
    assert clustered_interval(values, [f"{c:03}" for c in clusters]) == clustered_interval(
        values, named
    )
    assert clustered_interval(values, clusters, seed=1) != first


def test_the_draws_do_not_depend_on_how_many_are_held_at_once(monkeypatch: pytest.MonkeyPatch):
    values, clusters = clustered_values(6)
    whole = clustered_interval(values, clusters)
    monkeypatch.setattr(statistics, "_CHUNK", 100)
    assert clustered_interval(values, clusters) == pytest.approx(whole, abs=0.02)


def test_values_that_are_all_alike_give_no_width_and_one_cluster_no_interval():
    assert clustered_interval([1, 1, 1], "abc") == (1, 1)
    assert np.isnan(clustered_interval([0, 1], ["a", "a"])).all()


@pytest.mark.parametrize(
    ("values", "clusters", "options", "message"),
    [
        ([], [], {}, "at least one value"),
        ([1.0, float("nan")], "ab", {}, "none that is missing"),
        ([1.0, 2.0], "abc", {}, "2 values, 3 cluster labels"),
        ([1.0, 2.0], "ab", {"level": 1.0}, "level=1.0"),
        ([1.0, 2.0], "ab", {"n_resamples": 0}, "n_resamples=0"),
    ],
)
def test_bad_input_is_refused(values: Any, clusters: Any, options: Any, message: str):
    with pytest.raises(ValueError, match=message):
        clustered_interval(values, clusters, **options)


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
    assert row.low <= row.accuracy <= row.high


def test_intervals_resample_needles_where_there_are_several_and_prompts_otherwise():
    one, two = sweep_table(), sweep_table(needles=("paper", "held-out-00"))
    assert (cluster_column(one), cluster_column(two)) == ("prompt_id", "needle_id")
    two["accuracy"] = np.where(two.needle_id == "paper", 1.0, 0.0)
    row = summary(two).iloc[0]
    assert (row.low, row.high) == (0, 1)


def test_cells_without_a_needle_count_nowhere():
    table = sweep_table().astype({"binary": float})  # as SQLite gives a column with gaps
    lost = {"accuracy": np.nan, "graded": np.nan, "binary": np.nan, "in_window": pd.NA}
    empty = table[table.length == 100].assign(needle_id="none", prompt_id="empty", **lost)
    both = pd.concat([table, empty.astype({"in_window": "boolean"})], ignore_index=True)
    pd.testing.assert_frame_equal(summary(both), summary(table))
    with pytest.raises(ValueError, match="no prompt held a needle"):
        scored(empty)


def test_without_a_window_nothing_is_outside():
    rows = summary(sweep_table(window=None))
    assert rows.outside.isna().all() and (rows.n_outside == 0).all()
