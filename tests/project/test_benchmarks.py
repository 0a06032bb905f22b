"""The benchmarks' harness: its arithmetic, its files and one tiny run. No time is asserted."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from experiments.benchmarks import __main__ as command
from experiments.benchmarks import bars, harness, plot, report
from experiments.benchmarks.bars import ALONE, GEMM, GOOGLE, HF, PLAIN, Bar, rows, verdict
from experiments.benchmarks.cases import CASES
from experiments.benchmarks.child import peak_growth
from experiments.benchmarks.figures import (
    FILE,
    OURS,
    Figures,
    Measurement,
    read_figures,
    write_figures,
)
from experiments.benchmarks.floors import PIECE, Product, gemm_floor, pieces, products, read_floor
from experiments.benchmarks.options import Options
from experiments.benchmarks.timing import DisagreementError, check_equal, interleaved
from hooked_hybrid import HookedHybrid
from hooked_hybrid.presets import configs as presets


@pytest.fixture(autouse=True)
def same_number_of_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # what the command sets is undone
    n = torch.get_num_threads()
    yield
    torch.set_num_threads(n)


def made_up() -> Figures:
    machine = {"cpu": "abacus", "threads": 1, "GEMM, GFLOP/s": 12.345}
    measurements = []
    for case in ("rg-prefill", "jamba-prefill"):
        for n in (512, 2048, 4096):
            values = {
                OURS: [n * 1e-3, n * 1.1e-3, n * 1e-3],
                HF: [n * 2e-3, n * 2e-3, n * 2.2e-3],
                GEMM: [n * 0.8e-3] * 3,
            }
            if case == "rg-prefill":
                values[GOOGLE] = [n * 3e-3] * 3
            measurements.append(Measurement(case, f"{n} tokens", values, length=n, note="why"))
    measurements.append(Measurement("memory", "prefill of 1024", {OURS: [40.0, 50.0]}, "MB"))
    values = {OURS: [2.0, 2.0], PLAIN: [1.0, 1.0]}
    measurements.append(Measurement("state-edit", "one position of 4096", values))
    return Figures(machine, tuple(measurements))


# --- arithmetic ------------------------------------------------------------------------------


def test_a_ratio_is_the_median_of_the_rounds_and_not_the_ratio_of_medians():
    measured = Measurement("c", "w", {OURS: [1.0, 2.0, 4.0], HF: [3.0, 2.0, 20.0]})
    (row,) = rows(measured)
    assert (row.ours, row.theirs) == (2.0, 3.0)
    assert (row.ratio, row.low, row.high) == (3.0, 1.0, 5.0)
    assert row.bar is None
    assert row.verdict == ""


def test_against_a_floor_the_ratio_is_turned_round():
    (row,) = rows(Measurement("c", "w", {OURS: [3.0], GEMM: [2.0]}))
    assert row.ratio == 1.5


def test_an_amount_alone_is_its_own_ratio():
    (row,) = rows(Measurement("memory", "prefill of 1024", {OURS: [40.0, 60.0, 90.0]}, "MB"))
    assert (row.peer, row.theirs, row.ratio, row.low, row.high) == (ALONE, None, 60.0, 40.0, 90.0)
    assert row.verdict == "held"


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [(1.42, "missed"), (1.43, "held"), (1.5, "held"), (1.64, "held"), (1.65, "stretch")],
)
def test_a_bar_of_at_least_is_held_at_95_percent_of_it(ratio: float, wanted: str):
    assert verdict(ratio, Bar(HF, 1.5, 1.65)) == wanted


@pytest.mark.parametrize(
    ("ratio", "wanted"),
    [(1.37, "missed"), (1.36, "held"), (1.3, "held"), (1.21, "held"), (1.2, "stretch")],
)
def test_a_bar_of_at_most_is_held_at_it_over_95_percent(ratio: float, wanted: str):
    assert verdict(ratio, Bar(GEMM, 1.3, 1.2)) == wanted


def test_without_a_stretch_a_bar_is_held_at_best():
    assert verdict(100.0, Bar(HF, 5)) == "held"
    assert verdict(0.001, Bar(ALONE, 16)) == "held"


def test_every_bar_belongs_to_a_case_and_its_stretch_is_harder():
    for (case, what), wanted in bars.BARS.items():
        assert case in CASES, (case, what)
        for bar in wanted:
            if bar.stretch is not None:
                assert (bar.stretch < bar.limit) == (bar.peer in bars.FLOORS), (case, what)


# --- timing ----------------------------------------------------------------------------------


def test_interleaved_keeps_each_round_of_each_and_lets_each_begin():
    order: list[str] = []
    works = {name: lambda name=name: order.append(name) for name in "abc"}
    seconds = interleaved(works, 3, shortest=0.0)
    assert {name: len(kept) for name, kept in seconds.items()} == {"a": 3, "b": 3, "c": 3}
    assert order == list("abc" + "abc" + "bca" + "cab")


def test_short_work_is_repeated():
    torch.set_num_threads(1)
    count = 0

    def work() -> None:
        nonlocal count
        count += 1
        sum(range(100_000))

    interleaved({"work": work}, 1, shortest=0.02)
    assert count > 2


def test_competitors_that_disagree_are_not_timed():
    a, b = torch.ones(3), torch.tensor([1.0, 1.0, 1.001])
    check_equal({"a": a, "b": a + 1e-6, "c": None})
    with pytest.raises(DisagreementError, match="a and b differ by 1.0e-03"):
        check_equal({"a": a, "b": b})
    with pytest.raises(DisagreementError, match="a and b differ by nan"):
        check_equal({"a": a, "b": b * torch.nan})
    with pytest.raises(DisagreementError, match="a and b give"):
        check_equal({"a": a, "b": b[:2]})
    with pytest.raises(DisagreementError):
        interleaved({"a": lambda: a, "b": lambda: b}, 1, check=check_equal)


# --- floors and memory -----------------------------------------------------------------------


def test_products_of_a_griffin_count_all_its_matrices():
    cfg = presets.griffin("RA", d_model=32, d_vocab=50, n_heads=2, d_mlp=48)
    tokens = torch.randint(3, 50, (1, 10))
    found = products(HookedHybrid(cfg), tokens)
    assert Product(10, 16, 32, 2) in found  # both gates, in blocks
    assert Product(10, 32, 64) in found  # q, k and v; or both branches
    rg_lru, attention = 4 * 32 * 32, 32 * (32 + 2 * 16) + 32 * 32
    sizes = [p.rows * p.d_in * p.d_out * p.blocks for p in found]
    assert sum(sizes) == 10 * (rg_lru + attention + 2 * 3 * 32 * 48)
    assert products(HookedHybrid(cfg), tokens, unembed=True)[-1] == Product(10, 32, 50)


def test_products_of_a_jamba_count_the_experts_that_are_chosen():
    cfg = presets.jamba("MM", d_model=16, d_vocab=50, n_experts=4, n_chosen=2, d_mlp=24)
    found = products(HookedHybrid(cfg), torch.randint(3, 50, (1, 10)))
    in_experts = [p.rows for p in found[-8:] if (p.d_in, p.d_out) == (16, 48)]
    assert sum(in_experts) == 20


def test_floors_run():
    wanted = [Product(PIECE + 3, 8, 4), Product(5, 4, 4, 2)]
    gemm_floor(wanted)()
    read_floor(wanted[1:])()
    assert list(pieces(2 * PIECE + 1)) == [PIECE, PIECE, 1]


def test_memory_taken_for_a_while_is_seen():
    def work() -> int:
        return int(torch.ones(2**23).sum())  # 32 MB

    result, grown = peak_growth(work)
    assert result == 2**23
    assert grown > 2**24


# --- files -----------------------------------------------------------------------------------


def test_figures_come_back_as_they_were_written(tmp_path: Path):
    assert read_figures(tmp_path) == Figures()
    write_figures(tmp_path, made_up())
    assert read_figures(tmp_path) == made_up()
    assert [path.name for path in tmp_path.iterdir()] == [FILE]


def of(case: str, what: str, seconds: float) -> Measurement:
    return Measurement(case, what, {OURS: [seconds], HF: [2 * seconds]})


def one(options: Options) -> Iterator[Measurement]:
    yield of("one", "first", 1.0)
    yield of("one", "second", 1.0)


def two(options: Options) -> Iterator[Measurement]:
    yield of("two", "only", 1.0)


def test_only_replaces_its_own_figures(tmp_path: Path):
    old = Figures({}, (of("two", "only", 9.0), of("one", "gone", 9.0), of("one", "first", 9.0)))
    write_figures(tmp_path, old)
    failed = harness.run(tmp_path, Options(tmp_path, quick=True), ["one"], {"one": one, "two": two})
    assert failed == []
    kept = [(m.case, m.what, m.values[OURS]) for m in read_figures(tmp_path).measurements]
    assert kept == [("one", "first", [1.0]), ("one", "second", [1.0]), ("two", "only", [9.0])]
    measured = read_figures(tmp_path).of("one")[0]
    assert set(measured.about) == {"date", "commit"}


def test_a_case_that_fails_keeps_what_it_had_and_the_others_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    def breaks(options: Options) -> Iterator[Measurement]:
        yield of("breaks", "first", 1.0)
        raise RuntimeError("out of steam")

    write_figures(tmp_path, Figures({}, (of("breaks", "second", 9.0),)))
    cases = {"breaks": breaks, "two": two}
    assert harness.run(tmp_path, Options(tmp_path, quick=True), (), cases) == ["breaks"]
    whats = [(m.case, m.what) for m in read_figures(tmp_path).measurements]
    assert whats == [("breaks", "second"), ("breaks", "first"), ("two", "only")]
    assert "out of steam" in capsys.readouterr().err


def test_a_peer_that_is_not_installed_is_no_failure_and_keeps_its_figures(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    old = Figures({}, (of("transformerlens", "plain", 1.0),))
    write_figures(tmp_path, old)
    assert harness.run(tmp_path, Options(tmp_path, quick=True), ["transformerlens"]) == []
    assert read_figures(tmp_path).measurements == old.measurements
    assert "pip install" in capsys.readouterr().err


def test_a_case_that_is_not_is_an_error(tmp_path: Path):
    with pytest.raises(ValueError, match="no case three: there are one"):
        harness.run(tmp_path, Options(tmp_path), ["three"], {"one": one})


def test_table_and_picture_of_made_up_figures(tmp_path: Path):
    write_figures(tmp_path, made_up())
    page = harness.render(tmp_path)
    assert (tmp_path / report.FILE).read_text(encoding="utf-8") == page
    assert "| GEMM, GFLOP/s | 12.3 |" in page
    line = next(line for line in page.splitlines() if "4096 tokens | 4.1 s | transformers" in line)
    assert "| 2.00 x faster | 1.82 - 2.20 | ≥ 1.5 | ≥ 1.65 | stretch |" in line
    assert (
        "| prefill of 1024 | 45 MB | alone |  | 45 MB | 40 MB - 50 MB | ≤ 100 |  | held |" in page
    )
    assert "TransformerLens is not installed" in page
    assert "2.00 x the time | 2.00 - 2.00 | ≤ 1.3 | ≤ 1.1 | **missed** |" in page
    assert page.rstrip().endswith("2 missed.")
    assert (tmp_path / plot.FILE).read_bytes().startswith(b"\x89PNG")
    assert plot.speeds(made_up(), "rg-prefill", OURS)[0] == pytest.approx(
        (512, 1000, 512 / 0.5632, 1000)
    )


@pytest.mark.parametrize(
    ("value", "unit", "wanted"),
    [
        (12.345, "s", "12.3 s"),
        (0.0123, "s", "12.3 ms"),
        (4.5e-5, "s", "45 us"),
        (0.0, "s", "0 us"),
        (7.891, "MB", "7.89 MB"),
        (1283.4, "MB", "1283 MB"),
    ],
)
def test_amounts_have_three_digits(value: float, unit: str, wanted: str):
    assert report.amount(value, unit) == wanted


def test_the_slope_is_in_tokens_a_second_too():
    each = Measurement("rg-prefill", "8192 tokens, each", {OURS: [1e-3]}, length=8192)
    assert plot.speeds(Figures({}, (each,)), "rg-prefill", OURS) == [(8192, 1000, 1000, 1000)]


def test_a_report_without_measurements_is_an_error(tmp_path: Path):
    with pytest.raises(SystemExit, match="contains no figures"):
        command.main(["--render", "--out", str(tmp_path)])


def test_a_tiny_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    command.main(["--quick", "--only", "scan", "attention", "--out", str(tmp_path)])
    assert "## scan" in capsys.readouterr().out
    figures = json.loads((tmp_path / FILE).read_text())
    assert [m["case"] for m in figures["measurements"]] == ["scan", "scan", "attention"]
    assert figures["machine"]["threads"] == 1
    assert (tmp_path / plot.FILE).exists()
    again = (tmp_path / report.FILE).read_text()
    command.main(["--render", "--out", str(tmp_path)])
    assert (tmp_path / report.FILE).read_text() == again
