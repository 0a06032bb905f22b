"""From a checkpoint to a network: shapes first, then one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.homes import Homes, one_home
from hooked_hybrid.network.weights.quantization import Only
from hooked_hybrid.network.weights.quantized import Quantizer
from weights_conversion.errors import CheckpointError
from weights_conversion.plan import LoadingPlan, adapter_of, config_of, google_config, read_plan
from weights_conversion.rules import Rule, Shapes, account, convert
from weights_conversion.sources import (
    TensorSource,
    open_checkpoint,
)

N = TypeVar("N", bound=Network)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype that may be given by name.

    Raises:
        ValueError: no floating-point dtype of torch.
    """
    found = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype={dtype!r}: give torch.float32, torch.bfloat16 or torch.float16")
    return found


def load_config(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    ignore_config_keys: Collection[str] = (),
    **overrides: Any,
) -> HybridConfig:
    """Read the config of a checkpoint; of a `.pt`, the shapes of its tensors too."""
    checkpoint = open_checkpoint(name_or_path, revision)
    if checkpoint.config is not None:
        return config_of(checkpoint, checkpoint.config, overrides, ignore_config_keys)[1]
    return google_config(checkpoint.tensors(), overrides, ignore_config_keys)


def check(
    name_or_path: str | os.PathLike[str],
    revision: str | None = None,
    adapter: str | os.PathLike[str] | Literal[False] | None = None,
    ignore_config_keys: Collection[str] = (),
    **overrides: Any,
) -> str:
    """Account for every tensor of a checkpoint without reading one, and return a summary.

    Raises:
        CheckpointError: what does not fit.
    """
    checkpoint = open_checkpoint(name_or_path, revision)
    merged = adapter_of(checkpoint, adapter)
    plan = read_plan(checkpoint, overrides, merged, ignore_config_keys)
    target = shapes_of(without_memory(Network, plan.cfg))
    account(plan.rules, plan.source.shapes, target, plan.ignored)
    used = {name for rule in plan.rules for name in rule.sources}
    n_parameters = sum(torch.Size(shape).numel() for shape in target.values())
    left = sorted(plan.source.shapes.keys() - used)
    return (
        f"{len(used)} tensors become {len(target)}, {n_parameters:,} parameters, "
        f"{plan.cfg.n_layers} layers; not needed: {', '.join(left) or 'none'}"
    )


def without_memory(cls: type[N], cfg: HybridConfig, dtype: torch.dtype = torch.float32) -> N:
    """Return the model on the meta device, or refuse a config whose weights have no size there."""
    try:
        return cls.meta(cfg, dtype)
    except (RuntimeError, TypeError) as error:  # more than 2^63 bytes
        raise CheckpointError(f"config.json gives weights an impossible size: {error}") from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name."""
    return {name: tuple(t.shape) for name, t in model.named_parameters()}


def filled(
    cls: type[N],
    plan: LoadingPlan,
    dtype: torch.dtype,
    device: torch.device | str,
    homes: Homes | None = None,
    scheme: tuple[str | Any, Only | None] | None = None,
) -> N:
    """Return the model with every parameter set, after all of them are accounted for."""
    model, source = without_memory(cls, plan.cfg, dtype), plan.source
    shapes: Shapes = shapes_of(model)
    account(plan.rules, source.shapes, shapes, plan.ignored)
    _refuse_untied_head(plan.cfg, source)
    parameters = dict(model.named_parameters())
    homes = one_home(plan.cfg, torch.device(device)) if homes is None else homes
    quantizer = None if scheme is None else Quantizer(model, *scheme, device_of=homes.device_of)
    for name, tensor in _place(parameters, homes, source, plan.rules):
        _set_parameter(model, name, tensor)
        if quantizer is not None:
            quantizer.take(name)
    if quantizer is not None:
        quantizer.finish()
    return homes.finish(model)


def _place(
    parameters: dict[str, nn.Parameter], homes: Homes, source: TensorSource, rules: list[Rule]
) -> Iterator[tuple[str, Tensor]]:
    """Yield each parameter in its place; what is on the disk already is not read again."""
    with homes.filling(parameters):
        for rule in rules:
            found = {name: homes.found(name, parameters[name]) for name in rule.targets}
            if all(tensor is not None for tensor in found.values()):
                yield from ((name, tensor) for name, tensor in found.items() if tensor is not None)
                continue
            for name, tensor in convert([rule], source, parameters[rule.targets[0]].dtype):
                like = parameters[name]
                if homes.on_disk(name):
                    yield name, homes.on_disk_now(name, _floating(name, tensor), like)
                else:
                    yield name, _copy(name, tensor, like, homes.device_of(name))


def _copy(name: str, tensor: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
    """Return a copy in the memory layout of a parameter, that no longer needs the file."""
    tensor = _floating(name, tensor)
    if like.is_contiguous():
        return torch.empty(like.shape, dtype=like.dtype, device=device).copy_(tensor.detach())
    # The other way round in memory, see `weight_layout`; torch transposes fastest like this.
    return tensor.detach().mT.clone(memory_format=torch.contiguous_format).to(device, like.dtype).mT


def _floating(name: str, tensor: Tensor) -> Tensor:
    if not tensor.is_floating_point():
        raise CheckpointError(f"{name} is stored as {tensor.dtype}, not as floating point")
    return tensor


def _set_parameter(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(path), leaf, nn.Parameter(tensor))


def _refuse_untied_head(cfg: HybridConfig, source: TensorSource) -> None:
    """Refuse a stored head that differs from the embedding it should equal."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not cfg.tied_embedding or head not in source.shapes:
        return
    if not torch.equal(source.read(head), source.read(embedding)):
        raise CheckpointError(
            f"{head} differs from {embedding}, but the config ties them (tie_word_embeddings): one "
            "of the two is wrong"
        )
