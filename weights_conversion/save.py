"""Writing a network atomically to a directory that transformers loads."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid.network.network import Network
from hooked_hybrid.network.weights.quantization import require_plain_weights
from weights_conversion.families import family_that_writes
from weights_conversion.generation import FILE as GENERATION_FILE
from weights_conversion.generation import generation_config_to_save
from weights_conversion.rules import Rule, revert


def save(
    model: Network,
    directory: str | os.PathLike[str],
    max_shard_size: int = 5_000_000_000,
    tokenizer: Any = None,
) -> None:
    """Write a model as transformers would; see `HookedHybrid.save_pretrained`."""
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size}: give bytes, 1 or more")
    require_plain_weights(
        model.quantization,
        "save_pretrained",
        "quantise when loading instead (from_pretrained(..., quantize=...)), or save the values "
        "that they stand for, after quantized.dequantize_weights(model)",
    )
    if model.device.type == "meta":
        raise ValueError("this model has no weights (it is on the meta device): nothing to save")
    target = Path(directory)
    if target.is_dir() and any(target.iterdir()):
        raise FileExistsError(
            f"{target} is not empty: give a new directory, nothing is overwritten"
        )
    if target.exists() and not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a new directory")
    family, config = family_that_writes(model.cfg)
    partial = target.with_name(f"{target.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        try:
            dtype = str(model.dtype).removeprefix("torch.")
            _write_json(partial / "config.json", {**config, "dtype": dtype, "torch_dtype": dtype})
            if (generation := generation_config_to_save(model.cfg)) is not None:
                _write_json(partial / GENERATION_FILE, generation)
            _write_tensors(partial, model, family.rules(model.cfg), max_shard_size)
            _write_tokenizer(partial, tokenizer)
            if target.is_dir():
                target.rmdir()  # empty, see above
            partial.rename(target)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} cannot be written ({error}): give another directory") from error


def _write_tensors(folder: Path, model: Network, rules: list[Rule], max_shard_size: int) -> None:
    tensors = {name: t.detach() for name, t in model.named_parameters()}
    shards = list(_shards(rules, tensors, max_shard_size))
    if len(shards) == 1:
        _write_shard(folder / "model.safetensors", shards[0], tensors)
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys((name for rule in shard for name in rule.sources), file)
        _write_shard(folder / file, shard, tensors)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    _write_json(folder / "model.safetensors.index.json", index)


def _shards(
    rules: list[Rule], tensors: dict[str, Tensor], max_shard_size: int
) -> Iterator[list[Rule]]:
    """Yield groups of rules whose tensors fit into one file."""
    shard: list[Rule] = []
    size = 0
    for rule in rules:
        n_bytes = sum(tensors[t].numel() * tensors[t].element_size() for t in rule.targets)
        if shard and size + n_bytes > max_shard_size:
            yield shard
            shard, size = [], 0
        shard.append(rule)
        size += n_bytes
    yield shard


def _write_shard(path: Path, shard: list[Rule], tensors: dict[str, Tensor]) -> None:
    named = {name: t.contiguous() for name, t in revert(shard, tensors)}
    save_file(named, path, metadata={"format": "pt"})


def _write_tokenizer(folder: Path, tokenizer: Any) -> None:
    if hasattr(tokenizer, "save_pretrained"):
        tokenizer.save_pretrained(str(folder))
    elif hasattr(tokenizer, "save"):
        tokenizer.save(str(folder / "tokenizer.json"))


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
