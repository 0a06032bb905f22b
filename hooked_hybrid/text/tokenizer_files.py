"""Reading the files of a checkpoint's tokenizer as `transformers` does, without it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer
from tokenizers.processors import TemplateProcessing

from hooked_hybrid.outputs.foreign import parse_json
from hooked_hybrid.text.sentencepiece_file import read_sentencepiece, sentencepiece_tokenizer
from hooked_hybrid.text.tokenizer_guard import breaking_off, read_bytes, refuse_bombs, refuse_growth

_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask")


def read_files(folder: Path) -> dict[str, bytes]:
    """Return the contents of the tokenizer's files in a folder, by name.

    Raises:
        ValueError: one is not a plain file, or larger than any tokenizer's.
    """
    return {n: read_bytes(folder / n) for n in _FILES if (folder / n).exists()}


def read_backend(files: dict[str, bytes], folder: Path) -> tuple[Tokenizer, dict[str, Any]] | None:
    """Return the tokenizer and its settings, or None if the files contain none.

    Raises:
        ValueError: a file that cannot be read; names its path.
    """
    named: dict[str, Any] = {}
    if "tokenizer.json" in files:
        backend = _from_json(files, folder)
    elif "tokenizer.model" in files:
        backend, named = _from_sentencepiece(files, folder)
    else:
        return None
    settings = {**named, **_settings(files, folder)}
    path = folder / "tokenizer_config.json"
    with breaking_off(f"{path}: its tokens are not those of a tokenizer"):
        _add_special_tokens(backend, settings)
        if "tokenizer.json" not in files:
            _wrap_in_special_tokens(backend, settings)
    return backend, settings


def _object(files: dict[str, bytes], name: str, folder: Path) -> dict[str, Any]:
    """Return a JSON object, empty if there is no such file."""
    content = parse_json(files.get(name, b"{}"), folder / name)
    if not isinstance(content, dict):
        raise ValueError(f"{folder / name} does not hold an object")
    return content


def _settings(files: dict[str, bytes], folder: Path) -> dict[str, Any]:
    """Return the settings, including those in older files of special tokens."""
    content = _object(files, "tokenizer_config.json", folder)
    _check_settings(content, folder / "tokenizer_config.json")
    if "added_tokens_decoder" not in content:
        named = _object(files, "special_tokens_map.json", folder)
        _check_settings(named, folder / "special_tokens_map.json")
        added = _object(files, "added_tokens.json", folder)
        content |= named
        if added:
            content["added_tokens_decoder"] = {i: {"content": t} for t, i in added.items()}
    return content


def _check_settings(content: dict[str, Any], path: Path) -> None:
    for key, value in content.items():
        text = value.get("content") if isinstance(value, dict) else value
        is_flag = key in ("add_bos_token", "add_eos_token")
        is_used = is_flag or key in {f"{name}_token" for name in _NAMES}
        is_right = isinstance(text, bool) if is_flag else _is_text(text)
        is_right = text in ("left", "right") if key == "truncation_side" else is_right
        if (is_used or key == "truncation_side") and text is not None and not is_right:
            raise ValueError(f"{path}: {key} is {str(value)[:80]!a}")


def _is_text(value: Any) -> bool:
    """Whether a value is text that can be encoded; half a surrogate pair cannot."""
    return isinstance(value, str) and value.encode(errors="replace").decode() == value


def read_chat_template(files: dict[str, bytes], folder: Path) -> str | None:
    """Return the chat template: from its file, or from the settings, which may name several."""
    if "chat_template.jinja" in files:
        try:
            return files["chat_template.jinja"].decode()
        except UnicodeDecodeError as error:
            raise ValueError(f"{folder / 'chat_template.jinja'} is not UTF-8 text") from error
    found = _object(files, "tokenizer_config.json", folder).get("chat_template")
    if isinstance(found, list):
        named = {str(t.get("name")): t.get("template") for t in found if isinstance(t, dict)}
        found = named.get("default", next(iter(named.values()), None))
    return found if isinstance(found, str) else None


def _from_json(files: dict[str, bytes], folder: Path) -> Tokenizer:
    with breaking_off(f"{folder / 'tokenizer.json'} is not a tokenizer"):
        refuse_bombs(files["tokenizer.json"])
        tokenizer = Tokenizer.from_buffer(files["tokenizer.json"])
        refuse_growth(tokenizer)
        tokenizer.no_padding()  # the model pads and cuts texts
        tokenizer.no_truncation()
    return tokenizer


def _from_sentencepiece(files: dict[str, bytes], folder: Path) -> tuple[Tokenizer, dict[str, Any]]:
    """Return the tokenizer of a `tokenizer.model`, and the special tokens it names."""
    settings = _object(files, "tokenizer_config.json", folder)
    prefix = "always" if settings.get("legacy") is True else "first"
    prefix = "never" if settings.get("add_prefix_space") is False else prefix
    path = folder / "tokenizer.model"
    with breaking_off(f"{path} is not a sentencepiece model"):
        file = read_sentencepiece(files["tokenizer.model"])
        return sentencepiece_tokenizer(file, prefix), dict(file.names)


def _add_special_tokens(backend: Tokenizer, settings: dict[str, Any]) -> None:
    """Make the tokenizer recognise the special tokens of the settings in a text."""
    known = {token.content for token in backend.get_added_tokens_decoder().values()}
    decoder = settings.get("added_tokens_decoder") or {}
    added = [_make_added_token(decoder[key], False) for key in sorted(decoder, key=int)]
    new = [token for token in added if token.content not in known]
    if new:
        backend.add_tokens(new)
    known |= {token.content for token in new}
    special = [_make_added_token(value, True) for value in _named(settings)]
    if special := [token for token in special if token.content not in known]:
        backend.add_special_tokens(special)


def _named(settings: dict[str, Any]) -> Iterator[Any]:
    """Yield the special tokens of the settings, in the order of `transformers`."""
    for name in _NAMES:
        if (value := settings.get(f"{name}_token")) is not None:
            yield value
    more = settings.get("extra_special_tokens") or settings.get("additional_special_tokens") or ()
    if isinstance(more, dict):
        more = more.values()
    yield from (value for value in more if _is_text(value) or isinstance(value, dict))


def _make_added_token(value: Any, special: bool) -> AddedToken:
    """Return a token from its form in the files: its text, or an object with its options."""
    if isinstance(value, str):
        return AddedToken(value, special=special, normalized=not special)
    flags = {k: v for k, v in value.items() if k in _FLAGS and isinstance(v, bool)}
    content = value.get("content")
    if not _is_text(content):
        raise ValueError(f"a token is {str(content)[:80]!a}")
    return AddedToken(content, **{"special": special, **flags})


def _wrap_in_special_tokens(backend: Tokenizer, settings: dict[str, Any]) -> None:
    """Make the tokenizer add BOS and EOS around a text, according to the settings."""
    around, tokens = ["$A"], []
    for name, at in (("bos", 0), ("eos", len(around) + 1)):
        value = settings.get(f"{name}_token")
        text = value.get("content") if isinstance(value, dict) else value
        if settings.get(f"add_{name}_token") and text is not None:
            around.insert(at, text)
            tokens.append((text, backend.token_to_id(text)))
    if tokens:
        backend.post_processor = TemplateProcessing(single=around, special_tokens=tokens)
