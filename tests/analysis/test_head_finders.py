"""Scores of heads and channels: each against its definition, and on the planted circuit."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint
from hooked_hybrid.analysis.answers import NeedlePrompt, copies
from hooked_hybrid.analysis.channels import channel_scores
from hooked_hybrid.analysis.entropies import entropy, entropy_profile
from hooked_hybrid.analysis.heads import induction_scores, repeat_scores, retrieval_scores
from hooked_hybrid.analysis.planted import Planted, planted_retrieval
from hooked_hybrid.niah.needles import draw_needles, training_cities
from hooked_hybrid.niah.prompts import grid
from tests.models import (
    CONFIGS,
    griffin_config,
    jamba_config,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import FP32_PARITY

model_of = cache(tiny_model)
planted_of = cache(planted_retrieval)
each = pytest.mark.parametrize("name", CONFIGS)
WIDE = {
    "griffin": replace(griffin_config("RA", n_keys=30, n_kv_heads=2), tied_embedding=False),
    "jamba": jamba_config("MAA"),
}
QUIET: dict[str, Any] = {"verbose": False}


def needle_prompts(lengths: tuple[int, ...] = (40, 40, 55)) -> list[NeedlePrompt]:
    """Return prompts of distinct tokens, most of them needle: what a random model says is there.

    The needle is in two pieces, and ends before the prompt does.
    """
    generator = torch.Generator().manual_seed(0)
    rows = [(3 + torch.randperm(58, generator=generator)[:n]).tolist() for n in lengths]
    return [NeedlePrompt(row, [(1, 18), (20, len(row) - 2)]) for row in rows]


def planted_prompts(planted: Planted, length: int = 60) -> list[NeedlePrompt]:
    prompts = planted.prompts(8, length, n_needle=5)
    pairs = zip(prompts.tokens.tolist(), prompts.spans, strict=True)
    return [NeedlePrompt(tokens, [span]) for tokens, span in pairs]


def ratio(values: Tensor) -> float:
    """Return the largest score over the next."""
    first, second = values.flatten().topk(2).values.tolist()
    return first / second


# --- retrieval ----------------------------------------------------------------------------------


def retrieval_by_hand(
    model: HookedHybrid, prompts: list[NeedlePrompt], n_new: int, soft: bool
) -> tuple[Tensor, int]:
    """Return the scores from whole patterns of one prompt at a time, token by token."""
    layers = model.cfg.attention_layers
    total, n_copied = torch.zeros(len(layers), model.cfg.n_heads), 0
    for prompt in prompts:
        given = torch.tensor([prompt.tokens])
        whole = model.generate(given, n_new, return_type="tokens", verbose=False)
        _, cache = model.run_with_cache(whole, names_filter=lambda n: n.endswith("hook_pattern"))
        tokens, n = whole[0].tolist(), len(prompt.tokens)
        inside = [i for start, stop in prompt.needle_spans for i in range(start, stop)]
        for at in range(n, len(tokens)):
            if tokens[at] in model.cfg.eos_token_ids:
                break
            sources = [i for i in inside if tokens[i] == tokens[at]]
            n_copied += bool(sources)
            for i, layer in enumerate(layers):
                for head in range(model.cfg.n_heads):
                    row = cache["pattern", layer][0, head, at - 1]
                    hit = float(row[sources].sum()) if soft else int(row.argmax()) in sources
                    total[i, head] += hit
    return total / n_copied, n_copied


@pytest.mark.parametrize("config", WIDE)
@pytest.mark.parametrize("soft", [False, True])
def test_retrieval_scores_are_their_definition(config: str, soft: bool):
    model, prompts = random_model(WIDE[config]), needle_prompts()
    expected, n_copied = retrieval_by_hand(model, prompts, 8, soft)
    assert n_copied >= 4 and expected.max() > 0
    for batch_size in (1, 2):
        found = retrieval_scores(
            model,
            prompts,
            soft=soft,
            max_new_tokens=8,
            min_recall=0.0,
            batch_size=batch_size,
            **QUIET,
        )
        assert found.layers == model.cfg.attention_layers
        assert str(n_copied) in found.name
        assert relative(found.values, expected) < FP32_PARITY


def test_answers_that_miss_the_needle_do_not_count():
    """Of two needles, one cannot be found: its key is another token."""
    planted = planted_of(0.1)
    found, lost = planted_prompts(planted)[:2]
    start = lost.needle_spans[0][0]
    other = [*lost.tokens[:start], found.tokens[5], *lost.tokens[start + 1 :]]
    prompts = [found, NeedlePrompt(other, lost.needle_spans)]
    rows = next(copies(planted.model, prompts, max_new_tokens=4, **QUIET)).is_copy
    assert rows[0].all() and not rows[1].any()
    assert "4 copied" in retrieval_scores(planted.model, prompts, max_new_tokens=4, **QUIET).name


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
@pytest.mark.parametrize(("soft", "clean"), [(False, 10.0), (True, 40.0)])
def test_retrieval_scores_find_the_planted_head(noise: float, soft: bool, clean: float):
    planted = planted_of(noise)
    prompts = planted_prompts(planted)
    found = retrieval_scores(planted.model, prompts, soft=soft, max_new_tokens=4, **QUIET)
    assert found.top(1) == [planted.head] and found[planted.head] > 0.99
    assert ratio(found.values) > clean


def test_the_planted_head_is_found_in_bfloat16():
    planted = planted_retrieval(0.1)
    prompts = planted_prompts(planted)
    found = retrieval_scores(planted.model.bfloat16(), prompts, max_new_tokens=4, **QUIET)
    assert found.top(1) == [planted.head] and ratio(found.values) > 10


@pytest.mark.parametrize(("name", "layer"), [("tiny-griffin", 2), ("tiny-jamba", 2)])
def test_the_packaged_models_retrieve_in_one_layer(name: str, layer: int):
    model = HookedHybrid.from_pretrained(name)
    needles = draw_needles(random.Random(1), 2, training_cities())
    prompts = grid(model, needles, [160], [0.0, 1.0])
    found = retrieval_scores(model, prompts, **QUIET)
    for of_layer, values in zip(found.layers, found.values, strict=True):
        assert values.min() > 0.5 if of_layer == layer else values.max() < 0.1


# --- repeated tokens ----------------------------------------------------------------------------


@each
def test_repeat_scores_are_their_definition(name: str):
    model, n, batch = model_of(name), 6, 3
    found = repeat_scores(model, n, batch, seed=2)
    seen: list[Tensor] = []

    def keep(embed: Tensor, hook: HookPoint) -> None:
        seen.append(embed)

    with model.hooks([("hook_embed", keep)]):
        repeat_scores(model, n, batch, seed=2)
    tokens = torch.cdist(seen[0], model.embed(torch.arange(model.cfg.d_vocab)[None])).argmin(-1)
    assert (tokens[:, 0] == model.cfg.bos_token_id).all()
    assert torch.equal(tokens[:, 1 : n + 1], tokens[:, n + 1 :])
    assert all(len(set(row.tolist())) == n for row in tokens[:, 1 : n + 1])
    _, cache = model.run_with_cache(tokens)
    for kind, back in {"current": 0, "previous": 1, "duplicate": n, "induction": n - 1}.items():
        for layer in model.cfg.attention_layers:
            pattern = cache["pattern", layer]
            weights = [pattern[:, :, t, t - back] for t in range(n + 1, 2 * n + 1)]
            expected = torch.stack(weights).mean(dim=(0, 1))
            mine = found[kind].values[found[kind].layers.index(layer)]  # type: ignore[index]
            assert relative(mine, expected) < FP32_PARITY


@pytest.mark.parametrize("noise", [0.0, 0.1, 0.3])
def test_the_planted_head_induces_and_no_other_does(noise: float):
    planted = planted_of(noise)
    found = repeat_scores(planted.model, 20, 4)
    assert found["induction"].top(1) == [planted.head]
    assert found["induction"][planted.head] > 0.99 and ratio(found["induction"].values) > 10
    for kind in ("current", "previous", "duplicate"):
        assert found[kind][planted.head] < 0.01
    assert torch.equal(induction_scores(planted.model, 20, 4).values, found["induction"].values)


def test_a_copy_longer_than_the_window_is_refused():
    model = model_of("griffin")  # a query sees 7 keys
    assert repeat_scores(model, 6, 1)["duplicate"].values.max() > 0
    with pytest.raises(ValueError, match="n_tokens=7: a query of this model sees 7 keys"):
        repeat_scores(model, 7)
    for sizes in ((2, 1), (59, 1), (5, 0)):
        with pytest.raises(ValueError, match=f"n_tokens={sizes[0]}, batch={sizes[1]}"):
            repeat_scores(model, *sizes)


# --- entropies ----------------------------------------------------------------------------------


@each
def test_entropy_profile_is_that_of_the_cached_patterns(name: str):
    model, tokens = model_of(name), random_tokens(3, 20)
    _, cache = model.run_with_cache(tokens)
    found = entropy_profile(model, tokens)
    assert torch.equal(
        entropy_profile(model, tokens[0]).values, entropy_profile(model, tokens[:1]).values
    )
    for i, layer in enumerate(model.cfg.attention_layers):
        p = cache["pattern", layer].double()
        expected = -(p * p.clamp_min(1e-300).log2()).sum(-1).mean(0).float()
        assert relative(found.values[i], expected) < FP32_PARITY
    assert found.values[:, :, 0].abs().max() == 0  # the first token sees itself
    assert relative(entropy_profile(cache).values, found.values) < FP32_PARITY
    mean = found.mean()
    assert mean.layers == found.layers
    assert relative(mean.values, found.values.mean(-1)) < FP32_PARITY


def test_entropy_of_equal_weights_is_their_logarithm():
    assert entropy(torch.full((8,), 1 / 8)) == 3
    assert entropy(torch.tensor([0.0, 1.0])) == 0
    assert entropy(torch.full((4,), 1 / 4, dtype=torch.bfloat16)).dtype == torch.float32


@each
def test_entropy_profile_leaves_padding_out(name: str):
    model, tokens = model_of(name), random_tokens(2, 12)
    alone = entropy_profile(model, tokens[:1, :9]).values
    padded = torch.cat([tokens[:1, :9], tokens[1:, :3]], dim=1)
    mask = (torch.arange(12) < 9).int()[None]
    found = entropy_profile(model, padded, mask).values
    assert relative(found[..., :9], alone) < FP32_PARITY
    assert found[..., 9:].isnan().all()
    assert not entropy_profile(model, padded, mask).mean().values.isnan().any()
    left = torch.cat([tokens[1:, :3], tokens[:1, :9]], dim=1)
    found = entropy_profile(model, left, mask.flip(1)).values
    assert relative(found[..., 3:], alone) < FP32_PARITY and found[..., :3].isnan().all()


def test_entropy_profile_of_a_long_run_and_of_a_generation():
    """A long forward hands its patterns over in pieces; a generation, one query at a time."""
    model = model_of("griffin")
    tokens = random_tokens(1, 1100)
    _, cache = model.run_with_cache(tokens, names_filter="blocks.2.attn.hook_pattern")
    assert (
        relative(entropy_profile(model, tokens).values, entropy_profile(cache).values) < FP32_PARITY
    )
    out = model.generate(
        tokens[:, :9], 5, names_filter=True, return_type="output", stop_at_eos=False, **QUIET
    )
    whole = entropy_profile(model, out.tokens[:, :-1]).values
    assert relative(entropy_profile(out.cache).values, whole) < FP32_PARITY


# --- recurrent channels -------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
def test_channel_scores_find_the_planted_channels(noise: float):
    planted = planted_of(noise)
    found = channel_scores(planted.model, planted_prompts(planted), max_new_tokens=4, **QUIET)
    assert found.layers == planted.model.cfg.recurrent_layers
    assert found.top(1) == [planted.carrier] and found[planted.carrier] > 5
    assert ratio(found.values.abs() + 1e-9) > 1000
    assert found.labels()[:5] == ["L0G0", "L0G1", "L0G2", "L0G3", "L1G0"]


@pytest.mark.parametrize(("name", "n_groups"), [("griffin", None), ("jamba", None), ("jamba", 4)])
def test_channel_scores_are_their_definition(name: str, n_groups: int | None):
    model, prompts = model_of(name), needle_prompts()
    options: dict[str, Any] = {"max_new_tokens": 8, "min_recall": 0.0, **QUIET}
    found = channel_scores(model, prompts, n_groups, **options)
    n = n_groups or (4 if name == "griffin" else 8)
    assert found.values.shape == (3, n)
    layer, group = found.layers[1], n - 1
    width = 32 if name == "griffin" else 48
    mine = slice(group * width // n, width)
    change, n_copied = 0.0, 0
    for prompt in prompts:
        tokens = model.generate(torch.tensor([prompt.tokens]), 8, return_type="tokens", **QUIET)
        at = [i for start, stop in prompt.needle_spans for i in range(start, stop)]
        inside = {prompt.tokens[i] for i in at}

        def silence(write: Tensor, hook: HookPoint, at: list[int] = at) -> Tensor:
            write = write.clone()
            for i in at:
                write[:, i, mine] = 0
            return write

        whole = model(tokens).log_softmax(-1)
        name_of = f"blocks.{layer}.mixer.hook_ssm_write"
        less = model.run_with_hooks(tokens, fwd_hooks=[(name_of, silence)]).log_softmax(-1)
        for i in range(len(prompt.tokens), tokens.shape[1]):
            token = int(tokens[0, i])
            if token in model.cfg.eos_token_ids:
                break
            if token in inside:
                n_copied += 1
                change += float(whole[0, i - 1, token] - less[0, i - 1, token])
    assert found[layer, group] == pytest.approx(change / n_copied, rel=1e-3)
    assert abs(change) > 1e-3


# --- what cannot be scored ----------------------------------------------------------------------


def test_what_cannot_be_scored_is_a_clear_error(unchecked: None):
    model, prompts = model_of("griffin"), needle_prompts()
    for wrong in ([], [NeedlePrompt([3, 4], [])]):
        with pytest.raises(ValueError, match="each with the spans"):
            retrieval_scores(model, wrong, **QUIET)
    with pytest.raises(ValueError, match="none of 3 needles was found"):
        retrieval_scores(model, prompts, min_recall=1.0, **QUIET)
    recurrent = random_model(griffin_config("RR"))
    for fn in (lambda: retrieval_scores(recurrent, prompts), lambda: repeat_scores(recurrent)):
        with pytest.raises(ValueError, match="no attention layer"):
            fn()
    with pytest.raises(ValueError, match="no recurrent layer"):
        channel_scores(random_model(jamba_config("AA")), prompts)
    with pytest.raises(ValueError, match="n_groups=5: layer 0 has 32 channels"):
        channel_scores(model, prompts, 5)
    _, cache = model.run_with_cache(random_tokens())
    with pytest.raises(ValueError, match="leave tokens and attention_mask out"):
        entropy_profile(cache, random_tokens())
    with pytest.raises(ValueError, match="needs tokens"):
        entropy_profile(model)
    found = channel_scores(model, prompts, min_recall=0.0, max_new_tokens=8, **QUIET)
    with pytest.raises(KeyError, match="layer 2 is not a recurrence"):
        found[2, 0]
