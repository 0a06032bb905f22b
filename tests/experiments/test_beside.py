"""Experiments on other people's results: the hooks do what they say, verdicts can come out."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch

from experiments.beside import __main__ as program
from experiments.beside import frame, window
from experiments.beside.channels import cut_channels
from experiments.beside.convolution import cut_taps, induction, shares
from experiments.beside.frame import Bench, Experiment, Finding
from experiments.beside.gather_aggregate import roles
from experiments.beside.removal import run as removal
from hooked_hybrid import HookedHybrid
from hooked_hybrid.interventions import on_rows
from tests.models import CONFIGS, griffin_config, random_model, random_tokens, relative
from tests.tolerances import FP32_PARITY

models = pytest.mark.parametrize("name", ["griffin", "jamba"])


@cache
def shared_model(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name], seed=5)


@cache
def packaged() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin").requires_grad_(False)


# --- the short convolution ------------------------------------------------------------------------


@models
@pytest.mark.parametrize("lags", [[0], [2], [1, 2, 3]])
def test_cut_taps_are_taps_of_weight_zero(name: str, lags: list[int]):
    model, tokens = shared_model(name), random_tokens()
    other = random_model(CONFIGS[name], seed=5)
    weight = other.blocks[1].mixers[0].conv.weight
    with torch.no_grad():
        weight[[len(weight) - 1 - lag for lag in lags]] = 0
    found = model.run_with_hooks(tokens, fwd_hooks=cut_taps(model, 1, lags))
    assert relative(found, other(tokens)) < FP32_PARITY
    assert relative(found, model(tokens)) > 1e-3


@models
def test_cut_taps_follow_rows_from_prefill_to_steps(name: str):
    model, tokens = shared_model(name), random_tokens(3, 9)
    hooks = [(where, on_rows(fn, [2, 0])) for where, fn in cut_taps(model, 0, [1, 3])]
    plain = model.generate(tokens, 6, stop_at_eos=False, return_type="output", verbose=False)
    ends = int(plain.new_tokens[1, 1])  # the row in between leaves first
    out = model.generate(
        tokens, 6, fwd_hooks=hooks, eos_token_id=ends, return_type="output", verbose=False
    )
    with model.hooks(cut_taps(model, 0, [1, 3])):
        for row in (0, 2):
            if not out.finished[row]:
                again = model(out.tokens[row : row + 1, :-1])[:, 8:].log_softmax(-1)
                said = again.gather(2, out.new_tokens[row, None, :, None])[0, :, 0]
                assert relative(out.logprobs[row], said) < FP32_PARITY
    assert out.finished[1] and not out.finished.all()


def test_cut_taps_refuse_what_they_have_not_seen():
    model, tokens = shared_model("jamba"), random_tokens(1, 8)
    _, state = model(tokens, return_state=True)
    with (
        pytest.raises(ValueError, match="without these hooks"),
        model.hooks(cut_taps(model, 0, [1])),
    ):
        model(tokens, state=state)
    with pytest.raises(ValueError, match="0 to 3 positions back"):
        cut_taps(model, 0, [4])


def test_induction_of_a_packaged_model_is_in_one_layers_convolution():
    model = packaged()
    found = shares(model, {"whole": [], "cut": cut_taps(model, 1, [1])}).set_index("setting")
    assert found.loc["whole", "induction_low"] > 0.8
    assert found.loc["cut", "induction_high"] < 0.3
    assert found.loc["cut", "induction"] == float(induction(model, cut_taps(model, 1, [1])).mean())


# --- channels and heads ---------------------------------------------------------------------------


@models
def test_cut_channels_are_rows_of_zero_in_the_output_projection(name: str):
    model, tokens = shared_model(name), random_tokens()
    other = random_model(CONFIGS[name], seed=5)
    mixer = other.blocks[1].mixers[0]
    n = mixer.state_shapes(mixer.cfg)["ssm"][0] // 4
    out = getattr(mixer, "linear_out", None) or mixer.out_proj
    with torch.no_grad():  # [out in]
        out.weight[:, n : 2 * n] = 0
        out.weight[:, 3 * n :] = 0
    found = model.run_with_hooks(tokens, fwd_hooks=cut_channels([(1, 1), (1, 3)], n_groups=4))
    assert relative(found, other(tokens)) < FP32_PARITY
    assert relative(found, model(tokens)) > 1e-3


def test_roles_are_weights_of_the_patterns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frame, "DEPTHS", (0.0,))
    monkeypatch.setattr(frame, "LENGTH", 80)
    bench = Bench(packaged(), tmp_path, n_needles=1)
    (prompt,) = bench.prompts()
    (start, stop), last = prompt.needle_spans[0], prompt.length - 1
    tokens = torch.tensor([[*prompt.tokens, *prompt.tokens[start:stop]]])
    _, cache_ = bench.model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_pattern")
    pattern = cache_["pattern", 2][0]
    found = roles(bench).set_index("setting")
    for head in (0, 5):
        row = found.loc[f"no head 2.{head}"]
        copied = [float(pattern[head, last + j, start + j]) for j in range(stop - 1 - start)]
        assert row["copy"] == pytest.approx(sum(copied) / len(copied), abs=1e-5)
        read = pattern[head, stop - 1, start : stop - 1].sum()
        assert row["gather"] == pytest.approx(float(read), abs=1e-5)
    assert found["copy"].max() > 0.5


# --- verdicts and the program ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("attention", "recurrence", "verdict"),
    [
        ((4.0, 4.4), (9.0, 10.0), "shows it"),
        ((-0.1, 0.1), (5.0, 6.0), "does not show it"),
        ((-0.1, 0.9), (5.0, 6.0), "cannot say"),
        ((4.0, 5.0), (1.0, 2.0), "does not show it"),
        ((4.0, 5.0), (4.5, 6.0), "cannot say"),  # the order is open
    ],
)
def test_a_verdict_follows_from_the_intervals(
    attention: tuple[float, float],
    recurrence: tuple[float, float],
    verdict: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
):
    def measured(self: Bench, settings: list) -> pd.DataFrame:
        assert settings[0].name == "whole"
        ends = {"no attention": attention, "no RG-LRU": recurrence}
        rows = [(s.name, 1.0, 1.0, 1.0, *ends.get(s.name, (0.0, 0.0))) for s in settings]
        columns = ["setting", "accuracy", "low", "high", "more_low", "more_high"]
        table = pd.DataFrame(rows, columns=columns)
        return table.assign(more=(table["more_low"] + table["more_high"]) / 2)

    monkeypatch.setattr(Bench, "measure", measured)
    model = random_model(griffin_config())
    finding = removal(Bench(model, tmp_path))
    assert finding.verdict == verdict
    assert finding.table.set_index("setting").loc["whole", "ratio"] == 1


def test_a_bench_measures_what_a_cut_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(frame, "DEPTHS", (0.0,))
    monkeypatch.setattr(frame, "LENGTH", 96)
    bench = Bench(packaged(), tmp_path, n_needles=1, n_texts=2)
    cut = frame.both("cut", cut_taps(bench.model, 1, [1]))
    table = bench.measure([frame.both("whole", []), cut]).set_index("setting")
    assert table.loc["whole", "accuracy"] == 1 and table.loc["whole", "more"] == 0
    assert table.loc["cut", "accuracy"] < 0.5 and table.loc["cut", "more"] > 0.1


def test_windows_are_those_of_the_trained_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(window, "WINDOWS", (8, 64))
    monkeypatch.setattr(window, "SCORED", 16)
    monkeypatch.setattr(window, "TASK", replace(window.TASK, length=48, n_facts=2))
    table = window.trained(tmp_path, seeds=(0,), steps=2)
    assert table["window"].tolist() == [8, 64]
    for size in (8, 64):
        kept = json.loads((tmp_path / f"window-{size}-0/recipe.json").read_text())
        assert f"n_keys={size}" in kept["config"]
    again = window.trained(tmp_path, seeds=(0,), steps=2)
    pd.testing.assert_frame_equal(table, again)


def test_the_program_runs_what_is_not_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    ran = []

    def run(bench: Bench) -> Finding:
        ran.append(bench.folder)
        row = {"setting": ["whole"], "accuracy": [1.0], "low": [0.9], "high": [1.0]}
        return Finding("cannot say", "nothing", pd.DataFrame(row))

    monkeypatch.setattr(program, "experiment_of", lambda name: Experiment(name, "nowhere", run))
    given = ["experiments.beside", "all", "--model", "tiny-griffin", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", given)
    program.main()
    program.main()
    assert ran == [program.folder_of(name, "tiny-griffin", tmp_path) for name in program.NAMES]
    said = json.loads((tmp_path / "tiny-griffin/removal/finding.json").read_text())
    assert said["verdict"] == "cannot say" and said["model"] == "tiny-griffin"
    assert (tmp_path / "tiny-griffin/removal/picture.png").stat().st_size > 0
    lines = (tmp_path / "findings.md").read_text().splitlines()
    assert len(lines) == 2 + len(program.NAMES)
    assert "done" in capsys.readouterr().out


def test_a_finding_of_another_model_of_the_name_is_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    row = {"setting": ["whole"], "accuracy": [1.0], "low": [0.9], "high": [1.0]}
    found = Finding("cannot say", "nothing", pd.DataFrame(row))
    made = Experiment("a claim", "nowhere", lambda bench: found)
    monkeypatch.setattr(program, "experiment_of", lambda name: made)
    other = HookedHybrid.from_pretrained("tiny-griffin")
    with torch.inference_mode():
        other.W_E[5] += 1
    other.save_pretrained(tmp_path / "tiny-griffin")
    program.run_one("removal", "tiny-griffin", tmp_path / "out")
    with pytest.raises(ValueError, match="another finding: the weights"):
        program.run_one("removal", str(tmp_path / "tiny-griffin"), tmp_path / "out")
    program.run_one("removal", "tiny-griffin", tmp_path / "out")
    assert "done" in capsys.readouterr().out
    path = tmp_path / "out/tiny-griffin/removal/finding.json"
    said = json.loads(path.read_text())
    path.write_text(json.dumps({k: v for k, v in said.items() if k != "identity"}))
    with pytest.raises(ValueError, match="finding of unidentified weights"):
        program.run_one("removal", "tiny-griffin", tmp_path / "out")


@pytest.mark.parametrize(("values", "scale"), [([1, 0.003], "linear"), ([1, 320.0], "log")])
def test_a_picture_of_shares_is_linear_one_of_ratios_far_apart_is_not(values: list, scale: str):
    table = pd.DataFrame({"setting": ["whole", "cut"], "induction": values})
    experiment = Experiment("a claim", "arXiv", lambda bench: None, "induction", "a unit")
    drawn = frame.picture(Finding("cannot say", "", table), experiment, "a title")
    assert drawn.axes[0].get_xscale() == scale


@pytest.mark.parametrize("name", program.NAMES)
def test_every_experiment_says_whose_result_it_stands_beside(name: str):
    experiment = program.experiment_of(name)
    assert "arXiv" in experiment.source and len(experiment.claim) > 40
