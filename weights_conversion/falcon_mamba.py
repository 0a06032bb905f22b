"""Falcon-Mamba: Mamba with norms without weights on dt, B and C."""

from __future__ import annotations

from typing import Any

from hooked_hybrid.config import HybridConfig, MambaConfig
from weights_conversion.hf_config import ConfigReader
from weights_conversion.mamba import DEFAULT_INNER_EPS, NO_EFFECT, read_config, write_config
from weights_conversion.mamba import rules as rules
from weights_conversion.rules import tied_head

MODEL_TYPE = "falcon_mamba"
ARCHITECTURE = "FalconMambaForCausalLM"

ignored = tied_head


def config_from_dict(config: dict[str, Any]) -> HybridConfig:
    """Return our config from a 4.x or 5.x `config.json`.

    Raises:
        CheckpointError: a setting that is missing, impossible, unsupported or unknown.
    """
    reader = ConfigReader(config, NO_EFFECT)
    return read_config(
        reader, "plain", reader.number("mixer_rms_eps", DEFAULT_INNER_EPS), MODEL_TYPE
    )


def config_to_dict(cfg: HybridConfig) -> dict[str, Any]:
    """Return the `config.json` of a model.

    Raises:
        CheckpointError: this family cannot express it; gives the reason.
    """
    written = write_config(cfg, "plain")
    mixer = cfg.layers[0].mixer
    assert isinstance(mixer, MambaConfig)
    own = {"architectures": [ARCHITECTURE], "model_type": MODEL_TYPE}
    return {**written, **own, "mixer_rms_eps": mixer.norm_eps}
