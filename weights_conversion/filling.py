"""From a checkpoint to a network: names and shapes first, then one tensor at a time."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.network.network import Network
from hooked_hybrid.network.placement.homes import Homes
from weights_conversion.content import Content, adapter_of, config_of, google_config, read_content
from weights_conversion.errors import CheckpointError
from weights_conversion.rules import Rule, account, convert
from weights_conversion.sources import open_checkpoint

N = TypeVar("N", bound=Network)


def as_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return a dtype given as such or by name.

    Raises:
        ValueError: not a floating-point dtype of torch.
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
    """Read the config of a checkpoint; of a `.pt`, the shapes of its tensors too.

    Examples:
        >>> from weights_conversion import load_config
        >>> load_config("tiny-jamba").n_layers
        4
    """
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
        CheckpointError: lists the tensors that do not fit.

    Examples:
        >>> from weights_conversion import check
        >>> print(check("tiny-griffin"))
        112 tensors become 112, 962,560 parameters, 6 layers; not needed: none
    """
    checkpoint = open_checkpoint(name_or_path, revision)
    merged = adapter_of(checkpoint, adapter)
    content = read_content(checkpoint, overrides, merged, ignore_config_keys)
    model = make_empty(Network, content)
    used = {name for rule in content.rules for name in rule.sources}
    parameters = list(model.parameters())
    n_parameters = sum(parameter.numel() for parameter in parameters)
    left = sorted(content.source.shapes.keys() - used)
    return (
        f"{len(used)} tensors become {len(parameters)}, {n_parameters:,} parameters, "
        f"{content.cfg.n_layers} layers; not needed: {', '.join(left) or 'none'}"
    )


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name."""
    return {name: tuple(t.shape) for name, t in model.named_parameters()}


def make_empty(cls: type[N], content: Content, dtype: torch.dtype = torch.float32) -> N:
    """Return the model of a checkpoint on the meta device, once all tensors are accounted for.

    Raises:
        CheckpointError: tensors that are missing, left over, of another shape or not stored as
            plain numbers, or weights of an impossible size; no tensor is read.
    """
    try:
        model = cls.meta(content.cfg, dtype)
    except (RuntimeError, TypeError) as error:  # more than 2^63 bytes
        raise CheckpointError(f"config.json gives weights an impossible size: {error}") from error
    source = content.source
    account(content.rules, source.shapes, shapes_of(model), content.ignored)
    read = (name for rule in content.rules for name in rule.sources)
    if (name := next((name for name in read if name in source.unfit), None)) is not None:
        raise CheckpointError(
            f"{name} is stored as {source.unfit[name]}, not as floating point of 16 bits or more"
        )
    return model


def fill(model: N, content: Content, homes: Homes) -> N:
    """Load every tensor of a checkpoint: read, checked and converted one at a time.

    Args:
        model: of `make_empty`; it gets the weights.
        content: of the checkpoint.
        homes: of the model's weights.

    Raises:
        CheckpointError: values that no model has, or that exceed the dtype.
        OSError: the disk is full, or cannot be written.
    """
    quantized = []
    with homes.filling():
        for rule in content.rules:
            for name, tensor in _read(rule, content, homes):
                record = homes.put(model, name, tensor)
                if record is not None:
                    quantized.append(record)
    return homes.finish(model, quantized)


def _read(rule: Rule, content: Content, homes: Homes) -> Iterator[tuple[str, Tensor | None]]:
    """Yield the tensors of a rule, or None for each if all of them are already on the disk."""
    if homes.are_filled(rule.targets):
        return ((name, None) for name in rule.targets)
    return convert([rule], content.source, homes.of[rule.targets[0]].dtype)
