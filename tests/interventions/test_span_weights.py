"""Attention weights on a span: against loops over queries and keys, however the sequence is run."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import HookedHybrid, HookPoint, interventions
from hooked_hybrid.hooks.names import HookNameError
from hooked_hybrid.interventions.rows import check_spans
from hooked_hybrid.interventions.weights import MODES, boost_span, manipulate_span, normalised
from hooked_hybrid.network.plan import piece_length
from tests.loops import looped
from tests.models import griffin_config, jamba_config, random_model, random_tokens, relative
from tests.tolerances import BF16, FP32_PARITY

LAYER = 2  # no attention before it, so that its plain pattern depends on the tokens alone
PATTERN, SCORES = f"blocks.{LAYER}.attn.hook_pattern", f"blocks.{LAYER}.attn.hook_attn_scores"
N_POS, N_KEYS, SPAN = 23, 7, (5, 9)
CONFIGS = {
    "griffin": griffin_config("RRAR", n_keys=N_KEYS),
    "jamba": jamba_config("MMAM"),
    "griffin-deep": griffin_config("RARRAR", n_keys=N_KEYS, n_kv_heads=2),
}

models = pytest.mark.parametrize("name", ["griffin", "jamba"])
every_model = pytest.mark.parametrize("name", list(CONFIGS))
every_mode = looped("mode", MODES)
every_change = looped("mode", [m for m in MODES if m != "keep"])
normed = looped("renormalise", [False, True])
sides = looped("side", ["left", "right"])


@cache
def shared_model(name: str) -> HookedHybrid:
    return random_model(CONFIGS[name], seed=3)


@pytest.fixture
def model(name: str):
    yield shared_model(name)
    assert not shared_model(name).list_hooks()


# --- the definition, in loops ---------------------------------------------------------------------


def number(*keys: int) -> int:
    """Return what permute sorts by, in Python's integers."""
    x = 0
    for key in keys:
        x = ((x ^ key) + 0x9E3779B9) % 2**32
        x = ((x ^ (x >> 16)) * 0x7FEB352D) % 2**32
        x = ((x ^ (x >> 15)) * 0x846CA68B) % 2**32
        x = x ^ (x >> 16)
    return x


def new_weights(
    mode: str, old: list[float], seen: list[int], span: set[int], where: tuple[int, int, int, int]
) -> list[float]:
    """Return the weights of one query of one head; `seen` are the positions it sees, in order."""
    here = [i for i, p in enumerate(seen) if p in span]
    mean = sum(old[i] for i in here) / len(here) if here else 0.0
    new = list(old)
    if mode == "permute":
        by_number = sorted(here, key=lambda i: number(*where, seen[i]))
        for target, source in zip(here, by_number, strict=True):
            new[target] = old[source]
        return new
    for i, p in enumerate(seen):
        inside = p in span
        new[i] = {
            "keep": old[i],
            "null": 0.0,
            "only": old[i] if inside else 0.0,
            "omit": 0.0 if inside else old[i],
            "binary": mean if inside else 0.0,
        }[mode]
    return new


def by_hand(
    mode: str,
    plain: Tensor,
    spans: list[tuple[int, int]],
    n_keys: int | None,
    renormalise: bool = False,
    seed: int = 0,
    layer: int = LAYER,
    queries: range = range(N_POS),
) -> Tensor:
    """Return a plain pattern of whole, unpadded rows [b h q k] with its queries changed."""
    out, span = plain.clone(), {p for start, stop in spans for p in range(start, stop)}
    for row in range(plain.shape[0]):
        for head in range(plain.shape[1]):
            for q in queries:
                seen = [p for p in range(q + 1) if n_keys is None or q - p < n_keys]
                old = [float(plain[row, head, q, p]) for p in seen]
                new = new_weights(mode, old, seen, span, (seed, layer, head, q))
                total = sum(new) if renormalise and sum(new) else 1.0
                for p, weight in zip(seen, new, strict=True):
                    out[row, head, q, p] = weight / total
    return out


def plain_pattern(model: HookedHybrid, tokens: Tensor) -> Tensor:
    return model.run_with_cache(tokens, names_filter=PATTERN)[1][PATTERN]


def with_pattern(model: HookedHybrid, tokens: Tensor, pattern: Tensor, also: Any = ()) -> Tensor:
    """Return the logits of a forward whose pattern is given."""
    return model.run_with_hooks(tokens, fwd_hooks=[(PATTERN, lambda p, hook: pattern), *also])


def run_and_see(model: HookedHybrid, tokens: Tensor, hooks: Any, **options: Any) -> Any:
    """Return the logits and the pattern after the hooks."""
    with model.hooks(hooks):
        logits, seen = model.run_with_cache(tokens, names_filter=PATTERN, **options)
    return logits, seen[PATTERN]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert relative(actual, expected) < FP32_PARITY


# --- what is computed -----------------------------------------------------------------------------


@models
@every_mode
@normed
def test_weights_are_those_of_loops(model: HookedHybrid, mode: str, renormalise: bool):
    tokens = random_tokens(2, N_POS)
    seed = {"seed": 5} if mode == "permute" else {}
    hooks = manipulate_span(mode, SPAN, renormalise=renormalise, **seed)
    logits, pattern = run_and_see(model, tokens, hooks)
    plain = plain_pattern(model, tokens)
    expected = by_hand(
        mode, plain, [SPAN], model.cfg.layers[LAYER].mixer.n_keys, renormalise, seed=5
    )
    assert_close(pattern, expected)
    assert_close(logits, with_pattern(model, tokens, expected))
    if mode != "keep":
        assert relative(logits, model(tokens)) > 1e-3


@models
@every_change
def test_several_spans_count_as_one(model: HookedHybrid, mode: str):
    tokens, spans = random_tokens(2, N_POS), [(2, 4), (6, 9), (7, 10)]
    _, pattern = run_and_see(model, tokens, manipulate_span(mode, spans))
    n_keys = model.cfg.layers[LAYER].mixer.n_keys
    assert_close(pattern, by_hand(mode, plain_pattern(model, tokens), spans, n_keys))


@pytest.mark.parametrize("name", ["griffin"])
def test_spans_may_be_written_in_several_ways(model: HookedHybrid):
    tokens = random_tokens(2, N_POS)

    def logits(spans: Any) -> Tensor:
        return model.run_with_hooks(tokens, fwd_hooks=manipulate_span("only", spans))

    one = logits((5, 9))
    for same in ([5, 9], [(5, 9)], [[(5, 9)], [(5, 7), (6, 9)]], torch.tensor([[5, 9], [5, 9]])):
        assert_close(logits(same), one)
    each = logits(torch.tensor([[[5, 9], [12, 14]], [[2, 4], [2, 4]]]))
    assert_close(each, logits([[(5, 9), (12, 14)], [(2, 4)]]))
    assert_close(each[:1], logits([(5, 9), (12, 14)])[:1])
    assert_close(each[1:], logits((2, 4))[1:])
    assert relative(each[1], one[1]) > 1e-3


@pytest.mark.parametrize("name", ["griffin"])
def test_permute_moves_the_same_weights_about(model: HookedHybrid):
    tokens, (start, stop) = random_tokens(2, N_POS), SPAN
    plain = plain_pattern(model, tokens)

    def permuted(seed: int) -> Tensor:
        return run_and_see(model, tokens, manipulate_span("permute", SPAN, seed=seed))[1]

    pattern = permuted(0)
    assert torch.equal(pattern.sort(-1).values, plain.sort(-1).values)
    assert torch.equal(pattern[..., :start], plain[..., :start])
    assert torch.equal(pattern[..., stop:], plain[..., stop:])
    # query 10 sees all 4 tokens: heads, neighbouring queries and seeds have orders of their own
    orders = {
        tuple(plain[0, head, q].tolist().index(w) for w in permuted(seed)[0, head, q, start:stop])
        for seed in range(6)
        for head in range(4)
        for q in (9, 10)
    }
    assert len(orders) > 15  # of 24, in 48 drawings


@models
def test_null_leaves_the_output_bias_alone(model: HookedHybrid):
    tokens = random_tokens(2, N_POS)
    with model.hooks(manipulate_span("null", SPAN)):
        _, seen = model.run_with_cache(tokens)
    assert float(seen["z", LAYER].abs().max()) == 0
    bias = model.blocks[LAYER].attn.b_O
    expected = torch.zeros(24) if bias is None else bias
    assert torch.equal(seen["mixer_out", LAYER], expected.expand(2, N_POS, -1))


@pytest.mark.parametrize("name", ["jamba"])
@pytest.mark.parametrize("mode", ["binary", "permute"])
def test_a_visible_token_without_weight_is_visible_and_a_knocked_out_one_is_not(
    model: HookedHybrid, mode: str
):
    tokens = random_tokens(1, N_POS)

    def faint(scores: Tensor, hook: HookPoint) -> Tensor:
        scores[..., 6] = -500.0  # a weight of exactly 0 in fp32
        scores[..., 7] = -torch.inf
        return scores

    plain = run_and_see(model, tokens, [(SCORES, faint)])[1]
    assert float(plain[..., 20, 6].abs().max()) == 0
    hooks = [(SCORES, faint), *manipulate_span(mode, (5, 9))]
    pattern = run_and_see(model, tokens, hooks)[1]
    assert torch.equal(pattern[..., 7], torch.zeros_like(pattern[..., 7]))
    expected = by_hand(mode, plain, [(5, 7), (8, 9)], None)  # the span without what is hidden
    assert_close(pattern, expected)


@pytest.mark.parametrize("name", ["griffin-deep"])
@every_change
def test_layers_and_heads_outside_those_named_are_left(model: HookedHybrid, mode: str):
    tokens = random_tokens(2, N_POS)
    points = [f"blocks.{layer}.attn.hook_pattern" for layer in (1, 4)]

    def patterns(**where: Any) -> list[Tensor]:
        with model.hooks(manipulate_span(mode, SPAN, **where)):
            _, seen = model.run_with_cache(tokens, names_filter=points)
        return [seen[point] for point in points]

    _, plain = model.run_with_cache(tokens, names_filter=points)
    first, last = plain[points[0]], plain[points[1]]
    changed = by_hand(mode, first, [SPAN], N_KEYS, layer=1)
    changed_last = by_hand(mode, last, [SPAN], N_KEYS, layer=4)
    both = patterns()
    assert_close(both[0], changed)
    if mode != "null":
        assert relative(both[1], changed_last) > 1e-4  # the first layer's change arrives there
    only_last = patterns(layers=[4])
    assert torch.equal(only_last[0], first)
    assert_close(only_last[1], changed_last)
    some = patterns(layers=[1], heads=[3, 1])[0]
    assert torch.equal(some[:, [0, 2]], first[:, [0, 2]])
    assert_close(some[:, [1, 3]], changed[:, [1, 3]])
    each = patterns(heads={1: [0], 4: [2]})
    assert_close(each[0][:, :1], changed[:, :1])
    assert torch.equal(each[0][:, 1:], first[:, 1:])
    assert_close(patterns(heads={4: [2]})[1][:, 2], changed_last[:, 2])
    assert torch.equal(patterns(heads={4: [2]})[1][:, [0, 1, 3]], last[:, [0, 1, 3]])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_of_16_bits_are_summed_in_32(dtype: torch.dtype):
    """By hand: 1 + 0.42 steps is 1 in the dtype, but its inverse is not."""
    step = torch.finfo(dtype).eps
    weights = torch.tensor([1.0, 0.4375 * step, 0.0], dtype=dtype)
    shares = normalised(weights.expand(1, 1, 1, 3))[0, 0, 0].double()
    assert shares[0] == 1 - step / 2  # the number below 1
    assert shares[1] == float(torch.tensor(0.4375 * step / (1 + 0.4375 * step)).to(dtype))
    assert shares[2] == 0


@models
@every_change
@normed
def test_bf16_and_gradients(model: HookedHybrid, mode: str, renormalise: bool):
    tokens = random_tokens(2, N_POS)
    hooks = manipulate_span(mode, SPAN, renormalise=renormalise)
    expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
    rounded = random_model(model.cfg, seed=3, dtype=torch.bfloat16)
    logits = rounded.run_with_hooks(tokens, fwd_hooks=hooks)
    assert logits.dtype == torch.bfloat16
    error = (logits.float() - expected).square().mean().sqrt()
    assert error < BF16 * expected.abs().max()
    grads: list[Tensor] = []
    with model.hooks(hooks, [("hook_embed", lambda g, hook: grads.append(g))]):
        model(tokens, return_type="loss").backward()
    assert grads[0].isfinite().all() and float(grads[0].abs().max()) > 0


# --- however it is run ----------------------------------------------------------------------------


@every_model
@every_change
@pytest.mark.parametrize(("cut", "renormalise"), [([1] * N_POS, True), ([6, 4, 13], False)])
def test_cut_anywhere_equals_whole(
    model: HookedHybrid, mode: str, cut: list[int], renormalise: bool
):
    tokens, state, parts, start = random_tokens(2, N_POS), None, [], 0
    hooks = manipulate_span(mode, SPAN, renormalise=renormalise)
    for n in cut:
        part = tokens[:, start : start + n]
        out, state = model.run_with_hooks(part, fwd_hooks=hooks, state=state, return_state=True)
        parts.append(out)
        start += n
    assert_close(torch.cat(parts, dim=1), model.run_with_hooks(tokens, fwd_hooks=hooks))


@every_model
@every_change
def test_pieces_of_a_long_prefill_equal_the_whole(
    model: HookedHybrid, mode: str, monkeypatch: pytest.MonkeyPatch
):
    tokens, lengths = random_tokens(2, N_POS), []

    @interventions.per_position
    def look(resid: Tensor, hook: HookPoint) -> None:
        lengths.append(resid.shape[1])

    watched = [*manipulate_span(mode, SPAN), ("blocks.0.hook_resid_pre", look)]
    whole = model.run_with_hooks(tokens, fwd_hooks=watched)
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(
            "hooked_hybrid.model.language_model.piece_length", lambda n, p: piece_length(n, p, 4)
        )
        pieces = model.run_with_hooks(tokens, fwd_hooks=watched)
    assert lengths == [N_POS, 4, 4, 4, 4, 4, 3]
    assert_close(pieces, whole)


@models
@every_change
@normed
def test_generation_past_the_window(model: HookedHybrid, mode: str, renormalise: bool):
    """Span (5, 9) of a prompt of 10 leaves the window of 7 at the sixth new token."""
    prompt, n_prompt, n_new = random_tokens(2, 10), 10, 11
    out = model.generate(
        prompt,
        n_new,
        generation_hooks=manipulate_span(mode, SPAN, renormalise=renormalise),
        names_filter=PATTERN,
        stop_at_eos=False,
        return_type="output",
        verbose=False,
    )
    read = out.tokens[:, :-1]
    plain = plain_pattern(model, read)
    n_keys = model.cfg.layers[LAYER].mixer.n_keys
    steps = range(n_prompt, read.shape[1])
    expected = by_hand(mode, plain, [SPAN], n_keys, renormalise, queries=steps)
    assert_close(out.cache[PATTERN], expected)
    logits = with_pattern(model, read, expected)[:, n_prompt - 1 :]
    logprobs = logits.log_softmax(-1).gather(-1, out.new_tokens[..., None])[..., 0]
    assert_close(out.logprobs, logprobs)
    assert torch.equal(logits.argmax(-1), out.new_tokens)


@models
@every_change
@pytest.mark.parametrize("stage", ["prefill", "generation"])
def test_it_acts_in_the_stage_it_is_given_to(model: HookedHybrid, mode: str, stage: str):
    out = model.generate(
        random_tokens(2, 10),
        4,
        **{f"{stage}_hooks": manipulate_span(mode, SPAN)},
        first_token_stage="generation",
        names_filter=PATTERN,
        stop_at_eos=False,
        return_type="output",
        verbose=False,
    )
    queries = range(9) if stage == "prefill" else range(9, 13)
    n_keys = model.cfg.layers[LAYER].mixer.n_keys
    plain = plain_pattern(model, out.tokens[:, :-1])
    assert_close(out.cache[PATTERN], by_hand(mode, plain, [SPAN], n_keys, queries=queries))


LENGTHS = [N_POS, 10, 14]
SPANS_OF = [[(5, 9)], [(2, 4), (7, 9)], [(11, 12)]]


def padded(side: str) -> tuple[Tensor, Tensor]:
    tokens = random_tokens(len(LENGTHS), N_POS)
    mask = torch.zeros_like(tokens)
    for row, n in enumerate(LENGTHS):
        mask[row, (slice(N_POS - n, None) if side == "left" else slice(0, n))] = 1
    return tokens, mask


@every_model
@every_change
@sides
def test_rows_with_spans_of_their_own_equal_single_runs(model: HookedHybrid, mode: str, side: str):
    tokens, mask = padded(side)
    hooks = manipulate_span(mode, SPANS_OF)
    logits, state = model.run_with_hooks(
        tokens, fwd_hooks=hooks, attention_mask=mask, return_state=True
    )
    following = random_tokens(len(LENGTHS), 4, seed=1)
    after = model.run_with_hooks(following, fwd_hooks=hooks, state=state)
    for row, spans in enumerate(SPANS_OF):
        real = mask[row].bool()
        alone = torch.cat([tokens[row][real], following[row]])[None]
        single = model.run_with_hooks(alone, fwd_hooks=manipulate_span(mode, spans))[0]
        assert_close(logits[row][real], single[: LENGTHS[row]])
        assert_close(after[row], single[LENGTHS[row] :])


@models
@every_change
@sides
def test_generated_rows_equal_single_runs_when_some_end_early(
    model: HookedHybrid, mode: str, side: str
):
    tokens, mask = padded(side)
    options: dict[str, Any] = {"return_type": "output", "verbose": False}
    hooks = manipulate_span(mode, SPANS_OF)
    free = model.generate(
        tokens, 5, fwd_hooks=hooks, attention_mask=mask, stop_at_eos=False, **options
    )
    eos = int(free.new_tokens[0, 1])  # the first row ends here, so that others change places
    out = model.generate(
        tokens, 5, fwd_hooks=hooks, attention_mask=mask, eos_token_id=eos, **options
    )
    assert out.finished[0]
    for row, spans in enumerate(SPANS_OF):
        alone = model.generate(
            tokens[row][mask[row].bool()][None],
            5,
            fwd_hooks=manipulate_span(mode, spans),
            eos_token_id=eos,
            **options,
        )
        n = alone.new_tokens.shape[1]
        assert torch.equal(out.new_tokens[row, :n], alone.new_tokens[0])
        assert_close(out.logprobs[row, :n], alone.logprobs[0])


@every_model
@every_change
@normed
def test_packed_documents_equal_separate_ones(model: HookedHybrid, mode: str, renormalise: bool):
    tokens = random_tokens(1, N_POS)
    hooks = manipulate_span(mode, (3, 6), renormalise=renormalise)
    ids = torch.tensor([[1] * 9 + [2] * 2 + [3] * 12])
    packed = model.run_with_hooks(tokens, fwd_hooks=hooks, segment_ids=ids)
    for i in (1, 2, 3):
        alone = model.run_with_hooks(tokens[:, ids[0] == i], fwd_hooks=hooks)
        assert_close(packed[:, ids[0] == i], alone)


# --- with other hooks -----------------------------------------------------------------------------


@models
@every_change
def test_top_heads_are_chosen_among_the_changed_patterns(model: HookedHybrid, mode: str):
    tokens = random_tokens(2, N_POS)
    top = interventions.keep_top_heads(2, "l2", ties="lowest")
    logits = model.run_with_hooks(tokens, fwd_hooks=[*manipulate_span(mode, SPAN), *top])
    n_keys = model.cfg.layers[LAYER].mixer.n_keys
    changed = by_hand(mode, plain_pattern(model, tokens), [SPAN], n_keys)
    assert_close(logits, with_pattern(model, tokens, changed, top))
    last = model.run_with_hooks(tokens, fwd_hooks=[*top, *manipulate_span(mode, SPAN)])
    if mode in ("only", "omit", "binary"):
        assert relative(last, logits) > 1e-3  # chosen before the change


@models
@every_change
def test_on_some_rows(model: HookedHybrid, mode: str):
    tokens = random_tokens(3, N_POS)
    hooks = manipulate_span(mode, [[(1, 2)], SPANS_OF[1], SPANS_OF[2]])
    on_some = [(where, interventions.on_rows(fn, [1, 2])) for where, fn in hooks]
    logits = model.run_with_hooks(tokens, fwd_hooks=on_some)
    assert_close(logits[0], model(tokens)[0])
    for row in (1, 2):
        single = manipulate_span(mode, SPANS_OF[row])
        alone = model.run_with_hooks(tokens[row : row + 1], fwd_hooks=single)
        assert_close(logits[row], alone[0])


@models
@every_change
def test_at_some_positions(model: HookedHybrid, mode: str):
    tokens, at = random_tokens(2, N_POS), [9, 10, 12]
    hooks = manipulate_span(mode, SPAN)
    some = [(where, interventions.hook_at(fn, at)) for where, fn in hooks]
    logits, pattern = run_and_see(model, tokens, some)
    plain = plain_pattern(model, tokens)
    every = by_hand(mode, plain, [SPAN], model.cfg.layers[LAYER].mixer.n_keys)
    expected = plain.clone()
    expected[:, :, at] = every[:, :, at]
    assert_close(pattern, expected)
    assert_close(logits, with_pattern(model, tokens, expected))


@models
def test_boost_at_some_positions(model: HookedHybrid):
    tokens, at = random_tokens(2, N_POS), [9, 10, 12]
    hooks = boost_span(2, SPAN, 1.5)

    def z_of(hooks: Any) -> Tensor:
        with model.hooks(hooks):
            return model.run_with_cache(tokens)[1]["z", LAYER]

    expected = z_of([])
    expected[:, at] = z_of(hooks)[:, at]
    assert_close(z_of([(where, interventions.hook_at(fn, at)) for where, fn in hooks]), expected)


# --- boost ----------------------------------------------------------------------------------------


def boosted_by_hand(
    model: HookedHybrid, tokens: Tensor, k: int, spans: list[tuple[int, int]], scale: float
) -> tuple[Tensor, Tensor]:
    """Return logits and pattern of a forward whose pattern and heads come from loops."""
    _, seen = model.run_with_cache(tokens, names_filter=[SCORES, PATTERN])
    scores, plain = seen[SCORES], seen[PATTERN]
    span = {p for start, stop in spans for p in range(start, stop)}
    n_keys = model.cfg.layers[LAYER].mixer.n_keys
    pattern = plain.clone()
    keep = torch.zeros(plain.shape[:3], dtype=torch.bool)
    for row in range(tokens.shape[0]):
        for q in range(tokens.shape[1]):
            visible = [p for p in range(q + 1) if n_keys is None or q - p < n_keys]
            norms = [math.hypot(*plain[row, h, q].tolist()) for h in range(plain.shape[1])]
            best = sorted(range(len(norms)), key=lambda h: -norms[h])[:k]
            for h in best:
                keep[row, h, q] = True
                old = {p: float(scores[row, h, q, p]) for p in visible}
                top = max(old.values())
                new = {p: top * scale if p in span else s for p, s in old.items()}
                total = sum(math.exp(s) for s in new.values())
                for p, s in new.items():
                    pattern[row, h, q, p] = math.exp(s) / total

    def silence(z: Tensor, hook: HookPoint) -> Tensor:
        return z * keep.transpose(1, 2)[..., None]

    also = [(f"blocks.{LAYER}.attn.hook_z", silence)]
    return with_pattern(model, tokens, pattern, also), pattern


@models
@pytest.mark.parametrize("k", [0, 1, 3, 4])
def test_boost_is_that_of_loops(model: HookedHybrid, k: int):
    tokens = random_tokens(2, N_POS)
    spans = [(5, 9), (12, 13)]
    hooks = boost_span(k, spans, 1.5, "l2", ties="lowest")
    logits, pattern = run_and_see(model, tokens, hooks)
    expected, expected_pattern = boosted_by_hand(model, tokens, k, spans, 1.5)
    assert_close(logits, expected)
    assert_close(pattern, expected_pattern)
    top = interventions.keep_top_heads(k, "l2", ties="lowest")
    unboosted = model.run_with_hooks(tokens, fwd_hooks=top)
    assert k == 0 or relative(logits, unboosted) > 1e-3


@every_model
@sides
def test_boost_of_padded_rows_equals_single_runs_and_may_be_cut(
    model: HookedHybrid, side: str, monkeypatch: pytest.MonkeyPatch
):
    tokens, mask = padded(side)
    k = torch.tensor([1, 2, 3])
    hooks = boost_span(k, SPANS_OF, 1.5, "entropy", ties="lowest")
    logits = model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
    for row, spans in enumerate(SPANS_OF):
        real = mask[row].bool()
        one = boost_span(int(k[row]), spans, 1.5, "entropy", ties="lowest")
        alone = model.run_with_hooks(tokens[row][real][None], fwd_hooks=one)
        assert_close(logits[row][real], alone[0])
    with torch.no_grad(), monkeypatch.context() as patch:
        patch.setattr(
            "hooked_hybrid.model.language_model.piece_length", lambda n, p: piece_length(n, p, 4)
        )
        pieces = model.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=mask)
    assert_close(pieces[mask.bool()], logits[mask.bool()])


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    "spans",
    [
        (3, 3),
        (-1, 2),
        (5, 4),
        (1, 2, 3),
        (1.0, 2.0),
        3,
        [],
        [(1, 2), 3],
        [[(1, 2)], []],
        [[[(1, 2)]]],
        "ab",
        torch.tensor([1, 2]),
        torch.tensor([[1.0, 2.0]]),
        torch.tensor([[1, 2, 3]]),
        torch.ones(2, 2, dtype=torch.bool),
        torch.zeros(0, 2, dtype=torch.long),
    ],
    ids=str,
)
def test_what_is_no_span_is_refused_at_once(spans: Any):
    for make in (
        lambda: manipulate_span("keep", spans),
        lambda: boost_span(1, spans, 1.5),
        lambda: check_spans(spans, 50),
    ):
        with pytest.raises(ValueError, match="spans="):
            make()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "all"}, "mode='all': give one of keep, null, only"),
        ({"layers": []}, "layers \\(\\): give one or more"),
        ({"layers": [-1]}, "counted from 0"),
        ({"heads": []}, "heads \\(\\): give one or more"),
        ({"heads": {2: [-1]}}, "heads\\[2\\] \\(-1,\\): .*counted from 0"),
        ({"heads": {}}, "one or more"),
        ({"heads": {2: [1]}, "layers": [2]}, "leave layers out"),
    ],
)
def test_bad_arguments_are_refused_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        manipulate_span(**{"mode": "omit", "spans": SPAN, **options})


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": -1}, "0 or more"),
        ({"k": 1.5}, "whole number"),
        ({"score": "peak"}, "score='peak'"),
        ({"ties": "first"}, "ties='first'"),
        ({"scale": math.nan}, "finite"),
    ],
)
def test_bad_arguments_of_boost_are_refused_at_once(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        boost_span(**{"k": 1, "spans": SPAN, "scale": 1.5, **options})


@pytest.mark.parametrize("name", ["griffin-deep"])
def test_layers_and_heads_that_are_not_are_named_and_nothing_is_left(model: HookedHybrid):
    tokens = random_tokens(2, N_POS)
    with pytest.raises(HookNameError, match="blocks.1.attn.hook_pattern, blocks.4.attn"):
        model.run_with_hooks(tokens, fwd_hooks=manipulate_span("omit", SPAN, layers=[1, 2]))
    for heads in ([1, 4], {1: [4]}):
        with pytest.raises(ValueError, match="head 4: layer 1 has heads 0 to 3"):
            model.run_with_hooks(tokens, fwd_hooks=manipulate_span("omit", SPAN, heads=heads))
    with pytest.raises(ValueError, match="k=5: layer 1 has 4 heads"):
        model.run_with_hooks(tokens, fwd_hooks=boost_span(5, SPAN, 1.5))
    assert not model.list_hooks()


@pytest.mark.parametrize("name", ["griffin"])
@pytest.mark.parametrize("n", [1, 3])
def test_spans_and_k_for_another_number_of_rows(model: HookedHybrid, n: int):
    tokens = random_tokens(2, N_POS)
    spans, k = torch.tensor([SPAN] * n), torch.ones(n, dtype=torch.long)
    for hooks, what in (
        (manipulate_span("omit", spans), "spans"),
        (boost_span(1, spans, 1.5), "spans"),
        (boost_span(k, SPAN, 1.5), "k"),
    ):
        with pytest.raises(ValueError, match=f"{what} has {n} entries, the batch has 2 rows"):
            model.run_with_hooks(tokens, fwd_hooks=hooks)
    # a forward of some rows of a larger batch says so
    hooks = manipulate_span("omit", torch.tensor([(1, 2), (1, 2), SPAN]))
    some = model.run_with_hooks(tokens[:1], fwd_hooks=hooks, rows=torch.tensor([2]))
    assert_close(some, model.run_with_hooks(tokens[:1], fwd_hooks=manipulate_span("omit", SPAN)))


@models
def test_a_span_after_the_tokens_is_an_error_in_generation_alone(model: HookedHybrid):
    tokens, mask = padded("left")

    def generate(**hooks: Any) -> None:
        model.generate(tokens, 2, attention_mask=mask, stop_at_eos=False, verbose=False, **hooks)

    # the first new token is read before hooks of generation are called: rows have one token more
    generate(generation_hooks=manipulate_span("omit", [[(5, 24)], [(2, 11)], [(11, 15)]]))
    for hooks in (
        manipulate_span("omit", [[(5, 9)], [(2, 4), (9, 12)], [(11, 12)]]),
        boost_span(1, [[(5, 9)], [(9, 12), (2, 4)], [(11, 12)]], 1.5),
    ):
        with pytest.raises(ValueError, match="row 1 ends at 12, but the row has 11 tokens"):
            generate(generation_hooks=hooks)
        generate(prefill_hooks=hooks)
    assert_close(
        model.run_with_hooks(tokens, fwd_hooks=manipulate_span("omit", (N_POS, N_POS + 2))),
        model(tokens),
    )


def test_check_spans():
    check_spans((5, 9), 9)
    check_spans([(5, 9), (1, 2)], [9, 12])
    check_spans(SPANS_OF, torch.tensor(LENGTHS))
    check_spans(SPANS_OF, N_POS)
    with pytest.raises(ValueError, match="row 0 ends at 9, but the row has 8 tokens"):
        check_spans((5, 9), 8)
    with pytest.raises(ValueError, match="row 1 ends at 9, but the row has 8 tokens"):
        check_spans((5, 9), [9, 8])
    with pytest.raises(ValueError, match="row 2 ends at 12, but the row has 11 tokens"):
        check_spans(SPANS_OF, [N_POS, 10, 11])
    with pytest.raises(ValueError, match="spans has 3 entries, lengths 2"):
        check_spans(SPANS_OF, [N_POS, 10])
