"""Damage to config.json and to a tokenizer's files: values swapped, keys lost, structure broken."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

from experiments.under_fire.damage import Damage, Mutation
from experiments.under_fire.damage_headers import DEEP
from weights_conversion import jamba, recurrentgemma
from weights_conversion.config_keys import GENERIC

HARMLESS = GENERIC | jamba.NO_EFFECT | recurrentgemma.NO_EFFECT
"""Settings that no forward reads."""

OTHER_TYPES: tuple[Any, ...] = ("x", "", "7", [], [1], {}, {"a": 1}, [[]], "\ud800")
NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 1.5, -0.5, 1e-300, 1e300, float("nan"), float("inf"), -float("inf")),
    *(2**31, 2**63, 2**64, 10**12, 10**30, 10**400, True, False, None),
)


def swap_type(folder: Path, rng: Random) -> Damage | None:
    """Give a setting a value of another type."""

    def change(config: dict[str, Any]) -> Damage:
        key = rng.choice(sorted(config))
        config[key] = _other_type(config[key], rng)
        # A list is valid for the end tokens, and only one word is valid for some settings.
        is_legal = key in HARMLESS or (key == "eos_token_id" and config[key] == [1])
        shown = json.dumps(config[key])[:40]
        return Damage(f"config.json: {key} = {shown}", "same" if is_legal else "refused")

    return _change_json(folder / "config.json", change)


def swap_number(folder: Path, rng: Random) -> Damage | None:
    """Give a setting another number, legal or not."""

    def change(config: dict[str, Any]) -> Damage:
        key = rng.choice(sorted(k for k, v in config.items() if not isinstance(v, str | dict)))
        config[key] = rng.choice(NUMBERS)
        return Damage(f"config.json: {key} = {str(config[key])[:40]}", "finite")

    return _change_json(folder / "config.json", change)


def swap_nested(folder: Path, rng: Random) -> Damage | None:
    """Change a value inside a setting that holds several."""

    def change(config: dict[str, Any]) -> Damage | None:
        keys = sorted(k for k, v in config.items() if isinstance(v, dict | list) and v)
        if not keys:
            return None
        inner = config[key := rng.choice(keys)]
        place = rng.choice(sorted(inner)) if isinstance(inner, dict) else rng.randrange(len(inner))
        inner[place] = rng.choice((*OTHER_TYPES, *NUMBERS))
        return Damage(f"config.json: {key}[{place!r}] = {str(inner[place])[:40]!r}", "finite")

    return _change_json(folder / "config.json", change)


def change_keys(folder: Path, rng: Random) -> Damage | None:
    """Lose, rename or add settings; name code to be run."""

    def change(config: dict[str, Any]) -> Damage:
        key = rng.choice(sorted(config))
        how = rng.choice(("lost", "renamed", "unknown", "code", "another model"))
        if how == "lost":
            config.pop(key)
        elif how == "renamed":
            config[key.upper()] = config.pop(key)
        elif how == "unknown":
            config[rng.choice(("sparsity", "", "\ud800", "__class__", "x" * 5000))] = 1
        elif how == "code":
            config["auto_map"] = {"AutoModelForCausalLM": "evil.Model"}
            (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
        else:
            config["model_type"] = rng.choice(("llama", "mamba", "", "JAMBA", "../x"))
        must = "refused" if how in ("unknown", "another model") else "finite"
        return Damage(f"config.json: {key} {how}", must)  # type: ignore[arg-type]

    return _change_json(folder / "config.json", change)


def break_structure(folder: Path, rng: Random) -> Damage | None:
    """Put JSON in a config's place that is not a config, or no JSON."""
    path = folder / "config.json"
    if not path.exists():
        return None
    text = path.read_text()
    texts = {
        "deep": '{"model_type":' + "[" * DEEP + "]" * DEEP + "}",
        "long integer": '{"hidden_size": 1' + "0" * 10_000 + "}",
        "long list": '{"block_types": [' + '"attention",' * 300_000 + '"x"]}',
        "a list": f"[{text}]",
        "cut": text[: rng.randrange(len(text) - 3)],
        "more behind": text + "}",
        "zeros": "\0" * 100,
        "comment": "// a config\n" + text,
    }
    how = rng.choice(sorted(texts))
    path.write_text(texts[how])
    return Damage(f"config.json: {how}", "refused")


def change_tokenizer(folder: Path, rng: Random) -> Damage | None:
    """Change a value anywhere in a tokenizer's files; the weights are unchanged."""
    path = folder / rng.choice(("tokenizer.json", "tokenizer_config.json"))

    def change(content: dict[str, Any]) -> Damage:
        keys, inner = [], content
        while True:
            key = rng.choice(sorted(inner) if isinstance(inner, dict) else range(len(inner)))
            keys.append(key)
            if not isinstance(inner[key], dict | list) or not inner[key] or rng.random() < 0.2:
                break
            inner = inner[key]
        inner[key] = rng.choice((*OTHER_TYPES, *NUMBERS))
        return Damage(f"{path.name}: {keys} = {str(inner[key])[:40]!r}", "same")

    return _change_json(path, change)


def break_tokenizer(folder: Path, rng: Random) -> Damage | None:
    """Break the structure of a tokenizer's file."""
    path = folder / rng.choice(("tokenizer.json", "tokenizer_config.json"))
    if not path.exists():
        return None
    text = path.read_bytes()
    deep = b'{"a":' + b"[" * DEEP + b"]" * DEEP + b"}"
    path.write_bytes(
        rng.choice((b"", b"{", b"[]", b"null", b"\xff\xfe", deep, text[: len(text) // 2], text * 2))
    )
    return Damage(f"{path.name}: broken", "refused")


def _other_type(value: Any, rng: Random) -> Any:
    kind = type(value)
    return rng.choice([v for v in OTHER_TYPES if not isinstance(v, kind) or isinstance(v, str)])


def _change_json(path: Path, change: Any) -> Damage | None:
    """Rewrite a JSON file in which something was changed; None if there is no such file."""
    if not path.exists():
        return None
    content = json.loads(path.read_text())
    damage: Damage | None = change(content)
    path.write_text(json.dumps(content))
    return damage


MUTATIONS: dict[str, Mutation] = {
    "config: other type": swap_type,
    "config: other number": swap_number,
    "config: inside a value": swap_nested,
    "config: keys": change_keys,
    "config: structure": break_structure,
    "tokenizer: values": change_tokenizer,
    "tokenizer: structure": break_tokenizer,
}
