"""Writing a network atomically to a directory that transformers loads."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from hooked_hybrid.network.network import Network
from hooked_hybrid.network.weights.quantization import require_plain_weights
from hooked_hybrid.outputs.whole_folders import exchange, to_disk
from weights_conversion.families import family_that_writes
from weights_conversion.generation import FILE as GENERATION_FILE
from weights_conversion.generation import generation_config_to_save
from weights_conversion.json_files import LARGEST_CONFIG, read_json
from weights_conversion.rules import Rule, revert

CHECKPOINT_FILES = re.compile(
    r"(config|generation_config|adapter_config|chat_template)\.json|chat_template\.jinja"
    r"|(model|pytorch_model|adapter_model)(-\d+-of-\d+)?\.(safetensors|bin)(\.index\.json)?"
    r"|(tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab)\.json"
    r"|(tokenizer|spiece)\.model|merges\.txt"
)
"""Names of the files of a checkpoint and its tokenizer, which a new one replaces."""


def save(
    model: Network,
    directory: str | os.PathLike[str],
    max_shard_size: int = 5_000_000_000,
    tokenizer: Any = None,
    overwrite: bool = False,
) -> None:
    """Write a model as transformers would; see `HookedHybrid.save_pretrained`.

    Examples:
        >>> from weights_conversion import check, save
        >>> save(model, "saved")
        >>> print(check("saved"))
        112 tensors become 112, 962,560 parameters, 6 layers; not needed: none
    """
    if max_shard_size < 1:
        raise ValueError(f"max_shard_size={max_shard_size}: give bytes, 1 or more")
    require_plain_weights(
        model.quantization,
        "save_pretrained",
        "quantise when loading instead (from_pretrained(..., quantize=...)), or save the "
        "dequantized values, after quantized.dequantize_weights(model)",
    )
    if model.device.type == "meta":
        raise ValueError("this model has no weights (it is on the meta device): nothing to save")
    target = Path(directory)
    kept = _files_to_keep(target, overwrite)
    if kept is not None:
        target = target.resolve()  # the target of a link
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
            if kept is None:
                if target.is_dir():
                    target.rmdir()  # empty, as checked
                partial.rename(target)
            else:
                for path in kept:
                    if not (partial / path.name).exists():
                        shutil.copy2(path, partial / path.name)
                to_disk(partial)
                exchange(partial, target)  # the old one is removed below
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise OSError(f"{target} cannot be written ({error}): give another directory") from error


def _files_to_keep(target: Path, overwrite: bool) -> list[Path] | None:
    """Return the files of a checkpoint's directory that are not the checkpoint's.

    None if there is no checkpoint to replace: no directory, or an empty one.

    Raises:
        FileExistsError: the directory contains something that must not be replaced.
    """
    if not target.exists():
        return None
    if not target.is_dir():
        raise FileExistsError(f"{target} is a file: give a new directory")
    files = list(target.iterdir())
    if not files:
        return None
    if overwrite is not True:  # a "no" is no leave to replace weights
        raise FileExistsError(
            f"{target} is not empty: give a new directory, or overwrite=True to replace the "
            "checkpoint in it; nothing is overwritten"
        )
    if not _is_of_a_model(target / "config.json"):
        raise FileExistsError(
            f"{target} is not empty and holds no checkpoint (no config.json of a model), which "
            "overwrite=True would replace: give a new directory"
        )
    if odd := sorted(path.name for path in files if path.is_symlink() or not path.is_file()):
        raise FileExistsError(
            f"{target} holds {odd[0]!r} too, which no checkpoint has: move it elsewhere, "
            "or give a new directory; nothing is overwritten"
        )
    return [path for path in files if not CHECKPOINT_FILES.fullmatch(path.name)]


def _is_of_a_model(config: Path) -> bool:
    """Return whether a file is a config.json that names a kind of model; programs have theirs."""
    try:
        return "model_type" in read_json(config, LARGEST_CONFIG)
    except (OSError, ValueError):
        return False


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
