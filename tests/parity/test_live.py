"""The references computed now, on small random models of every shape: see `tests.references`.

Prompts are longer than the window. Each Hugging Face model is read by `from_hf`, each of Google's
from a `.pt` file.
"""

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from transformers import RecurrentGemmaConfig, RecurrentGemmaForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.model.decoding import GenerationOutput
from hooked_hybrid.network.block_state import AttentionState, RecurrentState
from hooked_hybrid.network.state import HybridState
from tests.models import relative
from tests.references import (
    SPECS,
    Greedy,
    google_greedy_sampler_style,
    google_griffin,
    google_left_padded_logits,
    google_logits,
    google_supports,
    hf_breaks_one_key,
    hf_can_decode,
    hf_decode,
    hf_greedy,
    hf_greedy_guessed,
    hf_logits_uncached,
    hf_patterns,
    hf_recurrentgemma,
    hf_states,
    random_tokens,
    randomise,
)
from tests.tolerances import BF16, FP32_PARITY
from tests.transformers_versions import VERSION, WINDOWED, since_5

GOOGLE = [name for name, spec in SPECS.items() if google_supports(spec)]
# (tokens of the prompt, None for all; new tokens): the first grows past the windows of 16
GREEDY = [(1, 18), (None, 8)]
every_spec = pytest.mark.parametrize("name", SPECS)
every_google_spec = pytest.mark.parametrize("name", GOOGLE)


@cache
def hf(name: str) -> RecurrentGemmaForCausalLM:
    return hf_recurrentgemma(SPECS[name])


griffin = cache(lambda name: google_griffin(SPECS[name]))


@cache
def ours(name: str) -> HookedHybrid:
    return HookedHybrid.from_hf(hf(name)).requires_grad_(False)


@cache
def ours_of_google(name: str) -> HookedHybrid:
    """The model of Google's parameters, in a file as Google publishes them."""
    spec = SPECS[name]
    # nothing in the file tells the heads of a model without a recurrent layer
    heads = {} if spec.recurrent_layers else {"n_heads": spec.n_heads}
    keys = {"n_keys": spec.n_keys} if spec.attention_layers else {}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "griffin.pt"
        torch.save(griffin(name).state_dict(), path)
        return HookedHybrid.from_pretrained(path, **keys, **heads).requires_grad_(False)


def prompts_of(name: str) -> Tensor:
    """Two prompts, longer than the window where the reference has one."""
    length = max(40, SPECS[name].n_keys + 8) if WINDOWED else 72
    return random_tokens(SPECS[name], batch=2, length=length)


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    if expected.numel():
        assert relative(actual, expected) < FP32_PARITY


def is_kept(name: str) -> bool:
    return name.endswith(("hook_pattern", "unembed.hook_logits"))


def continued(
    model: HookedHybrid, tokens: Tensor, n_new: int, stage: str, **options
) -> GenerationOutput:
    return model.generate(
        tokens,
        n_new,
        first_token_stage=stage,
        stop_at_eos=False,
        return_type="output",
        names_filter=is_kept,
        verbose=False,
        **options,
    )


def assert_same_greedy(model: HookedHybrid, out: GenerationOutput, theirs: Greedy) -> None:
    """Check tokens and logits of each row as far as the reference's choices are decided.

    Two logits that may each be off by FP32_PARITY of the largest change places only where they are
    nearer than twice that.
    """
    first, second = theirs.logits.topk(2, dim=-1).values.unbind(-1)
    close_call = 2 * FP32_PARITY * theirs.logits.abs().max()
    is_decided = (first - second > close_call).int().cumprod(dim=1).bool()
    assert is_decided[:, 0].all()
    assert out.new_tokens[is_decided].equal(theirs.tokens[is_decided])
    cap = model.cfg.logits_soft_cap
    logits = cap * torch.tanh(out.cache["unembed.hook_logits"] / cap)
    logits = logits[:, -theirs.tokens.shape[1] :]
    same_prefix = torch.cat([torch.ones_like(is_decided[:, :1]), is_decided[:, :-1]], dim=1)
    assert_close(logits[same_prefix], theirs.logits[same_prefix])


# --- Hugging Face ---------------------------------------------------------------------------------


@every_spec
def test_logits_equal_hf(name: str):
    tokens = prompts_of(name)
    assert_close(ours(name)(tokens), hf_logits_uncached(hf(name), tokens))


@pytest.mark.skipif(WINDOWED, reason="transformers since 5.4 has the window in a plain forward too")
def test_logits_with_all_keys_equal_hf_without_a_window():
    spec = replace(SPECS["as_published"], n_keys=16)
    theirs, tokens = hf_recurrentgemma(spec), random_tokens(spec, batch=2, length=40)
    expected = hf_logits_uncached(theirs, tokens)
    assert_close(HookedHybrid.from_hf(theirs, n_keys=None)(tokens), expected)
    assert relative(HookedHybrid.from_hf(theirs)(tokens), expected) > 1e-2


@every_spec
def test_patterns_equal_hf(name: str):
    tokens = prompts_of(name)
    logits, cache = ours(name).run_with_cache(tokens, names_filter=lambda _: True)
    assert_close(logits, hf_logits_uncached(hf(name), tokens))
    theirs = hf_patterns(hf(name), tokens)
    assert tuple(theirs) == ours(name).cfg.attention_layers == SPECS[name].attention_layers
    for layer, pattern in theirs.items():
        assert_close(cache["pattern", layer], pattern)


@every_spec
@pytest.mark.parametrize("n_prompt", [1, 2, None])
def test_recurrent_states_equal_hf(name: str, n_prompt: int | None):
    tokens = prompts_of(name)[:, :n_prompt]
    _, state = ours(name)(tokens, return_type=None, return_state=True)
    theirs = hf_states(hf(name), tokens)
    assert tuple(theirs) == ours(name).cfg.recurrent_layers == SPECS[name].recurrent_layers
    for layer, (conv, ssm) in theirs.items():
        block = state.blocks[layer]
        assert isinstance(block, RecurrentState)
        assert_close(block.conv, conv.transpose(1, 2))
        assert_close(block.ssm, ssm)


@every_spec
@pytest.mark.parametrize(("n_prompt", "n_new"), GREEDY)
def test_greedy_equals_hf(name: str, n_prompt: int | None, n_new: int):
    """By `generate` where it takes a few steps, else by one forward that reads what it chose."""
    tokens = prompts_of(name)[:, :n_prompt]
    out = continued(ours(name), tokens, n_new, "prefill")
    if n_prompt == 1 or not hf_can_decode(SPECS[name], tokens.shape[1]):
        theirs = hf_greedy_guessed(hf(name), tokens, out.new_tokens)
    else:
        theirs = hf_greedy(hf(name), tokens, n_new)
    assert_same_greedy(ours(name), out, theirs)
    for layer, pattern in hf_patterns(hf(name), out.tokens[:, :-1]).items():
        assert_close(out.cache["pattern", layer], pattern)


@every_spec
@pytest.mark.parametrize("is_short", [True, False])
def test_decode_equals_hf(name: str, is_short: bool):
    """From one token to past the windows of 16, and on from there."""
    tokens = prompts_of(name)[:, : 20 if is_short else None]
    n_prefill = 1 if is_short else tokens.shape[1] - 6
    logits, seen = decoded(ours(name), tokens, n_prefill)
    if hf_breaks_one_key(SPECS[name]):
        assert_close(logits, hf_logits_uncached(hf(name), tokens)[:, n_prefill:])
        patterns = hf_patterns(hf(name), tokens)
        theirs = [
            {layer: p[:, :, [q], q : q + 1] for layer, p in patterns.items()}
            for q in range(n_prefill, tokens.shape[1])
        ]
    else:
        theirs_logits, theirs = hf_decode(hf(name), tokens, n_prefill)
        assert_close(logits, theirs_logits)
    for query, (mine, expected) in enumerate(zip(seen, theirs, strict=True), start=n_prefill):
        assert tuple(mine) == tuple(expected) == SPECS[name].attention_layers
        for layer, (pattern, key_pos) in mine.items():
            first = max(0, query + 1 - SPECS[name].n_keys)
            is_key = key_pos[0] >= 0
            assert key_pos[:, is_key].equal(torch.arange(first, query + 1).expand(2, -1))
            assert (pattern[..., ~is_key] == 0).all()
            assert_close(pattern[..., is_key], expected[layer])


Seen = list[dict[int, tuple[Tensor, Tensor]]]


def decoded(model: HookedHybrid, tokens: Tensor, n_prefill: int) -> tuple[Tensor, Seen]:
    """Read the tokens [b s] one at a time after a prefill.

    Returns the logits [b n v] and, for each step, attention layer -> pattern [b h 1 k] and the
    positions [b k] of its keys.
    """
    seen: Seen = []

    def watch(pattern: Tensor, hook: HookPoint) -> None:
        seen[-1][hook.layer()] = pattern.clone(), hook.run.key_pos.clone()

    hooks = [(lambda name: name.endswith("hook_pattern"), watch)]
    state: HybridState
    _, state = model(tokens[:, :n_prefill], return_type=None, return_state=True, stage="prefill")
    logits = []
    with model.hooks(hooks if model.cfg.attention_layers else []):
        for position in range(n_prefill, tokens.shape[1]):
            seen.append({})
            token = tokens[:, position : position + 1]
            step, state = model(token, state=state, return_state=True, stage="generation")
            logits.append(step)
    return torch.cat(logits, dim=1), seen


@pytest.mark.parametrize("name", ["as_published", "wide_recurrence", "grouped_queries"])
def test_bf16_logits_are_near_hf(name: str):
    """Root mean square over the largest, as in `test_golden`."""
    theirs = hf_recurrentgemma(SPECS[name]).to(torch.bfloat16)
    model, tokens = HookedHybrid.from_hf(theirs), prompts_of(name)
    logits, expected = model(tokens), hf_logits_uncached(theirs, tokens)
    assert model.dtype == logits.dtype == expected.dtype == torch.bfloat16
    difference = logits.float() - expected.float()
    assert difference.square().mean().sqrt() < BF16 * expected.abs().max()


# Settings that the published models leave at their defaults.
VARIANTS: dict[str, dict] = {
    "biased_queries": {"attention_bias": True},
    "untied": {"tie_word_embeddings": False},
    "quarter_rotary": {"rope_parameters": {"partial_rotary_factor": 0.25}},
    "fully_rotary": {"rope_parameters": {"partial_rotary_factor": 1.0}},
    "other_theta": {"rope_parameters": {"rope_theta": 37.0}},
    "other_eps": {"rms_norm_eps": 0.3},
    "other_cap": {"logits_soft_cap": 2.5},
}


def hf_variant(**settings) -> RecurrentGemmaForCausalLM:
    given = hf("as_published").config.to_dict()
    rope = settings.pop("rope_parameters", {})
    if VERSION >= (5,):
        rope = {"rope_parameters": {**given.pop("rope_parameters"), **rope}}
    config = RecurrentGemmaConfig(**{**given, **settings, **rope})
    config._attn_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        model = RecurrentGemmaForCausalLM(config).eval()
    randomise(model, seed=7)
    return model


half_rotary_only = since_5("RecurrentGemma rotates half of the channels, whatever its config says")


@pytest.mark.parametrize(
    "variant",
    [pytest.param(v, marks=half_rotary_only) if "rotary" in v else v for v in VARIANTS],
)
def test_other_settings_equal_hf(variant: str, tmp_path: Path):
    theirs, default = hf_variant(**VARIANTS[variant]), hf_variant()
    tokens = prompts_of("as_published")
    expected = hf_logits_uncached(theirs, tokens)
    if variant not in ("biased_queries", "untied"):  # other weights: surely other logits
        assert relative(hf_logits_uncached(default, tokens), expected) > 1e-2
    model = HookedHybrid.from_hf(theirs)
    assert_close(model(tokens), expected)
    model.save_pretrained(tmp_path / "saved")
    reloaded = RecurrentGemmaForCausalLM.from_pretrained(
        tmp_path / "saved", attn_implementation="eager"
    )
    assert hf_logits_uncached(reloaded, tokens).equal(expected)


# --- Google ---------------------------------------------------------------------------------------


@every_google_spec
def test_logits_equal_google(name: str):
    tokens = prompts_of(name)
    assert_close(ours_of_google(name)(tokens), google_logits(griffin(name), tokens))


@every_google_spec
@pytest.mark.parametrize("n_prompt", [1, 2, None])
@torch.no_grad()
def test_states_equal_google(name: str, n_prompt: int | None):
    tokens = prompts_of(name)[:, :n_prompt]
    length, window = tokens.shape[1], SPECS[name].n_keys - 1
    _, state = ours_of_google(name)(tokens, return_type=None, return_state=True)
    _, theirs = griffin(name)(tokens, torch.arange(length).expand_as(tokens))
    for layer, block in enumerate(state.blocks):
        expected = theirs[f"blocks.{layer}"]
        if isinstance(block, RecurrentState):
            assert_close(block.conv, expected.conv1d_state)
            assert_close(block.ssm, expected.rg_lru_state)
            continue
        assert isinstance(block, AttentionState)
        is_key = block.pos[0] >= 0
        pos = block.pos[0, is_key]
        assert pos.equal(torch.arange(max(0, length - window), length))
        assert_close(block.k[:, is_key], expected.keys[:, pos % window])
        assert_close(block.v[:, is_key], expected.values[:, pos % window])


@every_google_spec
@pytest.mark.parametrize(("n_prompt", "n_new"), [*GREEDY, (2, 3)])
def test_greedy_equals_google_sampler_style(name: str, n_prompt: int | None, n_new: int):
    tokens = prompts_of(name)[:, :n_prompt]
    theirs = google_greedy_sampler_style(griffin(name), tokens, n_new)
    out = continued(ours_of_google(name), tokens, n_new, "generation")
    assert_same_greedy(ours_of_google(name), out, theirs)


UNEQUAL = torch.tensor([0, 23, 5, 37])  # rows of 40, 17, 35 and 3 tokens


def padded(name: str) -> tuple[Tensor, Tensor]:
    """Tokens [b s] and a mask of their left padding."""
    tokens = random_tokens(SPECS[name], len(UNEQUAL), 40)
    return tokens, (torch.arange(40) >= UNEQUAL[:, None]).long()


@every_google_spec
def test_left_padded_logits_equal_google(name: str):
    tokens, mask = padded(name)
    expected = google_left_padded_logits(griffin(name), tokens, UNEQUAL)
    logits = ours_of_google(name)(tokens, attention_mask=mask)
    assert_close(logits[mask.bool()], expected[mask.bool()])


@every_google_spec
@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_left_padded_greedy_equals_google(name: str, stage: str):
    tokens, mask = padded(name)
    theirs = left_padded_greedy_of_google(name)
    n_new = theirs.tokens.shape[1]
    out = continued(ours_of_google(name), tokens, n_new, stage, attention_mask=mask)
    assert_same_greedy(ours_of_google(name), out, theirs)


@cache
def left_padded_greedy_of_google(name: str) -> Greedy:
    """14 tokens: until the shortest row has outgrown its window."""
    return google_greedy_sampler_style(griffin(name), padded(name)[0], 14, UNEQUAL)


@every_google_spec
def test_packed_documents_equal_google(name: str):
    tokens = prompts_of(name)[:, :40]
    lengths = 23, 1, 16
    positions = torch.cat([torch.arange(length) for length in lengths]).expand_as(tokens)
    segments = torch.repeat_interleave(torch.tensor([4, 9, 2]), torch.tensor(lengths))
    expected = google_logits(griffin(name), tokens, positions)
    logits = ours_of_google(name)(tokens, segment_ids=segments.expand_as(tokens).contiguous())
    assert_close(logits, expected)
