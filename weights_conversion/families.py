"""The checkpoint families, each with a config reader and a table of names."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hooked_hybrid.config import HybridConfig
from weights_conversion import bamba, falcon_mamba, jamba, mamba, mamba2, recurrentgemma
from weights_conversion.errors import CheckpointError
from weights_conversion.generation import with_generation_config
from weights_conversion.hf_config import OWN, in_their_words, without_keys
from weights_conversion.rules import Rule


@dataclass(frozen=True)
class Family:
    """A `model_type` of Hugging Face, with the reader of its configs and its names of tensors."""

    model_type: str
    config_from_dict: Callable[[dict[str, Any]], HybridConfig]
    config_to_dict: Callable[[HybridConfig], dict[str, Any]]
    rules: Callable[..., list[Rule]]
    ignored: Callable[[HybridConfig], tuple[str, ...]]

    def read(
        self,
        config: dict[str, Any],
        overrides: dict[str, Any],
        ignore_config_keys: Collection[str] = (),
        generation_config: Mapping[str, Any] | None = None,
    ) -> HybridConfig:
        """Return the config of a checkpoint, with a user's overrides.

        Args:
            config: the content of `config.json`.
            overrides: as for `HybridConfig.with_overrides`.
            ignore_config_keys: settings to ignore.
            generation_config: the content of `generation_config.json`, if there is one.

        Raises:
            CheckpointError: settings that are unsupported or exclude each other.
            TypeError, ValueError: impossible overrides, or keys that do not exist.
        """
        config = without_keys(config, ignore_config_keys)
        try:
            cfg = self.config_from_dict(config)
        except CheckpointError:
            raise
        except (TypeError, ValueError) as error:
            raise CheckpointError(f"config.json: {in_their_words(str(error))}") from error
        cfg = with_generation_config(cfg, generation_config)
        return cfg.with_overrides(**overrides)


FAMILIES = {
    module.MODEL_TYPE: Family(
        module.MODEL_TYPE,
        module.config_from_dict,
        module.config_to_dict,
        module.rules,
        module.ignored,
    )
    for module in (recurrentgemma, jamba, mamba2, bamba, mamba, falcon_mamba)
}


def family_of_config(config: dict[str, Any]) -> Family:
    """Return the family of a `config.json`.

    Raises:
        CheckpointError: another architecture.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise CheckpointError(
            f"config.json is of a model_type {model_type!r}; this library loads "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[model_type]


def family_that_writes(cfg: HybridConfig) -> tuple[Family, dict[str, Any]]:
    """Return the family that can express a model, and its `config.json`.

    The config is read back first, so that no model is saved that would not load.

    Raises:
        CheckpointError: no family can; gives the reason for each.
    """
    reasons = []
    for family in FAMILIES.values():
        try:
            return family, _config_that_returns(family, cfg)
        except CheckpointError as error:
            reasons.append(f"{family.model_type}: {error}")
    raise CheckpointError(
        "no published family's config.json can express this model, so that it cannot be saved: "
        + "\n  ".join(["", *reasons])
    )


def _config_that_returns(family: Family, cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model, after checking that it gives the same model.

    Raises:
        CheckpointError: the family cannot express it.
    """
    config = family.config_to_dict(cfg)
    if cfg.model_name != family.model_type:
        config["_name_or_path"] = cfg.model_name
    for name in ("n_ctx", "default_prepend_bos"):
        if getattr(family.read(config, {}), name) != getattr(cfg, name):
            config[OWN] = {**config.get(OWN, {}), name: getattr(cfg, name)}
    back = family.read(config, {})
    names = [field.name for field in dataclasses.fields(cfg) if field.compare]
    if lost := [name for name in names if getattr(back, name) != getattr(cfg, name)]:
        shown = ", ".join(f"{name}={str(getattr(cfg, name))[:80]}" for name in lost)
        raise CheckpointError(f"its config.json would not give back {shown}")
    return config
