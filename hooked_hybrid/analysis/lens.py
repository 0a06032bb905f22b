"""Logit lens: the model's prediction from the residual stream at each depth.

The stream at each depth goes through the final norm, with its own scale, and the unembedding. The
last depth is the model's output (without hooks on `unembed.hook_logits`). Logits are computed one
block at a time, so ranks or probabilities over all depths of a long prompt need little memory.
Source: nostalgebraist, "interpreting GPT: the logit lens" (2020).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from hooked_hybrid.hooks.slicing import PosSlice
from hooked_hybrid.model.residual.norms import TokenChoice, ids_at
from hooked_hybrid.model.residual.parts import stream
from hooked_hybrid.model.residual.reading import require_room
from hooked_hybrid.network.elementwise import at_least_fp32, inverse_rms
from hooked_hybrid.network.weights.products import linear
from hooked_hybrid.network.written import weigh
from hooked_hybrid.options import refuse_ignored

if TYPE_CHECKING:
    from hooked_hybrid.model.cache import ActivationCache
    from hooked_hybrid.model.decoding import GenerationOutput
    from hooked_hybrid.model.hybrid import HookedHybrid

Kind = Literal["logits", "probs", "logprobs"]
TokenKind = Literal["logits", "probs", "logprobs", "ranks"]

BLOCK_VALUES = 2**24
"""Logits held at a time if only a function of them is needed: 64 MiB in fp32."""


class Lens(NamedTuple):
    """Values over depth, the first axis, and the depths: "0_pre", ..., "final_post".

    Examples:
        >>> lens = analysis.token_over_depth(model, cache, answer, "ranks", pos_slice=-1)
        >>> lens.labels[-1], lens.values[-1].item()  # the most likely token at the end
        ('final_post', 0)
    """

    values: Tensor
    labels: list[str]


class TopTokens(NamedTuple):
    """The most likely tokens at each depth, the first axis, the most likely one first.

    Examples:
        >>> top = analysis.lens_top_tokens(model, cache, k=2, pos_slice=-1)
        >>> top.tokens.shape, model.to_single_str_token(top.tokens[-1, 0, 0].item())
        (torch.Size([7, 1, 2]), 'Dolores')
    """

    tokens: Int[Tensor, "depth *batch_pos k"]
    probs: Float[Tensor, "depth *batch_pos k"]
    labels: list[str]


def logit_lens(
    model: HookedHybrid,
    cache: ActivationCache,
    layers: Iterable[int] | None = None,
    kind: Kind = "logits",
    soft_cap: bool = True,
    *,
    incl_mid: bool = False,
    pos_slice: PosSlice = None,
) -> Lens:
    """Return the whole lens [depth *batch_pos d_vocab].

    Args:
        model: the model with the norm and unembedding.
        cache: of a run, with `hook_resid_pre` and `hook_resid_post`.
        layers: depths, as the layers that the stream enters; `n_layers`, or -1, is its end. None
            means all of them.
        kind: "logits"; "probs", of a softmax over the vocabulary; or "logprobs", in nats.
        soft_cap: apply the model's soft cap, if it has one, at each depth.
        incl_mid: also the input of each layer's MLP ("0_mid"), between these depths.
        pos_slice: positions, among those that the cache holds; an int drops the axis.

    Raises:
        HookNameError: the cache lacks values; the message names what to cache.
        MemoryError: it would not fit; the functions below need less memory.
        ValueError: layers or a kind that do not exist.

    Examples:
        >>> lens = analysis.logit_lens(model, cache)
        >>> lens.values.shape
        torch.Size([7, 1, 16, 583])
        >>> torch.allclose(lens.values[-1], logits, atol=1e-3)
        True
    """
    _check_kind(kind, ("logits", "probs", "logprobs"))
    depths = _depths(model, cache, layers, incl_mid, pos_slice)
    first = depths[0][1]
    dtype = first.dtype if kind == "logits" else at_least_fp32(first).dtype
    size = len(depths) * first.shape[:-1].numel() * model.cfg.d_vocab * dtype.itemsize
    remedy = "give layers or pos_slice, or use token_over_depth, lens_ranks or lens_top_tokens"
    require_room(size, first.device, "this lens", remedy)
    values = first.new_empty(len(depths), *first.shape[:-1], model.cfg.d_vocab, dtype=dtype)

    def keep(logits: Tensor, depth: int, rows: slice) -> None:
        values[depth].view(-1, model.cfg.d_vocab)[rows] = _of_kind(logits, kind)

    _for_each_block(model, depths, keep, soft_cap)
    return Lens(values, [label for label, _, _ in depths])


def token_over_depth(
    model: HookedHybrid,
    cache: ActivationCache,
    tokens: TokenChoice,
    kind: TokenKind = "logprobs",
    layers: Iterable[int] | None = None,
    soft_cap: bool = True,
    *,
    incl_mid: bool = False,
    pos_slice: PosSlice = None,
) -> Lens:
    """Return the lens value of a token at each depth [depth *batch_pos].

    Args:
        model, cache, layers, soft_cap, incl_mid, pos_slice: as in `logit_lens`.
        tokens: one for all (its id or its text), one a row [batch], or one for each selected
            position [batch pos].
        kind: "logits"; "probs"; "logprobs", in nats; or "ranks", the number of tokens with a larger
            logit before the cap, 0 for the most likely one.

    Raises:
        HookNameError: the cache lacks values; the message names what to cache.
        ValueError: layers, tokens or a kind that do not fit.

    Examples:
        >>> analysis.token_over_depth(model, cache, "Dolores", pos_slice=-1).values.shape
        torch.Size([7, 1])
    """
    _check_kind(kind, ("logits", "probs", "logprobs", "ranks"))
    depths = _depths(model, cache, layers, incl_mid, pos_slice)
    first = depths[0][1]
    lead = first.shape[:-1]
    ids = ids_at(model, tokens, tuple(lead), cache.has_batch_dim).expand(lead)
    ids = ids.reshape(-1, 1).to(model.device)
    kept: list[list[Tensor]] = [[] for _ in depths]

    def keep(logits: Tensor, depth: int, rows: slice) -> None:
        if kind == "ranks":
            kept[depth].append((logits > logits.gather(-1, ids[rows])).sum(-1))
        else:
            kept[depth].append(_of_kind(logits, kind).gather(-1, ids[rows])[:, 0])

    _for_each_block(model, depths, keep, soft_cap and kind != "ranks")
    values = torch.stack([torch.cat(pieces).view(lead) for pieces in kept])
    return Lens(values, [label for label, _, _ in depths])


def lens_ranks(
    model: HookedHybrid,
    cache: ActivationCache,
    tokens: TokenChoice,
    layers: Iterable[int] | None = None,
    *,
    incl_mid: bool = False,
    pos_slice: PosSlice = None,
) -> Lens:
    """Return a token's rank at each depth [depth *batch_pos]; see `token_over_depth`.

    Examples:
        >>> analysis.lens_ranks(model, cache, answer, pos_slice=-1).values[-1].item()
        0
    """
    chosen = {"incl_mid": incl_mid, "pos_slice": pos_slice}
    return token_over_depth(model, cache, tokens, "ranks", layers, **chosen)  # type: ignore[arg-type]


def lens_top_tokens(
    model: HookedHybrid,
    cache: ActivationCache,
    k: int = 5,
    layers: Iterable[int] | None = None,
    soft_cap: bool = True,
    *,
    incl_mid: bool = False,
    pos_slice: PosSlice = None,
) -> TopTokens:
    """Return the `k` most likely tokens at each depth, with their probabilities.

    Other arguments and errors are those of `token_over_depth`.

    Examples:
        >>> top = analysis.lens_top_tokens(model, cache, k=3, layers=[3, -1], pos_slice=-1)
        >>> top.labels, top.probs.shape
        (['3_pre', 'final_post'], torch.Size([2, 1, 3]))
    """
    if not 1 <= k <= model.cfg.d_vocab:
        raise ValueError(f"k={k}: give 1 to {model.cfg.d_vocab}, the size of the vocabulary")
    depths = _depths(model, cache, layers, incl_mid, pos_slice)
    lead = depths[0][1].shape[:-1]
    tokens: list[list[Tensor]] = [[] for _ in depths]
    probs: list[list[Tensor]] = [[] for _ in depths]

    def keep(logits: Tensor, depth: int, rows: slice) -> None:  # noqa: ARG001
        top = at_least_fp32(logits).softmax(-1).topk(k, dim=-1)
        tokens[depth].append(top.indices)
        probs[depth].append(top.values)

    _for_each_block(model, depths, keep, soft_cap)
    both = [
        torch.stack([torch.cat(pieces).view(*lead, k) for pieces in kept])
        for kept in (tokens, probs)
    ]
    return TopTokens(both[0], both[1], [label for label, _, _ in depths])


def lens_of_generation(
    model: HookedHybrid,
    output: GenerationOutput,
    kind: TokenKind = "logprobs",
    layers: Iterable[int] | None = None,
    soft_cap: bool = True,
    *,
    incl_mid: bool = False,
) -> Lens:
    """Return the lens value of each generated token at each depth, at the position before it.

    Args:
        model, layers, soft_cap, incl_mid: as in `logit_lens`.
        output: of `generate(..., names_filter=..., return_type="output")`.
        kind: as in `token_over_depth`.

    Returns:
        [depth batch new]; "logprobs" at the last depth equal `output.logprobs`. After the end of
        a row NaN, or a rank of -1.

    Raises:
        ValueError: the output has no cache.
        HookNameError: its cache lacks values; the message names what to cache.

    Examples:
        >>> names = ["blocks.*.hook_resid_pre", "blocks.*.hook_resid_post"]
        >>> out = model.generate(text, 2, names_filter=names, return_type="output", verbose=False)
        >>> lens = analysis.lens_of_generation(model, out, "ranks")
        >>> lens.values[-1].tolist()  # greedy: each new token was the most likely one
        [[0, 0]]
    """
    if output.cache is None:
        raise ValueError(
            "this generation kept no cache: generate with names_filter=lambda name: "
            "name.endswith(('hook_resid_pre', 'hook_resid_post')) and return_type='output'"
        )
    last = slice(-output.new_tokens.shape[1], None)
    args = (output.new_tokens, kind, layers, soft_cap)
    lens = token_over_depth(model, output.cache, *args, incl_mid=incl_mid, pos_slice=last)
    # After the end of a row the cache is zero, which the stream of a token never is.
    final = _depths(model, output.cache, layers, incl_mid, last)[-1][1]
    was_read = (final != 0).any(-1).to(lens.values.device)
    blank = -1 if kind == "ranks" else torch.nan
    return Lens(lens.values.masked_fill(~was_read, blank), lens.labels)


Depth = tuple[str, Tensor, Tensor | None]
"""A label, the stream, and the run's own normalised stream: [*batch_pos d_model]."""


def _depths(
    model: HookedHybrid,
    cache: ActivationCache,
    layers: Iterable[int] | None,
    incl_mid: bool,
    pos_slice: PosSlice,
) -> list[Depth]:
    """Return the streams, in the requested order of depths."""
    n = model.cfg.n_layers
    chosen = list(range(n + 1) if layers is None else layers)
    if not chosen or not all(-n - 1 <= i <= n for i in chosen):
        raise ValueError(f"layers={chosen}: give depths from 0 to {n}, the end; -1 is the end too")
    if incl_mid and all(i % (n + 1) == n for i in chosen):
        refuse_ignored("the end of the stream has no middle; give layers", incl_mid=incl_mid)
    places = []
    for i in (i % (n + 1) for i in chosen):
        places.append((f"{i}_pre" if i < n else "final_post", i, False))
        if incl_mid and i < n:
            places.append((f"{i}_mid", i, True))
    parts = [stream(model, i, mid) for _, i, mid in places]
    cache.require_parts("the lens", parts)
    depths: list[Depth] = []
    own = "ln_final.hook_normalized"
    for (label, i, _), part in zip(places, parts, strict=True):
        normalized = cache.value_at(own, pos_slice) if i == n and own in cache.cache_dict else None
        depths.append((label, cache.read_parts(part, pos_slice, None)[0], normalized))
    return depths


@torch.no_grad()
def _for_each_block(
    model: HookedHybrid,
    depths: list[Depth],
    keep: Callable[[Tensor, int, slice], None],
    soft_cap: bool,
) -> None:
    """Call `keep(logits [row d_vocab], depth, rows)` on blocks of rows of each depth."""
    norm, weight, cap = model.ln_final, model.W_U.T, model.cfg.logits_soft_cap
    n_rows = max(1, BLOCK_VALUES // model.cfg.d_vocab)
    for depth, (_, resid, own) in enumerate(depths):
        flat = (resid if own is None else own).reshape(-1, resid.shape[-1])
        for start in range(0, flat.shape[0], n_rows):
            rows = slice(start, start + n_rows)
            wide = at_least_fp32(flat[rows].to(weight.device))
            if own is None:
                wide = wide * inverse_rms(wide[None], norm.eps)[0]
            x = weigh(norm, wide, resid.dtype)
            logits = linear(x, weight)
            if soft_cap and cap is not None:
                logits = logits.div_(cap).tanh_().mul_(cap)
            keep(logits, depth, rows)


def _of_kind(logits: Float[Tensor, "row d_vocab"], kind: str) -> Float[Tensor, "row d_vocab"]:
    if kind == "logits":
        return logits
    wide = at_least_fp32(logits)
    return wide.softmax(-1) if kind == "probs" else wide.log_softmax(-1)


def _check_kind(kind: str, kinds: tuple[str, ...]) -> None:
    if kind not in kinds:
        raise ValueError(f"kind={kind!r}: give one of {', '.join(map(repr, kinds))}")
