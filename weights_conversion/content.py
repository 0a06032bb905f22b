"""The content of a checkpoint, read before any of its tensors."""

from __future__ import annotations

import inspect
import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hooked_hybrid.config import HybridConfig
from weights_conversion import google
from weights_conversion.adapters import with_adapter
from weights_conversion.errors import CheckpointError
from weights_conversion.families import Family, family_of_config
from weights_conversion.generation import read_generation_config
from weights_conversion.names import strip_wrappers, with_head
from weights_conversion.rules import Rule, require_layers
from weights_conversion.sources import ADAPTER_CONFIG, Checkpoint, TensorSource, adapter_folder

GOOGLE_SETTINGS = set(inspect.signature(google.config_from_shapes).parameters) - {"shapes"}


@dataclass(frozen=True)
class Content:
    """The content to read: a config with its overrides, tensors, and the table of their names.

    `ignored` has patterns of the names that may be left over.
    """

    cfg: HybridConfig
    source: TensorSource
    rules: list[Rule]
    ignored: tuple[str, ...]


def read_content(
    checkpoint: Checkpoint,
    overrides: dict[str, Any],
    adapter: Path | None,
    ignore_config_keys: Collection[str],
) -> Content:
    """Return the content of a checkpoint, without reading any tensor."""
    source = checkpoint.tensors()
    if checkpoint.config is None:
        if adapter is not None:
            raise CheckpointError(
                f"adapter={str(adapter)!a}: the tensor names in a .pt of Google's are not those "
                f"of adapters; "
                "convert it first (python -m weights_conversion FILE.pt FOLDER)"
            )
        cfg = google_config(source, overrides, ignore_config_keys)
        return Content(cfg, source, google.rules(cfg), google.ignored(cfg))
    family, cfg = config_of(checkpoint, checkpoint.config, overrides, ignore_config_keys)
    return content_of(family, cfg, source, adapter)


def content_of(
    family: Family, cfg: HybridConfig, source: TensorSource, adapter: Path | None = None
) -> Content:
    """Return the content of tensors with their publisher's names, with an adapter merged."""
    require_layers(cfg.n_layers, source.shapes)
    source = with_head(strip_wrappers(source), cfg.tied_embedding)
    if adapter is not None:
        source = with_adapter(source, adapter, cfg.tied_embedding)
    return Content(cfg, source, family.rules(cfg, source.shapes), family.ignored(cfg))


def config_of(
    checkpoint: Checkpoint,
    config: dict[str, Any],
    overrides: dict[str, Any],
    ignore_config_keys: Collection[str],
) -> tuple[Family, HybridConfig]:
    """Return the family of a `config.json`, with its content and that of its neighbour."""
    family = family_of_config(config)
    generation = read_generation_config(checkpoint.folder)
    return family, family.read(config, overrides, ignore_config_keys, generation)


def adapter_of(
    checkpoint: Checkpoint, adapter: str | os.PathLike[str] | Literal[False] | None
) -> Path | None:
    """Return the folder of the adapter to merge; one next to the weights is used only if named."""
    if adapter is not None and adapter is not False:
        return adapter_folder(adapter)
    if adapter is None and (checkpoint.folder / ADAPTER_CONFIG).is_file():
        raise CheckpointError(
            f"{checkpoint.folder} holds an adapter as well as the weights of a model: give adapter="
            f"{str(checkpoint.folder)!a} to merge it into them, or adapter=False to leave it out"
        )
    return None


def google_config(
    source: TensorSource, overrides: dict[str, Any], ignore_config_keys: Collection[str]
) -> HybridConfig:
    """Return the config that a `.pt` of Google's implies, with a user's overrides.

    Raises:
        CheckpointError: no such `.pt`.
        ValueError: keys of a config.json, which a `.pt` does not have.
    """
    if ignore_config_keys:
        raise ValueError(f"ignore_config_keys={ignore_config_keys!a}: a .pt has no config.json")
    given = {key: value for key, value in overrides.items() if key in GOOGLE_SETTINGS}
    others = {key: value for key, value in overrides.items() if key not in GOOGLE_SETTINGS}
    return google.config_from_shapes(source.shapes, **given).with_overrides(**others)
