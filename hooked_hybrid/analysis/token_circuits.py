"""Heads as circuits from token to token: which heads copy, and which match their own token.

A full circuit [token token] goes from embedding to unembedding (OV) or from embedding to embedding
(QK), through the weights between them. Each is a `FactoredMatrix`: it takes only the memory of its
factors, and is never multiplied out as a whole.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.analysis.circuit_scores import Kind, score_of
from hooked_hybrid.analysis.circuits import (
    norm_weight,
    ov_circuit,
    qk_circuit,
    recurrent_circuit,
    require_one_mixer,
)
from hooked_hybrid.analysis.scores import HeadScores
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32, inverse_rms
from hooked_hybrid.network.weights.factored import FactoredMatrix
from hooked_hybrid.options import refuse_ignored

TokenSource = Literal["embedding", "alone"] | Tensor
"""The direction of a token in the residual stream; see `token_directions`."""
ComponentAt = tuple[int, int]
"""(layer, head) of attention; (layer, gate block) of an RG-LRU; (layer, 0) of a Mamba block."""

Vocab = Int[Tensor, " token"] | Sequence[int]
"""Some tokens."""

ALONE_AT_ONCE = 1024
"""Tokens in a batch of one-token texts."""
NO_ATTENTION = "this model has no attention layer"


def token_directions(
    model: HookedHybrid,
    layer: int,
    tokens: TokenSource = "embedding",
    vocab: Vocab | None = None,
) -> Float[Tensor, "token d_model"]:
    """Return the direction of each token in the residual stream that enters a layer.

    Args:
        model: any hybrid.
        layer: the layer that reads.
        tokens: "embedding", the embedding with its scale (`hook_embed`), exact for layer 0;
            "alone", the stream when the model reads only that token, through the layers below and
            their hooks; or given directions [d_vocab d_model].
        vocab: the tokens, in a tensor or a list; None means all.

    Raises:
        ValueError: another source, directions of another shape, or a token outside the vocabulary.

    Examples:
        >>> analysis.token_directions(model, 0, vocab=[answer]).shape
        torch.Size([1, 128])
    """
    ids = _ids(model, vocab)
    if isinstance(tokens, Tensor):
        if tokens.shape != model.W_E.shape:
            raise ValueError(f"tokens has shape {list(tokens.shape)}, not {list(model.W_E.shape)}")
        return at_least_fp32(tokens if vocab is None else tokens[ids.to(tokens.device)])
    if tokens not in ("embedding", "alone"):
        raise ValueError(f"tokens={tokens!r}: give 'embedding', 'alone' or directions")
    stop = layer if tokens == "alone" else 0
    parts = ids[:, None].split(ALONE_AT_ONCE)
    with torch.no_grad():
        return at_least_fp32(torch.cat([model(part, stop_at_layer=stop)[:, 0] for part in parts]))


def _ids(model: HookedHybrid, vocab: Vocab | None) -> Int[Tensor, " token"]:
    """Return the tokens asked for, on the model's device."""
    n = model.cfg.d_vocab
    ids = torch.arange(n) if vocab is None else torch.as_tensor(vocab)
    if ids.is_floating_point() or ids.ndim != 1 or not bool(((ids >= 0) & (ids < n)).all()):
        raise ValueError(f"vocab={vocab}: give a list of tokens from 0 to {n - 1}")
    return ids.to(model.device, torch.long)


def full_qk_circuit(
    model: HookedHybrid,
    layer: int,
    distance: int = 0,
    *,
    scaled: bool = False,
    tokens: TokenSource = "embedding",
    through: ComponentAt | None = None,
    lag: int | None = None,
    vocab: Vocab | None = None,
) -> FactoredMatrix:
    """Return the score of every query token for every key token, by each head.

    Each direction is normalised by `ln1`, including its weight, as if it were the whole stream.
    With "embedding" in layer 0 these are the true scores; elsewhere they are the part of the scores
    by this path, up to the norm's factor at each position.

    Args:
        model: any hybrid.
        layer: an attention layer.
        distance, scaled: see `qk_circuit`.
        tokens, vocab: see `token_directions`.
        through: keys are the outputs of this earlier component for the token (`written_tokens`)
            instead of the token: K-composition, as in an induction head.
        lag: see `written_tokens`, of `through`.

    Returns:
        [head token token], rows for the query.

    Raises:
        ValueError: see `qk_circuit`, `token_directions` and `written_tokens`.

    Source: Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits".

    Examples:
        >>> analysis.full_qk_circuit(model, 5, distance=1, vocab=list(range(40))).shape
        torch.Size([8, 40, 40])
    """
    if lag is not None and through is None:
        raise ValueError(f"lag={lag} is of a recurrence: name it in `through`")
    circuit = qk_circuit(model, layer, distance, scaled=scaled)
    queries = keys = _as_read(model, layer, tokens, vocab)
    if through is not None:
        if through[0] >= layer:
            raise ValueError(f"through={through}: layer {layer} reads what earlier layers write")
        keys = written_tokens(model, through, tokens, vocab, lag) * norm_weight(model, layer)
    return queries @ circuit @ keys.mT


def full_ov_circuit(
    model: HookedHybrid,
    layer: int,
    *,
    tokens: TokenSource = "embedding",
    vocab: Vocab | None = None,
) -> FactoredMatrix:
    """Return the change of every token's logit by attending to each token, for each head.

    Before the soft cap, and up to the final norm's factor at each position, with its weight.
    Arguments as for `full_qk_circuit`.

    Returns:
        [head token token], rows for the token attended to, columns for logits.

    Raises:
        ValueError: no attention layer; see also `token_directions`.

    Source: Elhage et al. 2021.

    Examples:
        >>> analysis.full_ov_circuit(model, 5, vocab=list(range(40))).shape
        torch.Size([8, 40, 40])
    """
    W_U = at_least_fp32(model.W_U if vocab is None else model.W_U[:, _ids(model, vocab)])
    W_U = W_U * at_least_fp32(model.ln_final.w)[:, None]
    return _as_read(model, layer, tokens, vocab) @ ov_circuit(model, layer) @ W_U


def written_tokens(
    model: HookedHybrid,
    component: ComponentAt,
    tokens: TokenSource = "embedding",
    vocab: Vocab | None = None,
    lag: int | None = None,
) -> Float[Tensor, "token d_model"]:
    """Return the output of a head, or of the linear path of a gate block, for each token.

    Args:
        model: any hybrid.
        component: (layer, head), or (layer, gate block) of a recurrence; Mamba's only block is 0.
        tokens, vocab: see `token_directions`.
        lag: tap of a recurrence's convolution, see `recurrent_circuit`: with 1, its output for the
            previous token; a head has none.

    Raises:
        ValueError: no such layer, head or block; a lag of a head; see also `token_directions`.

    Examples:
        >>> analysis.written_tokens(model, (2, 0), vocab=[answer]).shape
        torch.Size([1, 128])
    """
    layer, index = component
    require_one_mixer(model, layer)
    is_attention = layer in model.cfg.attention_layers
    if is_attention:
        refuse_ignored(f"layer {layer} is attention, which has no convolution", lag=lag)
    circuit = ov_circuit(model, layer) if is_attention else recurrent_circuit(model, layer, lag)
    if not 0 <= index < circuit.shape[0]:
        raise ValueError(f"{component}: layer {layer} has components 0 to {circuit.shape[0] - 1}")
    return (_as_read(model, layer, tokens, vocab) @ circuit[index]).AB


def copying_scores(
    model: HookedHybrid,
    kind: Kind = "eigenvalues",
    *,
    centred: bool = True,
    tokens: TokenSource = "embedding",
    vocab: Vocab | None = None,
) -> HeadScores:
    """Return how much each head raises the logit of the token it attends to.

    Args:
        model: any hybrid with attention.
        kind: "eigenvalues": the sum of the full OV circuit's eigenvalues over the sum of their
            absolute values, -1 to 1, and 1 for a head that copies; "rank": the mean fraction of the
            other tokens whose logits are raised less, chance 0.5; "top1": the fraction of tokens
            whose own logit is raised most of all, chance one over their number.
        centred: remove from the circuit the part that is equal for all tokens (`centre`).
        tokens, vocab: see `token_directions`.

    Raises:
        ValueError: another kind, or a model without attention.

    Source: Elhage et al. 2021 for the eigenvalues, there without centring.

    Examples:
        >>> scores = analysis.copying_scores(model, vocab=list(range(40)))
        >>> scores.labels()[:2], scores.values.shape
        (['L2H0', 'L2H1'], torch.Size([2, 8]))
    """
    return _scores(
        model,
        kind,
        "copying",
        lambda i: full_ov_circuit(model, i, tokens=tokens, vocab=vocab),
        centred,
    )


def matching_scores(
    model: HookedHybrid,
    distance: int = 0,
    kind: Kind = "eigenvalues",
    *,
    centred: bool = True,
    tokens: TokenSource = "embedding",
    through: ComponentAt | None = None,
    lag: int | None = None,
    vocab: Vocab | None = None,
) -> HeadScores:
    """Return how much each head prefers keys of the query's own token.

    Args:
        model: any hybrid with attention.
        distance: tokens between query and key; see `qk_circuit`.
        kind: as for `copying_scores`, of the full QK circuit: "rank" and "top1" compare the key of
            a query's own token with all keys.
        centred: remove from the circuit the part that is equal for all tokens (`centre`).
        tokens, vocab: see `token_directions`.
        through, lag: see `full_qk_circuit`; heads in layers not after this component are left out.

    Raises:
        ValueError: another kind, or no attention layer (after `through`).

    Source: Elhage et al. 2021, where induction heads match through a previous-token head.

    Examples:
        >>> analysis.matching_scores(model, through=(2, 0), vocab=list(range(40))).layers
        (5,)
    """
    return _scores(
        model,
        kind,
        "matching" if through is None else f"matching through {through}",
        lambda i: full_qk_circuit(
            model, i, distance, tokens=tokens, through=through, lag=lag, vocab=vocab
        ),
        centred,
        after=-1 if through is None else through[0],
    )


def _scores(
    model: HookedHybrid,
    kind: Kind,
    name: str,
    circuit: Callable[[int], FactoredMatrix],
    centred: bool,
    after: int = -1,
) -> HeadScores:
    """Return the scores of every attention layer after one."""
    score = score_of(kind, centred)
    layers = [i for i in model.cfg.attention_layers if i > after]
    if not layers:
        raise ValueError(f"no layer after {after} has attention" if after >= 0 else NO_ATTENTION)
    with torch.no_grad():
        return HeadScores.of({i: score(circuit(i)) for i in layers}, f"{name}, {kind}")


def _as_read(
    model: HookedHybrid, layer: int, tokens: TokenSource, vocab: Vocab | None
) -> Float[Tensor, "token d_model"]:
    """Return the tokens' directions after `ln1`, each as if it were alone in the stream."""
    x = token_directions(model, layer, tokens, vocab)
    if model.blocks[layer].ln1 is None:
        return x
    inverse = inverse_rms(x, model.blocks[layer].ln1.eps)
    return x * inverse * norm_weight(model, layer)
