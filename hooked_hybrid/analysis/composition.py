"""Composition scores: how much one component reads of another's output, by their weights.

    ||W_out W_in|| / (||W_out|| ||W_in||)      Frobenius norms

`W_out` is the writer's map into the residual stream and `W_in` the reader's map out of it,
including the reader's `ln1` weight. For attention both are whole circuits, as in Elhage et al.
2021. A recurrence is not linear from input to output, but begins and ends with linear maps for each
gate block:

    writer     a head: W_V W_O          a gate block: its rows of W_out
    reader     Q: (W_Q R W_K^T)         in: its columns of W_x, the recurrent branch
               K: the same, transposed  gate: its columns of W_y, the gate branch
               V: W_V W_O

A Mamba block, whose channels share B and C, is one component. MLPs are not included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.analysis.circuit_scores import Kind, score_of
from hooked_hybrid.analysis.circuits import (
    norm_weight,
    ov_circuit,
    qk_circuit,
    recurrence_at,
    recurrent_maps,
    require_one_mixer,
)
from hooked_hybrid.analysis.pair_scores import PairScores, Part
from hooked_hybrid.analysis.token_circuits import NO_ATTENTION, TokenSource, full_qk_circuit
from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.weights.factored import FactoredMatrix
from hooked_hybrid.options import refuse_ignored

Mode = Literal["Q", "K", "V", "in", "gate"]
HEAD_MODES = ("Q", "K", "V")


def composition_scores(
    left: FactoredMatrix, right: FactoredMatrix, broadcast_dims: bool = True
) -> Float[Tensor, "*matrix"]:
    """Return `||left right|| / (||left|| ||right||)`, in Frobenius norms; 0 where one of them is 0.

    It is between 0 and 1. For a fixed matrix and a randomly rotated one, in the n dimensions
    between them, the mean square is exactly 1 / n, for all shapes.

    Args:
        left: [... m n], the writer, which multiplies rows.
        right: [... n r], the reader.
        broadcast_dims: compare every left matrix with every right one: [*left, *right]. False:
            leading dimensions are broadcast against each other.

    Raises:
        ValueError: shapes that do not fit.

    Source: Elhage et al. 2021; arguments as in TransformerLens's `composition_scores`.

    Examples:
        >>> ov, qk = analysis.ov_circuit(model, 2), analysis.qk_circuit(model, 5)
        >>> analysis.composition_scores(ov, qk.T).shape  # heads of layer 2 into keys of layer 5
        torch.Size([8, 8])
    """
    if broadcast_dims:
        for _ in range(right.ndim - 2):
            left = left.unsqueeze(left.ndim - 2)
    return _composition(left.collapse_l(), right.collapse_r())


def all_composition_scores(
    model: HookedHybrid, mode: Mode, distance: int = 0, by_block: bool = True
) -> PairScores:
    """Return the composition of every head and recurrence with every later one.

    Args:
        model: any hybrid.
        mode: the input of the reader. "Q", "K", "V": queries, keys or values of heads. "in",
            "gate": the recurrent branch or the gate branch of recurrences.
        distance: tokens between query and key, for "Q" and "K" under rotary positions.
        by_block: gate blocks of an RG-LRU are separate components; False: layers are components.

    Returns:
        Writers are all heads and recurrences, in order of layers. The baseline is 1/sqrt(d_model),
        the root mean square over random rotations of the residual stream between the two; `z` is
        the distance of a squared score from its mean there, in standard deviations. A map of rank r
        with equal singular values scores at most 1/sqrt(r), not far from the baseline: a circuit of
        many dimensions is visible in `z`, hardly in `values`.

    Raises:
        ValueError: another mode, no layer with such inputs, a distance that a layer does not see,
            or a distance for a mode that does not depend on it.

    Source: Elhage et al. 2021 for Q, K and V; the baseline there is an average over random matrices
    of the same shapes, which is equal up to sampling; `z` is ours.

    Examples:
        >>> scores = analysis.all_composition_scores(model, "K")
        >>> scores.values.shape, round(scores.baseline, 3)
        (torch.Size([48, 16]), 0.088)
    """
    if mode not in (modes := get_args(Mode)):
        raise ValueError(f"mode={mode!r}: give one of {', '.join(modes)}")
    cfg = model.cfg
    if mode not in ("Q", "K"):
        refuse_ignored(
            "only queries and keys depend on it, modes 'Q' and 'K'", distance=distance or None
        )
    reading = cfg.attention_layers if mode in HEAD_MODES else cfg.recurrent_layers
    if not reading:
        kind = "attention" if mode in HEAD_MODES else "recurrent"
        raise ValueError(f"mode={mode!r}: this model has no {kind} layer")
    with torch.no_grad():
        writes = {i: _writer(model, i, by_block) for i in _writing(cfg)}
        reads = {i: _reader(model, mode, i, distance, by_block) for i in reading}
        values, z = (
            torch.cat([_row(of_pair, i, W_out, reads) for i, W_out in writes.items()])
            for of_pair in (_composition, _deviation)
        )
    writers = tuple(p for i, W in writes.items() for p in _parts(model, i, W.shape[0]))
    readers = tuple(p for i, W in reads.items() for p in _parts(model, i, W.shape[0]))
    return PairScores(f"{mode}-composition", writers, readers, values, cfg.d_model**-0.5, z)


def all_matching_scores(
    model: HookedHybrid,
    distance: int = 0,
    kind: Kind = "eigenvalues",
    *,
    centred: bool = True,
    tokens: TokenSource = "embedding",
    lag: int | None = None,
    vocab: Int[Tensor, " token"] | None = None,
) -> PairScores:
    """Return how strongly each head matches its own token in the output of earlier components.

    A large score is half of an induction circuit, measured from the weights: the writer moves a
    token to later positions, and the head's query for that token matches it there
    (`matching_scores` with `through`). For recurrences the linear path is used
    (`recurrent_circuit`).

    Args:
        model: any hybrid with attention.
        distance, kind, centred, tokens, lag, vocab: as for `matching_scores`; with a lag of 1, a
            recurrence acts as a previous-token head, through its convolution.

    Returns:
        Writers are heads and gate blocks, readers heads. The baseline is chance: 0 for eigenvalues,
        0.5 for "rank", one over the number of tokens for "top1".

    Raises:
        ValueError: another kind, or a model without attention.

    Examples:
        >>> scores = analysis.all_matching_scores(model, kind="rank", vocab=list(range(40)))
        >>> scores.values.shape, scores.baseline
        (torch.Size([48, 16]), 0.5)
    """
    score = score_of(kind, centred)
    cfg = model.cfg
    if not cfg.attention_layers:
        raise ValueError(NO_ATTENTION)
    n_parts = {i: _writer(model, i, by_block=True).shape[0] for i in _writing(cfg)}
    writers = tuple(p for i, n in n_parts.items() for p in _parts(model, i, n))
    readers = tuple(p for i in cfg.attention_layers for p in _parts(model, i, n_parts[i]))
    values = at_least_fp32(model.W_E).new_zeros(len(writers), len(readers))
    with torch.no_grad():
        for row, writer in enumerate(writers):
            for j in cfg.attention_layers:
                if writer.layer < j:
                    circuit = full_qk_circuit(
                        model,
                        j,
                        distance,
                        tokens=tokens,
                        through=writer.at,
                        lag=lag if writer.layer in cfg.recurrent_layers else None,
                        vocab=vocab,
                    )
                    values[row, [r.layer == j for r in readers]] = score(circuit)
    n_tokens = cfg.d_vocab if vocab is None else len(vocab)
    chance = {"eigenvalues": 0.0, "rank": 0.5, "top1": 1 / n_tokens}[kind]
    return PairScores(f"matching through, {kind}", writers, readers, values, chance)


def _deviation(
    W_out: Float[Tensor, "*#pair k d_model"], W_in: Float[Tensor, "*#pair d_model m"]
) -> Float[Tensor, "*pair"]:
    """Return the distance of the squared score from its mean under rotations, in deviations.

    ||W_out W_in||^2 = tr(G H), G and H being the Gram matrices in the n dimensions of the stream.
    Over rotations of one against the other its mean is tr(G) tr(H) / n and its variance
    2 ||G'||^2 ||H'||^2 / ((n - 1) (n + 2)), with G' and H' the two without their traces.
    """
    n = W_out.shape[-1]
    product = FactoredMatrix(W_out, W_in).norm().square()
    sizes, spreads = [], []
    for small in (W_out, W_in.mT):
        gram = small @ small.mT if small.shape[-2] < n else small.mT @ small
        sizes.append(gram.diagonal(dim1=-2, dim2=-1).sum(-1))
        spreads.append(torch.linalg.matrix_norm(gram).square() - sizes[-1].square() / n)
    variance = 2 * spreads[0] * spreads[1] / ((n - 1) * (n + 2))
    excess = product - sizes[0] * sizes[1] / n
    return torch.where(variance > 0, excess / variance.where(variance > 0, 1).sqrt(), 0)


def _row(
    of_pair: Callable[[Tensor, Tensor], Tensor],
    layer: int,
    W_out: Float[Tensor, "part k d_model"],
    reads: Mapping[int, Float[Tensor, "_part d_model _m"]],
) -> Float[Tensor, "part reader"]:
    """Return one layer's scores with every reader, 0 for readers that are not later."""
    return torch.cat(
        [
            of_pair(W_out[:, None], W_in)
            if layer < i
            else W_out.new_zeros(W_out.shape[0], W_in.shape[0])
            for i, W_in in reads.items()
        ],
        dim=1,
    )


def _composition(
    W_out: Float[Tensor, "*#pair k d_model"], W_in: Float[Tensor, "*#pair d_model m"]
) -> Float[Tensor, "*pair"]:
    """Return the score of each pair, leading dimensions broadcast."""
    product = FactoredMatrix(W_out, W_in).norm()
    scale = torch.linalg.matrix_norm(W_out) * torch.linalg.matrix_norm(W_in)
    return torch.where(scale > 0, product / scale.where(scale > 0, 1), 0)


def _parts(model: HookedHybrid, layer: int, n: int) -> list[Part]:
    is_attention = layer in model.cfg.attention_layers
    if not is_attention and n == 1:
        return [Part(layer, 0, "layer")]
    return [Part(layer, i, "head" if is_attention else "block") for i in range(n)]


def _writing(cfg: HybridConfig) -> list[int]:
    return [i for i, layer in enumerate(cfg.layers) if layer.mixers]


def _writer(model: HookedHybrid, layer: int, by_block: bool) -> Float[Tensor, "part k d_model"]:
    require_one_mixer(model, layer)
    if layer in model.cfg.attention_layers:
        return ov_circuit(model, layer, with_norm=True).collapse_l()
    W_out = recurrent_maps(recurrence_at(model, layer))["out"]
    return W_out if by_block else W_out.flatten(0, 1)[None]


def _reader(
    model: HookedHybrid, mode: Mode, layer: int, distance: int, by_block: bool
) -> Float[Tensor, "part d_model m"]:
    if mode == "V":
        return ov_circuit(model, layer, with_norm=True).collapse_r()
    if mode in HEAD_MODES:
        circuit = qk_circuit(model, layer, distance, with_norm=True)
        return (circuit if mode == "Q" else circuit.T).collapse_r()
    W_in = recurrent_maps(recurrence_at(model, layer))[mode] * norm_weight(model, layer)[:, None]
    return W_in if by_block else rearrange(W_in, "n d e -> 1 d (n e)")
