"""The references themselves: they agree with each other, nothing in them is degenerate, and what
`tests.references` says is broken in Hugging Face's code still is.
"""

import dataclasses
import sys
from functools import cache

import pytest
import torch
from torch import Tensor, nn
from transformers import RecurrentGemmaForCausalLM  # noqa: TID251

from tests.references import (
    SPECS,
    Greedy,
    RGSpec,
    google,
    google_greedy_sampler_style,
    google_griffin,
    google_left_padded_logits,
    google_logits,
    google_supports,
    hf_breaks_no_attention,
    hf_breaks_one_key,
    hf_breaks_one_token_prompt,
    hf_can_decode,
    hf_decode,
    hf_decode_patterns,
    hf_greedy,
    hf_greedy_guessed,
    hf_logits_uncached,
    hf_patterns,
    hf_recurrentgemma,
    hf_states,
    random_tokens,
    share_weights_hf_to_google,
)
from tests.transformers_versions import WINDOWED, needs_window, since_5

GOOGLE = [name for name, spec in SPECS.items() if google_supports(spec)]
every_spec = pytest.mark.parametrize("name", SPECS)
every_google_spec = pytest.mark.parametrize("name", GOOGLE)

hf = cache(lambda name: hf_recurrentgemma(SPECS[name]))
griffin = cache(lambda name: google_griffin(SPECS[name]))
N_NEW = 24  # after a prompt of one token, past the windows of 16


@cache
def google_greedy(name: str, n_prompt: int) -> Greedy:
    return google_greedy_sampler_style(griffin(name), tokens_of(name, n_prompt), N_NEW)


@cache
def uncached_greedy(name: str, n_prompt: int) -> Greedy:
    prompts = tokens_of(name, n_prompt)
    if google_supports(SPECS[name]):
        guess = google_greedy(name, n_prompt).tokens
    elif hf_can_decode(SPECS[name], n_prompt):
        guess = cached_greedy(name, n_prompt).tokens
    else:
        guess = prompts[:, :1].expand(-1, N_NEW)
    return hf_greedy_guessed(hf(name), prompts, guess)


@cache
def cached_greedy(name: str, n_prompt: int) -> Greedy:
    return hf_greedy(hf(name), tokens_of(name, n_prompt), N_NEW)


def tokens_of(name: str, length: int = 40) -> Tensor:
    return random_tokens(SPECS[name], batch=2, length=length)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Equal to 1e-5 of the largest number."""
    atol = 1e-5 * expected.abs().max().item()
    torch.testing.assert_close(actual, expected, rtol=0, atol=atol)


def margins(logits: Tensor) -> Tensor:
    """How far the best token is ahead of the next."""
    first, second = logits.topk(2, dim=-1).values.unbind(-1)
    return first - second


def recurrences(model: RecurrentGemmaForCausalLM) -> list[nn.Module]:
    return [m for m in model.modules() if hasattr(m, "recurrent_param")]


# --- Hugging Face and Google agree ----------------------------------------------------------------


@every_google_spec
def test_hf_equals_google(name: str) -> None:
    tokens = tokens_of(name, 50)
    assert_close(google_logits(griffin(name), tokens), hf_logits_uncached(hf(name), tokens))


@every_google_spec
@pytest.mark.parametrize("n_prompt", [1, 20])
def test_hf_greedy_equals_google_sampler_style(name: str, n_prompt: int) -> None:
    ours, theirs = google_greedy(name, n_prompt), uncached_greedy(name, n_prompt)
    assert_close(ours.logits, theirs.logits)
    assert ours.tokens.equal(theirs.tokens)


@every_google_spec
@pytest.mark.parametrize("n_prompt", [1, 2, 20])
def test_hf_states_equal_google(name: str, n_prompt: int) -> None:
    tokens = tokens_of(name, n_prompt)
    states = hf_states(hf(name), tokens)
    _, state = griffin(name)(tokens, torch.arange(n_prompt).expand_as(tokens))
    assert tuple(states) == SPECS[name].recurrent_layers
    for layer, (conv, ssm) in states.items():
        theirs = state[f"blocks.{layer}"]
        assert_close(conv, theirs.conv1d_state.transpose(1, 2))
        assert_close(ssm, theirs.rg_lru_state)


@needs_window
def test_google_counts_the_window_without_self() -> None:
    spec = SPECS["window_of_3"]
    wider = google_griffin(dataclasses.replace(spec, n_keys=spec.n_keys + 1))
    share_weights_hf_to_google(hf("window_of_3"), wider)
    tokens = tokens_of("window_of_3")
    differ = google_logits(wider, tokens) - hf_logits_uncached(hf("window_of_3"), tokens)
    assert differ[:, : spec.n_keys].abs().max() < 1e-4
    assert differ[:, spec.n_keys].abs().max() > 1e-2


# --- Google's Sampler and its padding -------------------------------------------------------------


class Digits:
    """A vocabulary for `Sampler`: token ids separated by spaces."""

    def bos_id(self) -> int:
        return 2

    def eos_id(self) -> int:
        return 1

    def pad_id(self) -> int:
        return 0

    def EncodeAsIds(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def DecodeIds(self, ids: list[int]) -> str:
        return " ".join(map(str, ids))


@every_google_spec
@pytest.mark.parametrize("n_prompt", [1, 20])
def test_sampler_style_equals_the_sampler(name: str, n_prompt: int) -> None:
    prompts = tokens_of(name, n_prompt)
    prompts[:, 0] = 2  # the Sampler puts it there
    texts = [Digits().DecodeIds(row[1:].tolist()) for row in prompts]
    sampler = google().Sampler(griffin(name), Digits())
    theirs = sampler(
        texts, total_generation_steps=12, return_logits=True, end_sampling_at_eos_token=False
    )
    ours = google_greedy_sampler_style(griffin(name), prompts, 12)
    assert ours.tokens.tolist() == [row.tolist() for row in theirs.tokens]
    assert ours.logits.equal(torch.stack(theirs.logits))


@every_google_spec
def test_google_left_padding_is_invisible(name: str) -> None:
    tokens, n_pad = tokens_of(name), torch.tensor([0, 23])
    logits = google_left_padded_logits(griffin(name), tokens, n_pad)
    greedy = google_greedy_sampler_style(griffin(name), tokens, 8, n_pad)
    for row, start in enumerate(n_pad.tolist()):
        alone = tokens[row : row + 1, start:]
        assert_close(logits[row : row + 1, start:], google_logits(griffin(name), alone))
        assert_close(
            greedy.logits[row : row + 1],
            google_greedy_sampler_style(griffin(name), alone, 8).logits,
        )


def test_google_padding_is_seen_by_a_lone_token() -> None:
    model, tokens = griffin("recurrence_only"), tokens_of("recurrence_only", 9)
    n_pad = torch.tensor([8, 8])
    alone = google_greedy_sampler_style(model, tokens[:, 8:], 1).logits
    padded = google_greedy_sampler_style(model, tokens, 1, n_pad).logits
    assert_close(google_left_padded_logits(model, tokens, n_pad)[:, 8:], alone)
    assert (padded - alone).abs().max() > 0.1


def test_google_positions_separate_documents() -> None:
    tokens = tokens_of("attention_last")
    lengths = 23, 17
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(tokens)
    packed = google_logits(griffin("attention_last"), tokens, positions)
    alone = [google_logits(griffin("attention_last"), part) for part in tokens.split(lengths, 1)]
    assert_close(packed, torch.cat(alone, dim=1))


def test_google_needs_no_jax() -> None:
    google()
    assert "recurrentgemma.jax" not in sys.modules


# --- Hugging Face's cache -------------------------------------------------------------------------


@every_spec
def test_hf_logits_depend_on_no_later_token(name: str) -> None:
    whole = hf_logits_uncached(hf(name), tokens_of(name))
    for n in (1, 20):
        assert_close(hf_logits_uncached(hf(name), tokens_of(name, n)), whole[:, :n])


@pytest.mark.parametrize("name", ["as_published", "window_of_1", "one_recurrent_layer"])
def test_a_guess_changes_no_greedy_token(name: str) -> None:
    prompts = tokens_of(name, 5)
    one_by_one = hf_greedy(hf(name), prompts, 6, uncached=True)
    for guess in (one_by_one.tokens, 0 * one_by_one.tokens):
        guessed = hf_greedy_guessed(hf(name), prompts, guess)
        assert guessed.tokens.equal(one_by_one.tokens)
        assert_close(guessed.logits, one_by_one.logits)


@pytest.mark.parametrize(
    ("name", "n_prompt"),
    [(name, n) for name in SPECS for n in (1, 20) if hf_can_decode(SPECS[name], n)],
)
def test_hf_cached_greedy_equals_uncached(name: str, n_prompt: int) -> None:
    cached, uncached = cached_greedy(name, n_prompt), uncached_greedy(name, n_prompt)
    assert_close(cached.logits, uncached.logits)
    assert cached.tokens.equal(uncached.tokens)


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if not hf_breaks_one_key(s)])
@pytest.mark.parametrize(("n_prefill", "n_pos"), [(1, 21), (2, 5), (20, 30)])
def test_hf_decode_equals_uncached(name: str, n_prefill: int, n_pos: int) -> None:
    tokens = tokens_of(name, n_pos)
    decode = hf_decode(hf(name), tokens, n_prefill)
    assert_close(decode.logits, hf_logits_uncached(hf(name), tokens)[:, n_prefill:])
    whole = hf_patterns(hf(name), tokens)
    for query, patterns in enumerate(decode.patterns, start=n_prefill):
        assert tuple(patterns) == SPECS[name].attention_layers
        for layer, pattern in patterns.items():
            n_keys = min(query + 1, SPECS[name].n_keys)
            first = query + 1 - n_keys
            assert_close(pattern[:, :, 0], whole[layer][:, :, query, first : query + 1])


@needs_window
@every_spec
def test_hf_attends_to_n_keys(name: str) -> None:
    patterns = hf_patterns(hf(name), tokens_of(name))
    assert tuple(patterns) == SPECS[name].attention_layers
    n_keys = torch.arange(1, 41).clamp(max=SPECS[name].n_keys)
    for pattern in patterns.values():
        assert pattern.shape == (2, SPECS[name].n_heads, 40, 40)
        assert (pattern > 0).sum(-1).equal(n_keys.expand(2, SPECS[name].n_heads, -1))
        assert pattern.tril().equal(pattern)


@needs_window
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if hf_breaks_one_key(s)])
def test_hf_one_key_is_broken(name: str) -> None:
    tokens = tokens_of(name)
    patterns = hf_decode_patterns(hf(name), tokens, 20)
    assert all(p.shape[-1] > 1 for step in patterns for p in step.values())
    cached = hf_decode(hf(name), tokens, 20).logits
    assert (cached - hf_logits_uncached(hf(name), tokens)[:, 20:]).abs().max() > 0.1


@since_5("its model holds the cache, which is asked for no length")
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if hf_breaks_no_attention(s)])
def test_hf_no_attention_is_broken(name: str) -> None:
    with pytest.raises(ValueError, match="get_seq_length"):
        hf_greedy(hf(name), tokens_of(name), 2)


@since_5("one token goes on from the model's last run")
@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if hf_breaks_one_token_prompt(s)])
def test_hf_one_token_prompt_is_broken(name: str) -> None:
    with pytest.raises((RuntimeError, ValueError), match="Sizes of tensors|get_seq_length"):
        hf_greedy(hf(name), tokens_of(name, 1), 2)


# --- nothing is degenerate ------------------------------------------------------------------------


@every_spec
def test_logits_are_decided_and_not_saturated(name: str) -> None:
    tokens = tokens_of(name)
    logits = hf_logits_uncached(hf(name), tokens)
    assert logits.isfinite().all()
    assert 3 < logits.abs().max() < 10
    assert 1 < logits.std() < 2
    assert (margins(logits) > 1e-4).float().mean() > 0.95
    assert (logits.argmax(-1) == tokens).float().mean() < 0.6  # the unembedding is tied


@pytest.mark.skipif(not WINDOWED, reason="transformers before 5.4: seeds are those for windows")
@every_spec
def test_greedy_continuations_wander(name: str) -> None:
    tokens, logits = uncached_greedy(name, 20)
    assert (margins(logits) > 1e-4).all()
    assert min(len(set(row)) for row in tokens.tolist()) >= (5 if SPECS[name].n_layers == 1 else 8)


@every_spec
def test_every_parameter_matters(name: str) -> None:
    model = hf_recurrentgemma(SPECS[name])
    logits = model(tokens_of(name, 12), use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    for parameter_name, parameter in model.named_parameters():
        assert (parameter != 0).all(), parameter_name
        if SPECS[name].n_keys == 1 and ("q_proj" in parameter_name or "k_proj" in parameter_name):
            continue  # the only key gets all the attention
        effect = (parameter.grad * parameter.detach()).norm()
        assert effect > 1e-2 * logits.abs().max(), parameter_name


@pytest.mark.parametrize("name", [n for n, s in SPECS.items() if s.recurrent_layers])
def test_decays_are_fast_and_slow(name: str) -> None:
    decays = []

    def keep(module: nn.Module, args: tuple[Tensor, Tensor]) -> None:
        blocks = args[0].unflatten(-1, (module.num_attention_heads, -1))
        gate = torch.einsum("bshi,hij->bshj", blocks, module.recurrent_gate_weight)
        gate = (gate + module.recurrent_gate_bias).flatten(-2).sigmoid()
        decays.append(torch.exp(-8 * gate * nn.functional.softplus(module.recurrent_param)))

    model = hf_recurrentgemma(SPECS[name])
    for module in recurrences(model):
        module.register_forward_pre_hook(keep)
    hf_logits_uncached(model, tokens_of(name))
    decay = torch.stack(decays)
    assert 0.2 < decay.min() < 0.45
    assert 0.999 < decay.max() < 0.99999


@pytest.mark.parametrize("name", ["as_published", "recurrence_only"])
def test_the_same_spec_is_the_same_model(name: str) -> None:
    random_state = torch.get_rng_state()
    first, second = (hf_recurrentgemma(SPECS[name]).state_dict() for _ in range(2))
    other = hf_recurrentgemma(dataclasses.replace(SPECS[name], seed=99)).state_dict()
    griffin(name)
    assert all(first[key].equal(second[key]) for key in first)
    assert not any(first[key].equal(other[key]) for key in first)
    assert torch.get_rng_state().equal(random_state)


def test_specs_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="divide"):
        RGSpec(n_heads=3)
    with pytest.raises(ValueError, match="cannot build|can build"):
        google_griffin(SPECS["multi_head"])
