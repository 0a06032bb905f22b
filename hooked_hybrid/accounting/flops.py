"""Floating-point operations by kind of layer, for prefill and for one generated token.

Attention's cost depends on which pairs of a query and a key are computed:

- "useful": those inside the mask. Their number grows as the square of the length up to the window,
  and linearly beyond it.
- "executed": those that a forward of this library computes on a CPU, without autograd or editing
  hooks: blocks of 64 queries with the range of keys that any of them sees. The corners of the
  blocks exceed "useful".
- "dense": every pair, as by a kernel that skips nothing (`attend.attend_whole`).

A generated token has one query, for which the three are equal: the keys that are kept.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from typing import TYPE_CHECKING, Literal, NamedTuple

from hooked_hybrid.accounting.parameters import order_of_rows
from hooked_hybrid.config import HybridConfig, LayerConfig, PartConfig
from hooked_hybrid.network.attention.attend import BLOCK
from hooked_hybrid.network.costs import Flops, norm
from hooked_hybrid.network.mixers import mixer_of
from hooked_hybrid.network.mlps import mlp_of
from hooked_hybrid.network.part import Part
from hooked_hybrid.network.plan import PIECE

if TYPE_CHECKING:
    import pandas as pd

Pairs = Literal["useful", "executed", "dense"]
ByKind = dict[str, Flops]


def prefill_flops(
    cfg: HybridConfig,
    length: int,
    batch: int = 1,
    n_logits: int | None = 1,
    pairs: Pairs = "useful",
) -> ByKind:
    """Return the operations of running a prompt, by kind of layer.

    Args:
        cfg: the model.
        length: tokens of each row, from the beginning of a document and without padding.
        batch: rows.
        n_logits: number of last positions with logits: 1 as before generating, None for all.
        pairs: which queries and keys of attention are counted.

    Raises:
        ValueError: a length, batch or number of logits out of range.
        NotSupported: a mixer or an MLP does not state its operations.

    Source: Zani et al. 2025, Figure 2, also by kind of layer.

    Examples:
        >>> from hooked_hybrid.accounting import prefill_flops
        >>> prefill_flops(model.cfg, 128)["MLP"].products
        150994944
    """
    kept = length if n_logits is None else n_logits
    _require(1, length=length, batch=batch)
    _require(0, n_logits=kept)
    return _flops(
        cfg, length, min(kept, length), batch, lambda n_keys: count_pairs(length, n_keys, pairs)
    )


def step_flops(cfg: HybridConfig, n_before: int, batch: int = 1) -> ByKind:
    """Return the operations of one more token after `n_before`, by kind of layer.

    Raises:
        ValueError: a number of tokens or a batch below 1.

    Examples:
        >>> from hooked_hybrid.accounting import step_flops
        >>> step_flops(model.cfg, 100)["attention"].products
        250880
    """
    _require(0, n_before=n_before)
    _require(1, batch=batch)
    seen = n_before + 1
    return _flops(cfg, 1, 1, batch, lambda n_keys: seen if n_keys is None else min(seen, n_keys))


def count_pairs(length: int, n_keys: int | None, pairs: Pairs = "useful") -> int:
    """Return the queries times keys of one row that attention computes in a prefill.

    Args:
        length: tokens of the row.
        n_keys: keys of the window, the query itself included; None for all.
        pairs: "useful", "executed" or "dense", see the module.

    Examples:
        >>> from hooked_hybrid.accounting import count_pairs
        >>> count_pairs(100, n_keys=None), count_pairs(100, n_keys=10)
        (5050, 955)
    """
    if pairs == "dense":
        return length * length
    if pairs == "executed":
        return _count_executed_pairs(length, n_keys)
    window = length if n_keys is None else min(n_keys, length)
    return window * (window + 1) // 2 + (length - window) * window


@cache
def _count_executed_pairs(length: int, n_keys: int | None) -> int:
    """Return the pairs that `attend.attend_blocks` computes, called on one piece after another."""
    total = 0
    for piece in range(0, length, PIECE):
        end = min(piece + PIECE, length)
        for start in range(piece, end, BLOCK):
            stop = min(start + BLOCK, end)
            first = 0 if n_keys is None else max(0, start - (n_keys - 1))
            total += (stop - start) * (stop - first)
    return total


def _flops(
    cfg: HybridConfig,
    n_tokens: int,
    n_logits: int,
    batch: int,
    pairs_of: Callable[[int | None], int],
) -> ByKind:
    """Return the operations of a forward; `pairs_of` gives the pairs of a row from its window."""
    found: defaultdict[str, Flops] = defaultdict(Flops)
    for layer, n_layers in Counter(cfg.layers).items():
        for part, of in parts_of_layer(layer):
            for kind, flops in part.operations(of, cfg.d_model).items():
                found[kind] += flops * (n_layers * n_tokens)
            if of.write_scale != 1:
                found[part.row] += Flops(elementwise=cfg.d_model) * (n_layers * n_tokens)
        for of in layer.mixers:
            mixer = mixer_of(of)
            if mixer.grows:
                n_pairs = pairs_of(mixer.window(of))
                found[mixer.row] += mixer.pair_operations(of) * (n_layers * n_pairs)
    n_norms = sum(layer.n_norms for layer in cfg.layers) * n_tokens + n_logits
    found["norms"] = Flops(elementwise=n_norms * norm(cfg.d_model))
    if cfg.scale_embedding or cfg.embedding_scale != 1:
        found["embedding"] = Flops(elementwise=n_tokens * cfg.d_model)
    found["read-out"] = read_out(cfg) * n_logits
    order = order_of_rows()
    return {kind: found[kind] * batch for kind in sorted(found, key=order.index)}


def read_out(cfg: HybridConfig) -> Flops:
    """Return the operations of one token's logits, with their scale and soft cap."""
    capped = 3 * cfg.d_vocab if cfg.logits_soft_cap is not None else 0
    scaled = cfg.d_vocab if cfg.logits_scale != 1 else 0
    return Flops(products=2 * cfg.d_model * cfg.d_vocab, elementwise=scaled + capped)


def parts_of_layer(layer: LayerConfig) -> Iterator[tuple[type[Part], PartConfig]]:
    """Yield the mixers and the MLP of a layer, each with its config."""
    for mixer in layer.mixers:
        yield mixer_of(mixer), mixer
    if layer.mlp is not None:
        yield mlp_of(layer.mlp), layer.mlp


class Ratio(NamedTuple):
    """Operations of the recurrent blocks over those of the attention blocks.

    Examples:
        >>> from hooked_hybrid.accounting import PUBLISHED, recurrence_over_attention
        >>> ratio = recurrence_over_attention(PUBLISHED["recurrentgemma-2b"], 512)
        >>> round(ratio.all_layers, 2), round(ratio.a_layer, 2)
        (3.0, 1.34)
    """

    length: int
    all_layers: float
    """All blocks of one kind over all blocks of the other."""
    a_layer: float
    """The mean block of one kind over the mean block of the other."""


def recurrence_over_attention(
    cfg: HybridConfig, length: int, pairs: Pairs = "useful", stage: str = "prefill"
) -> Ratio:
    """Return how much more recurrent blocks cost than attention blocks.

    Args:
        cfg: a model that has both.
        length: tokens of the prompt.
        pairs: which queries and keys are counted in prefill.
        stage: "prefill", or "step" for one token after the prompt.

    Raises:
        ValueError: one of the two kinds is missing, or the stage is unknown.

    Source: Zani et al. 2025, Figure 2: a recurrent block of RecurrentGemma-2B costs more than three
    times an attention block. That is the ratio over all layers (18 to 8) for prompts up to some 500
    tokens, and of the parameters; one block never costs three times another, see the tests.

    Examples:
        >>> from hooked_hybrid.accounting import PUBLISHED, recurrence_over_attention
        >>> round(recurrence_over_attention(PUBLISHED["recurrentgemma-2b"], 512).all_layers, 2)
        3.0
    """
    if not cfg.attention_layers or not cfg.recurrent_layers:
        raise ValueError("this model does not have both attention and recurrent layers to compare")
    if stage not in ("prefill", "step"):
        raise ValueError(f"stage={stage!r}: give 'prefill' or 'step'")
    by_kind = (
        prefill_flops(cfg, length, pairs=pairs) if stage == "prefill" else step_flops(cfg, length)
    )
    recurrent, attention = (
        sum(by_kind[row].total for row in {row for of in mixers for row in mixer_of(of).rows()})
        for mixers in (
            [cfg.layers[i].recurrence for i in cfg.recurrent_layers],
            [cfg.layers[i].attention for i in cfg.attention_layers],
        )
    )
    ratio = recurrent / attention
    return Ratio(length, ratio, ratio * len(cfg.attention_layers) / len(cfg.recurrent_layers))


def flops_table(
    cfg: HybridConfig, lengths: Iterable[int], batch: int = 1, n_logits: int | None = 1
) -> pd.DataFrame:
    """Return a line for each stage, length and kind of layer.

    Returns:
        Columns `stage` ("prefill" of `length` tokens, "step": one token after them), `length`,
        `kind`, `layers` (the number of that kind), `products`, `scan`, `elementwise` and
        their `total` (useful pairs), `executed_products` and `dense_products`.

    Examples:
        >>> from hooked_hybrid.accounting import flops_table
        >>> table = flops_table(model.cfg, [64, 128])
        >>> table[table["length"] == 128].groupby("stage")["products"].sum().to_dict()
        {'prefill': 232998656, 'step': 2034432}
    """
    import pandas as pd

    layers = _layers(cfg)
    lines = []
    for length in sorted(set(lengths)):
        ways = [
            prefill_flops(cfg, length, batch, n_logits, pairs)
            for pairs in ("useful", "executed", "dense")
        ]
        for stage, (useful, executed, dense) in (
            ("prefill", ways),
            ("step", 3 * [step_flops(cfg, length, batch)]),
        ):
            lines += [
                {
                    "stage": stage,
                    "length": length,
                    "kind": kind,
                    "layers": layers.get(kind, 1),
                    **vars(flops),
                    "total": flops.total,
                    "executed_products": executed[kind].products,
                    "dense_products": dense[kind].products,
                }
                for kind, flops in useful.items()
            ]
    return pd.DataFrame(lines)


def _layers(cfg: HybridConfig) -> dict[str, int]:
    """Return the number of layers of each kind."""
    counts = Counter(
        kind for layer in cfg.layers for part, _ in parts_of_layer(layer) for kind in part.rows()
    )
    return {**counts, "norms": sum(layer.n_norms for layer in cfg.layers) + 1}


def _require(least: int, **values: int) -> None:
    for name, value in values.items():
        if value < least:
            raise ValueError(f"{name}={value}: give {least} or more")
