"""Weights that follow the token being written, and what a state carries from stage to stage."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from matplotlib.collections import LineCollection
from torch import Tensor
from typer.testing import CliRunner

from hooked_hybrid import HookedHybrid
from hooked_hybrid.commands import program as cli
from hooked_hybrid.commands.cached_state import accuracy_by_case
from hooked_hybrid.interventions import follow_span, keep_top_heads
from hooked_hybrid.niah.cached_state.sweep import (
    CachedStateJob,
    _answers,
    cached_state,
    settings_of,
)
from hooked_hybrid.niah.cached_state.ways import ALL, CASES, WAYS, Case, _decoded, way_of
from hooked_hybrid.niah.groups import MOST_ROWS
from hooked_hybrid.niah.needles import PAPER
from hooked_hybrid.niah.prompts import Prompt, grid
from hooked_hybrid.niah.settings.papers import FOLLOW_MODES, weight_matrix
from hooked_hybrid.niah.settings.setting import hooks_for
from hooked_hybrid.niah.sweep import niah, top_k_settings
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.text.test_text import PAD, toy_tokenizer
from tests.tolerances import FP32_PARITY

N_POS, N_KEYS = 23, 9
SPANS, BEGIN = [(8, 12), (6, 9)], [13, 17]  # tokens of the first leave the window while written
CONFIGS = {"griffin": griffin_config("RRAR", n_keys=N_KEYS), "jamba": jamba_config("MMAM")}
N_NEW = 12
"""Tokens of an answer: with three heads the twelfth is wrong, if what steps do is carried on."""
PATTERN = "blocks.2.attn.hook_pattern"
OPTIONS: list[dict[str, Any]] = [
    {"token": token, "weight": weight, "outside": outside}
    for token in ("next", "last")
    for weight in ("one", "mean", "sum")
    for outside in ("zero", "keep")
]
models = pytest.mark.parametrize("name", list(CONFIGS))


@cache
def shared_model(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name], seed=3)


# --- weights that follow, against loops -----------------------------------------------------------


def followed(pattern: Tensor, n_keys: int, token: str, weight: str, outside: str) -> Tensor:
    """Return a whole pattern [batch head query key] as the docstring of `follow_span` says."""
    new = torch.zeros_like(pattern)
    for row, ((start, stop), begin) in enumerate(zip(SPANS, BEGIN, strict=True)):
        for head in range(pattern.shape[1]):
            for query in range(pattern.shape[2]):
                old = pattern[row, head, query].tolist()
                seen = [k for k in range(query + 1) if query - k < n_keys]
                mine = [old[k] for k in seen if start <= k < stop]
                given = {"one": 1.0, "mean": sum(mine) / max(len(mine), 1), "sum": sum(mine)}
                written = query - begin  # tokens of the span that stand before this query's
                for key in seen:
                    in_span = start <= key < stop
                    place = key - start + (token == "last")
                    if in_span and 0 <= written < stop - start and place == written:
                        new[row, head, query, key] = given[weight]
                    elif not in_span and outside == "keep":
                        new[row, head, query, key] = old[key]
    return new


def hooks_of(options: dict[str, Any]) -> list[Any]:
    return follow_span(torch.tensor(SPANS), torch.tensor(BEGIN), **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [*(("griffin", options) for options in OPTIONS), ("jamba", OPTIONS[3])],
    ids=lambda given: given if isinstance(given, str) else "-".join(given.values()),
)
def test_weights_follow_as_the_loops_say(name: str, options: dict[str, Any]):
    model, tokens = shared_model(name), random_tokens(2, N_POS)
    _, plain = model.run_with_cache(tokens, names_filter=PATTERN)
    with model.hooks(hooks_of(options)):
        _, edited = model.run_with_cache(tokens, names_filter=PATTERN)
    n_keys = N_KEYS if name == "griffin" else N_POS
    expected = followed(plain[PATTERN], n_keys, **options)
    assert relative(edited[PATTERN], expected) < FP32_PARITY
    assert relative(edited[PATTERN], plain[PATTERN]) > 0.1


@models
@pytest.mark.parametrize("cut", [1, 5, 14])
def test_weights_follow_alike_however_the_sequence_is_cut(name: str, cut: int):
    model, tokens = shared_model(name), random_tokens(2, N_POS)
    with model.hooks(hooks_of({"weight": "mean", "outside": "keep"})):
        whole = model(tokens)
        parts, state = [], None
        for start in range(0, N_POS, cut):
            part, state = model(tokens[:, start : start + cut], state=state, return_state=True)
            parts.append(part)
    assert relative(torch.cat(parts, dim=1), whole) < FP32_PARITY


def test_a_row_may_have_left_the_batch():
    model, tokens = shared_model("jamba"), random_tokens(2, N_POS)
    alone = model.generate(
        tokens[1:], 4, generation_hooks=follow_span(SPANS[1], BEGIN[1]), stop_at_eos=False,
        return_type="output", verbose=False,
    )  # fmt: skip
    # The first row ends with its first new token.
    first = model.generate(tokens[:1], 1, stop_at_eos=False, return_type="tokens", verbose=False)
    ends = int(first[0, -1])
    assert ends not in alone.new_tokens
    both = model.generate(
        tokens, 4, generation_hooks=hooks_of({}), eos_token_id=ends, return_type="output",
        verbose=False,
    )  # fmt: skip
    assert both.finished.tolist() == [True, False]
    assert torch.equal(both.new_tokens[1:], alone.new_tokens)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"begin": -1}, "begin=-1"),
        ({"begin": 1.5}, "begin=1.5"),
        ({"token": "first"}, "give one of next, last"),
        ({"weight": "two"}, "give one of one, mean, sum"),
        ({"outside": "omit"}, "give one of zero, keep"),
        ({"spans": (5, 5)}, "start < stop"),
    ],
)
def test_what_cannot_be_followed_is_an_error(given: dict[str, Any], said: str):
    with pytest.raises(ValueError, match=said):
        follow_span(**{"spans": (3, 5), "begin": 7, **given})


def test_the_matrix_follows_from_the_last_token_of_the_prompt_on():
    names = [s.name for s in weight_matrix(("keep",), ("binary", *FOLLOW_MODES))]
    assert names == [f"keep-{mode}" for mode in ("binary", *FOLLOW_MODES)]
    (setting,) = weight_matrix(("keep",), ("follow last, mean",))
    (prompt,) = prompts_of("tiny-jamba")[:1]
    (start, _), last = prompt.needle_spans[0], prompt.length - 1
    model = packaged("tiny-jamba")
    tokens = torch.tensor([[*prompt.tokens, *prompt.tokens[start : start + 3]]])
    with model.hooks(hooks_for(setting.generation, prompt)):
        _, cache = model.run_with_cache(tokens, names_filter=PATTERN)
    read = cache[PATTERN][0].sum(0).nonzero().tolist()  # [query, key]
    assert read == [[last + j, start + j - 1] for j in (1, 2, 3)]


# --- what a state carries -------------------------------------------------------------------------


@cache
def packaged(name: str) -> HookedHybrid:
    return HookedHybrid.from_pretrained(name).requires_grad_(False)


@cache
def prompts_of(name: str) -> list[Prompt]:
    return grid(packaged(name), [PAPER], [96], [0.0])


@cache
def carried() -> pd.DataFrame:
    model, prompts = packaged("tiny-griffin"), prompts_of("tiny-griffin")
    return cached_state(model, prompts, [3], max_new_tokens=N_NEW, verbose=False)


def outputs(table: pd.DataFrame, setting: str) -> list[str]:
    found = table.loc[table["setting"] == setting, "output"].tolist()
    assert len(found) == len(prompts_of("tiny-griffin"))
    return found


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("no cache: everywhere k=3", "prompt and steps: all k=3"),
        ("no cache: last position k=3", "steps: carry nothing k=3"),
    ],
)
def test_cases_that_are_one_by_definition_come_out_alike(one: str, other: str):
    assert outputs(carried(), one) == outputs(carried(), other)


def test_the_cases_tell_parts_of_the_state_apart():
    table = carried()
    assert outputs(table, "steps: carry nothing k=3") != outputs(table, "steps: carry all k=3")
    assert outputs(table, "steps: carry nothing k=3") == outputs(table, "whole model")


def test_what_is_kept_whole_is_what_a_sweep_keeps():
    model, prompts = packaged("tiny-griffin"), prompts_of("tiny-griffin")
    settings = top_k_settings([3, 8])
    table = niah(
        model,
        prompts,
        settings,
        max_new_tokens=N_NEW,
        first_token_stage="generation",
        verbose=False,
    )
    for mine, theirs in {
        "steps: carry all k=3": "generation k=3",
        "prompt and steps: all k=3": "both k=3",
        "whole model": "generation k=8",
    }.items():
        assert outputs(carried(), mine) == outputs(table, theirs)


@pytest.mark.parametrize("part", ["kv", "conv", "ssm"])
def test_a_prompt_gives_only_the_parts_that_are_named(part: str):
    model, (prompt, *_) = packaged("tiny-griffin"), prompts_of("tiny-griffin")
    tokens = torch.tensor([prompt.tokens])
    _, clean = model(tokens[:, :-1], return_type=None, return_state=True)
    with model.hooks(keep_top_heads(0)):
        _, damaged = model(tokens[:, :-1], return_type=None, return_state=True)
    state = clean.replace(damaged, kinds=[part])
    expected = model.generate(tokens[:, -1:], 5, state=state, return_type="output", verbose=False)
    cases = [Case("part", (part,))]
    table = cached_state(model, [prompt], [0], cases, max_new_tokens=5, verbose=False)
    assert table["output"].tolist() == expected.text
    assert table["min_margin"][0] == pytest.approx(float(expected.margins.min()), rel=1e-4)
    assert state != clean and state != damaged


CARRIED = {
    "steps: carry nothing": (),
    "steps: carry keys and values": ("kv",),
    "steps: carry recurrent states": ("ssm", "conv"),
    "steps: carry convolution inputs": ("conv",),
    "steps: carry recurrences": ("ssm",),
    "steps: carry all": ("ssm", "conv", "kv"),
}
"""What of a state is as a step with silenced heads left it, by the name of the case."""


def test_each_case_carries_on_what_its_name_says():
    cfg = replace(griffin_config("ARAR", n_keys=N_KEYS), tied_embedding=False, eos_token_id=None)
    model, prompt = random_model(cfg, seed=5), random_tokens(1, 9, seed=1)
    model.tokenizer = toy_tokenizer()
    cases = [(case, 2) for case in CASES if case.name in CARRIED]
    found = WAYS["in parts"](model, prompt, torch.zeros(len(cases), dtype=torch.long), cases, 6)
    _, start = model(prompt[:, :-1], return_type=None, return_state=True)
    expected = []
    for case, k in cases:
        state, last, margins = start, prompt[:, -1:], []
        for _ in range(6):
            options: dict[str, Any] = {"state": state, "return_state": True, "stage": "generation"}
            _, state = model(last, return_type=None, **options)
            logits, left = model.run_with_hooks(last, fwd_hooks=keep_top_heads(k), **options)
            if CARRIED[case.name]:
                state = state.replace(left, kinds=CARRIED[case.name])
            best = logits[:, -1].topk(2)
            margins.append(float(best.values[0, 0] - best.values[0, 1]))
            last = best.indices[:, :1]
        expected.append(min(margins))
    assert [margin for _, _, margin in found] == pytest.approx(expected, rel=1e-3)
    assert all(b - a > 0.01 * b for a, b in pairwise(sorted(expected)))  # none is another's


def test_a_run_continues_where_it_stopped(tmp_path: Path):
    model, prompts = packaged("tiny-griffin"), prompts_of("tiny-griffin")
    cases, few = CASES[:2], prompts[:1]
    first = cached_state(model, few, [4], cases, out=tmp_path / "a", verbose=False)
    again = cached_state(model, few, [4], cases, out=tmp_path / "a", resume=True, verbose=False)
    pd.testing.assert_frame_equal(first, again)  # seconds too: nothing was run
    with pytest.raises(FileExistsError, match="--resume"):
        cached_state(model, few, [4], cases, out=tmp_path / "a", verbose=False)
    with pytest.raises(ValueError, match="another experiment: setting .*k=4.: left out"):
        cached_state(model, few, [3], cases, out=tmp_path / "a", resume=True, verbose=False)


def test_progress_is_shown_unless_it_is_not_to_be(capsys: pytest.CaptureFixture[str]):
    model, prompts = packaged("tiny-griffin"), prompts_of("tiny-griffin")[:1]
    cached_state(model, prompts, [4], CASES[:1], max_new_tokens=1)
    assert capsys.readouterr().err
    cached_state(model, prompts, [4], CASES[:1], max_new_tokens=1, verbose=False)
    assert not capsys.readouterr().err


def job_of(lengths: list[int], n_settings: int) -> CachedStateJob:
    """Return the work of prompts "0", "1", ... of so many tokens."""
    prompts = [
        Prompt(str(i), tuple(range(n)), n, 0.5, None, "none", (), "base", False, 0)
        for i, n in enumerate(lengths)
    ]
    return CachedStateJob(prompts, settings_of([Case("all", ("kv",))], range(n_settings)), 5)


def test_the_work_is_cut_into_parts_of_one_length():
    """Of at most 2 x 32 rows: three prompts in 20 settings, one if there are more settings."""
    assert MOST_ROWS == 32
    job = job_of([9, 7, 9, 9, 9, 7], 20)
    parts = [[prompt.id for prompt in part] for part in job.parts]
    assert sorted(parts) == [["0", "2", "3"], ["1", "5"], ["4"]]
    assert sorted(job.prompt_ids) == list("012345")
    assert all(len(part) == 1 for part in job_of([9, 9], 65).parts)
    assert [len(part) for part in job_of([9] * 3, 32).parts] == [2, 1]
    whole = parts.index(["0", "2", "3"])
    assert job.cost(whole) == 27.0 and job.describe([whole]) == "prompts 0, 2, 3"


@pytest.mark.parametrize("case", [CASES[0], CASES[5], CASES[-2], CASES[-1]])
def test_each_way_of_answering_runs_without_the_others(case: Case):
    model, prompts = packaged("tiny-griffin"), prompts_of("tiny-griffin")[:1]
    table = cached_state(model, prompts, [8], [case], max_new_tokens=1, verbose=False)
    assert table["n_new_tokens"].tolist() == [1]


def test_steps_that_carry_all_or_nothing_special_are_kept_and_others_run_in_parts():
    ways = {case.name: way_of(case) for case in CASES}
    in_parts = {name for name, way in ways.items() if way == "in parts"}
    assert in_parts == CARRIED.keys() - {"steps: carry all"}
    assert (
        ways["no cache: everywhere"] == "everywhere" and ways["no cache: last position"] == "last"
    )
    kept = ("whole model", "prompt: all", "steps: carry all", "prompt and steps: all")
    assert {ways[name] for name in kept} == {"kept"}
    assert way_of(Case("backwards", (), ALL[::-1])) == "kept"


@pytest.mark.parametrize("way", [way for way in WAYS if way != "kept"])
def test_logits_among_which_there_is_no_order_are_an_error(way: str):
    model, prompt = random_model(CONFIGS["griffin"]), random_tokens(1, 6)
    model.tokenizer = toy_tokenizer()
    lost = ("unembed.hook_logits", lambda logits, hook: logits * torch.nan)
    with model.hooks([lost]), pytest.raises(ValueError, match="the two largest logits"):
        WAYS[way](model, prompt, torch.zeros(1, dtype=torch.long), [(CASES[4], 2)], 3)


@pytest.mark.parametrize("way", ["everywhere", "last"])
def test_a_prompt_that_ends_with_padding_tokens_is_read_whole(way: str):
    model, prompt = random_model(CONFIGS["griffin"], seed=3), random_tokens(1, 8)
    model.tokenizer = toy_tokenizer()
    prompt[:, -2:] = PAD
    (_, _, margin), *_ = WAYS[way](
        model, prompt, torch.zeros(1, dtype=torch.long), [(Case(way, recomputed=way), 1)], 1
    )
    model.tokenizer = None  # then no token is padding
    hooks = keep_top_heads(1)
    if way == "last":
        _, state = model(prompt[:, :-1], return_type=None, return_state=True)
        logits = model.run_with_hooks(prompt[:, -1:], fwd_hooks=hooks, state=state)
    else:
        logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    best = logits[0, -1].topk(2).values
    assert margin == pytest.approx(float(best[0] - best[1]), rel=1e-4)


def test_prompts_are_given_on_the_devices_of_the_model(monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def way(_: HookedHybrid, tokens: Tensor, of_prompt: Tensor, cases: Any, n: int) -> list[Any]:
        seen.extend((tokens.device.type, of_prompt.device.type))
        return [("", n, 0.0)] * len(cases)

    monkeypatch.setitem(WAYS, "kept", way)
    model, (prompt, *_) = HookedHybrid.meta(CONFIGS["griffin"]), prompts_of("tiny-griffin")
    found = _answers(model, [prompt], settings_of([Case("all", ("kv",))], [1]), 3)
    assert seen == ["meta", "meta"] and found == {(prompt.id, "all k=1"): ("", 3, 0.0)}


def test_no_step_is_run_after_all_rows_have_ended():
    """Row 1 ends with its first token, row 0 with its second: logits of rows by step."""
    model = random_model(CONFIGS["griffin"])
    model.tokenizer = toy_tokenizer()
    (eos,) = model.text.eos
    asked: list[tuple[int, list[int]]] = []

    def step(so_far: Tensor, going: Tensor) -> Tensor:
        asked.append((so_far.shape[1], going.tolist()))
        logits = torch.zeros(len(going), 9)
        for i, row in enumerate(going.tolist()):
            says = eos if len(asked) + row == 2 else 5
            logits[i, [says, 7]] = torch.tensor([3.0 - row + len(asked), 2.0])
        return logits

    found = _decoded(model, torch.full((2, 4), 6), step, 8)
    assert asked == [(4, [0, 1]), (5, [0])]
    assert found == [("w5", 2, 2.0), ("", 1, 1.0)]


def test_a_part_of_which_one_prompt_is_missing_is_run():
    job = job_of([9, 9, 7], 20)
    of = {part[0].id: i for i, part in enumerate(job.parts)}
    assert sorted(job.units(set())) == [[0], [1]]
    assert job.units({"0"}) == [[of["0"]], [of["2"]]] or job.units({"0"}) == [[of["2"]], [of["0"]]]
    assert job.units({"0", "2"}) == [[of["0"]]] and job.units({"0", "1"}) == [[of["2"]]]
    assert job.units({"0", "1", "2"}) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [({"resume": True}, "give out="), ({"max_new_tokens": 0}, "max_new_tokens"), ({}, "each once")],
)
def test_options_without_sense_are_refused_before_any_work(options: dict[str, Any], said: str):
    prompts = prompts_of("tiny-griffin")[:1] * (1 if options else 2)
    with pytest.raises(ValueError, match=said):
        cached_state(packaged("tiny-griffin"), prompts, [4], verbose=False, **options)


@pytest.mark.parametrize(
    ("cases", "ks", "said"),
    [([], [1], "at least one case"), (CASES, [], "at least one"), (CASES, [1, 1], "twice")],
)
def test_nothing_to_run_is_an_error(cases: list[Case], ks: list[int], said: str):
    with pytest.raises(ValueError, match=said):
        settings_of(cases, ks)


def test_the_picture_has_a_line_for_every_case():
    figure = accuracy_by_case(carried())
    assert [axes.get_title() for axes in figure.axes] == [
        "prompt", "steps", "prompt and steps", "no cache",
    ]  # fmt: skip
    labels = [{line.get_label() for line in axes.lines} for axes in figure.axes]
    assert labels[1] == {c.name.split(": ")[1] for c in CASES if c.name.startswith("steps:")} | {
        "whole model"
    }


def test_intervals_are_seen_where_there_is_one_k_and_the_picture_says_what_they_are():
    one = carried().assign(needle_id="a", accuracy=1.0)
    figure = accuracy_by_case(pd.concat([one, one.assign(needle_id="b", accuracy=0.0)]))
    assert "95% intervals over 2 needles" in figure._supxlabel.get_text()
    ends = [
        lines.get_segments()[0][:, 1]
        for axes in figure.axes
        for lines in axes.collections
        if isinstance(lines, LineCollection)
    ]
    assert len(ends) == len(CASES) - 1  # the whole model has no k
    assert all(high - low > 0.5 for low, high in ends)


def test_the_command_is_there_and_refuses_a_prompt_without_a_needle(tmp_path: Path):
    options = ["cached-state", "--needle", "none", "--out", str(tmp_path / "x")]
    result = CliRunner().invoke(cli.build_app(), options)
    assert result.exit_code == 1 and "give a needle" in result.output
    assert not (tmp_path / "x").exists()
