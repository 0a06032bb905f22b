"""How far back layers reach, and the experiment on needles outside the window."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from torch import Tensor

from experiments import outside_window, window_figures, window_relay
from experiments.recall.train import small_config
from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.interventions import knock_out_crossings, limit_window
from hooked_hybrid.niah.needles import find_needle
from hooked_hybrid.niah.prompts import build_prompt
from tests.models import griffin_config, random_model, random_tokens, relative, tiny_model
from tests.tolerances import FP32_PARITY

N_KEYS, N_POS = 7, 30
LAST = "blocks.3.hook_resid_post"
INSIDE = [f"blocks.{i}.attn.hook_{leaf}" for i in (1, 3) for leaf in ("attn_scores", "pattern")]


def wide_and_narrow(pattern: str = "RARA") -> tuple[HookedHybrid, HookedHybrid]:
    """Return one model without a window and with one."""
    narrow = random_model(griffin_config(pattern, n_keys=N_KEYS))
    wide = HookedHybrid(narrow.cfg.with_overrides(n_keys=None)).requires_grad_(False)
    wide.load_state_dict(narrow.state_dict())
    return wide, narrow


def test_limit_window_is_the_window_of_the_config() -> None:
    wide, narrow = wide_and_narrow()
    tokens = random_tokens(n_pos=N_POS)
    hooked = wide.run_with_hooks(tokens, fwd_hooks=limit_window(N_KEYS))
    assert relative(hooked, narrow(tokens)) < FP32_PARITY
    assert relative(wide(tokens), narrow(tokens)) > 0.01


def test_a_window_of_one_layer_is_its_dense_definition() -> None:
    wide, _ = wide_and_narrow()
    tokens = random_tokens(n_pos=N_POS)
    _, free = wide.run_with_cache(tokens, names_filter=INSIDE)
    with wide.hooks(limit_window(N_KEYS, layers=3)):
        _, limited = wide.run_with_cache(tokens, names_filter=INSIDE)
    pos = torch.arange(N_POS)
    distance = pos[:, None] - pos
    hidden = (distance < 0) | (distance >= N_KEYS)
    dense = free["attn_scores", 3].masked_fill(hidden, -torch.inf).softmax(-1)
    assert relative(limited["pattern", 3], dense) < FP32_PARITY
    assert torch.equal(limited["pattern", 1], free["pattern", 1])


@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_a_window_in_one_stage_is_one_forward_in_which_some_queries_have_it(stage: str) -> None:
    wide, _ = wide_and_narrow()
    options = {f"{stage}_hooks": limit_window(N_KEYS), "stop_at_eos": False, "verbose": False}
    out = wide.generate(
        random_tokens(n_pos=20), 8, **options, return_type="output", names_filter=LAST
    )
    pos = torch.arange(27)
    has_it = (pos < 20) == (stage == "prefill")
    hidden = has_it[:, None] & (pos[:, None] - pos >= N_KEYS)

    def dense(scores: Tensor, hook: HookPoint) -> Tensor:
        return scores.masked_fill(hidden, -torch.inf)

    with wide.hooks([(lambda name: name.endswith("attn_scores"), dense)]):
        _, cache = wide.run_with_cache(out.tokens[:, :-1], names_filter=LAST)
    assert relative(out.cache["resid_post", 3], cache["resid_post", 3]) < FP32_PARITY


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_beyond_a_boundary_in_all_layers_the_rest_stands_alone(name: str) -> None:
    model, tokens = tiny_model(name), random_tokens(n_pos=N_POS)
    hooked = model.run_with_hooks(tokens, fwd_hooks=knock_out_crossings(model.cfg, 11))
    assert relative(hooked[:, 11:], model(tokens[:, 11:])) < FP32_PARITY


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_rows_have_their_own_boundary_in_prefill_and_generation(name: str) -> None:
    model, tokens = tiny_model(name), random_tokens(n_pos=N_POS)
    hooks = knock_out_crossings(model.cfg, torch.tensor([9, 14]))
    options = {"return_type": "output", "stop_at_eos": False, "verbose": False}
    both = model.generate(tokens, 5, fwd_hooks=hooks, **options)
    for row, start in enumerate((9, 14)):
        alone = model.generate(tokens[row : row + 1, start:], 5, **options)
        assert torch.equal(both.new_tokens[row], alone.new_tokens[0])
        assert relative(both.logprobs[row], alone.logprobs[0]) < FP32_PARITY


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_one_layer_left_open_lets_earlier_tokens_through(name: str) -> None:
    model, tokens = tiny_model(name), random_tokens(n_pos=N_POS)
    other = tokens.clone()
    other[:, :6] = random_tokens(n_pos=6, seed=5)
    for opened in range(model.cfg.n_layers):
        shut = [i for i in range(model.cfg.n_layers) if i != opened]
        hooks = knock_out_crossings(model.cfg, 8, layers=shut)
        both = (model.run_with_hooks(t, fwd_hooks=hooks)[:, 8:] for t in (tokens, other))
        assert relative(*both) > FP32_PARITY


@pytest.mark.parametrize("n_keys", [0, -1, True, 2.5])
def test_a_window_of_no_key_is_an_error(n_keys: int, unchecked: None) -> None:
    with pytest.raises(ValueError, match="itself"):
        limit_window(n_keys)


def test_an_invalid_boundary_is_an_error() -> None:
    cfg = griffin_config()
    with pytest.raises(ValueError, match="boundary=-1: give .*counted from 0"):
        knock_out_crossings(cfg, -1)
    with pytest.raises(ValueError, match="the model has 4"):
        knock_out_crossings(cfg, 3, layers=[4])
    hooks = knock_out_crossings(cfg, torch.tensor([3, 4, 5]))
    with pytest.raises(ValueError, match="boundary has 3 entries"):
        tiny_model().run_with_hooks(random_tokens(), fwd_hooks=hooks)


@cache
def relay_model() -> HookedHybrid:
    cfg = small_config("RARA", window_relay.TASK, d_model=16, n_keys=window_relay.N_KEYS)
    return random_model(cfg)


def test_a_case_ends_with_the_key_of_its_fact() -> None:
    asked = window_relay.case(40)
    rows = torch.arange(40)
    assert torch.equal(asked.tokens[rows, asked.key], asked.tokens[:, asked.question])
    assert torch.equal(asked.tokens[rows, asked.key + 1], asked.answers)
    assert torch.equal(asked.distance, asked.question - asked.key - 1)
    assert set(asked.bin) == set(window_relay.BINS)


def test_groups_share_out_what_stands_from_the_fact_on() -> None:
    asked = window_relay.case(40)
    masks = window_relay.groups(asked)
    assert tuple(masks) == window_relay.GROUPS
    total = torch.stack(list(masks.values())).int().sum(0)
    pos = torch.arange(asked.question + 1)
    assert torch.equal(total, (pos >= asked.key[:, None]).int())
    inside = torch.tensor([b == "inside" for b in asked.bin])
    assert not masks["near neither"][inside].any()
    assert torch.equal(masks["near both"].any(1), asked.distance.clamp(max=30) == asked.distance)


def test_patching_the_fact_restores_all_and_the_question_last() -> None:
    found = window_relay.traced(relay_model(), window_relay.case(12))
    whole = found[(found["depth"] == 0) & (found["group"] == "fact")]
    assert (whole["gain"] - whole["total"]).abs().max() < 1e-4 * whole["total"].abs().max()
    last = found[(found["depth"] == 4) & (found["group"] == "question")]
    assert (last["gain"] - last["total"]).abs().max() < 1e-4 * last["total"].abs().max()
    assert found[(found["depth"] == 4) & (found["group"] == "fact")]["gain"].abs().max() < 1e-4


def test_a_boundary_in_all_layers_hides_the_fact_and_one_before_it_does_not() -> None:
    model, asked = relay_model(), window_relay.case(12)
    other = asked.tokens.scatter(1, asked.key[:, None] + 1, asked.answers[:, None] ^ 1)
    by_name = {(cut, name): hooks for cut, name, hooks in window_relay.cuts(model, asked)}
    gap = {}
    for cut in ("boundary", "control"):
        hooks = [*by_name[cut, "all attention"], *by_name[cut, "all recurrences"]]
        one, two = (model.run_with_hooks(t, fwd_hooks=hooks)[:, -1] for t in (asked.tokens, other))
        gap[cut] = (one - two).abs().amax(1)
    assert (gap["boundary"] == 0).all()
    assert (gap["control"] > 0).all()


def test_scored_rows_say_what_a_plain_run_answers() -> None:
    model, asked = relay_model(), window_relay.case(12)
    found = window_relay.scored(model, asked)
    plain = (model(asked.tokens)[:, -1].argmax(-1) == asked.answers).int().tolist()
    assert found[found["cut"] == "nothing"]["right"].tolist() == plain
    on = found[found["layers"] == "prefill on, generation on"]
    assert on["right"].tolist() == plain
    assert set(found["cut"]) == {"nothing", "boundary", "control", "edges", "window"}
    table = window_relay.by_cut(found.assign(seed=0))
    assert table.loc[table["cut"] == "nothing", "mean"].notna().all()


def test_a_kept_table_is_not_made_again(tmp_path: Path) -> None:
    table = pd.DataFrame({"a": [1, 2]})
    assert window_relay.kept(tmp_path / "t.csv", lambda: table).equals(table)
    assert window_relay.kept(tmp_path / "t.csv", lambda: 1 / 0).equals(table)  # type: ignore[arg-type]


def test_pairs_differ_in_the_needle_alone_and_ask_for_its_first_drawn_word() -> None:
    model = HookedHybrid.from_pretrained("tiny-griffin", n_keys=None)
    needles = [find_needle("paper"), find_needle("held-out-03")]
    clean, corrupted, words = outside_window.pairs(model, needles)
    differs = (clean != corrupted).nonzero()[:, 1]
    prompt = build_prompt(
        model, needles[0], outside_window.TRACE_LENGTH, outside_window.TRACE_DEPTH
    )
    start, stop = prompt.needle_spans[0]
    assert int(differs.min()) == start + 9
    assert int(differs.max()) < stop
    assert torch.equal(words[:, 0], clean[:, start + 9])
    parts = outside_window.places(prompt, clean.shape[1])
    covered = [t for part in parts.values() for t in part]
    assert covered == list(range(start, clean.shape[1]))
    assert model.to_string(clean[0, parts["question"][0] : parts["question"][3]]).startswith(
        "QUESTION"
    )


def test_figures_and_tables_of_made_up_cells() -> None:
    cells = pd.DataFrame(
        {
            "setting": ["a, before", "a, between", "nothing"] * 4,
            "beyond": [False, True] * 6,
            "needle_id": [f"n{i // 3}" for i in range(12)],
            "accuracy": [0.0, 1.0, 0.5] * 4,
        }
    )
    table = outside_window.by_setting(cells)
    assert table["accuracy"].tolist() == [0.0, 1.0, 0.5, 0.0, 1.0, 0.5]
    assert "| a, between | True | 100.0 |" in outside_window.markdown(table)
    assert len(window_figures.settings(cells, cells).axes) == 2
    found = window_relay.scored(relay_model(), window_relay.case(12)).assign(seed=0)
    assert len(window_figures.relay(found).axes) == 3
