"""The papers' experiments: what each setting does, and the commands that run them."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.commands import program as cli
from hooked_hybrid.niah.language import text_loss, texts_of
from hooked_hybrid.niah.needles import PAPER, custom_needle
from hooked_hybrid.niah.prompts import Haystack, build_prompt, grid, shortest_length
from hooked_hybrid.niah.report.published import WEIGHTS, ours
from hooked_hybrid.niah.report.setting_plots import accuracy_by_setting, weight_matrix_picture
from hooked_hybrid.niah.settings.papers import (
    WHOLE,
    control_settings,
    cut_settings,
    head_settings,
    layer_settings,
    sets_beside,
    weight_matrix,
)
from hooked_hybrid.niah.sweep import Setting, niah, top_k_settings
from hooked_hybrid.runs.identity.values import describe
from tests.tolerances import FP32_PARITY

QUIET: dict[str, Any] = {"verbose": False, "max_new_tokens": 30}
FEW = 8
BRIEF = QUIET | {"max_new_tokens": FEW}
NAMES = ("tiny-griffin", "tiny-jamba")
each = pytest.mark.parametrize("name", NAMES)


@cache
def model_of(name: str) -> HookedHybrid:
    return HookedHybrid.from_pretrained(name, dtype=torch.float32)


@cache
def prompts_of(name: str) -> list[Any]:
    return grid(model_of(name), [PAPER], [140, 160], [0.0, 1.0])


def one_at_a_time(model: HookedHybrid, prompt: Any, setting: Setting) -> str:
    """Return what a model says, by nothing but `generate`."""

    def of(hooks: Any) -> list[Any]:
        return list(hooks(prompt)) if callable(hooks) else list(hooks)

    tokens = torch.tensor([prompt.tokens])
    hooks = {"prefill_hooks": of(setting.prefill), "generation_hooks": of(setting.generation)}
    out = model.generate(tokens, FEW, return_type="output", verbose=False, **hooks)
    return out.text[0]


@each
def test_batched_settings_that_depend_on_the_prompt_equal_one_run_at_a_time(name: str):
    model, prompts = model_of(name), prompts_of(name)[1:3]
    settings = [*weight_matrix(["keep", "omit", "null"], ["keep", "only"])]
    settings += [s for s in control_settings(model.cfg, [4], 2) if "k=4" in s.name]
    settings += head_settings(model.cfg)[:3]
    table = niah(model, prompts, settings, **BRIEF).set_index(["prompt_id", "setting"])
    compared = 0
    for prompt in prompts:
        for setting in settings:
            cell = table.loc[(prompt.id, setting.name)]
            if cell["min_margin"] > 1e-4:
                compared += 1
                assert cell["output"] == one_at_a_time(model, prompt, setting), setting.name
    assert compared > 0.9 * len(table)


def centred(x: torch.Tensor, hook: HookPoint) -> torch.Tensor:
    """Look at the whole prompt at once: no part of it would do."""
    return x - 0.5 * x.mean(1, keepdim=True)


@each
def test_a_hook_that_looks_at_the_whole_prompt_is_given_the_whole_prompt(name: str):
    model, prompts = model_of(name), prompts_of(name)[:3]
    hooks = [("blocks.0.hook_resid_post", centred)]
    setting = Setting("centred", tuple(hooks))
    table = niah(model, prompts, [WHOLE, setting], **BRIEF).set_index(["prompt_id", "setting"])
    for prompt in prompts:
        assert table.loc[(prompt.id, "centred"), "output"] == one_at_a_time(model, prompt, setting)
    margins = (table.xs(which, level=1)["min_margin"] for which in ("centred", "whole"))
    assert abs(next(margins) - next(margins)).min() > 1e-3


def test_experiments_can_be_run_together():
    model, prompts = model_of("tiny-griffin"), prompts_of("tiny-griffin")[:1]
    cut = cut_settings(model.cfg, ["a", "b"], [{2: [0]}, {5: [1]}])
    settings = [*top_k_settings([8, 2], ["both"]), *cut]
    table = niah(model, prompts, settings, **BRIEF)
    for setting in settings:
        (output,) = table.loc[table["setting"] == setting.name, "output"]
        assert output == one_at_a_time(model, prompts[0], setting)


def test_other_hooks_of_the_same_name_never_reuse_cells(tmp_path: Path):
    model, prompts = model_of("tiny-griffin"), prompts_of("tiny-griffin")[:1]
    quiet = {"verbose": False, "max_new_tokens": 2, "out": tmp_path / "r", "resume": True}
    niah(model, prompts, {"a": []}, **quiet)
    niah(model, prompts, {"a": []}, **quiet)
    for hooks in (interventions.keep_top_heads(0), interventions.keep_top_heads(1)):
        with pytest.raises(ValueError, match="another"):
            niah(model, prompts, {"a": hooks}, **quiet)
    kept = [describe(interventions.keep_top_heads(k)) for k in (0, 1, 1)]
    assert kept[0] != kept[1] == kept[2]


def test_keywords_are_part_of_a_prompt_and_a_prompt_is_given_once():
    model = model_of("tiny-griffin")
    needles = [custom_needle(PAPER.sentence, PAPER.question, [word]) for word in ("eat", "sunny")]
    first, second = grid(model, needles, [140], [0.5])
    assert first.tokens == second.tokens and first.id != second.id
    with pytest.raises(ValueError, match="given twice"):
        niah(model, [first, first], [WHOLE], **QUIET)


@each
def test_omitting_the_needle_in_generation_ends_retrieval(name: str):
    model = model_of(name)
    table = niah(model, prompts_of(name), weight_matrix(["keep"], ["keep", "omit"]), **QUIET)
    accuracy = table.groupby("setting")["accuracy"].mean()
    assert accuracy["keep-keep"] > 0.95 and accuracy["keep-omit"] < 0.15


@each
def test_every_kind_of_layer_and_each_layer_has_its_setting(name: str):
    cfg = model_of(name).cfg
    names = [setting.name for setting in layer_settings(cfg)]
    recurrence = "RG-LRU" if name == "tiny-griffin" else "Mamba"
    assert names[:4] == ["whole", "no attention", f"no {recurrence}", "no MLP"]
    assert len(names) == 4 + cfg.n_layers
    assert len(head_settings(cfg)) == 1 + 8 * len(cfg.attention_layers)


def test_cut_settings_silence_the_named_heads_and_no_others():
    model, sets = model_of("tiny-griffin"), [{2: [1, 3]}, {5: [0]}]
    tokens = torch.tensor([prompts_of("tiny-griffin")[0].tokens])
    _, whole = model.run_with_cache(tokens, names_filter=["blocks.2.attn.hook_z"])
    for setting, heads in zip(cut_settings(model.cfg, ["a", "b"], sets), sets, strict=True):
        with model.hooks(list(setting.prefill)):
            _, cache = model.run_with_cache(tokens, names_filter=["blocks.2.attn.hook_z"])
        kept = [head for head in range(8) if head not in heads.get(2, [])]
        assert not cache["z", 2][:, :, heads.get(2, [])].any()
        assert torch.equal(cache["z", 2][:, :, kept], whole["z", 2][:, :, kept])


def test_controls_silence_as_many_heads_as_the_claim():
    cfg = model_of("tiny-griffin").cfg
    settings = control_settings(cfg, [3], n_draws=5)
    drawn = [s for s in settings if s.name.startswith("drawn")]
    assert len(drawn) == 5
    for setting in drawn:
        assert all(len(heads) == 5 for heads in setting.spec["heads"].values())
    assert len({str(setting.spec["heads"]) for setting in drawn}) > 1
    recurrent = [s for s in settings if s.name.startswith("no recurrence")]
    assert all(len(s.spec["layers"]) == len(cfg.attention_layers) for s in recurrent)
    assert control_settings(cfg, [3], 5)[6].spec == settings[6].spec  # seeded


def test_controls_are_every_set_of_heads_of_a_model_with_one_attention_layer():
    settings = control_settings(model_of("tiny-jamba").cfg, [4])
    every = [s for s in settings if s.name.startswith("every k=4 #")]
    assert len({str(s.spec["heads"]) for s in every}) == len(every) == 70
    beside = sets_beside(settings)
    assert set(beside) == {f"{way} k=4" for way in ("peaked", "reversed", "by lot", "needle")}
    assert all(names == [s.name for s in every] for names in beside.values())


@pytest.mark.parametrize("ks", [[0], [8], [3, 9]])
def test_controls_refuse_a_k_without_a_choice(ks: list[int]):
    with pytest.raises(ValueError, match="1 to 7"):
        control_settings(model_of("tiny-griffin").cfg, ks)


def test_a_prompt_without_a_needle_is_refused_before_anything_runs():
    model = model_of("tiny-griffin")
    prompts = grid(model, [None], [140], [0.5])
    ran: list[int] = []
    with (
        model.hooks([("hook_embed", lambda x, hook: ran.append(1))]),
        pytest.raises(ValueError, match="holds no needle"),
    ):
        niah(model, prompts, weight_matrix(), **QUIET)
    assert not ran


@pytest.mark.usefixtures("unchecked")
def test_scores_keep_the_heads_they_name():
    pattern = torch.rand(2, 4, 5, 7).softmax(-1)
    hook: Any = HookPoint()
    entropy = interventions.negative_entropy(pattern, hook)
    assert torch.equal(interventions.reversed_score("entropy")(pattern, hook), -entropy)
    with pytest.raises(ValueError, match="entropy, l2"):
        interventions.reversed_score("peak")


def test_random_heads_are_the_same_however_a_prompt_is_cut():
    model = model_of("tiny-griffin")
    tokens = torch.tensor([prompts_of("tiny-griffin")[0].tokens])
    hooks = interventions.keep_top_heads(3, interventions.random_score(1))
    whole = model.run_with_hooks(tokens, fwd_hooks=hooks)
    with model.hooks(hooks):
        first, state = model(tokens[:, :50], return_state=True)
        cut = torch.cat([first, model(tokens[:, 50:], state=state)], dim=1)
    assert (cut - whole).abs().max() < FP32_PARITY * whole.abs().max()
    other = interventions.keep_top_heads(3, interventions.random_score(2))
    changed = model.run_with_hooks(tokens, fwd_hooks=other)
    assert (changed - whole).abs().max() > 1e-2 * whole.abs().max()


def test_attention_to_a_span_scores_by_the_weight_on_it():
    model, prompt = model_of("tiny-jamba"), prompts_of("tiny-jamba")[0]
    ((start, stop),) = prompt.needle_spans
    seen: list[torch.Tensor] = []
    score = interventions.attention_to((start, stop))

    def look(pattern: torch.Tensor, hook: HookPoint) -> None:
        seen.append(score(pattern, hook) - pattern[..., start:stop].sum(-1))

    where = f"blocks.{model.cfg.attention_layers[0]}.attn.hook_pattern"
    model.run_with_hooks(torch.tensor([prompt.tokens]), fwd_hooks=[(where, look)])
    assert seen[0].abs().max() < 1e-6


@each
def test_text_loss_is_that_of_the_second_half_by_hand(name: str):
    model, length = model_of(name), 200
    settings = [WHOLE, top_k_settings([2], ["generation"])[0]]
    table = text_loss(model, settings, length, 2, verbose=False).set_index("setting")
    losses = []
    for seed in (1000, 1001):
        prompt = build_prompt(model, PAPER, length, 0.25, Haystack(seed))
        text = model.to_string(torch.tensor(prompt.tokens))
        stop = len(model.to_tokens(text.split("\n QUESTION")[0], prepend_bos=False)[0])
        half = length // 2
        tokens = torch.tensor([prompt.tokens[:stop]])
        log_probs = model(tokens).detach()[0, half - 1 : -1].log_softmax(-1)
        losses.append(-log_probs.gather(-1, tokens[0, half:, None]).mean())
    assert float(table.loc["whole", "loss"]) == pytest.approx(float(sum(losses) / 2), rel=0.02)
    assert table.loc["whole", "more"] == 0
    assert table.loc["generation k=2", "more"] != 0


def test_text_loss_can_be_of_documents():
    model = model_of("tiny-griffin")
    text = "\n\n".join(f"The {noun} can heal a loud song ." for noun in ("sea", "king", "bus"))
    given, generated = (
        text_loss(model, [WHOLE], 200, 3, documents, verbose=False) for documents in ([text], ())
    )
    assert given["loss"].item() != generated["loss"].item()
    prompts, _, _ = texts_of(model, 200, 3, [text])
    assert len({prompt.tokens for prompt in prompts}) == 3


def test_text_loss_refuses_what_it_cannot_measure():
    model = model_of("tiny-griffin")
    with pytest.raises(ValueError, match="n_texts=1"):
        text_loss(model, [WHOLE], 200, 1, verbose=False)
    shortest = shortest_length(model)
    with pytest.raises(ValueError, match=f"length={shortest}: too few"):
        text_loss(model, [WHOLE], shortest, 2, verbose=False)


@pytest.mark.parametrize("command", ["weights", "layers", "heads", "controls", "read-twice"])
def test_each_command_writes_table_maps_pictures_and_report(
    command: str, tmp_path: Path, request: pytest.FixtureRequest
):
    out = tmp_path / "r"
    if command != "layers":  # which draws every map
        request.getfixturevalue("few_maps")
    small = ["--lengths", "180", "--depths", "1", "--texts", "2", "--max-new-tokens", "4"]
    own = ["--draws", "2"] if command == "controls" else []
    result = CliRunner().invoke(cli.build_app(), [command, *small, *own, "--out", str(out)])
    assert result.exit_code == 0, result.output
    written = {path.name for path in out.iterdir()}
    assert {"cells.sqlite", "table.csv", "text_loss.csv", "report.html", "maps"} <= written
    assert {"Accuracy_by_setting.png", "retrieval_maps.png"} <= written
    losses = pd.read_csv(out / "text_loss.csv")
    assert set(losses["setting"]) == set(pd.read_csv(out / "table.csv")["setting"])
    again = [command, *small, *own, "--out", str(out)]
    refused = CliRunner().invoke(cli.build_app(), again)
    assert refused.exit_code == 1 and "not empty" in refused.output
    if command == "layers":  # one is enough: all go the same way
        assert CliRunner().invoke(cli.build_app(), [*again, "--resume"]).exit_code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--texts", "1"], "n_texts=1"),
        (["--lengths", "66"], "too few tokens"),
        (["--needle", "none"], "give a needle"),
    ],
)
def test_what_cannot_be_measured_is_an_error_before_the_sweep(
    options: list[str], message: str, tmp_path: Path
):
    small = ["--depths", "1", *([] if "--lengths" in options else ["--lengths", "180"])]
    command = ["heads", *small, *options, "--out", str(tmp_path / "r")]
    result = CliRunner().invoke(cli.build_app(), command)
    assert result.exit_code == 1 and message in result.output
    assert not (tmp_path / "r").exists()


def test_published_weights_stand_beside_ours():
    table = pd.DataFrame(
        {"setting": ["keep-only", "keep-only", "keep-keep"], "accuracy": [1, 0, 1]}
    )
    by_setting = {entry.setting: entry for entry in WEIGHTS}
    assert len(by_setting) == 20
    assert by_setting["keep-only"].value == "85.7%"
    assert ours(by_setting["keep-only"], table) == "50.0%"
    assert ours(by_setting["null-keep"], table) == "not run"


def test_pictures_show_every_setting_and_the_numbers():
    model = model_of("tiny-griffin")
    table = niah(model, prompts_of("tiny-griffin")[:2], weight_matrix(), **QUIET)
    losses = text_loss(model, weight_matrix(), 200, 2, verbose=False)
    figure = accuracy_by_setting(table, losses)
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == list(table["setting"].unique())
    assert "over texts" in figure.axes[1].get_xlabel()
    n = table["needle_id"].nunique()
    said = f"95% intervals over {n} needles" if n > 1 else "one needle: no intervals"
    assert said in figure.axes[0].get_xlabel()
    matrix = weight_matrix_picture(table)
    shown = [float(text.get_text()) for text in matrix.axes[0].texts]
    means = 100 * table.groupby("setting", sort=False)["accuracy"].mean()
    assert shown == pytest.approx(means.tolist(), abs=0.06)
