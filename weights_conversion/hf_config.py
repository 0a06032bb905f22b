"""Reading a Hugging Face `config.json` such that no setting is silently ignored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Collection
from typing import Any

from hooked_hybrid.config import HybridConfig
from hooked_hybrid.config.fields import options_set
from weights_conversion.config_keys import GENERIC, is_listed, is_without_effect
from weights_conversion.errors import CheckpointError

NULLABLE = frozenset({"head_dim", "hidden_act", "lru_width", "num_key_value_heads"})
"""Settings whose null means a default that is computed from others."""

SAVED_EXTRAS = frozenset({"attention_dropout", "initializer_range", "use_cache"})

OWN = "hooked_hybrid"
"""The key under which this library saves settings that transformers cannot express."""

LARGEST = {"num_hidden_layers": 1_000, "num_experts": 10_000}
"""Limits far above existing models, as a wrong size would be built before tensors are read."""
LARGEST_OTHER = 2**31 - 1

RANGES = {
    "rms_norm_eps": (1e-30, 1.0),
    "layer_norm_epsilon": (1e-30, 1.0),
    "mixer_rms_eps": (1e-30, 1.0),
    "logits_soft_cap": (1e-3, 1e6),
    "rope_theta": (1.0, 1e15),
    "partial_rotary_factor": (0.0, 1.0),
}
"""Ranges with finite forwards; published values are well within."""


THEIR_WORDS = {
    "d_head": "head_dim",
    "d_rnn": "lru_width",
    "d_rotary": "partial_rotary_factor * head_dim",
    "n_chosen": "num_experts_per_tok",
    "n_experts": "num_experts",
    "n_gate_blocks": "num_attention_heads",
    "n_heads": "num_attention_heads",
    "n_kv_heads": "num_key_value_heads",
}


def in_their_words(message: str) -> str:
    """Return a message about our config in the names of the file."""
    return re.sub(r"\b\w+\b", lambda word: THEIR_WORDS.get(word[0], word[0]), message)


class ConfigReader:
    """A config in which every key must be read, or known to have no effect.

    Args:
        config: the parsed `config.json`.
        no_effect: keys of this family without an effect on the model.
    """

    def __init__(self, config: dict[str, Any], no_effect: frozenset[str]) -> None:
        self.config = config
        self.no_effect = no_effect | GENERIC | {"model_type"}
        self.asked: set[str] = set()
        if config.get("quantization_config") is not None:
            raise CheckpointError(
                "the checkpoint is quantised (quantization_config): give the unquantised one"
            )
        self.asked.add("quantization_config")

    def get(self, key: str, default: Any = None) -> Any:
        """Return a setting, or the default if it is absent, or null with that meaning.

        Raises:
            CheckpointError: null for a setting that must have a value.
        """
        self.asked.add(key)
        value = self.config.get(key)
        if value is None and key in self.config and default is not None and key not in NULLABLE:
            raise CheckpointError(f"config.json: {key} is null; it must have a value")
        return default if value is None else value

    def need(self, key: str) -> Any:
        """Return a required setting.

        Raises:
            CheckpointError: it is absent.
        """
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"config.json has no {key!r}")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return a positive integer.

        Raises:
            CheckpointError: absent without a default, larger than any model's, or anything else.
        """
        value = self.need(key) if default is None else self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise CheckpointError(f"config.json: {key}={_show(value)} is not a positive integer")
        if value > (most := LARGEST.get(key, LARGEST_OTHER)):
            raise CheckpointError(f"config.json: {key}={_show(value)} is more than {most}")
        return value

    def number(self, key: str, default: float) -> float:
        """Return a number in the setting's range in `RANGES`.

        Raises:
            CheckpointError: anything else.
        """
        return in_range(key, self.get(key, default))

    def flag(self, key: str, default: bool) -> bool:
        """Return true or false.

        Raises:
            CheckpointError: anything else.
        """
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise CheckpointError(f"config.json: {key}={_show(value)} is neither true nor false")
        return value

    def only(self, key: str, *supported: Any) -> Any:
        """Return a setting with few supported values; if absent, the first of them.

        Raises:
            CheckpointError: it has another value.
        """
        value = self.get(key, supported[0])
        if value not in supported:
            choices = ", ".join(repr(v) for v in supported)
            raise CheckpointError(
                f"config.json: {key}={_show(value)} is not supported; {choices} is"
            )
        return value

    def special_tokens(self) -> dict[str, Any]:
        """Return BOS, EOS and padding ids, as fields of `HybridConfig`."""
        keys = ("bos_token_id", "eos_token_id", "pad_token_id")
        return special_tokens({key: self.get(key) for key in keys}, "config.json")

    def own_settings(self) -> dict[str, Any]:
        """Return the settings that no family's config can express, as saved by this library.

        Raises:
            CheckpointError: they differ from the saved form.
        """
        given = self.get(OWN, {})
        kinds = {"n_ctx": (int, type(None)), "default_prepend_bos": (bool,)}
        if not isinstance(given, dict) or not all(
            type(value) in kinds.get(key, ()) for key, value in given.items()
        ):
            raise CheckpointError(f"config.json: {OWN}={_show(given)} is not as it was saved")
        return given

    def extra(self) -> dict[str, Any]:
        """Return the unused settings, which are written again when saving.

        Raises:
            CheckpointError: an unknown key: it may change what the model computes.

        Warns:
            UserWarning: keys of other programs, which have no effect.
        """
        left = self.config.keys() - self.asked
        others = {
            key: self.config[key]
            for key in sorted(left - self.no_effect)
            if not is_without_effect(key, self.config[key])
        }
        if unknown := [key for key, value in others.items() if not is_listed(key, value)]:
            raise CheckpointError(
                f"config.json has settings that are unknown to this library: "
                f"{list_keys(unknown)}; they "
                "may change what the model computes. If you know that they do not, give "
                f"ignore_config_keys={unknown!a}"
            )
        if others:
            warnings.warn(
                f"config.json has settings without an effect here: {list_keys(others)}",
                stacklevel=2,
            )
        kept = (self.no_effect - GENERIC - {"model_type"}) | SAVED_EXTRAS
        return {key: self.config[key] for key in sorted(left) if key in kept}


def require(*needs: tuple[bool, str]) -> None:
    """Refuse a model that a family's config cannot express.

    Args:
        needs: pairs of a condition and the message if it is false.

    Raises:
        CheckpointError: lists the false ones.
    """
    if lacking := [why_not for is_so, why_not in needs if not is_so]:
        raise CheckpointError("; ".join(lacking))


def require_plain_layers(cfg: HybridConfig) -> None:
    """Refuse options that a family cannot express.

    Raises:
        CheckpointError: an option without its default, or a layer without one mixer and one MLP.
    """
    others = [i for i, x in enumerate(cfg.layers) if len(x.mixers) != 1 or x.mlp is None]
    set_ones = ", ".join(f"{name}={value!r}" for name, value in options_set(cfg).items())
    require(
        (not others, f"layers {others} do not have one mixer and one MLP"),
        (not set_ones, f"it has no setting for {set_ones}"),
    )


def without_keys(config: dict[str, Any], ignored: Collection[str]) -> dict[str, Any]:
    """Return a config without the settings that a user ignores.

    Raises:
        TypeError: one name instead of several.
        ValueError: it has no such setting.
    """
    if isinstance(ignored, str):
        raise TypeError(f"ignore_config_keys={ignored!r}: give a list of names")
    if absent := sorted(set(ignored) - config.keys()):
        raise ValueError(
            f"ignore_config_keys: config.json has no {list_keys(absent)}: leave it out"
        )
    return {key: value for key, value in config.items() if key not in ignored}


def list_keys(keys: Collection[str]) -> str:
    """Return names of settings for an error, without control characters."""
    return ", ".join(key if key.isprintable() else ascii(key) for key in keys)


def special_tokens(ids: dict[str, Any], file: str) -> dict[str, Any]:
    """Return BOS, EOS and padding ids, as fields of `HybridConfig`.

    Raises:
        CheckpointError: one is not a token id.
    """
    ids = {
        key: tuple(value) if key.startswith("eos") and isinstance(value, list) else value
        for key, value in ids.items()
    }
    for key, value in ids.items():
        for token in value if isinstance(value, tuple) else (value,):
            may_be_none = not isinstance(value, tuple)
            if not _is_token(token) and not (token is None and may_be_none):
                raise CheckpointError(f"{file}: {key}={_show(value)} is not a token id")
    return ids


def in_range(key: str, value: Any) -> float:
    """Return a number in a setting's range in `RANGES`.

    Raises:
        CheckpointError: anything else.
    """
    least, most = RANGES[key]
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise CheckpointError(
            f"config.json: {key}={_show(value)} is not a number from {least:g} to {most:g}"
        )
    return float(value)


def _is_token(value: Any) -> bool:
    """Whether a value could be a token id; some configs mark the lack of one by -1."""
    return isinstance(value, int) and not isinstance(value, bool) and -1 <= value <= LARGEST_OTHER


def _show(value: Any) -> str:
    """Return a value as one line, for an error message."""
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits to be printed
        return "an integer of thousands of digits"
    return text if len(text) <= 80 else text[:77] + "..."


def rope_settings(reader: ConfigReader) -> tuple[float, float]:
    """Return (theta, share of channels that rotate), from 4.x and 5.x configs alike.

    Raises:
        CheckpointError: another kind of rotary position than the default.
    """
    given = (reader.get("rope_parameters"), reader.get("rope_scaling"))
    nested: Any = next((value for value in given if value is not None), {})
    if not isinstance(nested, dict):
        raise CheckpointError(f"config.json: rope_parameters={_show(nested)} is not an object")
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
    kind = nested.get("rope_type", nested.get("type", "default"))
    if kind != "default" or nested.keys() - known:
        raise CheckpointError(
            f"config.json: rotary positions {_show(nested)} are not supported; rope_type "
            "'default' is"
        )
    flat = {
        key: reader.number(key, default)
        for key, default in (("rope_theta", 10_000.0), ("partial_rotary_factor", 0.5))
    }
    theta, share = (in_range(key, nested.get(key, value)) for key, value in flat.items())
    return theta, share
