"""Properties of generation: it is the forward, token by token, and every hook is live in it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.hooks.marks import per_position, watcher
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.hooks.run import Run
from hooked_hybrid.model.sampling import Sampling
from hooked_hybrid.network.block_state import AttentionState
from hooked_hybrid.network.state import HybridState
from tests.models import (
    D_VOCAB,
    griffin_config,
    jamba_config,
    random_model,
    random_tokens,
    relative,
)
from tests.text.test_text import BOS, EOS, toy_tokenizer
from tests.tolerances import FP32_PARITY

EMBED = "hook_embed"
LENGTHS = (9, 1, 4, 2)
N_KEYS = 7
CONFIGS = {
    "griffin": griffin_config("RRAR", n_keys=N_KEYS),
    "griffin_of_one_key": griffin_config("RRAR", n_keys=1),
    "griffin_of_all_keys": griffin_config("RRAR", n_keys=None),
    "jamba": jamba_config("MMAM"),
}
QUIET: dict[str, Any] = {"verbose": False, "return_type": "output"}
ENDLESS: dict[str, Any] = {**QUIET, "stop_at_eos": False}


@cache
def lively_model(name: str = "griffin") -> HookedHybrid:
    """Return a model whose greedy tokens vary: its unembedding is not its embedding."""
    cfg = dataclasses.replace(CONFIGS[name], tied_embedding=False, eos_token_id=None)
    cfg = dataclasses.replace(cfg, pad_token_id=None, default_prepend_bos=True)
    model = random_model(cfg, seed=2 if name == "jamba" else 4)
    model.tokenizer = toy_tokenizer()
    return model


@pytest.fixture
def model():
    yield lively_model()
    assert not lively_model().list_hooks()


@pytest.fixture(params=["griffin", "jamba"])
def each_model(request):
    """The same properties hold of every family."""
    yield lively_model(request.param)
    assert not lively_model(request.param).list_hooks()


@pytest.fixture
def tokens() -> Tensor:
    return random_tokens(batch=3, n_pos=9)


def full_greedy(model: HookedHybrid, tokens: Tensor, n_new: int) -> tuple[Tensor, Tensor]:
    """Return new tokens and the logits they were chosen from, by whole forwards without a state."""
    logits = []
    for _ in range(n_new):
        logits.append(model(tokens)[:, -1])
        tokens = torch.cat([tokens, logits[-1].argmax(-1, keepdim=True)], dim=1)
    return tokens[:, -n_new:], torch.stack(logits, dim=1)


def logprobs_of(logits: Tensor, chosen: Tensor) -> Tensor:
    return logits.log_softmax(-1).gather(-1, chosen[..., None])[..., 0]


def padded(side: str, lengths: tuple[int, ...] = LENGTHS) -> tuple[list[Tensor], Tensor, Tensor]:
    """Return rows alone, and the same rows padded with a real word, with their mask."""
    rows = [random_tokens(1, n, seed=n) for n in lengths]
    tokens = torch.full((len(rows), max(lengths)), 5)
    mask = torch.zeros_like(tokens)
    for i, row in enumerate(rows):
        n = row.shape[1]
        at = slice(0, n) if side == "right" else slice(tokens.shape[1] - n, None)
        tokens[i, at], mask[i, at] = row[0], 1
    return rows, tokens, mask


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest number, or of 1."""
    atol = 1e-5 * max(1.0, float(expected.abs().max()) if expected.numel() else 0.0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def assert_same_state(actual: HybridState, expected: HybridState) -> None:
    """Equal to 1e-5 for one row, whatever empty places the keys have in front."""
    assert actual.batch_size == expected.batch_size == 1
    assert torch.equal(actual.next_pos, expected.next_pos)
    assert torch.equal(actual.segment, expected.segment)
    for a, b in zip(actual.blocks, expected.blocks, strict=True):
        if isinstance(a, AttentionState) and isinstance(b, AttentionState):
            real_a, real_b = a.pos[0] >= 0, b.pos[0] >= 0
            assert torch.equal(a.pos[0, real_a], b.pos[0, real_b])
            assert_close(a.k[0, real_a], b.k[0, real_b])
            assert_close(a.v[0, real_a], b.v[0, real_b])
        else:
            assert vars(a).keys() == vars(b).keys() == {"conv", "ssm"}
            assert_close(a.conv, b.conv)
            assert_close(a.ssm, b.ssm)


def state_after(model: HookedHybrid, tokens: Tensor) -> HybridState:
    return model(tokens, return_type=None, return_state=True)[1]


def run_recorder() -> tuple[list[Run], Callable[..., None]]:
    runs: list[Run] = []

    @watcher
    def note(value: Tensor, hook: HookPoint) -> None:
        assert value.shape[:2] == hook.run.query_pos.shape
        runs.append(hook.run)

    return runs, note


# --- greedy -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_the_argmax_of_whole_forwards_whichever_stage_comes_first(tokens, name):
    model = lively_model(name)
    new, logits = full_greedy(model, tokens, 12)
    assert len(set(new[0].tolist())) > 3, "the model repeats itself: this would test little"
    for stage in ("prefill", "generation"):
        out = model.generate(tokens, 12, first_token_stage=stage, **ENDLESS)
        assert torch.equal(out.new_tokens, new)
        assert torch.equal(out.tokens, torch.cat([tokens, new], dim=1))
        assert_close(out.logprobs, logprobs_of(logits, new))
        assert not out.finished.any()


@pytest.mark.parametrize("n_prompt", [1, 2])
@pytest.mark.parametrize("first_token_stage", ["prefill", "generation"])
def test_greedy_from_the_shortest_prompts(model, tokens, n_prompt, first_token_stage):
    prompt = tokens[:, :n_prompt]
    out = model.generate(prompt, 5, first_token_stage=first_token_stage, **ENDLESS)
    assert torch.equal(out.new_tokens, full_greedy(model, prompt, 5)[0])


def test_the_state_is_that_after_everything_but_the_last_token(each_model, tokens):
    out = each_model.generate(tokens, 6, **ENDLESS)
    read = out.tokens[:, :-1]
    for row in range(3):
        assert_same_state(out.state[row], state_after(each_model, read[row : row + 1]))


def test_one_new_token_reads_the_prompt_only(model, tokens):
    out = model.generate(tokens, 1, **ENDLESS)
    assert out.new_tokens.shape == (3, 1)
    assert out.state.next_pos.tolist() == [9, 9, 9]


def test_a_row_of_tokens_without_a_batch_axis_is_one_row(model, tokens):
    out = model.generate(tokens[0], 4, return_type="tokens", stop_at_eos=False, verbose=False)
    assert torch.equal(
        out, model.generate(tokens[:1], 4, return_type="tokens", stop_at_eos=False, verbose=False)
    )


def test_generation_leaves_no_graph_and_the_grad_mode_as_it_was(model, tokens):
    with torch.enable_grad():
        out = model.generate(tokens, 2, names_filter=True, **ENDLESS)
        assert torch.is_grad_enabled()
    tensors = [out.logprobs, *out.state.tensors().values(), *out.cache.values()]
    assert not any(t.requires_grad for t in tensors)


def test_a_long_prompt_read_in_pieces_gives_what_one_piece_gives(model):
    tokens = random_tokens(batch=2, n_pos=600)
    out = model.generate(tokens, 2, **ENDLESS)
    with model.hooks([(EMBED, lambda value, hook: None)]):  # unmarked: the forward runs whole
        new, logits = full_greedy(model, tokens, 2)
    assert torch.equal(out.new_tokens, new)
    assert_close(out.logprobs, logprobs_of(logits, new))


# --- sampling ---------------------------------------------------------------------------------


def drawn(model: HookedHybrid, tokens: Tensor, seed: int = 0, **options: Any) -> Any:
    generator = torch.Generator().manual_seed(seed)
    return model.generate(tokens, 12, do_sample=True, generator=generator, **ENDLESS, **options)


def test_sampling_is_reproducible_and_depends_on_the_seed(model, tokens):
    first = drawn(model, tokens)
    torch.rand(7)  # the global generator has no part in it
    assert torch.equal(drawn(model, tokens).new_tokens, first.new_tokens)
    assert not torch.equal(drawn(model, tokens, seed=1).new_tokens, first.new_tokens)


def test_without_a_generator_torchs_own_is_used(model, tokens):
    with torch.random.fork_rng():
        torch.manual_seed(3)
        first = model.generate(tokens, 8, do_sample=True, **ENDLESS).new_tokens
        torch.manual_seed(3)
        again = model.generate(tokens, 8, do_sample=True, **ENDLESS).new_tokens
    assert torch.equal(first, again)


def test_logprobs_of_sampled_tokens_are_the_models_own_at_any_temperature(model, tokens):
    out = drawn(model, tokens, temperature=1.7, top_k=20)
    logits = model(out.tokens)[:, 8:-1]
    assert_close(out.logprobs, logprobs_of(logits, out.new_tokens))


@pytest.mark.parametrize("options", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-4}], ids=str)
def test_sampling_from_the_best_alone_is_greedy(model, tokens, options):
    greedy = model.generate(tokens, 12, **ENDLESS)
    assert torch.equal(drawn(model, tokens, **options).new_tokens, greedy.new_tokens)


PROBABILITIES = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15])
EVEN = (torch.arange(3000, dtype=torch.float64) + 0.5) / 3000
"""Uniform numbers without chance: their shares are the probabilities."""


@pytest.mark.parametrize(
    ("options", "possible"),
    [
        ({}, {0, 1, 2, 3, 4}),
        ({"top_k": 2}, {1, 3}),
        ({"top_k": 5}, {0, 1, 2, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 0.5}, {1, 3}),  # 0.4 is not enough
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.72}, {1, 3, 4}),
        ({"top_p": 1.0}, {0, 1, 2, 3, 4}),
        ({"top_k": 3, "top_p": 0.8}, {1, 3}),  # of the three, 0.82 is held by two
    ],
    ids=str,
)
def test_top_k_and_top_p_say_what_can_be_drawn(options, possible):
    sampling = Sampling(do_sample=True, **options)
    chosen, logprobs, margins = sampling.choose(PROBABILITIES.log().repeat(3000, 1), EVEN)
    assert set(chosen.tolist()) == possible
    assert_close(logprobs, PROBABILITIES.log()[chosen])
    top = PROBABILITIES.log().topk(2).values
    assert_close(margins, (top[0] - top[1]).expand(3000))


@pytest.mark.parametrize(("top_p", "n"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_tokens_that_hold_just_the_share_asked_for_are_enough(top_p, n):
    """Four tokens of a quarter each, which sum without rounding."""
    kept = Sampling(True, top_p=top_p).probabilities(torch.zeros(1, 4))
    assert kept.sort(descending=True).values[0].tolist() == [1 / n] * n + [0.0] * (4 - n)


def test_temperature_divides_the_logits():
    chosen, _, _ = Sampling(True, 2.0).choose(PROBABILITIES.log().repeat(3000, 1), EVEN)
    share = torch.bincount(chosen, minlength=5) / 3000
    # As many of the evenly spaced numbers as fit into each token's share, to one at each end.
    torch.testing.assert_close(
        share, PROBABILITIES.sqrt() / PROBABILITIES.sqrt().sum(), rtol=0, atol=2 / 3000
    )


# --- what is refused, before any work ---------------------------------------------------------

BAD: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"max_new_tokens": 0}, ValueError, "max_new_tokens=0"),
    ({"max_new_tokens": -3}, ValueError, "max_new_tokens=-3"),
    ({"temperature": 0.0, "do_sample": True}, ValueError, "temperature=0"),
    ({"temperature": -1.0, "do_sample": True}, ValueError, "temperature"),
    ({"temperature": float("nan"), "do_sample": True}, ValueError, "temperature"),
    ({"top_k": 0}, ValueError, "top_k=0"),
    ({"top_p": 0.0}, ValueError, "top_p=0"),
    ({"top_p": 1.5}, ValueError, "top_p=1.5"),
    ({"first_token_stage": "decode"}, ValueError, "'prefill' or 'generation'"),
    ({"return_type": "logits"}, ValueError, "'input', 'str', 'tokens' or 'output'"),
    ({"fwd_hooks": [("hook_nowhere", print)]}, HookNameError, "hook_nowhere"),
    ({"prefill_hooks": [("hook_embd", print)]}, HookNameError, "hook_embed"),
    ({"generation_hooks": [(lambda name: False, print)]}, HookNameError, "none"),
    ({"fwd_hooks": [EMBED]}, TypeError, "pair"),
    ({"names_filter": "hook_nowhere", "return_type": "output"}, HookNameError, "hook_nowhere"),
    ({"names_filter": ["hook_nowhere"], "return_type": "output"}, HookNameError, "hook_nowhere"),
    ({"attention_mask": torch.tensor([[1, 1]])}, ValueError, "attention_mask"),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, ValueError, "between"),
    ({"attention_mask": torch.tensor([[0, 0, 0]])}, ValueError, "without a token"),
    ({"input": torch.empty(1, 0, dtype=torch.long)}, ValueError, "empty"),
    ({"input": []}, ValueError, "empty|at least one"),
    ({"input": torch.tensor([[3, D_VOCAB]])}, ValueError, str(D_VOCAB)),
    ({"input": torch.tensor([[0.5, 1.0]])}, ValueError, "integers"),
    ({"input": ["w7", "w8"], "padding_side": "middle"}, ValueError, "'left' or 'right'"),
    ({"input": "w7", "attention_mask": torch.tensor([[1, 1]])}, ValueError, "mask"),
    ({"input": torch.tensor([[7], [8]]), "state": "of one row"}, ValueError, r"fork"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD, ids=lambda v: str(v)[:40])
def test_what_makes_no_sense_is_refused_before_any_forward(
    model, unchecked, options, error, message
):
    forwards: list[int] = []
    options = {"input": torch.tensor([[7, 8, 9]]), "max_new_tokens": 3, **options}
    if options.get("state"):
        options["state"] = state_after(model, torch.tensor([[7, 8]]))
    with (
        model.hooks([(EMBED, lambda value, hook: forwards.append(1))]),
        pytest.raises(error, match=message),
    ):
        model.generate(**options, verbose=False)
    assert not forwards


@pytest.mark.parametrize("options", [{"return_type": "str"}, {"stop_strings": "w7"}])
def test_what_needs_a_tokenizer_is_refused_without_one_before_any_forward(tokens, options):
    model, forwards = random_model(CONFIGS["griffin"]), []
    with (
        model.hooks([(EMBED, lambda value, hook: forwards.append(1))]),
        pytest.raises(ValueError, match="tokenizer"),
    ):
        model.generate(tokens, 3, verbose=False, **options)
    assert not forwards


@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_an_error_in_a_hook_leaves_no_hook_behind(model, tokens, stage):
    def broken(value: Tensor, hook: HookPoint) -> None:
        if hook.run.stage == stage:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        model.generate(
            tokens,
            3,
            fwd_hooks=[(EMBED, broken)],
            prefill_hooks=[(EMBED, lambda value, hook: None)],
            generation_hooks=[(EMBED, lambda value, hook: None)],
            names_filter=True,
            **ENDLESS,
        )
    assert not model.list_hooks()  # and so the fixture


# --- ends of rows -----------------------------------------------------------------------------

N_NEW = 8
END = 3


def with_an_end(model: HookedHybrid, tokens: Tensor) -> tuple[Any, int]:
    """Return the endless generation, and a token that is first met by row 0 at step `END`."""
    free = model.generate(tokens, N_NEW, **ENDLESS)
    eos = int(free.new_tokens[0, END])
    assert eos not in free.new_tokens[0, :END] and eos not in free.new_tokens[1:, : END + 2]
    return free, eos


def lengths_until(new_tokens: Tensor, eos: int) -> list[int]:
    """Return how many tokens each row has up to its end, that included."""
    return [
        row.index(eos) + 1 if eos in row else len(row) for row in (r.tolist() for r in new_tokens)
    ]


def test_a_row_stops_at_eos_and_the_others_continue_unchanged(model, tokens):
    free, eos = with_an_end(model, tokens)
    out = model.generate(tokens, N_NEW, eos_token_id=eos, **QUIET)
    lengths = lengths_until(free.new_tokens, eos)
    assert lengths[0] == END + 1 and max(lengths[1:]) == N_NEW
    assert out.new_tokens.shape == free.new_tokens.shape
    for row, n in enumerate(lengths):
        assert torch.equal(out.new_tokens[row, :n], free.new_tokens[row, :n])
        assert_close(out.logprobs[row, :n], free.logprobs[row, :n])
        assert (out.new_tokens[row, n:] == eos).all(), "padded with the end token"
        assert (out.logprobs[row, n:] == 0).all()
        assert_close(out.margins[row, :n], free.margins[row, :n])
        assert (out.margins[row, n:] == torch.inf).all(), "nothing was chosen there"
    assert out.finished.tolist() == [
        n < N_NEW or eos in free.new_tokens[r, n - 1 : n] for r, n in enumerate(lengths)
    ]


def test_the_state_of_each_row_is_that_of_running_it_alone_over_what_it_read(each_model, tokens):
    free, eos = with_an_end(each_model, tokens)
    out = each_model.generate(tokens, N_NEW, eos_token_id=eos, **QUIET)
    for row, n in enumerate(lengths_until(free.new_tokens, eos)):
        read = torch.cat([tokens[row], out.new_tokens[row, : n - 1]])[None]
        assert_same_state(out.state[row], state_after(each_model, read))


def test_several_tokens_can_each_be_an_end(model, tokens):
    free, eos = with_an_end(model, tokens)
    other = int(free.new_tokens[1, 1])
    out = model.generate(tokens, N_NEW, eos_token_id=[eos, other], **QUIET)
    for row in range(3):
        n = min(lengths_until(free.new_tokens, t)[row] for t in (eos, other))
        assert torch.equal(out.new_tokens[row, :n], free.new_tokens[row, :n])
        assert (out.logprobs[row, n:] == 0).all()


def test_a_row_that_has_ended_is_padded_with_the_first_of_several_end_tokens(model, tokens):
    """As transformers pads where no padding token is known."""
    free, eos = with_an_end(model, tokens)
    unused = next(t for t in range(3, D_VOCAB) if t not in free.new_tokens)
    for ends in ([unused, eos], [eos, unused]):
        out = model.generate(tokens, N_NEW, eos_token_id=ends, **QUIET)
        assert out.new_tokens[0, END + 1 :].tolist() == ends[:1] * (N_NEW - END - 1)


def test_generation_ends_early_when_all_rows_have(model, tokens):
    free, eos = with_an_end(model, tokens)
    out = model.generate(tokens[:1], N_NEW, eos_token_id=eos, **QUIET)
    assert torch.equal(out.new_tokens, free.new_tokens[:1, : END + 1])
    assert out.finished.tolist() == [True]
    assert_same_state(out.state, state_after(model, out.tokens[:, :-1]))


def test_an_end_at_the_last_step_counts_as_finished(model, tokens):
    _, eos = with_an_end(model, tokens)
    out = model.generate(tokens, END + 1, eos_token_id=eos, **QUIET)
    assert out.finished.tolist() == [True, False, False]


def test_the_ends_are_the_models_own_by_default(tokens):
    free, eos = with_an_end(lively_model(), tokens)
    model = random_model(dataclasses.replace(lively_model().cfg, eos_token_id=eos), seed=4)
    assert model.generate(tokens, N_NEW, **QUIET).finished[0]
    assert not model.generate(tokens, N_NEW, **ENDLESS).finished.any()
    assert torch.equal(model.generate(tokens, N_NEW, **ENDLESS).new_tokens, free.new_tokens)
    unused = next(t for t in range(D_VOCAB) if t not in free.new_tokens)
    assert not model.generate(tokens, N_NEW, eos_token_id=unused, **QUIET).finished.any()


def test_hooks_see_the_rows_that_continue_by_their_number_in_the_batch(model, tokens):
    free, eos = with_an_end(model, tokens)
    runs, note = run_recorder()
    model.generate(tokens, N_NEW, eos_token_id=eos, fwd_hooks=[(EMBED, note)], **QUIET)
    lengths = lengths_until(free.new_tokens, eos)
    assert [run.rows.tolist() for run in runs] == [
        [row for row, n in enumerate(lengths) if n > step] for step in range(N_NEW)
    ]
    assert runs[END + 1].rows.tolist() == [1, 2]


# --- unequal lengths --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("side", "first_token_stage"), [("left", "generation"), ("right", "prefill")]
)
def test_padded_rows_generate_what_each_does_alone(each_model, side, first_token_stage):
    rows, tokens, mask = padded(side)
    options = {"first_token_stage": first_token_stage, **ENDLESS}
    out = each_model.generate(tokens, N_NEW, attention_mask=mask, **options)
    for i, row in enumerate(rows):
        alone = each_model.generate(row, N_NEW, **options)
        assert torch.equal(out.new_tokens[i], alone.new_tokens[0])
        assert torch.equal(out.tokens[i, -row.shape[1] - N_NEW :], alone.tokens[0])
        assert_close(out.logprobs[i], alone.logprobs[0])
        assert_same_state(out.state[i], alone.state)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_that_end_have_the_state_each_has_alone(model, side):
    rows, tokens, mask = padded(side)
    free = model.generate(tokens, N_NEW, attention_mask=mask, **ENDLESS)
    eos = int(free.new_tokens[1, 2])
    out = model.generate(tokens, N_NEW, attention_mask=mask, eos_token_id=eos, **QUIET)
    assert out.finished[1]
    for i, row in enumerate(rows):
        alone = model.generate(row, N_NEW, eos_token_id=eos, **QUIET)
        n = alone.new_tokens.shape[1]
        assert torch.equal(out.new_tokens[i, :n], alone.new_tokens[0])
        assert_close(out.logprobs[i, :n], alone.logprobs[0])
        assert_same_state(out.state[i], alone.state)
        assert out.finished[i] == alone.finished[0]


def test_a_mask_of_ones_changes_nothing(model, tokens):
    plain = model.generate(tokens, 5, **ENDLESS)
    masked = model.generate(tokens, 5, attention_mask=torch.ones_like(tokens), **ENDLESS)
    assert torch.equal(masked.logprobs, plain.logprobs) and torch.equal(masked.tokens, plain.tokens)


@pytest.mark.parametrize("side", [None, "left", "right"])
def test_several_texts_generate_what_each_does_alone(model, side):
    texts = ["w7 w9 w8 w30 w31 w32 w33", "w8", "w20 w21"]
    out = model.generate(texts, 6, padding_side=side, **ENDLESS)
    for row, text in enumerate(texts):
        alone = model.generate(text, 6, **ENDLESS)
        assert out.text[row] == alone.text[0]
        assert_close(out.logprobs[row], alone.logprobs[0])


# --- continuing -------------------------------------------------------------------------------


@pytest.mark.parametrize("first_token_stage", ["prefill", "generation"])
@pytest.mark.parametrize("n_first", [1, 4])
def test_continuing_from_the_returned_state_is_generating_in_one_go(
    model, tokens, first_token_stage, n_first
):
    whole = model.generate(tokens, 9, **ENDLESS)
    first = model.generate(tokens, n_first, **ENDLESS)
    rest = model.generate(
        first.new_tokens[:, -1:],
        9 - n_first,
        state=first.state,
        first_token_stage=first_token_stage,
        **ENDLESS,
    )
    assert torch.equal(torch.cat([first.new_tokens, rest.new_tokens], dim=1), whole.new_tokens)
    assert_close(torch.cat([first.logprobs, rest.logprobs], dim=1), whole.logprobs)
    for row in range(3):
        assert_same_state(rest.state[row], whole.state[row])


def test_continuing_rows_of_unequal_lengths_with_new_text_of_unequal_lengths(each_model):
    """A padded continuation of a padded start is each row alone over both."""
    rows, tokens, mask = padded("right", (5, 2, 9))
    more_rows, more, more_mask = padded("left", (1, 4, 3))
    _, state = each_model(tokens, attention_mask=mask, return_type=None, return_state=True)
    out = each_model.generate(more, 6, state=state, attention_mask=more_mask, **ENDLESS)
    for i in range(3):
        alone = each_model.generate(torch.cat([rows[i], more_rows[i]], dim=1), 6, **ENDLESS)
        assert torch.equal(out.new_tokens[i], alone.new_tokens[0])
        assert_close(out.logprobs[i], alone.logprobs[0])
        assert_same_state(out.state[i], alone.state)


def test_text_that_continues_a_state_gets_no_bos_by_default(model):
    _, state = model("w7 w8", return_type=None, return_state=True)
    out = model.generate("w9 w10", 3, state=state, **ENDLESS)
    assert out.tokens[0, :2].tolist() == [9, 10]
    whole = model.generate("w7 w8 w9 w10", 3, **ENDLESS)
    assert torch.equal(out.new_tokens, whole.new_tokens)
    told = model.generate("w9", 3, state=state, prepend_bos=True, **ENDLESS)
    assert told.tokens[0, :2].tolist() == [BOS, 9]


def test_a_forked_state_gives_each_copy_the_same_continuation(model, tokens):
    first = model.generate(tokens[:1], 3, **ENDLESS)
    last = first.new_tokens[:, -1:]
    alone = model.generate(last, 5, state=first.state, **ENDLESS)
    forked = model.generate(last.repeat(4, 1), 5, state=first.state.fork(4), **ENDLESS)
    assert torch.equal(forked.new_tokens, alone.new_tokens.repeat(4, 1))


# --- stages and hook.run ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first_token_stage", "expected"),
    [
        (
            "prefill",
            [("prefill", 0, 9), ("generation", 1, 1), ("generation", 2, 1), ("generation", 3, 1)],
        ),
        (
            "generation",
            [
                ("prefill", 0, 8),
                ("generation", 1, 1),
                ("generation", 2, 1),
                ("generation", 3, 1),
                ("generation", 4, 1),
            ],
        ),
    ],
)
def test_hook_run_tells_stage_step_and_positions_of_every_forward(
    model, tokens, first_token_stage, expected
):
    runs, note = run_recorder()
    options = {"first_token_stage": first_token_stage, **ENDLESS}
    model.generate(tokens, 4, fwd_hooks=[(EMBED, note)], **options)
    assert [(run.stage, run.step, run.query_pos.shape[1]) for run in runs] == expected
    read = torch.cat([run.query_pos for run in runs], dim=1)
    assert torch.equal(read, torch.arange(12).repeat(3, 1))
    assert all(run.rows.tolist() == [0, 1, 2] for run in runs)


def test_a_prompt_of_one_token_has_no_prefill_where_generation_reads_it(model, tokens):
    runs, note = run_recorder()
    options = {"first_token_stage": "generation", **ENDLESS}
    model.generate(tokens[:, :1], 2, fwd_hooks=[(EMBED, note)], **options)
    assert [(run.stage, run.step) for run in runs] == [("generation", 1), ("generation", 2)]


def test_positions_are_absolute_and_minus_one_at_padding(model):
    _, tokens, mask = padded("left", (3, 1))
    runs, note = run_recorder()
    model.generate(tokens, 3, attention_mask=mask, fwd_hooks=[(EMBED, note)], **ENDLESS)
    assert [run.query_pos.tolist() for run in runs] == [
        [[0, 1, 2], [-1, -1, 0]],
        [[3], [1]],
        [[4], [2]],
    ]


def test_key_positions_are_oldest_first_up_to_the_query(model, tokens):
    keys: list[Tensor] = []

    def note(value: Tensor, hook: HookPoint) -> None:
        assert value.shape[3] == hook.run.key_pos.shape[1]
        keys.append(hook.run.key_pos)

    name = "blocks.2.attn.hook_pattern"
    model.generate(tokens, 3, generation_hooks=[(name, note)], **ENDLESS)
    expected = [list(range(t - N_KEYS + 1, t + 1)) for t in (9, 10)]
    assert [k.tolist() for k in keys] == [[row] * 3 for row in expected]


def test_steps_of_a_continuation_begin_anew_and_positions_do_not(model, tokens):
    first = model.generate(tokens, 3, **ENDLESS)
    runs, note = run_recorder()
    model.generate(
        first.new_tokens[:, -1:], 2, state=first.state, fwd_hooks=[(EMBED, note)], **ENDLESS
    )
    assert [(run.stage, run.step, run.query_pos[0].tolist()) for run in runs] == [
        ("prefill", 0, [11]),
        ("generation", 1, [12]),
    ]


@pytest.mark.parametrize("first_token_stage", ["prefill", "generation"])
def test_stage_hooks_are_called_in_their_stage_only_after_the_others(
    model, tokens, first_token_stage
):
    calls: list[tuple[str, str, int]] = []

    def noting(label: str) -> Callable[..., None]:
        def note(value: Tensor, hook: HookPoint) -> None:
            calls.append((label, hook.run.stage, hook.run.step))

        return note

    model.generate(
        tokens,
        3,
        generation_hooks=[(EMBED, noting("generation"))],
        prefill_hooks=[(EMBED, noting("prefill"))],
        fwd_hooks=[(EMBED, noting("both"))],
        first_token_stage=first_token_stage,
        **ENDLESS,
    )
    n_steps = 2 if first_token_stage == "prefill" else 3
    assert calls == [
        (label, stage, step)
        for stage, step in [("prefill", 0), *(("generation", s + 1) for s in range(n_steps))]
        for label in ("both", stage)
    ]


@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_an_edit_in_one_stage_is_an_edit_that_tests_for_the_stage(model, tokens, stage):
    def shift(value: Tensor, hook: HookPoint) -> Tensor:
        return value + 0.5

    def shift_in_stage(value: Tensor, hook: HookPoint) -> Tensor:
        return value + 0.5 if hook.run.stage == stage else value

    name = "blocks.1.hook_resid_post"
    staged = model.generate(tokens, 6, **{f"{stage}_hooks": [(name, shift)]}, **ENDLESS)
    asked = model.generate(tokens, 6, fwd_hooks=[(name, shift_in_stage)], **ENDLESS)
    plain = model.generate(tokens, 6, **ENDLESS)
    assert torch.equal(staged.logprobs, asked.logprobs)
    first = 0 if stage == "prefill" else 1
    assert torch.equal(staged.logprobs[:, :first], plain.logprobs[:, :first])
    assert not torch.equal(staged.logprobs[:, first:], plain.logprobs[:, first:])


def test_hooks_of_a_surrounding_block_and_permanent_ones_are_live(model, tokens):
    shift = [("blocks.1.hook_resid_post", lambda value, hook: value + 0.5)]
    expected = model.generate(tokens, 4, fwd_hooks=shift, **ENDLESS).logprobs
    with model.hooks(shift):
        assert torch.equal(model.generate(tokens, 4, **ENDLESS).logprobs, expected)
    (handle,) = model.add_perma_hook(*shift[0])
    try:
        assert torch.equal(model.generate(tokens, 4, **ENDLESS).logprobs, expected)
    finally:
        handle.remove()


# --- the cache of a generation ----------------------------------------------------------------


@per_position
def press(value: Tensor, hook: HookPoint) -> Tensor:
    """An edit that treats each position by itself and depends on which it is."""
    pos = hook.run.query_pos.to(value.dtype).clamp_min(0)
    factor = 1 + 0.3 * torch.sin(pos)
    shape = [1] * value.ndim
    shape[0], shape[hook.pos_dim] = factor.shape
    return value * factor.view(shape)


EDITS: dict[str, list[tuple[Any, Any]]] = {
    "no_edit": [],
    "edits": [
        (name, press)
        for name in (
            "blocks.0.mixer.hook_ssm_state",
            "blocks.1.mixer.hook_conv",
            "blocks.2.attn.hook_pattern",
            "blocks.2.attn.hook_k",
            "blocks.2.mlp.hook_act",
        )
    ],
}


def everything(name: str) -> bool:
    return True


def assert_same_values(actual: Tensor, expected: Tensor, name: str) -> None:
    """Equal to rounding; a masked score is the lowest number there is."""
    assert actual.shape == expected.shape and actual.dtype == expected.dtype, name
    if not actual.is_floating_point():
        assert torch.equal(actual, expected), name
        return
    lowest = torch.finfo(actual.dtype).min
    assert torch.equal(actual == lowest, expected == lowest), name
    actual, expected = (
        actual.masked_fill(actual == lowest, 0),
        expected.masked_fill(expected == lowest, 0),
    )
    assert relative(actual, expected) < FP32_PARITY, name


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("first_token_stage", ["prefill", "generation"])
def test_the_cache_is_that_of_one_forward_over_all_but_the_last_token(
    each_model, tokens, first_token_stage, edits
):
    with each_model.hooks(EDITS[edits]):
        out = each_model.generate(
            tokens, 6, names_filter=everything, first_token_stage=first_token_stage, **ENDLESS
        )
        _, expected = each_model.run_with_cache(out.tokens[:, :-1], names_filter=everything)
    assert set(out.cache) == set(expected) == set(each_model.hook_dict)
    for name, value in expected.items():
        assert_same_values(out.cache[name], value, name)


@pytest.mark.parametrize("edits", EDITS)
def test_hooks_given_to_generate_leave_their_effects_in_the_cache(model, tokens, edits):
    out = model.generate(tokens, 4, fwd_hooks=EDITS[edits], names_filter=True, **ENDLESS)
    with model.hooks(EDITS[edits]):
        _, expected = model.run_with_cache(out.tokens[:, :-1])
    for name, value in expected.items():
        assert_same_values(out.cache[name], value, name)


@pytest.mark.parametrize(
    ("names_filter", "kept"),
    [
        (EMBED, [EMBED]),
        ([EMBED, "blocks.2.attn.hook_result"], [EMBED, "blocks.2.attn.hook_result"]),
        (
            lambda name: name.endswith("ssm_state"),
            [f"blocks.{i}.mixer.hook_ssm_state" for i in (0, 1, 3)],
        ),
    ],
    ids=["name", "list", "predicate"],
)
def test_the_filter_says_what_is_kept(model, tokens, names_filter, kept):
    out = model.generate(tokens, 3, names_filter=names_filter, **ENDLESS)
    assert sorted(out.cache) == sorted(kept)


def test_true_keeps_all_but_the_large_values_and_none_keeps_nothing(model, tokens):
    out = model.generate(tokens, 2, names_filter=True, **ENDLESS)
    assert set(out.cache) == {n for n, p in model.hook_dict.items() if not p.is_large}
    assert model.generate(tokens, 2, **ENDLESS).cache is None


def test_recording_does_not_change_what_is_generated(model, tokens):
    plain = model.generate(tokens, 6, **ENDLESS)
    recorded = model.generate(tokens, 6, names_filter=everything, **ENDLESS)
    assert torch.equal(recorded.new_tokens, plain.new_tokens)
    assert_close(recorded.logprobs, plain.logprobs)


def real_part(value: Tensor, hook: HookPoint, row: int, n_pad: int, n_pos: int) -> Tensor:
    """Return a row's value without its padding in front, keys too."""
    value = value[row].narrow(hook.pos_dim - 1, n_pad, n_pos)
    return value.narrow(-1, n_pad, n_pos) if "key" in hook.axes else value


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize(
    ("side", "first_token_stage"), [("left", "prefill"), ("right", "generation")]
)
def test_the_cache_of_padded_rows_is_each_rows_own_at_its_tokens(
    each_model, side, first_token_stage, edits
):
    rows, tokens, mask = padded(side)
    with each_model.hooks(EDITS[edits]):
        out = each_model.generate(
            tokens,
            4,
            attention_mask=mask,
            names_filter=everything,
            first_token_stage=first_token_stage,
            **ENDLESS,
        )
        for i, row in enumerate(rows):
            n_pad, n_pos = max(LENGTHS) - LENGTHS[i], LENGTHS[i] + 3
            read = torch.cat([row, out.new_tokens[i : i + 1, :-1]], dim=1)
            _, alone = each_model.run_with_cache(read, names_filter=everything)
            for name, value in alone.items():
                found = real_part(out.cache[name], each_model.hook_dict[name], i, n_pad, n_pos)
                assert_same_values(found, value[0], name)


@pytest.mark.parametrize("edits", EDITS)
@pytest.mark.parametrize("n_before", [2, 8], ids=["fewer_than_the_window", "more"])
def test_the_cache_of_a_continuation_is_that_of_one_forward_from_the_state(
    each_model, tokens, n_before, edits
):
    """The keys of the state come first on the key axis."""
    state = state_after(each_model, random_tokens(3, n_before, seed=5))
    with each_model.hooks(EDITS[edits]):
        out = each_model.generate(tokens, 6, state=state, names_filter=everything, **ENDLESS)
        _, expected = each_model.run_with_cache(
            out.tokens[:, :-1], names_filter=everything, state=state
        )
    n_kept = n_before if each_model is lively_model("jamba") else min(n_before, N_KEYS - 1)
    assert expected["pattern", 2].shape[3] == n_kept + 14
    for name, value in expected.items():
        assert_same_values(out.cache[name], value, name)


@pytest.mark.parametrize("edits", EDITS)
def test_the_cache_of_a_padded_continuation_is_that_of_one_forward_from_the_state(
    each_model, edits
):
    _, start, start_mask = padded("right", (5, 2, 9))
    _, state = each_model(start, attention_mask=start_mask, return_type=None, return_state=True)
    _, tokens, mask = padded("left", (1, 4, 3))
    with each_model.hooks(EDITS[edits]):
        out = each_model.generate(
            tokens, 4, state=state, attention_mask=mask, names_filter=everything, **ENDLESS
        )
        read = torch.cat([mask, torch.ones(3, 3, dtype=torch.long)], dim=1)
        _, expected = each_model.run_with_cache(
            out.tokens[:, :-1], names_filter=everything, state=state, attention_mask=read
        )
    for name, value in expected.items():
        dim = each_model.hook_dict[name].pos_dim
        for row in range(3):
            at = read[row].nonzero()[:, 0]
            found, wanted = (t[row].index_select(dim - 1, at) for t in (out.cache[name], value))
            assert_same_values(found, wanted, f"{name} of row {row}")


@pytest.mark.parametrize("name", ["griffin", "griffin_of_all_keys", "jamba"])
def test_the_cache_of_a_continuation_with_anothers_keys_is_that_of_one_forward(name):
    """Keys of a donor may stand at any position; they come first on the key axis all the same."""
    model, tokens = lively_model(name), random_tokens(3, 4)
    state, donor = (state_after(model, random_tokens(3, n, seed=n)) for n in (5, 25))
    grafted = state.replace(donor, kinds="kv")
    out = model.generate(tokens, 3, state=grafted, names_filter=everything, **ENDLESS)
    _, expected = model.run_with_cache(out.tokens[:, :-1], names_filter=everything, state=grafted)
    for name, value in expected.items():
        assert_same_values(out.cache[name], value, name)


def test_positions_that_a_finished_row_did_not_read_are_zero_and_the_rest_its_own(
    each_model, tokens
):
    """Zero, or masked where a score would stand."""
    free, eos = with_an_end(each_model, tokens)
    out = each_model.generate(tokens, N_NEW, eos_token_id=eos, names_filter=everything, **QUIET)
    for row, n in enumerate(lengths_until(free.new_tokens, eos)):
        n_read = 9 + n - 1
        read = torch.cat([tokens[row], out.new_tokens[row, : n - 1]])[None]
        _, alone = each_model.run_with_cache(read, names_filter=everything)
        for name, value in alone.items():
            dim = each_model.hook_dict[name].pos_dim - 1
            whole = out.cache[name][row]
            found = whole.narrow(dim, 0, n_read)
            if "key" in each_model.hook_dict[name].axes:
                found = found[..., :n_read]
            assert_same_values(found, value[0], name)
            unread = whole.narrow(dim, n_read, whole.shape[dim] - n_read)
            masked = name.endswith("hook_attn_scores")
            assert (unread == (torch.finfo(unread.dtype).min if masked else 0)).all(), name


@pytest.mark.parametrize("lengths", [(520,), (530, 9)], ids=["alike", "one_all_padding_at_first"])
def test_the_cache_of_a_prompt_read_in_pieces_is_that_of_one_forward(model, lengths):
    rows, tokens, mask = padded("left", lengths)
    names = [EMBED, "blocks.0.mixer.hook_ssm_state", "blocks.2.attn.hook_z"]
    names += ["blocks.2.attn.hook_pattern", "blocks.2.attn.hook_attn_scores"]
    out = model.generate(tokens, 3, attention_mask=mask, names_filter=names, **ENDLESS)
    for i, row in enumerate(rows):
        read = torch.cat([row, out.new_tokens[i : i + 1, :-1]], dim=1)
        _, alone = model.run_with_cache(read, names_filter=names)
        n_pad = max(lengths) - lengths[i]
        for name in names:
            found = real_part(out.cache[name], model.hook_dict[name], i, n_pad, read.shape[1])
            assert_same_values(found, alone[name][0], name)


# --- what comes back --------------------------------------------------------------------------


def test_input_is_answered_in_kind(model, tokens):
    def generated(given: Any) -> Any:
        return model.generate(given, 3, stop_at_eos=False, verbose=False)

    assert isinstance(generated(tokens), Tensor) and generated(tokens).shape == (3, 12)
    assert isinstance(generated("w7 w8"), str)
    several = generated(["w7 w8", "w9"])
    assert isinstance(several, list) and [type(t) for t in several] == [str, str]
    assert isinstance(generated([7, 8, 9]), Tensor)


def test_every_return_type_tells_of_the_same_tokens(model):
    text, options = "w7 w8", {"stop_at_eos": False, "verbose": False}
    out = model.generate(text, 4, return_type="output", **options)
    tokens = model.generate(text, 4, return_type="tokens", **options)
    assert torch.equal(tokens, out.tokens)
    assert tokens[0, :3].tolist() == [BOS, 7, 8]
    assert out.text == [model.to_string(out.new_tokens[0])]
    assert model.generate(torch.tensor([[BOS, 7, 8]]), 4, return_type="str", **options) == [
        model.generate(text, 4, return_type="str", **options)
    ]


def test_str_is_the_text_of_prompt_and_new_tokens_together(model):
    """Decoding pieces and joining them can lose or double what lies between."""
    options = {"stop_at_eos": False, "verbose": False}
    out = model.generate("w7 w8", 4, return_type="output", **options)
    whole = model.tokenizer.decode(out.tokens[0].tolist(), skip_special_tokens=True)
    assert model.generate("w7 w8", 4, return_type="str", **options) == whole


def test_texts_of_padded_rows_hold_no_padding(model):
    texts = ["w7 w8 w9", "w10"]
    whole = model.generate(texts, 3, stop_at_eos=False, verbose=False)
    alone = [model.generate(t, 3, stop_at_eos=False, verbose=False) for t in texts]
    assert whole == alone
    assert whole[1].startswith("w10") and "pad" not in whole[1]


def test_new_text_is_without_the_end_token_and_what_pads_it(model, tokens):
    free, eos = with_an_end(model, tokens)
    out = model.generate(tokens, N_NEW, eos_token_id=eos, **QUIET)
    assert out.text[0] == model.to_string(free.new_tokens[0, :END])
    assert f"w{eos}" not in out.text[0].split()


def test_verbosity_changes_nothing_but_the_bar(model, tokens, capsys):
    quiet = model.generate(tokens, 3, stop_at_eos=False, verbose=False)
    assert capsys.readouterr() == ("", "")
    loud = model.generate(tokens, 3, stop_at_eos=False, verbose=True)
    assert torch.equal(quiet, loud) and "generating" in capsys.readouterr().err


def test_the_bar_counts_new_tokens(model, tokens, monkeypatch):
    bars: list[Any] = []

    class Bar(nullcontext[None]):
        def __init__(self, total: int, **_: Any) -> None:
            super().__init__()
            self.left = total
            bars.append(self)

        def update(self) -> None:
            self.left -= 1

    monkeypatch.setattr("hooked_hybrid.model.generate.tqdm", Bar)
    model.generate(tokens, 3, stop_at_eos=False)
    assert [bar.left for bar in bars] == [0]


def test_a_prompt_that_ends_with_many_tokens_without_text_is_read_to_its_last_word():
    """A blank is between its last word and the new text, whatever stands between them."""
    model, silent = random_model(lively_model().cfg, seed=4), 9
    words = {f"w{i}": i for i in range(D_VOCAB) if i != silent}
    model.tokenizer = Tokenizer(WordLevel(words, unk_token="w3"))
    prompt = torch.tensor([[7, 8, *[silent] * 40]])
    first = int(model.generate(prompt, 1, **ENDLESS).new_tokens)
    assert first != silent
    out = model.generate(prompt, 3, stop_strings=f" w{first}", **ENDLESS)
    assert out.finished.tolist() == [True] and out.new_tokens.shape == (1, 1)


def test_text_holds_no_token_that_a_mask_leaves_out(model):
    prompt, mask = torch.tensor([[9, 9, 7, 8]]), torch.tensor([[0, 0, 1, 1]])
    options: dict[str, Any] = {"return_type": "str", "stop_at_eos": False, "verbose": False}
    (text,) = model.generate(prompt, 3, attention_mask=mask, **options)
    assert text == model.generate(prompt[:, 2:], 3, **options)[0] and text.startswith("w7 w8")


# --- stop strings -----------------------------------------------------------------------------


def word_rows(model: HookedHybrid, tokens: Tensor) -> list[list[str]]:
    free = model.generate(tokens, N_NEW, **ENDLESS)
    return [model.to_str_tokens(row) for row in free.new_tokens]


def test_a_row_ends_at_a_stop_string_and_its_text_is_cut_before_it(model, tokens):
    words = word_rows(model, tokens)
    stop = " ".join(words[0][2:4])  # spans two tokens
    others = [w for row in words[1:] for w in row]
    assert words[0][3] not in words[0][:3] and stop not in " ".join(others)
    out = model.generate(tokens, N_NEW, stop_strings=stop, **ENDLESS)
    assert out.finished.tolist() == [True, False, False]
    assert out.text[0].rstrip() == " ".join(words[0][:2])
    assert stop not in out.text[0]
    assert out.text[1:] == [" ".join(row) for row in words[1:]]
    assert (out.logprobs[0, 4:] == 0).all() and (out.logprobs[0, :4] != 0).all()
    read = torch.cat([tokens[:1], out.new_tokens[:1, :3]], dim=1)
    assert_same_state(out.state[0], state_after(model, read))


def test_the_first_of_several_stop_strings_counts(model, tokens):
    words = word_rows(model, tokens[:1])[0]
    stops = [words[4], words[1]]
    out = model.generate(tokens[:1], N_NEW, stop_strings=stops, **ENDLESS)
    first = min(words.index(s) for s in stops)
    assert out.new_tokens.shape == (1, first + 1)
    assert out.text[0].strip() == " ".join(words[:first])
    out = model.generate(tokens[:1], N_NEW, stop_strings=[words[1], "never"], **ENDLESS)
    assert out.new_tokens.shape == (1, words.index(words[1]) + 1)


def test_a_stop_string_in_the_prompt_does_not_count(model):
    new = model.generate("w7 w8", 3, **ENDLESS).new_tokens
    assert 8 not in new
    out = model.generate("w7 w8", 3, stop_strings=["w7", "w8"], **ENDLESS)
    assert torch.equal(out.new_tokens, new) and not out.finished.any()


def test_the_returned_string_is_cut_too_and_keeps_the_prompt(model):
    words = model.to_str_tokens(model.generate("w7 w8", N_NEW, **ENDLESS).new_tokens[0])
    cut = model.generate("w7 w8", N_NEW, stop_strings=words[3], stop_at_eos=False, verbose=False)
    assert cut.split() == ["w7", "w8", *words[: words.index(words[3])]]


@pytest.mark.parametrize("which", ["text", "str"])
def test_a_row_cut_at_a_stop_string_reads_the_same_among_rows_that_continue(model, which):
    """What pads the row after its end is not a part of its text."""
    prompts = ["w20 w8", "w9 w10 w11"]
    free = [model.to_str_tokens(model.generate(p, N_NEW, **ENDLESS).new_tokens) for p in prompts]
    stop = next(w for w in free[0][2:] if w not in free[0][:2] + free[1] and w.startswith("w"))
    options: dict[str, Any] = {"stop_strings": stop, "stop_at_eos": False, "verbose": False}

    def texts(given: list[str]) -> list[str]:
        if which == "str":
            return model.generate(given, N_NEW, **options)
        return model.generate(given, N_NEW, return_type="output", **options).text

    expected = [" ".join(free[0][: free[0].index(stop)]), " ".join(free[1])]
    if which == "str":  # without special tokens, and after the prompt
        words = [[w for w in text.split() if w.startswith("w")] for text in expected]
        expected = [" ".join([p, *new]) for p, new in zip(prompts, words, strict=True)]
    assert [text.rstrip() for text in texts(prompts)] == expected
    assert [texts([p])[0].rstrip() for p in prompts] == expected


def test_a_stop_string_and_eos_can_both_end_rows(model, tokens):
    free, eos = with_an_end(model, tokens)
    words = [model.to_str_tokens(row) for row in free.new_tokens]
    stop = next(word for word in words[1] if word not in words[0])
    out = model.generate(tokens, N_NEW, eos_token_id=eos, stop_strings=stop, **QUIET)
    assert out.finished[:2].tolist() == [True, True]
    assert out.text[0] == " ".join(words[0][:END])
    assert out.text[1].strip() == " ".join(words[1][: words[1].index(stop)])


def test_the_end_token_of_the_tokenizer_serves_where_the_config_names_none(tokens):
    model = lively_model()
    own = random_model(model.cfg, seed=4)
    own.tokenizer = toy_tokenizer("transformers")
    assert own.text.eos == (EOS,)
