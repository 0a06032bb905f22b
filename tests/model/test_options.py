"""Each option of the model's methods does something, and is refused where it would do nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch

from hooked_hybrid import HookedHybrid
from hooked_hybrid.model.sampling import Draws, Sampling, _signed, splitmix64, uniforms
from tests.models import random_tokens, tiny_model
from tests.options import Row, check_acts, check_complete, check_refuses

QUIET: dict[str, Any] = {"verbose": False}
EMBED = "hook_embed"
TEXTS = ["the cat", "the old man can see the river"]


def halve(x: Any, hook: Any) -> Any:
    return x / 2


@pytest.fixture(scope="module")
def model() -> HookedHybrid:
    return HookedHybrid.from_pretrained("tiny-griffin").requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(model) -> torch.Tensor:
    return model.to_tokens("the old man can see the river")


def state_of(model: HookedHybrid) -> Any:
    return model(model.to_tokens("a small dog"), return_type=None, return_state=True)[1]


def drawn(model: HookedHybrid, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(0)
    tokens = model.to_tokens("the old man can see")
    return model.generate(tokens, 6, do_sample=True, generator=generator, **QUIET, **options)


# --- forward --------------------------------------------------------------------------------------


def forward_rows(model: HookedHybrid, tokens: torch.Tensor) -> dict[str, Row]:
    base = {"input": tokens}
    mask = torch.ones_like(tokens)
    mask[0, 0] = 0
    documents = torch.ones_like(tokens)
    documents[0, 3:] = 2
    resid = model(tokens, stop_at_layer=1)

    def told(**keywords: Any) -> Any:
        """Return what `hook.run` says of a forward."""
        runs: list[Any] = []
        with model.hooks([(EMBED, lambda _, hook: runs.append(hook.run))]):
            model(**keywords)
        return runs[0].stage, runs[0].step, runs[0].rows

    return {
        "return_type": Row(
            {"return_type": "loss"},
            base,
            [
                {**base, "stop_at_layer": 1, "return_type": "logits"},
                {**base, "stop_at_layer": 1, "return_type": "loss"},
                {**base, "return_type": "probs"},
                {**base, "stop_at_layer": 1, "return_type": "probs"},
            ],
        ),
        "loss_per_token": Row(
            {"loss_per_token": True},
            {**base, "return_type": "loss"},
            [
                {**base, "loss_per_token": True},
                {**base, "loss_per_token": True, "return_type": None},
                {**base, "loss_per_token": True, "stop_at_layer": 1},
            ],
        ),
        "logits_to_keep": Row(
            {"logits_to_keep": 1},
            base,
            [
                {**base, "logits_to_keep": 1, "return_type": None},
                {**base, "logits_to_keep": 1, "stop_at_layer": 1},
                {**base, "logits_to_keep": 99},
            ],
        ),
        "attention_mask": Row(
            {"attention_mask": mask},
            base,
            [
                {"input": TEXTS, "attention_mask": mask},
                {**base, "attention_mask": mask, "segment_ids": mask},
            ],
        ),
        "segment_ids": Row({"segment_ids": documents}, base, [{"input": "a", "segment_ids": mask}]),
        "state": Row(
            {"state": state_of(model)},
            base,
            [
                {**base, "state": state_of(model), "stop_at_layer": 1},
                {"input": resid, "state": state_of(model), "start_at_layer": 1},
            ],
        ),
        "return_state": Row(
            {"return_state": True}, base, [{**base, "return_state": True, "stop_at_layer": 1}]
        ),
        "stage": Row({"stage": "generation"}, base, [{**base, "stage": "decode"}], told),
        "step": Row(
            {"step": 2},
            {**base, "stage": "generation"},
            [
                {**base, "step": 2},
                {**base, "step": 2, "stage": "prefill"},
                {**base, "step": -1, "stage": "generation"},
            ],
            told,
        ),
        "rows": Row(
            {"rows": torch.tensor([3])},
            base,
            [
                {**base, "rows": torch.tensor([1, 2])},
                {**base, "rows": torch.tensor([True])},
                {**base, "rows": torch.tensor([-1])},
            ],
            told,
        ),
        "start_at_layer": Row(
            {"start_at_layer": 2},
            {"input": resid, "start_at_layer": 1},
            [{"input": resid, "start_at_layer": 99}],
        ),
        "stop_at_layer": Row({"stop_at_layer": 1}, base, [{**base, "stop_at_layer": 99}]),
        "prepend_bos": Row(
            {"prepend_bos": not model.text.prepends_bos},
            {"input": "the cat"},
            [
                {**base, "prepend_bos": True},
                {"input": resid, "start_at_layer": 1, "prepend_bos": True},
            ],
        ),
        "padding_side": Row(
            {"padding_side": "left"},
            {"input": TEXTS},
            [{**base, "padding_side": "left"}, {"input": TEXTS, "padding_side": "top"}],
        ),
    }


@pytest.fixture(scope="module")
def rows_of_forward(model, tokens) -> dict[str, Row]:
    return forward_rows(model, tokens)


def test_each_option_of_forward_acts_or_is_refused(unchecked, model, rows_of_forward):
    check_complete(model.forward, rows_of_forward)
    for option, row in rows_of_forward.items():
        check_acts(model.forward, row)
        for idle in row.idle:
            check_refuses(model.forward, option, idle)


def test_what_forward_refuses_run_with_hooks_and_run_with_cache_refuse(
    unchecked, model, rows_of_forward
):
    for option, row in rows_of_forward.items():
        for idle in row.idle:
            check_refuses(model.run_with_hooks, option, idle)
            check_refuses(partial(model.run_with_cache, names_filter=EMBED), option, idle)


def test_options_that_ask_for_what_happens_anyway_pass(model, tokens):
    expected = model(tokens)
    nothing = {"loss_per_token": False, "prepend_bos": False, "return_state": False, "step": 0}
    assert torch.equal(model(tokens, "logits", **nothing), expected)
    assert model(tokens, return_type=None, stop_at_layer=1).shape[-1] == model.cfg.d_model
    greedy = model.generate(tokens, 3, **QUIET)
    nothing = {"do_sample": False, "prepend_bos": False, "stop_strings": (), "top_k": None}
    assert torch.equal(model.generate(tokens, 3, **nothing, **QUIET), greedy)
    assert model.generate(tokens, 3, do_sample=True, temperature=1.0, top_p=1.0, **QUIET).ndim == 2


# --- with hooks, with a cache ---------------------------------------------------------------------


def test_each_option_of_run_with_hooks_acts_or_is_refused(unchecked, model, tokens):
    base = {"input": tokens}
    point = model.hook_dict[EMBED]

    def attached(**keywords: Any) -> int:
        model.run_with_hooks(**base, fwd_hooks=[(EMBED, halve)], **keywords)
        n = len(point.fwd_hooks)
        model.reset_hooks()
        return n

    def contexts(**keywords: Any) -> Any:
        def note(_: Any, hook: Any) -> None:
            hook.ctx["seen"] = 1

        model.run_with_hooks(**base, fwd_hooks=[(EMBED, note)], **keywords)
        left = dict(point.ctx)
        model.clear_contexts()
        return left

    def gradients(**keywords: Any) -> int:
        seen: list[Any] = []
        given = {key: [(EMBED, lambda g, hook: seen.append(g.shape))] for key in keywords}
        model.run_with_hooks(**base, **given, return_type="loss").backward() if given else None
        return len(seen)

    rows = {
        "fwd_hooks": Row({"fwd_hooks": [(EMBED, halve)]}, base, [{**base, "fwd_hooks": [EMBED]}]),
        "bwd_hooks": Row({"bwd_hooks": ()}, see=gradients),
        "reset_hooks_end": Row({"reset_hooks_end": False}, see=attached),
        "clear_contexts": Row({"clear_contexts": True}, see=contexts),
    }
    check_complete(model.run_with_hooks, rows)
    for option, row in rows.items():
        check_acts(model.run_with_hooks, row)
        for idle in row.idle:
            check_refuses(model.run_with_hooks, "hook" if option == "fwd_hooks" else option, idle)
    with torch.no_grad():
        check_refuses(model.run_with_hooks, "bwd_hooks", {**base, "bwd_hooks": [(EMBED, halve)]})
        assert model.run_with_hooks(tokens, bwd_hooks=[]).shape[0] == 1


def test_each_option_of_run_with_cache_acts_or_is_refused(unchecked, model, tokens):
    base = {"input": tokens, "names_filter": EMBED}
    two = torch.cat([tokens, tokens])

    def attached(**keywords: Any) -> int:
        model.run_with_cache(**base, **keywords)
        n = len(model.hook_dict[EMBED].fwd_hooks)
        model.reset_hooks()
        return n

    def contexts(**keywords: Any) -> Any:
        model.hook_dict[EMBED].ctx["seen"] = 1
        model.run_with_cache(**base, **keywords)
        left = dict(model.hook_dict[EMBED].ctx)
        model.clear_contexts()
        return left

    def device(**keywords: Any) -> str:
        _, cache = model.run_with_cache(**base, **keywords)
        return str(cache[EMBED].device)

    rows = {
        "names_filter": Row(
            {"names_filter": "blocks.0.hook_resid_pre"},
            base,
            [{**base, "names_filter": "blocks.2.hook_resid_pre", "stop_at_layer": 1}],
        ),
        "pos_slice": Row({"pos_slice": slice(2)}, base),
        "device": Row({"device": "meta"}, see=device),
        "incl_bwd": Row({"incl_bwd": True}, base),
        "metric": Row(
            {"metric": lambda logits: logits[0, -1, 5]},
            {**base, "incl_bwd": True},
            [{**base, "metric": lambda logits: logits.sum()}],
        ),
        "remove_batch_dim": Row(
            {"remove_batch_dim": True}, base, [{**base, "input": two, "remove_batch_dim": True}]
        ),
        "reset_hooks_end": Row({"reset_hooks_end": False}, see=attached),
        "clear_contexts": Row({"clear_contexts": True}, see=contexts),
    }
    check_complete(model.run_with_cache, rows)
    for option, row in rows.items():
        check_acts(model.run_with_cache, row)
        for idle in row.idle:
            check_refuses(model.run_with_cache, option, idle)
    for option in ("fwd_hooks", "bwd_hooks"):
        with pytest.raises(TypeError, match=rf"with model.hooks\({option}="):
            model.run_with_cache(tokens, **{option: [(EMBED, halve)]})


# --- generate -------------------------------------------------------------------------------------


def generate_rows(model: HookedHybrid, tokens: torch.Tensor) -> dict[str, Row]:
    base: dict[str, Any] = {"input": tokens, "max_new_tokens": 4, **QUIET}
    sampled = {**base, "do_sample": True}
    first = int(model.generate(tokens, 1, **QUIET)[0, -1])
    mask = torch.ones_like(tokens)
    mask[0, :2] = 0
    hooks = [("blocks.1.hook_mixer_out", lambda x, hook: torch.zeros_like(x))]

    def prefer_the_end(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits[..., model.text.eos[0]] += 1000.0
        return logits

    ends = [("unembed.hook_logits", prefer_the_end)]

    def draw(**keywords: Any) -> Any:
        return drawn(model, **keywords)

    def seeded(**keywords: Any) -> Any:
        seed = keywords.pop("generator", 0)
        return model.generate(**sampled, generator=torch.Generator().manual_seed(seed))

    return {
        "max_new_tokens": Row(
            {"max_new_tokens": 2},
            base,
            [{**base, "max_new_tokens": n} for n in (0, True, 2.0)],
        ),
        "fwd_hooks": Row({"fwd_hooks": hooks}, base),
        "prefill_hooks": Row(
            {"prefill_hooks": hooks},
            base,
            [
                {
                    **base,
                    "input": tokens[:, :1],
                    "prefill_hooks": hooks,
                    "first_token_stage": "generation",
                }
            ],
        ),
        "generation_hooks": Row(
            {"generation_hooks": hooks},
            {**base, "first_token_stage": "generation"},
            [{**base, "max_new_tokens": 1, "generation_hooks": hooks}],
        ),
        "first_token_stage": Row(
            {"first_token_stage": "generation"},
            {**base, "generation_hooks": hooks},
            [{**base, "first_token_stage": "decode"}],
        ),
        "state": Row({"state": state_of(model)}, base, [{**base, "state": 3}]),
        "attention_mask": Row(
            {"attention_mask": mask},
            {**base, "return_type": "output"},
            [{"input": TEXTS, "attention_mask": mask}],
        ),
        "names_filter": Row(
            {"names_filter": EMBED},
            {**base, "return_type": "output"},
            [
                {**base, "names_filter": EMBED},
                {**base, "names_filter": True, "return_type": "str"},
            ],
        ),
        "do_sample": Row(
            {"do_sample": True, "temperature": 50.0}, base, see=partial(_global, model)
        ),
        "temperature": Row(
            {"temperature": 9.0},
            see=draw,
            idle=[
                {**base, "temperature": 1.0},
                *(
                    {**sampled, "temperature": t}
                    for t in (0, -1.0, float("nan"), float("inf"), True, "1")
                ),
            ],
        ),
        "top_k": Row(
            {"top_k": 1},
            {"temperature": 9.0},
            [
                {**base, "top_k": 5},
                *({**sampled, "top_k": k} for k in (0, -1, True, 2.0, model.cfg.d_vocab + 1)),
            ],
            draw,
        ),
        "top_p": Row(
            {"top_p": 0.01},
            {"temperature": 9.0},
            [
                {**base, "top_p": 1.0},
                *({**sampled, "top_p": p} for p in (0, -0.1, 1.1, float("nan"), True)),
            ],
            draw,
        ),
        "generator": Row(
            {"generator": 1}, idle=[{**base, "generator": torch.Generator()}], see=seeded
        ),
        "stop_at_eos": Row({"stop_at_eos": False}, {**base, "fwd_hooks": ends}),
        "eos_token_id": Row(
            {"eos_token_id": first},
            base,
            [
                {**base, "eos_token_id": first, "stop_at_eos": False},
                {**base, "eos_token_id": model.cfg.d_vocab},
                {**base, "eos_token_id": -1},
                {**base, "eos_token_id": 1.5},
            ],
        ),
        "stop_strings": Row(
            {"stop_strings": model.to_string([first])}, base, [{**base, "stop_strings": ""}]
        ),
        "prepend_bos": Row(
            {"prepend_bos": not model.text.prepends_bos},
            {**base, "input": "the cat", "return_type": "tokens"},
            [{**base, "prepend_bos": True}],
        ),
        "padding_side": Row(
            {"padding_side": "right"},
            {**base, "input": TEXTS, "return_type": "tokens"},
            [{**base, "padding_side": "left"}, {**base, "input": TEXTS, "padding_side": "top"}],
        ),
        "return_type": Row({"return_type": "str"}, base, [{**base, "return_type": "logits"}]),
        "verbose": Row({"verbose": True}, {**base, "verbose": False}),
    }


def _global(model: HookedHybrid, **keywords: Any) -> Any:
    torch.manual_seed(0)
    return model.generate(**keywords)


def test_each_option_of_generate_acts_or_is_refused(unchecked, model, tokens, capsys):
    rows = generate_rows(model, tokens)
    check_complete(model.generate, rows)
    for option, row in rows.items():
        if option not in ("verbose", "padding_side"):
            check_acts(model.generate, row)
        for idle in row.idle:
            check_refuses(model.generate, option, idle)
    model.generate(**rows["verbose"].base)
    assert "generating" not in capsys.readouterr().err
    model.generate(**rows["verbose"].acts, input=tokens, max_new_tokens=2)
    assert "generating" in capsys.readouterr().err


def test_what_is_refused_names_do_sample(model, tokens):
    with pytest.raises(
        ValueError, match="temperature=0.5 and top_k=3 have no effect: give do_sampl"
    ):
        model.generate(tokens, 3, temperature=0.5, top_k=3, **QUIET)


def test_greedy_takes_a_temperature_of_zero_and_one_new_token_takes_hooks_of_both_stages(
    model, tokens
):
    greedy = model.generate(tokens, 3, **QUIET)
    assert torch.equal(model.generate(tokens, 3, temperature=0.0, **QUIET), greedy)
    with pytest.raises(ValueError, match="temperature=0.0: give a finite number above 0"):
        model.generate(tokens, 3, temperature=0.0, do_sample=True, **QUIET)

    hooks, more = [(EMBED, halve)], [(EMBED, halve), ("ln_final.hook_scale", halve)]
    everywhere = model.generate(tokens, 1, fwd_hooks=hooks, **QUIET)
    in_stages = {"prefill_hooks": hooks, "generation_hooks": hooks, **QUIET}
    assert torch.equal(model.generate(tokens, 1, **in_stages), everywhere)
    one = {"max_new_tokens": 1, "first_token_stage": "generation"}
    assert torch.equal(
        model.generate(tokens[:, :1], **one, **in_stages),
        model.generate(tokens[:, :1], **one, fwd_hooks=hooks, **QUIET),
    )
    with pytest.raises(ValueError, match="ln_final.hook_scale.* has no effect: prefill chooses"):
        model.generate(tokens, 1, **{**in_stages, "generation_hooks": more})


# --- text -----------------------------------------------------------------------------------------


def text_rows(model: HookedHybrid) -> dict[str, tuple[Any, Mapping[str, Row]]]:
    tokens = model.to_tokens("the cat")
    other = {"prepend_bos": not model.text.prepends_bos}
    messages = [{"role": "user", "content": "a"}]
    assert messages
    return {
        "to_str_tokens": (
            model.to_str_tokens,
            {
                "prepend_bos": Row(
                    other, {"input": "the cat"}, [{"input": tokens, "prepend_bos": True}]
                )
            },
        ),
        "get_token_position": (
            model.get_token_position,
            {
                "mode": Row(
                    {"mode": "last"},
                    {"single_token": 7, "input": torch.tensor([7, 8, 7])},
                    [{"single_token": 7, "input": torch.tensor([7]), "mode": "middle"}],
                ),
                "prepend_bos": Row(
                    other,
                    {
                        "single_token": int(model.to_tokens("cat", prepend_bos=False)[0, -1]),
                        "input": "cat",
                    },
                    [{"single_token": 7, "input": torch.tensor([7]), "prepend_bos": True}],
                ),
            },
        ),
    }


def test_each_option_of_the_text_methods_acts_or_is_refused(unchecked, model):
    for function, rows in text_rows(model).values():
        check_complete(function, rows)
        for option, row in rows.items():
            check_acts(function, row)
            for idle in row.idle:
                check_refuses(function, option, idle)


# --- randomness of a row's own --------------------------------------------------------------------


def test_the_stream_of_numbers_is_splitmix64():
    """Its first numbers from seed 1234567, as published with the reference implementation."""
    expected = [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]
    made = splitmix64(torch.tensor(1234567), torch.arange(5))
    assert [int(x) % 2**64 for x in made] == expected
    given = [0, 2**63 - 1, 2**63, 2**64 - 1]
    assert [_signed(x) for x in given] == [0, 2**63 - 1, -(2**63), -1]  # of the same bits


def test_uniform_numbers_are_even_and_independent_between_rows_and_steps():
    u = uniforms(0, torch.arange(200), torch.arange(200))
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 5 * (1 / 12 / u.numel()) ** 0.5
    counts = torch.histc(u, 100, 0, 1)
    assert 50 < float(((counts - 400) ** 2 / 400).sum()) < 160  # chi-squared, 99 degrees
    for a, b in ((u[1:], u[:-1]), (u[:, 1:], u[:, :-1])):
        r = torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]
        assert abs(float(r)) < 5 / u.numel() ** 0.5
    draws = Draws(0)
    late = draws.at(draws.AHEAD, 200, torch.device("cpu"))
    assert torch.equal(late, uniforms(0, torch.arange(200), torch.tensor([draws.AHEAD]))[0])


def sampled(model: HookedHybrid, tokens: torch.Tensor, **options: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    options = {"do_sample": True, "generator": generator, "return_type": "output", **options}
    return model.generate(tokens, 12, **options, **QUIET).new_tokens


@pytest.mark.parametrize("name", ["griffin", "jamba"])
def test_a_seeded_sample_of_a_row_is_its_own(name):
    model = tiny_model(name)
    tokens = random_tokens(4, 6)
    alone = sampled(model, tokens, stop_at_eos=False)
    assert len({tuple(row) for row in alone.tolist()}) == 4

    def end_row_0(logits: torch.Tensor, hook: Any) -> torch.Tensor:
        logits[hook.run.rows == 0, :, 5] += 1000.0
        return logits

    ended = sampled(model, tokens, fwd_hooks=[("unembed.hook_logits", end_row_0)], eos_token_id=5)
    assert ended[0].tolist() == [5] * 12
    end = [[*row.tolist(), 5].index(5) for row in alone]
    for row in (1, 2, 3):  # up to where they end themselves
        assert ended[row, : end[row]].tolist() == alone[row, : end[row]].tolist()
    assert torch.equal(sampled(model, tokens[:2], stop_at_eos=False), alone[:2])
    tokens[0] = random_tokens(1, 6, seed=9)
    assert torch.equal(sampled(model, tokens, stop_at_eos=False)[1:], alone[1:])


def test_forks_of_a_state_draw_apart_and_repeat(model, tokens):
    state = model(tokens, return_type=None, return_state=True)[1].fork(3)
    more = tokens[:, :1].repeat(3, 1)
    first = sampled(model, more, state=state, temperature=3.0)
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(sampled(model, more, state=state, temperature=3.0), first)


def test_a_generator_continues_between_calls_and_the_global_one_seeds_a_call(model, tokens):
    def run(**options: Any) -> list[int]:
        options = {"do_sample": True, "temperature": 3.0, **options}
        return model.generate(tokens, 12, **options, **QUIET)[0].tolist()

    generator = torch.Generator().manual_seed(0)
    first, second = run(generator=generator), run(generator=generator)
    assert first != second
    generator.manual_seed(0)
    assert run(generator=generator) == first
    torch.manual_seed(5)
    of_global = run()
    torch.manual_seed(5)
    assert run() == of_global


@pytest.mark.parametrize("temperature", [1e-6, 1e-40, 1e-300, 5e-324])
def test_a_temperature_near_zero_draws_the_most_likely_token(model, tokens, temperature):
    greedy = model.generate(tokens, 12, **QUIET)
    options = {"do_sample": True, "temperature": temperature}
    assert torch.equal(model.generate(tokens, 12, **options, **QUIET), greedy)
    logits = torch.tensor([[0.0, 2.0, -torch.inf, 2.0]])  # the limit of a tie is an even draw
    shares = Sampling(True, temperature).probabilities(logits)
    assert shares.tolist() == [[0.0, 0.5, 0.0, 0.5]]


def test_a_share_of_exactly_zero_is_never_drawn():
    logits = torch.full((3, 4), -torch.inf)
    logits[:, 1:3] = 0.0
    uniform = torch.tensor([0.0, 0.5, 1 - 2.0**-52], dtype=torch.float64)
    assert Sampling(True).choose(logits, uniform)[0].tolist() == [1, 2, 2]
