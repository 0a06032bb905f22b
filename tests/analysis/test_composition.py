"""Composition scores against their definition, on random rotations, and on a planted circuit."""

from __future__ import annotations

import itertools
from functools import cache
from inspect import unwrap
from typing import Any

import pytest
import torch
from torch import Tensor

from hooked_hybrid import FactoredMatrix, HookedHybrid
from hooked_hybrid.analysis.circuits import ov_circuit, qk_circuit
from hooked_hybrid.analysis.composition import (
    _deviation,
    all_composition_scores,
    all_matching_scores,
    composition_scores,
)
from hooked_hybrid.analysis.pair_scores import PairScores, Part
from hooked_hybrid.analysis.planted import N_SPECIAL, N_SYMBOLS, Planted, planted_retrieval
from hooked_hybrid.analysis.token_circuits import matching_scores
from hooked_hybrid.model.folding import fold_ln
from tests.models import (
    CONFIGS,
    griffin_config,
    jamba_config,
    random_model,
    relative,
    tiny_model,
)
from tests.tolerances import FP32_PARITY

each = pytest.mark.parametrize("name", CONFIGS)
SYMBOLS = torch.arange(N_SPECIAL, N_SYMBOLS)
MODES = ("Q", "K", "V", "in", "gate")
LAYERS = {"griffin": "RARA", "jamba": "MAMA"}


@cache
def deep(family: str) -> HookedHybrid:
    """A model in which everything can compose with everything."""
    config = {"griffin": griffin_config, "jamba": jamba_config}[family]
    return random_model(config(LAYERS[family]))


@cache
def planted(noise: float) -> Planted:
    return planted_retrieval(noise)


def maps_out(model: HookedHybrid) -> dict[str, Tensor]:
    """Every writer as one whole matrix, slice by slice."""
    found = {}
    for i, block in enumerate(model.blocks):
        m, w = block.mixers[0], block.ln1.w[:, None]
        if i in model.cfg.attention_layers:
            per_kv = m.cfg.n_heads // m.cfg.n_kv_heads
            for h in range(m.cfg.n_heads):
                found[f"L{i}H{h}"] = (w * m.W_V[h // per_kv]) @ m.W_O[h]
        elif hasattr(m, "linear_out"):
            size = m.cfg.d_rnn // m.cfg.n_gate_blocks
            for b in range(m.cfg.n_gate_blocks):
                found[f"L{i}B{b}"] = m.linear_out.W[b * size : (b + 1) * size]
        else:
            found[f"L{i}"] = m.out_proj.W
    return found


def maps_in(model: HookedHybrid, mode: str, distance: int) -> dict[str, Tensor]:
    """Every reader as one whole matrix, slice by slice."""
    found = {}
    for i, block in enumerate(model.blocks):
        m, w = block.mixers[0], block.ln1.w[:, None]
        if i in model.cfg.attention_layers:
            if mode not in "QKV":
                continue
            qk = qk_circuit(model, i, distance, with_norm=True).AB
            whole = {"Q": qk, "K": qk.mT, "V": ov_circuit(model, i, with_norm=True).AB}[mode]
            found |= {f"L{i}H{h}": whole[h] for h in range(m.cfg.n_heads)}
        elif mode in "QKV":
            continue
        elif hasattr(m, "linear_x"):
            W = w * (m.linear_x if mode == "in" else m.linear_y).W
            size = m.cfg.d_rnn // m.cfg.n_gate_blocks
            for b in range(m.cfg.n_gate_blocks):
                found[f"L{i}B{b}"] = W[:, b * size : (b + 1) * size]
        else:
            half = m.cfg.d_inner
            found[f"L{i}"] = w * m.in_proj.W[:, half * (mode == "gate") :][:, :half]
    return found


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_every_pair_is_its_definition(family: str, mode: Any) -> None:
    model = deep(family)
    at = {"distance": 3} if mode in ("Q", "K") else {}
    scores = all_composition_scores(model, mode, **at)
    writers, readers = maps_out(model), maps_in(model, mode, 3)
    assert scores.writer_labels == list(writers) and scores.reader_labels == list(readers)
    n_defined = 0
    for w, r in itertools.product(writers, readers):
        if w[1] >= r[1]:
            assert scores[w, r] == 0
            continue
        n_defined += 1
        A, B = writers[w].double(), readers[r].double()
        assert scores[w, r] == pytest.approx(
            float((A @ B).norm() / (A.norm() * B.norm())), rel=FP32_PARITY
        )
    assert n_defined == int(scores.is_defined.sum()) > 0


@pytest.mark.parametrize("mode", MODES)
def test_only_queries_and_keys_depend_on_the_distance(mode: Any) -> None:
    near = all_composition_scores(deep("griffin"), mode).values
    if mode in ("Q", "K"):
        far = all_composition_scores(deep("griffin"), mode, 6).values
        assert relative(near, far) > 1e-3
    else:
        with pytest.raises(ValueError, match="distance=6 has no effect"):
            all_composition_scores(deep("griffin"), mode, 6)


@pytest.mark.parametrize("mode", ["V", "in"])
def test_whole_recurrent_layers_as_components(mode: Any) -> None:
    model = deep("griffin")
    scores = all_composition_scores(model, mode, by_block=False)
    assert scores.writer_labels[:5] == ["L0", "L1H0", "L1H1", "L1H2", "L1H3"]
    A = model.blocks[0].mixer.linear_out.W
    if mode == "V":
        B = ov_circuit(model, 1, with_norm=True)[2].AB
    else:
        B = model.blocks[2].ln1.w[:, None] * model.blocks[2].mixer.linear_x.W
    reader = "L1H2" if mode == "V" else "L2"
    expected = float((A @ B).norm() / (A.norm() * B.norm()))
    assert scores["L0", reader] == pytest.approx(expected, rel=FP32_PARITY)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("mode", MODES)
def test_folding_the_norms_changes_no_score(family: str, mode: Any) -> None:
    model = deep(family)
    folded = all_composition_scores(fold_ln(model)[0], mode)
    assert relative(folded.values, all_composition_scores(model, mode).values) < FP32_PARITY


def test_the_baseline_is_the_root_mean_square_over_random_rotations() -> None:
    """Of matrices as unlike random ones as can be: of rank one, and of falling spectrum."""
    generator = torch.Generator().manual_seed(0)
    n, draws = 20, 4000
    left = torch.randn(3, 1, generator=generator) @ torch.randn(1, n, generator=generator)
    right = torch.randn(n, 7, generator=generator) * torch.arange(1, 8.0)
    turns = torch.linalg.qr(torch.randn(draws, n, n, generator=generator)).Q
    scores = composition_scores(
        FactoredMatrix(left, turns), FactoredMatrix(torch.eye(n), right), broadcast_dims=False
    )
    mean_square = float(scores.square().mean())
    spread = float(scores.square().std())
    assert abs(mean_square - 1 / n) < 4 * spread / draws**0.5 < 0.1 / n
    z = _deviation(left @ turns, right)
    assert abs(float(z.mean())) < 4 / draws**0.5
    assert float(z.std()) == pytest.approx(1, rel=0.1)


@pytest.mark.parametrize("family", LAYERS)
def test_fresh_models_score_at_the_baseline(family: str) -> None:
    config = {"griffin": griffin_config, "jamba": jamba_config}[family]
    torch.manual_seed(0)
    model = HookedHybrid(config(LAYERS[family], d_model=64, n_heads=8))
    for mode in MODES:
        scores = all_composition_scores(model, mode)
        assert scores.baseline == 1 / 8 and scores.z is not None
        assert float(scores.z[scores.is_defined].std()) == pytest.approx(1, abs=0.3)
        defined = scores.values[scores.is_defined]
        assert float(defined.square().mean().sqrt()) == pytest.approx(1 / 8, rel=0.1)
        assert torch.equal(scores.above_baseline()[scores.is_defined], defined - 1 / 8)
        assert not scores.above_baseline()[~scores.is_defined].any()


def test_scores_of_factored_matrices_by_hand_and_broadcast() -> None:
    one = FactoredMatrix(torch.eye(4)[:, :1], torch.eye(4)[:1])  # e1 e1^T
    other = FactoredMatrix(torch.eye(4)[:, 1:2], torch.eye(4)[1:2])  # e2 e2^T
    assert float(composition_scores(one, one)) == pytest.approx(1)
    assert float(composition_scores(one, other)) == pytest.approx(0, abs=1e-6)
    assert float(composition_scores(one, one * 0)) == 0
    generator = torch.Generator().manual_seed(0)
    shapes = ((2, 3, 5, 4), (2, 3, 4, 9), (6, 9, 2), (6, 2, 8))
    A, B, C, D = (torch.randn(s, generator=generator) for s in shapes)
    scores = composition_scores(FactoredMatrix(A, B), FactoredMatrix(C, D))
    assert scores.shape == (2, 3, 6)
    for i, j, k in itertools.product(range(2), range(3), range(6)):
        left, right = A[i, j] @ B[i, j], C[k] @ D[k]
        expected = (left @ right).norm() / (left.norm() * right.norm())
        assert relative(scores[i, j, k], expected) < FP32_PARITY
    same = composition_scores(FactoredMatrix(D.mT, C.mT), FactoredMatrix(C, D), False)
    for k in range(6):
        expected = composition_scores(FactoredMatrix(D[k].mT, C[k].mT), FactoredMatrix(C[k], D[k]))
        assert relative(same[k], expected) < FP32_PARITY
    with pytest.raises(ValueError, match="Cannot multiply"):
        composition_scores(FactoredMatrix(A, B), FactoredMatrix(D, C))


def test_scores_are_addressed_by_label_and_listed_from_the_largest() -> None:
    parts = (Part(0, 0, "layer"), Part(1, 0, "head"), Part(1, 1, "head"), Part(2, 3, "block"))
    values = torch.tensor([[0.1, 0.5, 0.4], [0, 0, 0.9], [0, 0, 0.2], [0, 0, 0]])
    scores = PairScores("test", parts, parts[1:], values, 0.2)
    assert scores.writer_labels == ["L0", "L1H0", "L1H1", "L2B3"]
    assert scores["L0", "L1H1"] == 0.5
    assert [(w, r) for w, r, _ in scores.top(2)] == [("L1H0", "L2B3"), ("L0", "L1H1")]
    assert len(scores.top(100)) == 5 == int(scores.is_defined.sum())
    with pytest.raises(KeyError, match="'L2H3' is none of L1H0, L1H1, L2B3"):
        scores["L0", "L2H3"]


@pytest.mark.parametrize(
    ("family", "kind"), [("griffin", "eigenvalues"), ("jamba", "rank"), ("jamba", "top1")]
)
def test_matching_through_each_writer_is_that_of_the_head(family: str, kind: Any) -> None:
    model = deep(family)
    scores = all_matching_scores(model, 2, kind)
    for writer in scores.writers:
        later = [i for i in model.cfg.attention_layers if i > writer.layer]
        one = matching_scores(model, 2, kind, through=writer.at) if later else None
        for reader in scores.readers:
            expected = 0 if one is None or reader.layer not in later else one[reader.at]
            assert scores[writer.label, reader.label] == pytest.approx(expected, abs=1e-6)
    assert scores.baseline == {"eigenvalues": 0, "rank": 0.5, "top1": 1 / 61}[kind]


def test_the_taps_of_a_convolution_are_looked_through_one_by_one() -> None:
    """The convolution as a previous-token head: only its tap of lag 1 is kept."""
    model = random_model(griffin_config("RA"))
    with torch.no_grad():
        model.blocks[0].mixer.conv.weight[[0, 1, 3]] = 0
    whole = all_matching_scores(model, 2)
    assert relative(all_matching_scores(model, 2, lag=1).values, whole.values) < FP32_PARITY
    assert not all_matching_scores(model, 2, lag=0).values.any()
    one = matching_scores(model, 2, through=(0, 3), lag=1)
    assert one[1, 2] == pytest.approx(whole["L0B3", "L1H2"], abs=1e-6)


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match="mode='X': give one of Q, K, V, in, gate"):
        unwrap(all_composition_scores)(deep("griffin"), "X")
    with pytest.raises(ValueError, match="mode='K': this model has no attention layer"):
        all_composition_scores(random_model(griffin_config("RR")), "K")
    with pytest.raises(ValueError, match="mode='in': this model has no recurrent layer"):
        all_composition_scores(random_model(jamba_config("AA")), "in")
    with pytest.raises(ValueError, match="this model has no attention layer"):
        all_matching_scores(random_model(jamba_config("MM")))


@each
def test_a_model_of_any_kind_has_its_scores(name: str) -> None:
    model = tiny_model(name)
    for mode in MODES:
        values = all_composition_scores(model, mode).values
        assert bool(((values >= 0) & (values <= 1)).all())


# --- the planted circuit ----------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_the_planted_pair_composes_through_keys_most(noise: float) -> None:
    """29 of 64 dimensions: 0.131 where chance is 0.125, but 3.55 standard deviations above it."""
    p = planted(noise)
    scores = all_composition_scores(p.model, "K", distance=5)
    (writer, reader, first), (_, _, second) = scores.top(2, by_z=True)
    assert (writer, reader) == ("L1B2", "L2H1")
    assert first > 3.4 and second < 2.5
    assert scores["L1B2", "L2H1"] == pytest.approx(0.131, abs=1e-3)
    # Its queries and values read nothing that the channel group writes.
    for mode in ("Q", "V"):
        assert all_composition_scores(p.model, mode)["L1B2", "L2H1"] < 1e-3


def test_without_noise_what_writes_nothing_scores_zero() -> None:
    scores = all_composition_scores(planted(0.0).model, "K")
    assert scores.z is not None
    writes = [w in ("L1B2", "L2H1") for w in scores.writer_labels]
    for values in (scores.values, scores.z):
        assert ((values != 0).any(dim=1) == torch.tensor(writes)).all()


@pytest.mark.parametrize(
    ("noise", "kind"), [(0.1, "eigenvalues"), (0.3, "eigenvalues"), (0.3, "rank"), (0.3, "top1")]
)
def test_the_planted_pair_matches_best(noise: float, kind: Any) -> None:
    p = planted(noise)
    scores = all_matching_scores(p.model, 5, kind, vocab=SYMBOLS)
    (writer, reader, first), (_, _, second) = scores.top(2)
    assert (writer, reader) == ("L1B2", "L2H1")
    assert first == pytest.approx(1, abs=1e-3)
    assert second < {"eigenvalues": 0.4, "rank": 0.7, "top1": 0.25}[kind]
    with pytest.raises(ValueError, match="has no z"):
        scores.top(1, by_z=True)
