"""From a checkpoint to a `HookedHybrid`: shapes first, then one tensor at a time."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.model import HookedHybrid
from hooked_hybrid.placement.files import identity_of
from hooked_hybrid.placement.places import DeviceMap
from hooked_hybrid.placement.placing import Homes, MaxMemory, homes_of, one_home
from hooked_hybrid.quantized import Only, Quantizer
from hooked_hybrid.text import as_tokenizer
from hooked_hybrid.tokenizer import read_tokenizer
from weights_conversion import google
from weights_conversion.errors import CheckpointError
from weights_conversion.families import family_of_config
from weights_conversion.rules import Rule, Shapes, account, convert, require_layers
from weights_conversion.sources import Checkpoint, MemorySource, TensorSource, open_checkpoint

GOOGLE_SETTINGS = set(inspect.signature(google.config_from_shapes).parameters) - {"shapes"}


def load(
    name_or_path: str | os.PathLike[str],
    dtype: torch.dtype | str = torch.float32,
    device: torch.device | str = "cpu",
    tokenizer: Any = None,
    revision: str | None = None,
    device_map: DeviceMap | Literal["auto"] | None = None,
    max_memory: MaxMemory | None = None,
    offload_folder: str | os.PathLike[str] | None = None,
    quantize: str | Any | None = None,
    quantize_only: Only | None = None,
    **overrides: Any,
) -> HookedHybrid:
    """Load a checkpoint; see `HookedHybrid.from_pretrained`.

    The model is made without memory and never drawn at random; each tensor is read from its
    mapped file, converted, put in its place and let go before the next.
    """
    _refuse_mixed_places(device, device_map, max_memory, offload_folder)
    if quantize is None and quantize_only is not None:
        raise ValueError("quantize_only goes with quantize: give quantize='int8'")
    tokenizer = as_tokenizer(tokenizer)
    checkpoint = open_checkpoint(name_or_path, revision)
    source = checkpoint.tensors()
    cfg, rules, ignored = _read_plan(checkpoint, source, overrides)
    dtype, homes = as_dtype(dtype), None
    scheme = None if quantize is None else (quantize, quantize_only)
    if device_map is not None:
        identity = identity_of(_files(checkpoint), dtype)
        how = (identity, quantize, quantize_only)
        homes = homes_of(_without_memory(cfg, dtype), device_map, max_memory, offload_folder, *how)
    if tokenizer is None:
        try:
            tokenizer = read_tokenizer(checkpoint.folder)
        except ValueError as error:
            raise CheckpointError(str(error)) from error
    model = _filled(cfg, source, rules, ignored, dtype, device, homes, scheme)
    model.tokenizer = tokenizer
    return model


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
    name_or_path: str | os.PathLike[str], revision: str | None = None, **overrides: Any
) -> HybridConfig:
    """Read the config of a checkpoint; of a `.pt`, the shapes of its tensors too."""
    checkpoint = open_checkpoint(name_or_path, revision)
    if checkpoint.config is not None:
        return family_of_config(checkpoint.config).read(checkpoint.config, overrides)
    return _google_config(checkpoint.tensors(), overrides)


def from_hf(
    hf_model: Any,
    dtype: torch.dtype | None = None,
    device: torch.device | str | None = None,
    tokenizer: Any = None,
    **overrides: Any,
) -> HookedHybrid:
    """Copy a transformers model in memory; see `HookedHybrid.from_hf`."""
    tokenizer = as_tokenizer(tokenizer)
    config = hf_model.config.to_dict()
    family = family_of_config(config)
    cfg = family.read(config, overrides)
    source = MemorySource(hf_model.state_dict())
    dtype = hf_model.dtype if dtype is None else dtype
    device = hf_model.device if device is None else device
    model = _filled(
        cfg, source, family.rules(cfg, source.shapes), family.ignored(cfg), dtype, device
    )
    model.tokenizer = tokenizer
    return model


def check(
    name_or_path: str | os.PathLike[str], revision: str | None = None, **overrides: Any
) -> str:
    """Account for every tensor of a checkpoint without reading one, and return a summary.

    Raises:
        CheckpointError: what does not fit.
    """
    checkpoint = open_checkpoint(name_or_path, revision)
    source = checkpoint.tensors()
    cfg, rules, ignored = _read_plan(checkpoint, source, overrides)
    target = shapes_of(_without_memory(cfg))
    account(rules, source.shapes, target, ignored)
    used = {name for rule in rules for name in rule.sources}
    n_parameters = sum(torch.Size(shape).numel() for shape in target.values())
    left = sorted(source.shapes.keys() - used)
    return (
        f"{len(used)} tensors become {len(target)}, {n_parameters:,} parameters, "
        f"{cfg.n_layers} layers; not needed: {', '.join(left) or 'none'}"
    )


def _without_memory(cfg: HybridConfig, dtype: torch.dtype = torch.float32) -> HookedHybrid:
    """Return the model on the meta device, or refuse a config whose weights have no size there."""
    try:
        return HookedHybrid.meta(cfg, dtype)
    except (RuntimeError, TypeError) as error:  # more than 2^63 bytes
        raise CheckpointError(
            f"config.json asks for weights of no possible size: {error}"
        ) from error


def shapes_of(model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the shape of every parameter by name."""
    return {name: tuple(t.shape) for name, t in model.named_parameters()}


def _read_plan(
    checkpoint: Checkpoint, source: TensorSource, overrides: dict[str, Any]
) -> tuple[HybridConfig, list[Rule], tuple[str, ...]]:
    """Return the config with its overrides, the table of names, and what may be left over."""
    if checkpoint.config is not None:
        family = family_of_config(checkpoint.config)
        cfg = family.read(checkpoint.config, overrides)
        require_layers(cfg.n_layers, source.shapes)
        return cfg, family.rules(cfg, source.shapes), family.ignored(cfg)
    cfg = _google_config(source, overrides)
    return cfg, google.rules(cfg), google.ignored(cfg)


def _google_config(source: TensorSource, overrides: dict[str, Any]) -> HybridConfig:
    given = {key: value for key, value in overrides.items() if key in GOOGLE_SETTINGS}
    others = {key: value for key, value in overrides.items() if key not in GOOGLE_SETTINGS}
    return google.config_from_shapes(source.shapes, **given).with_overrides(**others)


def _filled(
    cfg: HybridConfig,
    source: TensorSource,
    rules: list[Rule],
    ignored: tuple[str, ...],
    dtype: torch.dtype,
    device: torch.device | str,
    homes: Homes | None = None,
    scheme: tuple[str | Any, Only | None] | None = None,
) -> HookedHybrid:
    """Return the model with every parameter set, after all of them are accounted for."""
    model = _without_memory(cfg, dtype)
    shapes: Shapes = shapes_of(model)
    account(rules, source.shapes, shapes, ignored)
    _refuse_untied_head(cfg, source)
    parameters = dict(model.named_parameters())
    homes = one_home(cfg, torch.device(device)) if homes is None else homes
    quantizer = None if scheme is None else Quantizer(model, *scheme, device_of=homes.device_of)
    for name, tensor in _placed(parameters, homes, source, rules):
        _set_parameter(model, name, tensor)
        if quantizer is not None:
            quantizer.take(name)
    if quantizer is not None:
        quantizer.finish()
    return homes.finish(model)


def _placed(
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
                    yield name, _copied(name, tensor, like, homes.device_of(name))


def _files(checkpoint: Checkpoint) -> list[Path]:
    """Return the files that a checkpoint's weights come from."""
    folder = checkpoint.folder
    found = checkpoint.tensor_files or (folder / "config.json", *folder.glob("model*.safetensors"))
    return [path for path in found if path.is_file()]


def _refuse_mixed_places(
    device: torch.device | str,
    device_map: DeviceMap | Literal["auto"] | None,
    max_memory: MaxMemory | None,
    offload_folder: str | os.PathLike[str] | None,
) -> None:
    """Refuse places that a device map should have said."""
    if device_map is None and (max_memory is not None or offload_folder is not None):
        raise ValueError("max_memory and offload_folder go with device_map: give device_map='auto'")
    if device_map is not None and torch.device(device).type != "cpu":
        raise ValueError(f"device={str(device)!r} and a device_map: give one of them")


def _copied(name: str, tensor: Tensor, like: Tensor, device: torch.device | str) -> Tensor:
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
    """Refuse a head that is stored beside the embedding it should be, and differs from it."""
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not cfg.tied_embedding or head not in source.shapes:
        return
    if not torch.equal(source.read(head), source.read(embedding)):
        raise CheckpointError(
            f"{head} differs from {embedding}, but the config ties them (tie_word_embeddings): one "
            "of the two is wrong"
        )
