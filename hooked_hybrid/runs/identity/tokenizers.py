"""The identity of a tokenizer: its files or its serialised form, and the special tokens."""

from __future__ import annotations

import json
from typing import Any

from hooked_hybrid.runs.identity.modules import stored_name
from hooked_hybrid.runs.identity.values import UntoldError, describe
from hooked_hybrid.text.text import Text

_OF_TRANSFORMERS = (
    "add_prefix_space",
    "clean_up_tokenization_spaces",
    "legacy",
    "special_tokens_map",
    "split_special_tokens",
    "truncation_side",
)


def tokenizer_identity(text: Text) -> dict[str, Any]:
    """Return the identity of a model's tokenizer.

    Returns:
        "kind" (its class), "content" (a hash of its vocabulary, merges, normaliser, added tokens
        and settings), "chat_template", and the special tokens and BOS as the model uses them.

    Raises:
        UntoldError: a user's tokenizer that cannot be pickled.
    """
    tokenizer = text.tokenizer
    try:
        content = describe(_content(tokenizer))["hash"]
    except UntoldError as error:
        raise UntoldError(
            f"the tokenizer, a {type(tokenizer).__name__}, could not be known again: it holds "
            f"{error}, whose content cannot be identified; give one that can be pickled"
        ) from error
    template = getattr(tokenizer, "chat_template", None)
    return {
        "kind": _kind(tokenizer),
        "content": content,
        "chat_template": None if template is None else describe(template)["hash"],
        "bos": text.bos,
        "eos": list(text.eos),
        "pad": text.pad,
        "prepends_bos": text.prepends_bos,
    }


def _kind(tokenizer: Any) -> str:
    kind = type(tokenizer)
    return f"{stored_name(kind.__module__)}.{kind.__qualname__}"


def _content(tokenizer: Any) -> Any:
    if isinstance(files := getattr(tokenizer, "files", None), dict) and files:  # a checkpoint's
        return files, {k: v for k, v in vars(tokenizer).items() if not k.startswith("_")}
    if hasattr(tokenizer, "to_str"):  # of `tokenizers`: it may cut or pad, too
        return tokenizer.to_str()
    about = {name: getattr(tokenizer, name, None) for name in _OF_TRANSFORMERS}
    if hasattr(tokenizer, "backend_tokenizer"):
        said = json.loads(tokenizer.backend_tokenizer.to_str())
        return about, {k: v for k, v in said.items() if k not in ("padding", "truncation")}
    if hasattr(tokenizer, "sp_model"):
        added = tokenizer.get_added_vocab()
        return about, added, tokenizer.sp_model.serialized_model_proto(), tokenizer.init_kwargs
    return tokenizer
