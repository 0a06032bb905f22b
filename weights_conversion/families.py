"""The checkpoint families, each a config reader and a table of names."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from hooked_hybrid.config import HybridConfig
from weights_conversion import jamba, recurrentgemma
from weights_conversion.errors import CheckpointError
from weights_conversion.generation import with_generation_config
from weights_conversion.hf_config import in_their_words, without_keys
from weights_conversion.rules import Rule


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face's: how its configs read and its tensors are named."""

    model_type: str
    config_from_dict: Callable[[dict[str, Any]], HybridConfig]
    config_to_dict: Callable[[HybridConfig], dict[str, Any] | None]
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
            overrides: as `HybridConfig.with_overrides` takes them.
            ignore_config_keys: settings that are taken not to be there.
            generation_config: the content of `generation_config.json`, where there is one.

        Raises:
            CheckpointError: settings that are unsupported or do not go together.
            TypeError, ValueError: overrides that are not possible, or keys that are not there.
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
    for module in (recurrentgemma, jamba)
}


def family_of_config(config: dict[str, Any]) -> Family:
    """Return the family that a `config.json` names.

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

    Raises:
        CheckpointError: none can.
    """
    for family in FAMILIES.values():
        if (config := family.config_to_dict(cfg)) is not None:
            return family, config
    raise CheckpointError(
        f"no published family ({', '.join(FAMILIES)}) can express this model: it has layers, or "
        "settings such as n_keys or logits_soft_cap, that their config.json has no words for"
    )
