"""Differences between the run that began some results and the run that would resume them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

from hooked_hybrid.outputs.foreign import printable

MOST_NAMED = 4
"""Differences of one kind that an error lists; of the rest it states the number."""
_NAMES = {
    "weights": "the weights",
    "tokenizer": "the tokenizer",
    "prompts": "the prompts",
    "prompt_contents": "what the prompts say of themselves",
    "documents": "the documents",
    "encoding": "the tokenizer, or its BOS",
    "haystack": "the haystack",
    "interventions": "fwd_hooks",
    "hooks": "hooks on the model",
    "changes": "what is not as the config makes it:",
}
_UNRECORDED_NAMES = {"changes": "what a model's modules hold"}
_OF_ANOTHER_FORM = "what it says of itself is not of the form that this library writes"
_UNRECORDED = "cannot be proven the same"


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two experiments, as clauses; none if they are equal.

    Args:
        before: as read from the store. "identity" may lack entries that older versions of this
            library did not record; these cannot be proven equal, and are reported.
        now: JSON-able values. "identity" is from `model_identity`, "settings" a mapping of names to
            "spec" and "hooks".
    """
    now = json.loads(json.dumps(dict(now)))
    try:
        return _changes(before, now)
    except (AttributeError, LookupError, TypeError):  # values of types that no version wrote
        return [_OF_ANOTHER_FORM]


def identity_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return the differences between two models, in the form of `changes`."""
    return _of_models(before, json.loads(json.dumps(dict(now))))


def refusal(place: object, what: str, changed: Sequence[str], reading: str = "") -> str:
    """Return the reason why results cannot be resumed.

    Args:
        place: of the results.
        what: the kind of the results, such as "experiment".
        changed: of `changes`.
        reading: a clause on how they can still be read.
    """
    end = "give another folder, nothing is overwritten"
    differ = [clause for clause in changed if not clause.endswith(_UNRECORDED)]
    if differ:
        return printable(f"{place} holds another {what}: {'; '.join(differ)}; {end}")
    unproven = [clause.removesuffix(_UNRECORDED).strip() for clause in changed]
    return printable(
        f"{place} was begun by an older version of this library, which did not record all of "
        f"{', '.join(unproven)}: that they are the same cannot be proven; {end}{reading}"
    )


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    if "identity" in now and "identity" not in before:
        before = _adopted(before)
    found: list[str] = []
    for key in dict.fromkeys([*now, *before]):
        old, new, name = before.get(key), now.get(key), _NAMES.get(key, key)
        if key == "identity":
            found += _of_models(old or {}, new or {})
        elif key == "settings" and isinstance(old, dict) and isinstance(new, dict):
            found += _few(_of_settings(old, new))
        elif key not in before:
            found.append(f"{name} {_UNRECORDED}")
        elif not _same(old, new):
            found.append(_change(name, old, new))
    return found


def _adopted(before: Mapping[str, Any]) -> dict[str, Any]:
    """Return an older version's record in today's form, as far as it proves anything.

    The hash of the weights is still the same; those of tokenizers, configs and hooks were
    incomplete.
    """
    kept = dict(before)
    if isinstance(kept.get("weights"), str):  # an evaluation
        identity = {"weights": kept.pop("weights"), "dtype": kept.pop("dtype", None)}
        if kept.pop("hooks", None) == []:
            identity["hooks"] = []
        kept.pop("config", None)
        kept.pop("tokenizer", None)
    else:
        identity = {"weights": kept.pop("model", None), "dtype": kept.pop("dtype", None)}
    return {**kept, "identity": identity}


def _of_models(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    found: list[str] = []
    for key in dict.fromkeys([*now, *before]):
        name = _NAMES.get(key, key)
        if key not in before:
            found.append(f"{_UNRECORDED_NAMES.get(key, name)} {_UNRECORDED}")
        elif not _same(old := before[key], new := now.get(key)):
            if key == "weights" and _sizes_differ(before, now):
                continue  # they are hashed together
            if key == "hooks":
                found += _few(_of_hooks(old, new or []))
            elif isinstance(old, dict) and isinstance(new, dict):
                found += _few(_of_fields(name, old, new))
            else:
                found.append(_change(name, old, new))
    return found


def _sizes_differ(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    old, new = before.get("config"), now.get("config")
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return False
    return any(not _same(old.get(k), new.get(k)) for k in ("layers", "d_model", "norm"))


def _of_hooks(before: Sequence[Mapping[str, Any]], now: Sequence[Mapping[str, Any]]) -> list[str]:
    places = [[(hook["point"], hook["direction"]) for hook in hooks] for hooks in (before, now)]
    if places[0] != places[1]:
        old, new = (", ".join(point for point, _ in each) or "none" for each in places)
        return [f"hooks on the model: {old} -> {new}"]
    return [
        f"the hook on {new['point']}{_read_with(old, new)}"
        for old, new in zip(before, now, strict=True)
        if not _same(old, new)
    ]


def _of_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in dict.fromkeys([*now, *before]) if (name in before) != (name in now)]
    found = [f"setting {n!r}: {'added' if n in now else 'left out'}" for n in names]
    for name in (name for name in now if name in before):
        old, new = before[name], now[name]
        spec, hooks = old.get("spec"), old.get("hooks")
        if set(old) != {"spec", "hooks"}:  # an older one, with an incomplete hash
            spec, hooks = {k: v for k, v in old.items() if k != "hooks"}, None
        if not _same(spec, new["spec"]):
            found += _of_fields(f"setting {name!r}:", spec, new["spec"])
        elif hooks is None:
            found.append(f"the hooks of setting {name!r} {_UNRECORDED}")
        elif not _same(hooks, new["hooks"]):
            found.append(f"setting {name!r}: hooks{_read_with(hooks, new['hooks'])}")
    return found


def _read_with(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """Return the differing versions on which the hashes of functions depend."""
    kept = set(before) | set(now)
    others = [
        _change(name, before.get(name), now.get(name))
        for name in sorted(kept - {"hash", "point", "direction"})
        if before.get(name) != now.get(name)
    ]
    return f" (read under other versions: {', '.join(others)})" if others else ""


def _of_fields(name: str, before: Any, now: Any) -> list[str]:
    return [
        _change(f"{name} {'.'.join(path)}", old, new) for path, old, new in _leaves(before, now)
    ]


def _leaves(before: Any, now: Any, path: tuple[str, ...] = ()) -> Iterator[Any]:
    """Yield the paths at which two values differ, with the values."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys([*now, *before]):
            yield from _leaves(before.get(key), now.get(key), (*path, str(key)))
    elif isinstance(before, list) and isinstance(now, list) and len(before) == len(now):
        for i, (old, new) in enumerate(zip(before, now, strict=True)):
            yield from _leaves(old, new, (*path, str(i)))
    elif not _same(before, now):
        yield path, before, now


def _change(name: str, before: Any, now: Any) -> str:
    """Return a clause, with the values if they are short."""
    shown = [json.dumps(value) for value in (before, now)]
    is_short = all(len(text) <= 24 for text in shown) and not _is_hash(before) | _is_hash(now)
    return f"{name} {shown[0]} -> {shown[1]}" if is_short else name


def _is_hash(value: Any) -> bool:
    return isinstance(value, str) and len(value) >= 16 and set(value) <= set("0123456789abcdef")


def _few(clauses: Sequence[str]) -> list[str]:
    """Return some clauses, and the number of others."""
    left = len(clauses) - MOST_NAMED
    named = list(islice(clauses, MOST_NAMED))
    if left <= 0:
        return named
    are_unproven = all(clause.endswith(_UNRECORDED) for clause in clauses)
    return [*named, f"{left} more {_UNRECORDED}" if are_unproven else f"{left} more"]


def _same(before: Any, now: Any) -> bool:
    """Whether two values are equal in JSON, with NaN equal to itself."""
    return json.dumps(before, sort_keys=True) == json.dumps(now, sort_keys=True)
