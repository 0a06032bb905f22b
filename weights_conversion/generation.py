"""`generation_config.json`: its end tokens are used, its other settings are kept."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.outputs.foreign import one_line
from weights_conversion.config_keys import GENERATION_DEFAULTS
from weights_conversion.hf_config import list_keys, special_tokens
from weights_conversion.json_files import LARGEST_CONFIG, read_json

FILE = "generation_config.json"

TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
SAMPLING = frozenset(
    "temperature top_k top_p min_p top_h typical_p epsilon_cutoff eta_cutoff".split()
)
"""Settings that transformers reads if `do_sample` is true."""
WITHOUT_EFFECT = frozenset(
    """
    _from_model_config assistant_confidence_threshold assistant_early_exit
    assistant_ensemble_weight assistant_lookbehind cache_config cache_implementation
    compile_config continuous_batching_config decoder_start_token_id disable_compile is_assistant
    low_memory max_cache_len max_matching_ngram_size num_assistant_tokens
    num_assistant_tokens_schedule output_attentions output_hidden_states output_logits
    output_scores prefill_chunk_size prompt_lookup_num_tokens return_dict_in_generate
    return_legacy_cache speculation_type target_lookbehind transformers_version use_cache use_mtp
    """.split()
)
"""Settings of speed, or of the amount of output, without an effect on tokens."""
DEFAULTS = {
    **GENERATION_DEFAULTS,
    "encoder_repetition_penalty": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "renormalize_logits": False,
    "token_healing": False,
}


def read_generation_config(folder: Path) -> dict[str, Any] | None:
    """Return the content of a folder's `generation_config.json`, or None if there is none.

    Raises:
        CheckpointError: it is not a JSON object.
    """
    path = folder / FILE
    return read_json(path, LARGEST_CONFIG) if path.is_file() else None


def with_generation_config(cfg: HybridConfig, content: Mapping[str, Any] | None) -> HybridConfig:
    """Return a config with the end tokens of transformers' `generate`, and the other settings.

    If this file exists, transformers uses only its end tokens: if it has none, generation does not
    end early, whatever `config.json` has. BOS and padding are used from it if `config.json` has
    none.

    Args:
        cfg: from `config.json`.
        content: of `generation_config.json`; None if there is none.

    Raises:
        CheckpointError: an invalid token.

    Warns:
        UserWarning: settings that this library's `generate` does not read from the file.
    """
    if content is None:
        return cfg
    ids = special_tokens({key: content.get(key) for key in TOKENS}, FILE)
    changes = {"eos_token_id": ids["eos_token_id"]}
    for key in ("bos_token_id", "pad_token_id"):
        if getattr(cfg, key) is None:
            changes[key] = ids[key]
    if unused := not_honoured(content):
        warnings.warn(
            f"{FILE} has settings that generate does not take from it: {list_keys(unused)}; it is "
            "greedy by default, pass them as arguments where you want them",
            stacklevel=2,
        )
    kept = {k: v for k, v in content.items() if v is not None and DEFAULTS.get(k) != v}
    return dataclasses.replace(cfg, **changes, generation_config=kept)


def not_honoured(content: Mapping[str, Any]) -> list[str]:
    """Return the settings that would change what transformers generates, as `name=value`."""
    found = []
    for key in sorted(content.keys() - WITHOUT_EFFECT - set(TOKENS)):
        value = content[key]
        if value is None or value == DEFAULTS.get(key):
            continue
        if key in SAMPLING and not content.get("do_sample"):
            continue
        found.append(f"{key}={one_line(value, 40)}")
    return found


def generation_config_to_save(cfg: HybridConfig) -> dict[str, Any] | None:
    """Return the `generation_config.json` of a model, or None if it had none."""
    if not cfg.generation_config:
        return None
    eos = cfg.eos_token_id
    ends = list(eos) if isinstance(eos, tuple) else eos
    content = {**cfg.generation_config, "eos_token_id": ends}
    return {key: value for key, value in content.items() if value is not None}
