"""The planted circuit: it retrieves, nothing else does, and it is what its equations say."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor

from hooked_hybrid.analysis.planted import (
    BOS,
    N_SPECIAL,
    N_SYMBOLS,
    Planted,
    PlantedPrompts,
    planted_retrieval,
)
from hooked_hybrid.hooks.point import HookPoint
from hooked_hybrid.interventions import cut_heads, keep_heads
from tests.models import relative
from tests.tolerances import FP32_PARITY

planted_of = cache(planted_retrieval)


def margins(planted: Planted, prompts: PlantedPrompts, hooks: list | None = None) -> Tensor:
    """Return by how much the answer's logit is above all others."""
    with torch.no_grad():
        last = planted.model.run_with_hooks(prompts.tokens, fwd_hooks=hooks or [])[:, -1]
    answer = prompts.answers[:, :1]
    others = last.scatter(1, answer, -torch.inf)
    return last.gather(1, answer)[:, 0] - others.amax(1)


@pytest.mark.parametrize(("noise", "margin"), [(0.0, 9.9), (0.1, 9.0), (0.3, 6.0)])
@pytest.mark.parametrize("length", [24, 250])
def test_every_answer_has_the_stated_margin(noise: float, margin: float, length: int):
    for seed in range(2):
        planted = planted_of(noise, seed)
        assert margins(planted, planted.prompts(16, length, 3, seed)).min() > margin


def test_generation_copies_the_whole_needle():
    planted = planted_of(0.1)
    prompts = planted.prompts(8, 40, n_needle=8)
    out = planted.model.generate(prompts.tokens, 7, return_type="tokens", verbose=False)
    assert torch.equal(out[:, -7:], prompts.answers)


def test_the_needle_is_where_the_prompt_says_and_nowhere_else():
    prompts = planted_of(0.1).prompts(32, 12, n_needle=3, seed=5)
    for row, (start, stop) in enumerate(prompts.spans):
        tokens = prompts.tokens[row].tolist()
        assert start >= 1 and stop < len(tokens) - 1
        assert tokens[start + 1 : stop] == prompts.answers[row].tolist()
        assert tokens[start] == tokens[-1] and tokens[0] == BOS
        counts = [tokens.count(token) for token in tokens[start:stop]]
        assert counts == [2, 1, 1]
        assert all(token >= N_SPECIAL for token in tokens[1:])
    assert torch.equal(prompts.copied_from, prompts.needle_start + 1)


def test_a_corrupted_key_leaves_no_answer_and_a_corrupted_value_another():
    planted = planted_of(0.1)
    prompts = planted.prompts(16)
    first = prompts.answers[:, 0]
    for what, at in (("key", prompts.needle_start), ("value", prompts.copied_from)):
        other = prompts.corrupted(what)
        changed = (other != prompts.tokens).nonzero()[:, 1]
        assert torch.equal(changed, at)
        said = planted.model(other)[:, -1].argmax(-1)
        assert not (said == first).any()
        new = other[torch.arange(16), at]
        assert (said == new).all() == (what == "value")


def test_only_the_planted_head_matters():
    planted = planted_of(0.1)
    prompts = planted.prompts(16)
    assert margins(planted, prompts, cut_heads([planted.head])).max() < 0
    assert margins(planted, prompts, keep_heads([planted.head])).min() > 9
    for head in ((2, 0), (2, 2), (4, 1)):
        assert margins(planted, prompts, cut_heads([head])).min() > 8


def test_only_the_planted_channels_matter():
    planted = planted_of(0.1)
    prompts = planted.prompts(16)
    width = planted.channels.stop - planted.channels.start

    def silence(layer: int, group: int) -> list:
        def fn(state: Tensor, hook: HookPoint) -> Tensor:
            state = state.clone()
            state[..., group * width : (group + 1) * width] = 0
            return state

        return [(f"blocks.{layer}.mixer.hook_ssm_y", fn)]

    assert planted.channels == slice(planted.carrier[1] * width, (planted.carrier[1] + 1) * width)
    assert margins(planted, prompts, silence(*planted.carrier)).max() < 0
    for layer in planted.model.cfg.recurrent_layers:
        for group in range(4):
            if (layer, group) != planted.carrier:
                assert margins(planted, prompts, silence(layer, group)).min() > 8


def test_the_circuit_is_what_its_equations_say():
    """P is the decaying sum of symbols, and the head writes C times what it looks at."""
    planted = planted_of(0.0)
    prompts = planted.prompts(4, 16)
    _, cache = planted.model.run_with_cache(prompts.tokens)
    symbols = torch.eye(N_SYMBOLS)[prompts.tokens] * (prompts.tokens >= N_SPECIAL)[..., None]
    state, P = torch.zeros(4, N_SYMBOLS), []
    for t in range(16):
        state = planted.decay * state + symbols[:, t]
        P.append(state)
    scale = 8.0  # of a fresh embedding
    expected = scale * torch.stack(P, dim=1)
    assert relative(cache["resid_post", 1][..., N_SYMBOLS:], expected) < FP32_PARITY
    layer, head = planted.head
    pattern = cache["pattern", layer][:, head]
    normed = symbols * (scale / cache["scale", layer, "ln1"])
    written = 6.0 * pattern @ normed
    out = cache["mixer_out", layer]
    assert relative(out[..., :N_SYMBOLS], written) < FP32_PARITY
    assert out[..., N_SYMBOLS:].abs().max() == 0


def test_without_noise_everything_else_writes_nothing():
    planted = planted_of(0.0)
    _, cache = planted.model.run_with_cache(planted.prompts(2).tokens)
    for layer in range(5):
        assert cache["mlp_out", layer].abs().max() == 0
        if layer not in (planted.carrier[0], planted.head[0]):
            assert cache["mixer_out", layer].abs().max() == 0


def test_making_one_leaves_torch_s_random_numbers_as_they_were():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    made = planted_retrieval(0.1, seed=7)
    assert torch.equal(torch.rand(2), expected)
    again = planted_retrieval(0.1, seed=7).model.state_dict()
    assert all(torch.equal(w, again[name]) for name, w in made.model.state_dict().items())


def test_bad_arguments_are_refused(unchecked: None):
    planted = planted_of(0.1)
    with pytest.raises(ValueError, match=r"noise=-0.1"):
        planted_retrieval(-0.1)
    for sizes in ((0, 24, 2), (2, 24, 1), (2, 24, 15), (2, 5, 3)):
        with pytest.raises(ValueError, match=f"batch={sizes[0]}, n_needle={sizes[2]}"):
            planted.prompts(*sizes)
    prompts = planted.prompts(1)
    with pytest.raises(ValueError, match="what='question'"):
        prompts.corrupted("question")  # type: ignore[arg-type]
    full = PlantedPrompts(torch.arange(N_SYMBOLS)[None], torch.tensor([3]), torch.tensor([[4]]))
    with pytest.raises(ValueError, match="row 0 holds every symbol"):
        full.corrupted()
