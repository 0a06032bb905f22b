"""Folding the norms' weights into the matrices that read them, and back, bit for bit.

    norm(x) W + b = (x / rms(x) * w) W + b = (x / rms(x)) (diag(w) W) + b

A folded model computes the same function, and its matrices act on the normalised residual stream
itself: products such as `W_O` of one head times `W_Q` of a later one need no weight in between.
`ln1` is folded into the projections of the mixer, `ln2` into the gate and up projections (of every
expert) and the router, `ln_final` into the unembedding, and Mamba's norm of dt into `dt_proj`.
Mamba's norms of B and C are not folded, as no linear map reads their output.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model.hybrid import HookedHybrid
from hooked_hybrid.network.elementwise import at_least_fp32
from hooked_hybrid.network.layers import InnerNorm, RMSNorm
from hooked_hybrid.network.weights.quantization import require_plain_weights

UNEMBEDDING = "unembed.weight"
WIDE = torch.float32, torch.float64


@dataclass(frozen=True)
class Fold:
    """One folded norm.

    Attributes:
        norm: path of the norm, such as "blocks.0.ln1".
        readers: names of the parameters that were multiplied.
        hooks: hook points between the two, whose values are no longer multiplied.
        multiplier: the factor of the norm, `1 + weight` if that is the norm's style, in
            float32 at least; the folded norm multiplies by exactly 1.
    """

    norm: str
    readers: tuple[str, ...]
    hooks: tuple[str, ...]
    multiplier: Float[Tensor, " width"]


@dataclass(frozen=True)
class FoldRecord:
    """The changes of `fold_ln`, which `unfold_ln` needs.

    Attributes:
        folds: one for each norm, in the order of the model.
        originals: every parameter that was replaced, by name: the tensors themselves, not copies.
        was_tied: whether the unembedding was the embedding; in the folded model they are separate.

    Examples:
        >>> from hooked_hybrid import fold_ln
        >>> folded, record = fold_ln(model)
        >>> len(record.folds), record.was_tied
        (13, True)
    """

    folds: tuple[Fold, ...]
    originals: dict[str, Tensor]
    was_tied: bool

    @property
    def changed_hooks(self) -> tuple[str, ...]:
        """Names of all hook points whose values differ in the folded model.

        They come after a norm's weight: `hook_q_input`, `hook_k_input` and `hook_v_input` of
        attention, and `hook_dt_low` of Mamba. Each holds its old value divided by the multiplier.
        """
        return tuple(name for fold in self.folds for name in fold.hooks)

    @property
    def n_bytes(self) -> int:
        """Bytes of the original tensors, which the record keeps alive."""
        return sum(t.numel() * t.element_size() for t in self.originals.values())


def fold_ln(
    model: HookedHybrid, inplace: bool = False, inner_norms: bool = True
) -> tuple[HookedHybrid, FoldRecord]:
    """Multiply each norm's weight into the weights that read it, so that the norm only normalises.

    Logits, states and all hook points except `FoldRecord.changed_hooks` are unchanged, up to
    rounding. A tied embedding is not changed; the unembedding becomes a separate parameter
    (`cfg.tied_embedding` is then False). `save_pretrained` writes the folded model like any other,
    in the published format, with norms that multiply by 1 and a separate head.

    Memory: without `inplace`, a second model; the record refers to tensors of the first one only.
    With `inplace`, the record holds the old tensors: `record.n_bytes`, half to two thirds of the
    model. Delete the record to free them. An untied unembedding is one more matrix of its size.

    Args:
        model: not changed unless `inplace`. The folded model does not have its hooks.
        inplace: fold this model, and return it.
        inner_norms: also fold Mamba's norm of dt.

    Returns:
        The folded model, and a record of the changes.

    Warns:
        RuntimeWarning: weights narrower than float32: each product is computed in float32 and
            rounded. Load or convert the model to float32 to fold it exactly.

    Raises:
        ValueError: a model without weights, or with quantised ones; or, if not in place, one on
            several devices by a device map.
        NotSupported: a mixer or an MLP does not state what reads the stream.

    Source: TransformerLens's `fold_ln`, which folds on loading and permanently; a norm without mean
    or bias needs no centring.

    Examples:
        >>> from hooked_hybrid import fold_ln
        >>> folded, record = fold_ln(model)
        >>> torch.allclose(folded(tokens), model(tokens), atol=1e-3)
        True
    """
    require_plain_weights(
        model.quantization,
        "fold_ln",
        "fold before quantising, or call quantized.dequantize_weights first",
    )
    if model.device.type == "meta":
        raise ValueError("this model has no weights (it is on the meta device): nothing to fold")
    if not (inplace or model.placement is None or model.placement.is_on_one_device):
        raise ValueError("this model lies on several devices, and is not copied: inplace=True")
    folds = tuple(_folds(model, inner_norms))
    parameters = dict(model.named_parameters())
    new = dict(_folded_tensors(model, folds, parameters))
    if low := {str(t.dtype) for t in new.values() if t.dtype not in WIDE}:
        warnings.warn(
            f"folded weights are rounded to {', '.join(sorted(low))}, so the model computes a "
            "little else than before; load or convert it to float32 to fold it exactly",
            RuntimeWarning,
            stacklevel=2,
        )
    originals: dict[str, Tensor] = {n: p for n, p in parameters.items() if n in new}
    record = FoldRecord(folds, originals, was_tied=model.unembed.weight is None)
    return _with(model, new, dataclasses.replace(model.cfg, tied_embedding=False), inplace), record


def unfold_ln(folded: HookedHybrid, record: FoldRecord, inplace: bool = False) -> HookedHybrid:
    """Return the model as it was before `fold_ln`, bit for bit.

    Args:
        folded: the model that `fold_ln` returned; not changed unless `inplace`.
        record: the record that it returned.
        inplace: unfold this model, and return it.

    Raises:
        ValueError: the record is of another model, or a folded weight has changed since, so that
            an edit would be lost.

    Examples:
        >>> from hooked_hybrid import fold_ln, unfold_ln
        >>> restored = unfold_ln(*fold_ln(model))
        >>> torch.equal(restored(tokens), model(tokens))
        True
    """
    require_plain_weights(
        folded.quantization,
        "unfold_ln",
        "fold before quantising, or call quantized.dequantize_weights first",
    )
    parameters = dict(folded.named_parameters())
    problem = "the record is of another model, or the weight was edited or converted since"
    if missing := sorted(record.originals.keys() - parameters.keys()):
        raise ValueError(f"the model has no {missing[0]}: the record is of another model")
    for name, value in _folded_tensors(folded, record.folds, record.originals):
        now = parameters.get(name)
        if now is None or now.dtype != value.dtype or not torch.equal(now, value.to(now.device)):
            raise ValueError(
                f"{name} is not what fold_ln left ({problem}): unfold before you edit or convert"
            )
    cfg = dataclasses.replace(folded.cfg, tied_embedding=record.was_tied)
    originals = {name: t.detach().clone() for name, t in record.originals.items()}
    return _with(folded, originals, cfg, inplace)


def _folds(model: HookedHybrid, inner_norms: bool) -> Iterator[Fold]:
    """Yield each norm with the parameters that it is folded into, in the order of the model."""
    for i, block in enumerate(model.blocks):
        paths = {"ln1": block.mixer_paths, "ln2": () if block.mlp is None else ("mlp",)}
        for norm, below in paths.items():
            parts = {f"blocks.{i}.{path}": block.get_submodule(path) for path in below}
            if getattr(block, norm) is not None:
                yield Fold(
                    f"blocks.{i}.{norm}",
                    tuple(f"{at}.{name}" for at, part in parts.items() for name in part.reads),
                    tuple(
                        f"{at}.{name}"
                        for at, part in parts.items()
                        for name in part.hooks_after_norm
                    ),
                    _multiplier(getattr(block, norm)),
                )
            for part, module in parts.items():
                for inner in module.inner_norms if inner_norms else ():
                    yield Fold(
                        f"{part}.{inner.norm}",
                        (f"{part}.{inner.reader}",),
                        (f"{part}.{inner.hook}",),
                        _multiplier(module.get_submodule(inner.norm)),
                    )
    yield Fold("ln_final", (UNEMBEDDING,), (), _multiplier(model.ln_final))


def _multiplier(norm: RMSNorm | InnerNorm) -> Float[Tensor, " width"]:
    w = norm.w if isinstance(norm, RMSNorm) else norm.weight
    assert w is not None  # `inner_norms` lists norms with a weight
    return at_least_fp32(w.detach()).clone()


def _folded_tensors(
    model: HookedHybrid, folds: tuple[Fold, ...], originals: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Yield every parameter that folding replaces; for a tied head, that of the embedding."""
    for fold in folds:
        norm: Any = model.get_submodule(fold.norm)
        adds_one = isinstance(norm, RMSNorm) and norm.adds_one
        unit = torch.full_like(norm.weight.detach(), 0.0 if adds_one else 1.0)
        yield f"{fold.norm}.weight", unit
        for name in fold.readers:
            old = originals.get(name, model.W_E).detach()
            multiplier = fold.multiplier.to(old.device)
            yield name, (at_least_fp32(old) * multiplier).to(old.dtype)


def _with(
    model: HookedHybrid, tensors: Mapping[str, Tensor], cfg: HybridConfig, inplace: bool
) -> HookedHybrid:
    """Return the model, or a new one, with this config and some parameters replaced."""
    old = dict(model.named_parameters())
    target = model if inplace else _empty_like(model, cfg)
    if cfg.tied_embedding:
        target.unembed.weight = None
    target.cfg = cfg
    kept = {} if inplace else {n: p.detach().clone() for n, p in old.items() if n not in tensors}
    if cfg.tied_embedding:
        kept.pop(UNEMBEDDING, None)
    for name, tensor in (kept | dict(tensors)).items():
        path, _, leaf = name.rpartition(".")
        like = old.get(name, model.W_E)
        parameter = nn.Parameter(tensor.to(like.device), like.requires_grad)
        setattr(target.get_submodule(path), leaf, parameter)
    return target


def _empty_like(model: HookedHybrid, cfg: HybridConfig) -> HookedHybrid:
    """Return a new model without weights and without this model's hooks."""
    target = HookedHybrid.meta(cfg, model.dtype)
    target.tokenizer = model.tokenizer
    return target.train(model.training)
