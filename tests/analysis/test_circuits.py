"""Circuits of weights against what the model itself computes."""

from __future__ import annotations

from functools import cache
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import FactoredMatrix, HookedHybrid
from hooked_hybrid.analysis.circuit_scores import (
    centre,
    eigenvalue_score,
    rank_score,
    score_of,
    top1_score,
)
from hooked_hybrid.analysis.circuits import (
    norm_weight,
    ov_circuit,
    qk_circuit,
    recurrent_circuit,
)
from hooked_hybrid.analysis.planted import BOS, N_SPECIAL, N_SYMBOLS, Planted, planted_retrieval
from hooked_hybrid.analysis.token_circuits import (
    copying_scores,
    full_ov_circuit,
    full_qk_circuit,
    matching_scores,
    token_directions,
    written_tokens,
)
from hooked_hybrid.model.folding import fold_ln
from hooked_hybrid.presets import configs as presets
from tests.models import (
    CONFIGS,
    D_VOCAB,
    griffin_config,
    jamba_config,
    random_model,
    random_tokens,
    relative,
    tiny_model,
)
from tests.tolerances import BF16, FP32_CANCELLED, FP32_COUNTS, FP32_PARITY

each = pytest.mark.parametrize("name", CONFIGS)
SYMBOLS = torch.arange(N_SPECIAL, N_SYMBOLS)


model_of = cache(tiny_model)


@cache
def planted(noise: float = 0.0) -> Planted:
    return planted_retrieval(noise)


@cache
def first_layer_attends(family: str) -> HookedHybrid:
    """A model whose attention reads embeddings, with heads to spare."""
    cfg = griffin_config("AR") if family == "griffin" else jamba_config("AM")
    return random_model(cfg)


def cached(model: HookedHybrid, layer: int, mask: Tensor | None = None) -> Any:
    names = [
        f"blocks.{layer}.{n}"
        for n in ("ln1.hook_normalized", "attn.hook_attn_scores", "attn.hook_v", "attn.hook_result")
    ]
    return model.run_with_cache(random_tokens(), names_filter=names, attention_mask=mask)[1]


@each
@pytest.mark.parametrize("padded", [False, True])
def test_qk_gives_the_models_own_scores_at_every_distance(name: str, padded: bool) -> None:
    model = model_of(name)
    layer = model.cfg.attention_layers[0]
    attention = model.cfg.layers[layer].mixer
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[0, : 5 * padded] = 0
    cache = cached(model, layer, mask if padded else None)
    normalized = cache[f"blocks.{layer}.ln1.hook_normalized"]
    scores = cache[f"blocks.{layer}.attn.hook_attn_scores"]
    largest = float(scores[scores > -1e30].abs().max())
    x = normalized * norm_weight(model, layer)
    for distance in range(attention.n_keys or 20):
        qk = qk_circuit(model, layer, distance, scaled=True)
        direct = qk_circuit(model, layer, distance, scaled=True, with_norm=True)
        assert tuple(qk.shape) == (attention.n_heads, 24, 24)
        for q in range(distance, 20):
            k = q - distance
            real = mask[:, k].bool() & mask[:, q].bool()
            expected = scores[real, :, q, k]
            for circuit, stream in ((qk, x), (direct, normalized)):
                ours = torch.einsum("bd,hde,be->bh", stream[real, q], circuit.AB, stream[real, k])
                if real.any():
                    assert float((ours - expected).abs().max()) < FP32_PARITY * largest


def test_only_the_rotated_half_of_a_head_turns() -> None:
    model = model_of("griffin")
    rotary = model.cfg.layers[2].mixer.rotary
    assert rotary is not None and rotary.d_rotary == 4
    near, far = qk_circuit(model, 2, 0), qk_circuit(model, 2, 5)
    assert relative(near.AB, far.AB) > 0.1
    assert torch.equal(near.A[..., 4:], far.A[..., 4:])
    assert torch.equal(near.B, far.B)
    assert relative(far.norm(), near.norm()) > 1e-3  # the product is not a rotation of the other


def test_without_rotary_positions_distance_does_not_matter() -> None:
    model = model_of("jamba")
    near, far = (qk_circuit(model, 2, n) for n in (0, 10_000))
    assert torch.equal(near.A, far.A) and torch.equal(near.B, far.B)
    assert relative(near.AB, model.blocks[2].attn.QK.AB) < FP32_PARITY


@each
def test_ov_gives_what_a_head_writes_for_one_key(name: str) -> None:
    model = model_of(name)
    layer = model.cfg.attention_layers[0]
    cache = cached(model, layer)
    normalized = cache[f"blocks.{layer}.ln1.hook_normalized"]
    # At position 0 a head attends to itself alone.
    expected = cache[f"blocks.{layer}.attn.hook_result"][:, 0]
    ov = ov_circuit(model, layer, with_norm=True)
    assert relative(torch.einsum("bd,hde->bhe", normalized[:, 0], ov.AB), expected) < FP32_PARITY
    x = normalized[:, 0] * norm_weight(model, layer)
    plain = torch.einsum("bd,hde->bhe", x, ov_circuit(model, layer).AB)
    assert relative(plain, expected) < FP32_PARITY


@each
def test_circuits_with_the_norm_are_those_of_the_folded_model(name: str) -> None:
    model = model_of(name)
    other, _ = fold_ln(model)
    attention, recurrent = model.cfg.attention_layers[0], model.cfg.recurrent_layers[0]
    for circuit, layer in (
        (qk_circuit, attention),
        (ov_circuit, attention),
        (recurrent_circuit, recurrent),
    ):
        ours = circuit(model, layer, with_norm=True).AB
        assert relative(ours, circuit(other, layer).AB) < FP32_PARITY
        assert relative(ours, circuit(model, layer).AB) > 0.05
    assert relative(full_ov_circuit(model, attention).AB, full_ov_circuit(other, attention).AB) < (
        FP32_PARITY
    )


@pytest.mark.parametrize("family", ["griffin", "jamba"])
def test_full_qk_is_the_scores_of_the_first_layer(family: str) -> None:
    model = first_layer_attends(family)
    tokens = random_tokens()
    scores = model.run_with_cache(tokens, names_filter="blocks.0.attn.hook_attn_scores")[1][
        "blocks.0.attn.hook_attn_scores"
    ]
    for distance in (0, 1, 6):
        circuit = full_qk_circuit(model, 0, distance, scaled=True).AB
        q = torch.arange(distance, 20)
        ours = circuit[:, tokens[:, q], tokens[:, q - distance]].transpose(0, 1)
        assert relative(ours, scores[:, :, q, q - distance]) < FP32_PARITY


@pytest.mark.parametrize("family", ["griffin", "jamba"])
def test_full_ov_is_what_a_head_adds_to_the_logits(family: str) -> None:
    """Of single tokens: the head's write, through the final norm with its scale held."""
    model = first_layer_attends(family)
    tokens = torch.arange(D_VOCAB)[:, None]
    names = ["blocks.0.attn.hook_result", "ln_final.hook_scale"]
    _, cache = model.run_with_cache(tokens, names_filter=names)
    write, scale = cache[names[0]][:, 0], cache[names[1]][:, 0, :, None]
    expected = (write / scale * model.ln_final.w) @ model.W_U
    circuit = full_ov_circuit(model, 0)
    assert tuple(circuit.shape) == (4, D_VOCAB, D_VOCAB) and isinstance(circuit, FactoredMatrix)
    assert relative(circuit.AB.transpose(0, 1) / scale, expected) < FP32_PARITY


@each
def test_directions_of_tokens(name: str) -> None:
    model = model_of(name)
    layer = model.cfg.attention_layers[0]
    ids = torch.tensor([5, 3, 17])
    _, cache = model.run_with_cache(ids[:, None])
    embedded = token_directions(model, layer, vocab=ids)
    assert relative(embedded, cache["hook_embed"][:, 0]) < FP32_PARITY
    alone = token_directions(model, layer, "alone", ids)
    assert relative(alone, cache["resid_pre", layer][:, 0]) < FP32_PARITY
    mine = torch.randn(D_VOCAB, 24)
    assert torch.equal(token_directions(model, layer, mine, ids), mine[ids])
    everything = token_directions(model, layer, "alone")
    assert everything.shape == (D_VOCAB, 24) and relative(everything[ids], alone) < FP32_PARITY


def test_alone_makes_scores_exact_where_attention_is_not_first() -> None:
    """A single token sees itself: its score is the diagonal at distance 0."""
    model = model_of("griffin")
    tokens = torch.arange(D_VOCAB)[:, None]
    name = "blocks.2.attn.hook_attn_scores"
    scores = model.run_with_cache(tokens, names_filter=name)[1][name][:, :, 0, 0]
    circuit = full_qk_circuit(model, 2, scaled=True, tokens="alone").AB
    assert relative(circuit.diagonal(dim1=1, dim2=2).T, scores) < FP32_PARITY


@pytest.mark.parametrize(("name", "layer"), [("griffin", 0), ("griffin-gqa-ends-in-attention", 0)])
def test_the_linear_path_is_the_block_with_its_gates_held_at_one(name: str, layer: int) -> None:
    """Gates at 1 and nothing kept: a token's write is that of the current tap."""
    model = model_of(name)
    path = f"blocks.{layer}.mixer"
    held = [
        (f"{path}.hook_gate", lambda x, hook: torch.ones_like(x)),
        (f"{path}.hook_ssm_write", lambda x, hook: cache[f"{path}.hook_conv"] - bias),
        (f"{path}.hook_log_decay", lambda x, hook: torch.full_like(x, -torch.inf)),
    ]
    mixer = model.blocks[layer].mixer
    bias = mixer.conv.bias
    # A token alone, so that one tap sees it; without the bias of linear_x.
    names = [f"{path}.hook_conv", f"blocks.{layer}.ln1.hook_normalized"]
    tokens = random_tokens(4, 1)
    with model.hooks(fwd_hooks=[(f"{path}.hook_in_proj", lambda x, hook: x - mixer.linear_x.bias)]):
        _, cache = model.run_with_cache(tokens, names_filter=names)
        with model.hooks(fwd_hooks=held):
            _, ours = model.run_with_cache(tokens, names_filter=f"blocks.{layer}.hook_mixer_out")
    expected = ours[f"blocks.{layer}.hook_mixer_out"][:, 0] - mixer.linear_out.bias
    x = cache[f"blocks.{layer}.ln1.hook_normalized"][:, 0]
    circuit = recurrent_circuit(model, layer, lag=0, with_norm=True)
    assert circuit.shape[0] == mixer.cfg.n_gate_blocks
    assert relative(x @ circuit.AB.sum(0), expected) < FP32_PARITY


@each
@pytest.mark.parametrize("lag", [0, 1])
def test_the_linear_path_is_the_product_of_three_maps(name: str, lag: int) -> None:
    model = model_of(name)
    mixer = model.blocks[0].mixer
    taps = mixer.conv.weight[-1 - lag]
    if hasattr(mixer, "linear_x"):
        W_in, W_out, n = mixer.linear_x.W, mixer.linear_out.W, mixer.cfg.n_gate_blocks
    else:
        W_in, W_out, n = mixer.in_proj.W[:, : mixer.cfg.d_inner], mixer.out_proj.W, 1
    circuit = recurrent_circuit(model, 0, lag)
    assert tuple(circuit.shape) == (n, 24, 24)
    size = len(taps) // n
    for block in range(n):
        mine = slice(block * size, (block + 1) * size)
        expected = W_in[:, mine] @ taps[mine].diag() @ W_out[mine]
        assert relative(circuit[block].AB, expected) < FP32_PARITY


@each
def test_taps_of_all_lags_sum_to_the_path_from_far_back(name: str) -> None:
    model = model_of(name)
    n_taps = model.blocks[0].mixer.conv.weight.shape[0]
    lags = sum(recurrent_circuit(model, 0, lag).AB for lag in range(n_taps))
    assert relative(lags, recurrent_circuit(model, 0).AB) < FP32_PARITY
    with pytest.raises(ValueError, match=f"lag={n_taps}: .* has lags 0 to {n_taps - 1}"):
        recurrent_circuit(model, 0, n_taps)


def test_written_tokens_are_those_of_the_named_component() -> None:
    model = first_layer_attends("jamba")
    read = token_directions(model, 0)
    read = read * (read.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    for component, circuit in (((0, 3), ov_circuit(model, 0, with_norm=True)[3]),):
        assert relative(written_tokens(model, component), read @ circuit.AB) < FP32_PARITY
    block = recurrent_circuit(model, 1, with_norm=True)[0]
    assert relative(written_tokens(model, (1, 0)), read @ block.AB) < FP32_PARITY
    with pytest.raises(ValueError, match=r"\(1, 1\): layer 1 has components 0 to 0"):
        written_tokens(model, (1, 1))


def test_eigenvalue_score_of_matrices_made_by_hand() -> None:
    values = torch.tensor([3.0, 2.0, -1.0])
    basis = torch.linalg.qr(torch.randn(8, 3, generator=torch.Generator().manual_seed(0))).Q
    matrix = FactoredMatrix(basis * values, basis.T)
    assert float(eigenvalue_score(matrix)) == pytest.approx(4 / 6, abs=1e-6)
    turn = FactoredMatrix(torch.eye(2), torch.tensor([[0.0, -1.0], [1.0, 0.0]]))
    assert float(eigenvalue_score(turn)) == pytest.approx(0, abs=1e-6)
    both = FactoredMatrix(torch.zeros(2, 4, 2), torch.zeros(2, 2, 4))
    assert eigenvalue_score(both).tolist() == [0, 0]


def test_rank_and_top1_count_row_by_row_however_many_rows_at_a_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    generator = torch.Generator().manual_seed(0)
    circuit = FactoredMatrix(
        torch.randn(3, 50, 4, generator=generator), torch.randn(3, 4, 50, generator=generator)
    )
    for at_once in (2**24, 3 * 50 * 7, 1):
        monkeypatch.setattr("hooked_hybrid.analysis.circuit_scores.ENTRIES_AT_ONCE", at_once)
        for score, slow in ((top1_score, _slow_top1), (rank_score, _slow_rank)):
            expected = torch.tensor([slow(matrix) for matrix in circuit.AB])
            assert expected.max() > 0
            assert relative(score(circuit), expected) < FP32_COUNTS


def test_ties_are_no_hits() -> None:
    flat = FactoredMatrix(torch.zeros(4, 1), torch.zeros(1, 4))
    assert float(top1_score(flat)) == 0 and float(rank_score(flat)) == 0.5


@each
@pytest.mark.parametrize("kind", ["eigenvalues", "rank", "top1"])
@pytest.mark.parametrize("centred", [True, False])
def test_scores_of_heads_are_those_of_their_circuits(name: str, kind: Any, centred: bool) -> None:
    model = model_of(name)
    slow = {"eigenvalues": _slow_eigenvalues, "rank": _slow_rank, "top1": _slow_top1}[kind]
    copying = copying_scores(model, kind, centred=centred)
    matching = matching_scores(model, 3, kind, centred=centred)
    assert copying.layers == matching.layers == model.cfg.attention_layers
    for layer in copying.layers:
        for scores, circuit in (
            (copying, full_ov_circuit(model, layer)),
            (matching, full_qk_circuit(model, layer, 3)),
        ):
            for head, whole in enumerate(circuit.AB.double()):
                if centred:
                    whole = whole - whole.mean(0)
                    whole = whole - whole.mean(1, keepdim=True)
                assert scores[layer, head] == pytest.approx(slow(whole), abs=1e-4)


def _slow_eigenvalues(matrix: Tensor) -> float:
    values = torch.linalg.eigvals(matrix.double())
    return float(values.real.sum() / values.abs().sum())


def _slow_top1(matrix: Tensor) -> float:
    return sum(int(row.argmax()) == i for i, row in enumerate(matrix)) / len(matrix)


def _slow_rank(matrix: Tensor) -> float:
    below = sum(int((row < row[i]).sum()) for i, row in enumerate(matrix))
    return below / len(matrix) / (len(matrix) - 1)


def test_centred_scores_do_not_see_what_a_softmax_does_not() -> None:
    """A direction that all keys share dwarfs the eigenvalues, and changes no attention."""
    generator = torch.Generator().manual_seed(0)
    A, B = torch.randn(30, 4, generator=generator), torch.randn(4, 30, generator=generator)
    shared = FactoredMatrix(A, B + 100 * torch.ones(4, 30))
    before, after = (eigenvalue_score(centre(c)) for c in (FactoredMatrix(A, B), shared))
    assert relative(after, before) < FP32_CANCELLED
    assert relative(eigenvalue_score(shared), eigenvalue_score(FactoredMatrix(A, B))) > 0.1


def test_scores_over_some_tokens_only() -> None:
    model = model_of("griffin")
    ids = torch.tensor([4, 9, 30, 31])
    block = full_ov_circuit(model, 2).AB[:, ids][:, :, ids]
    assert relative(full_ov_circuit(model, 2, vocab=ids).AB, block) < FP32_PARITY
    assert copying_scores(model, "top1", vocab=ids, centred=False)[2, 1] == _slow_top1(block[1])
    assert relative(full_ov_circuit(model, 2, vocab=ids.tolist()).AB, block) < FP32_PARITY
    with pytest.raises(ValueError, match="give a list of tokens from 0 to"):
        copying_scores(model, vocab=[0, model.cfg.d_vocab])
    keys = full_qk_circuit(model, 2, 2).AB[:, ids][:, :, ids]
    assert relative(full_qk_circuit(model, 2, 2, vocab=ids).AB, keys) < FP32_PARITY


def test_bfloat16_weights_give_float32_circuits() -> None:
    model, half = model_of("griffin"), tiny_model("griffin", dtype=torch.bfloat16)
    circuits = (
        qk_circuit(half, 2, 3, with_norm=True),
        ov_circuit(half, 2),
        recurrent_circuit(half, 0),
    )
    assert {c.A.dtype for c in circuits} == {torch.float32}
    assert relative(circuits[0].AB, qk_circuit(model, 2, 3, with_norm=True).AB) < BF16
    wide = HookedHybrid(half.cfg)
    wide.load_state_dict({n: t.float() for n, t in half.state_dict().items()})
    assert relative(copying_scores(half).values, copying_scores(wide).values) < BF16


def test_a_vocabulary_too_large_to_multiply_out() -> None:
    """200,000 by 200,000 entries would be 160 GB a head."""
    cfg = presets.griffin("A", d_model=8, n_heads=2, d_head=4, d_mlp=8, d_vocab=200_000)
    model = HookedHybrid(cfg).requires_grad_(False)
    scores = copying_scores(model)
    assert scores.values.abs().max() <= 1
    assert full_qk_circuit(model, 0, 1).shape == (2, 200_000, 200_000)


def test_bad_input_is_named() -> None:
    model = model_of("griffin")
    with pytest.raises(ValueError, match=r"layer 1 has no attention; layers that have: \(2,\)"):
        qk_circuit(model, 1)
    with pytest.raises(
        ValueError, match=r"layer 2 is not a recurrence; layers that are: \(0, 1, 3\)"
    ):
        recurrent_circuit(model, 2)
    for distance in (-1, 7):
        with pytest.raises(ValueError, match=f"distance={distance}: .* distances of 0 to 6 tokens"):
            qk_circuit(model, 2, distance)
    with pytest.raises(ValueError, match="kind='best': give one of"):
        unwrap(score_of)("best")
    with pytest.raises(ValueError, match="tokens='embed': give 'embedding', 'alone'"):
        unwrap(token_directions)(model, 2, "embed")
    with pytest.raises(ValueError, match=r"tokens has shape \[3, 24\], not \[61, 24\]"):
        copying_scores(model, tokens=torch.ones(3, 24))
    with pytest.raises(ValueError, match=r"through=\(2, 0\): layer 2 reads what earlier layers"):
        full_qk_circuit(model, 2, through=(2, 0))
    with pytest.raises(ValueError, match="lag=1 is of a recurrence: name it in `through`"):
        matching_scores(model, lag=1)
    with pytest.raises(ValueError, match="no layer after 3 has attention"):
        matching_scores(model, through=(3, 0))
    with pytest.raises(ValueError, match="this model has no attention layer"):
        copying_scores(random_model(griffin_config("R")))


# --- the planted circuit ----------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.0, 0.3])
@pytest.mark.parametrize("kind", ["eigenvalues", "rank", "top1"])
def test_the_planted_head_copies_and_no_other(noise: float, kind: Any) -> None:
    p = planted(noise)
    scores = copying_scores(p.model, kind, vocab=SYMBOLS)
    assert scores.top(1) == [p.head]
    assert scores[p.head] == pytest.approx(1, abs=1e-4)
    second = float(scores.values.flatten().sort().values[-2])
    assert second < {"eigenvalues": 0.3, "rank": 0.65, "top1": 0.15}[kind]


@pytest.mark.parametrize("kind", ["eigenvalues", "rank", "top1"])
def test_the_planted_head_matches_through_the_planted_channels(kind: Any) -> None:
    p = planted()
    scores = matching_scores(p.model, 5, kind, through=p.carrier, vocab=SYMBOLS)
    assert scores.top(1) == [p.head]
    assert scores[p.head] == pytest.approx(1, abs=1e-4)
    # The key also holds what the token itself embeds as, and there the head is repelled.
    direct = matching_scores(p.model, 5, vocab=SYMBOLS)
    assert direct[p.head] == pytest.approx(-1, abs=1e-4)
    assert not bool(torch.isnan(scores.values).any()) and BOS not in SYMBOLS
