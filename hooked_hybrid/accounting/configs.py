"""Configs to count: those of the published models as data, any other from its `config.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.outputs.foreign import LARGEST_SMALL, read_json
from hooked_hybrid.presets import configs as presets
from hooked_hybrid.presets.packaged import packaged_models

PUBLISHED: dict[str, HybridConfig] = {
    "recurrentgemma-2b": presets.griffin(
        ("RRA" * 9)[:26],
        d_model=2560,
        d_vocab=256_000,
        n_heads=10,
        d_head=256,
        n_keys=2048,
    ),
    "recurrentgemma-9b": presets.griffin(
        ("RRA" * 13)[:38],
        d_model=4096,
        d_vocab=256_000,
        n_heads=16,
        d_head=256,
        n_keys=2048,
    ),
    "jamba-mini": presets.jamba(
        "MMMMAMMM" * 4,
        d_model=4096,
        d_vocab=65_536,
        n_heads=32,
        n_kv_heads=8,
        n_experts=16,
    ),
}
"""The papers' models at their sizes.

RecurrentGemma's window is 2,048 keys, as in transformers; Google's code keeps one more. Jamba-Mini
1.5 to 1.7 have the layers of Jamba-v0.1.
"""

ALIASES = {
    **{f"google/{name}{kind}": name for name in list(PUBLISHED)[:2] for kind in ("", "-it")},
    **{
        f"ai21labs/{name}": "jamba-mini"
        for name in (
            "Jamba-v0.1",
            "AI21-Jamba-1.5-Mini",
            "AI21-Jamba-Mini-1.5",
            "AI21-Jamba-Mini-1.6",
            "AI21-Jamba-Mini-1.7",
        )
    },
}
"""Hub ids of the published models."""


def config_of(name_or_path: str | os.PathLike[str]) -> HybridConfig:
    """Return the config of a model without its weights.

    Args:
        name_or_path: in this order a `config.json`, a folder with one or with a `.pt`, a `.pt`; a
            packaged model; a key of `PUBLISHED` or of `ALIASES`, which needs no network; a hub id,
            of which only `config.json` is fetched.

    Raises:
        ValueError: nothing of this name, or a config that cannot be read.

    Examples:
        >>> from hooked_hybrid.accounting import config_of
        >>> config_of("jamba-mini").n_layers, config_of("tiny-jamba").n_layers
        (32, 4)
    """
    path, name = Path(name_or_path), os.fspath(name_or_path)
    if path.suffix == ".json" and path.is_file():
        return _read(path)
    if path.exists() or name in packaged_models():
        return HybridConfig.from_pretrained(name_or_path)
    if (published := PUBLISHED.get(ALIASES.get(name, name))) is not None:
        return published
    if name.count("/") != 1 or name.startswith((".", "/", "~")) or path.suffix == ".json":
        raise ValueError(
            f"{name!r}: no such file or folder, and not a known model "
            f"({', '.join([*packaged_models(), *PUBLISHED])}); give one of these, the path of a "
            "config.json, or a hub id such as google/recurrentgemma-2b"
        )
    return _read(_fetched(name))


def _read(path: Path) -> HybridConfig:
    from weights_conversion.families import family_of_config

    config: Any = read_json(path, LARGEST_SMALL)
    if not isinstance(config, dict):
        raise ValueError(f"{path} contains a {type(config).__name__}, not the settings of a model")
    return family_of_config(config).read(config, {})


def _fetched(repo: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(repo, "config.json"))
    except (LocalEntryNotFoundError, HfHubHTTPError, HFValidationError, OSError) as error:
        raise ValueError(
            f"{repo!r} is not a folder here, and its config.json could not be fetched from the hub "
            f"({type(error).__name__}): check the name, the network, and for gated models "
            "`hf auth login`"
        ) from error
