"""Jamba is what transformers computes: goldens of `tests/golden`, and live on small random models.

The goldens are two checkpoints, one of transformers 5 and one in the layout and with the
`config.json` of the published ones (transformers 4): batch 2, prompts of 50 tokens, 20 greedy ones.
The live models are those of `tests.jamba_references`, read by `from_hf`.
"""

from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import JambaForCausalLM  # noqa: TID251

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.model.decoding import GenerationOutput
from hooked_hybrid.network.block_state import RecurrentState
from hooked_hybrid.network.state import HybridState
from tests.jamba_references import (
    SPECS,
    hf_breaks_left_padding,
    hf_breaks_no_attention,
    hf_decode,
    hf_greedy,
    hf_jamba,
    hf_logits_uncached,
    hf_patterns,
    hf_router_logits,
    hf_states,
)
from tests.models import relative
from tests.references import Greedy, hf_greedy_guessed, random_tokens
from tests.tolerances import BF16, FP32_PARITY
from tests.transformers_versions import VERSION

GOLDEN = Path(__file__).parents[1] / "golden"
HF, HF_4X = "jamba_hf", "jamba_written_by_4x"
N_PROMPT, N_NEW = 50, 20
PATTERNS = {HF: {"attn_probs_layer2": 2, "attn_probs_layer5": 5}, HF_4X: {"attn_probs_first": 2}}

every_golden = pytest.mark.parametrize("name", [HF, HF_4X])
every_spec = pytest.mark.parametrize("name", SPECS)
every_stage = pytest.mark.parametrize("first_token_stage", ["prefill", "generation"])


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert relative(actual, expected) < FP32_PARITY


def assert_as_exact(actual: Tensor, theirs: Tensor, exact: Tensor) -> None:
    """As near to float64, and to each other, as twice what the reference's own rounding is.

    The models of the goldens are badly conditioned: the reference's own logits are 1e-5 from
    float64, and sums in another order give others that are as far.
    """
    bound = 2 * relative(theirs, exact)
    assert bound < 2.5 * FP32_PARITY
    assert relative(actual, exact) < bound
    assert relative(actual, theirs) < bound


def rms(a: Tensor, b: Tensor) -> float:
    """Return the root mean square difference over the largest entry of `b`."""
    difference = a.float() - b.float()
    return float(difference.square().mean().sqrt() / b.abs().max())


def continued(
    model: HookedHybrid, tokens: Tensor, n_new: int, first_token_stage: str = "prefill", **options
) -> GenerationOutput:
    return model.generate(
        tokens,
        n_new,
        first_token_stage=first_token_stage,
        stop_at_eos=False,
        return_type="output",
        names_filter=lambda hook: hook.endswith(("hook_pattern", "unembed.hook_logits")),
        verbose=False,
        **options,
    )


# --- goldens: one forward -------------------------------------------------------------------------


@cache
def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "golden.safetensors")


@cache
def golden_model(name: str, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    return HookedHybrid.from_pretrained(GOLDEN / name, dtype).requires_grad_(False)


def golden_prompts(name: str) -> Tensor:
    return golden(name)["input_ids"]


@cache
def exact_logits(name: str) -> Tensor:
    return golden_model(name, torch.float64)(golden_prompts(name))


@every_golden
@pytest.mark.parametrize("with_autograd", [False, True])
def test_golden_logits(name: str, with_autograd: bool):
    with torch.set_grad_enabled(with_autograd):
        logits = golden_model(name)(golden_prompts(name))
    assert_as_exact(logits, golden(name)["logits"], exact_logits(name))


@every_golden
def test_golden_logits_with_every_hook_watched(name: str):
    logits, _ = golden_model(name).run_with_cache(golden_prompts(name), names_filter=lambda _: True)
    assert_as_exact(logits, golden(name)["logits"], exact_logits(name))


@every_golden
def test_golden_patterns(name: str):
    _, cache = golden_model(name).run_with_cache(golden_prompts(name))
    for key, layer in PATTERNS[name].items():
        assert_close(cache["pattern", layer], golden(name)[key])
        assert (cache["pattern", layer].triu(1) == 0).all()


def test_golden_hidden_states():
    model = golden_model(HF)
    _, cache = model.run_with_cache(golden_prompts(HF))
    for layer in range(model.cfg.n_layers):
        assert_close(cache["resid_pre", layer], golden(HF)[f"hidden_{layer}"])
    # transformers' last one is after the final norm
    last = cache["ln_final.hook_normalized"] * model.ln_final.w
    assert_close(last, golden(HF)[f"hidden_{model.cfg.n_layers}"])


def test_golden_router_logits():
    _, cache = golden_model(HF).run_with_cache(golden_prompts(HF))
    for layer in (1, 3, 5):
        expected = golden(HF)[f"router_logits_layer{layer}"].view(2, N_PROMPT, -1)
        assert_close(cache["router_logits", layer], expected)


def test_golden_states_after_prefill():
    _, state = golden_model(HF)(golden_prompts(HF), return_type=None, return_state=True)
    first = state.blocks[0]
    assert isinstance(first, RecurrentState)
    assert_close(first.ssm, golden(HF)["layer0_ssm_state_after_prefill"])
    # transformers' is one input wider than what a later position reads
    conv = golden(HF)["layer0_conv_state_after_prefill"][..., 1:]
    assert_close(first.conv, conv.transpose(1, 2))


def test_golden_logits_in_bf16():
    """Within twice what bf16 costs the reference: this tiny model is badly conditioned.

    The reference's own bf16 logits are 0.6 of the largest from its fp32 ones, 0.06 in root mean
    square.
    """
    logits = golden_model(HF, torch.bfloat16)(golden_prompts(HF))
    theirs, exact = golden(HF)["logits_bf16"], golden(HF)["logits"]
    assert logits.dtype == torch.bfloat16
    assert rms(logits, exact) < 2 * rms(theirs, exact)
    assert rms(logits, theirs) < rms(theirs, exact)


# --- goldens: generation --------------------------------------------------------------------------

greedy = cache(
    lambda name, stage: continued(golden_model(name), golden_prompts(name), N_NEW, stage)
)


@every_golden
@every_stage
def test_golden_greedy_tokens_and_their_logits(name: str, first_token_stage: str):
    out, expected = greedy(name, first_token_stage), golden(name)
    assert out.new_tokens.equal(expected["gen_ids"])
    logits = out.cache["unembed.hook_logits"]
    assert_as_exact(logits[:, :N_PROMPT], expected["logits"], exact_logits(name))
    whole = torch.cat([golden_prompts(name), expected["gen_ids"][:, :-1]], dim=1)
    exact = golden_model(name, torch.float64)(whole)[:, -N_NEW:]
    assert_as_exact(logits[:, -N_NEW:], expected["gen_logits"], exact)
    theirs, exact = (
        of.log_softmax(-1).gather(-1, expected["gen_ids"][..., None])[..., 0]
        for of in (expected["gen_logits"], exact)
    )
    assert_as_exact(out.logprobs, theirs, exact)


@every_golden
@every_stage
def test_golden_prompt_patterns_of_a_generation(name: str, first_token_stage: str):
    for key, layer in PATTERNS[name].items():
        pattern = greedy(name, first_token_stage).cache["pattern", layer][:, :, :N_PROMPT]
        assert (pattern[..., N_PROMPT:] == 0).all()
        assert_close(pattern[..., :N_PROMPT], golden(name)[key])


@every_stage
def test_golden_decode_pattern(first_token_stage: str):
    expected = golden(HF)["attn_probs_layer2_lastdecode"]  # [b head 1 key]
    pattern = greedy(HF, first_token_stage).cache["pattern", 2]
    assert_close(pattern[:, :, -1:], expected)
    seen = []
    hook = ("blocks.2.attn.hook_pattern", lambda p, hook: seen.append(p.clone()))
    continued(golden_model(HF), golden_prompts(HF), N_NEW, "prefill", generation_hooks=[hook])
    assert_close(seen[-1], expected)


def test_golden_logits_of_left_padded_rows():
    mask = golden(HF)["pad_attention_mask"]
    assert mask.sum(1).unique().numel() == 2
    logits = golden_model(HF)(golden(HF)["pad_input_ids"], attention_mask=mask)
    assert_close(logits[mask > 0], golden(HF)["pad_logits"][mask > 0])


@every_stage
def test_golden_greedy_tokens_of_left_padded_rows(first_token_stage: str):
    tokens, mask = golden(HF)["pad_input_ids"], golden(HF)["pad_attention_mask"]
    out = continued(golden_model(HF), tokens, N_NEW, first_token_stage, attention_mask=mask)
    assert out.new_tokens.equal(golden(HF)["pad_gen_ids"])


# --- live: one forward ----------------------------------------------------------------------------


@cache
def hf(name: str) -> JambaForCausalLM:
    return hf_jamba(SPECS[name])


@cache
def ours(name: str) -> HookedHybrid:
    return HookedHybrid.from_hf(hf(name)).requires_grad_(False)


def prompts_of(name: str) -> Tensor:
    return random_tokens(SPECS[name], batch=4, length=40)


@every_spec
def test_layers_are_where_hf_has_them(name: str):
    cfg, spec = ours(name).cfg, SPECS[name]
    assert cfg.attention_layers == spec.attention_layers
    assert cfg.recurrent_layers == spec.recurrent_layers
    mlps = [hasattr(layer.mlp, "n_experts") for layer in cfg.layers]
    assert mlps == [i in spec.expert_layers for i in range(spec.n_layers)]


@every_spec
def test_logits_equal_hf(name: str):
    tokens = prompts_of(name)
    assert_close(ours(name)(tokens), hf_logits_uncached(hf(name), tokens))


@every_spec
def test_watched_logits_and_patterns_equal_hf(name: str):
    tokens = prompts_of(name)
    logits, cache = ours(name).run_with_cache(tokens, names_filter=lambda _: True)
    assert_close(logits, hf_logits_uncached(hf(name), tokens))
    theirs = hf_patterns(hf(name), tokens)
    assert tuple(theirs) == SPECS[name].attention_layers
    for layer, pattern in theirs.items():
        assert_close(cache["pattern", layer], pattern)


@every_spec
def test_routing_equals_hf(name: str):
    tokens, spec = prompts_of(name), SPECS[name]
    _, cache = ours(name).run_with_cache(tokens)
    theirs = hf_router_logits(hf(name), tokens)
    assert tuple(theirs) == spec.expert_layers
    for layer, logits in theirs.items():
        assert_close(cache["router_logits", layer], logits)
        weights, experts = logits.softmax(-1).topk(spec.n_chosen)
        expected = torch.zeros_like(logits).scatter(-1, experts, weights)
        weights, experts = cache["expert_weights", layer], cache["expert_indices", layer]
        shares = torch.zeros_like(logits).scatter(-1, experts, weights)
        assert (shares > 0).equal(expected > 0)
        assert_close(shares, expected)


@every_spec
@pytest.mark.parametrize("n_prompt", [1, 2, None])
def test_recurrent_states_equal_hf(name: str, n_prompt: int | None):
    tokens = prompts_of(name)[:, :n_prompt]
    _, state = ours(name)(tokens, return_type=None, return_state=True)
    theirs = hf_states(hf(name), tokens)
    assert tuple(theirs) == SPECS[name].recurrent_layers
    for layer, (conv, ssm) in theirs.items():
        block = state.blocks[layer]
        assert isinstance(block, RecurrentState)
        assert_close(block.conv, conv.transpose(1, 2))
        assert_close(block.ssm, ssm)


@every_spec
def test_bf16_logits_are_near_hf(name: str):
    """Root mean square over the largest: the largest difference of 16 000 is mere luck in bf16.

    By the largest the reference is up to 0.4 from its own fp32 logits, where an expert changes; by
    this, 0.02.
    """
    theirs = hf_jamba(SPECS[name]).to(torch.bfloat16)
    model, tokens = HookedHybrid.from_hf(theirs).requires_grad_(False), prompts_of(name)
    logits, expected = model(tokens), hf_logits_uncached(theirs, tokens)
    assert model.dtype == logits.dtype == expected.dtype == torch.bfloat16
    assert rms(logits, expected) < BF16


# --- live: generation -----------------------------------------------------------------------------


def assert_same_greedy(out: GenerationOutput, theirs: Greedy) -> None:
    """Check tokens and logits of each row as far as the reference's choices are decided.

    Two logits that may each be off by FP32_PARITY of the largest change places only where they are
    nearer than twice that.
    """
    first, second = theirs.logits.topk(2, dim=-1).values.unbind(-1)
    close_call = 2 * FP32_PARITY * theirs.logits.abs().max()
    is_decided = (first - second > close_call).int().cumprod(dim=1).bool()
    assert is_decided[:, 0].all()
    assert out.new_tokens[is_decided].equal(theirs.tokens[is_decided])
    logits = out.cache["unembed.hook_logits"][:, -theirs.tokens.shape[1] :]
    same_prefix = torch.cat([torch.ones_like(is_decided[:, :1]), is_decided[:, :-1]], dim=1)
    assert_close(logits[same_prefix], theirs.logits[same_prefix])


@every_spec
@pytest.mark.parametrize(("n_prompt", "n_new"), [(1, 18), (2, 3), (None, 8)])
def test_greedy_equals_hf(name: str, n_prompt: int | None, n_new: int):
    """By `generate` where it takes a few steps, else by one forward that reads what it chose."""
    tokens = prompts_of(name)[:, :n_prompt]
    out = continued(ours(name), tokens, n_new)
    if n_prompt == 1 or hf_breaks_no_attention(SPECS[name]):
        theirs = hf_greedy_guessed(hf(name), tokens, out.new_tokens)
    else:
        theirs = hf_greedy(hf(name), tokens, n_new)
    assert_same_greedy(out, theirs)
    for layer, pattern in hf_patterns(hf(name), out.tokens[:, :-1]).items():
        assert_close(out.cache["pattern", layer], pattern)


@every_spec
@pytest.mark.parametrize("n_prefill", [1, 34])
def test_decode_equals_hf(name: str, n_prefill: int):
    tokens = prompts_of(name)[:, : n_prefill + 6]
    logits, seen = decoded(ours(name), tokens, n_prefill)
    theirs = hf_decode(hf(name), tokens, n_prefill)
    assert_close(logits, theirs.logits)
    for n_keys, (mine, expected) in enumerate(
        zip(seen, theirs.patterns, strict=True), start=n_prefill + 1
    ):
        assert tuple(mine) == tuple(expected) == SPECS[name].attention_layers
        for layer, (pattern, key_pos) in mine.items():
            assert key_pos.equal(torch.arange(n_keys).expand(len(tokens), -1))
            assert_close(pattern, expected[layer])


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


# --- live: rows of different lengths --------------------------------------------------------------

UNEQUAL = torch.tensor([0, 23, 5, 37])  # rows of 40, 17, 35 and 3 tokens
LEFT = (torch.arange(40) >= UNEQUAL[:, None]).long()
RIGHT = LEFT.flip(1)


def alone(name: str, row: int, mask: Tensor) -> Tensor:
    """The tokens of one row [1 s] without its padding."""
    return prompts_of(name)[row : row + 1, mask[row] > 0]


@every_spec
def test_left_padded_logits_and_patterns_equal_hf(name: str):
    tokens = prompts_of(name)
    logits, cache = ours(name).run_with_cache(tokens, attention_mask=LEFT)
    if hf_breaks_left_padding(SPECS[name]):
        for row, n_pad in enumerate(UNEQUAL.tolist()):
            expected = hf_logits_uncached(hf(name), alone(name, row, LEFT))
            assert_close(logits[row, n_pad:], expected[0])
        return
    assert_close(logits[LEFT > 0], hf_logits_uncached(hf(name), tokens, LEFT)[LEFT > 0])
    for layer, expected in hf_patterns(hf(name), tokens, LEFT).items():
        pattern = cache["pattern", layer].transpose(1, 2)  # [b q h k]
        assert_close(pattern[LEFT > 0], expected.transpose(1, 2)[LEFT > 0])


@every_spec
def test_right_padded_logits_equal_hf(name: str):
    tokens = prompts_of(name)
    logits = ours(name)(tokens, attention_mask=RIGHT)
    assert_close(logits[RIGHT > 0], hf_logits_uncached(hf(name), tokens, RIGHT)[RIGHT > 0])


@every_spec
@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_states_equal_those_hf_has_of_each_row_alone(name: str, side: str):
    mask = LEFT if side == "left" else RIGHT
    tokens = prompts_of(name)
    _, state = ours(name)(tokens, attention_mask=mask, return_type=None, return_state=True)
    for row in range(len(tokens)):
        for layer, (conv, ssm) in hf_states(hf(name), alone(name, row, mask)).items():
            block = state.blocks[layer]
            assert_close(block.conv[row], conv[0].T)
            assert_close(block.ssm[row], ssm[0])


@every_spec
def test_left_padded_greedy_equals_hf(name: str):
    tokens, n_new = prompts_of(name), 8
    out = continued(ours(name), tokens, n_new, attention_mask=LEFT)
    uncached = hf_breaks_no_attention(SPECS[name])
    if hf_breaks_left_padding(SPECS[name]):
        rows = [
            hf_greedy(hf(name), alone(name, row, LEFT), n_new, uncached=uncached)
            for row in range(len(tokens))
        ]
        theirs = Greedy(*(torch.cat(parts) for parts in zip(*rows, strict=True)))
    else:
        theirs = hf_greedy(hf(name), tokens, n_new, LEFT, uncached=uncached)
    assert_same_greedy(out, theirs)


# --- the references themselves --------------------------------------------------------------------


@every_spec
def test_every_parameter_of_the_reference_matters(name: str):
    model = hf_jamba(SPECS[name])
    logits = model(prompts_of(name), use_cache=False).logits
    weights = torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))
    (logits * weights).sum().backward()
    for path, parameter in model.named_parameters():
        assert (parameter != 0).all() and (parameter != 1).all(), path
        effect = parameter.grad * parameter.detach()
        each = (
            effect.flatten(1) if effect.ndim == 3 and "experts" in path else effect.flatten()[None]
        )
        assert (each.norm(dim=1) > 1e-2 * logits.abs().max()).all(), path


@every_spec
def test_the_reference_is_drawn_alike_every_time_and_draws_nothing_else(name: str):
    before = torch.get_rng_state()
    again = hf_jamba(SPECS[name]).state_dict()
    assert torch.get_rng_state().equal(before)
    assert all(again[key].equal(value) for key, value in hf(name).state_dict().items())


@every_spec
def test_logits_of_the_reference_depend_on_no_later_token(name: str):
    tokens = prompts_of(name)
    whole = hf_logits_uncached(hf(name), tokens)
    for n in (1, 20):
        assert_close(hf_logits_uncached(hf(name), tokens[:, :n]), whole[:, :n])


@every_spec
def test_cached_decoding_of_the_reference_equals_its_uncached_forward(name: str):
    tokens = prompts_of(name)
    cached = hf_decode(hf(name), tokens, 30).logits
    assert_close(cached, hf_logits_uncached(hf(name), tokens)[:, 30:])


@every_spec
def test_what_hf_breaks_is_still_broken(name: str):
    spec, tokens = SPECS[name], prompts_of(name)
    if hf_breaks_no_attention(spec) and VERSION >= (5,):  # transformers 4 asks for no length
        with pytest.raises(ValueError, match="get_seq_length"):
            hf_greedy(hf(name), tokens, 2)
    padded = hf_logits_uncached(hf(name), tokens, LEFT)[1, -17:]
    expected = hf_logits_uncached(hf(name), alone(name, 1, LEFT))[0]
    if hf_breaks_left_padding(spec):
        assert relative(padded, expected) > 1e-2
    else:
        assert_close(padded, expected)
